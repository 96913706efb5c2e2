"""Numbers with their uncertainty: intervals, paired comparisons, power, calibration.

Pure functions on arrays of per-item values; fractions everywhere, never percent. An interval is a
95 % percentile bootstrap over items (Efron 1979): it says how the value would move with another
draw of questions, not with another model or prompt.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

from grath_utils.errors import UsageError

LEVEL = 0.95  # of every interval
POWER = 0.8  # probability of finding an effect that is there
BINS = 10  # of the reliability diagram
COVERAGES = (0.25, 0.5, 0.75, 1.0)
RESAMPLES_AT_ONCE = 2**22  # drawn indices held in memory at a time


def bootstrap_means(values: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """Return the mean of each bootstrap resample: (resamples,) or (resamples, columns).

    Args:
        values: (items,) or (items, columns); all columns of an item are drawn together.
        resamples: number of resamples.
        seed: the same seed draws the same items.
    """
    values = np.asarray(values, dtype=np.float64)
    n = len(values)
    if n == 0:
        raise UsageError("no items: a mean needs at least one")
    rng = np.random.default_rng(seed)
    parts = _in_parts(resamples, n)
    return np.concatenate([values[rng.integers(n, size=(part, n))].mean(axis=1) for part in parts])


def _in_parts(resamples: int, items: int) -> Iterator[int]:
    """Yield how many resamples to draw together, so that memory is bounded."""
    at_once = max(RESAMPLES_AT_ONCE // items, 1)
    for start in range(0, resamples, at_once):
        yield min(at_once, resamples - start)


def interval(samples: np.ndarray) -> list[float]:
    """Return the central 95 % of samples: ``[low, high]``."""
    tail = (1 - LEVEL) / 2
    return np.quantile(samples, [tail, 1 - tail], axis=0).tolist()


def summarize(values: Sequence[float], resamples: int, seed: int) -> dict[str, Any]:
    """Return ``{"value", "ci95", "n"}`` of per-item values."""
    means = bootstrap_means(values, resamples, seed)
    return {"value": float(np.mean(values)), "ci95": interval(means), "n": len(values)}


def t_interval(values: Sequence[float]) -> list[float] | None:
    """Return Student's interval of a mean over a few independent runs, or None for one run.

    Over seeds there are too few values for a bootstrap, which would give a far too narrow
    interval; this one holds for any number from two on, where the values are about normal.
    """
    if len(values) < 2:
        return None
    mean, reach = np.mean(values), t_quantile(len(values) - 1) * stats.sem(values)
    return [float(mean - reach), float(mean + reach)]


def t_quantile(freedom: int) -> float:
    """Return the ``t`` with 95 % of Student's distribution between ``-t`` and ``t``."""
    if freedom < 1:
        raise UsageError(f"{freedom} degrees of freedom; at least 1 is needed")
    return float(stats.t.ppf((1 + LEVEL) / 2, freedom))


def mcnemar_exact(before: Sequence[int], after: Sequence[int]) -> float:
    """Return the two-sided p-value that as many items were gained as lost (McNemar 1947).

    Only items that changed count; under no effect each is a fair coin (exact binomial test).

    Args:
        before, after: 0 or 1 for each item, in the same order.
    """
    difference = np.asarray(after, dtype=np.int64) - np.asarray(before, dtype=np.int64)
    gained, changed = int((difference > 0).sum()), int((difference != 0).sum())
    return float(stats.binomtest(gained, changed).pvalue) if changed else 1.0


def sign_flip_test(differences: Sequence[float], resamples: int, seed: int) -> float:
    """Return the two-sided p-value that paired differences are symmetric around zero.

    Each item's difference keeps its size and gets a random sign (Fisher's randomization test); the
    observed arrangement counts as one of the resamples, so the value is never zero.
    """
    values = np.asarray(differences, dtype=np.float64)
    rng = np.random.default_rng(seed)
    # A hair of tolerance: sums in another order differ in their last digits.
    observed, extreme = abs(values.sum()) - 1e-12 * len(values), 1
    for part in _in_parts(resamples, len(values)):
        signs = rng.choice((-1.0, 1.0), size=(part, len(values)))
        extreme += int((np.abs(signs @ values) >= observed).sum())
    return extreme / (resamples + 1)


def paired_difference(
    before: Sequence[float], after: Sequence[float], resamples: int, seed: int
) -> dict[str, Any]:
    """Compare two models on the same items.

    Returns:
        ``value`` (mean of after - before), ``ci95`` (paired bootstrap), ``p_value`` and the
        ``test`` it is from, ``before``, ``after``, ``n``, ``gained`` and ``lost`` (items whose
        value rose and fell), and ``smallest_detectable`` (see below).
    """
    first, second = np.asarray(before, dtype=np.float64), np.asarray(after, dtype=np.float64)
    difference = second - first
    n = len(difference)
    if np.isin([first, second], (0, 1)).all():
        test, p_value = "exact McNemar", mcnemar_exact(first, second)
    else:
        test, p_value = "sign-flip randomization", sign_flip_test(difference, resamples, seed)
    spread = float(difference.std(ddof=1)) if n > 1 else 0.0
    return {
        "value": float(difference.mean()),
        "ci95": interval(bootstrap_means(difference, resamples, seed)),
        "p_value": p_value,
        "test": test,
        "before": float(first.mean()),
        "after": float(second.mean()),
        "n": n,
        "gained": int((difference > 0).sum()),
        "lost": int((difference < 0).sum()),
        "smallest_detectable": smallest_detectable_effect(n, spread),
    }


def holm(p_values: Mapping[str, float] | Sequence[float]) -> Any:
    """Adjust p-values for their number (Holm 1979); compare the result with 0.05 as usual.

    Args:
        p_values: by name, or a sequence; the result has the same form.
    """
    if isinstance(p_values, Mapping):
        return dict(zip(p_values, holm(list(p_values.values())), strict=True))
    values = np.asarray(p_values, dtype=np.float64)
    if not ((values >= 0) & (values <= 1)).all():
        raise UsageError(f"p-values lie between 0 and 1, found {list(p_values)}")
    order = np.argsort(values, kind="stable")
    steps = values[order] * np.arange(len(values), 0, -1)
    adjusted = np.empty_like(values)
    # Step-down: a larger p-value never gets a smaller adjusted one.
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
    return adjusted.tolist()


def smallest_detectable_effect(n: int, spread: float) -> float:
    """Return the smallest true mean difference that ``n`` items show in 80 % of all draws.

    Args:
        n: number of items.
        spread: standard deviation of the per-item differences. For a 0/1 metric this is about the
            square root of the share of items that change.
    """
    if n < 1:
        raise UsageError(f"n is {n}; at least 1 item is needed")
    both_tails = 1 - (1 - LEVEL) / 2
    return float(stats.norm.ppf([both_tails, POWER]).sum()) * spread / math.sqrt(n)


def items_needed(effect: float, spread: float) -> int:
    """Return how many items show a true mean difference ``effect`` in 80 % of all draws."""
    if effect <= 0:
        raise UsageError(f"the effect is {effect}; it must be above 0")
    return math.ceil((smallest_detectable_effect(1, spread) / effect) ** 2)


def calibration(confidence: Sequence[float], correct: Sequence[int]) -> dict[str, Any]:
    """Return how far confidence can be believed.

    Args:
        confidence: (items,) probability given to the chosen answer.
        correct: (items,) whether it was right.

    Returns:
        ``bins`` of equal width, without empty ones (the reliability diagram); ``ece``, the mean
        distance of accuracy from confidence over them, weighted by items (Naeini et al. 2015);
        and ``selective_accuracy`` of the most confident shares of the items. Where the cut falls
        between equal confidences, these count with their mean accuracy.
    """
    conf, right = np.asarray(confidence, dtype=np.float64), np.asarray(correct, dtype=np.float64)
    place = np.clip((conf * BINS).astype(int), 0, BINS - 1)
    rows = [
        {
            "low": b / BINS,
            "high": (b + 1) / BINS,
            "confidence": float(conf[place == b].mean()),
            "accuracy": float(right[place == b].mean()),
            "n": int((place == b).sum()),
        }
        for b in np.unique(place).tolist()
    ]
    distances = (row["n"] * abs(row["accuracy"] - row["confidence"]) for row in rows)
    selective = []
    for coverage in COVERAGES:
        count = max(round(coverage * len(conf)), 1)
        cut = np.sort(conf)[-count]
        sure, tied = conf > cut, conf == cut
        hits = right[sure].sum() + (count - sure.sum()) * right[tied].mean()
        selective.append({"coverage": coverage, "accuracy": float(hits / count), "n": count})
    return {"ece": sum(distances) / len(conf), "bins": rows, "selective_accuracy": selective}
