"""What came of a sweep: one table, intervals over seeds, one figure, and which points failed.

Metrics are fractions in the files and percent on the page. Two kinds of intervals, both 95 %: in
``table.csv`` over the questions (one run, another draw of questions), in ``summary.csv`` and in the
figure over the seeds (the same setting, trained again).
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grath_utils.evaluation.statistics import t_interval
from grath_utils.figures.plots import plot_sweep, plt
from grath_utils.files import atomic_path, fingerprint, read_json, write_text
from grath_utils.scale.grids import SHARED_SECTIONS, label

PANELS_OF_A_BENCHMARK = 2  # metrics of each benchmark in the figure; the headline stands first
LONGEST_ERROR = 300
PARTS = ("base", "last", "change")


@dataclass(frozen=True)
class Outcome:
    """What came of a point."""

    name: str
    values: Mapping[str, Any]
    status: str
    """``done``, ``failed``, ``unfinished`` or ``not begun``."""
    metrics: Sequence[Mapping[str, Any]] = ()
    error: str = ""
    log: str = ""
    """Where to read more, from the sweep's folder."""


def outcome_of(out: Path, point: Mapping[str, Any]) -> Outcome:
    """Return what came of a point, from the files that its jobs left."""
    name, values = point["name"], point["values"]
    row = out / "rows" / f"{name}.json"
    if row.exists():
        return Outcome(name, values, "done", read_json(row)["metrics"])
    for stage in [name, *(point[kind] for kind in SHARED_SECTIONS)]:
        log = out / "logs" / f"{stage}.log"
        if log.exists() and not (out / "shared" / f"{stage}.done").exists():
            status, error = verdict(log.read_text(encoding="utf-8", errors="replace"))
            where = f"logs/{stage}.log"
            if stage == name:
                return Outcome(name, values, status, error=error, log=where)
            what = f"the shared stage {stage}: {error}"
            return Outcome(name, values, status, error=what, log=where)
    return Outcome(name, values, "not begun")


def verdict(log: str) -> tuple[str, str]:
    """Return a job's status and the last thing that its log says."""
    lines = [line.strip() for line in log.replace("\r", "\n").split("\n") if line.strip()]
    last = lines[-1] if lines else "(the log is empty)"
    ours = [i for i, line in enumerate(lines) if line.startswith("error: ")]
    if ours:  # a message may have several lines
        message = " ".join(lines[ours[-1] :]).removeprefix("error: ")
        return "failed", _shortened(message)
    if any(line.startswith("Traceback ") for line in lines):
        return "failed", _shortened(last)
    return "unfinished", _shortened(f"stopped without an error (killed?) after: {last}")


def _shortened(text: str) -> str:
    return text if len(text) <= LONGEST_ERROR else text[: LONGEST_ERROR - 1] + "…"


def collect(out: Path) -> list[Outcome]:
    """Write table, summary, figure and report from what is there; return every point's outcome.

    Raises:
        DataError: there is no sweep there.
    """
    plan = read_json(out / "points.json")
    outcomes = [outcome_of(out, point) for point in plan["points"]]
    done = [outcome for outcome in outcomes if outcome.status == "done"]
    cells = summarize_cells(done)
    write_text(out / "table.csv", _csv(map(table_row, outcomes)))
    write_text(out / "summary.csv", _csv(map(summary_row, cells)))
    if cells:
        figure = plot_sweep(panels(cells))
        with atomic_path(out / "figure.png") as partial:
            figure.savefig(partial, format="png", dpi=150, bbox_inches="tight")
        plt.close(figure)
    else:
        (out / "figure.png").unlink(missing_ok=True)
    write_text(out / "report.md", report_text(plan, outcomes, cells))
    return outcomes


def cell_of(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a point's values without its seed: points with the same ones are one cell."""
    return {key: value for key, value in values.items() if key != "seed"}


def table_row(outcome: Outcome) -> dict[str, Any]:
    """Return a point as one row: its keys, then base, last and change of every metric.

    Metrics are fractions; ``_low`` and ``_high`` bound the 95 % interval over the questions.
    """
    row = {"point": outcome.name, "status": outcome.status, **_cells_of_csv(outcome.values)}
    for metric in outcome.metrics:
        for part in PARTS:
            name = f"{_metric(metric)}.{part}"
            row[name] = metric[part]["value"]
            row[f"{name}_low"], row[f"{name}_high"] = metric[part]["ci95"]
        row[f"{_metric(metric)}.p_value"] = metric["change"]["p_value"]
        row[f"{_metric(metric)}.n"] = metric["n"]
    return row


def _metric(row: Mapping[str, Any]) -> str:
    return f"{row['benchmark']}.{row['metric']}"


def _cells_of_csv(values: Mapping[str, Any]) -> dict[str, Any]:
    return {k: "+".join(v) if isinstance(v, list) else v for k, v in values.items()}


def summarize_cells(done: Sequence[Outcome]) -> list[dict[str, Any]]:
    """Return each cell with what its seeds gave: mean and 95 % interval over the seeds.

    Returns:
        ``values``, ``n`` (finished seeds), and ``metrics``: NAME -> ``base``, ``last``, ``change``
        -> ``mean``, ``ci95`` (None for one seed), ``seeds`` (the values).
    """
    groups: dict[str, list[Outcome]] = {}
    for outcome in done:
        groups.setdefault(fingerprint(cell_of(outcome.values)), []).append(outcome)
    cells = []
    for group in groups.values():
        metrics: dict[str, dict[str, Any]] = {}
        for outcome in group:
            for metric in outcome.metrics:
                parts = metrics.setdefault(_metric(metric), {})
                for part in PARTS:
                    parts.setdefault(part, []).append(metric[part]["value"])
        values = cell_of(group[0].values)
        summary = {
            name: {part: over_seeds(numbers) for part, numbers in parts.items()}
            for name, parts in metrics.items()
        }
        cells.append({"values": values, "n": len(group), "metrics": summary})
    return cells


def over_seeds(values: Sequence[float]) -> dict[str, Any]:
    """Return ``mean``, ``ci95`` and the values themselves."""
    return {
        "mean": sum(values) / len(values),
        "ci95": t_interval(values),
        "seeds": list(values),
    }


def summary_row(cell: Mapping[str, Any]) -> dict[str, Any]:
    """Return a cell as one row; intervals are over seeds, and empty for a single one."""
    row = {**_cells_of_csv(cell["values"]), "n": cell["n"]}
    for metric, parts in cell["metrics"].items():
        for part, numbers in parts.items():
            row[f"{metric}.{part}"] = numbers["mean"]
            row[f"{metric}.{part}_low"], row[f"{metric}.{part}_high"] = numbers["ci95"] or ("", "")
    return row


def _csv(rows: Iterable[Mapping[str, Any]]) -> str:
    rows = list(rows)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


# --- figure and report ---------------------------------------------------------------------------


def panels(cells: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[dict[str, Any]]]]:
    """Return the figure's panels: the change in the first metrics of each benchmark."""
    names = list(dict.fromkeys(name for cell in cells for name in cell["metrics"]))
    kept: list[str] = []
    for name in names:
        benchmark = name.partition(".")[0]
        if sum(k.partition(".")[0] == benchmark for k in kept) < PANELS_OF_A_BENCHMARK:
            kept.append(name)
    nothing = {"mean": None, "ci95": None, "seeds": []}  # a cell without this benchmark
    return [
        (
            name.replace(".", ", "),
            [
                {
                    "name": label(cell["values"]),
                    **cell["metrics"].get(name, {"change": nothing})["change"],
                }
                for cell in cells
            ],
        )
        for name in kept
    ]


def counts(outcomes: Sequence[Outcome]) -> str:
    """Return ``6 of 8 points done, 2 failed``."""
    statuses = [outcome.status for outcome in outcomes]
    others = [
        f"{statuses.count(status)} {status}"
        for status in dict.fromkeys(statuses)
        if status != "done"
    ]
    return ", ".join([f"{statuses.count('done')} of {len(statuses)} points done", *others])


def report_text(
    plan: Mapping[str, Any], outcomes: Sequence[Outcome], cells: Sequence[Mapping[str, Any]]
) -> str:
    """Return ``report.md``: the cells' changes, and every point that did not end well."""
    grid = Path(plan["grid"]).name
    parts = [f"# Sweep: {grid}", counts(outcomes) + ".", _cell_table(cells)]
    if cells:
        parts.append("![Change from the base model in every cell](figure.png)")
        parts.append(
            "Points of percent, change from the base model: mean over the seeds, with Student's "
            "95 % interval over the seeds where there are at least two. Every run with its "
            "intervals over the questions: [table.csv](table.csv); base and last model of every "
            "cell: [summary.csv](summary.csv)."
        )
    bad = [outcome for outcome in outcomes if outcome.status != "done"]
    if bad:
        parts += ["## Points that did not end well", "\n".join(map(_bad_line, bad))]
        parts.append("The same command tries them again, and keeps what is done.")
    return "\n\n".join(filter(None, parts)) + "\n"


def _cell_table(cells: Sequence[Mapping[str, Any]]) -> str:
    if not cells:
        return ""
    metrics = list(dict.fromkeys(name for cell in cells for name in cell["metrics"]))
    head = ["cell", "seeds", *metrics]
    rows = [
        [
            label(cell["values"]),
            str(cell["n"]),
            *(_points(cell["metrics"].get(name)) for name in metrics),
        ]
        for cell in cells
    ]
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _points(metric: Mapping[str, Any] | None) -> str:
    if metric is None:  # this cell does not have the benchmark
        return ""
    numbers = metric["change"]
    shown = f"{100 * numbers['mean']:+.1f}"
    if numbers["ci95"] is None:
        return shown
    low, high = numbers["ci95"]
    return f"{shown} [{100 * low:+.1f}, {100 * high:+.1f}]"


def _bad_line(outcome: Outcome) -> str:
    line = f"- `{outcome.name}`: {outcome.status}"
    if outcome.error:
        line += f": {outcome.error}"
    return line + (f" (log: [{outcome.log}]({outcome.log}))" if outcome.log else "")
