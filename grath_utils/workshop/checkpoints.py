"""Jump to any notebook: what each of them leaves behind, and the state that one starts from.

A learner who comes late, or whose machine is slow, needs what the notebooks before would have left.
It is computed here, stage by stage, or copied from a finished run of the same settings (the
checkpoint that an instructor's classroom folder carries).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path, PurePath

from grath_utils.config import differing_keys
from grath_utils.engine.models import adapter_fingerprint
from grath_utils.errors import ConfigError, DataError, RunError, UsageError, did_you_mean
from grath_utils.files import atomic_path, read_jsonl, write_json
from grath_utils.loop.run_dir import Run, load_run, lock_run, record_made
from grath_utils.loop.stages import Stage, plan_stages

END = "end"
NOTEBOOKS = ("00", "01", "02", "03", "04", "05", "06", END)
"""Where one can jump to; ``end`` is behind the last stage: a finished run."""
STAND_ALONE = ("05", "06")
"""Notebooks that need nothing of the earlier ones."""
STAGE_FILES = ("iter_*/*", "signals/*.json", "evaluation/*/*.json")
"""What stages leave in a run directory, as patterns."""
CHECKPOINTS = "checkpoints"
"""The folder of finished runs in a classroom folder (:mod:`.classroom`)."""


def notebook_of(path: PurePath) -> str:
    """Return the number of the notebook whose work leaves a file in a run directory.

    This is the one place that knows: what a notebook needs is what those before it leave.
    ``path`` is relative to the run directory, such as ``iter_0/pairs.jsonl``.
    """
    if path.parts[0] == "evaluation":
        return "04"
    if path.parts[0] != "iter_0":  # later rounds, and the signals by which a round is chosen
        return "03"
    return "01" if path.parts[1] in ("pairs.jsonl", "rejects.jsonl") else "02"


def _comes_before(path: PurePath, at: str) -> bool:
    return at not in STAND_ALONE and notebook_of(path) < at


def needed_stages(run: Run, at: str, *, progress: bool = True) -> list[Stage]:
    """Return the stages that must be done before a notebook can start, in order.

    Args:
        run: the run.
        at: the notebook's number, ``"00"`` to ``"06"``, or ``"end"``.
        progress: show bars while a stage works.

    Raises:
        UsageError: no such notebook; the nearest one is named.
    """
    check_notebook(at)
    plan = plan_stages(run, progress=progress)
    return [stage for stage in plan if _comes_before(stage.output.relative_to(run.path), at)]


def check_notebook(at: str) -> None:
    """Raise UsageError if there is no such notebook."""
    if at not in NOTEBOOKS:
        raise UsageError(f'there is no notebook "{at}"{did_you_mean(at, NOTEBOOKS)}')


def make_state(
    run: Run, at: str, *, progress: bool = True, say: Callable[[str], None] = print
) -> None:
    """Compute what a notebook needs and the run does not have yet; a second call resumes."""
    with lock_run(run):
        # Planned again after each stage: a round may have ended the loop.
        while todo := [s for s in needed_stages(run, at, progress=progress) if not s.done]:
            say(f"{todo[0].title} ({len(todo)} to do)")
            todo[0].work()


# --- from somebody else's finished run -----------------------------------------------------------


def find_checkpoint(folder: str | Path, profile: str | None = None) -> Run:
    """Open the finished run in ``folder``: a run directory, or a classroom folder with some.

    Args:
        folder: what the user named.
        profile: which of several; may be left out where there is one.

    Raises:
        DataError: there is no run, or none of that profile, or it is not clear which is meant.
        RunError: a file of it is not as it was made.
    """
    folder = Path(folder).expanduser().resolve()
    if (folder / "run.json").is_file():
        return load_run(folder)
    found = {path.parent.name: path.parent for path in folder.glob(f"{CHECKPOINTS}/*/run.json")}
    if not found:
        raise DataError(
            f"{folder} is neither a run directory nor a classroom folder with checkpoints "
            "(made with `python -m grath_utils classroom --to DIR`)"
        )
    if profile is None and len(found) == 1:
        [profile] = found
    if profile not in found:
        raise DataError(
            f"{folder} has checkpoints of {', '.join(sorted(found))}: name one with --profile"
        )
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
    _check_same_origin(run, source)
    if lacking := [stage.title for stage in needed_stages(source, at) if not stage.done]:
        raise RunError(f"{source.path} is not finished; it lacks: {', '.join(lacking)}")
    _check_same_results(run, at, source)
    outputs = {stage.output for stage in plan_stages(source)}
    parts = [p for kind in STAGE_FILES for p in source.path.glob(kind) if p.name[0] != "."]
    copied = 0
    with lock_run(run):
        # Each stage's own output last: it says that the rest is there.
        for path in sorted(parts, key=lambda path: (path in outputs, path)):
            target = run.path / path.relative_to(source.path)
            if target.exists() or not _comes_before(target.relative_to(run.path), at):
                continue
            with atomic_path(target) as partial:
                (shutil.copytree if path.is_dir() else shutil.copyfile)(path, partial)
            copied += 1
        for stage in needed_stages(run, at):
            record_made(run, stage.output)
        here, there = run.info(), source.info()
        if copied:
            origin = {
                "notebook": at,
                **{k: there.get(k) for k in ("created", "resolved", "device")},
            }
            write_json(run.path / "run.json", {**here, "checkpoint": origin})
    say(f"{copied} files and folders from {source.path}")
    ours, theirs = (info["resolved"]["dtype"] for info in (here, there))
    if ours != theirs:
        say(f"They were computed in {theirs}; this machine computes in {ours} (noted in run.json)")


def _check_same_origin(run: Run, source: Run) -> None:
    lines = differing_keys(run.config, source.config.to_dict())
    for section, key in (("model", "weights"), ("questions", "fingerprint")):
        here, there = (made.info()[section][key] for made in (run, source))
        if here != there:
            lines.append(f"{section} ({key}): {here} here, {there} there")
    if lines:
        raise ConfigError(
            f"the checkpoint {source.path} was made by something else than {run.path}:\n  "
            + "\n  ".join(lines)
            + "\nUse its settings (--profile, --seed, --set), or compute without --from"
        )


def _check_same_results(run: Run, at: str, source: Run) -> None:
    """Refuse to put later results beside own ones that they were not made from.

    What is measured is not compared: nothing is made from it.
    """
    for stage in needed_stages(run, at):
        name = stage.output.relative_to(run.path)
        if not stage.done or not name.parts[0].startswith("iter_"):
            continue
        content = adapter_fingerprint if stage.output.is_dir() else read_jsonl
        if content(stage.output) != content(source.path / name):
            raise ConfigError(
                f"{run.path} has its own {name.as_posix()}, other than the checkpoint's, and "
                "what comes later would not belong to it. Put the checkpoint into another run "
                "directory (--run-dir), or continue from yours without --from"
            )
