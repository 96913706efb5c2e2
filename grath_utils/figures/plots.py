"""Figures of what was measured: one function each, from plain rows to a matplotlib figure.

Colours are Okabe and Ito's (distinct for colour-blind readers), and never the only sign: line
style, marker or label says the same, so that a grey print still reads. Every
interval shown is 95 %.
"""

from __future__ import annotations

import math
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from operator import itemgetter
from statistics import fmean
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from grath_utils.evaluation.statistics import t_interval

BLUE, ORANGE, GREEN = "#0072B2", "#E69F00", "#009E73"
VERMILION, PURPLE, SKY, GREY = "#D55E00", "#CC79A7", "#56B4E9", "#666666"
MODEL_COLOURS = (GREY, BLUE, GREEN, PURPLE, SKY, ORANGE)

STYLE = {
    "figure.dpi": 90,  # notebooks with outputs stay below 400 KB each
    "savefig.dpi": 150,
    "savefig.bbox": "tight",
    "font.size": 10.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
}


def use_style() -> None:
    """Set the course's look for every figure that follows."""
    plt.rcParams.update(STYLE)


def new_axes(
    rows: int = 1,
    columns: int = 1,
    *,
    width: float = 7.2,
    height: float = 3.4,
    width_ratios: Sequence[float] | None = None,
) -> tuple[Figure, Any]:
    """Return a figure in the course's style with its axes; sizes in inches."""
    _load_backend()
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            rows,
            columns,
            figsize=(width, height),
            layout="constrained",
            width_ratios=width_ratios,
        )
    return figure, axes


@cache
def _load_backend() -> None:
    """Load matplotlib's backend now.

    Loaded inside ``rc_context``, its switch to interactive mode would be undone with the context,
    and a notebook would show the first figure only.
    """
    plt.switch_backend(plt.get_backend())


# --- pairs ---------------------------------------------------------------------------------------


def plot_reject_reasons(pairs: int, rejects: Sequence[Mapping[str, Any]]) -> Figure:
    """Show how many completions became pairs, and why the others did not."""
    reasons = Counter(str(row["reason"]).replace("_", " ") for row in rejects)
    names = ["usable pair", *[name for name, _ in reasons.most_common()]]
    counts = [pairs, *[count for _, count in reasons.most_common()]]
    figure, axes = new_axes(height=1.0 + 0.36 * len(names))
    bars = axes.barh(names, counts, color=[BLUE] + [ORANGE] * len(reasons))
    for bar in bars[1:]:
        bar.set_hatch("///")
        bar.set_edgecolor("white")
    axes.bar_label(bars, padding=4)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("completions")
    axes.margins(x=0.12)
    return figure


def plot_lengths(pairs: Sequence[Any]) -> Figure:
    """Compare the lengths of correct and incorrect answers: DPO would learn a difference."""
    figure, axes = new_axes(height=2.8)
    longest = max(max(len(p.correct.split()), len(p.incorrect.split())) for p in pairs)
    bins = range(0, longest + 2)
    correct = [len(p.correct.split()) for p in pairs]
    incorrect = [len(p.incorrect.split()) for p in pairs]
    axes.hist(correct, bins=bins, histtype="step", linewidth=2, color=BLUE, label="correct")
    axes.hist(
        incorrect,
        bins=bins,
        histtype="step",
        linewidth=2,
        linestyle="--",
        color=VERMILION,
        label="incorrect",
    )
    axes.set_xlabel("words in the answer")
    axes.set_ylabel("answers")
    axes.legend()
    return figure


# --- training ------------------------------------------------------------------------------------


def plot_dpo_loss(beta: float = 0.1) -> Figure:
    """Show the DPO loss and the weight of its gradient as functions of the margin."""
    figure, axes = new_axes(height=3.2)
    margins = [x / 50 for x in range(-250, 251)]
    axes.plot(margins, [math.log1p(math.exp(-m)) for m in margins], color=BLUE, label="loss")
    axes.plot(
        margins,
        [1 / (1 + math.exp(m)) for m in margins],
        color=VERMILION,
        linestyle="--",
        label="weight of the gradient",
    )
    axes.plot([0], [math.log(2)], "o", color=BLUE)
    axes.annotate(
        "start: margin 0, loss ln 2",
        (0, math.log(2)),
        (0.5, 1.5),
        arrowprops={"arrowstyle": "->", "color": GREY},
    )
    axes.set_xlabel(
        r"margin  $\beta\,[\log\pi(y_w)/\pi_{ref}(y_w) - \log\pi(y_l)/\pi_{ref}(y_l)]$  (nats)"
    )
    axes.set_ylabel("nats")
    axes.legend()
    return figure


def plot_dpo_point(beta: float, contrast: float) -> Figure:
    """Show the DPO loss against the contrast that it is made from, and where one pair stands.

    Args:
        beta: scales the contrast to the margin.
        contrast: log-ratio of the chosen answer minus that of the rejected one, in nats.
    """
    figure, axes = new_axes(height=3.2)
    reach = 40.0
    places = [reach * x / 200 for x in range(-200, 201)]

    def loss(x: float) -> float:  # log(1 + exp(-beta x)), also where exp would overflow
        return max(-beta * x, 0.0) + math.log1p(math.exp(-abs(beta * x)))

    margin = beta * contrast
    slope = -beta * (1 - 1 / (1 + math.exp(-margin)))
    axes.plot(places, [loss(x) for x in places], color=BLUE, label=f"loss, beta = {beta:.3g}")
    tangent = [loss(contrast) + slope * (x - contrast) for x in (contrast - 12, contrast + 12)]
    axes.plot(
        [contrast - 12, contrast + 12],
        tangent,
        color=VERMILION,
        linestyle="--",
        label=f"slope {slope:.3g} (tangent)",
    )
    axes.plot([contrast], [loss(contrast)], "o", color=BLUE)
    axes.set_title(f"margin {margin:+.2f}, loss {loss(contrast):.3f}", fontsize=10.5, loc="left")
    axes.set_xlabel("contrast: log-ratio of chosen minus log-ratio of rejected (nats)")
    axes.set_ylabel("loss (nats)")
    axes.set_xlim(-reach, reach)
    axes.set_ylim(-0.15, max(4.2, 1.1 * loss(contrast)))  # the pair stays in sight
    axes.legend(loc="upper right", fontsize=9)
    return figure


def plot_training(log: Sequence[Mapping[str, Any]], title: str = "") -> Figure:
    """Show a round's loss, margin, log-probabilities and gradient norm."""
    figure, grid = new_axes(2, 2, width=8.5, height=6.2)
    axes = grid.ravel()
    train = [row for row in log if row["split"] == "train"]
    held = [row for row in log if row["split"] == "held_out"]
    panels = ((axes[0], "loss", "DPO loss (nats)"), (axes[1], "margin", "reward margin (nats)"))
    for axis, key, label in panels:
        _lines(axis, train, key, BLUE, "-", "training")
        _lines(axis, held, key, VERMILION, "--", "held-out questions", marker="o")
        axis.set_ylabel(label)
    axes[0].axhline(math.log(2), color=GREY, linewidth=1, linestyle=":")
    axes[0].text(
        0.98,
        math.log(2),
        "ln 2",
        color=GREY,
        ha="right",
        va="bottom",
        transform=axes[0].get_yaxis_transform(),
    )
    axes[1].axhline(0, color=GREY, linewidth=1, linestyle=":")
    shown = held or train
    _lines(axes[2], shown, "logp_chosen", BLUE, "-", "chosen", marker="o")
    _lines(axes[2], shown, "logp_rejected", VERMILION, "--", "rejected", marker="s")
    axes[2].set_ylabel("log-probability of the answer (nats)")
    axes[2].set_title("held-out" if held else "training", fontsize=10)
    _lines(axes[3], train, "grad_norm", BLUE, "-", "before clipping")
    axes[3].set_ylabel("norm of the gradient")
    axes[3].set_ylim(bottom=0)
    for axis in axes:
        axis.set_xlabel("optimiser step")
        axis.legend(fontsize=9)
    if title:
        figure.suptitle(title)
    return figure


def _lines(
    axis: Axes,
    rows: Sequence[Mapping[str, Any]],
    key: str,
    colour: str,
    style: str,
    label: str,
    marker: str = "",
) -> None:
    points = [(row["step"], row[key]) for row in rows if key in row]
    if points:
        axis.plot(
            *zip(*points, strict=True),
            color=colour,
            linestyle=style,
            label=label,
            marker=marker,
            markersize=4,
        )


def plot_rounds(logs: Sequence[Sequence[Mapping[str, Any]]]) -> Figure:
    """Show chosen and rejected log-probabilities and the margin over all rounds, one after another.

    Args:
        logs: the training log of each round; held-out rows are shown where there are any.
    """
    figure, axes = new_axes(1, 2, width=9.6, height=3.3)
    begin = 0
    for t, log in enumerate(logs):
        rows = [row for row in log if row["split"] == "held_out"] or list(log)
        shifted = [{**row, "step": row["step"] + begin} for row in rows]
        hidden = "_" if t else ""  # one legend entry for all rounds
        _lines(axes[0], shifted, "logp_chosen", BLUE, "-", f"{hidden}chosen", marker="o")
        _lines(axes[0], shifted, "logp_rejected", VERMILION, "--", f"{hidden}rejected", marker="s")
        _lines(axes[1], shifted, "margin", BLUE, "-", f"{hidden}margin", marker="o")
        end = begin + max(row["step"] for row in log)
        for axis in axes:
            axis.axvspan(begin, end, color=GREY, alpha=0.10 if t % 2 else 0.03, linewidth=0)
            axis.text(
                (begin + end) / 2,
                1.0,
                f"round {t + 1}",
                ha="center",
                va="bottom",
                fontsize=9.5,
                transform=axis.get_xaxis_transform(),
            )
        begin = end
    axes[0].set_ylabel("log-probability of the answer (nats)")
    axes[1].set_ylabel("reward margin (nats)")
    axes[1].axhline(0, color=GREY, linewidth=1, linestyle=":")
    axes[0].legend(fontsize=9)
    for axis in axes:
        axis.set_xlabel("optimiser step, all rounds")
    return figure


def plot_dashboard(panels: Sequence[Any], columns: int = 4) -> Figure:
    """Show each number over the rounds in a small panel of its own, with 95 % intervals.

    Args:
        panels: ``title``, ``unit``, ``points`` of (model label, value, low, high) and ``line``, as
            :func:`.dashboard.dashboard_panels` makes them.
        columns: panels side by side.
    """
    rows = math.ceil(len(panels) / columns)
    figure, axes = new_axes(rows, columns, width=2.5 * columns, height=2.05 * rows)
    labels = list(dict.fromkeys(label for panel in panels for label, *_ in panel.points))
    labels.sort(key=lambda label: -1 if label == "base" else int(label.rsplit("_", 1)[1]))
    for axis, panel in zip(axes.flat, panels, strict=False):
        for label, value, low, high in panel.points:
            place = labels.index(label)
            error = None if low is None else [[max(value - low, 0)], [max(high - value, 0)]]
            axis.errorbar(
                [place],
                [value],
                yerr=error,
                fmt="osD^vP"[place % 6],
                color=MODEL_COLOURS[place % 6],
                capsize=3,
                markersize=5,
            )
        if panel.line:
            name, height = panel.line
            axis.axhline(height, color=GREY, linewidth=1, linestyle="--")
            axis.annotate(name, (1, height), xycoords=("axes fraction", "data"), fontsize=7.5,
                          ha="right", va="bottom", color=GREY)  # fmt: skip
        if panel.unit == "share":
            axis.set_ylim(-0.03, 1.03)
        axis.set_title(panel.title, fontsize=9.5)
        axis.set_ylabel(panel.unit, fontsize=8.5)
        names = [_model_name(label) for label in labels]
        axis.set_xticks(range(len(labels)), names, fontsize=8)
        axis.tick_params(axis="y", labelsize=8)
        axis.set_xlim(-0.5, len(labels) - 0.5)
        axis.grid(axis="x", visible=False)
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    return figure


# --- quantization --------------------------------------------------------------------------------


def plot_levels(
    levels: Sequence[float], weights: Sequence[float], codes: Sequence[int], shown: int = 16
) -> Figure:
    """Show the levels of a 4-bit type over the weights of blocks, and one block's rounding.

    Args:
        levels: the type's levels, in [-1, 1], ascending.
        weights: weights divided by the largest of their block.
        codes: for the first ``shown`` weights, the index of the level that each is rounded to.
        shown: how many weights to show being rounded.
    """
    figure, axes = new_axes(1, 2, width=10.0, height=3.3)
    axes[0].hist(weights, bins=60, range=(-1, 1), color=SKY, density=True)
    for level in levels:
        axes[0].axvline(level, color=VERMILION, linewidth=1)
    axes[0].grid(visible=False)
    axes[0].set_xlabel("weight / largest weight of its block")
    axes[0].set_ylabel("density of the weights")
    axes[0].set_title(f"the {len(levels)} levels (lines)", fontsize=10)
    before = list(weights[:shown])
    after = [levels[code] for code in codes[:shown]]
    places = range(len(before))
    for level in levels:
        axes[1].axhline(level, color=VERMILION, linewidth=0.4)
    axes[1].vlines(places, before, after, color=GREY, linewidth=1.5)
    axes[1].plot(places, before, "o", color=BLUE, label="weight")
    axes[1].plot(places, after, "_", color=VERMILION, markersize=13, mew=2.5, label="rounded")
    axes[1].grid(visible=False)
    axes[1].set_xlabel(f"first {len(before)} weights of a row")
    axes[1].set_title("each weight goes to its nearest level", fontsize=10)
    # Below the axes: wherever it stood inside, it could hide a weight.
    figure.legend(
        *axes[1].get_legend_handles_labels(), fontsize=9, loc="outside lower right", ncols=2
    )
    return figure


# --- evaluation ----------------------------------------------------------------------------------

METRIC_NAMES = {
    "mc1": "MC1",
    "mc2": "MC2",
    "mc3": "MC3",
    "acc": "accuracy",
    "acc_norm": "accuracy\n(length-normalised)",
}


def plot_metrics(
    results: Mapping[str, Mapping[str, Mapping[str, Any]]], metrics: Sequence[str] = ()
) -> Figure:
    """Show every metric of every model with its 95 % interval, and the question-blind controls.

    Args:
        results: ``{benchmark: {model label: result}}`` as :func:`.stages.results` returns.
        metrics: which ones; all if empty.
    """
    panels = [
        (benchmark, metric)
        for benchmark, models in results.items()
        for metric in next(iter(models.values()))["metrics"]
        if (metric in metrics if metrics else metric in METRIC_NAMES)
    ]
    figure, axes = new_axes(1, len(panels), width=2.1 * len(panels) + 1.4, height=3.6)
    for axis, (benchmark, metric) in zip(axes if len(panels) > 1 else [axes], panels, strict=True):
        models = results[benchmark]
        for i, (_label, result) in enumerate(models.items()):
            value = result["metrics"][metric]
            low, high = value["ci95"]
            axis.errorbar(
                [i],
                [100 * value["value"]],
                yerr=[[100 * (value["value"] - low)], [100 * (high - value["value"])]],
                fmt="osD^vP"[i % 6],
                color=MODEL_COLOURS[i % 6],
                capsize=4,
                markersize=7,
            )
            axis.annotate(
                f"{100 * value['value']:.1f}",
                (i, 100 * value["value"]),
                (7, 0),
                textcoords="offset points",
                va="center",
                fontsize=9,
            )
        axis.set_xticks(range(len(models)), [_model_name(label) for label in models], fontsize=9)
        axis.set_xlim(-0.5, len(models) - 0.2)
        axis.set_title(f"{benchmark}\n{METRIC_NAMES[metric]}", fontsize=10)
        axis.grid(axis="x", visible=False)
    (axes if len(panels) == 1 else axes[0]).set_ylabel("percent, with 95 % interval")
    return figure


def plot_choices(
    choices: Sequence[str],
    scores: Sequence[float],
    labels: Sequence[int],
    *,
    unit: str = "summed log-probability (nats)",
) -> Figure:
    """Show the score of each answer to one question; true and false ones look different.

    Args:
        choices: answer texts.
        scores: one number for each.
        labels: 1 for a true answer, 0 for a false one.
        unit: what the scores are.
    """
    figure, axes = new_axes(width=8.6, height=0.9 + 0.42 * len(choices))
    names = [
        textwrap.fill(f"{choice}  ({'true' if label else 'false'})", 46)
        for choice, label in zip(choices, labels, strict=True)
    ]
    bars = axes.barh(range(len(choices)), scores, color=[BLUE if y else ORANGE for y in labels])
    for bar, label in zip(bars, labels, strict=True):
        if not label:
            bar.set_hatch("///")
            bar.set_edgecolor("white")
    axes.bar_label(bars, fmt="%.1f" if max(map(abs, scores)) > 1 else "%.3f", padding=4)
    axes.set_yticks(range(len(choices)), names)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.margins(x=0.2)
    axes.set_xlabel(unit)
    return figure


def plot_differences(rows: Sequence[tuple[str, Mapping[str, Any]]]) -> Figure:
    """Show paired changes with their 95 % intervals around the line of no change.

    Args:
        rows: (name, difference) with ``value``, ``ci95`` and ``smallest_detectable``, as
            :func:`.measure.compare` returns them.
    """
    figure, axes = new_axes(width=7.6, height=1.0 + 0.42 * len(rows))
    for i, (_, difference) in enumerate(rows):
        value, (low, high) = difference["value"], difference["ci95"]
        least = difference["smallest_detectable"]
        axes.barh([i], [200 * least], left=[-100 * least], height=0.5, color=GREY, alpha=0.15)
        clear = low > 0 or high < 0
        axes.errorbar(
            [100 * value],
            [i],
            xerr=[[100 * (value - low)], [100 * (high - value)]],
            fmt="D" if clear else "o",
            color=BLUE if clear else GREY,
            capsize=4,
        )
    axes.axvline(0, color="black", linewidth=1)
    axes.set_yticks(range(len(rows)), [name for name, _ in rows])
    axes.invert_yaxis()
    axes.set_ylim(len(rows) - 0.4, -0.6)
    reach = max(map(abs, axes.get_xlim()))
    axes.set_xlim(-max(reach, 1), max(reach, 1))  # symmetric, and no magnified nothing
    axes.set_xlabel("change in points, with 95 % interval (grey band: too small to be seen here)")
    return figure


def plot_sweep(panels: Sequence[tuple[str, Sequence[Mapping[str, Any]]]]) -> Figure:
    """Show the change in every cell of a sweep: each seed, their mean, its interval over seeds.

    Args:
        panels: (title, cells), one panel for each metric; a cell has ``name``, ``seeds`` (a value
            for each seed), ``mean`` and ``ci95`` (None for fewer than two). All panels have the
            same cells in the same order.
    """
    columns = min(2, len(panels))
    rows = math.ceil(len(panels) / columns)
    cells = len(panels[0][1])
    figure, axes = new_axes(
        rows, columns, width=5.4 * columns, height=rows * (1.1 + 0.34 * cells)
    )  # fmt: skip
    grid = list(getattr(axes, "flat", [axes]))
    for place, (drawn, (title, rows_of_panel)) in enumerate(zip(grid, panels, strict=False)):
        for i, cell in enumerate(rows_of_panel):
            seeds = [100 * value for value in cell["seeds"]]
            drawn.plot(seeds, [i + 0.22] * len(seeds), "|", color=ORANGE, markersize=9)
            if cell["ci95"] is None:  # one seed, or none in this panel
                drawn.plot(seeds, [i] * len(seeds), "o", mfc="white", color=GREY)
                continue
            low, high = cell["ci95"]
            clear = low > 0 or high < 0
            drawn.errorbar(
                [100 * cell["mean"]],
                [i],
                xerr=[[100 * (cell["mean"] - low)], [100 * (high - cell["mean"])]],
                fmt="D" if clear else "o",
                color=BLUE if clear else GREY,
                capsize=3,
            )
        drawn.axvline(0, color="black", linewidth=1)
        names = [cell["name"] if place % columns == 0 else "" for cell in rows_of_panel]
        drawn.set_yticks(range(cells), names)
        drawn.set_ylim(cells - 0.4, -0.6)
        reach = max(map(abs, drawn.get_xlim()))
        drawn.set_xlim(-max(reach, 1), max(reach, 1))
        drawn.set_title(title, fontsize=10.5)
    for spare in grid[len(panels) :]:
        spare.set_axis_off()
    figure.supxlabel(
        "change from the base model, in points (ticks: seeds; marker: their mean, with 95 %\n"
        "interval over seeds; diamond: interval without 0; hollow: one seed, so no interval)",
        fontsize=9.5,
    )
    return figure


def plot_controls(
    results: Mapping[str, Mapping[str, Any]], metric: str = "mc1", rules: Sequence[str] = ()
) -> Figure:
    """Show a metric of every model beside what question-blind rules reach on the same items.

    Args:
        results: model label -> result of one benchmark.
        metric: which metric of the models.
        rules: which controls; all but MC2's if empty.
    """
    controls = next(iter(results.values()))["controls"]
    names = list(rules) or [name for name in controls if name != "uniform_mc2"]
    figure, axes = new_axes(width=7.8, height=1.0 + 0.36 * (len(names) + len(results)))
    labels = []
    for i, (label, result) in enumerate(results.items()):
        value, (low, high) = result["metrics"][metric]["value"], result["metrics"][metric]["ci95"]
        axes.errorbar(
            [100 * value],
            [i],
            xerr=[[100 * (value - low)], [100 * (high - value)]],
            fmt="osD^vP"[i % 6],
            color=MODEL_COLOURS[i % 6],
            capsize=4,
        )
        labels.append(_model_name(label))
    for i, name in enumerate(names, start=len(results)):
        bar = axes.barh([i], [100 * controls[name]], height=0.55, color="#dddddd", hatch="///")
        bar[0].set_edgecolor("white")
        axes.text(100 * controls[name], i, f" {100 * controls[name]:.1f}", va="center", fontsize=9)
        labels.append(name.replace("_", " "))
    axes.axhline(len(results) - 0.5, color=GREY, linewidth=0.8)
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel(
        f"{METRIC_NAMES.get(metric, metric)}, percent (hatched: never read the question)"
    )
    return figure


def plot_category_change(
    before: Mapping[str, Any], after: Mapping[str, Any], metric: str = "mc2"
) -> Figure:
    """Show a metric in each category before and after, and the paired change with its interval.

    Args:
        before: result of one benchmark, with ``items`` (as :func:`.measure.evaluate`
            returns it).
        after: of the other model, on the same items.
        metric: one that every item has.
    """
    values: dict[str, list[tuple[float, float]]] = {}
    for first, second in zip(before["items"], after["items"], strict=True):
        both = (100 * first["metrics"][metric], 100 * second["metrics"][metric])
        values.setdefault(first.get("category") or "all", []).append(both)
    changes = {name: [b - a for a, b in rows] for name, rows in values.items()}
    categories = sorted(values, key=lambda name: fmean(changes[name]))
    figure, (left, right) = new_axes(
        1, 2, width=10.0, height=1.2 + 0.3 * len(categories), width_ratios=(3, 2)
    )
    for i, name in enumerate(categories):
        was, now = (fmean(side) for side in zip(*values[name], strict=True))
        left.plot([was, now], [i, i], color=GREY, linewidth=1.2)
        left.plot([was], [i], "o", color=GREY, label="before" if i == 0 else None)
        left.plot([now], [i], "D", color=BLUE, label="after" if i == 0 else None)
        change = fmean(changes[name])
        low, high = t_interval(changes[name]) or (change, change)
        clear = len(changes[name]) > 1 and (low > 0 or high < 0)
        right.errorbar(
            [change],
            [i],
            xerr=[[change - low], [high - change]],
            fmt="D" if clear else "o",
            color=BLUE if clear else GREY,
            markerfacecolor=BLUE if clear else "white",
            capsize=3,
        )
    names = [f"{name} (n = {len(values[name])})" for name in categories]
    left.set_yticks(range(len(categories)), names, fontsize=9)
    left.set_xlabel(f"{METRIC_NAMES.get(metric, metric)}, percent")
    right.set_yticks(range(len(categories)), [])
    right.axvline(0, color="black", linewidth=1)
    right.set_xlabel("change in points, with 95 % interval\n(filled diamond: without 0)")
    for axis in (left, right):
        axis.set_ylim(-0.7, len(categories) - 0.3)
    figure.legend(fontsize=9, loc="outside upper left", ncols=2)  # inside, it could hide a point
    return figure


# --- what a run takes ----------------------------------------------------------------------------

MEMORY_LOOKS = {  # part -> colour, and the hatch that says the same in grey
    "weights": (BLUE, ""),
    "adapter": (ORANGE, "...."),
    "gradient and optimiser": (VERMILION, "////"),
    "activations": (SKY, "\\\\\\\\"),
    "logits": (PURPLE, "xxxx"),
    "working space": ("#bbbbbb", ""),
}
STAGE_LOOKS = {
    "write pairs": (BLUE, ""),
    "train": (ORANGE, "////"),
    "measure": (PURPLE, "xxxx"),
    "evaluate": (SKY, "\\\\\\\\"),
}


def plot_memory(
    models: Mapping[str, Mapping[str, Mapping[str, float]]], limits: Mapping[str, float]
) -> Figure:
    """Show where the memory of training goes: a panel for each model, a bar for each way.

    Args:
        models: model -> way of training -> part -> bytes; parts as in ``MEMORY_LOOKS``.
        limits: what a device holds, in bytes, by its name; at most two.
    """
    rows = math.ceil(len(models) / 2)
    figure, axes = new_axes(rows, 2, width=10.4, height=0.7 + 2.2 * rows)
    for axis, (model, ways) in zip(axes.flat, models.items(), strict=True):
        ends = _stack(axis, ways, MEMORY_LOOKS, 1e9)
        for i, end in enumerate(ends):
            behind = {"facecolor": "white", "linewidth": 0, "pad": 1}  # a line may pass here
            size = f"{end:,.0f}" if end > 100 else f"{end:.1f}"
            axis.annotate(
                f"{size} GB", (end, i), (5, 0), textcoords="offset points", va="center", bbox=behind
            )
        right = 1.25 * max(ends)
        sides = ("right", "left")  # two lines may stand close together
        for (name, size), side in zip(
            sorted(limits.items(), key=itemgetter(1)), sides, strict=True
        ):
            if size / 1e9 < right:
                axis.axvline(size / 1e9, color="black", linewidth=1.1, linestyle="--")
                axis.text(size / 1e9, -0.52, f" {name} ", ha=side, va="bottom", fontsize=9)
        axis.set(title=model, xlim=(0, right), ylim=(len(ends) - 0.5, -0.95))
    for axis in axes.flat[-2:]:
        axis.set_xlabel("GB")
    figure.legend(handles=_patches(MEMORY_LOOKS), loc="outside lower center", ncols=6, fontsize=9)
    return figure


def plot_stage_times(runs: Mapping[str, Mapping[str, float]]) -> Figure:
    """Show where the hours of whole runs go, in percent: run -> kind of stage -> seconds."""
    shares = {
        name: {kind: 100 * s / sum(times.values()) for kind, s in times.items()}
        for name, times in runs.items()
    }
    figure, axes = new_axes(width=9.0, height=1.2 + 0.42 * len(runs))
    _stack(axes, shares, STAGE_LOOKS)
    axes.set(xlim=(0, 100), xlabel="percent of the run's time")
    figure.legend(handles=_patches(STAGE_LOOKS), loc="outside lower center", ncols=4, fontsize=9)
    return figure


def _stack(
    axes: Axes,
    bars: Mapping[str, Mapping[str, float]],
    looks: Mapping[str, tuple[str, str]],
    unit: float = 1.0,
) -> list[float]:
    """Draw a bar of parts for each name, and return where the bars end."""
    ends = []
    for i, parts in enumerate(bars.values()):
        left = 0.0
        for name, size in parts.items():
            colour, hatch = looks[name]
            axes.barh(
                [i], [size / unit], left=left, height=0.62, color=colour, hatch=hatch,
                edgecolor="white", linewidth=0.6,
            )  # fmt: skip
            left += size / unit
        ends.append(left)
    axes.set_yticks(range(len(bars)), list(bars))
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    return ends


def _patches(looks: Mapping[str, tuple[str, str]]) -> list[Patch]:
    return [
        Patch(facecolor=colour, hatch=hatch, edgecolor="white", label=name)
        for name, (colour, hatch) in looks.items()
    ]


def _model_name(label: str) -> str:
    return "base" if label == "base" else f"round {int(label.rsplit('_', 1)[1]) + 1}"
