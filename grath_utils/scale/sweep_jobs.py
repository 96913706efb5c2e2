"""The two kinds of jobs in a sweep: a shared stage, and a point. Run by its Snakefile::

    python -m grath_utils.scale.sweep_jobs SWEEP NAME

Both work on ordinary run directories (``SWEEP/shared/NAME``, ``SWEEP/runs/NAME``). A point first
takes over what is shared, as files that its own stages would have left, and so finds them done.
"""

from __future__ import annotations

import shutil
import sys
import traceback
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from grath_utils.errors import GrathError, RunError
from grath_utils.evaluation.measure import RESULT
from grath_utils.files import atomic_path, read_json, write_json, write_jsonl
from grath_utils.loop.run_dir import Run, load_run, lock_run
from grath_utils.loop.stages import evaluate_model, make_pairs, run_stages, start_run
from grath_utils.loop.state import run_state
from grath_utils.pairs.generate import read_pairs
from grath_utils.pairs.labels import relabelled
from grath_utils.scale.grids import BASE, PAIRS, planned_config
from grath_utils.scale.sweep_results import find_row


def main(sweep: str, name: str) -> int:
    """Do one job and return the exit code; an error is a line that starts with "error:"."""
    try:
        do_job(Path(sweep), name)
    except (GrathError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return getattr(error, "exit_code", 1)
    return 0


def do_logged(sweep: Path, name: str) -> bool:
    """Do one job, its words in its log as under Snakemake; return whether it ended well."""
    path = sweep / "logs" / f"{name}.log"
    path.parent.mkdir(exist_ok=True)
    with open(path, "w", encoding="utf-8") as log, redirect_stdout(log), redirect_stderr(log):
        try:
            return main(str(sweep), name) == 0
        except Exception:  # a job may fail in any way, and the others are still done
            traceback.print_exc()
            return False


def do_job(sweep: Path, name: str) -> None:
    """Make what is shared in ``shared/NAME``, or a whole run in ``runs/NAME``.

    A run's numbers are left in ``rows/NAME.json``; those of a point that was done under another
    name are taken over.
    """
    plan = read_json(sweep / "points.json")
    config, shared = planned_config(plan, name), plan["shared"].get(name)
    if shared:
        run = start_run(sweep / "shared" / name, config)
        if shared["kind"] == PAIRS:
            make_pairs(run, 0, progress=False)
        else:
            print(f"evaluate base on {', '.join(config.evaluation.benchmarks)}", flush=True)
            evaluate_model(run, None, progress=False)
        return
    if row := find_row(sweep, name):
        print(f"the same run as {row['run']}", flush=True)
    else:
        run = start_run(sweep / "runs" / name, config)
        point = next(point for point in plan["points"] if point["name"] == name)
        with lock_run(run):
            take_pairs(run, sweep / "shared" / point[PAIRS])
            take_base(run, sweep / "shared" / point[BASE])
            run_stages(run, progress=False, say=lambda line: print(line, flush=True))
        row = row_of(run)
    write_json(sweep / "rows" / f"{name}.json", row)


def take_pairs(run: Run, folder: Path) -> None:
    """Take over the pairs of iteration 0, with the labels of this run, unless they are there."""
    if not run.pairs(0).exists():
        shared = _same_ground(run, folder, "questions")
        with atomic_path(run.rejects(0)) as partial:
            shutil.copyfile(shared.rejects(0), partial)
        how, written = run.config.pairs, read_pairs(shared.pairs(0))
        pairs = relabelled(written, how.labels, how.flipped, run.config.seed)
        # The pairs last: they say that the stage is done.
        write_jsonl(run.pairs(0), (pair.to_row() for pair in pairs))


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
    """Return the shared run if what a configuration leaves open (``auto``, files) is the same."""
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
            for row in run_state(run).rows
        ],
    }


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
