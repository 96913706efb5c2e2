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
from grath_utils.files import atomic_path, fingerprint, read_jsonl, write_json
from grath_utils.loop.run_dir import Run, load_run, lock_run, record_made
from grath_utils.loop.stages import Stage, plan_stages

END = "end"
NOTEBOOKS = ("00", "01", "02", "03", "04", "05", "06", END)
"""Where one can jump to; ``end`` is behind the last stage: a finished run."""
STAND_ALONE = ("05", "06")
"""Notebooks that need nothing of the earlier ones."""
PARTS = ("iter_*/*", "signals/*.json", "evaluation/*/*.json")
"""What stages leave in a run directory, as patterns."""
CHECKPOINTS = "checkpoints"
"""The folder of finished runs in a classroom folder (:mod:`.classroom`)."""


def notebook_of(path: PurePath) -> str:
    """Return the number of the notebook whose work leaves a file in a run directory.

    This is the one place that knows: what a notebook needs is what those before it leave.

    Args:
        path: relative to the run directory, such as ``iter_0/pairs.jsonl``.
    """
    if path.parts[0] == "evaluation":
        return "04"
    if path.parts[0] != "iter_0":  # later rounds, and the signals by which a round is chosen
        return "03"
    return "01" if path.parts[1] in ("pairs.jsonl", "rejects.jsonl") else "02"


def check_notebook(at: str) -> None:
    """Refuse a number that no notebook has.

    Raises:
        UsageError: names the nearest one.
    """
    if at not in NOTEBOOKS:
        raise UsageError(f'there is no notebook "{at}"{did_you_mean(at, NOTEBOOKS)}')


def needed_stages(run: Run, at: str, *, progress: bool = True) -> list[Stage]:
    """Return the stages that must be done before a notebook can start, in order.

    Args:
        run: the run.
        at: the notebook's number, ``"00"`` to ``"06"``, or ``"end"``.
        progress: show bars while a stage works.

    Raises:
        UsageError: no such notebook.
    """
    check_notebook(at)
    return [
        stage
        for stage in plan_stages(run, progress=progress)
        if _comes_before(stage.output.relative_to(run.path), at)
    ]


def _comes_before(path: PurePath, at: str) -> bool:
    return at not in STAND_ALONE and notebook_of(path) < at


def make_state(
    run: Run, at: str, *, progress: bool = True, say: Callable[[str], None] = print
) -> None:
    """Compute what a notebook needs and the run does not have yet; a second call goes on.

    Raises:
        UsageError: no such notebook.
    """
    with lock_run(run):
        # The plan is asked for anew after each stage: a round may have ended the loop.
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
        return load_run(next(iter(found.values())))
    if profile not in found:
        raise DataError(
            f"{folder} has checkpoints of {', '.join(sorted(found))}: name one with --profile"
        )
    return load_run(found[profile])


def copy_state(run: Run, at: str, source: Run, *, say: Callable[[str], None] = print) -> None:
    """Copy what a notebook needs from a finished run, and note in ``run.json`` where it is from.

    Model, questions and settings must be the same. The compute type need not be: a laptop without
    bfloat16 may go on from what another machine made, and ``run.json`` says so.

    Raises:
        ConfigError: other settings, another model, other questions, or own results here that
            what would be copied does not belong to.
        RunError: the finished run is not finished.
    """
    _check_same_origin(run, source)
    lacking = [stage.title for stage in needed_stages(source, at) if not stage.done]
    if lacking:
        raise RunError(f"{source.path} is not finished; it lacks: {', '.join(lacking)}")
    _check_same_results(run, at, source)
    copied = 0
    with lock_run(run):
        for path in _parts(source):
            relative = path.relative_to(source.path)
            target = run.path / relative
            if target.exists() or not _comes_before(relative, at):
                continue
            with atomic_path(target) as partial:
                (shutil.copytree if path.is_dir() else shutil.copyfile)(path, partial)
            copied += 1
        for stage in needed_stages(run, at):
            record_made(run, stage.output)
        if copied:
            made = source.info()
            origin = {"notebook": at, **{k: made.get(k) for k in ("created", "resolved", "device")}}
            write_json(run.path / "run.json", {**run.info(), "checkpoint": origin})
    say(f"{copied} files and folders from {source.path}")
    here, there = (r.info()["resolved"]["dtype"] for r in (run, source))
    if here != there:
        say(f"They were computed in {there}; this machine computes in {here} (noted in run.json)")


def _parts(run: Run) -> list[Path]:
    """Return the files and folders that stages left, each stage's own output last."""
    found = [path for kind in PARTS for path in run.path.glob(kind)]
    outputs = {stage.output for stage in plan_stages(run)}
    visible = [path for path in found if not path.name.startswith(".")]
    return sorted(visible, key=lambda path: (path in outputs, path))


def _check_same_origin(run: Run, source: Run) -> None:
    lines = differing_keys(run.config, source.config.to_dict())
    here, there = run.info(), source.info()
    for section, key in (("model", "weights"), ("questions", "fingerprint")):
        if here[section][key] != there[section][key]:
            lines.append(
                f"{section} ({key}): {here[section][key]} here, {there[section][key]} there"
            )
    if lines:
        raise ConfigError(
            f"the checkpoint {source.path} was made by something else than {run.path}:\n  "
            + "\n  ".join(lines)
            + "\nUse its settings (--profile, --seed, --set), or compute without --from"
        )


def _check_same_results(run: Run, at: str, source: Run) -> None:
    """Refuse to lay later results beside own ones that they were not made from."""
    for ours in (stage.output for stage in needed_stages(run, at) if stage.done):
        relative = ours.relative_to(run.path)
        theirs = source.path / relative
        if ours.name == "pairs.jsonl":
            same = fingerprint(read_jsonl(ours)) == fingerprint(read_jsonl(theirs))
        elif ours.is_dir():
            same = adapter_fingerprint(ours) == adapter_fingerprint(theirs)
        else:
            same = True  # a measurement: nothing is made from it
        if not same:
            raise ConfigError(
                f"{run.path} has its own {relative.as_posix()}, other than the checkpoint's, and "
                "what comes later would not belong to it. Put the checkpoint into another run "
                "directory (--run-dir), or compute on from yours without --from"
            )
