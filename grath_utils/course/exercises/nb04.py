"""Notebook 04: MC2, the paired bootstrap, and how many items an effect needs."""

from __future__ import annotations

import math

import numpy as np

from grath_utils.course.exercises.judging import Answer, NotYetError, exercise, hold, near
from grath_utils.evaluation.benchmarks import BENCHMARKS
from grath_utils.evaluation.measure import RESULT
from grath_utils.evaluation.metrics import mc2
from grath_utils.evaluation.statistics import bootstrap_means, interval
from grath_utils.files import read_json
from grath_utils.loop.run_dir import Run, model_label
from grath_utils.loop.state import run_state


def _differences(run: Run) -> list[np.ndarray]:
    """Return the change of MC2 of each item, on each measured benchmark of truthfulness."""
    labels, found = (model_label(None), model_label(run_state(run).final)), []
    for name in (name for name, row in BENCHMARKS.items() if "mc2" in row.metrics):
        files = [run.evaluation(label, name) for label in labels]
        if all(path.exists() for path in files):
            items = [read_json(path, RESULT)["items"] for path in files]
            before, after = ([item["metrics"]["mc2"] for item in each] for each in items)
            found.append(np.subtract(after, before))
    hold(bool(found), "the run has no evaluation of base and kept round yet: run section 3.")
    return found


@exercise("04.easy", "your function, called with scores and labels")
def mc2_by_hand(answer: Answer) -> str:
    scores, labels = np.array([-7.0, -9.0, -8.0, -11.0]), np.array([1, 1, 0, 0])
    function, order = answer.function(), [2, 0, 3, 1]
    wanted = mc2(scores, labels)
    with np.errstate(all="ignore"):
        found = float(function(scores, labels))
        turned = float(function(scores[order], labels[order]))
        try:
            low = float(function(scores - 800, labels))
        except ZeroDivisionError:
            low = math.nan
    hold(not near([found], [1 - wanted], 1e-6), "this is the share of the false answers.")
    hold(near([found], [wanted], 1e-6), "another share. Sum exp(score) over the true answers, "
         "and divide by the same sum over all.")  # fmt: skip
    hold(near([turned], [wanted], 1e-6), "right as long as the true answers stand first: the "
         "labels say which are true, not the places.")  # fmt: skip
    hold(math.isfinite(low), "scores near -800 leave nothing to divide by: exp of them is 0. "
         "Subtract the largest score first.")  # fmt: skip
    hold(near([low], [wanted], 1e-6), "800 nats less on every answer must not change the share.")
    return "it holds for long answers, and for labels in any order."


@exercise("04.medium", "your function, called with the values before and after")
def paired_interval(answer: Answer) -> str:
    rng = np.random.default_rng(0)
    before = rng.random(150)  # items that differ much more than the two models do
    after = before + rng.normal(0.03, 0.06, 150)
    low, high = (float(end) for end in answer.function()(before, after))
    wanted = interval(bootstrap_means(after - before, 4000, 0))
    width = wanted[1] - wanted[0]
    hold(low < high, "the lower end comes first.")
    hold(not near([-high, -low], wanted, 0.2 * width), "the sign is turned: after minus before.")
    hold(high - low < 1.6 * width, "too wide, as if the two models had answered different items: "
         "draw items, and take both values of each.")  # fmt: skip
    hold(high - low > 0.7 * width, "too narrow: draw as many items as there are, with repetition, "
         "and take what lies between the quantiles 0.025 and 0.975 of the means.")  # fmt: skip
    hold(near([low, high], wanted, 0.2 * width), "the interval lies elsewhere: the mean of after "
         "minus before has to be in its middle.")  # fmt: skip
    return "up to chance, it is the interval of the table in section 5."


@exercise("04.hard", "{number of items: share that finds the effect}")
def power_curve(answer: Answer) -> str:
    curve = {int(n): float(share) for n, share in dict(answer.value).items()}
    hold(len(curve) >= 3, "at least three numbers of items are wanted.")
    hold(all(0 <= share <= 1 for share in curve.values()), "each share lies between 0 and 1.")
    hold(max(curve.values()) >= 0.7, "the curve ends too early: it never comes near 80 %.")
    sizes = sorted(curve)
    sizes = sorted({sizes[0], sizes[len(sizes) // 2], sizes[-1]})
    for moved in _differences(answer.run):
        shifted = moved - moved.mean() + 0.02
        simulated = [_power(shifted, n, answer.run.config.seed) for n in sizes]
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
