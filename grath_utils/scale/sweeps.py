"""Run a grid: check all of it, hand the jobs to Snakemake, collect what came of them.

::

    SWEEP/ points.json · runs/NAME/ (ordinary run directories) · shared/KIND-ADDRESS/ (the same)
           rows/NAME.json (a finished point's numbers) · logs/NAME.log
           table.csv · summary.csv · figure.png · report.md

Snakemake schedules, here or on a cluster; every job goes on where it was stopped, and one that
fails does not stop the others.
"""

from __future__ import annotations

import importlib.util
import io
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from grath_utils.errors import ConfigError, GrathError, RunError, UsageError, did_you_mean
from grath_utils.files import fingerprint, write_json, write_text
from grath_utils.scale.grids import (
    SHARED_SECTIONS,
    Point,
    expand,
    label,
    plan_of,
    planned_config,
    read_grid,
    sweep_dir,
)
from grath_utils.scale.sweep_results import Outcome, cell_of, collect, counts, outcome_of

OWN_SCHEDULING = ("-c", "--cores", "-j", "--jobs", "-e", "--executor", "--profile")
"""Arguments for Snakemake with which the user decides how many jobs run at a time, and where."""


# --- before anything runs ------------------------------------------------------------------------


def plan_sweep(name: str, out: Path) -> dict[str, Any]:
    """Check a whole grid and write ``points.json``; nothing runs yet.

    A sweep's folder may get a grid that has grown: what is there already is used.

    Raises:
        ConfigError: the grid is refused (see :mod:`.grids`), or the folder holds
            something else than a sweep.
        DataError: the questions of a point cannot be had.
    """
    grid = read_grid(name)
    points = expand(grid)
    for point in points:
        _check_names(point, grid.where)
    _check_questions(points)
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is a file; name a folder for the sweep")
    if out.is_dir() and not (out / "points.json").exists() and any(out.iterdir()):
        raise ConfigError(f"{out} is not empty and holds no points.json; choose another folder")
    plan = plan_of(points, grid, os.getcwd())
    with lock_sweep(out):
        write_json(out / "points.json", plan)
    return plan


def _check_names(point: Point, where: str) -> None:
    from grath_utils.evaluation.benchmarks import BENCHMARKS

    for name in point.config.evaluation.benchmarks:
        if name not in BENCHMARKS:
            raise ConfigError(
                f'{where}, point {label(point.values)}: "evaluation.benchmarks" names '
                f'"{name}"{did_you_mean(name, BENCHMARKS)}'
            )


def _check_questions(points: Sequence[Point]) -> None:
    """Read each source of questions once: a file that is not there stops the sweep now."""
    from grath_utils.pairs.questions import load_questions

    for config, seed in {p.config.questions: p.config.seed for p in points}.items():
        load_questions(config, seed)


def describe_plan(plan: Mapping[str, Any]) -> str:
    """Return what the sweep will do, in a few lines."""
    points, shared = plan["points"], plan["shared"].values()
    cells = {fingerprint(cell_of(point["values"])) for point in points}
    seeds = {point["values"]["seed"] for point in points}
    kinds = {kind: sum(stage["kind"] == kind for stage in shared) for kind in SHARED_SECTIONS}
    return (
        f"{len(points)} points: {len(cells)} cells, {len(seeds)} seeds\n"
        f"Shared: {kinds['pairs']} times the pairs of iteration 0, "
        f"{kinds['base']} times the evaluation of the base model"
    )


@contextmanager
def lock_sweep(out: Path) -> Iterator[None]:
    """Hold a sweep's folder for one process.

    Raises:
        RunError: another process holds it, or it cannot be written to.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"cannot make {out}: {error.strerror}") from error
    lock = FileLock(out / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise RunError(f"{out} is in use by another sweep; wait for it to end") from None
    try:
        yield
    finally:
        lock.release()


# --- the whole ------------------------------------------------------------------------------------


def sweep(name: str, out: Path, *, jobs: int = 1, extra: Sequence[str] = ()) -> list[Outcome]:
    """Run a grid, or go on with it, and collect; return what came of every point.

    Args:
        name: a grid's file, or the name of an example.
        out: the sweep's folder.
        jobs, extra: see :func:`run_jobs`.

    Raises:
        ConfigError, DataError: the grid is refused; nothing has run.
        UsageError: Snakemake is not installed; nothing has run.
        GrathError: some points did not end well; the table holds the others.
    """
    check_snakemake()
    plan = plan_sweep(name, out)
    print(describe_plan(plan), flush=True)
    code = run_jobs(out, jobs=jobs, extra=extra)
    outcomes = collect(out)
    if code == 0:  # all is done, or all that the user's own arguments ask for (a dry run, say)
        return outcomes
    bad = [outcome for outcome in outcomes if outcome.status != "done"]
    if all(outcome.status in ("done", "not begun") for outcome in outcomes):
        raise GrathError(
            f"Snakemake ended with exit code {code} before it had begun "
            f"{len(bad)} of {len(outcomes)} points; its own message is above"
        )
    raise _not_all_well(outcomes, out)


def sweep_here(name: str, out: Path) -> list[Outcome]:
    """Do as :func:`sweep`, but without Snakemake: see :func:`run_here`.

    Raises:
        ConfigError, DataError: the grid is refused; nothing has run.
        GrathError: some points did not end well; the table holds the others.
    """
    run_here(name, out)
    outcomes = collect(out)
    if any(outcome.status != "done" for outcome in outcomes):
        raise _not_all_well(outcomes, out)
    return outcomes


def _not_all_well(outcomes: Sequence[Outcome], out: Path) -> GrathError:
    first = next(outcome for outcome in outcomes if outcome.status != "done")
    return GrathError(
        f"{counts(outcomes)}. First: {first.name}: {first.error or first.status}\n"
        f"All are named in {out / 'report.md'}; the same command tries them again"
    )


# --- running -------------------------------------------------------------------------------------


def run_jobs(out: Path, *, jobs: int = 1, extra: Sequence[str] = ()) -> int:
    """Let Snakemake do what is not done yet; return its exit code.

    Args:
        out: the sweep's folder, with ``points.json``.
        jobs: points at a time on this machine; they divide its cores among them.
        extra: further arguments for Snakemake. Where they say how many jobs run and where,
            ``jobs`` is not used.

    Raises:
        UsageError: Snakemake is not installed.
        RunError: another sweep uses the folder.
    """
    check_snakemake()
    # Also a checkout that is not installed can be imported, wherever the jobs start.
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    with lock_sweep(out):
        process = subprocess.Popen(
            snakemake_command(out, jobs=jobs, extra=extra), env={**os.environ, "PYTHONPATH": path}
        )
        while True:
            try:
                return process.wait()
            except KeyboardInterrupt:
                # The terminal told Snakemake too: it ends its jobs, and then itself.
                process.wait()
                raise


def run_here(name: str, out: Path, *, say: Callable[[str], None] = print) -> list[Outcome]:
    """Run a grid without Snakemake, one job after the other in this process; return its points.

    The folder is that of :func:`sweep`, and either can go on with what the other began. Grids with
    other keys may use the same folder: a point that has been done under another name is taken over.
    Table and figure are :func:`.sweep_results.collect`'s.

    Args:
        name: a grid's file, or the name of an example.
        out: the sweep's folder.
        say: gets one line for each point.

    Raises:
        ConfigError, DataError: the grid is refused; nothing has run.
        RunError: another sweep uses the folder.
    """
    plan = plan_sweep(name, out)
    tried: set[str] = set()
    with lock_sweep(out):
        for point in plan["points"]:
            if not (out / "rows" / f"{point['name']}.json").exists():
                _point_here(plan, point, out, tried)
            outcome = outcome_of(out, point)
            reason = f": {outcome.error}" if outcome.error else ""
            say(f"{outcome.status:10} {label(point['values'])}{reason}")
    return [outcome_of(out, point) for point in plan["points"]]


def _point_here(
    plan: Mapping[str, Any], point: Mapping[str, Any], out: Path, tried: set[str]
) -> None:
    """Do a point and what it shares; a stage that has failed is not tried again for each point."""
    from grath_utils.scale.sweep_jobs import make_point, make_shared, row_of_twin

    log = out / "logs" / f"{point['name']}.log"
    log.unlink(missing_ok=True)  # a failure of an earlier call
    with redirect_stdout(io.StringIO()):
        twin = row_of_twin(out, point["name"], planned_config(plan, point["name"]))
    for stage in [point[kind] for kind in SHARED_SECTIONS] if twin is None else []:
        done = out / "shared" / f"{stage}.done"
        if not done.exists():
            if stage not in tried and _job_here(make_shared, out, stage):
                write_text(done, "")
            tried.add(stage)
        if not done.exists():
            return
    _job_here(make_point, out, point["name"])


def _job_here(work: Callable[[Path, str], None], out: Path, name: str) -> bool:
    """Do one job, with its words in its log as under Snakemake; tell whether it ended well."""
    path = out / "logs" / f"{name}.log"
    path.parent.mkdir(exist_ok=True)
    with open(path, "w", encoding="utf-8") as log, redirect_stdout(log), redirect_stderr(log):
        try:
            work(out, name)
        except (GrathError, OSError) as error:
            print(f"error: {error}")
            return False
        except Exception:  # a point may fail in any way, and the others go on
            traceback.print_exc()
            return False
    return True


def check_snakemake() -> None:
    """Raise an error that says how to install Snakemake, where it is not there.

    Raises:
        UsageError: it is not installed.
    """
    if importlib.util.find_spec("snakemake") is None:
        raise UsageError(
            "a sweep needs Snakemake, which is not installed here: "
            f"{Path(sys.executable).name} -m pip install 'snakemake>=9,<10' (in a checkout, "
            "requirements-dev.txt pins the version that is tested). Without it: --here, one point "
            "after the other"
        )


def snakemake_command(out: Path, *, jobs: int, extra: Sequence[str]) -> list[str]:
    """Return the command line that does the jobs of a sweep."""
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(sweep_dir() / "Snakefile")]
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
