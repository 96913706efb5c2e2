"""The report: one self-contained HTML page per run, and the before/after table in plain text."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from grath_utils.course.dashboard import ROUND_COLUMNS, choice_line, dashboard_panels, round_rows
from grath_utils.figures import plots
from grath_utils.files import atomic_path, read_jsonl, write_text
from grath_utils.loop.comparison import comparison_rows, results
from grath_utils.loop.run_dir import Run
from grath_utils.loop.stages import (
    final_iteration,
    model_label,
    planned_iterations,
    round_choice,
    run_pairs,
)

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>GRATH report: {title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem;
  color: #1a1a1a; }}
table {{ border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }}
th, td {{ border-bottom: 1px solid #ccc; padding: .3rem .7rem; text-align: left;
  vertical-align: top; }}
td.n, th.n {{ text-align: right; }}
img {{ max-width: 100%; }}
details {{ margin: 1rem 0; }}
pre {{ background: #f5f5f5; padding: .7rem; overflow-x: auto; }}
.note {{ border-left: 4px solid #E69F00; padding-left: .8rem; }}
</style></head><body>
{body}
</body></html>
"""


def percent(value: float) -> str:
    """Return ``25.1`` for 0.251."""
    return f"{100 * value:.1f}"


def metric_line(metric: Mapping[str, Any]) -> str:
    """Return ``25.1 % [21.0, 29.1], n = 419``."""
    low, high = metric["ci95"]
    return f"{percent(metric['value'])} % [{percent(low)}, {percent(high)}], n = {metric['n']}"


def summary_table(run: Run) -> str:
    """Return the before/after table as plain text; percentages with 95 % intervals."""
    rows = comparison_rows(run)
    if not rows:
        return "No finished pair of evaluations yet."
    before, after = rows[0]["labels"]
    head = ["benchmark", "metric", "n", before, after, "change (points)"]
    body = [
        [
            row["benchmark"],
            row["metric"],
            str(row["n"]),
            _interval(row["before"]),
            _interval(row["after"]),
            _signed(row["difference"]),
        ]
        for row in rows
    ]
    widths = [max(len(line[i]) for line in [head, *body]) for i in range(len(head))]
    lines = [
        "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip()
        for line in [head, ["-" * w for w in widths], *body]
    ]
    return "\n".join(
        [*lines, "", "percent, with 95 % bootstrap intervals; change: paired", choice_line(run)]
    )


def _interval(metric: Mapping[str, Any]) -> str:
    low, high = metric["ci95"]
    return f"{percent(metric['value'])} [{percent(low)}, {percent(high)}]"


def _signed(difference: Mapping[str, Any]) -> str:
    low, high = difference["ci95"]
    return f"{100 * difference['value']:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"


def write_report(run: Run) -> Path:
    """Write ``report.html`` and ``figures/`` from what the run directory holds; return its path."""
    parts = [
        f"<h1>GRATH: {html.escape(run.path.name)}</h1>",
        _overview(run),
        _comparison(run),
        _choice(run),
        _controls(run),
        _training(run),
        _pairs(run),
        _notebooks(run),
        _settings(run),
    ]
    page = PAGE.format(title=html.escape(run.path.name), body="\n".join(filter(None, parts)))
    write_text(run.report, page)
    return run.report


def _overview(run: Run) -> str:
    info = run.info()
    facts = [
        ("profile, seed", f"{run.config.profile}, {run.config.seed}"),
        ("model", f"{info['model']['name']} (quantization {run.config.model.quantization})"),
        ("questions", f"{info['questions']['n']} from {info['questions']['source']}"),
        ("pairs", f"mode {run.config.pairs.mode}"),
        (
            "rounds",
            f"{len(planned_iterations(run))} of at most {run.config.loop.iterations}; "
            f"reference {run.config.dpo.reference}, "
            f"chain {run.config.dpo.chain}",
        ),
        (
            "device",
            f"{info['resolved']['device']}, {info['resolved']['dtype']}, "
            f"{info['device']['cpu_count']} CPU cores, accelerator "
            f"{info['device']['accelerator']}",
        ),
    ]
    return _table(None, facts)


def _comparison(run: Run) -> str:
    rows = comparison_rows(run)
    if not rows:
        return "<p class='note'>No finished pair of evaluations yet.</p>"
    before, after = rows[0]["labels"]
    table = _table(
        ("benchmark", "metric", "n", before, after, "change in points"),
        [
            (
                row["benchmark"],
                row["metric"],
                row["n"],
                _interval(row["before"]),
                _interval(row["after"]),
                _signed(row["difference"]),
            )
            for row in rows
        ],
        numbers_from=2,
    )
    figure = plots.plot_metrics(results(run))
    return (
        "<h2>Before and after</h2><p>Percent, with 95 % bootstrap intervals. The change is paired: "
        "the same items before and after. An interval that holds 0 is no evidence of a change.</p>"
        + table
        + _image(figure, run.figures / "before_after.png", "each metric before and after")
    )


def _choice(run: Run) -> str:
    found = round_choice(run)
    if found is None:
        return ""
    return (
        "<h2>Which round, and why</h2><p>Decided by held-out pairs and signs of collapse; the "
        f"benchmarks above were not looked at. <b>{html.escape(choice_line(run))}.</b></p>"
        + _table(ROUND_COLUMNS, round_rows(run), numbers_from=1)
        + _image(
            plots.plot_dashboard(dashboard_panels(run)),
            run.figures / "dashboard.png",
            "what the rounds were judged by, and what they reached",
        )
    )


def _controls(run: Run) -> str:
    rows, notes = [], []
    for benchmark, models in results(run).items():
        label = model_label(final_iteration(run))
        if label not in models:
            continue
        result = models[label]
        for rule, value in result.get("controls", {}).items():
            if isinstance(value, (int, float)):
                rows.append((benchmark, rule.replace("_", " "), percent(value)))
        notes += [f"{benchmark}, {label}: {note}" for note in result.get("notes", [])]
    if not rows:
        return ""
    text = "".join(f"<p class='note'>{html.escape(note)}</p>" for note in notes)
    return (
        "<h2>What rules that never read the question reach</h2><p>A model that scores no better "
        "than these may have learnt a surface pattern, not truth.</p>"
        + text
        + _table(("benchmark", "rule", "percent"), rows, numbers_from=2)
    )


def _training(run: Run) -> str:
    parts = []
    for t in planned_iterations(run):
        if run.training_log(t).exists():
            figure = plots.plot_training(read_jsonl(run.training_log(t)), f"Round {t + 1}")
            name = run.figures / f"training_{t}.png"
            parts.append(_image(figure, name, f"loss, margin, log-probabilities, round {t + 1}"))
    return "<h2>Training</h2>" + "".join(parts) if parts else ""


def _pairs(run: Run) -> str:
    parts = []
    for t in planned_iterations(run):
        if not run.pairs(t).exists():
            continue
        train, held_out = run_pairs(run, t)
        rejects = read_jsonl(run.rejects(t)) if run.rejects(t).exists() else []
        parts.append(
            f"<h3>Iteration {t}</h3><p>{len(train)} pairs to train on, {len(held_out)} held out, "
            f"{len(rejects)} completions rejected.</p>"
        )
        shown = [(p.question, p.correct, p.incorrect) for p in train[:8]]
        parts.append(_table(("question", "“correct” (chosen)", "“incorrect” (rejected)"), shown))
    return "<h2>The model's own pairs</h2>" + "".join(parts) if parts else ""


def _notebooks(run: Run) -> str:
    found = sorted(run.executed_notebooks.glob("[0-9][0-9]_*.ipynb"))
    links = [
        f"<li><a href='notebooks/{p.name}'>{p.name}</a></li>"
        for p in found
        if not p.name.endswith(".failed.ipynb")
    ]
    return f"<h2>Executed notebooks</h2><ul>{''.join(links)}</ul>" if links else ""


def _settings(run: Run) -> str:
    versions = _table(None, run.info()["versions"].items())
    settings = _table(None, run.config.flat().items())
    return (
        f"<h2>How it was made</h2><details><summary>Settings</summary>{settings}</details>"
        f"<details><summary>Package versions</summary>{versions}</details>"
    )


def _table(head: Sequence[str] | None, rows: Any, *, numbers_from: int | None = None) -> str:
    def cells(values: Sequence[Any], tag: str) -> str:
        return "".join(
            f"<{tag}{' class=n' if numbers_from is not None and i >= numbers_from else ''}>"
            f"{html.escape(str(value))}</{tag}>"
            for i, value in enumerate(values)
        )

    top = f"<thead><tr>{cells(head, 'th')}</tr></thead>" if head else ""
    body = "".join(f"<tr>{cells(list(row), 'td')}</tr>" for row in rows)
    return f"<table>{top}<tbody>{body}</tbody></table>"


def _image(figure: Figure, path: Path, alt: str) -> str:
    """Save a figure under ``figures/`` and return it as an embedded image."""
    import matplotlib.pyplot as plt

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, bbox_inches="tight")
    plt.close(figure)
    with atomic_path(path) as partial:
        partial.write_bytes(buffer.getvalue())
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    return f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{data}">'
