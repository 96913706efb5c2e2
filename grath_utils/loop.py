"""The gradual loop over a run directory: write pairs, train, write better pairs, train again.

Each step is a *stage* with one file or folder that says it is done. A stage that is done is left
alone, so that every call can be repeated, and an interrupted run is continued by starting it again.
Notebooks and command line call the same stages.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from grath_utils.artifacts import read_json, read_jsonl, write_jsonl
from grath_utils.benchmarks import BENCHMARKS
from grath_utils.config import Config, ModelConfig
from grath_utils.dpo import model_after, train_round
from grath_utils.errors import ConfigError, RunError, did_you_mean
from grath_utils.evaluation import evaluate
from grath_utils.models import Policy, base_weights_fingerprint, resolve
from grath_utils.pairs import Pair, generate_pairs, read_pairs, refine_pairs
from grath_utils.questions import Question, load_questions, split_held_out
from grath_utils.runs import Run, environment_facts, lock_run, open_run

BASE = "base"


def model_label(iteration: int | None) -> str:
    """Return the name of a model in ``evaluation/``: ``base``, or ``iter_0`` after round 0."""
    return BASE if iteration is None else f"iter_{iteration}"


# --- the run -------------------------------------------------------------------------------------


def start_run(path: str | Path, config: Config) -> Run:
    """Open a run directory for a configuration, making it and its questions if need be.

    Raises:
        ConfigError: an unknown benchmark, or the directory belongs to another configuration,
            other questions or another model.
    """
    for name in config.evaluation.benchmarks:
        if name not in BENCHMARKS:
            raise ConfigError(
                f'"evaluation.benchmarks" names "{name}"{did_you_mean(name, BENCHMARKS)}'
            )
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
    if run.pairs(iteration).exists():
        return
    with lock_run(run):
        policy = load_model(run, iteration - 1 if iteration else None)
        common = {
            "seed": run.config.seed,
            "out": run.pairs(iteration),
            "rejects": run.rejects(iteration),
            "progress": progress,
            "skip_long": run.config.questions.skip_bad,
        }
        questions = run_questions(run)
        if iteration == 0:
            generate_pairs(policy, questions, run.config.pairs, **common)
        else:
            previous = read_pairs(run.pairs(iteration - 1))
            refine_pairs(
                policy, questions, previous, run.config.pairs, iteration=iteration, **common
            )


def train_iteration(run: Run, iteration: int, *, progress: bool = True) -> None:
    """Train one DPO round on the iteration's pairs; leaves ``adapter/`` and the log."""
    if run.adapter(iteration).is_dir():
        return
    with lock_run(run):
        pairs, held_out = run_pairs(run, iteration)
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


def evaluate_model(
    run: Run, iteration: int | None, benchmark: str, *, progress: bool = True
) -> dict[str, Any]:
    """Return a model's result on a benchmark, computing it where it is not there yet."""
    out = run.evaluation(model_label(iteration), benchmark)
    if out.exists():
        return read_json(out)
    settings = run.config.evaluation
    with lock_run(run):
        return evaluate(
            load_model(run, iteration),
            benchmark,
            limit=settings.limit,
            seed=run.config.seed,
            batch_tokens=settings.batch_tokens,
            bootstrap=settings.bootstrap,
            out=out,
            progress=progress,
        )


# --- the plan ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stage:
    """One step of a run: what it does, what it leaves, and how to do it."""

    name: str
    output: Path
    work: Callable[[], Any]

    @property
    def done(self) -> bool:
        return self.output.exists()


def evaluated_iterations(config: Config) -> list[int | None]:
    """Return which models are evaluated: base, the last, and those between if configured."""
    last = config.loop.iterations - 1
    between = list(range(last)) if config.evaluation.every_iteration else []
    return [None, *between, last]


def stages(run: Run, *, progress: bool = True) -> list[Stage]:
    """Return all stages of a run in order."""
    plan = []
    for t in range(run.config.loop.iterations):
        plan.append(
            Stage(
                f"write pairs, iteration {t}",
                run.pairs(t),
                lambda t=t: make_pairs(run, t, progress=progress),
            )
        )
        plan.append(
            Stage(
                f"train, iteration {t}",
                run.adapter(t),
                lambda t=t: train_iteration(run, t, progress=progress),
            )
        )
    for t in evaluated_iterations(run.config):
        for name in run.config.evaluation.benchmarks:
            plan.append(
                Stage(
                    f"evaluate {model_label(t)} on {name}",
                    run.evaluation(model_label(t), name),
                    lambda t=t, name=name: evaluate_model(run, t, name, progress=progress),
                )
            )
    return plan


def workload(config: Config) -> dict[str, int]:
    """Return how much a whole run does, before anything is loaded but the questions.

    Raises:
        DataError: the questions cannot be read.
    """
    questions = len(load_questions(config.questions, config.seed).questions)
    pairs, rounds = config.pairs, config.loop.iterations
    each = 1 if pairs.mode == "paper" else 1 + 2 * pairs.candidates
    later = each if pairs.mode == "paper" else 1 + pairs.candidates  # the correct answer alone
    models = len(evaluated_iterations(config))
    return {
        "questions": questions,
        "completions to write, at most": questions * (each + later * (rounds - 1)),
        "optimiser steps": rounds * config.dpo.steps,
        "pairs seen in training": rounds * config.dpo.steps * config.dpo.batch_size,
        "evaluations": models * len(config.evaluation.benchmarks),
    }


def run_stages(run: Run, *, progress: bool = True, say: Callable[[str], None] = print) -> None:
    """Do all stages that are not done yet, in order, holding the run directory throughout."""
    with lock_run(run):
        plan = stages(run, progress=progress)
        for number, stage in enumerate(plan, start=1):
            if not stage.done:
                say(f"[{number}/{len(plan)}] {stage.name}")
                stage.work()


def results(run: Run) -> dict[str, dict[str, dict[str, Any]]]:
    """Return the finished evaluations as ``{benchmark: {model label: result}}``, base first."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for name in run.config.evaluation.benchmarks:
        for t in evaluated_iterations(run.config):
            path = run.evaluation(model_label(t), name)
            if path.exists():
                found.setdefault(name, {})[model_label(t)] = read_json(path)
    return found


def check_ready(run: Run, needed: Sequence[Path], notebook: str) -> None:
    """Raise an error that says what an earlier notebook should have left, and how to make it.

    Raises:
        RunError: something is missing.
    """
    missing = [str(path.relative_to(run.path)) for path in needed if not path.exists()]
    if missing:
        raise RunError(
            f"{run.path} lacks {', '.join(missing)}. Run the notebook {notebook} first, or "
            f"everything at once: python -m grath_utils run --profile {run.config.profile} "
            f"--run-dir {run.path}"
        )
