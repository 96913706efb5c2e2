"""A run that is killed in every stage, or finds the disk full, ends as one that was not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from grath_utils.artifacts import read_json

KILLS = 3  # in each stage
IGNORED = (".lock",)
VOLATILE = {"seconds", "resumed", "peak_memory_mib", "created", "finished", "started"}

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="kill -9 and fork are POSIX")


@pytest.fixture(scope="module")
def hurt(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("faults")
    questions = folder / "questions.jsonl"
    rows = [{"id": f"q{i}", "question": f"What is thing number {i}?"} for i in range(8)]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    script = Path(__file__).with_name("fault_injection.py")
    done = subprocess.run(
        [sys.executable, script, folder, tiny_llama, questions, str(KILLS), "7"],
        capture_output=True,
        text=True,
        timeout=900,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
    )
    assert done.returncode == 0, done.stderr + done.stdout
    return folder, json.loads(done.stdout.splitlines()[-1])


def contents(run: Path) -> dict[str, object]:
    """Every file of a run, without what tells when and how fast it was made."""
    found: dict[str, object] = {}
    for path in sorted(p for p in run.rglob("*") if p.is_file() and p.name not in IGNORED):
        name = path.relative_to(run).as_posix()
        if name == "manifest.json":  # hashes of files with times in them
            found[name] = sorted(read_json(path))
        elif path.suffix == ".json":
            found[name] = _without_times(read_json(path), run.name)
        else:
            found[name] = path.read_bytes()
    return found


def _without_times(value: object, run_name: str) -> object:
    if isinstance(value, dict):
        kept = {k: v for k, v in value.items() if k not in VOLATILE and not k.endswith("seconds")}
        return {k: _without_times(v, run_name) for k, v in kept.items()}
    if isinstance(value, list):
        return [_without_times(item, run_name) for item in value]
    return value.replace(run_name, "RUN") if isinstance(value, str) else value


def check_same(run: Path, whole: Path) -> None:
    expected, found = contents(whole), contents(run)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == value, f"{run.name}/{name} differs from the undisturbed run"
    assert [p for p in run.rglob(".*") if p.name not in IGNORED] == []


def test_killed_in_every_stage_it_ends_the_same(hurt) -> None:
    folder, report = hurt
    assert len(report["kills"]) == 13
    assert min(report["kills"].values()) >= KILLS, report["kills"]
    for run in (folder / "killed").iterdir():
        check_same(run, folder / "whole")


def test_a_full_disk_is_named_and_costs_nothing(hurt) -> None:
    folder, report = hurt
    assert report["full"]["other"] == []
    assert report["full"]["errors"]
    for line in report["full"]["errors"]:
        assert "No space left on device" in line
        assert "run the same command again" in line
    for run in (folder / "full").iterdir():
        check_same(run, folder / "whole")
