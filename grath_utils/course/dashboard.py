"""One look at all rounds: is it getting better, or merely flatter?

Two kinds of numbers stand side by side: what a round is *judged* by (held-out pairs, free answers:
:mod:`.choice`) and what it *reached* (benchmarks). Only the first kind decides.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from grath_utils.evaluation.statistics import summarize
from grath_utils.loop.choice import displacement, margins
from grath_utils.loop.comparison import results
from grath_utils.loop.run_dir import Run
from grath_utils.loop.stages import (
    BASE,
    measured_rounds,
    model_label,
    planned_iterations,
    round_choice,
    run_questions,
)
from grath_utils.pairs.audit import audit_pairs, wilson
from grath_utils.pairs.generate import read_pairs
from grath_utils.pairs.words import ngram_f1


def choice_line(run: Run) -> str:
    """Return which round was chosen and why, and why the loop stopped early if it did."""
    found = round_choice(run)
    if found is None:
        return "no round has been measured yet"
    line = f"chosen without a look at any benchmark: {found.why}"
    return line + (f"; stopped early, {found.stop}" if found.stop else "")


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


def round_rows(run: Run) -> list[tuple[str, ...]]:
    """Return what each round was judged by, one row a model, in the order of ROUND_COLUMNS.

    Margin, chosen and KL are means over the held-out pairs of iteration 0, against the base model,
    with 95 % intervals; the rest is about free answers to held-out questions.
    """
    found = round_choice(run)
    if found is None:
        return []
    base, rounds = measured_rounds(run)

    def mean(values: Sequence[float] | None) -> str:
        if values is None or not len(values):
            return "not measured"
        summary = summarize(values, run.config.evaluation.bootstrap, run.config.seed)
        return "{:+.2f} [{:+.2f}, {:+.2f}]".format(summary["value"], *summary["ci95"])

    rows = []
    for label, after, warned in zip(
        ("base", *(f"round {t + 1}" for t in range(len(rounds)))),
        (base, *rounds),
        ((), *found.alarms),
        strict=True,
    ):
        health = after["health"]
        rows.append(
            (
                label,
                mean(margins(base, after)),
                mean(displacement(base, after)),
                mean(after["kl"]),
                f"{health['words']:.1f}",
                *(f"{health[key]:.0%}" for key in ("distinct", "repetition", "non_answers")),
                "; ".join(warned) or "none",
            )
        )
    return rows


@dataclass(frozen=True)
class Panel:
    """One number over the models of a run."""

    title: str
    unit: str
    points: tuple[tuple[str, float, float | None, float | None], ...]
    """(model label, value, low, high); the interval is None where none is known."""
    line: tuple[str, float] | None = None
    """Something to compare with: its name and its value."""


def dashboard_panels(run: Run) -> list[Panel]:
    """Return the panels of the dashboard, as far as the run has the numbers.

    First the pairs of each round, then what its model is judged by, then what it reached.
    """
    return [panel for panel in (*_pair_panels(run), *_signal_panels(run), *_results(run)) if panel]


def _pair_panels(run: Run) -> list[Panel]:
    questions = run_questions(run)
    audits, distances = [], []
    for t in planned_iterations(run):
        if not run.pairs(t).exists():
            break
        pairs = read_pairs(run.pairs(t))
        found = audit_pairs(pairs, questions)
        audits.append((model_label(t), found.usable, *wilson(found.pairs, found.questions)))
        apart = [1 - ngram_f1(pair.correct, pair.incorrect) for pair in pairs]
        distances.append((model_label(t), *_summary(run, apart)))
    if not audits:
        return []
    return [
        Panel("pairs for each question", "share", tuple(audits)),
        Panel("distance of the two answers", "1 - n-gram F1", tuple(distances)),
    ]


def _signal_panels(run: Run) -> list[Panel]:
    base, rounds = measured_rounds(run)
    if not base:
        return []
    models = [(BASE, base), *((model_label(t), found) for t, found in enumerate(rounds))]

    def panel(
        title: str, unit: str, values: Callable[[Any], Sequence[float] | None]
    ) -> Panel | None:
        found = [(label, values(signals)) for label, signals in models]
        points = tuple((label, *_summary(run, v)) for label, v in found if v is not None and len(v))
        return Panel(title, unit, points, ("base", 0.0)) if points else None

    def health(title: str, unit: str, key: str) -> Panel:
        points = tuple((label, signals["health"][key], None, None) for label, signals in models)
        return Panel(title, unit, points)

    panels = [
        panel("held-out margin", "nats", lambda s: margins(base, s)),
        panel("gain of the chosen answers", "nats", lambda s: displacement(base, s)),
        panel("drift: KL to the base", "nats a token", lambda s: s["kl"]),
        health("length of free answers", "words", "words"),
        health("distinct two-word sequences", "share", "distinct"),
        health("answers that refuse", "share", "non_answers"),
    ]
    return [found for found in panels if found]


def _results(run: Run) -> list[Panel]:
    """Every benchmark's first two metrics; MC2 beside what equal probabilities would give."""
    panels = []
    for benchmark, models in results(run).items():
        for metric in list(next(iter(models.values()))["metrics"])[:2]:
            points, line = [], None
            for label, result in models.items():
                value = result["metrics"][metric]
                points.append((label, *(100 * x for x in (value["value"], *value["ci95"]))))
                uniform = result["controls"].get(f"uniform_{metric}")
                line = ("uniform", 100 * uniform) if uniform is not None else None
            panels.append(Panel(f"{benchmark}: {metric}", "percent", tuple(points), line))
    return panels


def _summary(run: Run, values: Sequence[float]) -> tuple[float, float, float]:
    found = summarize(values, run.config.evaluation.bootstrap, run.config.seed)
    return (found["value"], *found["ci95"])


def sample_rows(run: Run, number: int = 10) -> tuple[list[str], list[tuple[str, ...]]]:
    """Return the free answers of every measured model to the same questions, as a table.

    Returns:
        The columns (question, base, round 1, ...) and one row for each of the first ``number``
        held-out questions.
    """
    base, rounds = measured_rounds(run)
    texts = {question.id: question.text for question in run_questions(run, "held_out")}
    asked = [texts[i] for i in base.get("questions", [])][:number]
    columns = ["question", "base", *(f"round {t + 1}" for t in range(len(rounds)))]
    answers = [found["answers"] for found in (base, *rounds) if found]
    return columns, [(q, *(a[i] for a in answers)) for i, q in enumerate(asked)]
