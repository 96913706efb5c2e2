"""Numbers with their uncertainty: intervals, paired comparisons, power, calibration.

Pure functions on arrays of per-item values; fractions everywhere, never percent. An interval is a
95 % percentile bootstrap over items (Efron 1979): it says how the value would move with another
draw of questions, not with another model or prompt. Values that are not finite, and too few for
what is asked, are a :class:`.errors.StatisticsError` that says which.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from statistics import NormalDist
from typing import Any, TypeAlias

import numpy as np
import scipy

from grath_utils.errors import StatisticsError
from grath_utils.pairs.audit import wilson

LEVEL = 0.95  # of every interval
POWER = 0.8  # probability of finding an effect that is there
BINS = 10  # of the reliability diagram
COVERAGES = (0.25, 0.5, 0.75, 1.0)
RESAMPLES_AT_ONCE = 2**22  # drawn indices held in memory at a time
FRACTION = (0.0, 1.0)
ROUNDING = 1e-12  # relative: values nearer than this are equal

Bounds: TypeAlias = tuple[float, float] | None  # what a value can be at all; None: anything


def _numbers(values: Any, least: int = 1) -> np.ndarray:
    """Return at least so many values as floats; StatisticsError names those that are not finite."""
    try:
        array = np.array(values, dtype=np.float64, ndmin=1)
    except (TypeError, ValueError) as error:
        raise StatisticsError(f"not all values are numbers: {error}") from error
    if len(array) < least:
        raise StatisticsError(
            "one item gives no interval: at least two are needed"
            if len(array)
            else "no items: a mean needs at least one"
        )
    bad = np.flatnonzero(~np.isfinite(array).all(axis=tuple(range(1, array.ndim))))
    if len(bad):
        named = ", ".join(f"number {i + 1} ({array[i]})" for i in bad[:5])
        more = ", ..." if len(bad) > 5 else ""
        raise StatisticsError(f"{len(bad)} of {len(array)} values are not finite: {named}{more}")
    return array


def _paired(before: Any, after: Any, least: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Return the values of the same items in two measurements, see :func:`_numbers`."""
    first, second = _numbers(before), _numbers(after)
    if first.shape != second.shape:
        raise StatisticsError(
            f"{len(first)} values on one side and {len(second)} on the other: both must be of the "
            "same items"
        )
    return _numbers(first, least), second


def _all_equal(values: np.ndarray) -> bool:
    return bool(np.ptp(values) <= ROUNDING * np.abs(values).max())


def bootstrap_means(values: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """Return the mean of each bootstrap resample: (resamples,) or (resamples, columns).

    Of values (items,) or (items, columns), two items or more: all columns of an item are drawn
    together.
    """
    values, rng = _numbers(values, least=2), np.random.default_rng(seed)
    n = len(values)
    parts = _in_parts(resamples, n)
    return np.concatenate([values[rng.integers(n, size=(part, n))].mean(axis=1) for part in parts])


def _in_parts(resamples: int, items: int) -> Iterator[int]:
    """Yield how many resamples to draw together, so that memory is bounded."""
    if resamples < 1:
        raise StatisticsError(f"{resamples} resamples; at least 1 is needed")
    at_once = max(RESAMPLES_AT_ONCE // items, 1)
    for start in range(0, resamples, at_once):
        yield min(at_once, resamples - start)


def interval(samples: np.ndarray) -> list[float]:
    """Return the central 95 % of two samples or more: ``[low, high]``."""
    tail = (1 - LEVEL) / 2
    return np.quantile(_numbers(samples, least=2), [tail, 1 - tail], axis=0).tolist()


def mean_interval(
    values: Sequence[float], resamples: int, seed: int, bounds: Bounds = FRACTION
) -> list[float] | None:
    """Return the interval of a mean over two items or more, ``[low, high]``.

    Items that are all equal would give a bootstrap of no width, as if nothing else could ever be.
    Then the interval is what Wilson's limit (1927) leaves open: of ``n`` items none was otherwise,
    so at most a share ``z^2 / (n + z^2)`` of all is, and these lie anywhere within ``bounds``. For
    hits this is Wilson's interval, for differences of hits Tango's (1998). None without bounds.
    """
    values = _numbers(values, least=2)
    if not _all_equal(values):
        return interval(bootstrap_means(values, resamples, seed))
    value = float(values[0])
    if bounds is None or not bounds[0] <= value <= bounds[1]:
        return None
    share = wilson(0, len(values))[1]
    return [float(value + share * (end - value)) for end in bounds]


def summarize(
    values: Sequence[float],
    resamples: int,
    seed: int,
    *,
    bounds: Bounds = FRACTION,
    single: bool = False,
) -> dict[str, Any]:
    """Return ``{"value", "ci95", "n"}`` of per-item values, see :func:`mean_interval`.

    With ``single`` one item is enough; its ``ci95`` is None.
    """
    values = _numbers(values, least=1 if single else 2)
    ci95 = mean_interval(values, resamples, seed, bounds) if len(values) > 1 else None
    return {"value": float(values.mean()), "ci95": ci95, "n": len(values)}


def t_interval(values: Sequence[float]) -> list[float] | None:
    """Return Student's interval of a mean over a few independent runs.

    None for one run, and for runs that are all equal: there is no spread to go by. Over seeds
    there are too few values for a bootstrap, which would give a far too narrow interval; this one
    holds for any number from two on, where the values are about normal.
    """
    values = _numbers(values, least=0)
    if len(values) < 2 or _all_equal(values):
        return None
    mean, error = np.mean(values), scipy.stats.sem(values)
    return list(map(float, scipy.stats.t.interval(LEVEL, len(values) - 1, mean, error)))


def mcnemar_exact(before: Sequence[int], after: Sequence[int]) -> float:
    """Return the two-sided p-value that as many items were gained as lost (McNemar 1947).

    Values are 0 or 1 for each item, in the same order. Only items that changed count; under no
    effect each is a fair coin (exact binomial test).
    """
    first, second = _paired(before, after)
    if not np.isin([first, second], (0, 1)).all():
        raise StatisticsError("McNemar's test is of hits: every value must be 0 or 1")
    difference = second - first
    gained, changed = int((difference > 0).sum()), int((difference != 0).sum())
    fewer = min(gained, changed - gained)
    tail = sum(math.comb(changed, count) for count in range(fewer + 1)) / 2**changed
    return min(1.0, 2 * tail)


def sign_flip_test(differences: Sequence[float], resamples: int, seed: int) -> float:
    """Return the two-sided p-value that paired differences are symmetric around zero.

    Each item's difference keeps its size and gets a random sign (Fisher's randomization test); the
    observed arrangement counts as one of the resamples, so the value is never zero.
    """
    values, rng = _numbers(differences), np.random.default_rng(seed)
    # A hair of tolerance: sums in another order differ in their last digits.
    observed, extreme = abs(values.sum()) - 1e-12 * len(values), 1
    for part in _in_parts(resamples, len(values)):
        signs = rng.choice((-1.0, 1.0), size=(part, len(values)))
        extreme += int((np.abs(signs @ values) >= observed).sum())
    return extreme / (resamples + 1)


def paired_difference(
    before: Sequence[float],
    after: Sequence[float],
    resamples: int,
    seed: int,
    *,
    bounds: tuple[float, float] = FRACTION,
    single: bool = False,
) -> dict[str, Any]:
    """Compare two models on the same items, in the same order.

    ``bounds`` are what each value can be. With ``single`` one item is enough; its ``ci95`` is None.

    Returns:
        ``value`` (mean of after - before), ``ci95`` (paired, see :func:`mean_interval`),
        ``p_value`` and the ``test`` it is from, ``before``, ``after``, ``n``, ``gained`` and
        ``lost`` (items whose value rose and fell), and ``smallest_detectable`` (see below; None
        where all items changed alike, so that there is no spread to tell it from).
    """
    first, second = _paired(before, after, least=1 if single else 2)
    difference = second - first
    n, reach = len(difference), bounds[1] - bounds[0]
    if np.isin([first, second], (0, 1)).all():
        test, p_value = "exact McNemar", mcnemar_exact(first, second)
    else:
        test, p_value = "sign-flip randomization", sign_flip_test(difference, resamples, seed)
    spread = None if _all_equal(difference) else float(difference.std(ddof=1))
    return {
        "value": float(difference.mean()),
        "ci95": mean_interval(difference, resamples, seed, (-reach, reach)) if n > 1 else None,
        "p_value": p_value,
        "test": test,
        "before": float(first.mean()),
        "after": float(second.mean()),
        "n": n,
        "gained": int((difference > 0).sum()),
        "lost": int((difference < 0).sum()),
        "smallest_detectable": spread and smallest_detectable_effect(n, spread),
    }


def holm(p_values: Mapping[str, float] | Sequence[float]) -> Any:
    """Adjust p-values for their number (Holm 1979); compare the result with 0.05 as usual.

    They are given by name, or as a sequence; the result has the same form.
    """
    if isinstance(p_values, Mapping):
        return dict(zip(p_values, holm(list(p_values.values())), strict=True))
    values = np.asarray(p_values, dtype=np.float64)
    if not ((values >= 0) & (values <= 1)).all():
        raise StatisticsError(f"p-values lie between 0 and 1, found {list(p_values)}")
    order = np.argsort(values, kind="stable")
    steps = values[order] * np.arange(len(values), 0, -1)
    adjusted = np.empty_like(values)
    # Step-down: a larger p-value never gets a smaller adjusted one.
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
    return adjusted.tolist()


def smallest_detectable_effect(n: int, spread: float) -> float:
    """Return the smallest true mean difference that ``n`` items show in 80 % of all draws.

    The spread is the standard deviation of the per-item differences: for a 0/1 metric, about the
    square root of the share of items that change.
    """
    if n < 1:
        raise StatisticsError(f"n is {n}; at least 1 item is needed")
    if not 0 <= spread < math.inf:
        raise StatisticsError(f"the spread is {spread}; it must be a finite number, 0 or more")
    both_tails = 1 - (1 - LEVEL) / 2
    return sum(map(NormalDist().inv_cdf, (both_tails, POWER))) * spread / math.sqrt(n)


def items_needed(effect: float, spread: float) -> int:
    """Return how many items show a true mean difference ``effect`` in 80 % of all draws."""
    if not (0 < effect < math.inf and spread > 0):
        raise StatisticsError(f"effect {effect} and spread {spread} must be finite and above 0")
    return math.ceil((smallest_detectable_effect(1, spread) / effect) ** 2)


def calibration(confidence: Sequence[float], correct: Sequence[int]) -> dict[str, Any]:
    """Return how far confidence can be believed: the probability given to each chosen answer.

    These are ``bins`` of equal width, without empty ones (the reliability diagram); ``ece``, the
    mean distance of accuracy from confidence over them, weighted by items (Naeini et al. 2015); and
    ``selective_accuracy`` of the most confident shares of the items. Where the cut falls between
    equal confidences, these count with their mean accuracy.
    """
    conf, right = _paired(confidence, correct)
    if not ((conf >= 0) & (conf <= 1)).all():
        raise StatisticsError("a confidence is a probability: every value must lie in [0, 1]")
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
