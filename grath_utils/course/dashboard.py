"""One look at all rounds: is it getting better, or merely flatter?

Two kinds of numbers stand side by side: what a round is *judged* by (held-out pairs, free answers:
:mod:`.choice`) and what it *reached* (benchmarks). Only the first kind decides.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

from grath_utils.errors import DataError
from grath_utils.evaluation.blind_rules import chance_level
from grath_utils.evaluation.statistics import Bounds, summarize
from grath_utils.loop.choice import MEASURE_AGAIN, displacement, margins
from grath_utils.loop.run_dir import BASE, Run, model_label
from grath_utils.loop.state import RunState, run_questions, run_state
from grath_utils.text import in_percent, with_interval

ROUND_COLUMNS = (
    "model",
    "held-out margin (nats)",
    "chosen (nats)",
    "KL (nats a token)",
    "words",
    "distinct",
    "circles",
    "non-answers",
    "alarms",
)
SIGNALS = (  # title, unit, and the values of held-out pairs from the signals of base and round
    ("held-out margin", "nats", margins),
    ("gain of the chosen answers", "nats", displacement),
    ("drift: KL to the base", "nats a token", lambda base, after: after["kl"]),
)
UNMOVED = (0.0, 0.0)  # bounds of the base model's signals: against itself nothing else can be


def round_rows(run: Run | RunState) -> list[tuple[str, ...]]:
    """Return what each round was judged by, one row a model, in the order of ROUND_COLUMNS.

    Margin, chosen and KL are means over the held-out pairs of iteration 0, against the base model,
    with 95 % intervals; the rest is about free answers to held-out questions.
    """
    state, rows = run_state(run), []
    run = state.run
    if state.choice is None:
        return []
    measured = zip((state.base, *state.rounds), ((), *state.choice.alarms), strict=True)
    for t, (after, warned) in enumerate(measured):
        bounds = None if t else UNMOVED
        means = [_mean(run, values(state.base, after), bounds) for _, _, values in SIGNALS]
        health = after["health"]
        rows.append(
            (
                f"round {t}" if t else "base",
                *(with_interval(*mean, "+.2f") if mean else "not measured" for mean in means),
                f"{health['words']:.1f}",
                *(f"{health[key]:.0%}" for key in ("distinct", "repetition", "non_answers")),
                "; ".join(warned) or "none",
            )
        )
    return rows


def _mean(
    run: Run, values: Sequence[float] | None, bounds: Bounds
) -> tuple[float, list[float] | None] | None:
    """Return a mean and its interval by the run's bootstrap; None where nothing was measured."""
    if values is None or not len(values):
        return None
    how = {"bounds": bounds, "single": True}
    found = summarize(values, run.config.evaluation.bootstrap, run.config.seed, **how)
    return found["value"], found["ci95"]


class Panel(NamedTuple):
    """One number over the models of a run."""

    title: str
    unit: str
    points: list[tuple[str, float, Sequence[float] | None]]
    """(model label, value, its interval where one is known)."""
    level: float | None = 0.0
    """Something to compare with, and its name."""
    named: str = "base"


def dashboard_panels(run: Run | RunState) -> list[Panel]:
    """Return the panels of the dashboard, as far as the run has the numbers.

    Three that a round is judged by, and one that it reached: the first metric of the first
    benchmark, beside chance. The health of free answers stands in :func:`round_rows`.
    """
    state, panels = run_state(run), []
    run = state.run
    signals = (state.base, *state.rounds) if state.base else ()
    measured = dict(zip(map(model_label, (None, *state.planned)), signals, strict=False))
    for title, unit, values in SIGNALS:
        means = {
            label: _mean(run, values(state.base, after), UNMOVED if label == BASE else None)
            for label, after in measured.items()
        }
        panels.append(Panel(title, unit, [(label, *mean) for label, mean in means.items() if mean]))
    for benchmark, models in itertools.islice(state.results.items(), 1):
        last = list(models.values())[-1]
        metric = next(iter(last["metrics"]))
        points = [(label, *in_percent(result, metric)) for label, result in models.items()]
        level = chance_level(last, metric)
        panels.append(Panel(f"{benchmark}: {metric}", "percent", points, level, "chance"))
    return [panel for panel in panels if panel.points]


def sample_rows(run: Run | RunState, number: int) -> tuple[list[str], list[tuple[str, ...]]]:
    """Return the free answers of every measured model to the same questions, as a table.

    Its columns are question, base, round 1, ...; its rows the first ``number`` held-out questions.

    Raises:
        DataError: the signals are about other questions than the run's.
    """
    state = run_state(run)
    run = state.run
    texts = {question.id: question.text for question in run_questions(run, "held_out")}
    asked = state.base.get("questions") or []
    if unknown := set(asked) - texts.keys():
        raise DataError(
            f"{run.signals(BASE)} has answers to {min(unknown)}, which is no held-out question of "
            f"{run.questions}; {MEASURE_AGAIN}"
        )
    columns = ["question", "base", *(f"round {t + 1}" for t in range(len(state.rounds)))]
    answers = [found["answers"] for found in (state.base, *state.rounds) if found]
    return columns, [(texts[q], *(a[i] for a in answers)) for i, q in enumerate(asked[:number])]
