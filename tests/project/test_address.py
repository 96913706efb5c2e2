"""One command writes another address of the repository everywhere, and outputs stay valid."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run(*command: str, cwd: Path) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode in (0, 1), done.stderr  # 1: git grep found nothing
    return done.stdout


def test_another_address_and_version(tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    run("git", "clone", "--quiet", "--shared", str(ROOT), str(copy), cwd=tmp_path)
    for name in (".github/address.py", "pyproject.toml"):
        (copy / name).write_bytes((ROOT / name).read_bytes())
    run("git", "add", "-A", cwd=copy)
    said = run(sys.executable, ".github/address.py", "some-one/a.course", "v2", cwd=copy)
    assert {"README.md", "CITATION.cff", "pyproject.toml"} <= set(said.splitlines())
    left = run("git", "grep", "-lE", "grath-tutorial(/|.github.io/)grath-tutorial", cwd=copy)
    assert left.splitlines() in ([], ["tests/project/test_address.py"])
    notebook = copy / "notebooks" / "02_qlora_dpo.ipynb"
    code = "".join(json.loads(notebook.read_text(encoding="utf-8"))["cells"][1]["source"])
    assert '"https://github.com/some-one/a.course", "v2"' in code
    assert 'version = "v2"' in (copy / "pyproject.toml").read_text(encoding="utf-8")
    assert "github/some-one/a.course/blob/v2/notebooks/" in notebook.read_text(encoding="utf-8")
    check = (
        "import sys; sys.path.insert(0, '.github'); import nbformat; from address import *\n"
        "for path in rendered_notebooks():\n"
        "    stamp = nbformat.read(path, as_version=4).metadata['grath']\n"
        "    assert [stamp['source_sha256'], stamp['code_sha256']] == digests(path), path\n"
        "print('valid')"
    )
    assert run(sys.executable, "-c", check, cwd=copy).strip() == "valid"
