"""The sealed answers: one pair for each of our questions, whose truth cannot be seen from its form.

A judge is measured on them: what rules that read no question find out there is no knowledge. So
every such rule must be right on about half of the pairs, on those where a popular belief is false
as on plain facts. The bound of 5 points is 2.0 standard errors of a share of one half of 400 pairs,
and 2.9 of all 840.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import chain

import numpy as np
import pytest
from overlap import content_words, truthful_qa_answers, words
from test_own_data import DATA, HEDGES, PUNCTUATION, load
from test_probe import HELD_OUT_RULES, MIRROR, MORE_RULES, auc, held_out_scores, needs_mirror

from grath_utils.evaluation.blind_rules import RULES, has_negation, rule_accuracy

ROWS = load("sealed_answers")
FIELDS = ["id", "kind", "correct", "incorrect", "source"]
KINDS = ("misconception", "plain")
PARTS = {"all": ROWS, **{kind: [r for r in ROWS if r["kind"] == kind] for kind in KINDS}}
SIDES = ("correct", "incorrect")
BOUND = 0.05


@pytest.fixture(params=PARTS)
def rows(request: pytest.FixtureRequest) -> list[dict]:
    """All pairs, and those of each kind: every one of them has to be balanced by itself."""
    return PARTS[request.param]


def texts(rows: list[dict], side: str) -> list[str]:
    return [row[side] for row in rows]


def share_of_wins(rows: list[dict], value: Callable[[dict, str], float]) -> float:
    """Return how often the correct answer has the higher value; a tie counts half."""
    scores = [(value(row, "correct"), value(row, "incorrect")) for row in rows]
    return float(np.mean([(c > i) + 0.5 * (c == i) for c, i in scores]))


def test_one_row_for_each_question_in_its_order() -> None:
    assert [row["id"] for row in ROWS] == [row["id"] for row in load("questions")]


def test_schema() -> None:
    for row in ROWS:
        assert list(row) == FIELDS, row["id"]
        assert row["kind"] in KINDS, row["id"]
        work, _, title = row["source"].partition(", ")
        assert work, f"{row['id']} names no work"
        assert title.strip('"'), f"{row['id']} names no article of {work}"
        for side in SIDES:
            text = row[side]
            assert text == " ".join(text.split()), row["id"]
            assert all(" " <= c <= "~" or c in PUNCTUATION for c in text), row["id"]
            assert text[0].isupper() or text[0] == '"', f"{row['id']}: {text!r}"
            assert text.endswith((".", '."')), f"{row['id']}: {text!r} is no sentence"
            assert 2 <= len(text.split()) <= 16, f"{row['id']}: {text!r}"
        assert words(row["correct"]) != words(row["incorrect"]), row["id"]
        lengths = sorted(len(row[side]) + 12 for side in SIDES)
        assert lengths[1] <= 1.6 * lengths[0], f"{row['id']}: one answer is far longer"


def test_the_loop_sees_neither_kind_nor_answers() -> None:
    for row in load("questions"):
        assert list(row) == ["id", "part", "topic", "question"]


def test_about_half_are_misconceptions() -> None:
    share = len(PARTS["misconception"]) / len(ROWS)
    assert 0.45 <= share <= 0.55, f"{share:.1%}"


@pytest.mark.parametrize("name", [*RULES, *MORE_RULES, *HELD_OUT_RULES])
def test_rules_that_read_no_question_are_right_on_half_of_the_pairs(name, rows) -> None:
    rule = {**RULES, **MORE_RULES, **HELD_OUT_RULES}[name]
    accuracy = np.mean(rule_accuracy(rule, [([r[s] for s in SIDES], [1, 0]) for r in rows]))
    assert abs(accuracy - 0.5) <= BOUND, f"{name}: {accuracy:.1%}"


def test_words_of_the_question_do_not_tell_the_answer(rows) -> None:
    asked = {row["id"]: content_words(row["question"]) for row in load("questions")}
    share = share_of_wins(rows, lambda row, side: len(content_words(row[side]) & asked[row["id"]]))
    assert abs(share - 0.5) <= BOUND, f"{share:.1%}"


def test_negations_are_as_frequent_on_both_sides(rows) -> None:
    true, false = (sum(map(has_negation, texts(rows, side))) for side in SIDES)
    assert abs(true - false) <= 2 * np.sqrt(true + false), (true, false)


def test_hedges_do_not_tell_the_answer(rows) -> None:
    share = share_of_wins(rows, lambda row, side: bool(HEDGES & set(words(row[side]))))
    assert abs(share - 0.5) <= BOUND, f"{share:.1%}"


def test_both_sides_are_equally_long(rows) -> None:
    true, false = (np.mean([len(text) for text in texts(rows, side)]) for side in SIDES)
    assert abs(true - false) / false <= 0.04, (true, false)


def test_both_sides_open_alike() -> None:
    opening = [Counter(words(text)[0] for text in texts(ROWS, side)) for side in SIDES]
    for word in set(chain(*opening)):
        true, false = (counts[word] for counts in opening)
        assert abs(true - false) <= 2.6 * np.sqrt(true + false), (word, true, false)


@pytest.mark.parametrize("ridge", [10.0, 100.0])
def test_a_classifier_of_surface_features_is_near_chance(ridge: float, rows) -> None:
    answers = [row[side] for row in rows for side in SIDES]
    y = np.array([1, 0] * len(rows))
    value = auc(held_out_scores(answers, y, np.repeat(np.arange(len(rows)), 2), ridge), y)
    assert value < 0.60, f"AUC {value:.3f}"


def test_no_sealed_answer_is_one_of_the_probe() -> None:
    theirs = {" ".join(words(c)) for item in load("probe") for c in item["mc2_targets"]["choices"]}
    for row in ROWS:
        for side in SIDES:
            assert " ".join(words(row[side])) not in theirs, row["id"]


@needs_mirror
def test_no_sealed_answer_is_one_of_truthful_qa() -> None:
    theirs = {" ".join(words(text)) for text in truthful_qa_answers(MIRROR)}
    for row in ROWS:
        for side in SIDES:
            folded = words(row[side])
            assert len(folded) < 4 or " ".join(folded) not in theirs, row["id"]


def test_the_datasheet_gives_the_counts() -> None:
    datasheet = " ".join((DATA / "README.md").read_text(encoding="utf-8").split())
    assert f"| `sealed_answers.jsonl` | {len(ROWS)} |" in datasheet
    counts = f"{len(PARTS['misconception'])} misconceptions and {len(PARTS['plain'])} plain facts"
    assert counts in datasheet, f"the datasheet does not say {counts!r}"
