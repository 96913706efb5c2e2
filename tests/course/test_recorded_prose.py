"""What notebook 5 says in prose of the course's records, held to the records."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from grath_utils.files import read_jsonl
from grath_utils.pairs import wilson

APPENDIX = Path(__file__).resolve().parents[2] / "notebooks" / "appendix"


def records(name: str) -> list[dict[str, Any]]:
    return list(read_jsonl(APPENDIX / f"recipe_{name}.jsonl"))


def excludes_zero(found: Mapping[str, Any]) -> bool:
    low, high = found["ci95"]
    return low > 0 or high < 0


def test_the_model_can_judge_facts_and_not_popular_errors() -> None:
    for row in records("sealed"):
        low, high = wilson(row["kept_right"], row["kept"])
        assert low > 0.8 if row["kind"] == "plain" else high < 0.8, row


def test_the_models_own_words_lift_truthful_qa_and_annotated_ones_are_no_upper_bound() -> None:
    over = {
        (row["arm"], row["benchmark"], row["metric"]): row["over_random"]
        for row in records("arms")
        if "over_random" in row
    }
    for metric in ("mc1", "mc2"):
        own, annotated = (over[arm, "truthfulqa_mc", metric] for arm in ("own", "annotated"))
        assert own["ci95"][0] > 0
        assert annotated["change"] < own["change"]
    for (_, benchmark, metric), found in over.items():
        if benchmark == "probe_testing" and metric in ("mc1", "mc2"):
            assert not excludes_zero(found), "notebook 5, section 9: only TruthfulQA moves"


def test_a_part_of_the_gain_needs_no_fitting_question_and_a_part_does() -> None:
    mc1 = {
        row["trial"]: row
        for row in records("small")
        if (row["benchmark"], row["metric"]) == ("truthfulqa_mc", "mc1")
    }
    for trial in ("science 14", "mismatched 14", "science 14 minus mismatched 14"):
        assert mc1[trial]["ci95"][0] > 0
    assert mc1["judged14"]["ci95"][0] < 0, "notebook 5, section 4: clauses do not lift"


def test_labels_turned_round_ruin_easy_facts_and_the_judge_adds_something() -> None:
    rows = {(row["arm"], row["benchmark"], row["metric"]): row for row in records("labels")}
    own, quarter, coin, turned = (
        {key[1:]: row for key, row in rows.items() if key[0] == arm}
        for arm in ("own", "25% turned round", "random", "inverted")
    )
    facts, mc1, mc2 = ("retention", "acc"), ("truthfulqa_mc", "mc1"), ("truthfulqa_mc", "mc2")
    assert turned[facts]["ci95"][1] < -20
    assert not excludes_zero(coin[facts])
    assert turned[mc2]["ci95"][1] < 0
    assert own[facts]["base"] > 90, "nine in ten"
    for key in (mc1, mc2):
        assert own[key]["over_unjudged"]["ci95"][0] > 0
        assert quarter[key]["change"] < own[key]["change"] / 2, "more than half of the gain"
    arc = ("arc_challenge, zero-shot", "acc")
    assert own[arc]["over_random"]["ci95"][0] > 0
    assert not excludes_zero(coin[arc])
    assert turned[arc]["ci95"][1] < 0
    assert rows["mismatched", *arc]["ci95"][0] > 0, "it is no answer to the question"
    assert own[("retention", "acc_norm")]["over_unjudged"]["ci95"][0] > 0
    assert rows["unjudged", "retention", "acc_norm"]["over_random"]["ci95"][1] < 0, "a loss"
    assert own[mc1]["over_25% turned round"]["ci95"][0] > 0
    assert {len(arm[mc1]["seeds"]) for arm in (own, coin, turned)} == {3}
