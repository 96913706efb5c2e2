"""What the pairs are worth: numbers to print, plot and compare between modes and iterations.

Gold answers judge the pairs here. They never reach generation or training.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from grath_utils.errors import DataError
from grath_utils.pairs.generate import Pair
from grath_utils.pairs.questions import Question, normalized
from grath_utils.pairs.words import negated, ngram_f1, split_words, word_f1

if TYPE_CHECKING:
    from grath_utils.engine.models import Policy


@dataclass(frozen=True)
class GoldAgreement:
    """How the pairs stand to the annotated answers, where the source has them."""

    judged: int
    """Pairs whose question has a gold answer."""
    nearer: int
    """The correct answer shares more content words with the gold answer than the incorrect one."""
    tied: int
    """Both share as much (mostly nothing: a free answer rarely uses the words of the gold one)."""
    farther: int
    """The incorrect answer shares more."""
    nearer_by_characters: int
    """As ``nearer``, by character n-grams: hardly ever tied, but kinder to short answers."""

    @property
    def share(self) -> float:
        """Share of the judged pairs whose correct answer is nearer the gold one."""
        return self.nearer / self.judged if self.judged else math.nan

    @property
    def decided_share(self) -> float:
        """The same without the tied pairs; 0.5 is what answers without truth in them get."""
        decided = self.nearer + self.farther
        return self.nearer / decided if decided else math.nan

    @property
    def decided_interval(self) -> tuple[float, float]:
        """95 % Wilson interval of :attr:`decided_share`."""
        return wilson(self.nearer, self.nearer + self.farther)


@dataclass(frozen=True)
class Audit:
    """The numbers for one file of pairs."""

    questions: int
    pairs: int
    gold: GoldAgreement
    correct_words: float
    """Mean words of a correct answer."""
    incorrect_words: float
    correct_longer: float
    """Share of pairs whose correct answer is the longer one (in words, ties count half)."""
    correct_negated: float
    """Share of correct answers with a negation word."""
    incorrect_negated: float
    distinct_correct: float
    """Share of correct answers that no other question has as well."""
    distinct_incorrect: float
    divergence: float
    """Distance of the two answer distributions: Jensen-Shannon divergence of words, in bits."""

    @property
    def usable(self) -> float:
        """Pairs per question."""
        return self.pairs / self.questions if self.questions else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return every number, the derived ones too, as JSON holds them."""
        flat = dataclasses.asdict(self)
        gold = flat.pop("gold")
        if self.gold.judged:
            gold["share"] = self.gold.share
        if self.gold.nearer + self.gold.farther:
            gold["decided_share"] = self.gold.decided_share
            gold["decided_ci95"] = list(self.gold.decided_interval)
        return {**flat, "usable": self.usable, "gold": gold}


def audit_pairs(pairs: Sequence[Pair], questions: Sequence[Question]) -> Audit:
    """Measure a file of pairs.

    Args:
        pairs: at least one.
        questions: all that were asked, with gold answers where there are any.

    Raises:
        DataError: no pairs, or a pair whose question is not among the questions.
    """
    if not pairs:
        raise DataError("there are no pairs to audit")
    by_id = {question.id: question for question in questions}
    for pair in pairs:
        if pair.id not in by_id:
            raise DataError(f'pair "{pair.id}" belongs to none of the questions')
    sides = [[p.correct for p in pairs], [p.incorrect for p in pairs]]
    lengths = np.array([[len(split_words(text)) for text in side] for side in sides])
    longer = (lengths[0] > lengths[1]) + 0.5 * (lengths[0] == lengths[1])
    return Audit(
        questions=len(questions),
        pairs=len(pairs),
        gold=gold_agreement(pairs, by_id),
        correct_words=float(lengths[0].mean()),
        incorrect_words=float(lengths[1].mean()),
        correct_longer=float(longer.mean()),
        correct_negated=_share(map(negated, sides[0])),
        incorrect_negated=_share(map(negated, sides[1])),
        distinct_correct=distinct_share(sides[0]),
        distinct_incorrect=distinct_share(sides[1]),
        divergence=word_divergence(*sides),
    )


def gold_agreement(pairs: Iterable[Pair], questions: Mapping[str, Question]) -> GoldAgreement:
    """Compare both answers of each pair with the gold answer of its question."""
    counts: Counter[str] = Counter()
    for pair in pairs:
        question = questions[pair.id]
        if question.gold is None:
            continue
        gold = question.candidates[question.gold]
        by_words = word_f1(pair.correct, gold) - word_f1(pair.incorrect, gold)
        counts["nearer" if by_words > 0 else "farther" if by_words < 0 else "tied"] += 1
        counts["characters"] += ngram_f1(pair.correct, gold) > ngram_f1(pair.incorrect, gold)
        counts["judged"] += 1
    return GoldAgreement(
        counts["judged"], counts["nearer"], counts["tied"], counts["farther"], counts["characters"]
    )


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """Return the 95 % Wilson score interval of a share; (0, 1) without trials."""
    if not trials:
        return 0.0, 1.0
    z = 1.959964
    share = successes / trials
    centre = share + z * z / (2 * trials)
    spread = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def _share(flags: Iterable[bool]) -> float:
    return float(np.mean(list(flags)))


def distinct_share(answers: Sequence[str]) -> float:
    """Return the share of answers that occur once only, but for case and punctuation."""
    counts = Counter(map(normalized, answers))
    return sum(counts[normalized(answer)] == 1 for answer in answers) / len(answers)


# --- distances between sets of texts -------------------------------------------------------------


def word_divergence(left: Iterable[str], right: Iterable[str]) -> float:
    """Return the Jensen-Shannon divergence of two sets of texts' words, in bits, in [0, 1].

    0 = the same words equally often; 1 = no word in common. Small sets have a larger divergence
    by chance, so compare only sets of like size.
    """
    p, q = (Counter(word for text in side for word in split_words(text)) for side in (left, right))
    if not p or not q:
        return 0.0 if p == q else 1.0
    total = 0.0
    for word in p.keys() | q.keys():
        a, b = p[word] / p.total(), q[word] / q.total()
        middle = (a + b) / 2
        total += sum(x / 2 * math.log2(x / middle) for x in (a, b) if x)
    return min(max(total, 0.0), 1.0)


def embed(policy: Policy, texts: Sequence[str], *, batch_size: int = 32) -> np.ndarray:
    """Return the mean last hidden state of each text, (texts, hidden size), in float32."""
    import torch

    tokenizer, device = policy.tokenizer, policy.device
    rows = [tokenizer(text, add_special_tokens=False)["input_ids"] or [0] for text in texts]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    out: dict[int, np.ndarray] = {}
    with torch.inference_mode():
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            width = max(len(rows[i]) for i in batch)
            # Padding on the right stays unseen: attention is causal, and the mean leaves it out.
            ids = torch.tensor([rows[i] + [0] * (width - len(rows[i])) for i in batch])
            mask = torch.tensor([[1] * len(rows[i]) + [0] * (width - len(rows[i])) for i in batch])
            states = policy.model(
                input_ids=ids.to(device), output_hidden_states=True, logits_to_keep=1
            ).hidden_states[-1]
            weights = mask.to(device).unsqueeze(-1).float()
            mean = (states.float() * weights).sum(1) / weights.sum(1)
            out.update(zip(batch, mean.cpu().numpy(), strict=True))
    return np.stack([out[i] for i in range(len(rows))])


def embedding_distance(left: np.ndarray, right: np.ndarray) -> float:
    """Return the distance of two sets of embeddings' means, in pooled standard deviations.

    The paper argues with the distance between the distributions of correct and incorrect answers,
    and between source and test questions. Measured here as the Euclidean distance of the means
    over the root of the mean total variance of the two sets: 0 = the same mean; around
    ``sqrt(2 / n)`` by chance for n texts a side.

    Args:
        left, right: (texts, hidden size), from :func:`embed`, at least two texts each.
    """
    gap = float(np.linalg.norm(left.mean(0) - right.mean(0)))
    spread = math.sqrt((left.var(0, ddof=1).sum() + right.var(0, ddof=1).sum()) / 2)
    return gap / spread if spread else 0.0


# --- tables to read ------------------------------------------------------------------------------


def sample_table(
    pairs: Sequence[Pair], questions: Sequence[Question] = (), *, count: int = 8, seed: int = 0
) -> list[dict[str, str]]:
    """Return some pairs, drawn by the seed, as rows to show: question, both answers, gold."""
    gold = {q.id: q.candidates[q.gold] for q in questions if q.gold is not None}
    chosen = random.Random(seed).sample(list(pairs), min(count, len(pairs)))
    return [
        {
            "question": pair.question,
            "correct": pair.correct,
            "incorrect": pair.incorrect,
            **({"gold": gold[pair.id]} if pair.id in gold else {}),
        }
        for pair in chosen
    ]


def rejected_table(rejects: Sequence[Mapping[str, Any]], *, each: int = 2) -> list[dict[str, str]]:
    """Return the first ``each`` rejected completions of every reason, commonest reason first."""
    counts = Counter(str(row["reason"]) for row in rejects)
    return [
        {"reason": reason, "question": str(row["question"]), "completion": str(row["completion"])}
        for reason, _ in counts.most_common()
        for row in [r for r in rejects if r["reason"] == reason][:each]
    ]
