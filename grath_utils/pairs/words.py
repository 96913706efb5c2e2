"""Words and n-grams of short answers: what parser, filters, writers and audit compare them by."""

from __future__ import annotations

import math
import re
from collections import Counter

_ARTICLES = frozenset({"a", "an", "the"})
_FUNCTION_WORDS = frozenset(
    "am is are was were be been being do does did has have had can could may might must will would "
    "shall should and or but if so as at by for from in into of off on onto out over than then "
    "that these this those to too up with it its it's he she they them their his her we you i "
    "what when where which who whom whose why how there here about".split()
)
ANSWER_NEGATIONS = frozenset("no not never none nothing cannot nor without".split())
LENGTH_OFFSET = 12  # characters that short answers get as a head start


def split_words(text: str) -> list[str]:
    """Return the lower-case words of a text, without articles unless there is nothing else."""
    found = re.findall(r"[^\W_]+(?:['.,][^\W_]+)*", text.casefold().replace("’", "'"))
    return [word for word in found if word not in _ARTICLES] or found


def normalized(text: str) -> str:
    """Return the words of a text in lower case, articles too, with one space between them."""
    return " ".join(re.findall(r"\w+", text.casefold()))


def negated(text: str) -> bool:
    """Return True if a text holds a negation word."""
    return any(word in ANSWER_NEGATIONS or word.endswith("n't") for word in split_words(text))


def content_words(text: str) -> set[str]:
    """Return the roughly stemmed words of a text that say what it is about."""
    stems = {re.sub(r"(?<=...)(ing|es|ed|s)$", "", word) for word in split_words(text)}
    return stems - _FUNCTION_WORDS


def length_ratio(a: str, b: str) -> float:
    """Return how many times as long the longer answer is (short ones get a head start)."""
    lengths = len(a) + LENGTH_OFFSET, len(b) + LENGTH_OFFSET
    return max(lengths) / min(lengths)


def word_f1(a: str, b: str) -> float:
    """Return the F1 of two texts over their distinct content words, in [0, 1]."""
    left, right = content_words(a), content_words(b)
    return 2 * len(left & right) / (len(left) + len(right)) if left and right else 0.0


def ngram_f1(a: str, b: str) -> float:
    """Return the similarity of two texts in [0, 1]: F1 over shared character n-grams.

    The mean over those lengths n = 1 … 6 that both texts have: chrF (Popović, 2015) with equal
    weight for precision and recall, so that neither short nor long answers gain.
    """
    scores = []
    for n in range(1, 7):
        left, right = _char_ngrams(a, n), _char_ngrams(b, n)
        if not left or not right:
            break
        scores.append(2 * (left & right).total() / (left.total() + right.total()))
    return math.fsum(scores) / len(scores) if scores else 0.0


def _char_ngrams(text: str, n: int) -> Counter[str]:
    text = " ".join(text.casefold().split()).strip(" .!?\"'")
    return Counter(text[i : i + n] for i in range(len(text) - n + 1))
