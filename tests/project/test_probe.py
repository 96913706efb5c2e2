"""The probe: well formed, disjoint from the benchmarks, and at chance for whoever sees no question.

``data/probe.jsonl`` is there to tell a more truthful model from one that has picked up the habits
of true answers (length, negation, stock phrases). So those habits must not pay on it. The bounds
below come from the number of items: had the true choice been drawn at random, a rule's accuracy
would have a standard error of at most sqrt(0.25 * 0.75 / 200) = 3.1 points in a half. The probe
was balanced on purpose (each item has three true answers, and which of them stands in MC1 was
chosen so that no rule gains), so it is held to less than one of them.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from overlap import (
    BENCHMARKS,
    mirror_questions,
    nearest,
    ngrams,
    shared_ngrams,
    truthful_qa_answers,
    words,
)

from grath_utils.evaluation.blind_rules import (
    RULES,
    blind_rule_scores,
    has_negation,
    rule_accuracy,
    word_overlap,
)

PROBE = Path(__file__).resolve().parents[2] / "data" / "probe.jsonl"
ITEMS = [json.loads(line) for line in PROBE.read_text(encoding="utf-8").splitlines()]
HALVES = ("choosing", "testing")
PARTS = {"all": ITEMS, **{half: [i for i in ITEMS if i["half"] == half] for half in HALVES}}

FIELDS = ["id", "category", "half", "question", "mc1_targets", "mc2_targets", "source"]
N_CHOICES = {"mc1_targets": 4, "mc2_targets": 6}
CHANCE = 0.25
MC2_CHANCE = 0.5  # three of six answers are true
HALF = 200
MIN_COUNT = 4  # answers that a word must occur in to be a feature of the classifier
N_FOLDS = 5
RULE_BOUND = 0.02  # of the probability of a right pick; see the module's docstring

MIRROR = os.environ.get("GRATH_MIRROR")
needs_mirror = pytest.mark.skipif(
    not MIRROR, reason="GRATH_MIRROR names no mirror of the benchmarks to compare with"
)


@pytest.fixture(params=PARTS)
def items(request: pytest.FixtureRequest) -> list[dict]:
    """The whole probe, and each half: every one of them has to be balanced by itself."""
    return PARTS[request.param]


def answers(items: Sequence[dict], key: str, label: int) -> list[str]:
    """Return all choices with this label, over all items."""
    return [
        choice
        for item in items
        for choice, its in zip(item[key]["choices"], item[key]["labels"], strict=True)
        if its == label
    ]


def pick(value: Callable[[str], float]) -> Callable[[Sequence[str]], list[float]]:
    """Return the rule that picks the choice of the highest ``value``, sharing ties."""

    def rule(choices: Sequence[str]) -> list[float]:
        values = [value(choice) for choice in choices]
        ties = [v == max(values) for v in values]
        return [tie / sum(ties) for tie in ties]

    return rule


def most_typical(choices: Sequence[str]) -> list[float]:
    """Pick the choice that shares most words with the others: the odd one out, turned around."""
    return pick(lambda text: sum(word_overlap(text, other) for other in choices))(choices)


def odd_one_out_by_letters(choices: Sequence[str]) -> list[float]:
    """An odd one out by another measure, pairs of letters, that nothing was balanced on."""

    def pairs(text: str) -> set[str]:
        joined = " ".join(words(text))
        return {joined[i : i + 2] for i in range(len(joined) - 1)}

    def alike(a: str, b: str) -> float:
        return len(pairs(a) & pairs(b)) / max(1, len(pairs(a) | pairs(b)))

    return pick(lambda text: -sum(alike(text, other) for other in choices))(choices)


MORE_RULES = {
    "longest_by_words": pick(lambda text: len(text.split())),
    "shortest_answer": pick(lambda text: -len(text)),
    "shortest_by_words": pick(lambda text: -len(text.split())),
    "no_negation": pick(lambda text: not has_negation(text)),
    "most_typical": most_typical,
}
# Rules in the same spirit that the probe was not balanced on: these may stray by sampling noise,
# two standard errors of it.
HELD_OUT_RULES = {
    "odd_one_out_by_letters": odd_one_out_by_letters,
    "most_commas": pick(lambda text: text.count(",")),
    "longest_word": pick(lambda text: max(map(len, words(text)))),
    "most_capitals": pick(lambda text: sum(c.isupper() for c in text)),
    "most_digits": pick(lambda text: sum(c.isdigit() for c in text)),
    "says_not": pick(lambda text: "not" in words(text)),
    "last_in_alphabet": pick(lambda text: sum(ord(c) for c in text[:1])),
}
ALL_RULES = {**RULES, **MORE_RULES, **HELD_OUT_RULES}


def test_schema() -> None:
    for number, item in enumerate(ITEMS, start=1):
        assert list(item) == FIELDS
        assert item["half"] in HALVES
        assert len(item["source"].split()) >= 2, f"{item['id']} names no source"
        assert item["id"] == f"probe-{number:03d}"
        assert item["category"].strip() == item["category"] != ""
        for key, n in N_CHOICES.items():
            assert set(item[key]) == {"choices", "labels"}
            assert len(item[key]["choices"]) == n
        # True ones first, as in TruthfulQA: one of four in MC1, three of six in MC2
        assert item["mc1_targets"]["labels"] == [1, 0, 0, 0]
        assert item["mc2_targets"]["labels"] == [1, 1, 1, 0, 0, 0]


def test_mc1_choices_are_mc2_choices_with_the_same_labels() -> None:
    for item in ITEMS:
        mc1, mc2 = item["mc1_targets"], item["mc2_targets"]
        label_of = dict(zip(mc2["choices"], mc2["labels"], strict=True))
        assert [label_of.get(choice) for choice in mc1["choices"]] == mc1["labels"]
        assert mc1["choices"][0] == mc2["choices"][0]


def test_size_and_categories(items: list[dict]) -> None:
    assert [len(PARTS[half]) for half in HALVES] == [HALF, HALF]
    counts = Counter(item["category"] for item in items)
    assert 10 <= len(counts) <= 14
    assert max(counts.values()) <= 1.5 * min(counts.values())


def test_nothing_is_said_twice() -> None:
    questions = [item["question"].lower() for item in ITEMS]
    assert len(set(questions)) == len(questions)
    for i, question in enumerate(questions):
        score, other = nearest(question, questions[:i])
        assert score < 0.6, f"{question!r} is much like {other!r}"
    for item in ITEMS:
        folded = {" ".join(words(choice)) for choice in item["mc2_targets"]["choices"]}
        assert len(folded) == N_CHOICES["mc2_targets"], item["id"]


def test_texts_are_plain_sentences() -> None:
    for item in ITEMS:
        assert item["question"].endswith("?")
        assert 5 <= len(item["question"].split()) <= 16, item["question"]
        for text in (item["question"], *item["mc2_targets"]["choices"]):
            assert text == " ".join(text.split())
            assert text[0].isupper() or text[0] in '"0123456789', text
            assert text.isprintable()
        for choice in item["mc2_targets"]["choices"]:
            assert choice.endswith((".", '."')), choice
            assert 5 <= len(choice.split()) <= 16, choice


def test_chance_levels() -> None:
    assert rule_accuracy(RULES["chance"], ITEMS) == [CHANCE] * len(ITEMS)
    assert set(blind_rule_scores(ITEMS)["uniform_mc2"]) == {0.5}


@pytest.mark.parametrize("name", [*(name for name in RULES if name != "chance"), *MORE_RULES])
def test_rules_are_at_chance(name: str, items: list[dict]) -> None:
    accuracy = np.mean(rule_accuracy({**RULES, **MORE_RULES}[name], items))
    assert abs(accuracy - CHANCE) <= RULE_BOUND, f"{name}: {accuracy:.1%}"


@pytest.mark.parametrize("name", HELD_OUT_RULES)
def test_held_out_rules_are_within_sampling_noise(name: str, items: list[dict]) -> None:
    accuracy = np.mean(rule_accuracy(HELD_OUT_RULES[name], items))
    noise = np.sqrt(CHANCE * (1 - CHANCE) / len(items))
    assert abs(accuracy - CHANCE) <= 2 * noise, f"{name}: {accuracy:.1%}"


@pytest.mark.parametrize("name", [name for name in ALL_RULES if name != "chance"])
def test_rules_are_within_sampling_noise_of_chance_in_mc2(name: str, items: list[dict]) -> None:
    picked = [
        probability * label
        for item in items
        for probability, label in zip(
            ALL_RULES[name](item["mc2_targets"]["choices"]),
            item["mc2_targets"]["labels"],
            strict=True,
        )
    ]
    accuracy = sum(picked) / len(items)
    noise = np.sqrt(MC2_CHANCE * (1 - MC2_CHANCE) / len(items))
    assert abs(accuracy - MC2_CHANCE) <= 2 * noise, f"{name}: {accuracy:.1%}"


@pytest.mark.parametrize("key", N_CHOICES)
def test_negation_is_as_frequent_in_true_as_in_false_answers(key: str, items: list[dict]) -> None:
    true = np.mean([has_negation(text) for text in answers(items, key, 1)])
    false = np.mean([has_negation(text) for text in answers(items, key, 0)])
    assert abs(true - false) <= 0.03, f"{true:.1%} of true, {false:.1%} of false answers"


def test_half_of_the_answers_with_a_negation_are_true(items: list[dict]) -> None:
    true = sum(map(has_negation, answers(items, "mc2_targets", 1)))
    false = sum(map(has_negation, answers(items, "mc2_targets", 0)))
    # The standard error of a share of one half, of about 420 answers, is 2.4 points.
    assert true + false >= 300
    assert abs(true / (true + false) - 0.5) <= 0.02, (true, false)


@pytest.mark.parametrize("key", N_CHOICES)
def test_true_and_false_answers_are_equally_long(key: str, items: list[dict]) -> None:
    for length in (len, lambda text: len(text.split())):
        true = np.mean([length(text) for text in answers(items, key, 1)])
        false = np.mean([length(text) for text in answers(items, key, 0)])
        assert abs(true - false) / false <= 0.04, (true, false)


def test_yes_and_no_open_true_and_false_answers_alike(items: list[dict]) -> None:
    for opening in ("Yes,", "No,"):
        true = sum(text.startswith(opening) for text in answers(items, "mc2_targets", 1))
        false = sum(text.startswith(opening) for text in answers(items, "mc2_targets", 0))
        assert abs(true - false) <= 2 * np.sqrt(true + false), (opening, true, false)


def surface_features(texts: Sequence[str]) -> np.ndarray:
    """Return (n, d) standardized features: which words occur, how long, negated, how it opens."""
    bags = [set(words(text)) for text in texts]
    counts = Counter(word for bag in bags for word in bag)
    vocabulary = sorted(word for word, n in counts.items() if n >= MIN_COUNT)
    rows = [
        [float(word in bag) for word in vocabulary]
        + [len(text), len(text.split()), has_negation(text), text.count(","), text.count(";")]
        + [text.startswith(opening) for opening in ("Yes", "No", "It ", "The ", "A ")]
        for text, bag in zip(texts, bags, strict=True)
    ]
    x = np.array(rows, dtype=float)
    return (x - x.mean(0)) / (x.std(0) + 1e-9)


def fit_logistic(x: np.ndarray, y: np.ndarray, ridge: float) -> np.ndarray:
    """Return the (d + 1,) weights of a ridge-penalized logistic regression, by Newton's method."""
    x = np.column_stack([x, np.ones(len(x))])
    penalty = ridge * np.eye(x.shape[1])
    penalty[-1, -1] = 0.0
    weights = np.zeros(x.shape[1])
    for _ in range(5):
        p = 1 / (1 + np.exp(-x @ weights))
        gradient = x.T @ (p - y) + penalty @ weights
        hessian = (x * (p * (1 - p))[:, None]).T @ x + penalty
        weights -= np.linalg.solve(hessian, gradient)
    return weights


def held_out_scores(texts: Sequence[str], y: np.ndarray, item: np.ndarray, ridge: float):
    """Return each text's score from a classifier that has seen no answer of its item."""
    x, scores = surface_features(texts), np.zeros(len(y))
    folds = np.random.default_rng(0).permutation(item.max() + 1)[item] % N_FOLDS
    for fold in range(N_FOLDS):
        weights = fit_logistic(x[folds != fold], y[folds != fold], ridge)
        scores[folds == fold] = x[folds == fold] @ weights[:-1] + weights[-1]
    return scores


def auc(scores: np.ndarray, y: np.ndarray) -> float:
    """Return the chance that a true answer outscores a false one; a tie counts half."""
    true, false = scores[y == 1][:, None], scores[y == 0][None, :]
    return float(np.mean(true > false) + 0.5 * np.mean(true == false))


@pytest.mark.parametrize("ridge", [10.0, pytest.param(100.0, marks=pytest.mark.slow)])
@pytest.mark.parametrize("key", N_CHOICES)
def test_surface_classifier_is_near_chance(key: str, ridge: float, items: list[dict]) -> None:
    texts = [choice for item in items for choice in item[key]["choices"]]
    y = np.array([label for item in items for label in item[key]["labels"]])
    item = np.repeat(np.arange(len(items)), N_CHOICES[key])
    scores = held_out_scores(texts, y, item, ridge)

    # Resample whole items: the answers of one item resemble each other.
    by_item = scores.reshape(len(items), -1), y.reshape(len(items), -1)
    rng = np.random.default_rng(0)
    resampled = [
        auc(*(part[draw].ravel() for part in by_item))
        for draw in rng.integers(len(items), size=(200, len(items)))
    ]
    low, high = np.quantile(resampled, [0.025, 0.975])
    value = auc(scores, y)
    assert value < 0.60, f"AUC {value:.3f} [{low:.3f}, {high:.3f}]"
    assert low <= 0.5, f"AUC {value:.3f} [{low:.3f}, {high:.3f}] excludes chance"


@pytest.mark.slow
def test_the_surface_classifier_finds_a_giveaway() -> None:
    """The test above could not fail if the classifier were blind: plant a bias, and see."""
    texts = [choice for item in ITEMS for choice in item["mc2_targets"]["choices"]]
    y = np.array([label for item in ITEMS for label in item["mc2_targets"]["labels"]])
    item = np.repeat(np.arange(len(ITEMS)), N_CHOICES["mc2_targets"])
    planted = [
        f"In fact {text}" if label and i % 3 == 0 else text
        for i, (text, label) in enumerate(zip(texts, y, strict=True))
    ]
    assert auc(held_out_scores(planted, y, item, 10.0), y) > 0.60


@needs_mirror
@pytest.mark.parametrize(
    "benchmark_name",
    [pytest.param(name, marks=[pytest.mark.slow] * (name == "mmlu")) for name in BENCHMARKS],
)
def test_no_question_is_near_a_benchmark_question(benchmark_name: str) -> None:
    others = mirror_questions(MIRROR)[benchmark_name]
    theirs = set().union(*(ngrams(other, 6) for other in others))
    for item in ITEMS:
        question = item["question"]
        assert not ngrams(question, 6) & theirs, question
        score, other = nearest(question, others)
        assert score < 0.5, f"{question!r} is {score:.2f} like {other!r}"
        assert not shared_ngrams(question, other, 6)


@needs_mirror
def test_no_answer_is_a_truthful_qa_answer() -> None:
    theirs = {" ".join(words(text)) for text in truthful_qa_answers(MIRROR)}
    for item in ITEMS:
        for choice in item["mc2_targets"]["choices"]:
            folded = words(choice)
            assert len(folded) < 4 or " ".join(folded) not in theirs, choice
