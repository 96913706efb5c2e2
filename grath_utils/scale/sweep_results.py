"""The results of a sweep: one table, intervals over seeds, one figure, and which points failed.

Metrics are fractions in the files and percent on the page. Two kinds of intervals, both 95 %: in
``table.csv`` over the questions (one run, another draw of questions), in ``summary.csv`` and in the
figure over the seeds (the same setting, trained again).
"""

from __future__ import annotations

import textwrap
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import pandas as pd
from tabulate import tabulate

from grath_utils.evaluation.statistics import t_interval
from grath_utils.files import atomic_path, read_json, write_text
from grath_utils.scale.grids import SHARED_SECTIONS, cell_of, label
from grath_utils.text import with_interval

_NUMBER = {"value": float, "ci95": ([float, float], None)}
ROW = {  # what rows/POINT.json holds, as a form for files.read_json
    "run": Path,
    "metrics": [
        {
            "benchmark": str,
            "metric": str,
            "n": int,
            "base": _NUMBER,
            "last": _NUMBER,
            "change": {**_NUMBER, "p_value": (float, None)},
        }
    ],
}
PARTS = ("base", "last", "change")  # of what is known about a metric
PANELS_OF_A_BENCHMARK = 2  # metrics of each benchmark in the figure; the headline stands first


@dataclass(frozen=True)
class PointOutcome:
    """How a point ended."""

    name: str
    values: Mapping[str, Any]
    status: str  # done, failed, unfinished, or not begun
    metrics: Sequence[Mapping[str, Any]] = ()
    error: str = ""
    log: str = ""  # where to read more, from the sweep's folder


def find_row(out: Path, name: str) -> dict[str, Any] | None:
    """Return the numbers of a finished point with the configuration of this one, or None.

    A name says what its grid varies, so the same point has another name in a grid with other keys;
    the address at its end stays. The row's ``run`` tells where the run is.
    """
    found = sorted((out / "rows").glob(f"*-{name.rpartition('-')[2]}.json"))
    return read_json(found[0], ROW) if found else None


def outcome_of(out: Path, point: Mapping[str, Any]) -> PointOutcome:
    """Return how a point ended, from the files that its jobs left."""
    name, values = point["name"], point["values"]
    row = out / "rows" / f"{name}.json"
    if row.exists():
        return PointOutcome(name, values, "done", read_json(row, ROW)["metrics"])
    for stage in [name, *(point[kind] for kind in SHARED_SECTIONS)]:
        log = out / "logs" / f"{stage}.log"
        if log.exists() and not (out / "shared" / f"{stage}.done").exists():
            status, error = last_word(log.read_text(encoding="utf-8", errors="replace"))
            error = error if stage == name else f"the shared stage {stage}: {error}"
            return PointOutcome(name, values, status, error=error, log=f"logs/{stage}.log")
    return PointOutcome(name, values, "not begun")


def last_word(log: str) -> tuple[str, str]:
    """Return a job's status and the last thing that its log says."""
    log = "\n" + log.replace("\r", "\n")
    _, is_error, told = log.rpartition("\nerror: ")
    if is_error:  # a message may have several lines
        return "failed", textwrap.shorten(told, 300, placeholder=" …")
    last = log.strip().rpartition("\n")[2] or "(the log is empty)"
    if "\nTraceback " in log:
        return "failed", last
    return "unfinished", f"stopped without an error (killed?) after: {last}"


def counts(outcomes: Sequence[PointOutcome]) -> str:
    """Return ``6 of 8 points done, 2 failed``."""
    found = Counter(outcome.status for outcome in outcomes)
    done = f"{found.pop('done', 0)} of {len(outcomes)} points done"
    return ", ".join([done, *(f"{n} {status}" for status, n in found.items())])


def collect(out: Path) -> list[PointOutcome]:
    """Write table, summary, figure and report from what is there; return every point's outcome."""
    from grath_utils.figures.plots import plot_sweep, plt

    plan = read_json(out / "points.json")
    outcomes = [outcome_of(out, point) for point in plan["points"]]
    cells = summarize_cells([outcome for outcome in outcomes if outcome.status == "done"])
    _write_csv(out / "table.csv", map(table_row, outcomes))
    _write_csv(out / "summary.csv", map(summary_row, cells))
    if cells:
        figure = plot_sweep(panels(cells))
        with atomic_path(out / "figure.png") as partial:
            figure.savefig(partial, format="png", dpi=150, bbox_inches="tight")
        plt.close(figure)
    else:
        (out / "figure.png").unlink(missing_ok=True)
    write_text(out / "report.md", report_text(Path(plan["grid"]).name, outcomes, cells))
    return outcomes


def table_row(outcome: PointOutcome) -> dict[str, Any]:
    """Return a point as one row: its keys, then base, last and change of every metric."""
    row = {"point": outcome.name, "status": outcome.status, **outcome.values}
    for metric in outcome.metrics:
        name = f"{metric['benchmark']}.{metric['metric']}"
        for part in PARTS:
            row |= _with_bounds(f"{name}.{part}", metric[part]["value"], metric[part]["ci95"])
        row |= {f"{name}.p_value": metric["change"]["p_value"], f"{name}.n": metric["n"]}
    return row


def summarize_cells(done: Iterable[PointOutcome]) -> list[dict[str, Any]]:
    """Return each cell with the mean and the 95 % interval over its seeds.

    Given finished points, those of a cell one after the other; of each cell, ``values``, ``n``
    (finished seeds), and ``metrics``: a name such as ``probe.mc1.change`` -> ``mean``, ``ci95``
    (:func:`.t_interval`), ``seeds`` (the values).
    """
    cells = []
    for values, group in groupby(done, key=lambda outcome: cell_of(outcome.values)):
        points, seeds = list(group), defaultdict(list)
        for row in (row for point in points for row in point.metrics):
            for part in PARTS:
                seeds[f"{row['benchmark']}.{row['metric']}.{part}"].append(row[part]["value"])
        metrics = {
            name: {"mean": sum(found) / len(found), "ci95": t_interval(found), "seeds": found}
            for name, found in seeds.items()
        }
        cells.append({"values": values, "n": len(points), "metrics": metrics})
    return cells


def summary_row(cell: Mapping[str, Any]) -> dict[str, Any]:
    """Return a cell as one row; intervals are over seeds, and empty where there is none."""
    row = {**cell["values"], "n": cell["n"]}
    for name, found in cell["metrics"].items():
        row |= _with_bounds(name, found["mean"], found["ci95"])
    return row


def _with_bounds(name: str, value: float, ci95: Sequence[float] | None) -> dict[str, Any]:
    low, high = ci95 or (None, None)
    return {name: value, f"{name}_low": low, f"{name}_high": high}


def _write_csv(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    plain = [{k: "+".join(v) if isinstance(v, list) else v for k, v in r.items()} for r in rows]
    frame = pd.DataFrame(plain, dtype=object)
    write_text(path, frame.to_csv(index=False, lineterminator="\n"))


def _changes(cell: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return a cell's changes from the base model by metric, such as ``probe.mc1``."""
    found = cell["metrics"].items()
    return {name.removesuffix(".change"): c for name, c in found if name.endswith(".change")}


def panels(cells: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[dict[str, Any]]]]:
    """Return the figure's panels: the change in the first metrics of each benchmark."""
    names = dict.fromkeys(name for cell in cells for name in _changes(cell))
    nothing = {"mean": None, "ci95": None, "seeds": []}  # for a cell without this benchmark
    return [
        (
            name.replace(".", ", "),
            [{"name": label(c["values"]), **_changes(c).get(name, nothing)} for c in cells],
        )
        for _, group in groupby(names, key=lambda name: name.partition(".")[0])
        for name in islice(group, PANELS_OF_A_BENCHMARK)
    ]


def report_text(
    grid: str, outcomes: Sequence[PointOutcome], cells: Sequence[Mapping[str, Any]]
) -> str:
    """Return ``report.md``: the cells' changes, and every point that did not end well."""
    parts = [f"# Sweep: {grid}", counts(outcomes) + "."]
    if cells:
        rows = [
            {"cell": label(cell["values"]), "seeds": cell["n"]}
            | {
                name: with_interval(change["mean"], change["ci95"], "+.1f", scale=100)
                for name, change in _changes(cell).items()
            }
            for cell in cells
        ]
        parts += [
            tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True),
            "![Change from the base model in every cell](figure.png)",
            "Points of percent, change from the base model: mean over the seeds, with Student's "
            "95 % interval over the seeds ([–]: one seed, or seeds that are all equal). Every run "
            "with its intervals over the questions: [table.csv](table.csv); base and last model of "
            "every cell: [summary.csv](summary.csv).",
        ]
    bad = [
        f"- `{each.name}`: {each.status}"
        + (f": {each.error} (log: [{each.log}]({each.log}))" if each.log else "")
        for each in outcomes
        if each.status != "done"
    ]
    if bad:
        parts += ["## Points that did not end well", "\n".join(bad)]
        parts.append("The same command tries them again, and keeps what is done.")
    return "\n\n".join(parts) + "\n"
