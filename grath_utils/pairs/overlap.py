"""Source questions that a benchmark holds too: the model would train on what it is measured by."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from grath_utils.files import data_dir, mirror_dir, read_jsonl
from grath_utils.pairs.questions import Question
from grath_utils.pairs.words import normalized

# A run of eight words alone would flag stock phrases ("Which of the following statements best
# explains why ..."), so half of all the words of the two questions must be common as well.
NGRAM = 8
COMMON_WORDS = 0.5

MIRROR_TESTS = {  # benchmark -> (its test files in a mirror, the field that holds the question)
    "truthful_qa": ("truthful_qa/*/validation.jsonl", "question"),
    "arc_challenge": ("ai2_arc/ARC-Challenge/test.jsonl", "question"),
    "hellaswag": ("hellaswag/validation.jsonl", "ctx"),
    "mmlu": ("mmlu/*/test.jsonl", "question"),
}


@dataclass(frozen=True)
class Overlap:
    """A source question that a benchmark holds too, whole or in part."""

    question: str
    benchmark: str
    text: str
    kind: str
    """``same`` but for case and punctuation, or ``near``: eight words in a row and half of all."""


def overlap_with_benchmarks(
    questions: Iterable[Question], references: Mapping[str, Iterable[str]] | None = None
) -> list[Overlap]:
    """Return the questions that appear in a benchmark that the model is to be measured on.

    Args:
        questions: the source questions.
        references: benchmark name -> its questions; None takes :func:`reference_questions`.
    """
    references = reference_questions() if references is None else references
    same: dict[str, tuple[str, str]] = {}
    by_gram: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for benchmark, texts in references.items():
        for text in texts:
            same.setdefault(normalized(text), (benchmark, text))
            for gram in _word_ngrams(text):
                by_gram[gram].append((benchmark, text))
    found = []
    for question in questions:
        hit, kind = same.get(normalized(question.text)), "same"
        if hit is None:
            sharing = (hit for gram in _word_ngrams(question.text) for hit in by_gram.get(gram, ()))
            near = (hit for hit in sharing if _common(question.text, hit[1]) >= COMMON_WORDS)
            hit, kind = next(near, None), "near"
        if hit is not None:
            found.append(Overlap(question.text, *hit, kind))
    return found


def reference_questions() -> dict[str, list[str]]:
    """Return the test questions of every benchmark at hand: our own, and those of the mirror."""
    files = {name: ([data_dir() / f"{name}.jsonl"], "question") for name in ("probe", "retention")}
    if mirror := mirror_dir():
        for name, (pattern, field) in MIRROR_TESTS.items():
            files[name] = (sorted(mirror.glob(pattern)), field)
    references = {
        name: dict.fromkeys(str(row[field]) for path in paths for row in read_jsonl(path))
        for name, (paths, field) in files.items()
    }
    return {name: list(texts) for name, texts in references.items() if texts}


def _common(a: str, b: str) -> float:
    """Return shared over all distinct words of two texts, in [0, 1]."""
    left, right = set(normalized(a).split()), set(normalized(b).split())
    return len(left & right) / len(left | right)


def _word_ngrams(text: str) -> list[str]:
    words = normalized(text).split()
    return [" ".join(words[start : start + NGRAM]) for start in range(len(words) - NGRAM + 1)]
