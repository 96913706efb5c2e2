"""Intervals, tests, power and calibration against closed forms and simulations."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from grath_utils.errors import StatisticsError
from grath_utils.evaluation.statistics import (
    bootstrap_means,
    calibration,
    holm,
    interval,
    items_needed,
    mcnemar_exact,
    mean_interval,
    paired_difference,
    sign_flip_test,
    smallest_detectable_effect,
    summarize,
    t_interval,
)


def test_the_bootstrap_interval_is_the_normal_one_for_many_items() -> None:
    values = np.random.default_rng(0).binomial(1, 0.3, size=4000)
    result = summarize(values, 4000, seed=1)
    p = values.mean()
    half = 1.96 * math.sqrt(p * (1 - p) / len(values))
    assert result["value"] == p
    assert result["ci95"] == pytest.approx([p - half, p + half], abs=0.1 * half)
    assert result["n"] == 4000


def test_the_interval_covers_the_truth_about_95_times_in_100() -> None:
    rng = np.random.default_rng(5)
    hits = 0
    for trial in range(300):
        low, high = summarize(rng.binomial(1, 0.4, size=150), 500, seed=trial)["ci95"]
        hits += low <= 0.4 <= high
    assert 0.91 <= hits / 300 <= 0.98


def test_the_seed_decides_the_resamples_and_columns_are_drawn_together() -> None:
    values = np.random.default_rng(0).random((50, 2))
    values[:, 1] = values[:, 0] + 1
    means = bootstrap_means(values, 200, seed=3)
    assert np.allclose(means[:, 1], means[:, 0] + 1)
    assert np.array_equal(means, bootstrap_means(values, 200, seed=3))
    assert not np.array_equal(means, bootstrap_means(values, 200, seed=4))


def test_memory_is_bounded_without_changing_the_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    import grath_utils.evaluation.statistics as statistics

    values = np.arange(100.0)
    whole = bootstrap_means(values, 64, seed=0)
    monkeypatch.setattr(statistics, "RESAMPLES_AT_ONCE", 700)
    assert np.array_equal(bootstrap_means(values, 64, seed=0), whole)


def test_intervals_of_few_items() -> None:
    assert interval(np.arange(101) / 100) == pytest.approx([0.025, 0.975])
    assert summarize([0.25], 100, 0, single=True) == {"value": 0.25, "ci95": None, "n": 1}


@pytest.mark.parametrize("n", [2, 7, 60])
def test_the_bootstrap_is_that_of_scipy(n: int) -> None:
    values = np.random.default_rng(n).random(n)
    theirs = stats.bootstrap(
        [values],
        np.mean,
        n_resamples=500,
        method="percentile",
        random_state=np.random.default_rng(4),
    )
    assert np.allclose(bootstrap_means(values, 500, 4), theirs.bootstrap_distribution)
    assert mean_interval(values, 500, 4) == pytest.approx([*theirs.confidence_interval])


# Wilson's limit for 0 of n is z^2 / (n + z^2), with z^2 = 3.8415.
LIMIT_20, LIMIT_3, LIMIT_2 = (3.8415 / (n + 3.8415) for n in (20, 3, 2))


@pytest.mark.parametrize(
    ("values", "bounds", "expected"),
    [
        ([1] * 20, (0, 1), [1 - LIMIT_20, 1]),
        ([0] * 20, (0, 1), [0, LIMIT_20]),
        ([0, 0], (0, 1), [0, LIMIT_2]),
        ([0.25] * 20, (0, 1), [0.25 - LIMIT_20 * 0.25, 0.25 + LIMIT_20 * 0.75]),
        # Differences of hits: Tango's interval without a discordant pair, and with no other.
        ([0] * 20, (-1, 1), [-LIMIT_20, LIMIT_20]),
        ([1] * 20, (-1, 1), [1 - 2 * LIMIT_20, 1]),
        # Equal but for rounding: 0.3 - 0.2 is not 0.1.
        ([0.3 - 0.2, 0.1, 0.1], (0, 0.2), [0.1 - 0.1 * LIMIT_3, 0.1 + 0.1 * LIMIT_3]),
        ([3.0] * 20, None, None),
        ([3.0] * 20, (0, 1), None),
    ],
)
def test_equal_items_do_not_make_an_interval_of_no_width(
    values: Any, bounds: Any, expected: list[float] | None
) -> None:
    found = mean_interval(values, 100, 0, bounds)
    assert found == (None if expected is None else pytest.approx(expected, abs=1e-5))


def test_hits_that_are_all_equal_have_wilsons_interval() -> None:
    for hits in (0, 12):
        wilson = stats.binomtest(hits, 12).proportion_ci(method="wilson")
        assert summarize([hits > 0] * 12, 100, 0)["ci95"] == pytest.approx([*wilson])


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("measure", "text"),
    [
        *(
            (work, text)
            for measure in (
                lambda v: summarize(v, 100, 0),
                lambda v: bootstrap_means(v, 100, 0),
                lambda v: paired_difference(v, v, 100, 0),
                lambda v: interval(v),
            )
            for work, text in (
                (lambda m=measure: m([]), "no items"),
                (lambda m=measure: m([0.5]), "one item gives no interval"),
                (
                    lambda m=measure: m([0.1, NAN, 0.3, INF]),
                    r"2 of 4 .* number 2 \(nan\), number 4",
                ),
                (lambda m=measure: m([None, 0.5]), r"number 1 \(nan\)"),
                (lambda m=measure: m(["a", 0.5]), "not all values are numbers"),
            )
        ),
        (lambda: bootstrap_means([[0, 1], [NAN, 1]], 9, 0), "1 of 2 values are not finite"),
        (lambda: summarize([0, 1], 0, 0), "0 resamples"),
        (lambda: sign_flip_test([0, 1], 0, 0), "0 resamples"),
        (lambda: summarize([NAN] * 9, 9, 0), r"9 of 9 .*number 5 \(nan\), \.\.\.$"),
        (lambda: t_interval([0.1, NAN]), r"number 2 \(nan\)"),
        (lambda: sign_flip_test([], 9, 0), "no items"),
        (lambda: sign_flip_test([NAN], 9, 0), "not finite"),
        (lambda: mcnemar_exact([0, NAN], [1, 1]), "not finite"),
        (lambda: mcnemar_exact([0, 0.5], [1, 1]), "every value must be 0 or 1"),
        (lambda: mcnemar_exact([0, 1, 1], [1]), "3 values on one side and 1 on the other"),
        (lambda: paired_difference([0, 1, 1], [1], 9, 0), "3 values on one side and 1"),
        (lambda: paired_difference([1], [0, 1, 1], 9, 0), "1 values on one side and 3"),
        (lambda: paired_difference([0, NAN, 1], [1, 1, 1], 9, 0), "1 of 3 values are not finite"),
        (lambda: smallest_detectable_effect(9, NAN), "spread is nan"),
        (lambda: smallest_detectable_effect(9, -1), "spread is -1"),
        (lambda: smallest_detectable_effect(0, 1), "at least 1 item"),
        (lambda: items_needed(NAN, 1), "must be finite and above 0"),
        (lambda: items_needed(0, 1), "must be finite and above 0"),
        (lambda: items_needed(0.02, 0), "must be finite and above 0"),
        (lambda: calibration([], []), "no items"),
        (lambda: calibration([0.5, NAN], [1, 0]), "not finite"),
        (lambda: calibration([0.5, 0.5], [1]), "2 values on one side and 1"),
        (lambda: calibration([0.5, 1.5], [1, 0]), r"must lie in \[0, 1\]"),
    ],
)
def test_values_without_a_number_are_refused_by_name(measure: Callable[[], Any], text: str) -> None:
    with pytest.raises(StatisticsError, match=text):
        measure()


# --- paired --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gained", "lost", "p"),
    # Exact binomial: 2 * P(X <= min) with X ~ B(gained + lost, 1/2), capped at 1.
    [(0, 0, 1), (5, 5, 1), (1, 0, 1), (6, 0, 2 / 64), (1, 9, 22 / 1024), (8, 2, 112 / 1024)],
)
def test_mcnemar(gained: int, lost: int, p: float) -> None:
    before = [0] * gained + [1] * lost + [1] * 20 + [0] * 20
    after = [1] * gained + [0] * lost + [1] * 20 + [0] * 20
    assert mcnemar_exact(before, after) == pytest.approx(p)


@given(st.lists(st.integers(-4, 4), min_size=1, max_size=9))
def test_sign_flips_agree_with_all_of_them(differences: list[int]) -> None:
    sums = [
        abs(sum(s * d for s, d in zip(signs, differences, strict=True)))
        for signs in itertools.product((1, -1), repeat=len(differences))
    ]
    exact = np.mean([s >= abs(sum(differences)) for s in sums])
    assert sign_flip_test(differences, 4000, seed=0) == pytest.approx(exact, abs=0.04)
    if len(differences) > 1:
        theirs = stats.permutation_test(
            [differences], np.sum, permutation_type="samples", n_resamples=2**9
        )
        # Theirs doubles the smaller tail, which is the same for a symmetric distribution.
        assert theirs.pvalue == pytest.approx(exact)


def test_a_paired_comparison_sees_what_two_intervals_cannot() -> None:
    rng = np.random.default_rng(2)
    before = rng.random(200)
    after = before + 0.02 + 0.01 * rng.standard_normal(200)
    result = paired_difference(before, after, 2000, 0)
    assert result["value"] == pytest.approx(0.02, abs=0.003)
    assert result["ci95"][0] > 0
    assert result["p_value"] < 0.01
    assert result["test"] == "sign-flip randomization"
    low, high = summarize(before, 2000, 0)["ci95"]
    assert low < after.mean() < high  # unpaired, the difference drowns


def test_a_paired_comparison_of_hits() -> None:
    result = paired_difference([0, 0, 1, 1, 0, 0, 0, 0], [1, 1, 1, 0, 1, 1, 1, 1], 500, 0)
    assert (result["gained"], result["lost"], result["n"]) == (6, 1, 8)
    assert result["test"] == "exact McNemar"
    assert result["p_value"] == pytest.approx(2 * 8 / 128)
    assert result["value"] == result["after"] - result["before"] == 5 / 8


@pytest.mark.parametrize(
    ("before", "after", "low", "high", "p"),
    [
        ([0, 1] * 10, [0, 1] * 10, -LIMIT_20, LIMIT_20, 1),  # 0 of 20 discordant
        ([0.2, 0.7] * 10, [0.2, 0.7] * 10, -LIMIT_20, LIMIT_20, 1),
        ([0] * 20, [1] * 20, 1 - 2 * LIMIT_20, 1, 2 / 2**20),
        ([0, 0], [1, 1], 1 - 2 * LIMIT_2, 1, 0.5),
    ],
)
def test_items_that_all_change_alike(
    before: list[float], after: list[float], low: float, high: float, p: float
) -> None:
    result = paired_difference(before, after, 100, 0)
    assert result["ci95"] == pytest.approx([low, high], abs=1e-5)
    assert result["p_value"] == pytest.approx(p)
    assert result["smallest_detectable"] is None
    wide = paired_difference(before, after, 100, 0, bounds=(-1, 1))
    assert wide["ci95"][0] < result["ci95"][0]


def test_a_single_pair_has_a_value_and_no_interval() -> None:
    result = paired_difference([0], [1], 100, 0, single=True)
    assert (result["value"], result["ci95"], result["p_value"]) == (1.0, None, 1.0)


# --- several tests, power ------------------------------------------------------------------------


def test_holm() -> None:
    # Holm 1979 by hand: 0.01 * 4, 0.02 * 3, max(0.03 * 2, 0.06), max(0.04 * 1, 0.06).
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm({"a": 0.9, "b": 0.5}) == {"a": 1.0, "b": 1.0}
    assert holm([]) == []


@pytest.mark.parametrize("bad", [[0.5, float("nan")], [1.5], [-0.1]])
def test_holm_refuses_what_is_no_p_value(bad: list[float]) -> None:
    with pytest.raises(StatisticsError, match="between 0 and 1"):
        holm(bad)


def test_the_smallest_detectable_effect_is_detected_about_80_times_in_100() -> None:
    n, spread = 200, 0.5
    effect = smallest_detectable_effect(n, spread)
    assert effect == pytest.approx((1.95996 + 0.84162) * spread / math.sqrt(n), rel=1e-4)
    rng = np.random.default_rng(0)
    draws = effect + spread * rng.standard_normal((2000, n))
    z = draws.mean(1) / (spread / math.sqrt(n))
    assert np.mean(np.abs(z) > 1.95996) == pytest.approx(0.8, abs=0.03)
    assert items_needed(effect * 1.0001, spread) == n


# --- calibration ---------------------------------------------------------------------------------


def test_calibration_of_a_calibrated_and_of_a_boastful_model() -> None:
    rng = np.random.default_rng(1)
    confidence = rng.random(20000)
    honest = rng.random(20000) < confidence
    found = calibration(confidence, honest)
    assert found["ece"] < 0.02
    assert calibration(np.ones(50), np.zeros(50))["ece"] == 1.0
    rows = found["bins"]
    assert sum(row["n"] for row in rows) == 20000
    for row in rows:
        assert row["low"] <= row["confidence"] <= row["high"]
        assert row["accuracy"] == pytest.approx(row["confidence"], abs=0.05)


def test_bins_hold_their_edges() -> None:
    low, high = calibration([0.0, 1.0], [0, 1])["bins"]
    assert (low["low"], low["n"], high["high"], high["n"]) == (0.0, 1, 1.0, 1)


def test_selective_accuracy() -> None:
    found = calibration([0.9, 0.8, 0.7, 0.6], [1, 1, 0, 0])["selective_accuracy"]
    assert [row["coverage"] for row in found] == [0.25, 0.5, 0.75, 1.0]
    assert [row["n"] for row in found] == [1, 2, 3, 4]
    assert [row["accuracy"] for row in found] == [1.0, 1.0, pytest.approx(2 / 3), 0.5]
    # Equal confidence: the order of the data does not decide.
    for right in ([1, 0, 0, 0], [0, 0, 0, 1]):
        found = calibration([0.5] * 4, right)["selective_accuracy"]
        assert [row["accuracy"] for row in found] == [0.25] * 4


def test_an_interval_over_few_runs_covers_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    runs = rng.normal(0.3, 0.1, size=(4000, 3))
    inside = [low <= 0.3 <= high for low, high in map(t_interval, runs)]
    assert np.mean(inside) == pytest.approx(0.95, abs=0.012)
    theirs = stats.ttest_1samp(runs[0], 0).confidence_interval()
    assert t_interval(runs[0]) == pytest.approx([*theirs])
    # One run, and runs that are all equal but for rounding, have no spread to go by.
    assert t_interval([0.3]) is t_interval([0.3, 0.3, 0.1 + 0.2]) is t_interval([0, 0]) is None
