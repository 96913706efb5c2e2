"""What the pairs are worth: numbers to print, plot and compare between modes and iterations.

Gold answers judge the pairs here. They never reach generation or training.
"""

from __future__ import annotations

import math
from collections import Counter


def ngram_f1(a: str, b: str, *, longest: int = 6) -> float:
    """Return the similarity of two texts in [0, 1]: F1 over shared character n-grams.

    The mean over n = 1 … ``longest`` of those lengths that both texts have: chrF (Popović, 2015)
    with equal weight for precision and recall, so that neither short nor long answers gain.
    """
    scores = []
    for n in range(1, longest + 1):
        left, right = _char_ngrams(a, n), _char_ngrams(b, n)
        total = left.total() + right.total()
        if not left or not right:
            break
        scores.append(2 * (left & right).total() / total)
    return math.fsum(scores) / len(scores) if scores else 0.0


def _char_ngrams(text: str, n: int) -> Counter[str]:
    text = " ".join(text.casefold().split()).strip(" .!?\"'")
    return Counter(text[i : i + n] for i in range(len(text) - n + 1))
