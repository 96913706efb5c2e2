"""Question-blind rules: how far one gets on multiple choice without ever reading the question.

Each rule sees the answer texts alone and returns a probability for each of them. On TruthfulQA's
817 questions such rules reach an MC1 accuracy of up to 63 %, because its true answers are longer,
more often negated and worded less alike than its false ones. A model that is tuned on pairs of
texts can pick up those habits and gain MC1 points without becoming more truthful, so every MC
result belongs beside the rules' figures, and beside a probe on which the rules score at chance.

The rules draw nothing at random: where several choices tie, they share the probability equally.
A rule's score on an item is its *expected* accuracy, the probability it puts on true choices.
Of MC1's choices exactly one is true; the functions do not rely on that, or on its position.

Source of the metrics: Lin, Hilton and Evans, "TruthfulQA" (2022), section 3; the rules are ours.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, TypeAlias

from grath_utils.errors import DataError

Rule: TypeAlias = Callable[[Sequence[str]], list[float]]
# A row in TruthfulQA's schema, with mc1_targets and mc2_targets; or one bare (choices, labels) pair
Item: TypeAlias = Mapping[str, Any] | tuple[Sequence[str], Sequence[int]]

_NEGATIONS = "no not never none nothing nobody nowhere cannot without neither nor"
NEGATIONS = frozenset(_NEGATIONS.split())
UNIFORM_MC2 = "uniform_mc2"

_WORD = re.compile(r"[a-z0-9]+(?:'[a-z]+)?")
# Overlaps are ratios of small whole numbers: nearer than this, they are equal.
_TIE = 1e-12


def words(text: str) -> list[str]:
    """Return the lowercase words of ``text``: runs of a-z and 0-9, a contraction being one word.

    Typographic apostrophes count as plain ones, so that ``don’t`` is ``don't``.
    """
    return _WORD.findall(text.lower().replace("\u2019", "'"))


def has_negation(text: str) -> bool:
    """Say whether ``text`` contains a word of :data:`NEGATIONS` or one that ends in ``n't``."""
    return any(word in NEGATIONS or word.endswith("n't") for word in words(text))


def word_overlap(text_a: str, text_b: str) -> float:
    """Return the Jaccard overlap of two texts' word sets, in [0, 1]; 0 where neither has words."""
    a, b = set(words(text_a)), set(words(text_b))
    return len(a & b) / len(a | b) if a | b else 0.0


def chance(choices: Sequence[str]) -> list[float]:
    """Pick any choice, each with probability 1/n.

    On MC1 this is the floor: 22.3 % on TruthfulQA, where n differs from question to question.
    """
    return _share(_all_of(choices), len(choices))


def longest_answer(choices: Sequence[str]) -> list[float]:
    """Pick the choice with the most characters.

    True answers are often hedged and qualified, hence longer; summed log-probabilities pull the
    other way, toward short answers.
    """
    _all_of(choices)
    return _best([float(len(choice)) for choice in choices], range(len(choices)))


def contains_negation(choices: Sequence[str]) -> list[float]:
    """Pick any choice that negates (:func:`has_negation`); with none or all negated, any choice.

    Questions that imitate misconceptions invite a plain yes, and the truth then says *not*: a
    model that merely learns to deny gains on them.
    """
    return _share(_negated(choices), len(choices))


def odd_one_out(choices: Sequence[str]) -> list[float]:
    """Pick the choice with the lowest mean :func:`word_overlap` with the others.

    Several false answers tend to be variations of one misconception, so that the true one
    stands apart. A single choice is picked for certain.
    """
    return _odd_among(choices, _all_of(choices))


def negation_then_odd_one_out(choices: Sequence[str]) -> list[float]:
    """Pick, of the choices that negate, the one with the lowest mean overlap with all others.

    With none or all negated, this is :func:`odd_one_out`. On TruthfulQA it is right more often
    than GRATH's published 7B models, which says how much of the benchmark is in its wording.
    """
    return _odd_among(choices, _negated(choices))


#: Every rule for picking one choice, by the name under which :func:`controls` reports it.
RULES: Mapping[str, Rule] = MappingProxyType(
    {
        "chance": chance,
        "longest_answer": longest_answer,
        "contains_negation": contains_negation,
        "odd_one_out": odd_one_out,
        "negation_then_odd_one_out": negation_then_odd_one_out,
    }
)


def uniform_mc2(labels: Sequence[int]) -> float:
    """Return the MC2 score of a model that finds all choices equally likely: the share of true.

    In [0, 1]; 46.4 % on TruthfulQA. An MC2 below it means that the model favors false answers.
    """
    _check_labels(labels, len(labels))
    return sum(labels) / len(labels)


def rule_accuracy(rule: Rule, items: Iterable[Item]) -> list[float]:
    """Return, for each item, the probability that ``rule`` picks a true choice, in [0, 1].

    Args:
        rule: a value of :data:`RULES`, or any function from choices to probabilities.
        items: rows in TruthfulQA's schema, of which ``mc1_targets`` is used, or
            ``(choices, labels)`` pairs.

    Raises:
        DataError: there are no items, or one has no choices, unequal numbers of choices and
            labels, a label other than 0 and 1, or no true choice.
    """
    scores = []
    for choices, labels in _targets(items, "mc1_targets"):
        probabilities = rule(choices)
        scores.append(sum(p for p, label in zip(probabilities, labels, strict=True) if label))
    return scores


def controls(items: Iterable[Item]) -> dict[str, list[float]]:
    """Return each rule's score on each item, by name; the mean of a list is the rule's figure.

    The keys are those of :data:`RULES` (MC1, expected accuracy) and :data:`UNIFORM_MC2` (MC2
    under uniform probabilities). One value per item, in the items' order, so that the lists can
    be bootstrapped, or paired with a model's scores on the same items. For a ``(choices, labels)``
    pair all figures refer to that pair.

    Raises:
        DataError: as :func:`rule_accuracy`.
    """
    items = list(items)
    scores = {name: rule_accuracy(rule, items) for name, rule in RULES.items()}
    scores[UNIFORM_MC2] = [uniform_mc2(labels) for _, labels in _targets(items, "mc2_targets")]
    return scores


def _all_of(choices: Sequence[str]) -> list[int]:
    """Return the index of every choice, having checked that there are any."""
    if isinstance(choices, str):
        raise DataError(f"choices must be a list of answer texts, not one text: {choices!r}")
    if not choices:
        raise DataError("an item has no choices to pick from")
    return list(range(len(choices)))


def _negated(choices: Sequence[str]) -> list[int]:
    """Return the indices of the choices that negate, or of all choices where none does."""
    everyone = _all_of(choices)
    return [i for i in everyone if has_negation(choices[i])] or everyone


def _odd_among(choices: Sequence[str], candidates: Sequence[int]) -> list[float]:
    """Pick the candidate least like the other choices, candidates or not."""

    def mean_overlap(i: int) -> float:
        others = [word_overlap(choices[i], other) for j, other in enumerate(choices) if j != i]
        return sum(others) / len(others) if others else 0.0

    return _best([-mean_overlap(i) for i in range(len(choices))], candidates)


def _best(values: Sequence[float], candidates: Sequence[int]) -> list[float]:
    """Share the pick among the candidates whose value is the highest."""
    highest = max(values[i] for i in candidates)
    return _share([i for i in candidates if highest - values[i] <= _TIE], len(values))


def _share(picked: Sequence[int], n: int) -> list[float]:
    """Return n probabilities: 1/len(picked) for each index in ``picked``, 0 for the others."""
    return [1 / len(picked) if i in picked else 0.0 for i in range(n)]


def _targets(items: Iterable[Item], key: str) -> list[tuple[Sequence[str], Sequence[int]]]:
    """Return each item's (choices, labels), from ``key`` of a row or from the pair itself."""
    pairs = []
    for number, item in enumerate(items, start=1):
        try:
            if isinstance(item, Mapping):
                choices, labels = item[key]["choices"], item[key]["labels"]
            else:
                choices, labels = item
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"item {number} is neither a row with {key!r} nor a (choices, labels) pair"
            ) from error
        try:
            _check_labels(labels, len(_all_of(choices)))
        except DataError as error:
            raise DataError(f"item {number}: {error}") from error
        pairs.append((choices, labels))
    if not pairs:
        raise DataError("there are no items to score")
    return pairs


def _check_labels(labels: Sequence[int], n: int) -> None:
    if len(labels) != n:
        raise DataError(f"{n} choices but {len(labels)} labels")
    if any(label not in (0, 1) for label in labels):
        raise DataError(f"labels must be 0 or 1, not {list(labels)}")
    if not any(labels):
        raise DataError("no choice is labelled true")
