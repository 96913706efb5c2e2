"""What a run consists of: its stages in order, each with the file that says it is done."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grath_utils.config import Config
from grath_utils.evaluation.benchmarks import check_benchmarks
from grath_utils.loop.run_dir import Run, model_label
from grath_utils.loop.state import run_state
from grath_utils.pairs.modes import check_pairs_config


@dataclass(frozen=True)
class Stage:
    """One step of a run: what it does, what it leaves, and how to do it."""

    id: str
    """``pairs_0``, ``train_0``, ``measure_base``, ``evaluate_iter_0_probe``, ..."""
    title: str
    iteration: int | None
    """None: about the base model."""
    output: Path
    work: Callable[[], Any]
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
    check_benchmarks(config.evaluation.benchmarks)
    check_pairs_config(config.pairs)
    if config.dpo.report_to != ("none",):
        from grath_utils.dpo.tracking import check_trackers  # it loads torch

        check_trackers(config.dpo.report_to)


def plan_stages(run: Run, *, progress: bool = True) -> list[Stage]:
    """Return all stages of a run in order, as far as they can be known now.

    A round that stops the loop takes the later ones off the plan.
    """
    state, plan = run_state(run), []

    def work(stage: str, *which: int | str | None) -> Callable[[], Any]:
        def do() -> Any:
            from grath_utils.loop import stages  # what computes: a plan is shown without it

            return getattr(stages, stage)(run, *which, progress=progress)

        return do

    def add_measuring(t: int | None, title: str) -> None:
        label = model_label(t)
        if run.config.loop.signals:
            plan.append(Stage(f"measure_{label}", title, t, run.signals(label), work("measure", t)))

    for t in state.planned:
        title, beside = f"write pairs, iteration {t}", (run.rejects(t),)
        plan.append(Stage(f"pairs_{t}", title, t, run.pairs(t), work("make_pairs", t), beside))
        if t == 0:  # as soon as there are pairs
            add_measuring(None, "measure base on held-out pairs")
        title, beside = f"train, iteration {t}", (run.training_log(t),)
        do = work("train_iteration", t)
        plan.append(Stage(f"train_{t}", title, t, run.adapter(t), do, beside))
        add_measuring(t, f"measure on held-out pairs, iteration {t}")
    for t in state.evaluated:
        label = model_label(t)
        for name in run.config.evaluation.benchmarks:
            title, out = f"evaluate {label} on {name}", run.evaluation(label, name)
            do = work("evaluate_model", t, name)
            plan.append(Stage(f"evaluate_{label}_{name}", title, t, out, do))
    return plan
