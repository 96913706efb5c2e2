"""What the pairs are worth: numbers to print, plot and compare between modes and iterations.

Gold answers judge the pairs here. They never reach generation or training.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from grath_utils import engine
from grath_utils.errors import DataError
from grath_utils.pairs.preferences import Pair
from grath_utils.pairs.questions import Question
from grath_utils.pairs.words import split_words, word_f1, wording


@dataclass(frozen=True)
class GoldAgreement:
    """How the pairs stand to the annotated answers, by content words shared with them."""

    judged: int  # pairs whose question has a gold answer
    nearer: int  # the correct answer shares more with the gold one than the incorrect answer
    tied: int  # both share as much: mostly nothing, as free answers have words of their own
    farther: int  # the incorrect answer shares more

    @property
    def decided_interval(self) -> tuple[float, float]:
        """95 % Wilson interval of ``nearer`` without ties; answers without truth have a half."""
        return wilson(self.nearer, self.nearer + self.farther)


@dataclass(frozen=True)
class Audit:
    """The numbers for one file of pairs."""

    questions: int
    pairs: int
    gold: GoldAgreement
    correct_words: float  # mean words of a correct answer
    incorrect_words: float
    distinct_correct: float  # share of correct answers that no other question has as well
    distinct_incorrect: float
    divergence: float  # of the two sides, see :func:`word_divergence`

    @property
    def usable(self) -> float:
        """Pairs per question."""
        return self.pairs / self.questions


def audit_pairs(pairs: Sequence[Pair], questions: Sequence[Question]) -> Audit:
    """Measure pairs; ``questions`` are all that were asked, with gold answers where known.

    Raises:
        DataError: there is no pair, or one belongs to none of the questions.
    """
    if not pairs:
        raise DataError("there are no pairs to audit")
    by_id = {question.id: question for question in questions}
    for pair in pairs:
        if pair.id not in by_id:
            raise DataError(f'pair "{pair.id}" belongs to none of the questions')
    sides = [p.correct for p in pairs], [p.incorrect for p in pairs]
    return Audit(
        len(questions),
        len(pairs),
        _gold_agreement(pairs, by_id),
        *(sum(len(split_words(answer)) for answer in side) / len(pairs) for side in sides),
        *map(distinct_share, sides),
        divergence=word_divergence(*sides),
    )


def _gold_agreement(pairs: Sequence[Pair], by_id: Mapping[str, Question]) -> GoldAgreement:
    signs: Counter[float] = Counter()
    for pair in pairs:
        question = by_id[pair.id]
        if question.gold is not None:
            gold = question.candidates[question.gold]
            signs[np.sign(word_f1(pair.correct, gold) - word_f1(pair.incorrect, gold))] += 1
    return GoldAgreement(signs.total(), nearer=signs[1], tied=signs[0], farther=signs[-1])


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """Return the 95 % Wilson score interval of a share; (0, 1) without trials."""
    if not trials:
        return 0.0, 1.0
    z2, share = NormalDist().inv_cdf(0.975) ** 2 / trials, successes / trials
    middle, reach = share + z2 / 2, math.sqrt(z2 * share * (1 - share) + z2**2 / 4)
    low, high = ((middle + side * reach) / (1 + z2) for side in (-1, 1))
    return low if successes else 0.0, high if successes < trials else 1.0


def distinct_share(answers: Sequence[str]) -> float:
    """Return the share of answers that occur once only, but for case and punctuation."""
    counts = Counter(map(wording, answers))
    return sum(n == 1 for n in counts.values()) / len(answers)


def word_divergence(left: Iterable[str], right: Iterable[str]) -> float:
    """Return the Jensen-Shannon divergence of two sets of texts' words, in bits, in [0, 1].

    0 = the same words equally often; 1 = no word in common. Small sets have a larger divergence
    by chance, so compare only sets of like size.
    """
    p, q = (Counter(word for text in side for word in split_words(text)) for side in (left, right))
    if not p or not q:
        return 0.0 if p == q else 1.0
    counts = np.array([(p[word], q[word]) for word in p | q]).T
    shares = counts / counts.sum(1, keepdims=True)  # (2, words)
    ratios = shares / shares.mean(0)
    apart = shares * np.log2(ratios, where=ratios > 0, out=np.zeros_like(ratios))
    return float(np.clip(apart.sum(1).mean(), 0, 1))


def embed(policy: engine.Policy, texts: Sequence[str], *, batch_size: int = 32) -> np.ndarray:
    """Return the mean last hidden state of each text, (texts, hidden size), in float32."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    ids = [policy.tokenizer(text, add_special_tokens=False)["input_ids"] or [0] for text in texts]
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    means = []
    for start in range(0, len(order), batch_size):
        rows = [torch.tensor(ids[i]) for i in order[start : start + batch_size]]
        # Padding on the right stays unseen: attention is causal, and the mean leaves it out.
        padded = pad_sequence(rows, batch_first=True).to(policy.device)
        with torch.inference_mode():
            first = torch.zeros(1, dtype=torch.long, device=policy.device)  # some logits must be
            states = policy.model(padded, output_hidden_states=True, logits_to_keep=first)
        last = states.hidden_states[-1].float().cpu()
        means += [each[: len(row)].mean(0).numpy() for each, row in zip(last, rows, strict=True)]
    return np.stack(means)[np.argsort(order)]


def embedding_distance(left: np.ndarray, right: np.ndarray) -> float:
    """Return the distance of two sets of embeddings' means, in pooled standard deviations.

    The paper argues with the distance between the distributions of correct and incorrect answers,
    and between source and test questions. 0 = the same mean; around ``sqrt(2 / n)`` by chance for
    n texts a side, at least two, from :func:`embed`: (texts, hidden size).
    """
    gap = float(np.linalg.norm(left.mean(0) - right.mean(0)))
    spread = math.sqrt((left.var(0, ddof=1).sum() + right.var(0, ddof=1).sum()) / 2)
    return gap / spread if spread else 0.0
