"""The two kinds of jobs in a sweep: a shared stage, and a point. Run by its Snakefile::

    python -m grath_utils.scale.sweep_jobs shared SWEEP NAME
    python -m grath_utils.scale.sweep_jobs point SWEEP NAME

Both work on ordinary run directories (``SWEEP/shared/NAME``, ``SWEEP/runs/NAME``) through the
stages of :mod:`grath_utils.loop.stages`. A point first takes over what is shared, as files that
its own stages would have left, and so finds those stages done.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path
from typing import Any

from grath_utils.config import Config
from grath_utils.errors import GrathError, RunError
from grath_utils.files import atomic_path, read_json, write_json
from grath_utils.loop.comparison import comparison_rows
from grath_utils.loop.run_dir import Run, load_run, lock_run
from grath_utils.loop.stages import evaluate_model, make_pairs, run_stages, start_run
from grath_utils.scale.grids import BASE, PAIRS, planned_config


def main(arguments: list[str] | None = None) -> int:
    """Do one job and return the exit code; an error is a line that starts with "error:"."""
    parser = argparse.ArgumentParser(prog="python -m grath_utils.scale.sweep_jobs")
    parser.add_argument("job", choices=("shared", "point"))
    parser.add_argument("sweep", type=Path, help="the sweep's folder, with points.json")
    parser.add_argument("name", help="of the shared stage or the point")
    options = parser.parse_args(arguments)
    work = {"shared": make_shared, "point": make_point}[options.job]
    try:
        work(options.sweep, options.name)
    except (GrathError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return getattr(error, "exit_code", 1)
    return 0


def make_shared(sweep: Path, name: str) -> None:
    """Make the pairs of iteration 0, or evaluate the base model, in ``shared/NAME``."""
    plan = read_json(sweep / "points.json")
    run = start_run(sweep / "shared" / name, planned_config(plan, name))
    if plan["shared"][name]["kind"] == PAIRS:
        make_pairs(run, 0, progress=False)
        return
    for benchmark in run.config.evaluation.benchmarks:
        print(f"evaluate base on {benchmark}", flush=True)
        evaluate_model(run, None, benchmark, progress=False)


def make_point(sweep: Path, name: str) -> None:
    """Do a whole run in ``runs/NAME``, and leave its numbers in ``rows/NAME.json``."""
    plan = read_json(sweep / "points.json")
    config = planned_config(plan, name)
    row = row_of_twin(sweep, name, config)
    if row is None:
        run = start_run(sweep / "runs" / name, config)
        point = next(point for point in plan["points"] if point["name"] == name)
        with lock_run(run):
            take_pairs(run, sweep / "shared" / point[PAIRS])
            take_base(run, sweep / "shared" / point[BASE])
            run_stages(run, progress=False, say=lambda line: print(line, flush=True))
        row = row_of(run)
    write_json(sweep / "rows" / f"{name}.json", row)


def row_of_twin(sweep: Path, name: str, config: Config) -> dict[str, Any] | None:
    """Return the numbers of a finished point with this very configuration, or None.

    A name says what its grid varies, so the same point has another name in a grid with other keys;
    the address at its end stays. The row's ``run`` tells where the run is.
    """
    address = name.rpartition("-")[2]
    for path in sorted((sweep / "rows").glob(f"*-{address}.json")):
        row = read_json(path)
        if load_run(sweep / "runs" / row["run"]).config == config:
            print(f"the same run as {row['run']}", flush=True)
            return row
    return None


def take_pairs(run: Run, folder: Path) -> None:
    """Take over the pairs of iteration 0, unless they are there.

    Raises:
        RunError: they were made from other weights or questions, or with another compute type.
    """
    if run.pairs(0).exists():
        return
    shared = load_run(folder)
    _check_same_ground(run, shared, "questions")
    for path in (Run.rejects, Run.pairs):  # the pairs last: they say that the stage is done
        with atomic_path(path(run, 0)) as partial:
            shutil.copyfile(path(shared, 0), partial)


def take_base(run: Run, folder: Path) -> None:
    """Take over the evaluations of the base model that are not there yet.

    A result names its model by the run directory, so that name becomes this run's; the rest stays.

    Raises:
        RunError: they were made from other weights, or with another compute type.
    """
    for benchmark in run.config.evaluation.benchmarks:
        target = run.evaluation(BASE, benchmark)
        if target.exists():
            continue
        shared = load_run(folder)
        _check_same_ground(run, shared)
        result = read_json(shared.evaluation(BASE, benchmark))
        result["model"]["name"] = f"{run.path.name}@{BASE}"
        write_json(target, result)


def _check_same_ground(run: Run, shared: Run, *sections: str) -> None:
    """Compare what a configuration leaves open (``auto``, the contents of files)."""
    ours, theirs = run.info(), shared.info()
    for section in ("model", "resolved", *sections):
        if ours[section] != theirs[section]:
            raise RunError(
                f"{shared.path} stands on {section} {theirs[section]}, this run on "
                f"{ours[section]}. On machines of different kinds set model.device and "
                "model.dtype in the grid; where a file has changed, start in a new folder"
            )


def row_of(run: Run) -> dict[str, Any]:
    """Return a finished run's numbers: base, chosen round and the paired change of every metric."""

    def kept(found: dict[str, Any], *keys: str) -> dict[str, Any]:
        return {key: found[key] for key in ("value", "ci95", *keys)}

    return {
        "run": run.path.name,
        "metrics": [
            {
                **{key: row[key] for key in ("benchmark", "metric", "n")},
                "base": kept(row["before"]),
                "last": kept(row["after"]),
                "change": kept(row["difference"], "p_value"),
            }
            for row in comparison_rows(run)
        ],
    }


if __name__ == "__main__":
    sys.exit(main())
