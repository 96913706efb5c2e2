"""Notebook 03: what a round changed, and what it is compared with."""

from __future__ import annotations

from typing import Any

import numpy as np

from grath_utils.course.exercises.judging import (
    ROUNDING,
    exercise,
    finite_numbers,
    hold,
    hold_in_order,
    near,
    two_shares,
)
from grath_utils.dpo.data import tokenize_pairs
from grath_utils.dpo.round import reference_log_probs
from grath_utils.engine.models import Policy
from grath_utils.files import read_jsonl
from grath_utils.loop.run_dir import LOG_ROW, Run
from grath_utils.loop.stages import load_model, run_pairs
from grath_utils.loop.state import run_state
from grath_utils.pairs.words import ngram_f1


@exercise("03.easy", "the three lowest similarities")
def changed_similarity(run: Run, answer: Any, policy: Policy | None) -> str:
    before = {p.id: p.correct for p in run_pairs(run, 0)[0]}
    later = run_pairs(run, run_state(run).planned[-1])[0]
    changed = sorted(
        ngram_f1(before[p.id], p.correct)
        for p in later
        if p.id in before and p.correct != before[p.id]
    )
    wanted = changed[:3]
    found = sorted(finite_numbers(answer, len(wanted)))
    hold(
        len(changed) <= 3 or not near(found, changed[-3:], 0.005),
        "these changed least. A similarity of 1 means equal.",
    )
    hold(
        near(found, wanted, 0.005),
        "these are not the lowest similarities. Compare round 1 with the last round, training "
        "pairs only, and only answers that differ.",
    )
    return f"{len(changed)} of {len(later)} correct answers changed."


def _held_out_margins(run: Run, iteration: int | None, round_of_pairs: int) -> np.ndarray:
    """Return by how many nats one of the models prefers the chosen side of held-out pairs."""
    policy, settings = load_model(run, iteration), run.config.dpo
    data = tokenize_pairs(
        policy.tokenizer,
        run_pairs(run, round_of_pairs)[1],
        prompt_format=settings.prompt_format,
        max_prompt_length=settings.max_prompt_length,
        max_length=settings.max_length,
    )
    chosen, rejected = reference_log_probs(policy, data.examples, progress=False)
    return np.array(chosen) - np.array(rejected)


@exercise("03.medium", "(share for the base model, share for the last round)")
def consistency(run: Run, answer: Any, policy: Policy | None) -> str:
    found = two_shares(answer, "shares")
    margins = [_held_out_margins(run, t, 0) for t in (None, run_state(run).planned[-1])]
    wanted = [float((margin > 0).mean()) for margin in margins]
    # Pairs that rounding could tip either way.
    slack = [float((np.abs(margin) < ROUNDING).mean()) + 0.005 for margin in margins]
    hold_in_order(found, wanted, slack, "base")
    hold(
        near(found, wanted, slack),
        "at least one share is another one. The held-out pairs of round 1, summed "
        "log-probabilities, base and the last round.",
    )
    return "whether that is more than luck, only the paired interval tells."


@exercise("03.hard", "the log of your second round, `report.log`")
def base_reference(run: Run, answer: Any, policy: Policy | None) -> str:
    log = [dict(row) for row in answer]
    held = [row for row in log if row["split"] == "held_out"]
    hold(len(held) >= 2, "the log needs held-out rows, first and last: hand in `report.log`.")
    last = run_state(run).planned[-1]
    hold(last > 0, "this run has one round only; the exercise is about a later one.")
    own = [row for row in read_jsonl(run.training_log(last), LOG_ROW) if row["split"] == "held_out"]
    slack = run.config.dpo.beta * ROUNDING
    hold(held != own, "this is the log of the run itself; train the round a second time.")
    hold(
        abs(held[0]["logp_chosen"] - own[0]["logp_chosen"]) < 2 * ROUNDING,
        "the policy starts from somewhere else than the run's own round did: pass the previous "
        "round's adapter, and that round's pairs.",
    )
    # Before the first step, policy and reference differ by what the earlier rounds did.
    first = held[0]["margin"]
    before, reached = (
        run.config.dpo.beta * float(_held_out_margins(run, t, last).mean())
        for t in (None, last - 1)
    )
    hold(
        abs(first - (reached - before)) < 2 * slack,
        "the first margin does not fit a reference that is the base model.",
    )
    return f"the round starts at a margin of {first:+.3f}: what the rounds before it had won."
