"""A run that is killed in every stage, or finds the disk full, ends as one that was not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from fault_injection import check_same

KILLS = 3  # in each stage

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="kill -9 and fork are POSIX"),
]


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
