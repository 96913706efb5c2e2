"""The report: one self-contained HTML page of a run, and its before/after table in any format.

The page is the template ``report.html``; here is what fills it.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from grath_utils import evaluation
from grath_utils.course.dashboard import ROUND_COLUMNS, dashboard_panels, round_rows, sample_rows
from grath_utils.errors import GrathError
from grath_utils.files import (
    atomic_path,
    fingerprint,
    mirror_dir,
    read_jsonl,
    sha256_file,
    write_text,
)
from grath_utils.loop.run_dir import BASE, LOG_ROW, Run, model_label
from grath_utils.loop.state import RunState, choice_line, run_pairs, run_state
from grath_utils.loop.verdict import gain_line, verdict, what_happened
from grath_utils.text import percent, table, with_interval

if TYPE_CHECKING:
    from grath_utils.pairs.generate import Pair

SHOWN = 10  # pairs, answers, changed items; what else there is of these is folded, up to FOLDED
FOLDED = 200
PLOTS = Path(__file__).parents[1] / "figures" / "plots.py"
TEMPLATES = Environment(
    loader=PackageLoader("grath_utils.course", "."),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
TEMPLATES.globals |= {
    "table": partial(table, form="html"),
    "choice_line": choice_line,
    "gain_line": gain_line,
    "verdict": verdict,
    "what_happened": what_happened,
    "round_rows": round_rows,
    "ROUND_COLUMNS": ROUND_COLUMNS,
    "SHOWN": SHOWN,
    "FOLDED": FOLDED,
}


def comparison_table(run: Run | RunState, form: str) -> str:
    """Return every metric before and after, in a format of :func:`.text.table`; empty without any.

    Percent, with 95 % bootstrap intervals; the change in points is paired, item by item.
    """
    state, rows = run_state(run), []
    if not state.rows:
        return ""
    for row in state.rows:
        numbers = [
            with_interval(row[part]["value"], row[part]["ci95"], spec, scale=100)
            for part, spec in (("before", ".1f"), ("after", ".1f"), ("difference", "+.1f"))
        ]
        rows.append((row["benchmark"], row["metric"], str(row["n"]), *numbers))
    final = f"round {state.final + 1}"
    columns = ("benchmark", "metric", "n", BASE, final, "change (points)")
    return table(columns, rows, form, numbers_from=2 if form == "html" else None)


def summary_table(run: Run | RunState) -> str:
    """Return the gain over the placebo, the before/after table, and which round was chosen."""
    state = run_state(run)
    text = comparison_table(state, "simple")
    if not text:
        return "No finished pair of evaluations yet."
    note = "percent, with 95 % bootstrap intervals; change: paired"
    note += "; [–]: a single item has none" if "[–]" in text else ""
    first = f"{gain}\n\n" if (gain := gain_line(state)) else ""
    said = "\n".join(what_happened(state))
    return f"{first}{text}\n\n{note}\n\n{said}\n{choice_line(state)}"


def write_report(run: Run | RunState) -> Path:
    """Write ``report.html`` and ``figures/`` from what the run directory holds; return its path."""
    state, figures = run_state(run), {}
    run = state.run
    comparison = comparison_table(state, "html")
    if comparison:
        figures["before_after"] = _picture(run, "before_after", "plot_metrics", state.results)
    if state.choice:
        figures["dashboard"] = _picture(run, "dashboard", "plot_dashboard", dashboard_panels(state))
    pairs = []
    for t in state.planned:
        if run.training_log(t).exists():
            log = read_jsonl(run.training_log(t), LOG_ROW)
            name = f"training_{t}"
            figures[name] = _picture(run, name, "plot_training", log, f"Round {t + 1}")
        if run.pairs(t).exists():
            train, held_out = run_pairs(run, t)
            rejects = read_jsonl(run.rejects(t)) if run.rejects(t).exists() else []
            pairs.append((t + 1, train, len(held_out), len(rejects)))
    notes, rules, changed, label = [], [], [], model_label(state.final)
    for benchmark, models in state.results.items():
        shown = models.get(label, {})
        where = f"{benchmark}, round {state.final + 1}"
        notes += [f"{where}: {note}" for note in shown.get("notes", [])]
        for rule, value in shown.get("controls", {}).items():
            rules.append((benchmark, rule.replace("_", " "), percent(value)))
        if shown and BASE in models:
            changed.append((benchmark, *changed_items(models[BASE], shown)))
    executed = sorted(path.name for path in run.executed_notebooks.glob("[0-9][0-9]*_*.ipynb"))
    page = TEMPLATES.get_template("report.html").render(
        run=run,
        config=run.config,
        info=run.info(),
        state=state,
        comparison=comparison,
        figures=figures,
        notes=notes,
        rules=rules,
        pairs=_pairs_by_question(pairs) if pairs else None,
        written=pairs,
        changed=changed,
        answers=_answers(state) if state.base else None,
        notebooks=[name for name in executed if not name.endswith(".failed.ipynb")],
    )
    write_text(run.report, page)
    return run.report


def changed_items(
    before: Mapping[str, Any], after: Mapping[str, Any]
) -> tuple[str, list[tuple[str, ...]], list[tuple[str, ...]]]:
    """Return what the first metric counts differently after training, in full.

    Returns:
        a remark on it; what was won and what was lost, as rows of question, the answer that the
        model preferred before and after, and the true one. The rows are empty where the benchmark
        is not at hand as it was measured (nothing is fetched), or its answers were written freely.
    """
    name, metric = before["benchmark"], next(iter(before["metrics"]))
    if "scores" not in before["items"][0]:
        return "Its answers were written freely.", [], []
    here = None
    if mirror_dir() or not evaluation.BENCHMARKS[name].files:
        how = {"limit": before.get("limit"), "seed": before.get("seed", 0)}
        with suppress(GrathError):
            here = evaluation.load_benchmark(name, **how)
    if here is None or here.fingerprint != before["data_fingerprint"]:
        return "Its items are not here as they were measured (GRATH_MIRROR names them).", [], []
    won, lost = [], []
    for item, was, now in zip(here.items, before["items"], after["items"], strict=True):
        change = now["metrics"][metric] - was["metrics"][metric]
        if change:
            answers = (item.question, _preferred(item, was), _preferred(item, now))
            (won if change > 0 else lost).append((*answers, item.choices[item.gold]))
    n, same = len(here.items), len(here.items) - len(won) - len(lost)
    return f"{metric}: {len(won)} won, {len(lost)} lost, {same} of {n} as before.", won, lost


def _preferred(item: evaluation.Item, measured: Mapping[str, Any]) -> str:
    """Return the most probable of the answers that MC1 compares; all of them if they are equal."""
    scores = measured["scores"]
    best = max(scores[i] for i in item.mc1)
    return " = ".join(item.choices[i] for i in item.mc1 if scores[i] == best)


def _pairs_by_question(
    rounds: Sequence[tuple[int, Sequence[Pair], int, int]],
) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return columns and rows: a question, what the first and the last round wrote to it."""
    ends = rounds if len(rounds) < 3 else (rounds[0], rounds[-1])
    columns = ("question", *(f"correct, round {t}" for t, *_ in ends), "incorrect")
    answers = [{pair.id: pair.correct for pair in train} for _, train, *_ in ends]
    return columns, [
        (pair.question, *(each.get(pair.id, "–") for each in answers), pair.incorrect)
        for pair in rounds[0][1]
    ]


def _answers(state: RunState) -> tuple[list[str], list[list[str]]]:
    """Return free answers as :func:`sample_rows` does: before, of the chosen and the last round."""
    columns, rows = sample_rows(state, SHOWN)
    shown = sorted({0, 1, min(state.final + 2, len(columns) - 1), len(columns) - 1})
    return [columns[i] for i in shown], [[row[i] for i in shown] for row in rows]


def _picture(run: Run, name: str, plot: str, *shown: Any) -> str:
    """Return a figure as base64: the PNG that is there, if it shows the same, or a new one.

    A PNG holds a fingerprint of what it shows and of the code that drew it, so that a report is
    written again without loading what draws.
    """
    path = run.figures / f"{name}.png"
    mark = fingerprint([plot, sha256_file(PLOTS), shown])
    if not path.is_file() or mark.encode() not in path.read_bytes():
        from matplotlib import pyplot

        from grath_utils.figures import plots

        figure = getattr(plots, plot)(*shown)
        how = {"format": "png", "dpi": 150, "bbox_inches": "tight"}
        with atomic_path(path) as partial:
            figure.savefig(partial, metadata={"Description": mark}, **how)
        pyplot.close(figure)
    return base64.b64encode(path.read_bytes()).decode("ascii")
