"""Notebook 04: the items that moved, another MC1, and how many items an effect needs."""

from __future__ import annotations

from typing import Any

import numpy as np

from grath_utils.course.exercises.judging import NotYetError, exercise, hold, near, two_shares
from grath_utils.engine.models import Policy
from grath_utils.evaluation.benchmarks import BENCHMARKS, Item, load_benchmark
from grath_utils.evaluation.measure import RESULT
from grath_utils.evaluation.metrics import mc1
from grath_utils.evaluation.statistics import bootstrap_means, interval
from grath_utils.files import read_json
from grath_utils.loop.run_dir import Run, model_label
from grath_utils.loop.state import run_state


def _measured(run: Run) -> list[tuple[tuple[Item, ...], list[Any], list[Any]]]:
    """Return (items, base, kept round) of each measured benchmark for truthfulness."""
    labels = (model_label(None), model_label(run_state(run).final))
    settings, found = run.config.evaluation, []
    for name in (name for name, row in BENCHMARKS.items() if "mc2" in row.metrics):
        files = [run.evaluation(label, name) for label in labels]
        if all(path.exists() for path in files):
            test = load_benchmark(name, limit=settings.limit, seed=run.config.seed)
            found.append((tuple(test.items), *(read_json(path, RESULT)["items"] for path in files)))
    hold(bool(found), "the run has no evaluation of base and kept round yet: run section 3.")
    return found


def _moved(before: list[Any], after: list[Any]) -> np.ndarray:
    pairs = zip(before, after, strict=True)
    return np.array([b["metrics"]["mc2"] - a["metrics"]["mc2"] for a, b in pairs])


@exercise("04.easy", "(three positions that rose most, three that fell most)")
def movers(run: Run, answer: Any, policy: Policy | None) -> str:
    rose, fell = (sorted(int(index) for index in part) for part in answer)
    hold(len(set(rose)) == len(set(fell)) == 3, "three different items on each side.")
    for items, before, after in _measured(run):
        if max(rose + fell) >= len(items) or min(rose + fell) < 0:
            continue
        # By value, not by item: equally large changes are equally right.
        moved = _moved(before, after)
        order, up, down = np.sort(moved), np.sort(moved[rose]), np.sort(moved[fell])
        if near(down, order[:3], 1e-9) and near(up, order[-3:], 1e-9):
            return "these moved most. A story about them needs other items to be tested on."
        hold(not near(up, order[:3], 1e-9), "rose and fell are exchanged.")
    raise NotYetError(
        "other items moved further. Positions in `test.items`, counted from 0; MC2 after minus "
        "before."
    )


@exercise("04.medium", "(MC1 by the mean before, after), as fractions")
def mean_mc1(run: Run, answer: Any, policy: Policy | None) -> str:
    found = two_shares(answer, "fractions")
    for items, before, after in _measured(run):
        wanted, by_sum = [], []
        for rows in (before, after):
            means, sums = [], []
            for item, row in zip(items, rows, strict=True):
                gold = item.mc1.index(item.gold)
                means.append(mc1([row["scores"][i] / row["tokens"][i] for i in item.mc1], gold))
                sums.append(mc1([row["scores"][i] for i in item.mc1], gold))
            wanted.append(float(np.mean(means)))
            by_sum.append(float(np.mean(sums)))
        if near(found, wanted, 0.001):
            return "does the paired interval tell the same story as by the sum?"
        hold(not near(found, by_sum, 0.001), "this is MC1 by the sum, as it was.")
    raise NotYetError(
        "at least one is another one. Only the choices in `item.mc1`, each score divided by its "
        "own number of tokens."
    )


@exercise("04.hard", "{number of items: share that finds the effect}")
def power_curve(run: Run, answer: Any, policy: Policy | None) -> str:
    curve = {int(n): float(share) for n, share in dict(answer).items()}
    hold(len(curve) >= 3, "at least three numbers of items are wanted.")
    hold(all(0 <= share <= 1 for share in curve.values()), "each share lies between 0 and 1.")
    hold(max(curve.values()) >= 0.7, "the curve ends too early: it never comes near 80 %.")
    sizes = sorted(curve)
    sizes = sorted({sizes[0], sizes[len(sizes) // 2], sizes[-1]})
    for _, before, after in _measured(run):
        moved = _moved(before, after)
        shifted = moved - moved.mean() + 0.02
        simulated = [_power(shifted, n, run.config.seed) for n in sizes]
        # Two simulations of some two hundred tests each differ by chance.
        if near([curve[n] for n in sizes], simulated, 0.15):
            return "the simulation here finds the same shares, up to chance."
    raise NotYetError(
        "the simulation here finds other shares. Are the differences shifted so that their true "
        "mean is 0.02, and drawn with repetition?"
    )


def _power(shifted: np.ndarray, n: int, seed: int, simulations: int = 200) -> float:
    """Return the share of simulated tests of ``n`` items whose interval does not hold 0."""
    rng, found = np.random.default_rng([seed, n]), 0
    for _ in range(simulations):
        means = bootstrap_means(rng.choice(shifted, n), 200, int(rng.integers(2**31)))
        low, high = interval(means)
        found += low > 0 or high < 0
    return found / simulations
