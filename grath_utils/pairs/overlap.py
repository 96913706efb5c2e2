"""Source questions that a benchmark holds too: the model would train on what it is measured by."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from grath_utils.pairs.questions import Question
from grath_utils.pairs.words import answer_words, word_overlap, wording

# A run of eight words alone would flag stock phrases ("Which of the following statements best
# explains why ..."), so half of all the words of the two questions must be common as well.
NGRAM = 8
COMMON_WORDS = 0.5


@dataclass(frozen=True)
class Overlap:
    """A source question that a benchmark holds too, whole or in part."""

    question: str
    benchmark: str
    text: str
    kind: str
    """``same`` but for case and punctuation, or ``near``: eight words in a row and half of all."""


def overlap_with_benchmarks(
    questions: Iterable[Question], references: Mapping[str, Iterable[str]]
) -> list[Overlap]:
    """Return the source questions that appear in a benchmark, of which ``references`` are the names
    and questions, as from :func:`.reference_questions`."""
    same: dict[tuple[str, ...], tuple[str, str]] = {}
    by_gram: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for benchmark, texts in references.items():
        for text in texts:
            same.setdefault(wording(text), (benchmark, text))
            for gram in _word_ngrams(text):
                by_gram[gram].append((benchmark, text))
    found = []
    for question in questions:
        hit, kind = same.get(wording(question.text)), "same"
        if hit is None:
            sharing = (hit for gram in _word_ngrams(question.text) for hit in by_gram.get(gram, ()))
            near = (hit for hit in sharing if word_overlap(question.text, hit[1]) >= COMMON_WORDS)
            hit, kind = next(near, None), "near"
        if hit is not None:
            found.append(Overlap(question.text, *hit, kind))
    return found


def _word_ngrams(text: str) -> list[str]:
    words = answer_words(text)
    return [" ".join(words[start : start + NGRAM]) for start in range(len(words) - NGRAM + 1)]
