"""The question-blind rules, on cases small enough to work by hand and on TruthfulQA itself."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grath_utils.errors import DataError
from grath_utils.evaluation.blind_rules import (
    RULES,
    UNIFORM_MC2,
    blind_rule_scores,
    has_negation,
    rule_accuracy,
    word_overlap,
)
from grath_utils.files import read_jsonl

HALF, THIRD = 1 / 2, 1 / 3


def test_negations_are_found_and_other_words_are_not() -> None:
    negated = "No, it is flat.|It is not flat.|It isn't flat.|It isn\u2019t flat.|NEVER!"
    negated += "|Nothing happens.|They cannot fly.|A day without rain.|Neither of the two."
    plain = "The notes were known.|A knot in the north.|Nonetheless it is unsafe.|"
    assert all(map(has_negation, negated.split("|")))
    assert not any(map(has_negation, plain.split("|")))


def test_word_overlap_by_hand() -> None:
    # {a, b, c} and {b, c, d}: 2 shared of 4
    assert word_overlap("A b c.", "b c, d") == HALF
    assert word_overlap("a a a", "A") == 1.0
    assert word_overlap("a", "b") == 0.0
    assert word_overlap("", "...") == 0.0


NEGATED = ["not a b", "not a c", "a b d", "x y"]


@pytest.mark.parametrize(
    ("name", "choices", "expected"),
    [
        ("longest_answer", ["ab", "abcd", "a b"], [0, 1, 0]),
        ("longest_answer", ["abc", "a", "a c"], [HALF, 0, HALF]),
        ("contains_negation", ["It is not.", "It is.", "It may be."], [1, 0, 0]),
        ("contains_negation", ["It is not.", "It is.", "No."], [HALF, 0, HALF]),
        # Where the rule cannot tell the choices apart, it guesses.
        ("contains_negation", ["It is.", "It was.", "It may be."], [THIRD] * 3),
        ("contains_negation", ["No.", "Not now.", "Never."], [THIRD] * 3),
        # Overlaps: (0, 1) 2/4, (0, 2) 0, (1, 2) 0; so choice 2 has the lowest mean, 0.
        ("odd_one_out", ["a b c", "b c d", "x y"], [0, 0, 1]),
        # Overlaps: (0, 1) 1/3, (0, 2) 1/3, (1, 2) 1/3: all three tie.
        ("odd_one_out", ["a b", "b c", "a c"], [THIRD] * 3),
        # Of two choices, each is as far from the other as the other from it.
        ("odd_one_out", ["a b c", "c"], [HALF, HALF]),
        # Choices 0 and 1 negate. Mean overlaps: 0 with (1, 2, 3): (2/4 + 2/4 + 0) / 3 = 1/3;
        # 1 with (0, 2, 3): (2/4 + 1/5 + 0) / 3 = 7/30. So 1, though 3 overlaps with nothing.
        ("negation_then_odd_one_out", NEGATED, [0, 1, 0, 0]),
        ("odd_one_out", NEGATED, [0, 0, 0, 1]),
        # A single negated choice is picked whatever it overlaps with.
        ("negation_then_odd_one_out", ["not a", "a", "a b", "x"], [1, 0, 0, 0]),
        # With none or all negated, the odd one out decides.
        ("negation_then_odd_one_out", ["a b", "a c", "x"], [0, 0, 1]),
        ("negation_then_odd_one_out", ["not a b", "not a c", "never x"], [0, 0, 1]),
        *((name, ["It is not so."], [1]) for name in RULES),
    ],
)
def test_rules_by_hand(name: str, choices: list[str], expected: list[float]) -> None:
    assert RULES[name](choices) == expected


@pytest.mark.parametrize("choices", [[], "It is not so."])
@pytest.mark.parametrize("name", RULES)
def test_what_is_no_list_of_choices_is_an_error(name: str, choices: list[str] | str) -> None:
    with pytest.raises(DataError, match="must be a list of answer texts"):
        RULES[name](choices)


WORDS = st.sampled_from(["a", "b", "c", "not", "no", "isn't", "Never", "", "\u00e9"])
TEXTS = st.lists(WORDS, max_size=5).map(" ".join)


@pytest.mark.parametrize("name", RULES)
@settings(deadline=None)  # a busy machine is no failure
@given(choices=st.lists(TEXTS, min_size=1, max_size=6), data=st.data())
def test_rules_give_distributions_that_follow_the_choices(name, choices, data) -> None:
    rule = RULES[name]
    probabilities = rule(choices)
    assert len(probabilities) == len(choices)
    assert all(0 <= p <= 1 for p in probabilities)
    assert math.isclose(sum(probabilities), 1.0)
    # A choice's place in the list carries no weight: reorder them, and the pick moves along.
    order = data.draw(st.permutations(range(len(choices))))
    reordered = rule([choices[i] for i in order])
    assert reordered == pytest.approx([probabilities[i] for i in order])


PAIR = (["It is not so.", "It is so.", "It was so."], [1, 0, 0])
ROW = {
    "question": "Is it so?",
    "mc1_targets": {"choices": PAIR[0], "labels": PAIR[1]},
    "mc2_targets": {"choices": [*PAIR[0], "No."], "labels": [1, 0, 0, 1]},
}


def test_rule_accuracy_is_the_mass_on_true_choices() -> None:
    assert rule_accuracy(RULES["chance"], [PAIR, ROW]) == [THIRD, THIRD]
    assert rule_accuracy(RULES["contains_negation"], [PAIR]) == [1.0]
    # Labels decide, not places; and several choices may be true.
    assert rule_accuracy(RULES["contains_negation"], [(PAIR[0], [0, 1, 1])]) == [0.0]
    assert rule_accuracy(RULES["chance"], [(PAIR[0], [0, 1, 1])]) == [pytest.approx(2 / 3)]


def test_blind_rule_scores_on_rows_and_pairs() -> None:
    scores = blind_rule_scores(iter([ROW, PAIR]))
    assert set(scores) == {*RULES, UNIFORM_MC2}
    assert scores["contains_negation"] == scores["longest_answer"] == [1.0, 1.0]
    assert scores["chance"] == [THIRD, THIRD]  # of the three MC1 choices
    assert scores[UNIFORM_MC2] == [HALF, THIRD]  # of the four MC2 choices, and of the three


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([], "no items"),
        ([PAIR, ([], [])], "item 2: the list of choices is empty"),
        ([(["a", "b"], [1])], "2 choices, but 1 labels"),
        ([(["a", "b"], [0, 0])], "no choice is true"),
        ([(["a", "b"], [1, 2])], "expected 0 and 1"),
        ([{"question": "?"}], "item 1: no 'mc1_targets'"),
        ([3], "item 1: "),
        ([("ab", [1, 0])], "list of texts"),
    ],
)
def test_bad_items_are_named(items: list, message: str) -> None:
    with pytest.raises(DataError, match=message):
        blind_rule_scores(items)


# Percent on all 817 questions of TruthfulQA. The mirror holds about half of them, drawn by a
# hash: a figure from it strays by sampling noise, less than sd / sqrt(n) as each question is
# drawn but once. Three such standard errors, plus half a point for unlike tokenization.
ON_ALL_817 = {
    "chance": 22.3,
    "longest_answer": 35.7,
    "contains_negation": 50.4,
    "odd_one_out": 51.5,
    "negation_then_odd_one_out": 63.0,
    UNIFORM_MC2: 46.4,
}


def test_figures_on_truthful_qa(mirror: Path) -> None:
    rows = read_jsonl(mirror / "truthful_qa" / "multiple_choice" / "validation.jsonl")
    scores = blind_rule_scores(rows)
    assert set(scores) == set(ON_ALL_817)
    for name, expected in ON_ALL_817.items():
        percent = 100 * np.array(scores[name])
        unseen = max(0.0, 1 - len(rows) / 817)  # finite population: all 817 leave no noise
        bound = 3 * percent.std() * math.sqrt(unseen / len(rows)) + 0.5
        assert abs(percent.mean() - expected) <= bound, f"{name}: {percent.mean():.1f} %"
