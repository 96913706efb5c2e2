"""Run a grid: check all of it, hand the jobs to Snakemake, collect the results.

::

    SWEEP/ points.json · runs/NAME/ (ordinary run directories) · shared/KIND-ADDRESS/ (the same)
           rows/NAME.json (a finished point's numbers) · logs/NAME.log
           table.csv · summary.csv · figure.png · report.md

Snakemake schedules, here or on a cluster; every job resumes where it was stopped, and one that
fails does not stop the others.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import cache
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from grath_utils.errors import ConfigError, GrathError, RunError, UsageError
from grath_utils.files import (
    check_output,
    explained_write_errors,
    read_json,
    write_json,
    write_text,
)
from grath_utils.pairs.questions import load_questions
from grath_utils.scale.grids import (
    GRID_FILES,
    SHARED_SECTIONS,
    describe_plan,
    expand,
    label,
    plan_of,
    read_grid,
)
from grath_utils.scale.sweep_results import PointOutcome, collect, counts, find_row, outcome_of

OWN_SCHEDULING = ("-c", "--cores", "-j", "--jobs", "-e", "--executor", "--profile")
"""Arguments for Snakemake with which the user decides how many jobs run at a time, and where."""


def plan_sweep(name: str, out: Path) -> dict[str, Any]:
    """Check a whole grid and write ``points.json``; nothing runs yet.

    A sweep's folder may get a grid that has grown: what is there already is used.
    """
    grid = read_grid(name)
    points = expand(grid)
    for source, seed in {p.config.questions: p.config.seed for p in points}.items():
        load_questions(source, seed)  # a file that is not there stops the sweep now
    # A sweep that was stopped before it had a plan leaves its lock.
    if not (out / "points.json").exists() and any(out.glob("[!.]*")):
        raise ConfigError(f"{out} is not empty and holds no points.json; choose another folder")
    check_output(out / "points.json", read_json, ("grid", "points", "shared"))
    plan = plan_of(points, grid, os.getcwd())
    with lock_sweep(out):
        write_json(out / "points.json", plan)
    return plan


def lock_sweep(out: Path) -> AbstractContextManager:
    """Hold a sweep's folder for one process; a RunError says that another one holds it."""
    with explained_write_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    try:
        return FileLock(out / ".lock", timeout=0).acquire()
    except Timeout:
        raise RunError(f"{out} is in use by another sweep; wait for it to end") from None


def sweep(
    name: str, out: Path, *, here: bool = False, jobs: int = 1, extra: Sequence[str] = ()
) -> list[PointOutcome]:
    """Run a grid, or resume it, and collect in the folder ``out``; return how every point ended.

    Args:
        here: without Snakemake, see :func:`run_here`.
        jobs: points at a time on this machine; they divide its cores among them.
        extra: arguments for Snakemake, which may say instead of ``jobs`` how many run, and where.

    Raises:
        UsageError: the grid is refused, or Snakemake is not installed; nothing has run.
        GrathError: some points did not end well; the table holds the others.
    """
    if here:
        run_here(name, out)
    code = None if here else _run_snakemake(name, out, jobs, extra)
    outcomes = collect(out)
    bad = [outcome for outcome in outcomes if outcome.status != "done"]
    if not bad or code == 0:  # a dry run, say, leaves points out
        return outcomes
    if all(outcome.status == "not begun" for outcome in bad):
        raise GrathError(
            f"Snakemake ended with exit code {code} before it had begun "
            f"{len(bad)} of {len(outcomes)} points; its own message is above"
        )
    raise GrathError(
        f"{counts(outcomes)}. First: {bad[0].name}: {bad[0].error or bad[0].status}\n"
        f"All are named in {out / 'report.md'}; the same command tries them again"
    )


def _run_snakemake(name: str, out: Path, jobs: int, extra: Sequence[str]) -> int:
    """Let Snakemake do what is not done yet; return its exit code."""
    if importlib.util.find_spec("snakemake") is None:
        raise UsageError(
            "a sweep needs Snakemake, which is not installed here: "
            f"{Path(sys.executable).name} -m pip install 'snakemake>=9,<10' (in a checkout, "
            "requirements-dev.txt pins the version that is tested). Without it: --here, one point "
            "after the other"
        )
    print(describe_plan(plan_sweep(name, out)), flush=True)
    # Also a checkout that is not installed can be imported, wherever the jobs start.
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    command = snakemake_command(out, jobs=jobs, extra=extra)
    with lock_sweep(out):
        process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path})
        try:
            return process.wait()
        finally:  # Ctrl-C: the terminal told Snakemake too; it ends its jobs, and then itself
            process.wait()


def snakemake_command(out: Path, *, jobs: int, extra: Sequence[str]) -> list[str]:
    """Return the command line that does the jobs of a sweep."""
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(GRID_FILES / "Snakefile")]
    command += ["--directory", str(out.resolve()), "--keep-going", "--rerun-incomplete"]
    # What is done is decided by the files, and our own lock goes with a killed process.
    command += ["--rerun-triggers", "mtime", "--nolock", "--scheduler", "greedy"]
    command += ["--quiet", "host", "reason", "progress"]
    if not any(argument.partition("=")[0] in OWN_SCHEDULING for argument in extra):
        threads = max(1, _cores() // jobs)
        command += ["--cores", str(jobs * threads)]
        command += ["--set-threads", f"shared={threads}", f"point={threads}"]
    return [*command, *extra]


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def run_here(name: str, out: Path, *, say: Callable[[str], None] = print) -> list[PointOutcome]:
    """Run a grid without Snakemake, one job after the other in this process.

    Either way resumes what the other began. Grids with other keys may use the same folder: a point
    that has been done under another name is taken over. ``say`` gets one line for each point.
    """
    from grath_utils.scale.sweep_jobs import do_logged

    plan, outcomes = plan_sweep(name, out), []

    @cache  # a stage that has failed is not tried again for each point
    def share(stage: str) -> bool:
        done = out / "shared" / f"{stage}.done"
        if not done.exists() and do_logged(out, stage):
            write_text(done, "")
        return done.exists()

    with lock_sweep(out):
        for point in plan["points"]:
            name = point["name"]
            if not (out / "rows" / f"{name}.json").exists():
                (out / "logs" / f"{name}.log").unlink(missing_ok=True)  # of an earlier try
                stages = (point[kind] for kind in SHARED_SECTIONS)
                if find_row(out, name) or all(map(share, stages)):
                    do_logged(out, name)
            outcome = outcome_of(out, point)
            reason = f": {outcome.error}" if outcome.error else ""
            say(f"{outcome.status:10} {label(point['values'])}{reason}")
            outcomes.append(outcome)
    return outcomes
