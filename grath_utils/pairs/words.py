"""Words and n-grams of short answers: what parser, filters, writers and audit compare them by."""

from __future__ import annotations

import math
import re
from collections import Counter
from functools import cache
from unicodedata import category, normalize

_ARTICLES = frozenset({"a", "an", "the"})
_FUNCTION_WORDS = frozenset(
    "am is are was were be been being do does did has have had can could may might must will would "
    "shall should and or but if so as at by for from in into of off on onto out over than then "
    "that these this those to too up with it its it's he she they them their his her we you i "
    "what when where which who whom whose why how there here about".split()
)
NEGATIONS = frozenset("no not never none nothing nobody nowhere cannot without neither nor".split())
LENGTH_OFFSET = 12  # characters that short answers get as a head start

_SIGN = re.compile(r"(?<![^\W\d_])-(?=\s?\d)|(?<=\d)/(?=\d)|[^\w\s/-]")  # a minus is no hyphen
# Invisible, and without a meaning: not among them are U+200C and U+200D, which part and join
# letters and emoji, and the tags of which flags are made.
_UNSEEN = re.compile("[\u00ad\u061c\u200b\u200e\u200f\u202a-\u202e\u2060\u2066-\u2069\ufeff]")
_BLANK = "\u115f\u1160\u2800\u3164\uffa0"  # letters and a symbol that show nothing


def is_blank(text: str) -> bool:
    """Return True if nothing of a text can be seen: it is spaces, zero-width, lone accents."""
    return all(
        category(c)[0] in "ZM" or category(c) in ("Cc", "Cf") for c in text if c not in _BLANK
    )


def same_text(text: str) -> str:
    """Return what texts share that differ only in case, spaces or Unicode form (NFC or NFD)."""
    # Not `casefold`, to which "in Maßen" (in moderation) is "in Massen" (in masses).
    folded = normalize("NFD", _UNSEEN.sub("", text)).lower().replace("ς", "σ")
    return normalize("NFC", " ".join(folded.split()))


@cache  # made where it is first used: it takes longer than the rest of this module to import
def _word() -> re.Pattern[str]:
    # What stands on a letter and is none for `re`: many accents, the vowel signs of Hindi or Thai.
    marks = "".join(c for c in map(chr, range(0x300, 0x20000)) if category(c)[0] == "M")
    return re.compile(rf"\d+(?:[.,]\d+)+|[^\W_](?:'?[^\W_]|[{marks}])*")


def answer_words(text: str) -> list[str]:
    """Return the lower-case words of a text; ``isn’t`` (as ``isn't``) and ``3.5`` are one each."""
    return _word().findall(re.sub("[’ʼ]", "'", _seen(text).casefold()))


def _seen(text: str) -> str:
    """Return a text in form NFC without joiners and variants, which do not tell answers apart."""
    return normalize("NFC", re.sub("[\u034f\u200c\u200d\ufe00-\ufe0f]", "", _UNSEEN.sub("", text)))


def split_words(text: str) -> list[str]:
    """Return the lower-case words of a text, without articles unless there is nothing else."""
    found = answer_words(text)
    return [word for word in found if word not in _ARTICLES] or found


def signs(text: str) -> list[str]:
    """Return what is no word and tells texts apart all the same: ``+ < $ # %``, minus, emoji."""
    found = _SIGN.findall(re.sub("[−–]", "-", _seen(text)))
    return [sign for sign in found if sign in "-/#%" or category(sign) in ("Sm", "Sc", "So")]


def wording(text: str) -> tuple[str, ...]:
    """Return the words and signs of a text: what is left without case and punctuation."""
    return (*answer_words(text), *signs(text))


def same_wording(a: str, b: str) -> bool:
    """Return True if two answers differ in case, punctuation and articles at most."""
    return split_words(a) == split_words(b) and signs(a) == signs(b)


def negated(text: str) -> bool:
    """Return True if a text has one of :data:`NEGATIONS` or a word that ends in ``n't``."""
    return any(word in NEGATIONS or word.endswith("n't") for word in answer_words(text))


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


def word_overlap(text_a: str, text_b: str) -> float:
    """Return the Jaccard overlap of two texts' word sets, in [0, 1]; 0 where neither has words."""
    a, b = set(answer_words(text_a)), set(answer_words(text_b))
    return len(a & b) / len(a | b) if a | b else 0.0


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
