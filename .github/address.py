"""Write another address of the repository, or another version, wherever they stand.

Badges, set-up cells and links name the address; set-up cells and badges name the branch or tag that
they open. pyproject.toml is the one place that decides what these are now::

    python .github/address.py org/name [TAG]
"""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from grath_utils.workshop.render import rendered_notebooks, source_digest  # noqa: E402


def main(address: str, version: str | None = None) -> None:
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", address):
        sys.exit(f"error: {address!r} is no address; it looks like org/name")
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    old = settings["project"]["urls"]["Repository"].removeprefix("https://github.com/")
    was = settings["tool"]["grath"]["version"]
    version = version or was
    pages = [".github.io/".join(name.split("/")) for name in (old, address)]
    changes = (
        (rf"github\.com/{old}(?![\w-])", f"github.com/{address}"),
        (
            rf"colab\.research\.google\.com/github/{old}/",
            f"colab.research.google.com/github/{address}/",
        ),
        (re.escape(pages[0]), pages[1]),
        (rf"({address}/(?:blob|tree))/{re.escape(was)}/", rf"\1/{version}/"),
        (rf'({address}\\?", \\?"){re.escape(was)}(\\?")', rf"\g<1>{version}\2"),
        (rf'(\[tool\.grath\][^\n]*\nversion = "){re.escape(was)}"', rf'\g<1>{version}"'),
    )
    before = {path: digests(path) for path in rendered_notebooks()}
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True)
    for name in filter(None, listed.stdout.decode().split("\0")):
        try:
            text = (ROOT / name).read_bytes().decode()
        except (UnicodeDecodeError, FileNotFoundError):
            continue
        new = text
        for pattern, replacement in changes:
            new = re.sub(pattern, replacement, new)
        if new != text:
            (ROOT / name).write_bytes(new.encode())
            print(name)
    for path, stamps in before.items():  # the outputs stay valid
        text = path.read_bytes().decode()
        for stamp, renewed in zip(stamps, digests(path), strict=True):
            text = text.replace(stamp, renewed)
        path.write_bytes(text.encode())


def digests(notebook: Path) -> list[str]:
    cells = nbformat.read(notebook, as_version=4).cells
    return [source_digest(cells, code_only=only) for only in (False, True)]


if __name__ == "__main__":
    main(*sys.argv[1:])
