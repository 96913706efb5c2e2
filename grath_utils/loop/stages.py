"""The gradual loop over a run directory: write pairs, train, write better pairs, train again.

Each step is a *stage* with one file or folder that says it is done. A stage that is done is left
alone, so that every call can be repeated, and an interrupted run is continued by starting it again.
Notebooks and command line call the same stages. After each round the model is measured on held-out
pairs and free answers, and that alone decides when to stop and which round to keep.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from grath_utils.config import Config, ModelConfig
from grath_utils.dpo.adapters import model_after
from grath_utils.dpo.round import train_round
from grath_utils.dpo.tracking import check_trackers, write_scalars
from grath_utils.engine import processes
from grath_utils.engine.models import Policy, base_weights_fingerprint, resolve
from grath_utils.errors import CollapseError, ConfigError, DataError, RunError, did_you_mean
from grath_utils.evaluation.benchmarks import BENCHMARKS
from grath_utils.evaluation.measure import evaluate
from grath_utils.files import read_json, read_jsonl, write_json, write_jsonl
from grath_utils.loop import choice as selection
from grath_utils.loop.run_dir import Run, environment_facts, lock_run, open_run, record_made
from grath_utils.pairs.generate import Pair, generate_pairs, read_pairs
from grath_utils.pairs.modes import check_pairs_config
from grath_utils.pairs.questions import Question, load_questions, split_held_out

BASE = "base"


def model_label(iteration: int | None) -> str:
    """Return the name of a model in ``evaluation/``: ``base``, or ``iter_0`` after round 0."""
    return BASE if iteration is None else f"iter_{iteration}"


# --- the run -------------------------------------------------------------------------------------


def start_run(path: str | Path, config: Config) -> Run:
    """Open a run directory for a configuration, making it and its questions if need be.

    Raises:
        ConfigError: an unknown benchmark or pair mode, or the directory belongs to another
            configuration, other questions or another model.
    """
    return processes.on_main(lambda: _start_run(path, config))


def _start_run(path: str | Path, config: Config) -> Run:
    for name in config.evaluation.benchmarks:
        if name not in BENCHMARKS:
            raise ConfigError(
                f'"evaluation.benchmarks" names "{name}"{did_you_mean(name, BENCHMARKS)}'
            )
    check_pairs_config(config.pairs)
    check_trackers(config.dpo.report_to)
    model = resolve(config.model)
    questions = load_questions(config.questions, config.seed)
    facts = {
        **environment_facts(),
        "resolved": {"device": model.device, "dtype": model.dtype},
        "model": {"name": model.name, "weights": base_weights_fingerprint(model)},
        "questions": {
            "source": questions.source,
            "n": len(questions.questions),
            "skipped": dict(questions.skipped),
            "fingerprint": questions.fingerprint,
        },
    }
    run = open_run(path, config, facts)
    _check_unchanged(run, facts)
    if not run.questions.exists():
        train, held_out = split_held_out(
            questions.questions, config.questions.held_out, config.seed
        )
        rows = [{"split": "train", **q.to_row()} for q in train]
        rows += [{"split": "held_out", **q.to_row()} for q in held_out]
        with lock_run(run):
            write_jsonl(run.questions, rows)
            record_made(run, run.questions)
    return run


def _check_unchanged(run: Run, facts: dict[str, Any]) -> None:
    """Refuse to go on with other weights, other questions or another compute type."""
    recorded = run.info()
    for section, key, what in (
        ("model", "weights", "the base model's weights have"),
        ("questions", "fingerprint", "the questions have"),
        ("resolved", "dtype", "the compute type (model.dtype=auto) has"),
    ):
        then, now = recorded[section][key], facts[section][key]
        if then != now:
            raise ConfigError(
                f"{what} changed since {run.path} was made ({then} then, {now} now); "
                "results would be mixed. Restore them, or use another run directory"
            )


def run_questions(run: Run, split: str | None = None) -> list[Question]:
    """Return the run's questions: all, or those of one split (``train``, ``held_out``)."""
    return [
        Question.from_row(row, where=str(run.questions))
        for row in read_jsonl(run.questions)
        if split in (None, row["split"])
    ]


def run_pairs(run: Run, iteration: int) -> tuple[list[Pair], list[Pair]]:
    """Return an iteration's pairs as (to train on, held out)."""
    train_ids = {q.id for q in run_questions(run, "train")}
    pairs = read_pairs(run.pairs(iteration))
    train = [pair for pair in pairs if pair.id in train_ids]
    return train, [pair for pair in pairs if pair.id not in train_ids]


def load_model(run: Run, iteration: int | None) -> Policy:
    """Load the run's model after a round (None: before the first), with its adapter.

    Raises:
        RunError: that round has not been trained.
    """
    if iteration is not None and not run.adapter(iteration).is_dir():
        raise RunError(f"{run.path}: round {iteration} has not been trained yet")
    adapter = None if iteration is None else run.adapter(iteration)
    policy = model_after(_base(run), adapter).load()
    return replace(policy, name=f"{run.path.name}@{BASE if iteration is None else iteration}")


def _base(run: Run) -> ModelConfig:
    return resolve(run.config.model)


# --- stages --------------------------------------------------------------------------------------


def make_pairs(run: Run, iteration: int, *, progress: bool = True) -> None:
    """Write the pairs of an iteration with the model that it starts from.

    Iteration 0 writes both answers; later ones write the correct answer anew and keep the first
    incorrect one (RECIPE: gradual refinement). Held-out questions get pairs too, to measure on.
    """
    if processes.from_main(run.pairs(iteration).exists()):
        return
    with lock_run(run):
        policy = load_model(run, iteration - 1 if iteration else None)
        generate_pairs(
            policy,
            run_questions(run),
            run.config.pairs,
            seed=run.config.seed,
            out=run.pairs(iteration),
            rejects=run.rejects(iteration),
            iteration=iteration,
            previous=read_pairs(run.pairs(iteration - 1)) if iteration else (),
            progress=progress,
            skip_long=run.config.questions.skip_bad,
        )
        _record(run, iteration, run.pairs(iteration), run.rejects(iteration))


def train_iteration(run: Run, iteration: int, *, progress: bool = True) -> None:
    """Train one DPO round on the iteration's pairs; leaves ``adapter/`` and the log.

    A later round that collapses leaves ``collapsed.json`` with the reason instead, and the loop
    ends before it (unless ``loop.early_stop`` is off).

    Raises:
        CollapseError: the first round has collapsed: there is nothing to fall back on.
    """
    if processes.from_main(round_is_over(run, iteration)):
        return
    with lock_run(run):
        pairs, held_out = run_pairs(run, iteration)
        try:
            train_round(
                _base(run),
                pairs,
                held_out,
                run.iteration(iteration),
                dpo=run.config.dpo,
                lora=run.config.lora,
                seed=run.config.seed,
                previous=run.adapter(iteration - 1) if iteration else None,
                progress=progress,
            )
        except CollapseError as error:
            if not (iteration and run.config.loop.early_stop):
                raise
            reason = {"reason": str(error)}
            processes.on_main(lambda: write_json(run.collapsed(iteration), reason))
            record_made(run, run.collapsed(iteration))
        else:
            _record(run, iteration, run.adapter(iteration), run.training_log(iteration))


def round_is_over(run: Run, iteration: int) -> bool:
    """Tell whether a round has been trained, or has been given up as collapsed."""
    return run.adapter(iteration).is_dir() or run.collapsed(iteration).exists()


def measure(run: Run, iteration: int | None, *, progress: bool = True) -> dict[str, Any]:
    """Return the signals by which a round is chosen, measuring them where that was not done.

    The base model is measured first: every signal is a change from it. There is little to measure,
    so one of several processes does it.
    """
    return processes.on_main(lambda: _measure(run, iteration, progress=progress))


def _measure(run: Run, iteration: int | None, *, progress: bool) -> dict[str, Any]:
    out = run.signals(model_label(iteration))
    if out.exists():
        return read_json(out)
    with lock_run(run):
        if iteration is not None:
            _measure(run, None, progress=progress)
        base = load_model(run, None)
        signals = selection.measure_signals(
            base if iteration is None else load_model(run, iteration),
            base,
            run_pairs(run, 0)[1],
            run_questions(run, "held_out"),
            run.config.dpo,
            progress=progress,
        )
        write_json(out, signals)
        record_made(run, out)
    return signals


def evaluate_model(
    run: Run, iteration: int | None, benchmark: str, *, progress: bool = True
) -> dict[str, Any]:
    """Return a model's result on a benchmark, computing it where it is not there yet."""
    out = run.evaluation(model_label(iteration), benchmark)
    if processes.from_main(out.exists()):
        return read_json(out)
    settings = run.config.evaluation
    with lock_run(run):
        result = evaluate(
            load_model(run, iteration),
            benchmark,
            limit=settings.limit,
            seed=run.config.seed,
            batch_tokens=settings.batch_tokens,
            bootstrap=settings.bootstrap,
            out=out,
            progress=progress,
        )
        record_made(run, out)
        write_scalars(
            run.config.dpo.report_to,
            run.path / "evaluation" / "tensorboard",
            {f"{benchmark}/{name}": metric["value"] for name, metric in result["metrics"].items()},
            step=0 if iteration is None else iteration + 1,  # rounds of training behind it
        )
    return result


def _record(run: Run, iteration: int, *outputs: Path) -> None:
    """Note what a stage of an iteration left, and that nothing made from an older one is left.

    Raises:
        RunError: an output was made a second time and is another; what no longer fits is named.
    """
    changed = [path for path in outputs if record_made(run, path)]
    plan = [stage for stage in plan_stages(run) if stage.iteration is not None]
    places = [number for number, stage in enumerate(plan) if stage.output in changed]
    later = plan[min(places) + 1 :] if places else []
    left = [s.output for s in later if s.iteration >= iteration and s.done]
    if left:
        names = ", ".join(str(path.relative_to(run.path)) for path in left)
        raise RunError(
            f"{changed[0]} was made again and is not the same as before, so what was made from "
            f"the old one no longer fits. Delete {names} in {run.path}, and run the same again"
        )


# --- the plan ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stage:
    """One step of a run: what it does, what it leaves, and how to do it."""

    name: str
    iteration: int | None
    """None: about the base model."""
    output: Path
    work: Callable[[], Any]
    beside: tuple[Path, ...] = ()
    """What else it leaves; written before ``output``, whose presence says that all is there."""

    @property
    def done(self) -> bool:
        return self.output.exists()


def round_choice(run: Run) -> selection.Choice | None:
    """Return which of the measured rounds is kept and whether to go on; None before the first.

    With ``loop.keep=last`` that is the last one, whatever the signals say; they are still there to
    be read.
    """
    settings = run.config.loop
    base, measured = measured_rounds(run)
    if not measured:
        return None
    try:
        chosen = selection.choose(base, measured, max_kl=settings.max_kl, seed=run.config.seed)
    except (KeyError, TypeError, IndexError) as error:
        raise DataError(
            f"{run.signals(BASE).parent}: the signals are not as this program writes them; delete "
            "the folder, and they are measured again"
        ) from error
    if settings.keep == "last":
        last = len(measured) - 1
        chosen = replace(chosen, iteration=last, why=f"round {last + 1}: the last (loop.keep=last)")
    collapsed = run.collapsed(len(measured))
    if collapsed.exists():
        stop = f"round {len(measured) + 1} collapsed: {read_json(collapsed)['reason']}"
        chosen = replace(chosen, stop=stop)
    return chosen if settings.early_stop else replace(chosen, stop=None)


def measured_rounds(run: Run) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the signals of the base model and of the rounds so far; empty where there are none."""
    if not run.signals(BASE).exists():
        return {}, []
    rounds = map(run.signals, map(model_label, range(run.config.loop.iterations)))
    there = itertools.takewhile(Path.exists, rounds)
    return read_json(run.signals(BASE)), [read_json(path) for path in there]


def planned_iterations(run: Run) -> list[int]:
    """Return the rounds that a run has, or will have as far as can be known now."""
    found = round_choice(run)
    stopped = found is not None and found.stop is not None
    return list(range(len(measured_rounds(run)[1]) if stopped else run.config.loop.iterations))


def final_iteration(run: Run) -> int:
    """Return the round that is shown as the run's result: the chosen one.

    Where no round was fit to be kept that is the last one, so that there is something to see; the
    report says so. Before the rounds are measured: the last of the plan.
    """
    planned = planned_iterations(run)
    found = round_choice(run)
    whole = found is not None and run.signals(model_label(planned[-1])).exists()
    return found.iteration if whole and found.iteration is not None else planned[-1]


def evaluated_iterations(run: Run) -> list[int | None]:
    """Return which models are evaluated: base, chosen, last, and all rounds if so configured."""
    planned = planned_iterations(run)
    shown = (
        planned if run.config.evaluation.every_iteration else {final_iteration(run), planned[-1]}
    )
    return [None, *sorted(shown)]


def plan_stages(run: Run, *, progress: bool = True) -> list[Stage]:
    """Return all stages of a run in order, as far as they can be known now.

    A round that stops the loop takes the later ones off the plan.
    """
    plan: list[Stage] = []
    for t in planned_iterations(run):
        plan += [
            Stage(
                f"write pairs, iteration {t}",
                t,
                run.pairs(t),
                lambda t=t: make_pairs(run, t, progress=progress),
                (run.rejects(t),),
            ),
            Stage(
                f"train, iteration {t}",
                t,
                run.adapter(t),
                lambda t=t: train_iteration(run, t, progress=progress),
                (run.training_log(t),),
            ),
            Stage(
                f"measure on held-out pairs, iteration {t}",
                t,
                run.signals(model_label(t)),
                lambda t=t: measure(run, t, progress=progress),
            ),
        ]
    measured = Stage(
        "measure base on held-out pairs",
        None,
        run.signals(BASE),
        lambda: measure(run, None, progress=progress),
    )
    plan.insert(1, measured)  # as soon as there are pairs
    if not run.config.loop.signals:
        plan = [stage for stage in plan if stage.output.parent != run.signals(BASE).parent]
    for t in evaluated_iterations(run):
        for name in run.config.evaluation.benchmarks:
            plan.append(
                Stage(
                    f"evaluate {model_label(t)} on {name}",
                    t,
                    run.evaluation(model_label(t), name),
                    lambda t=t, name=name: evaluate_model(run, t, name, progress=progress),
                )
            )
    return plan


def run_stages(run: Run, *, progress: bool = True, say: Callable[[str], None] = print) -> None:
    """Do all stages that are not done yet, in order, holding the run directory throughout."""
    with lock_run(run):
        processes.on_main(lambda: _note_done(run))
        # The plan is asked for anew after each stage: a round may have ended the loop.
        while True:
            plan = plan_stages(run, progress=progress)
            number = processes.from_main(_first_to_do(plan))
            if number is None:
                return
            say(f"[{number + 1}/{len(plan)}] {plan[number].name}")
            plan[number].work()


def _note_done(run: Run) -> None:
    """Note what is there: a process may have been killed just before it noted its work."""
    for stage in plan_stages(run):
        if stage.done:
            for path in filter(Path.exists, (*stage.beside, stage.output)):
                record_made(run, path)


def _first_to_do(plan: Sequence[Stage]) -> int | None:
    return next((number for number, stage in enumerate(plan) if not stage.done), None)


def check_ready(run: Run, needed: Sequence[Path], notebook: str) -> None:
    """Raise an error that says what an earlier notebook should have left, and how to make it.

    Raises:
        RunError: something is missing.
    """
    missing = [str(path.relative_to(run.path)) for path in needed if not path.exists()]
    if missing:
        same = f"--profile {run.config.profile} --run-dir {run.path}"
        raise RunError(
            f"{run.path} lacks {', '.join(missing)}. Run the notebook {notebook} first; or let it "
            f"be made: python -m grath_utils checkpoint --at {int(notebook[:2]) + 1:02} {same}; or "
            f"everything at once: python -m grath_utils run {same}"
        )
