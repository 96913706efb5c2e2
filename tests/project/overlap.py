"""How near our own texts come to the benchmarks': word n-grams and content-word overlap.

Our questions and answers are meant to be disjoint from every benchmark that the notebooks measure
on. Three small functions make that a test: a shared run of ``n`` words betrays copied wording,
and a high Jaccard similarity of the content words betrays the same question, reworded.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path

# Benchmarks that a mirror must hold; each is one key of what mirror_questions() returns.
BENCHMARKS = ("truthful_qa", "ai2_arc", "hellaswag", "mmlu")

# Words that say little about what a question is about. Question words and auxiliaries are here
# so that "What is the capital of X?" and "What is the capital of Y?" are not near each other.
_STOP_TEXT = """
a about all am an and any are as at be been being but by can could did do does for from had happen
happens has have he her his how i if in into is it its many may more most much my no not of on one
or our out should so some than that the their them then there these they this those to up was we
were what when where which who whom whose why will with would you your
"""
STOP_WORDS = frozenset(_STOP_TEXT.split())

_WORD = re.compile(r"[a-z0-9]+(?:'[a-z]+)?")


def words(text: str) -> list[str]:
    """Return the lowercase words of ``text``; typographic apostrophes count as plain ones."""
    return _WORD.findall(text.lower().replace("\u2019", "'"))


@lru_cache(maxsize=100_000)
def _stem(word: str) -> str:
    """Cut the commonest endings, so that 'magnet', 'magnets' and "magnet's" are one word."""
    word = word.removesuffix("'s")
    for ending in ("ing", "ies", "es", "ed", "s"):
        if word.endswith(ending) and len(word) - len(ending) >= 3:
            return word.removesuffix(ending)
    return word


@lru_cache(maxsize=100_000)
def content_words(text: str) -> frozenset[str]:
    """Return the roughly stemmed words of ``text`` that are not stop words."""
    return frozenset(_stem(word) for word in words(text) if word not in STOP_WORDS)


def ngrams(text: str, n: int) -> set[tuple[str, ...]]:
    """Return the word ``n``-grams of ``text`` (none when it has fewer than ``n`` words)."""
    tokens = words(text)
    return {tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)}


def shared_ngrams(text_a: str, text_b: str, n: int) -> set[tuple[str, ...]]:
    """Return the word ``n``-grams that both texts contain, compared in lower case."""
    return ngrams(text_a, n) & ngrams(text_b, n)


def jaccard(text_a: str, text_b: str) -> float:
    """Return shared over all content words, in [0, 1]; 0 where neither text has any."""
    a, b = content_words(text_a), content_words(text_b)
    return len(a & b) / len(a | b) if a | b else 0.0


def nearest(question: str, others: Iterable[str]) -> tuple[float, str]:
    """Return ``(score, other)`` for the text in ``others`` most like ``question``.

    The score is :func:`jaccard`, in [0, 1]; with nothing to compare to it is ``(0.0, "")``.
    """
    return max(((jaccard(question, other), other) for other in others), default=(0.0, ""))


def _rows(path: Path) -> Iterator[dict]:
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            if line.strip():
                yield json.loads(line)


def mirror_questions(root: str | Path) -> dict[str, list[str]]:
    """Return every question of each benchmark in the mirror at ``root``, without repeats.

    Keys are :data:`BENCHMARKS`; TruthfulQA joins its multiple-choice and generation files, ARC and
    MMLU join all splits, and a HellaSwag "question" is its context. A missing benchmark is an
    error, so that a check against a half-empty mirror cannot pass unnoticed.
    """
    questions = {}
    for name in BENCHMARKS:
        paths = sorted((Path(root) / name).rglob("*.jsonl"))
        if not paths:
            raise FileNotFoundError(f"no {name}/**/*.jsonl under the mirror {root}")
        field = "ctx" if name == "hellaswag" else "question"
        questions[name] = list(dict.fromkeys(row[field] for path in paths for row in _rows(path)))
    return questions


def truthful_qa_answers(root: str | Path) -> set[str]:
    """Return every answer text of TruthfulQA in the mirror: MC choices and generation answers."""
    answers: set[str] = set()
    for path in sorted((Path(root) / "truthful_qa").rglob("*.jsonl")):
        for row in _rows(path):
            for targets in ("mc1_targets", "mc2_targets"):
                answers.update(row.get(targets, {}).get("choices", ()))
            for key in ("correct_answers", "incorrect_answers"):
                answers.update(row.get(key, ()))
            if "best_answer" in row:
                answers.add(row["best_answer"])
    return answers
