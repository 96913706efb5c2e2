"""Notebook 05: what the records say, and what they could have said."""

from __future__ import annotations

from statistics import NormalDist
from typing import Any

import numpy as np

from grath_utils.course.exercises.judging import Answer, exercise, finite_numbers, hold, hold_wanted
from grath_utils.evaluation.statistics import items_needed
from grath_utils.files import notebooks_dir, read_jsonl


def _record(name: str) -> list[dict[str, Any]]:
    folder = notebooks_dir()
    hold(folder is not None, "the records lie beside the notebooks, and they are not here.")
    return read_jsonl(folder / "appendix" / f"recipe_{name}.jsonl")


@exercise("05.easy", "a function items_for(effect, ci95, n) that returns a number of items")
def items_for_an_effect(answer: Answer) -> str:
    items_for = answer.function()
    cases = [(row["n"], row["over_random"]) for row in _record("arms") if "over_random" in row]
    for n, found in cases:
        low, high = found["ci95"]
        standard_error = (high - low) / 2 / NormalDist().inv_cdf(0.975)
        for effect in (1.0, 4.0):
            wanted = items_needed(effect, standard_error * n**0.5)
            given = float(items_for(effect, [low, high], n))
            case = f"{effect:g} points, the interval [{low}, {high}] and {n} items"
            hold(
                abs(given / wanted / 4 - 1) > 0.02,
                f"four times too many for {case}: 1.96 standard errors are half of the interval.",
            )
            hold(
                abs(given - wanted) <= 1 + 0.02 * wanted,
                f"another number for {case}. The spread of the items is the standard error times "
                "the root of n, and an effect has to be 2.8 standard errors.",
            )
    return "so every interval also says how large the experiment should have been."


@exercise("05.medium", "(mean gain with annotated pairs, with self-made ones)")
def interaction(answer: Answer) -> str:
    record = _record("search")[1:]
    same = ("pairs", "prompt_format", "targets", "beta", "loss", "label_smoothing")
    gains: dict[bool, list[float]] = {True: [], False: []}
    for a in record:
        for b in record:
            rates = (a["learning_rate"], b["learning_rate"])
            if rates == (2e-4, 1e-3) and all(a[key] == b[key] for key in same):
                annotated = a["pairs"].startswith("annotated")
                gains[annotated].append(b["arc_dev_acc"] - a["arc_dev_acc"])
    wanted = [float(np.mean(gains[kind])) for kind in (True, False)]
    hold_wanted(
        finite_numbers(answer.value, 2),
        wanted,
        0.05,
        (wanted[::-1], "in the other order: annotated first."),
        otherwise="at least one mean is another one. ARC in points, 1e-3 minus 2e-4, rounds that "
        "differ in the learning rate only.",
    )
    return f"{len(gains[True])} and {len(gains[False])} matched pairs: few, so mind the intervals."


@exercise("05.hard", "two designs, as settings: ({...}, {...})")
def equal_steps(answer: Answer) -> str:
    settings = answer.run.config.flat()
    plain = {key: settings[key] for key in ("loop.iterations", "dpo.steps", "loop.later_steps")}
    first, second = ({**plain, **dict(design)} for design in answer.value)
    steps = []
    for rounds, one, later in ([int(d[key] or 0) for key in plain] for d in (first, second)):
        steps.append(one + (rounds - 1) * (later or one))
    hold(
        first["loop.iterations"] != second["loop.iterations"],
        "both have the same number of rounds, so both see the same kind of pairs.",
    )
    hold(
        steps[0] == steps[1],
        f"one trains {steps[0]} steps in all, the other {steps[1]}: that stays confounded.",
    )
    others = {key for d in (first, second) for key in d if first.get(key) != second.get(key)}
    others -= plain.keys()
    hold(not others, f"they also differ in {', '.join(sorted(others))}: one change at a time.")
    return "equal steps, different pairs. What is still confounded is yours to say."
