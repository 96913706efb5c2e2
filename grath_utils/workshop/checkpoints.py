"""Jump to any notebook: what each of them leaves behind, and the state that one starts from.

A learner who comes late, or whose machine is slow, needs what the notebooks before would have left.
It is computed here, stage by stage, or copied from a finished run of the same settings (the
checkpoint that an instructor's classroom folder carries).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from grath_utils.config import differing_keys
from grath_utils.engine.models import adapter_fingerprint
from grath_utils.errors import ConfigError, DataError, RunError, UsageError, did_you_mean
from grath_utils.files import atomic_path, read_jsonl, user_path, write_json
from grath_utils.loop.plan import Stage, plan_stages
from grath_utils.loop.run_dir import Run, load_run, lock_run, record_made

NOTEBOOKS = ("00", "00b", "01", "02", "03", "04", "05", "06", "end")
"""Where one can jump to; ``end`` is behind the last stage: a finished run."""
STAND_ALONE = ("05", "06")
"""Notebooks that need nothing of the earlier ones."""
CHECKPOINTS = "checkpoints"
"""The folder of finished runs in a classroom folder (:mod:`.classroom`)."""


def notebook_of(stage: Stage) -> str:
    """Return the number of the notebook that does a stage: this is the one place that knows."""
    if "evaluate_" in stage.id:  # of the placebo, too
        return "04"
    return {"pairs_0": "01", "train_0": "02"}.get(stage.id, "03")


def needed_stages(run: Run, at: str) -> list[Stage]:
    """Return the stages that must be done before a notebook can start, in order."""
    check_notebook(at)
    plan = [] if at in STAND_ALONE else plan_stages(run)
    return [stage for stage in plan if notebook_of(stage) < at]


def check_notebook(at: str) -> None:
    """Raise UsageError if there is no such notebook."""
    if at not in NOTEBOOKS:
        raise UsageError(f'there is no notebook "{at}"{did_you_mean(at, NOTEBOOKS)}')


def make_state(run: Run, at: str, *, say: Callable[[str], None] = print) -> None:
    """Compute what a notebook needs and the run does not have yet; a second call resumes."""
    with lock_run(run):
        # Planned again after each stage: a round may have ended the loop.
        while todo := [s for s in needed_stages(run, at) if not s.done]:
            say(f"{todo[0].title} ({len(todo)} to do)")
            todo[0].work()


def find_checkpoint(folder: str | Path, profile: str | None = None) -> Run:
    """Open the run in ``folder``: a run directory, or a classroom folder with one of a profile.

    Raises:
        DataError: there is no run, or none of that profile, or it is not clear which is meant.
        RunError: a file of it is not as it was made.
    """
    folder = user_path(folder)
    if (folder / "run.json").is_file():
        return load_run(folder)
    found = {path.parent.name: path.parent for path in folder.glob(f"{CHECKPOINTS}/*/run.json")}
    if not found:
        raise DataError(
            f"{folder} is neither a run directory nor a classroom folder with checkpoints "
            "(made with `grath classroom --to DIR`)"
        )
    if profile is None and len(found) == 1:
        [profile] = found
    if profile not in found:
        names = ", ".join(sorted(found))
        raise DataError(f"{folder} has checkpoints of {names}: name one with --profile")
    return load_run(found[profile])


def copy_state(run: Run, at: str, source: Run, *, say: Callable[[str], None] = print) -> None:
    """Copy what a notebook needs from a finished run, and note in ``run.json`` where it is from.

    Model, questions and settings must be the same. The compute type need not be: a laptop without
    bfloat16 may continue from what another machine made, and ``run.json`` says so.

    Raises:
        ConfigError: other settings, another model, other questions, or own results here that
            what would be copied does not belong to.
        RunError: the finished run is not finished.
    """
    here, there = run.info(), source.info()
    _check_same_origin(run, source)
    needed = needed_stages(source, at)
    if lacking := [stage.title for stage in needed if not stage.done]:
        raise RunError(f"{source.path} is not finished; it lacks: {', '.join(lacking)}")
    _check_same_results(run, needed)
    copied = 0
    with lock_run(run):
        for path in (path for stage in needed for path in (*stage.beside, stage.output)):
            target = run.path / path.relative_to(source.path)
            if path.exists() and not target.exists():
                with atomic_path(target) as partial:
                    (shutil.copytree if path.is_dir() else shutil.copyfile)(path, partial)
                copied += 1
            if target.exists():
                record_made(run, target)
        if copied:
            origin = {key: there.get(key) for key in ("created", "resolved", "device")}
            record = {**here, "checkpoint": {"notebook": at, **origin}}
            write_json(run.path / "run.json", record)
    say(f"{copied} files and folders from {source.path}")
    ours, theirs = (info["resolved"]["dtype"] for info in (here, there))
    if ours != theirs:
        say(f"They were computed in {theirs}; this machine computes in {ours} (noted in run.json)")


def _check_same_origin(run: Run, source: Run) -> None:
    lines, infos = differing_keys(run.config, source.config), (run.info(), source.info())
    same = (("model", "weights"), ("questions", "fingerprint"), ("prompt", "fingerprint"))
    for section, key in same:
        here, there = (info.get(section, {}).get(key) for info in infos)
        if here != there:
            lines.append(f"{section} ({key}): {here} here, {there} there")
    if lines:
        raise ConfigError(
            f"the checkpoint {source.path} was made by something else than {run.path}:\n  "
            + "\n  ".join(lines)
            + "\nUse its settings (--profile, --seed, --set), or compute without --from"
        )


def _check_same_results(run: Run, needed: Sequence[Stage]) -> None:
    """Refuse to put later results beside own pairs and adapters that they were not made from."""
    for stage in (s for s in needed if s.id.startswith(("pairs_", "train_"))):
        own = run.iteration(stage.iteration) / stage.output.name
        content = adapter_fingerprint if stage.output.is_dir() else read_jsonl
        if own.exists() and content(own) != content(stage.output):
            raise ConfigError(
                f"{run.path} has its own {own.relative_to(run.path).as_posix()}, other than the "
                "checkpoint's, and what comes later would not belong to it. Put the checkpoint "
                "into another run directory (--run-dir), or continue from yours without --from"
            )
