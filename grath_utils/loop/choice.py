"""Which round to keep, and when to stop: decided without ever looking at a test.

After each round the model is measured on the held-out pairs of iteration 0, and on its own free
answers to held-out questions (:func:`measure_signals`). From these come the :func:`alarms`, signs
that it has collapsed whatever its margin says, and the choice (:func:`choose_round`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from grath_utils.config import DPOConfig
from grath_utils.dpo.data import tokenize_pairs
from grath_utils.dpo.drift import can_measure_drift, kl_per_token
from grath_utils.dpo.round import reference_log_probs
from grath_utils.engine.generation import generate
from grath_utils.engine.models import Policy
from grath_utils.errors import DataError
from grath_utils.evaluation.statistics import bootstrap_means, interval
from grath_utils.pairs.generate import Pair
from grath_utils.pairs.parsing import Reason, check_answer
from grath_utils.pairs.prompts import question_messages, render_chat
from grath_utils.pairs.questions import Question
from grath_utils.pairs.words import split_words

SIGNALS_SCHEMA = 1
ASKED = 32  # held-out questions that are answered freely, at most
FREE_ANSWER_TOKENS = 48
RESAMPLES = 2000

# A few dozen answers cannot tell small changes from chance, so alarms are coarse: each is far
# outside what sampling gives, and each is a way in which models have been lost.
LENGTH_FACTOR = 3.0  # answers three times shorter or longer than the base model's
DISTINCT_LOSS = 0.25  # share of distinct two-word sequences lost: the same few phrases are left
SHARE_RISE = 0.25  # rise in the share of answers that refuse, or that turn in circles


def measure_signals(
    policy: Policy,
    base: Policy,
    pairs: Sequence[Pair],
    questions: Sequence[Question],
    dpo: DPOConfig,
    *,
    progress: bool = True,
) -> dict[str, Any]:
    """Return what the choice of a round stands on, as plain JSON values.

    Args:
        policy: the model after a round, or the base itself.
        base: the model before the first round.
        pairs: the held-out pairs of iteration 0, the same for every round; may be empty.
        questions: held-out questions; the first :data:`ASKED` are answered, greedily.
        dpo: how pairs become tokens.

    Returns:
        ``pairs`` (their ids), ``chosen`` and ``rejected`` (summed log-probabilities, nats), ``kl``
        (KL(policy || base) of each pair, nats a token; None on architectures where it cannot be
        measured), ``questions`` (ids), ``answers`` and ``health`` (:func:`text_health`).

    Raises:
        ScoringError: a log-probability is not finite.
    """
    try:
        examples = tokenize_pairs(
            policy.tokenizer,
            pairs,
            prompt_format=dpo.prompt_format,
            max_prompt_length=dpo.max_prompt_length,
            max_length=dpo.max_length,
        ).examples
    except DataError:  # none was held out, or all of them are too long
        examples = ()
    chosen, rejected, kl = [], [], [0.0] * len(examples)
    if examples:
        chosen, rejected = reference_log_probs(policy, examples, progress=progress)
        if not can_measure_drift(policy, base, examples):
            kl = None
        elif policy is not base:
            kl = kl_per_token(policy, base, examples)
    asked = questions[:ASKED]
    prompts = [render_chat(policy.tokenizer, question_messages(q.text)) for q in asked]
    written = generate(policy, prompts, max_new_tokens=FREE_ANSWER_TOKENS, progress=progress)
    answers = [completion.text.strip() for completion in written]
    return {
        "schema_version": SIGNALS_SCHEMA,
        "model": policy.fingerprint,
        "pairs": [example.id for example in examples],
        "chosen": chosen,
        "rejected": rejected,
        "kl": kl,
        "questions": [q.id for q in asked],
        "answers": answers,
        "health": text_health([q.text for q in asked], answers),
    }


def text_health(questions: Sequence[str], answers: Sequence[str]) -> dict[str, float]:
    """Return cheap numbers in which a collapse of free answers to questions shows.

    ``words`` is the mean number; ``distinct`` the share of different two-word sequences among all;
    ``repetition`` (an answer turns in circles) and ``non_answers`` (empty, refusing, "I have no
    comment") are shares of the answers.
    """
    texts = [split_words(answer) for answer in answers]
    sequences = [two for text in texts for two in pairwise(text)]

    def share(*reasons: Reason) -> float:
        found = [
            check_answer(question, answer, filters={reason}) is reason
            for question, answer in zip(questions, answers, strict=True)
            for reason in reasons
        ]
        return sum(found) / max(len(answers), 1)

    return {
        "words": sum(map(len, texts)) / max(len(texts), 1),
        "distinct": len(set(sequences)) / max(len(sequences), 1),
        "repetition": share(Reason.REPETITION),
        "non_answers": share(Reason.EMPTY, Reason.NON_ANSWER),
    }


def margins(base: Mapping[str, Any], after: Mapping[str, Any]) -> np.ndarray:
    """Return each held-out pair's gain over the base, in nats, shape (pairs,).

    ``(log pi(chosen) - log pi_base(chosen)) - (the same for rejected)``: DPO's margin over the
    *base* model, without beta, so that rounds with other references can be compared.

    Raises:
        DataError: the two were measured on other pairs.
    """
    if base["pairs"] != after["pairs"]:
        raise DataError("the signals of two rounds stand on different held-out pairs")
    chosen, rejected = (np.subtract(after[side], base[side]) for side in ("chosen", "rejected"))
    return np.asarray(chosen - rejected, dtype=np.float64)


def displacement(base: Mapping[str, Any], after: Mapping[str, Any]) -> np.ndarray:
    """Return how much each held-out chosen answer has gained, in nats; negative = displaced."""
    return np.subtract(after["chosen"], base["chosen"])


def alarms(base: Mapping[str, Any], after: Mapping[str, Any], *, max_kl: float) -> list[str]:
    """Return the signs of collapse in a round's signals, in words; ``max_kl`` in nats a token."""
    found = []
    if after["kl"] and (drift := np.mean(after["kl"])) > max_kl:
        found.append(
            f"it has drifted {drift:.2f} nats a token from the base (loop.max_kl is {max_kl:g})"
        )
    before, now = base["health"], after["health"]
    factor = max(now["words"], 1e-9) / max(before["words"], 1e-9)
    if not 1 / LENGTH_FACTOR <= factor <= LENGTH_FACTOR:
        found.append(f"answers went from {before['words']:.0f} words to {now['words']:.0f}")
    if before["distinct"] - now["distinct"] > DISTINCT_LOSS:
        found.append(
            "distinct two-word sequences fell from "
            f"{before['distinct']:.0%} to {now['distinct']:.0%}"
        )
    for key, what in (("repetition", "turn in circles"), ("non_answers", "refuse or are empty")):
        if now[key] - before[key] > SHARE_RISE:
            found.append(f"{now[key]:.0%} of the answers {what} ({before[key]:.0%} before)")
    return found


@dataclass(frozen=True)
class Choice:
    """Which round is kept, and why."""

    iteration: int | None
    """None: no round is fit to be kept, the base model is."""
    why: str
    stop: str | None
    """Why no further round should follow; None where one may."""
    alarms: tuple[tuple[str, ...], ...]
    """Of each round."""


def choose_round(
    base: Mapping[str, Any], rounds: Sequence[Mapping[str, Any]], *, max_kl: float, seed: int
) -> Choice:
    """Choose one of at least one round by its signals, and say whether another should follow.

    Of the rounds without alarm the best is that with the largest mean held-out margin over the
    base; the one that is kept is the *earliest* within one standard error of it (the rule of
    Breiman et al., Classification and Regression Trees, 1984): what a later round adds must be
    more than noise, since each round drifts further. A further round is not worth its cost after
    an alarm, or when the last one did not raise the margin. ``seed`` is that of the bootstrap
    behind the interval in the text.
    """
    warned = tuple(tuple(alarms(base, after, max_kl=max_kl)) for after in rounds)
    gains = [margins(base, after) for after in rounds]
    fit = [t for t, found in enumerate(warned) if not found]
    last = len(rounds) - 1
    stop = f"round {last + 1}: {'; '.join(warned[last])}" if warned[last] else None
    if not fit:
        return Choice(None, "every round raised an alarm, so the base model is kept", stop, warned)
    if not len(gains[0]):
        why = f"round {fit[-1] + 1} is the last without alarm (no held-out pair to compare on)"
        return Choice(fit[-1], why, stop, warned)
    means = [float(g.mean()) for g in gains]
    best = max(fit, key=lambda t: means[t])
    kept = next(t for t in fit if means[best] - means[t] <= _standard_error(gains[best] - gains[t]))
    if means[kept] <= 0:
        why = f"no round raised the held-out margin (best: {means[best]:+.2f} nats)"
        return Choice(None, f"{why}, so the base model is kept", stop, warned)
    low, high = interval(bootstrap_means(gains[kept], RESAMPLES, seed))
    why = (
        f"round {kept + 1}: held-out margin {means[kept]:+.2f} nats over the base "
        f"[{low:+.2f}, {high:+.2f}], n = {len(gains[kept])}, no alarm"
    )
    if rounds[kept]["kl"] is None:
        why += " (its drift could not be measured)"
    if kept != best:
        why += (
            f"; round {best + 1} has {means[best]:+.2f}, which is within one standard error of it"
        )
    if stop is None and last and means[last] <= (before := max(means[:last])):
        stop = (
            f"round {last + 1} did not raise the held-out margin "
            f"({means[last]:+.2f} nats, {before:+.2f} before)"
        )
    return Choice(kept, why, stop, warned)


def _standard_error(differences: np.ndarray) -> float:
    """Return that of the mean of paired differences; 0 for a single pair."""
    n = len(differences)
    return float(differences.std(ddof=1) / n**0.5) if n > 1 else 0.0
