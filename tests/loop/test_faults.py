"""A run that is killed in every stage, or finds the disk full, ends as one that was not."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from fault_injection import check_same, run_script
from helpers import config_for, write_questions

from grath_utils.files import write_json

KILLS = 2  # in each stage
SETTINGS = {
    "pairs.filters": ["none"],
    "pairs.batch_size": 2,
    "pairs.max_new_tokens": 16,
    "dpo.steps": 4,
    "dpo.save_every": 1,
    "evaluation.benchmarks": ["probe"],
    "evaluation.batch_tokens": 64,
}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="kill -9 and fork are POSIX"),
]


@pytest.fixture(scope="module")
def hurt(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("faults")
    questions = write_questions(folder / "questions.jsonl")
    write_json(folder / "config.json", config_for(tiny_llama, questions, **SETTINGS).to_dict())
    return folder, run_script("fault_injection.py", folder, KILLS, 7)


def test_killed_in_every_stage_it_ends_the_same(hurt) -> None:
    folder, report = hurt
    assert len(report["kills"]) == 10
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
