"""The report: one self-contained HTML page of a run, and its before/after table in any format."""

from __future__ import annotations

import base64
import html
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from grath_utils.course.dashboard import ROUND_COLUMNS, choice_line, dashboard_panels, round_rows
from grath_utils.figures.plots import plot_dashboard, plot_metrics, plot_training
from grath_utils.files import atomic_path, read_jsonl, write_text
from grath_utils.loop.comparison import comparison_rows, results
from grath_utils.loop.run_dir import Run
from grath_utils.loop.stages import final_iteration, model_label, planned_iterations, run_pairs
from grath_utils.text import interval, percent, table

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
img {{ max-width: 100%; }}
details {{ margin: 1rem 0; }}
.note {{ border-left: 4px solid #E69F00; padding-left: .8rem; }}
</style></head><body>
{body}
</body></html>
"""


def comparison_table(run: Run, form: str) -> str:
    """Return every metric before and after, in a format of :func:`.text.table`; empty without any.

    Percent, with 95 % bootstrap intervals; the change in points is paired, item by item.
    """
    found = comparison_rows(run)
    if not found:
        return ""

    def shown(metric: dict, spec: str = ".1f") -> str:
        return interval(100 * metric["value"], [100 * end for end in metric["ci95"]], spec)

    rows = [
        (row["benchmark"], row["metric"], str(row["n"]), shown(row["before"]), shown(row["after"]),
         shown(row["difference"], "+.1f"))
        for row in found
    ]  # fmt: skip
    columns = ("benchmark", "metric", "n", *found[0]["labels"], "change (points)")
    return table(columns, rows, form, numbers_from=2 if form == "html" else None)


def summary_table(run: Run) -> str:
    """Return the before/after table as plain text, and which round was chosen."""
    text = comparison_table(run, "simple")
    if not text:
        return "No finished pair of evaluations yet."
    note = "percent, with 95 % bootstrap intervals; change: paired"
    return f"{text}\n\n{note}\n{choice_line(run)}"


def write_report(run: Run) -> Path:
    """Write ``report.html`` and ``figures/`` from what the run directory holds; return its path."""
    title = html.escape(run.path.name)
    sections = (
        _overview, _comparison, _choice, _controls, _training, _pairs_section, _notebooks, _settings
    )  # fmt: skip
    body = "\n".join(filter(None, (section(run) for section in sections)))
    write_text(run.report, PAGE.format(title=title, body=f"<h1>GRATH: {title}</h1>\n{body}"))
    return run.report


def _overview(run: Run) -> str:
    config, info = run.config, run.info()
    resolved, device = info["resolved"], info["device"]
    facts = {
        "profile, seed": f"{config.profile}, {config.seed}",
        "model": f"{info['model']['name']} (quantization {config.model.quantization})",
        "questions": f"{info['questions']['n']} from {info['questions']['source']}",
        "pairs": f"mode {config.pairs.mode}",
        "rounds": f"{len(planned_iterations(run))} of at most {config.loop.iterations}; "
        f"reference {config.dpo.reference}, chain {config.dpo.chain}",
        "device": f"{resolved['device']}, {resolved['dtype']}, {device['cpu_count']} CPU cores, "
        f"accelerator {device['accelerator']}",
    }
    return table((), facts.items(), "html")


def _comparison(run: Run) -> str:
    metrics = comparison_table(run, "html")
    if not metrics:
        return "<p class='note'>No finished pair of evaluations yet.</p>"
    return (
        "<h2>Before and after</h2><p>Percent, with 95 % bootstrap intervals. The change is paired: "
        "the same items before and after. An interval that holds 0 is no evidence of a change.</p>"
        + metrics
        + _image(run, "before_after", "each metric before and after", plot_metrics(results(run)))
    )


def _choice(run: Run) -> str:
    rows = round_rows(run)
    if not rows:
        return ""
    figure = plot_dashboard(dashboard_panels(run))
    return (
        "<h2>Which round, and why</h2><p>Decided by held-out pairs and signs of collapse; the "
        f"benchmarks above were not looked at. <b>{html.escape(choice_line(run))}.</b></p>"
        + table(ROUND_COLUMNS, rows, "html", numbers_from=1)
        + _image(run, "dashboard", "what the rounds were judged by, and what they reached", figure)
    )


def _controls(run: Run) -> str:
    rows, notes = [], []
    label = model_label(final_iteration(run))
    for benchmark, models in results(run).items():
        result = models.get(label, {})
        for rule, value in result.get("controls", {}).items():
            if isinstance(value, (int, float)):
                rows.append((benchmark, rule.replace("_", " "), percent(value)))
        notes += [f"{benchmark}, {label}: {note}" for note in result.get("notes", [])]
    if not rows:
        return ""
    return (
        "<h2>What rules that never read the question reach</h2><p>A model that scores no better "
        "than these may have learnt a surface pattern, not truth.</p>"
        + "".join(f"<p class='note'>{html.escape(note)}</p>" for note in notes)
        + table(("benchmark", "rule", "percent"), rows, "html", numbers_from=2)
    )


def _training(run: Run) -> str:
    parts = [
        _image(
            run,
            f"training_{t}",
            f"loss, margin, log-probabilities, round {t + 1}",
            plot_training(read_jsonl(run.training_log(t)), f"Round {t + 1}"),
        )
        for t in planned_iterations(run)
        if run.training_log(t).exists()
    ]
    return "<h2>Training</h2>" + "".join(parts) if parts else ""


def _pairs_section(run: Run) -> str:
    parts = []
    for t in planned_iterations(run):
        if run.pairs(t).exists():
            train, held_out = run_pairs(run, t)
            rejects = read_jsonl(run.rejects(t)) if run.rejects(t).exists() else []
            shown = [(pair.question, pair.correct, pair.incorrect) for pair in train[:8]]
            parts.append(
                f"<h3>Iteration {t}</h3><p>{len(train)} pairs to train on, {len(held_out)} held "
                f"out, {len(rejects)} completions rejected.</p>"
                + table(("question", "“correct” (chosen)", "“incorrect” (rejected)"), shown, "html")
            )
    return "<h2>The model's own pairs</h2>" + "".join(parts) if parts else ""


def _notebooks(run: Run) -> str:
    links = [
        f"<li><a href='notebooks/{path.name}'>{path.name}</a></li>"
        for path in sorted(run.executed_notebooks.glob("[0-9][0-9]_*.ipynb"))
        if not path.name.endswith(".failed.ipynb")
    ]
    return f"<h2>Executed notebooks</h2><ul>{''.join(links)}</ul>" if links else ""


def _settings(run: Run) -> str:
    parts = {"Settings": run.config.flat(), "Package versions": run.info()["versions"]}
    folded = [
        f"<details><summary>{title}</summary>"
        f"{table((), ((key, str(value)) for key, value in facts.items()), 'html')}</details>"
        for title, facts in parts.items()
    ]
    return "<h2>How it was made</h2>" + "".join(folded)


def _image(run: Run, name: str, alt: str, figure: Figure) -> str:
    """Save a figure under ``figures/`` and return it as an embedded image."""
    path = run.figures / f"{name}.png"
    with atomic_path(path) as partial:
        figure.savefig(partial, format="png", dpi=150, bbox_inches="tight")
    plt.close(figure)
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    return f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{data}">'
