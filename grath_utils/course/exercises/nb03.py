"""Notebook 03: the margin, the choice of a round, and what a round is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from grath_utils.course.exercises.judging import ROUNDING, Answer, exercise, hold, hold_wanted
from grath_utils.dpo.data import tokenize_pairs
from grath_utils.dpo.round import reference_log_probs
from grath_utils.files import read_jsonl
from grath_utils.loop.choice import choose_round, displacement, margins
from grath_utils.loop.run_dir import LOG_ROW, Run
from grath_utils.loop.stages import load_model, run_pairs
from grath_utils.loop.state import run_state


@exercise("03.easy", "your function, called with the signals of the base and of a round")
def margin_over_base(answer: Answer) -> str:
    base = {"chosen": [-20.0, -8.0, -31.5], "rejected": [-24.0, -6.0, -30.0]}
    after = {"chosen": [-23.0, -5.0, -31.0], "rejected": [-36.0, -6.5, -28.0]}
    now, then = (np.subtract(of["chosen"], of["rejected"]) for of in (after, base))
    wanted = margins(*({"pairs": ["a", "b", "c"], **of} for of in (base, after)))
    found = np.asarray(answer.function()(base, after), dtype=float)
    hold(found.shape == wanted.shape, "one number for each pair is wanted: the mean comes later.")
    hold_wanted(
        found,
        wanted,
        1e-6,
        (displacement(base, after), "this is the gain of the chosen answers alone."),
        (-wanted, "the sign is turned: a pair that is preferred more strongly counts above 0."),
        (now, "this is what the trained model prefers; take off what the base preferred before."),
        (then, "this is what the base model prefers; the round is missing."),
        (answer.run.config.dpo.beta * wanted if answer.run else now, "in nats: without beta."),
        otherwise="another number. Follow the equation, term by term.",
    )
    return "the choice of a round stands on the mean of these numbers."


@exercise("03.medium", "your function, called with the gains and the alarms of all rounds")
def choice_rule(answer: Answer) -> str:
    function = answer.function()
    for gains, alarms in _clear_cases():
        found, wanted = function(list(gains), list(alarms)), _chosen(gains, alarms)
        found = None if found is None else int(found)
        case = ", ".join(
            f"{gain.mean():+.2f}{' with an alarm' if alarm else ''}"
            for gain, alarm in zip(gains, alarms, strict=True)
        )
        where = f"in a case with the mean margins {case}: "
        if found is not None:
            hold(found in range(len(gains)), "the index of a round, from 0, or None is wanted.")
            hold(not alarms[found], f"{where}a round with an alarm was kept.")
        if found is None or wanted is None:
            hold(found is not None or wanted is None, f"{where}a round is fit to be kept.")
            hold(wanted is not None or found is None, f"{where}no round is far enough above 0.")
            continue
        hold(found <= wanted, f"{where}an earlier round is within one standard error of the best.")
        hold(found >= wanted, f"{where}the round that was kept is too low: compare it with 0, and "
             "with the best pair by pair.")  # fmt: skip
    return "the loop keeps a round by the same rule (loop.keep=best)."


def _clear_cases() -> list[tuple[list[np.ndarray], list[bool]]]:
    """Return made-up runs whose choice does not hang on how a standard error is rounded."""
    rng, found = np.random.default_rng(0), []
    while len(found) < 40:
        shared, means = rng.normal(0, 2, 16), rng.normal(0.4, 0.8, rng.integers(1, 5)).cumsum()
        gains = [shared * mean + rng.normal(mean, 1.5, 16) for mean in means]
        alarms = (rng.random(len(gains)) < 0.15).tolist()
        spread = [[g.mean() + by * (g - g.mean()) for g in gains] for by in (0.9, 1.1)]
        if len({_chosen(each, alarms) for each in (gains, *spread)}) == 1:
            found.append((gains, alarms))
    return found


def _chosen(gains: Sequence[np.ndarray], alarms: Sequence[bool]) -> int | None:
    """Return which round the package would keep of rounds that have these margins and alarms."""

    def signals(gain: np.ndarray, alarm: bool) -> dict[str, Any]:
        none, health = [0.0] * len(gain), {"words": 9, "distinct": 1, "repetition": 0}
        sides = {"chosen": gain.tolist(), "rejected": none, "kl": [2.0 * alarm] * len(gain)}
        return {"pairs": list(map(str, none)), **sides, "health": {**health, "non_answers": 0}}

    rounds = [signals(*each) for each in zip(gains, alarms, strict=True)]
    return choose_round(signals(0 * gains[0], False), rounds, max_kl=1.0, seed=0).iteration


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


@exercise("03.hard", "the log of your second round, `report.log`")
def base_reference(answer: Answer) -> str:
    run, log = answer.run, [dict(row) for row in answer.value]
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
