"""The two kinds of jobs in a sweep: a shared stage, and a point. Run by its Snakefile::

    python -m grath_utils.scale.sweep_jobs {shared,point} SWEEP NAME

Both work on ordinary run directories (``SWEEP/shared/NAME``, ``SWEEP/runs/NAME``). A point first
takes over what is shared, as files that its own stages would have left, and so finds them done.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import traceback
from collections.abc import Mapping
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from grath_utils.errors import GrathError, RunError
from grath_utils.evaluation.measure import RESULT
from grath_utils.files import atomic_path, read_json, write_json
from grath_utils.loop.run_dir import Run, load_run, lock_run
from grath_utils.loop.stages import evaluate_model, make_pairs, run_stages, start_run
from grath_utils.loop.state import comparison_rows
from grath_utils.scale.grids import BASE, PAIRS, ROW, planned_config


def main(arguments: list[str] | None = None) -> int:
    """Do one job and return the exit code; an error is a line that starts with "error:"."""
    parser = argparse.ArgumentParser(prog="python -m grath_utils.scale.sweep_jobs")
    parser.add_argument("job", choices=("shared", "point"))
    parser.add_argument("sweep", type=Path, help="the sweep's folder, with points.json")
    parser.add_argument("name", help="of the shared stage or the point")
    options = parser.parse_args(arguments)
    try:
        work = make_shared if options.job == "shared" else make_point
        work(options.sweep, options.name)
    except (GrathError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return getattr(error, "exit_code", 1)
    return 0


def do_logged(job: str, sweep: Path, name: str) -> bool:
    """Do one job, its words in its log as under Snakemake; return whether it ended well."""
    path = sweep / "logs" / f"{name}.log"
    path.parent.mkdir(exist_ok=True)
    with open(path, "w", encoding="utf-8") as log, redirect_stdout(log), redirect_stderr(log):
        try:
            return main([job, str(sweep), name]) == 0
        except Exception:  # a job may fail in any way, and the others are still done
            traceback.print_exc()
            return False


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
    row = row_of_twin(sweep, plan, name)
    if row is None:
        run = start_run(sweep / "runs" / name, planned_config(plan, name))
        point = next(point for point in plan["points"] if point["name"] == name)
        with lock_run(run):
            take_pairs(run, sweep / "shared" / point[PAIRS])
            take_base(run, sweep / "shared" / point[BASE])
            run_stages(run, progress=False, say=lambda line: print(line, flush=True))
        row = row_of(run)
    else:
        print(f"the same run as {row['run']}", flush=True)
    write_json(sweep / "rows" / f"{name}.json", row)


def row_of_twin(sweep: Path, plan: Mapping[str, Any], name: str) -> dict[str, Any] | None:
    """Return the numbers of a finished point with the very same configuration, or None.

    A name says what its grid varies, so the same point has another name in a grid with other keys;
    the address at its end stays. The row's ``run`` tells where the run is.
    """
    config, address = planned_config(plan, name), name.rpartition("-")[2]
    paths = sorted((sweep / "rows").glob(f"*-{address}.json"))
    rows = (read_json(path, ROW) for path in paths)
    same = (row for row in rows if load_run(sweep / "runs" / row["run"]).config == config)
    return next(same, None)


def take_pairs(run: Run, folder: Path) -> None:
    """Take over the pairs of iteration 0, unless they are there; see :func:`_same_ground`."""
    if run.pairs(0).exists():
        return
    shared = _same_ground(run, folder, "questions")
    for path in (Run.rejects, Run.pairs):  # the pairs last: they say that the stage is done
        with atomic_path(path(run, 0)) as partial:
            shutil.copyfile(path(shared, 0), partial)


def take_base(run: Run, folder: Path) -> None:
    """Take over the evaluations of the base model that are not there yet.

    A result names its model by the run directory, so that name becomes this run's; the rest stays.
    """
    for benchmark in run.config.evaluation.benchmarks:
        if not run.evaluation(BASE, benchmark).exists():
            result = read_json(_same_ground(run, folder).evaluation(BASE, benchmark), RESULT)
            result["model"]["name"] = f"{run.path.name}@{BASE}"
            write_json(run.evaluation(BASE, benchmark), result)


def _same_ground(run: Run, folder: Path, *sections: str) -> Run:
    """Return the shared run if what a configuration leaves open (``auto``, files) is the same.

    Raises:
        RunError: it stands on other weights or questions, or on another compute type.
    """
    shared = load_run(folder)
    ours, theirs = run.info(), shared.info()
    for section in ("model", "resolved", *sections):
        if ours[section] != theirs[section]:
            raise RunError(
                f"{shared.path} stands on {section} {theirs[section]}, this run on "
                f"{ours[section]}. On machines of different kinds set model.device and "
                "model.dtype in the grid; where a file has changed, start in a new folder"
            )
    return shared


def row_of(run: Run) -> dict[str, Any]:
    """Return a finished run's numbers: base, chosen round and the paired change of every metric."""
    return {
        "run": run.path.name,
        "metrics": [
            {
                **{key: row[key] for key in ("benchmark", "metric", "n")},
                "base": {key: row["before"][key] for key in ("value", "ci95")},
                "last": {key: row["after"][key] for key in ("value", "ci95")},
                "change": {key: row["difference"][key] for key in ("value", "ci95", "p_value")},
            }
            for row in comparison_rows(run)
        ],
    }


if __name__ == "__main__":
    sys.exit(main())
