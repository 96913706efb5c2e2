"""Which round to keep, and when to stop: decided without ever looking at a test.

After each round the model is measured on the held-out pairs of iteration 0, and on its own free
answers to held-out questions (:func:`measure_signals`). From these come the :func:`alarms`, signs
that it has collapsed whatever its margin says, and the choice (:func:`choose_round`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy

from grath_utils.config import DPOConfig
from grath_utils.errors import DataError
from grath_utils.evaluation.statistics import mean_interval
from grath_utils.pairs.generate import Pair
from grath_utils.pairs.parsing import Reason, check_answer
from grath_utils.pairs.prompts import question_messages, render_chat
from grath_utils.pairs.questions import Question
from grath_utils.pairs.words import split_words
from grath_utils.text import brackets

if TYPE_CHECKING:
    from grath_utils.engine.models import Policy

SIGNALS_SCHEMA = 1
SIGNALS = {  # what a file of signals holds, as a form for files.read_json
    "pairs": [str],
    "chosen": [float],
    "rejected": [float],
    "kl": ([float], None),
    "questions": ([str], None),
    "answers": ([str], None),
    "health": {"words": float, "distinct": float, "repetition": float, "non_answers": float},
}
MEASURE_AGAIN = "delete the run's folder signals, and they are measured again"
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
    pairs: Sequence[Pair],
    questions: Sequence[Question],
    dpo: DPOConfig,
    *,
    base: Policy | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Return what the choice of a round stands on, as plain JSON values.

    Args:
        policy: the model after a round, or the base itself.
        pairs: the held-out pairs of iteration 0, the same for every round; may be empty.
        questions: held-out questions; the first :data:`ASKED` are answered, greedily.
        dpo: how pairs become tokens.
        base: the model before the first round; None: the policy without its adapters.

    Returns:
        ``pairs`` (their ids), ``chosen`` and ``rejected`` (summed log-probabilities, nats), ``kl``
        (KL(policy || base) of each pair, nats a token), ``questions`` (ids), ``answers`` and
        ``health`` (:func:`text_health`).

    Raises:
        ScoringError: a log-probability is not finite.
    """
    # What stands in a run is read without loading what computes.
    from grath_utils.dpo.data import tokenize_pairs
    from grath_utils.dpo.drift import kl_per_token
    from grath_utils.dpo.round import reference_log_probs
    from grath_utils.engine.generation import generate

    try:
        examples = tokenize_pairs(
            policy.tokenizer,
            pairs,
            prompt_format=dpo.prompt_format,
            max_prompt_length=dpo.max_prompt_length,
            max_length=min(dpo.max_length, policy.max_length),
        ).examples
    except DataError:  # none was held out, or all of them are too long
        examples = ()
    chosen, rejected, kl = [], [], [0.0] * len(examples)
    if examples:
        chosen, rejected = reference_log_probs(policy, examples, progress=progress)
        if not policy.is_base:
            kl = kl_per_token(policy, examples, base)
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
            check_answer(question, answer, filters=reasons) in reasons
            for question, answer in zip(questions, answers, strict=True)
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
        DataError: the two were measured on other pairs, or a pair lacks a log-probability.
    """
    if base["pairs"] != after["pairs"]:
        raise DataError(
            f"the signals of two rounds stand on different held-out pairs; {MEASURE_AGAIN}"
        )
    sides = [signals[side] for signals in (base, after) for side in ("chosen", "rejected")]
    if any(len(side) != len(base["pairs"]) for side in sides):
        raise DataError(
            f"a round's signals lack a log-probability or have one too many; {MEASURE_AGAIN}"
        )
    chosen, rejected = (np.subtract(after[side], base[side]) for side in ("chosen", "rejected"))
    return chosen - rejected


def displacement(base: Mapping[str, Any], after: Mapping[str, Any]) -> np.ndarray:
    """Return how much each held-out chosen answer has gained, in nats; negative = displaced."""
    return np.subtract(after["chosen"], base["chosen"])


def alarms(base: Mapping[str, Any], after: Mapping[str, Any], *, max_kl: float) -> list[str]:
    """Return the signs of collapse in a round's signals, in words; ``max_kl`` in nats a token."""
    found = []
    # Asked the other way round, so that what is not a number raises an alarm, too.
    if not np.isfinite(margins(base, after)).all():
        found.append("its held-out margin is not finite")
    if after["kl"] and not (drift := np.mean(after["kl"])) <= max_kl:
        found.append(
            f"it has drifted {drift:.2f} nats a token from the base (loop.max_kl is {max_kl:g})"
        )
    before, now = base["health"], after["health"]
    factor = max(now["words"], 1e-9) / max(before["words"], 1e-9)
    if not 1 / LENGTH_FACTOR <= factor <= LENGTH_FACTOR:
        found.append(f"answers went from {before['words']:.0f} words to {now['words']:.0f}")
    if not before["distinct"] - now["distinct"] <= DISTINCT_LOSS:
        found.append(
            "distinct two-word sequences fell from "
            f"{before['distinct']:.0%} to {now['distinct']:.0%}"
        )
    for key, what in (("repetition", "turn in circles"), ("non_answers", "refuse or are empty")):
        if not now[key] - before[key] <= SHARE_RISE:
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

    The candidates are the base model, whose margin over itself is 0, and the rounds without alarm.
    The best round has the largest mean held-out margin; the one that is kept is the *earliest*
    within one standard error of it (the rule of Breiman et al., Classification and Regression
    Trees, 1984) that is itself more than one standard error above the base: what a later candidate
    adds must be more than noise, since each round drifts further. A further round is not worth its
    cost after an alarm, or when the last one did not raise the margin. ``seed`` is that of the
    bootstrap behind the interval in the text.
    """
    warned = tuple(tuple(alarms(base, after, max_kl=max_kl)) for after in rounds)
    fit = [t for t, found in enumerate(warned) if not found]
    last = len(rounds) - 1
    stop = f"round {last + 1}: {'; '.join(warned[last])}" if warned[last] else None
    if not fit:
        return Choice(None, "every round raised an alarm, so the base model is kept", stop, warned)
    gains = {t: margins(base, rounds[t]) for t in fit}
    n = len(gains[fit[0]])
    if n < 2:
        pairs = "one held-out pair is too few" if n else "no held-out pair"
        why = f"round {fit[-1] + 1} is the last without alarm ({pairs} to compare on)"
        return Choice(fit[-1], why, stop, warned)
    means = {t: float(gain.mean()) for t, gain in gains.items()}
    before = max([0.0, *(means[t] for t in fit if t < last)])
    if stop is None and means[last] <= before:
        stop = (
            f"round {last + 1} did not raise the held-out margin "
            f"({means[last]:+.2f} nats, {before:+.2f} before)"
        )
    errors = {t: scipy.stats.sem(gain) for t, gain in gains.items()}
    rising = [t for t in fit if means[t] > errors[t]]
    best = max(fit, key=means.__getitem__)
    if not rising:
        why = (
            "no round raised the held-out margin by more than its standard error (best: round "
            f"{best + 1}, {means[best]:+.2f} ± {errors[best]:.2f} nats), so the base model is kept"
        )
        return Choice(None, why, stop, warned)
    # One is always within that reach: the best itself, or all if it is too noisy to be among them.
    behind = {t: means[best] - means[t] > scipy.stats.sem(gains[best] - gains[t]) for t in rising}
    kept = min(rising, key=lambda t: (behind[t], t))
    ci95 = mean_interval(gains[kept], RESAMPLES, seed, bounds=None)
    why = (
        f"round {kept + 1}: held-out margin {means[kept]:+.2f} nats over the base "
        f"{brackets(ci95, '+.2f')}, n = {n}, no alarm"
    )
    if rounds[kept]["kl"] is None:
        why += " (its drift could not be measured)"
    if kept != best:
        why += (
            f"; round {best + 1} has {means[best]:+.2f}, which is within one standard error of it"
        )
    return Choice(kept, why, stop, warned)
