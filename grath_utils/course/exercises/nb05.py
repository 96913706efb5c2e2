"""Notebook 05: comparisons of two runs."""

from __future__ import annotations

from typing import Any

import numpy as np

from grath_utils.course.exercises.judging import exercise, finite_numbers, hold, hold_in_order, near
from grath_utils.engine.models import Policy
from grath_utils.evaluation.statistics import items_needed
from grath_utils.files import notebooks_dir, read_jsonl
from grath_utils.loop.run_dir import Run


@exercise(
    "05.easy", "(trial, other trial, items needed by MC1, by MC2), None where it cannot be said"
)
def metric_items(run: Run, answer: Any, policy: Policy | None) -> str:
    first, second, *found = answer
    hold(len(found) == 2, "two trials and two numbers of items are wanted.")
    name, wanted = run.config.evaluation.benchmarks[0], []
    for metric in ("mc1", "mc2"):
        values = [
            [float(item["metrics"][metric]) for item in trial.result(name)["items"]]
            for trial in (first, second)
        ]
        spread = float(np.std(np.subtract(values[1], values[0]), ddof=1))
        wanted.append(items_needed(0.02, spread) if spread else None)
    for value, right, metric in zip(found, wanted, ("MC1", "MC2"), strict=True):
        hold(
            (value is None) == (right is None),
            f"by {metric}: None where no item changed (there is no spread then), else a number.",
        )
        hold(
            right is None or abs(float(value) - right) <= 1 + 0.02 * right,
            f"another number of items by {metric}. The spread is the standard deviation of the "
            "paired differences, second minus first; the effect is 0.02.",
        )
    if None in wanted:
        return "and where no item changed, this test cannot say how many it would take."
    return f"MC{1 if wanted[0] < wanted[1] else 2} needs fewer. Why?"


@exercise("05.medium", "(mean gain with annotated pairs, with self-made ones)")
def interaction(run: Run, answer: Any, policy: Policy | None) -> str:
    folder = notebooks_dir()
    hold(folder is not None, "the record lies beside the notebooks, and they are not here.")
    record = list(read_jsonl(folder / "appendix" / "recipe_search.jsonl"))[1:]
    same = ("pairs", "prompt_format", "targets", "beta", "loss", "label_smoothing")
    gains: dict[bool, list[float]] = {True: [], False: []}
    for a in record:
        for b in record:
            rates = (a["learning_rate"], b["learning_rate"])
            if rates == (2e-4, 1e-3) and all(a[key] == b[key] for key in same):
                annotated = a["pairs"].startswith("annotated")
                gains[annotated].append(b["arc_dev_acc"] - a["arc_dev_acc"])
    wanted = [float(np.mean(gains[kind])) for kind in (True, False)]
    found = finite_numbers(answer, 2)
    hold_in_order(found, wanted, 0.05, "annotated")
    hold(
        near(found, wanted, 0.05),
        "at least one mean is another one. ARC in points, 1e-3 minus 2e-4, rounds that differ in "
        "the learning rate only.",
    )
    return f"{len(gains[True])} and {len(gains[False])} matched pairs: few, so mind the intervals."


@exercise("05.hard", "two designs, as settings: ({...}, {...})")
def equal_steps(run: Run, answer: Any, policy: Policy | None) -> str:
    plain = {"loop.iterations": run.config.loop.iterations, "dpo.steps": run.config.dpo.steps}
    first, second = ({**plain, **dict(design)} for design in answer)
    steps = [int(d["loop.iterations"]) * int(d["dpo.steps"]) for d in (first, second)]
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
