"""Notebook 03: what a round changed, and what it is compared with."""

from __future__ import annotations

from typing import Any

import numpy as np

from grath_utils.course.exercises.judging import (
    ROUNDING,
    exercise,
    finite_numbers,
    hold,
    near,
)
from grath_utils.dpo.data import tokenize_pairs
from grath_utils.dpo.round import reference_log_probs
from grath_utils.engine.models import Policy
from grath_utils.files import read_jsonl
from grath_utils.loop.run_dir import Run
from grath_utils.loop.stages import load_model, run_pairs
from grath_utils.loop.state import run_state
from grath_utils.pairs.words import ngram_f1


def _last_round(run: Run) -> int:
    return run_state(run).planned[-1]


@exercise("03.easy", "the three lowest similarities")
def changed_similarity(run: Run, answer: Any, policy: Policy | None) -> str:
    before = {p.id: p.correct for p in run_pairs(run, 0)[0]}
    later = run_pairs(run, _last_round(run))[0]
    changed = sorted(
        ngram_f1(before[p.id], p.correct)
        for p in later
        if p.id in before and p.correct != before[p.id]
    )
    wanted = changed[:3]
    found = finite_numbers(answer, len(wanted))
    hold(
        not near(sorted(found), changed[::-1][: len(wanted)][::-1], 0.005) or changed[3:] == [],
        "these changed least. A similarity of 1 means equal.",
    )
    hold(
        near(sorted(found), wanted, 0.005),
        "these are not the lowest similarities. Compare round 1 with the last round, training "
        "pairs only, and only answers that differ.",
    )
    return f"{len(changed)} of {len(later)} correct answers changed."


def _held_out_scores(
    run: Run, iteration: int | None, round_of_pairs: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the log-probabilities of a round's held-out pairs under one of the models."""
    policy, settings = load_model(run, iteration), run.config.dpo
    data = tokenize_pairs(
        policy.tokenizer,
        run_pairs(run, round_of_pairs)[1],
        prompt_format=settings.prompt_format,
        max_prompt_length=settings.max_prompt_length,
        max_length=settings.max_length,
    )
    chosen, rejected = reference_log_probs(policy, data.examples, progress=False)
    return np.array(chosen), np.array(rejected)


@exercise("03.medium", "(share for the base model, share for the last round)")
def consistency(run: Run, answer: Any, policy: Policy | None) -> str:
    found = finite_numbers(answer, 2)
    hold(all(0 <= value <= 1 for value in found), "give two shares between 0 and 1.")
    wanted, unsure = [], []
    for t in (None, _last_round(run)):
        chosen, rejected = _held_out_scores(run, t, 0)
        wanted.append(float((chosen > rejected).mean()))
        # Pairs that rounding could tip either way.
        unsure.append(float((np.abs(chosen - rejected) < ROUNDING).mean()))
    slack = [part + 0.005 for part in unsure]
    near = [abs(f - w) <= s for f, w, s in zip(found, wanted, slack, strict=True)]
    turned = [abs(f - w) <= s for f, w, s in zip(found[::-1], wanted, slack, strict=True)]
    hold(all(near) or not all(turned), "in the other order: base first.")
    hold(
        all(near),
        "at least one share is another one. The held-out pairs of round 1, summed "
        "log-probabilities, base and the last round.",
    )
    return "whether that is more than luck, only the paired interval tells."


@exercise("03.hard", "the log of your second round, `report.log`")
def base_reference(run: Run, answer: Any, policy: Policy | None) -> str:
    log = [dict(row) for row in answer]
    held = [row for row in log if row["split"] == "held_out"]
    hold(len(held) >= 2, "the log needs held-out rows, first and last: hand in `report.log`.")
    last = _last_round(run)
    hold(last > 0, "this run has one round only; the exercise is about a later one.")
    own = [row for row in read_jsonl(run.training_log(last)) if row["split"] == "held_out"]
    slack = run.config.dpo.beta * ROUNDING
    hold(held != own, "this is the log of the run itself; train the round a second time.")
    hold(
        abs(held[0]["logp_chosen"] - own[0]["logp_chosen"]) < 2 * ROUNDING,
        "the policy starts from somewhere else than the run's own round did: pass the previous "
        "round's adapter, and that round's pairs.",
    )
    # Before the first step, policy and reference differ by what the earlier rounds did.
    first = held[0]["margin"]
    contrasts = [_held_out_scores(run, t, last) for t in (None, last - 1)]
    before, reached = (run.config.dpo.beta * float((c - r).mean()) for c, r in contrasts)
    hold(
        abs(first - (reached - before)) < 2 * slack,
        "the first margin does not fit a reference that is the base model.",
    )
    return f"the round starts at a margin of {first:+.3f}: what the rounds before it had won."
