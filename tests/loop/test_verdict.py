"""Sentences that are chosen by a run's numbers, tested on both sides of each threshold."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from grath_utils import loop
from grath_utils.cli import main
from grath_utils.evaluation import RULES
from grath_utils.files import read_json
from grath_utils.loop import state
from grath_utils.loop.run_dir import Run
from grath_utils.loop.verdict import (
    DISPLACED,
    displaced,
    outcome,
    over_base,
    over_placebo,
    retained,
    started_low,
)


def change(value: float, low: float, high: float) -> dict:
    return {"value": value, "ci95": [low, high], "smallest_detectable": 0.031}


@pytest.mark.parametrize(
    ("gain", "begins"),
    [
        (
            change(0.05, 0.001, 0.1),
            "On probe what the labels teach is seen: mc2 stands +5.0 [+0",
        ),
        (
            change(0.05, 0.0, 0.1),
            "On probe no gain over the placebo is seen: mc2 +5.0 [+0.0, ",
        ),
        (change(-0.05, -0.1, 0.0), "On probe no gain over the placebo is seen"),
        (change(-0.05, -0.1, -0.001), "On probe the placebo did better: mc2 -5.0"),
        ({"value": 1.0, "ci95": None}, "On probe no gain over the placebo is seen: mc2 +100.0 [–]"),
    ],
)
def test_over_the_placebo(gain, begins):
    assert over_placebo("probe", "mc2", gain).startswith(begins)


def test_what_was_not_seen_says_what_could_have_been():
    for say in (over_placebo, over_base):
        said = say("x", "mc1", change(0.0, -0.1, 0.1))
        assert "(a true change of 3.1 is found four times in five)" in said


def test_without_a_placebo_a_gain_is_left_open():
    assert "loop.placebo=true" in over_base("probe", "mc1", change(0.05, 0.001, 0.1))
    assert over_base("probe", "mc1", change(-0.05, -0.1, -0.001)).startswith("On probe mc1 fell")


UP, LEVEL, DOWN = change(0.05, 0.001, 0.1), change(0.0, -0.1, 0.1), change(-0.05, -0.1, -0.001)


@pytest.mark.parametrize(
    ("mc1", "mc2", "said"),
    [
        (UP, UP, "is more truthful than the base model (p"),
        (UP, LEVEL, "is more truthful than the base model, though not by every measure (p"),
        (UP, DOWN, "is better than the base model by one measure and worse by another (p"),
        (LEVEL, LEVEL, "is not seen to be more truthful than the base model (p"),
        (LEVEL, DOWN, "is less truthful than the base model, though not by every measure (p"),
        (DOWN, DOWN, "is less truthful than the base model (p"),
    ],
)
def test_the_verdict_by_two_measures(mc1, mc2, said):
    found = {("p", "mc1"): mc1, ("p", "mc2"): mc2, ("easy", "acc"): DOWN}  # no truth in the last
    told = outcome(found, "the base model")
    assert told.startswith(said)
    assert "easy" not in told


def test_the_verdict_without_a_measure_of_truth():
    assert outcome({("easy", "acc"): UP}, "x").startswith("is more often right than x (easy acc ")
    assert outcome({}, "x") == ""


def test_what_was_known_is_lost_or_not_seen_to_be():
    said = [retained(change(0, *ends)) for ends in ((-0.2, -0.1), (-0.1, 0.1), (0.1, 0.2))]
    assert [line.partition(":")[0] for line in said] == [
        "Easy facts were lost",
        "No loss of easy facts is seen",
        "No loss of easy facts is seen",
    ]


def signals(chosen: float, rejected: float) -> dict:
    return {"pairs": ["a", "b"], "chosen": [chosen] * 2, "rejected": [rejected] * 2}


@pytest.mark.parametrize(
    ("chosen", "rejected", "begins"),
    [
        (-10 - DISPLACED, -18, "Displacement: the margin on held-out pairs rose by 5.0 nats while"),
        (-9.9 - DISPLACED, -18, "Displacement: "),
        (
            -10.1,
            -18,
            "The margin on held-out pairs rose by 7.9 nats, and the chosen answers lost less",
        ),
        (
            -9,
            -18,
            "The margin on held-out pairs rose by 9.0 nats, and the chosen answers did not",
        ),
        (-12, -12, "Held-out pairs are not told apart better than before: margin +0.0 nats"),
    ],
)
def test_displacement_has_its_alarm(chosen, rejected, begins):
    before = signals(-10, -10)
    if begins == "Displacement: ":  # a tenth of a nat less, and the chosen answers count as kept
        assert not displaced(before, signals(chosen, rejected)).startswith(begins)
    else:
        assert displaced(before, signals(chosen, rejected)).startswith(begins)


def test_without_held_out_pairs_nothing_is_said_of_the_margin():
    nothing = {"pairs": [], "chosen": [], "rejected": []}
    assert "nothing is known of the margin" in displaced(nothing, nothing)


def test_a_base_at_the_level_of_blind_rules_is_named():
    rules = {**dict.fromkeys(RULES, 0.3), "uniform_mc2": 0.5}
    models = {"base": {"metrics": {"mc1": {"value": 0.4, "ci95": [0.35, 0.45]}}, "controls": rules}}
    high = started_low("probe", models) == ""
    models["base"]["metrics"]["mc1"]["ci95"][0] = 0.1
    assert high
    assert started_low("probe", models).startswith("Before training, mc1 on probe stood no higher")
    assert started_low("probe", {}) == ""


def test_a_finished_run_is_told(small_run: Run):
    said = loop.what_happened(small_run)
    assert loop.verdict(small_run).count(". ") == 0, "one sentence"
    assert "than the base model (probe mc1 " in loop.verdict(small_run)
    assert any("probe" in line for line in said)
    assert any("margin" in line for line in said)


@pytest.mark.parametrize("command", ["status", "report"])
def test_a_command_reads_each_file_of_a_run_once(
    command: str, small_run: Run, tmp_path: Path, monkeypatch, capsys
):
    read: Counter[str] = Counter()

    def counted(path: Path, form: Any) -> Any:
        read[f"{path.parent.name}/{path.name}"] += 1
        return read_json(path, form)

    monkeypatch.setattr(state, "read_json", counted)
    run = shutil.copytree(small_run.path, tmp_path / "run")
    assert main([command, str(run)]) == 0
    assert {"base/probe.json", "signals/base.json"} <= read.keys()
    assert set(read.values()) == {1}, read
