"""Question-blind rules: how far one gets on multiple choice without ever reading the question.

On TruthfulQA's 817 questions such rules reach an MC1 accuracy of up to 63 %, because its true
answers are longer, more often negated and worded less alike than its false ones. That is known:
Turner and Kurzeja, "Gaming TruthfulQA: Simple Heuristics Exposed Dataset Weaknesses" (January 2025,
https://turntrout.com/original-truthfulqa-weaknesses), whose rules compare the choices by meaning.
The benchmark's authors answered with a version of two choices, and found that the models they
tried score alike on both (Evans, Chua and Lin, January 2025,
https://www.lesswrong.com/posts/Bunfwz6JsNd44kgLT/new-improved-multiple-choice-truthfulqa).

A model that is tuned on pairs of texts can pick up habits of wording and gain MC1 points without
becoming more truthful, so every MC result belongs beside the rules' figures, and beside a probe on
which they score at chance. To reach less than a rule is not to follow it: a model whose answers are
scored one by one never sees the other choices, which the last two rules compare. Nothing is drawn
at random: a rule returns a probability for each answer text (choices that tie share it), and its
score on an item is what it puts on true choices, its *expected* accuracy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

from grath_utils.errors import DataError
from grath_utils.evaluation.benchmarks.base import Item, make_item, naming
from grath_utils.evaluation.benchmarks.truthfulqa import truthfulqa_item
from grath_utils.pairs.words import negated as has_negation
from grath_utils.pairs.words import word_overlap

Rule: TypeAlias = Callable[[Sequence[str]], list[float]]
# An item, a row in TruthfulQA's schema, or a (choices, labels) pair.
Answers: TypeAlias = Item | Mapping[str, Any] | tuple[Sequence[str], Sequence[int]]

UNIFORM_MC2 = "uniform_mc2"
TIE = 1e-12  # overlaps are ratios of small whole numbers: nearer than this, they are equal


# Each of these gives every choice a score; the rule of that name picks the highest.


def chance(choices: Sequence[str]) -> list[float]:
    """Pick any choice. On MC1 this is the floor: 22.3 % on TruthfulQA."""
    return [0.0 for _ in choices]


def longest_answer(choices: Sequence[str]) -> list[float]:
    """Pick the choice with the most characters: true answers are often hedged and qualified.

    Summed log-probabilities pull the other way, toward short answers.
    """
    return [float(len(choice)) for choice in choices]


def contains_negation(choices: Sequence[str]) -> list[float]:
    """Pick any choice that negates (:func:`.negated`); with none or all negated, any choice.

    Questions that imitate misconceptions invite a plain yes, and the truth then says *not*: a
    model that merely learns to deny gains on them.
    """
    return [float(has_negation(choice)) for choice in choices]


def odd_one_out(choices: Sequence[str]) -> list[float]:
    """Pick the choice with the lowest mean :func:`word_overlap` with the others.

    Several false answers tend to be variations of one misconception; the true one stands apart.
    """
    return [
        -sum(word_overlap(choice, other) for j, other in enumerate(choices) if j != i)
        / max(len(choices) - 1, 1)
        for i, choice in enumerate(choices)
    ]


def negation_then_odd_one_out(choices: Sequence[str]) -> list[float]:
    """Pick, of the choices that negate, the one with the lowest mean overlap with all others.

    With none or all negated, this is :func:`odd_one_out`. On TruthfulQA it is right more often
    than GRATH's published 7B models.
    """
    oddity = odd_one_out(choices)  # in [-1, 0]
    return [2 * has_negation(choice) + odd for choice, odd in zip(choices, oddity, strict=True)]


def _picking(score: Rule) -> Rule:
    """Make a rule of a score for each choice: the highest ones share the pick equally."""

    def pick(choices: Sequence[str]) -> list[float]:
        if isinstance(choices, str) or not choices:
            raise DataError(f"choices must be a list of answer texts, not {choices!r}")
        scores = score(choices)
        picked = [max(scores) - value <= TIE for value in scores]
        return [p / sum(picked) for p in picked]

    return pick


_SCORES = (chance, longest_answer, contains_negation, odd_one_out, negation_then_odd_one_out)
RULES: dict[str, Rule] = {score.__name__: _picking(score) for score in _SCORES}
"""Every rule for picking one choice, by its name in results."""


def rule_accuracy(rule: Rule, items: Iterable[Answers]) -> list[float]:
    """Return, for each item, the probability that ``rule`` picks a true choice of its MC1 form.

    Raises:
        DataError: there are no items, or one is malformed; it is named by its number.
    """
    accuracies = []
    for item in _as_items(items):
        probabilities = rule([item.choices[i] for i in item.mc1])
        picked = zip(probabilities, item.mc1, strict=True)
        accuracies.append(sum(p for p, i in picked if item.labels[i]))
    return accuracies


def blind_rule_scores(items: Iterable[Answers]) -> dict[str, list[float]]:
    """Return each rule's score on each item, by name; the mean of a list is the rule's figure.

    The keys are those of ``RULES`` (see :func:`rule_accuracy`) and ``UNIFORM_MC2``: the MC2 of a
    model that finds all choices equally likely, the share of true ones. It is 46.4 % on
    TruthfulQA; an MC2 below it means that the model favours false answers.
    """
    items = _as_items(items)
    scores = {name: rule_accuracy(rule, items) for name, rule in RULES.items()}
    scores[UNIFORM_MC2] = [sum(i.labels[k] for k in i.mc2) / len(i.mc2) for i in items]
    return scores


def chance_level(result: Mapping[str, Any], metric: str) -> float | None:
    """Return what a model that finds all choices equally likely gets, in percent; None if unknown.

    Of a result of :func:`.measure.evaluate`. MC3's is MC1's: a true answer stands above the same
    false ones.
    """
    found = (result.get("controls") or {}).get(UNIFORM_MC2 if metric == "mc2" else "chance")
    return None if found is None else 100 * found


def _as_items(answers: Iterable[Answers]) -> list[Item]:
    items = []
    for number, item in enumerate(answers, start=1):
        with naming(f"item {number}"):
            if isinstance(item, Mapping):
                item = truthfulqa_item(item)
            elif not isinstance(item, Item):
                item = make_item("", "?", *item)
        items.append(item)
    if not items:
        raise DataError("there are no items to score")
    return items
