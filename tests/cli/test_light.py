"""What only reads a run, or says that there is none, loads nothing that computes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from grath_utils.config import load_config
from grath_utils.files import read_jsonl, write_jsonl
from grath_utils.loop.run_dir import Run, open_run

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


def call(folder: Path, *arguments: str) -> tuple[int, set[str], float, str]:
    """Run a command; return its exit code, what it has loaded, its memory in MiB, its errors."""
    done = subprocess.run(
        [sys.executable, "-c", CODE, *arguments], cwd=folder, capture_output=True, text=True
    )
    ended, modules, peak = json.loads(done.stdout.splitlines()[-1])
    return ended, set(modules), peak, done.stderr


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
    ended, modules, peak, errors = call(tmp_path, *arguments)
    assert ended == code, errors
    assert HEAVY & modules == set()
    assert peak < most
    assert ("holds no run" in errors) == ("nothing" in arguments and "run" not in arguments)


def test_a_finished_run_is_shown_and_reported_without_torch(tmp_path: Path, small_run: Run) -> None:
    run = Run(shutil.copytree(small_run.path, tmp_path / "run"), small_run.config)
    for command in ("status", "report", "report"):
        ended, modules, peak, errors = call(tmp_path, command, "--run-dir", "run")
        assert ended == 0, errors
        assert HEAVY & modules == set()
    assert "matplotlib" not in modules  # the pictures are there, and show what the run holds
    assert peak < 150
    drawn = {path: path.read_bytes() for path in run.figures.iterdir()}
    log = read_jsonl(run.training_log(1))
    write_jsonl(run.training_log(1), [{**row, "loss": 0.5} for row in log])
    run.manifest.unlink()
    assert call(tmp_path, "report", "--run-dir", "run")[0] == 0
    changed = [path.name for path, old in drawn.items() if path.read_bytes() != old]
    assert changed == ["training_1.png"]


def test_trl_is_loaded_for_training_alone(
    tmp_path: Path, tiny_llama: Path, questions: Path
) -> None:
    model = ["--model", str(tiny_llama), "--set", "pairs.shots=0", "pairs.filters=[none]"]
    model += ["pairs.mode=default", "pairs.judge=none"]
    pairs = ["pairs", "--questions", str(questions), "--limit", "8", "--out", "pairs.jsonl"]
    evaluate = ["evaluate", "--benchmark", "probe", "--limit", "2", "--out", "probe.json"]
    for command in (pairs, evaluate):
        ended, modules, _, errors = call(tmp_path, *command, *model)
        assert ended == 0, errors
        assert "torch" in modules
        assert {"trl", "datasets"} & modules == set()
