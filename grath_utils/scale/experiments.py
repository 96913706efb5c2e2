"""Experiments beside a run: a shipped grid, cut to what a reader can wait for, and read with care.

All experiments of a run live in one sweep's folder, ``RUN/what_matters``, so that they share the
points and stages that they have in common, and resume where they were stopped. They run in this
process; the same grids, whole and with several seeds, are for ``python -m grath_utils sweep``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from grath_utils.config import changed_settings, parse_overrides
from grath_utils.errors import DataError, FetchError, GrathError, UsageError, did_you_mean
from grath_utils.evaluation.measure import RESULT, compare
from grath_utils.files import read_json, write_text
from grath_utils.loop.run_dir import BASE, Run, load_run, model_label
from grath_utils.loop.state import run_state
from grath_utils.pairs.questions import load_questions
from grath_utils.scale.grids import cell_of, label, read_grid
from grath_utils.scale.sweep_results import PointOutcome, find_row
from grath_utils.scale.sweeps import run_here
from grath_utils.text import with_interval

_CPU = parse_overrides(
    "questions.limit=32 pairs.candidates=2 dpo.steps=6 dpo.batch_size=8 dpo.warmup_steps=1 "
    "loop.iterations=1 loop.keep=last loop.early_stop=false loop.signals=false "
    "evaluation.limit=64 evaluation.every_iteration=false"
)
_SMOKE = parse_overrides(
    "questions.limit=8 pairs.candidates=1 dpo.steps=2 dpo.batch_size=2 dpo.micro_batch_size=2 "
    "dpo.warmup_steps=0 evaluation.limit=6"
)
# With the larger model every point would take a quarter of an hour.
_TINY = parse_overrides("model.name=tiny pairs.mode=default pairs.judge=none loop.placebo=false")
SIZES: Mapping[str, Mapping[str, Any]] = {
    "smoke": {**_CPU, **_SMOKE},
    "cpu": {**_CPU, **_TINY},
    "cpu-tiny": _CPU,
    # Its pairs are picked; what the experiments vary is mostly how the model writes.
    "cpu-long": {**_CPU, "questions.source": "own", "pairs.mode": "default"},
}
"""Profile -> what makes its experiments small; other profiles keep their own size."""

Difference = tuple[str, dict[str, Any]]
"""What is compared in which metric, and the paired difference over the items."""


def size_of(run: Run) -> dict[str, Any]:
    """Return what experiments change in the profile of a run: its size, then its overrides."""
    return {**SIZES.get(run.config.profile, {}), **changed_settings(run.config)}


def folder_of(run: Run) -> Path:
    """Return where the experiments of a run live."""
    return run.path / "what_matters"


def cut_grid(
    name: str,
    run: Run,
    axes: Mapping[str, Sequence[Any]],
    *,
    common: Mapping[str, Any] | None = None,
) -> Path:
    """Write a shipped grid, cut to the size of a run, beside the run; return the file.

    ``axes`` are the values to try, of keys that the grid varies; the others stay at the profile's
    value, and the seed is the run's. What is ``common`` to all points takes precedence over what
    the grid sets for all, that over what the user has set, and that over the size.

    Raises:
        UsageError: no such grid, or it does not vary such a key.
    """
    grid = read_grid(name)
    for key in axes:
        if key not in grid.axes:
            raise UsageError(f'{name} does not vary "{key}"{did_you_mean(key, grid.axes)}')
    settings = {**size_of(run), **grid.common, **(common or {})}
    tree = {
        "profile": run.config.profile,
        "set": {key: value for key, value in settings.items() if key not in axes},
        "grid": {"seed": [run.config.seed], **{key: list(axes[key]) for key in axes}},
    }
    path = folder_of(run) / "grids" / f"{name}.yaml"
    write_text(path, f"# {name}, cut for this run.\n{yaml.safe_dump(tree, sort_keys=False)}")
    return path


@dataclass(frozen=True)
class Trial:
    """A finished point of an experiment."""

    name: str  # what it varies: reference=base; with its seed where the experiment has several
    values: Mapping[str, Any]
    run: Run

    def result(self, benchmark: str, *, base: bool = False) -> dict[str, Any]:
        """Return the evaluation of its final model, or of the base model."""
        model = BASE if base else model_label(run_state(self.run).final)
        return read_json(self.run.evaluation(model, benchmark), RESULT)


def run_experiment(
    grid: Path, *, say: Callable[[str], None] = print
) -> tuple[list[Trial], list[PointOutcome]]:
    """Run a grid of :func:`cut_grid`, or resume it; return the finished points, and the failed.

    Raises:
        GrathError: the grid is refused, or not one point ended well.
    """
    out = grid.parent.parent / "sweep"
    outcomes = run_here(str(grid), out, say=say)
    failed = [outcome for outcome in outcomes if outcome.status != "done"]
    if len(failed) == len(outcomes):
        raise GrathError(f"no point of {grid.name} ended well. First: {failed[0].error}")
    several, trials = len({outcome.values["seed"] for outcome in outcomes}) > 1, []
    for outcome in outcomes:
        if row := find_row(out, outcome.name):
            name = label(outcome.values if several else cell_of(outcome.values))
            trials.append(Trial(name, outcome.values, load_run(out / "runs" / row["run"])))
    return trials, failed


def why_not(run: Run, source: str) -> str | None:
    """Return why the questions of a source cannot be had here, or None where they can."""
    hub = logging.getLogger("huggingface_hub")
    level = hub.level
    hub.setLevel(logging.ERROR)  # it warns of each of its tries
    try:
        load_questions(replace(run.config.questions, source=source), run.config.seed)
        return None
    except (DataError, FetchError) as error:
        return str(error)
    finally:
        hub.setLevel(level)


def changes(trials: Sequence[Trial]) -> list[Difference]:
    """Return every trial's change from its base model, benchmark by benchmark."""
    return [
        _difference(trial.name, trial, benchmark, trial.result(benchmark, base=True))
        for benchmark in trials[0].run.config.evaluation.benchmarks
        for trial in trials
    ]


def contrasts(trials: Sequence[Trial]) -> list[Difference]:
    """Return how the last model of every other trial differs from that of the first, item by item.

    Raises:
        UsageError: two trials were measured on different items, as those of different seeds are.
    """
    first, *others = trials
    return [
        _difference(f"{other.name} against {first.name}", other, benchmark, first.result(benchmark))
        for benchmark in first.run.config.evaluation.benchmarks
        for other in others
    ]


def _difference(name: str, trial: Trial, benchmark: str, before: Mapping[str, Any]) -> Difference:
    """Compare a trial's last model with ``before``: in MC2 (MC1 moves only with flips) or acc."""
    config = trial.run.config
    metric = next(m for m in ("mc2", "acc", *before["metrics"]) if m in before["metrics"])
    resampling = {"bootstrap": config.evaluation.bootstrap, "seed": config.seed}
    found = compare(before, trial.result(benchmark), **resampling)
    return f"{name}: {benchmark} {metric}", found["metrics"][metric]


def verdicts(rows: Sequence[Difference]) -> list[tuple[Any, ...]]:
    """Return differences as table rows: name, items, points with interval, smallest, verdict."""
    table = []
    for name, found in rows:
        low, high = found["ci95"] or (0.0, 0.0)
        shown = with_interval(found["value"], found["ci95"], "+.1f", scale=100)
        least = (size := found["smallest_detectable"]) and f"{100 * size:.1f}"
        verdict = "cannot tell" if low <= 0 <= high else "higher" if low > 0 else "LOWER"
        if not found["gained"] + found["lost"]:
            verdict = "no item moved"
        table.append((name, found["n"], shown, least or "unknown", verdict))
    return table
