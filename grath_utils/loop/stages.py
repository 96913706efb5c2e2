"""The gradual loop over a run directory: write pairs, train, write better pairs, train again.

Each step is a *stage* with one file or folder that says it is done. A stage that is done is left
alone: every call can be repeated, and an interrupted run is continued by starting it again. After
each round the model is measured on held-out pairs and free answers, and that alone decides when to
stop and which round to keep.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from grath_utils.config import Config
from grath_utils.dpo.adapters import model_after
from grath_utils.dpo.round import train_round
from grath_utils.dpo.tracking import write_scalars
from grath_utils.engine import processes
from grath_utils.engine.models import (
    Policy,
    base_weights_fingerprint,
    part_to_quantize,
    pinned,
    resolve,
)
from grath_utils.errors import CollapseError, ConfigError, RunError
from grath_utils.evaluation.measure import RESULT, evaluate
from grath_utils.files import read_json, read_jsonl, sha256_file, write_json, write_jsonl
from grath_utils.loop.choice import SIGNALS, measure_signals
from grath_utils.loop.plan import check_settings, plan_stages
from grath_utils.loop.run_dir import (
    BASE,
    Run,
    check_run_dir,
    environment_facts,
    load_run,
    lock_run,
    model_label,
    open_run,
    record_made,
)
from grath_utils.loop.state import run_pairs, run_questions
from grath_utils.pairs.generate import generate_pairs, read_pairs
from grath_utils.pairs.labels import relabelled
from grath_utils.pairs.questions import load_questions, split_held_out


def start_run(path: str | Path, config: Config) -> Run:
    """Open a run directory for a configuration, making it and its questions if need be.

    Raises:
        ConfigError: an unknown benchmark or pair mode, or the directory belongs to another
            configuration, other questions or another model.
    """
    return processes.on_main(lambda: _start_run(path, config))


def _start_run(path: str | Path, config: Config) -> Run:
    begun = check_run_dir(path, config)
    check_settings(config)
    model = pinned(resolve(begun.base_model()))
    loaded = load_questions(config.questions, config.seed)
    facts = {
        **environment_facts(),
        "resolved": {"device": model.device, "dtype": model.dtype},
        "model": {
            "name": model.name,
            "weights": base_weights_fingerprint(model),
            **({"commit": model.revision} if model.revision else {}),
        },
        "questions": {
            "source": loaded.source,
            "n": len(loaded.questions),
            "skipped": dict(loaded.skipped),
            "fingerprint": loaded.fingerprint,
        },
    }
    if prompt := config.pairs.prompt_file:
        facts["prompt"] = {"fingerprint": sha256_file(Path(prompt))}
    if part := part_to_quantize(model):
        facts["quantized"] = asdict(part)
    run = open_run(path, config, facts)
    recorded = run.info()
    for section, key, what in (
        ("model", "weights", "the base model's weights have"),
        ("questions", "fingerprint", "the questions have"),
        ("resolved", "dtype", "the compute type (model.dtype=auto) has"),
        ("prompt", "fingerprint", "the file of pairs.prompt_file has"),
    ):
        then, now = (made.get(section, {}).get(key) for made in (recorded, facts))
        if then != now:
            raise ConfigError(
                f"{what} changed since {run.path} was made ({then} then, {now} now); "
                "results would be mixed. Restore them, or use another run directory"
            )
    if not run.questions.exists():
        splits = split_held_out(loaded.questions, config.questions.held_out, config.seed)
        named = zip(("train", "held_out"), splits, strict=True)
        rows = [{"split": name, **q.to_row()} for name, split in named for q in split]
        with lock_run(run):
            write_jsonl(run.questions, rows)
            record_made(run, run.questions)
    return run


def load_model(run: Run, iteration: int | None) -> Policy:
    """Load the run's model after a round (None: before the first), with its adapter.

    Raises:
        RunError: that round has not been trained.
    """
    adapter = None if iteration is None else run.adapter(iteration)
    if adapter and not adapter.is_dir():
        raise RunError(f"{run.path}: round {iteration + 1} has not been trained yet")
    policy = model_after(resolve(run.base_model()), adapter).load()
    return replace(policy, name=f"{run.path.name}@{BASE if iteration is None else iteration}")


def make_pairs(run: Run, iteration: int, *, progress: bool = True) -> None:
    """Write the pairs of an iteration with the model that it starts from.

    Iteration 0 writes both answers; later ones write the correct answer again and keep the first
    incorrect one (gradual refinement). Held-out questions get pairs too, to measure on. An arm
    takes the pairs of the run beside which it stands, with other labels.
    """
    if processes.from_main(run.pairs(iteration).exists()):
        return
    if run.main:
        processes.on_main(lambda: _relabel(run, load_run(run.main), iteration))
        return
    before = iteration - 1 if run.config.pairs.fallback == "newest" else 0
    with lock_run(run):
        generate_pairs(
            load_model(run, iteration - 1 if iteration else None),
            run_questions(run),
            run.config.pairs,
            seed=run.config.seed,
            out=run.pairs(iteration),
            rejects=run.rejects(iteration),
            iteration=iteration,
            previous=read_pairs(run.pairs(before)) if iteration else (),
            progress=progress,
            skip_long=run.config.questions.skip_bad,
        )
        _record(run, iteration, run.pairs(iteration), run.rejects(iteration))


def _relabel(arm: Run, main: Run, iteration: int) -> None:
    """Begin an arm with what its main run began with, and take over an iteration's pairs."""
    own = ("schema_version", "created", "seed", "config")
    with lock_run(arm):
        facts = {key: value for key, value in main.info().items() if key not in own}
        open_run(arm.path, arm.config, facts)
        if not arm.questions.exists():
            write_jsonl(arm.questions, read_jsonl(main.questions))
            record_made(arm, arm.questions)
        written = read_pairs(main.pairs(iteration))
        how = arm.config.pairs
        pairs = relabelled(written, how.labels, how.flipped, arm.config.seed)
        write_jsonl(arm.pairs(iteration), (pair.to_row() for pair in pairs))
        _record(arm, iteration, arm.pairs(iteration))


def train_iteration(run: Run, iteration: int, *, progress: bool = True) -> None:
    """Train one DPO round on the iteration's pairs; leaves ``adapter/`` and the log.

    A later round that collapses leaves ``collapsed.json`` with the reason instead, and the loop
    ends before it (unless ``loop.early_stop`` is off).

    Raises:
        CollapseError: the first round has collapsed: there is nothing to fall back on.
    """
    adapter, collapsed = run.adapter(iteration), run.collapsed(iteration)
    if processes.from_main(adapter.is_dir() or collapsed.exists()):
        return
    with lock_run(run):
        try:
            train_round(
                resolve(run.base_model()),
                *run_pairs(run, iteration),
                run.iteration(iteration),
                dpo=run.config.round_dpo(iteration),
                lora=run.config.lora,
                seed=run.config.seed,
                previous=run.adapter(iteration - 1) if iteration else None,
                progress=progress,
            )
        except CollapseError as error:
            if not (iteration and run.config.loop.early_stop):
                raise
            reason = {"reason": str(error)}
            processes.on_main(lambda: write_json(collapsed, reason))
            record_made(run, collapsed)
        else:
            _record(run, iteration, adapter, run.training_log(iteration))


def measure(run: Run, iteration: int | None, *, progress: bool = True) -> dict[str, Any]:
    """Return the signals by which a round is chosen, measuring them where that was not done.

    The base model is measured first: every signal is a change from it. There is little to measure,
    so one of several processes does it.
    """
    return processes.on_main(lambda: _measure(run, iteration, progress))


def _measure(run: Run, iteration: int | None, progress: bool) -> dict[str, Any]:
    out = run.signals(model_label(iteration))
    if out.exists():
        return read_json(out, SIGNALS)
    with lock_run(run):
        if iteration is not None:
            _measure(run, None, progress)
        policy = load_model(run, iteration)
        signals = measure_signals(
            policy,
            run_pairs(run, 0)[1],
            run_questions(run, "held_out"),
            run.config.dpo,
            base=load_model(run, None) if policy.folded else None,
            progress=progress,
        )
        write_json(out, signals)
        record_made(run, out)
    return signals


def evaluate_model(
    run: Run, iteration: int | None, *, progress: bool = True
) -> dict[str, dict[str, Any]]:
    """Return a model's result on each of the run's benchmarks, computing those that are missing."""
    settings, results, policy = run.config.evaluation, {}, None
    for benchmark in settings.benchmarks:
        out = run.evaluation(model_label(iteration), benchmark)
        if processes.from_main(out.exists()):
            results[benchmark] = read_json(out, RESULT)
            continue
        policy = policy or load_model(run, iteration)  # once for all of them
        with lock_run(run):
            result = results[benchmark] = evaluate(
                policy,
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
    return results


def _record(run: Run, iteration: int, *outputs: Path) -> None:
    """Note what a stage of an iteration left; nothing made from an older version may be left.

    Raises:
        RunError: an output was made a second time and is different; what no longer fits is named.
    """
    changed = [path for path in outputs if record_made(run, path)]
    if not changed:
        return
    plan = [stage for stage in plan_stages(run) if stage.iteration is not None]
    after = itertools.dropwhile(lambda stage: stage.output not in changed, plan)
    left = [s.output for s in list(after)[1:] if s.iteration >= iteration and s.done]
    if left:
        names = ", ".join(str(path.relative_to(run.path)) for path in left)
        raise RunError(
            f"{changed[0]} was made again and is not the same as before, so what was made from "
            f"the old one no longer fits. Delete {names} in {run.path}, and run the same again"
        )


def run_stages(run: Run, *, progress: bool = True, say: Callable[[str], None] = print) -> None:
    """Do all stages that are not done yet, in order, holding the run directory throughout."""
    with lock_run(run):
        processes.on_main(lambda: _note_done(run))
        while True:  # planned again after each stage: a round may have ended the loop
            plan = plan_stages(run, progress=progress)
            todo = (number for number, stage in enumerate(plan) if not stage.done)
            number = processes.from_main(next(todo, None))
            if number is None:
                return
            say(f"[{number + 1}/{len(plan)}] {plan[number].title}")
            plan[number].work()


def _note_done(run: Run) -> None:
    """Note what is there: a process may have been killed just before it noted its work."""
    made = [(run, run.questions)]
    for stage in plan_stages(run):
        made += [(stage.run, path) for path in (*stage.beside, stage.output) if stage.done]
    for whose, path in made:
        if path.exists() and path != whose.record:
            record_made(whose, path)


def check_ready(run: Run, needed: Sequence[Path], notebook: str) -> None:
    """Raise an error that says what an earlier notebook should have left, and how to make it.

    Raises:
        RunError: something is missing.
    """
    missing = [str(path.relative_to(run.path)) for path in needed if not path.exists()]
    if missing:
        same = f"--profile {run.config.profile} --run-dir {run.path}"
        raise RunError(
            f"{run.path} lacks {', '.join(missing)}. Run the notebook {notebook} first; or set "
            "make_missing = True in this cell and run it again; or let it be made: "
            f"grath checkpoint --at {int(notebook[:2]) + 1:02} {same}; or "
            f"everything at once: grath run {same}"
        )
