"""What only reads a run, or says that there is none, loads nothing that computes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from grath_utils.config import load_config
from grath_utils.loop.run_dir import open_run

HEAVY = {"torch", "transformers", "datasets", "peft", "trl", "accelerate", "pandas"}
CODE = """
import json, re, sys
from grath_utils.cli import main
try:
    code = main(sys.argv[1:])
except SystemExit as stop:
    code = stop.code or 0
try:
    held = re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())
except OSError:  # not on Linux
    held = None
print()
print(json.dumps([code, [*sys.modules], int(held[1]) / 1024 if held else 0]))
"""


@pytest.mark.parametrize(
    ("arguments", "code", "most"),
    [
        (["--help"], 0, 60),
        (["options"], 0, 60),
        (["status", "--run-dir", "nothing"], 2, 60),
        (["report", "--run-dir", "nothing"], 2, 60),
        (["timings", "--run-dir", "nothing"], 2, 60),
        (["chat", "--run-dir", "nothing"], 2, 60),
        (["run", "--profile", "nothing"], 2, 60),
        (["status", "--run-dir", "run"], 0, 150),
    ],
)
def test_it_answers_without_torch(
    tmp_path: Path, arguments: list[str], code: int, most: int
) -> None:
    """``most`` is the memory that it may take, in MiB."""
    open_run(tmp_path / "run", load_config("smoke"))
    done = subprocess.run(
        [sys.executable, "-c", CODE, *arguments], cwd=tmp_path, capture_output=True, text=True
    )
    ended, modules, peak = json.loads(done.stdout.splitlines()[-1])
    assert ended == code, done.stderr
    assert HEAVY & set(modules) == set()
    assert peak < most
    assert ("holds no run" in done.stderr) == ("nothing" in arguments and "run" not in arguments)
