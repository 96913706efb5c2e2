"""The table of the arms: what each gains over the base, and over the controls.

From the folder of ``grath sweep arms`` (or several, with other seeds), to a record
such as ``notebooks/appendix/recipe_arms.jsonl``::

    python tests/benchmarks/arms_table.py SWEEP [SWEEP ...] --out FILE

With ``--dose`` the folder is that of the grid ``dose``, and each number of steps an arm of its own:
``recipe_dose.jsonl``. (Of that record only the arm ``annotated`` is of such a sweep, which trains
each dose from the start; the others are of one training, an adapter saved on the way.)

Differences are paired by item within a seed. Their intervals are percentiles of a bootstrap that
draws items and seeds; changes in nats are means over all answers that are true, or false.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from grath_utils.evaluation.measure import RESULT
from grath_utils.files import read_json, write_jsonl
from grath_utils.loop.run_dir import BASE, Run, load_run, model_label

CONTROLS = ("random", "mismatched", "unjudged", "25% turned round")
RESAMPLES = 2000
Results = dict[str, dict[int, dict[str, Any]]]
"""Arm -> seed -> benchmark -> (result before, result after)."""


def finished(sweeps: list[Path], steps: int | None = None) -> Results:
    """Return the results of all runs that have been measured on all of their benchmarks.

    Given ``steps``, of those alone that were trained for so many.
    """
    found: Results = defaultdict(dict)
    for path in (path for sweep in sweeps for path in sorted((sweep / "runs").iterdir())):
        run = load_run(path)
        if steps not in (None, run.config.dpo.steps):
            continue
        names = run.config.evaluation.benchmarks
        files = {n: [run.evaluation(m, n) for m in (BASE, model_label(0))] for n in names}
        if all(file.exists() for pair in files.values() for file in pair):
            results = {n: [read_json(file, RESULT) for file in pair] for n, pair in files.items()}
            found[arm_of(run)][run.config.seed] = results
    return found


def add_measured(results: Results, folder: Path) -> None:
    """Add what was measured afterwards: ``base.json``, and SEED/ARM.json of whatever is there."""
    before = read_json(folder / "base.json", RESULT)
    name = f"{before['benchmark']}, {before['protocol']}"
    for arm, seeds in results.items():
        for seed, of_seed in seeds.items():
            if (file := folder / str(seed) / f"{arm}.json").exists():
                of_seed[name] = [before, read_json(file, RESULT)]


def arm_of(run: Run) -> str:
    """Return what distinguishes a run from the main arm."""
    pairs = run.config.pairs
    if pairs.flipped:
        return f"{pairs.flipped:.0%} turned round"
    return "unjudged" if pairs.judge == "none" else pairs.labels


def values(result: dict[str, Any], metric: str) -> np.ndarray:
    """Return a metric of each item, in points."""
    return 100 * np.array([item["metrics"][metric] for item in result["items"]])


def with_interval(differences: np.ndarray) -> dict[str, Any]:
    """Return the mean of (seeds, items) differences, its 95 % interval and p, by the bootstrap.

    p is that of no difference: twice the share of resamples on the other side of 0.
    """
    seeds, items = differences.shape
    generator = np.random.default_rng(0)
    means = [
        differences[generator.integers(seeds, size=seeds)][
            :, generator.integers(items, size=items)
        ].mean()
        for _ in range(RESAMPLES)
    ]
    low, high = np.percentile(means, [2.5, 97.5])
    other_side = min(np.mean(np.array(means) <= 0), np.mean(np.array(means) >= 0))
    return {
        "change": round(float(differences.mean()), 1),
        "ci95": [round(float(low), 1), round(float(high), 1)],
        "p": min(1.0, 2 * max(float(other_side), 1 / RESAMPLES)),
    }


def nats(before: dict[str, Any], after: dict[str, Any]) -> dict[str, float]:
    """Return by how much the log-probability of true and of false answers has changed."""
    changes: dict[int, list[float]] = {0: [], 1: []}
    for old, new in zip(before["items"], after["items"], strict=True):
        for label, a, b in zip(old["labels"], old["scores"], new["scores"], strict=True):
            changes[label].append(b - a)
    return {"nats_true": float(np.mean(changes[1])), "nats_false": float(np.mean(changes[0]))}


def rows_of(results: Results) -> list[dict[str, Any]]:
    """Return one row for each arm, benchmark and metric."""
    rows = []
    for arm, seeds in results.items():
        for name, (first, _) in next(iter(seeds.values())).items():
            measured = {s: each[name] for s, each in seeds.items() if name in each}
            for metric in first["metrics"]:
                pairs = {s: [values(r, metric) for r in each] for s, each in measured.items()}
                change = np.array([after - before for before, after in pairs.values()])
                row = {
                    "arm": arm,
                    "benchmark": name,
                    "metric": metric,
                    "n": change.shape[1],
                    "seeds": sorted(measured),
                    "base": round(float(np.mean([b for b, _ in pairs.values()])), 1),
                    **with_interval(change),
                    "each_seed": [round(float(each.mean()), 1) for each in change],
                }
                moved = [nats(*each) for each in measured.values()]
                row |= {k: round(float(np.mean([m[k] for m in moved])), 1) for k in moved[0]}
                for control in CONTROLS:
                    of_seeds = results.get(control, {}).items()
                    others = {s: each[name] for s, each in of_seeds if name in each}
                    both = sorted(measured.keys() & others.keys())
                    if arm != control and both:
                        scores = {s: values(others[s][1], metric) for s in both}
                        over = np.array([pairs[s][1] - scores[s] for s in both])
                        row[f"over_{control}"] = with_interval(over) | {"seeds": both}
                rows.append(row)
    return rows


def main() -> None:
    """Print the table and write the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sweeps", type=Path, nargs="+")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--dose", nargs="*", type=int, metavar="STEPS", help="a row for each")
    parser.add_argument("--also", type=Path, help="a folder with results of `grath evaluate`")
    given = parser.parse_args()
    doses = given.dose or [14, 28, 42, 56] if given.dose is not None else [None]
    rows = []
    for steps in doses:
        results = finished(given.sweeps, steps)
        if given.also:
            add_measured(results, given.also)
        rows += [({} if steps is None else {"steps": steps}) | row for row in rows_of(results)]
    for row in rows:
        print(row)
    if given.out:
        write_jsonl(given.out, rows)


if __name__ == "__main__":
    main()
