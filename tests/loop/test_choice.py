"""Which round is kept and when the loop stops: rules on made-up signals, then on a tiny model."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest
from helpers import DPO, PAIRS
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from grath_utils.errors import DataError
from grath_utils.loop.choice import (
    Choice,
    alarms,
    choose_round,
    displacement,
    margins,
    measure_signals,
    text_health,
)
from grath_utils.pairs.questions import Question

FINE = {"words": 12.0, "distinct": 0.8, "repetition": 0.0, "non_answers": 0.0}


def signals(gains: list[float], *, kl: float | None = 0.1, **health: float) -> dict[str, Any]:
    """Signals whose margins over :data:`BASE` are ``gains``."""
    return {
        "pairs": [f"q{i}" for i in range(len(gains))],
        "chosen": [-20.0 + gain for gain in gains],
        "rejected": [-20.0] * len(gains),
        "kl": None if kl is None else [kl] * len(gains),
        "health": {**FINE, **health},
    }


def base(n: int = 8) -> dict[str, Any]:
    return signals([0.0] * n, kl=0.0)


# --- the rules -----------------------------------------------------------------------------------


def test_margins_are_gains_over_the_base_in_nats() -> None:
    after = {**signals([1.0, 2.0]), "chosen": [-22.0, -21.0], "rejected": [-25.0, -20.0]}
    # chosen moved by -2 and -1, rejected by -5 and 0
    assert margins(base(2), after).tolist() == [3.0, -1.0]
    assert displacement(base(2), after).tolist() == [-2.0, -1.0]
    with pytest.raises(DataError, match="different held-out pairs"):
        margins(base(3), after)


NOISY = [6.0, -4.0, 5.0, -3.0, 4.0, -2.0, 3.0, 0.6]  # mean 1.2, spread 3.9
ONE, TWO, THREE = ([x, x + 0.1] * 4 for x in (1.0, 2.0, 3.0))
BELOW = [signals([x] * 8) for x in (-0.2, -0.3, -0.4)]


@pytest.mark.parametrize(
    ("rounds", "kept", "why", "stop"),
    [
        # A clear rise takes the later round, one within noise the earlier.
        ([signals(ONE), signals(THREE)], 1, r"round 2: held-out margin \+3.05 .*no alarm", None),
        ([signals([1.0] * 8), signals(NOISY)], 0, "within one standard error", None),
        # No rise stops the loop, and the best is kept.
        ([signals(THREE), signals(TWO)], 0, "round 1", "did not raise .*2.05 nats, .3.05 before"),
        # An alarm stops the loop, and its round is never kept; where all are bad, the base is.
        ([signals(ONE), signals([9.0] * 8, kl=2.0)], 0, "round 1", "drifted 2.00 nats a token"),
        ([signals([9.0] * 8, kl=2.0)], None, "every round raised an alarm", "drifted"),
        # The base model is a candidate, at 0: a round that is not clearly above it is not kept,
        # and a first one below it stops the loop.
        (
            BELOW[:1],
            None,
            r"best: round 1, -0.20 ± 0.00 nats\), so the base",
            r"-0.20 nats, \+0.00 b",
        ),
        (
            BELOW,
            None,
            r"no round raised .* standard error \(best: round 1, -0.20",
            "round 3 did not",
        ),
        ([BELOW[0], signals([0.5] * 8)], 1, r"round 2: held-out margin \+0.50 nats", None),
        ([BELOW[0], signals([3.5, -2.5] * 4)], None, r"best: round 2, \+0.50 ± 1.13 nats", None),
        ([signals(NOISY)], None, r"best: round 1, \+1.20 ± 1.36 nats\), so the base", None),
        ([signals(NOISY), signals([0.1, 0.2] * 4)], 1, "round 1 has .1.20, .* within", "did not"),
        # A margin that is no number is an alarm.
        ([signals([math.nan] * 8)], None, "every round raised an alarm", "margin is not finite"),
        ([signals(ONE), signals([1.0] * 7 + [math.inf])], 0, "round 1", "margin is not finite"),
        # One pair has no standard error.
        ([signals([5.0]), signals([-5.0])], 1, "last .*one held-out pair is too few", None),
        ([signals([1.0] * 8, kl=None)], 0, "drift could not be measured", None),
        # Without held-out pairs there are only the alarms.
        ([signals([]), signals([]), signals([], non_answers=0.9)], 1, "no held-out pair", "90%"),
    ],
)
def test_which_round_is_kept_and_when_the_loop_stops(
    rounds: list[dict[str, Any]], kept: int | None, why: str, stop: str | None
) -> None:
    found = choose_round(base(len(rounds[0]["pairs"])), rounds, max_kl=1.0, seed=0)
    assert found.iteration == kept
    assert re.search(why, found.why)
    assert re.search(stop, found.stop) if stop else found.stop is None
    assert all(found.alarms[t] == () for t in range(len(rounds) - 1))


ANY = st.floats(width=32) | st.floats(-1, 1)
FINITE = st.floats(-100, 100)


@st.composite
def any_rounds(draw: st.DrawFn, numbers: st.SearchStrategy[float]) -> list[list[float]]:
    pairs = draw(st.integers(0, 4))
    margins = st.lists(numbers, min_size=pairs, max_size=pairs)
    return draw(st.lists(margins, min_size=1, max_size=4))


def choose(gains: list[list[float]]) -> Choice:
    return choose_round(base(len(gains[0])), list(map(signals, gains)), max_kl=1.0, seed=0)


@given(any_rounds(ANY))
def test_whatever_was_measured_one_candidate_is_chosen(gains: list[list[float]]) -> None:
    found = choose(gains)
    finite = [np.isfinite(gain).all() for gain in gains]
    assert [not warned for warned in found.alarms] == finite
    assert "nan" not in found.why
    if found.iteration is None:
        assert "the base model is kept" in found.why
    else:
        assert finite[found.iteration]
        assert found.why.startswith(f"round {found.iteration + 1}")
    if not finite[-1]:
        assert "not finite" in found.stop


@given(any_rounds(FINITE).filter(lambda gains: len(gains[0]) > 1))
def test_the_choice_and_the_stop_go_by_the_margins(gains: list[list[float]]) -> None:
    found, means = choose(gains), [np.subtract(np.add(-20.0, g), -20.0).mean() for g in gains]
    assert (found.stop is not None) == (means[-1] <= max([0, *means[:-1]]))
    if found.iteration is None:
        best = int(np.argmax(means))
        assert f"(best: round {best + 1}, {means[best]:+.2f} ± " in found.why
        assert stats.sem(gains[best]) >= means[best] - 1e-9
    else:
        assert f"margin {means[found.iteration]:+.2f} nats over" in found.why
        assert means[found.iteration] > stats.sem(gains[found.iteration]) - 1e-9
    # A further round that is no better than the best so far, or the base, changes nothing.
    worse = [min(0.0, *means)] * len(gains[0])
    assert choose([*gains, worse]).iteration == found.iteration
    if found.iteration is not None:
        shifted = np.subtract(gains[found.iteration], 0.5).tolist()
        assert choose([*gains, shifted]).iteration == found.iteration


def test_signals_that_lack_a_number_are_an_error() -> None:
    for side in ("chosen", "rejected"):
        with pytest.raises(DataError, match="lack a log-probability .* measured again"):
            margins(base(3), {**signals([1.0] * 3), side: [1.0]})


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"distinct": math.nan}, "distinct two-word sequences fell from 80% to nan%"),
        ({"repetition": math.nan}, "nan% of the answers turn in circles (0% before)"),
        ({"words": math.nan}, "answers went from 12 words to nan"),
        ({"kl": math.nan}, "it has drifted nan nats a token from the base (loop.max_kl is 1)"),
        ({"words": 3.0}, "answers went from 12 words to 3"),
        ({"words": 40.0}, "answers went from 12 words to 40"),
        ({"distinct": 0.5}, "distinct two-word sequences fell from 80% to 50%"),
        ({"repetition": 0.3}, "30% of the answers turn in circles (0% before)"),
        ({"non_answers": 0.3}, "30% of the answers refuse or are empty (0% before)"),
        ({"words": 0.0}, "answers went from 12 words to 0"),
    ],
)
def test_each_sign_of_collapse_raises_its_alarm(change: dict[str, float], text: str) -> None:
    assert alarms(base(), signals([1.0] * 8, **change), max_kl=1.0) == [text]


@pytest.mark.parametrize(
    "change", [{"words": 5.0}, {"distinct": 0.6}, {"repetition": 0.2}, {"non_answers": 0.2}]
)
def test_small_changes_are_no_alarm(change: dict[str, float]) -> None:
    assert alarms(base(), signals([1.0] * 8, **change), max_kl=1.0) == []
    assert alarms(base(), signals([1.0] * 8, kl=None), max_kl=0.001) == []


def test_health_of_texts() -> None:
    found = text_health(
        ["What is tea?"] * 5,
        ["Some drink made of leaves.", "??", "I have no comment.", "tea tea tea tea tea tea", "A."],
    )
    assert found["non_answers"] == 0.4  # "??" has no word and is no answer: it counts once
    assert found["repetition"] == 0.2
    assert found["words"] == pytest.approx((5 + 0 + 4 + 6 + 1) / 5)
    # 4 + 3 different sequences, and five times "tea tea"
    assert found["distinct"] == pytest.approx(8 / 12)


# --- measured on a model -------------------------------------------------------------------------


def test_the_base_against_itself_gains_nothing(tiny_policy) -> None:
    questions = [Question(p.id, p.question) for p in PAIRS]
    found = measure_signals(tiny_policy, PAIRS, questions, DPO, progress=False)
    assert found["pairs"] == [p.id for p in PAIRS]
    assert found["questions"] == found["pairs"]
    assert len(found["answers"]) == len(PAIRS)
    assert not np.any(margins(found, found))
    assert found["kl"] == [0.0] * len(PAIRS)
    assert alarms(found, found, max_kl=1.0) == []


def test_without_pairs_only_the_answers_are_measured(tiny_policy) -> None:
    found = measure_signals(tiny_policy, [], [Question("q", "Why?")], DPO, progress=False)
    assert (found["pairs"], found["chosen"], found["rejected"], found["kl"]) == ([], [], [], [])
    assert len(found["answers"]) == 1
