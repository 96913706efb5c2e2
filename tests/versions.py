"""Train and evaluate a tiny model with the oldest and with the newest versions that are allowed.

For each, a virtual environment in ``build/versions`` lies over this one: it holds the packages
whose bounds in pyproject.toml are tried, and what these prescribe. Run by ``make test-versions``::

    python tests/versions.py [oldest] [newest]
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import tomllib
import venv
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VARIED = {"trl", "transformers", "peft", "accelerate", "datasets", "bitsandbytes"}
PRESCRIBED = {"tokenizers", "huggingface-hub"}  # by transformers, within narrow bounds
RESOLUTION = {"oldest": "lowest-direct", "newest": "highest"}
TESTS = "tests/dpo/test_rounds.py tests/dpo/test_loss.py tests/evaluation/test_measure.py".split()


def named(lines: Iterable[str], names: set[str], *, without: bool = False) -> list[str]:
    """Return the requirements that are of these packages, or of others."""
    lines = [line.partition("#")[0].strip() for line in lines]
    return [x for x in lines if x and (re.match(r"[\w-]+", x)[0] in names) is not without]


def uv(*arguments: object, text: str = "") -> str:
    command = [sys.executable, "-m", "uv", "pip", *map(str, arguments), "--quiet"]
    return subprocess.run(command, input=text, stdout=subprocess.PIPE, text=True, check=True).stdout


def environment(which: str) -> Path:
    """Make the environment of the oldest or the newest versions; return its Python."""
    home = ROOT / "build" / "versions" / which
    venv.create(home, clear=True, symlinks=os.name != "nt")
    python = home / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    place = {"base": str(home), "platbase": str(home)}
    below = Path(sysconfig.get_path("purelib", "venv", place)) / "below.pth"
    below.write_text(sysconfig.get_path("purelib"))

    bounds = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    pinned = (ROOT / "requirements.txt").read_text().splitlines()
    others = home / "others.txt"
    others.write_text("\n".join(named(pinned, VARIED, without=True)))
    how = ("--resolution", RESOLUTION[which], "--constraint", others, "--python", python)
    found = uv("compile", "-", *how, text="\n".join(named(bounds, VARIED))).splitlines()
    versions = named(found, VARIED | PRESCRIBED)
    print(f"{which}: {', '.join(versions)}", flush=True)
    uv("install", "--python", python, "--no-deps", *versions)
    return python


def main(wanted: list[str]) -> int:
    failed = 0
    for which in wanted or RESOLUTION:
        options = ["-q", "-n", "2", "-p", "no:cacheprovider", "-m", "not slow and not model"]
        command = [environment(which), "-m", "pytest", *options, *TESTS]
        failed |= subprocess.run(command, cwd=ROOT, check=False).returncode
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
