"""Which of a pair's two answers is called the correct one: the model's word, a coin's, or a book's.

Arms of an experiment are trained on the *same* pairs with other labels; what the model's own labels
gain over random ones is what the truth in them gains.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from grath_utils.errors import DataError
from grath_utils.files import data_dir, read_jsonl
from grath_utils.pairs.parsing import unusable
from grath_utils.pairs.preferences import OPINIONS, Pair
from grath_utils.pairs.words import same_text
from grath_utils.pairs.writers import exchanged

SEALED = "sealed_answers.jsonl"


class Sealed(NamedTuple):
    """What the project knows about one of its own questions, and no stage reads."""

    question: str
    correct: str
    incorrect: str
    kind: str = "plain"  # or `misconception`: the popular answer is the incorrect one


def relabelled(pairs: Sequence[Pair], labels: str, flipped: float, seed: int) -> list[Pair]:
    """Return the same pairs with other labels.

    Whether a pair is turned round is drawn from the seed and its question's id alone: later rounds
    keep its label, see :func:`as_written`.

    Args:
        labels: ``own``, as they are; ``random``, a fair coin for each; ``inverted``; ``annotated``,
            the sealed answers in place of the pair's, which is left out if it has none;
            ``mismatched``, the question of the pair that stands half the list further on.
        flipped: share of the labels that are then turned round.
    """
    if labels == "annotated":
        sealed = read_sealed()
        known = [(pair, sealed[pair.id]) for pair in pairs if pair.id in sealed]
        nothing = dict.fromkeys(OPINIONS)  # what was said of the others
        pairs = [
            replace(pair, correct=answer.correct, incorrect=answer.incorrect, **nothing)
            for pair, answer in known
            if same_text(answer.question) == same_text(pair.question)  # not another of this id
        ]
    if labels == "mismatched":
        half = len(pairs) // 2
        others = [*pairs[half:], *pairs[:half]]
        pairs = [replace(p, question=o.question) for p, o in zip(pairs, others, strict=True)]
    return [exchanged(p) if _turned(p.id, labels, flipped, seed) else p for p in pairs]


def as_written(
    pairs: Sequence[Pair], labels: str, flipped: float, seed: int, questions: Mapping[str, str]
) -> list[Pair]:
    """Return relabelled pairs as they were before, but for sealed answers, which stay.

    ``questions`` are the texts by id: a mismatched pair gets its own back.
    """
    turned = labels if labels in ("random", "inverted") else "own"
    pairs = relabelled(pairs, turned, flipped, seed)
    if labels != "mismatched":
        return pairs
    return [replace(pair, question=questions.get(pair.id, pair.question)) for pair in pairs]


def _turned(name: str, labels: str, flipped: float, seed: int) -> bool:
    coin, flip = (random.Random(f"{what} {seed} {name}").random() for what in ("label", "flip"))
    turned = labels == "inverted" or (labels == "random" and coin < 0.5)
    return turned != (flip < flipped)


def read_sealed() -> dict[str, Sealed]:
    """Return the sealed answers to the project's own questions, by id.

    This is the only place that opens their file.
    """
    path = data_dir() / SEALED
    asked = {row["id"]: row["question"] for row in read_jsonl(data_dir() / "questions.jsonl")}
    found: dict[str, Sealed] = {}
    form = {"id": str, "correct": str, "incorrect": str}
    for number, row in enumerate(read_jsonl(path, form), start=1):
        name, *sides = (row[key] for key in form)
        fault = unusable(*sides)
        if name not in asked or name in found or fault:
            what = fault or ("doubled" if name in found else "none of our questions")
            raise DataError(f'{path}, row {number} ("{name}"): {what}')
        found[name] = Sealed(asked[name], *sides, row.get("kind", "plain"))
    return found
