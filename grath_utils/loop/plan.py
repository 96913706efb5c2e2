"""What a run consists of: its stages in order, each with the file that says it is done."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from grath_utils.config import Config
from grath_utils.evaluation.benchmarks import find_benchmark
from grath_utils.loop.run_dir import BASE, Run, model_label
from grath_utils.loop.state import RunState, run_state
from grath_utils.pairs.modes import check_pairs_config


@dataclass(frozen=True)
class Stage:
    """One step of a run: what it does, what it leaves, and how to do it."""

    id: str
    """``pairs_0``, ``train_0``, ``evaluate_iter_0_probe``, ``train_0@random`` of a placebo, ..."""
    title: str
    """For people, who count rounds from 1; ids and files count from 0."""
    iteration: int | None
    """None: about the base model."""
    output: Path
    work: Callable[[], Any]
    run: Run
    """Whose it is: the run's own, or a placebo's."""
    beside: tuple[Path, ...] = ()
    """What else it leaves; written before ``output``, whose presence says that all is there."""

    @property
    def done(self) -> bool:
        return self.output.exists()


def check_settings(config: Config) -> None:
    """Check the names in a configuration that stand for something outside it.

    Raises:
        ConfigError: an unknown benchmark or tracker, or a way of writing pairs that cannot be.
    """
    for name in config.evaluation.benchmarks:
        find_benchmark(name, '"evaluation.benchmarks": ')
    check_pairs_config(config.pairs)
    if config.dpo.report_to != ("none",):
        from grath_utils.dpo.tracking import check_trackers  # it loads torch

        check_trackers(config.dpo.report_to)


def plan_stages(run: Run | RunState, *, progress: bool = True) -> list[Stage]:
    """Return all stages of a run in order, as far as they can be known now.

    A round that stops the loop takes the later ones off the plan.
    """
    state, plan = run_state(run), []
    run = state.run

    def add(id: str, title: str, t: int | None, output: Path, does: str, *beside: Path) -> None:
        def work() -> Any:
            from grath_utils.loop import stages  # what computes: a plan is shown without it

            return getattr(stages, does)(run, t, progress=progress)

        plan.append(Stage(id, title, t, output, work, run, beside))

    def add_measuring(t: int | None, title: str) -> None:
        label = model_label(t)
        if run.config.loop.signals:
            add(f"measure_{label}", title, t, run.signals(label), "measure")

    for t in state.planned:
        if run.main:
            title, made = f"relabel pairs, round {t + 1}", (run.record, run.questions)
            add(f"relabel_{t}", title, t, run.pairs(t), "make_pairs", *made)
        else:
            title = f"write pairs, round {t + 1}"
            add(f"pairs_{t}", title, t, run.pairs(t), "make_pairs", run.rejects(t))
        if t == 0:  # as soon as there are pairs
            add_measuring(None, "measure base on held-out pairs")
        title, log = f"train, round {t + 1}", run.training_log(t)
        add(f"train_{t}", title, t, run.adapter(t), "train_iteration", log)
        add_measuring(t, f"measure on held-out pairs after round {t + 1}")
    for t in state.evaluated:
        label = model_label(t)
        what = BASE if t is None else f"after round {t + 1}"
        for name in run.config.evaluation.benchmarks:
            title, out = f"evaluate {what} on {name}", run.evaluation(label, name)
            add(f"evaluate_{label}_{name}", title, t, out, "evaluate_model")
    for labels, placebo in run.placebos(state.final).items():
        name = "placebo" if labels == "random" else f"placebo, {labels}"
        plan += [
            replace(stage, id=f"{stage.id}@{labels}", title=f"{name}: {stage.title}")
            for stage in plan_stages(placebo, progress=progress)
        ]
    return plan
