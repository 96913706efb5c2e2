"""Where a run stands, read at one point: what was measured, which round is kept, what is left."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from grath_utils import evaluation
from grath_utils.errors import DataError, UsageError
from grath_utils.files import MAKE_AGAIN, read_json, read_jsonl
from grath_utils.loop.choice import SIGNALS, Choice, choose_round
from grath_utils.loop.run_dir import BASE, Run, model_label
from grath_utils.pairs.generate import Pair, read_pairs
from grath_utils.pairs.questions import Question


def run_questions(run: Run, split: str | None = None) -> list[Question]:
    """Return the run's questions: all, or those of one split (``train``, ``held_out``)."""
    return [
        Question.from_row(row, where=str(run.questions))
        for row in read_jsonl(run.questions, {"split": str})
        if split in (None, row["split"])
    ]


def run_pairs(run: Run, iteration: int) -> tuple[list[Pair], list[Pair]]:
    """Return an iteration's pairs as (to train on, held out)."""
    pairs = read_pairs(run.pairs(iteration))
    ids = {q.id for q in run_questions(run, "train")}
    return [p for p in pairs if p.id in ids], [p for p in pairs if p.id not in ids]


@dataclass(frozen=True)
class RunState:
    """Where a run stands, as far as can be known now; each evaluation is read once, when asked for.

    What takes a run takes its state in its place, where that was read already.
    """

    run: Run
    base: dict[str, Any]
    """The signals of the base model (:func:`.choice.measure_signals`); empty before they exist."""
    rounds: tuple[dict[str, Any], ...]
    """The signals of the rounds that have been measured, in order."""
    choice: Choice | None
    """Which of these is kept, and whether to continue; None before the first."""
    planned: range
    """The rounds that the run has, or will have."""
    final: int
    """The round that is shown as the result: the chosen one, or else the last of the plan.

    It is the last where no round was fit to be kept (so that there is something to see; the report
    says so), and as long as not all rounds have been measured.
    """
    evaluated: tuple[int | None, ...]
    """Which models are evaluated: base (None), chosen, last; every round if so configured.

    Of an arm no base: it has the same as the run beside which it stands.
    """

    @cached_property
    def results(self) -> dict[str, dict[str, dict[str, Any]]]:
        """The finished evaluations as ``{benchmark: {model label: result}}``, base first.

        Raises:
            DataError: a file is not as it was written, or of other items than the first.
        """
        run, found = self.run, {}
        for name in run.config.evaluation.benchmarks:
            models: dict[str, dict[str, Any]] = {}
            for label in map(model_label, self.evaluated):
                if not (file := run.evaluation(label, name)).exists():
                    continue
                models[label] = read_json(file, evaluation.RESULT)
                try:
                    evaluation.check_comparable(next(iter(models.values())), models[label])
                except UsageError as error:
                    raise DataError(f"{file}: {error}{MAKE_AGAIN}") from error
            if models:
                found[name] = models
        return found

    @cached_property
    def gains(self) -> dict[str, dict[str, dict[str, Any]]]:
        """What the model has beyond each placebo: ``{labels: {benchmark: {metric: gain}}}``.

        It is paired, item by item, see :func:`.evaluation.compare` and
        :meth:`.run_dir.Run.placebos`.
        """
        label, found = model_label(self.final), {}
        for labels, placebo in self.run.placebos(self.final).items():
            found[labels] = {
                name: self._compare(read_json(file, evaluation.RESULT), models[label])
                for name, models in self.results.items()
                if label in models and (file := placebo.evaluation(label, name)).exists()
            }
        return found

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        """One row per benchmark and metric: base, chosen model, and the paired difference.

        Every number is taken from the evaluation files or computed from their items; the round was
        chosen without them.
        """
        labels, rows = (BASE, model_label(self.final)), []
        for benchmark, models in self.results.items():
            if models.keys() >= set(labels):
                before, after = (models[label] for label in labels)
                differences = self._compare(before, after)
                rows += [
                    {
                        "benchmark": benchmark,
                        "metric": metric,
                        "n": value["n"],
                        "before": value,
                        "after": after["metrics"][metric],
                        "difference": differences[metric],
                    }
                    for metric, value in before["metrics"].items()
                ]
        return rows

    def _compare(self, before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
        config = self.run.config
        how = {"seed": config.seed, "bootstrap": config.evaluation.bootstrap}
        return evaluation.compare(before, after, **how)["metrics"]


def run_state(run: Run | RunState) -> RunState:
    """Read where a run stands; a state is returned as it is.

    Raises:
        DataError: the signals are not as this program writes them.
    """
    if isinstance(run, RunState):
        return run
    most = run.config.loop.iterations
    paths = [run.signals(model_label(t)) for t in (None, *range(most))]
    there = itertools.takewhile(Path.exists, paths)
    base, *rounds = [read_json(path, SIGNALS) for path in there] or [{}]
    choice = _choose(run, base, rounds) if rounds else None
    planned = range(len(rounds) if choice and choice.stop else most)
    final = last = planned[-1]
    if choice and choice.iteration is not None and len(rounds) == len(planned):
        final = choice.iteration
    shown = planned if run.config.evaluation.every_iteration else sorted({final, last})
    evaluated = (*shown,) if run.main else (None, *shown)
    return RunState(run, base, tuple(rounds), choice, planned, final, evaluated)


def _choose(run: Run, base: dict[str, Any], rounds: list[dict[str, Any]]) -> Choice:
    """Choose by the signals, or take the last round if ``loop.keep=last`` asks for it."""
    settings, n = run.config.loop, len(rounds)
    choice = choose_round(base, rounds, max_kl=settings.max_kl, seed=run.config.seed)
    if settings.keep == "last":
        choice = replace(choice, iteration=n - 1, why=f"round {n}: the last (loop.keep=last)")
    if not settings.early_stop:
        return replace(choice, stop=None)
    if run.collapsed(n).exists():
        reason = read_json(run.collapsed(n), {"reason": str})["reason"]
        choice = replace(choice, stop=f"round {n + 1} collapsed: {reason}")
    return choice


def choice_line(run: Run | RunState) -> str:
    """Return which round was chosen and why, and why the loop stopped early if it did."""
    state = run_state(run)
    found = state.choice
    if found is None:
        return "no round has been measured yet"
    line = f"chosen without a look at any benchmark: {found.why}"
    early = len(state.planned) < state.run.config.loop.iterations
    return line + (f"; stopped early, {found.stop}" if early else "")


def results(run: Run) -> dict[str, dict[str, dict[str, Any]]]:
    """Return the finished evaluations of a run, see :attr:`RunState.results`."""
    return run_state(run).results
