"""Figures: one function each, from plain rows to a matplotlib figure.

Colours are Okabe and Ito's (distinct for colour-blind readers), and never the only sign: line
style, marker or label says the same, so that a grey print still reads. Every
interval shown is 95 %.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

BLUE, ORANGE, GREEN = "#0072B2", "#E69F00", "#009E73"
VERMILION, PURPLE, SKY, GREY = "#D55E00", "#CC79A7", "#56B4E9", "#666666"
MODEL_COLOURS = (GREY, BLUE, GREEN, PURPLE, SKY, ORANGE)

STYLE = {
    "figure.dpi": 110,
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
    rows: int = 1, columns: int = 1, *, width: float = 7.2, height: float = 3.4
) -> tuple[Figure, Any]:
    """Return a figure in the course's style with its axes."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(rows, columns, figsize=(width, height), layout="constrained")
    return figure, axes


# --- drawings ------------------------------------------------------------------------------------


def draw_loop() -> Figure:
    """Draw the GRATH loop: questions, pairs, DPO, a more truthful model, and round again."""
    figure, axes = new_axes(width=8.2, height=3.3)
    axes.set_axis_off()
    axes.set_xlim(0, 10)
    axes.set_ylim(0, 4)
    _box(axes, 0.1, 2.35, 1.9, 1.2, "Questions\nother domain,\nno answers", GREY)
    _box(axes, 2.75, 2.35, 1.9, 1.2, "Model $M_t$\nwrites answers", BLUE)
    _box(axes, 5.4, 2.35, 1.9, 1.2, "Pairs\ncorrect / incorrect", ORANGE)
    _box(axes, 8.05, 2.35, 1.9, 1.2, "DPO\nprefer correct", GREEN)
    _box(axes, 5.4, 0.35, 1.9, 1.0, "Model $M_{t+1}$", BLUE)
    for left in (2.0, 4.65, 7.3):
        _arrow(axes, (left, 2.95), (left + 0.75, 2.95))
    _arrow(axes, (9.0, 2.35), (7.3, 0.85), bend=-0.25)
    _arrow(axes, (5.4, 0.85), (3.7, 2.35), bend=-0.25)
    axes.text(
        3.05,
        1.0,
        "next round:\nbetter correct answers,\nsame incorrect ones",
        ha="center",
        va="center",
        fontsize=9.5,
        style="italic",
    )
    axes.text(
        9.0,
        0.3,
        "measured on TruthfulQA-style\nquestions it never saw",
        ha="center",
        va="center",
        fontsize=9.5,
        style="italic",
    )
    return figure


def _box(axes: Axes, x: float, y: float, w: float, h: float, text: str, colour: str) -> None:
    axes.add_patch(
        FancyBboxPatch(
            (x, y),
            w,
            h,
            boxstyle="round,pad=0.02,rounding_size=0.12",
            facecolor=colour + "22",
            edgecolor=colour,
            linewidth=1.8,
        )
    )
    axes.text(x + w / 2, y + h / 2, text, ha="center", va="center", fontsize=10.5)


def _arrow(
    axes: Axes, start: tuple[float, float], end: tuple[float, float], bend: float = 0.0
) -> None:
    axes.add_patch(
        FancyArrowPatch(
            start,
            end,
            arrowstyle="-|>",
            mutation_scale=14,
            linewidth=1.4,
            color="#333333",
            connectionstyle=f"arc3,rad={bend}",
        )
    )


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


def plot_training(log: Sequence[Mapping[str, Any]], title: str = "") -> Figure:
    """Show a round's loss, margin and log-probabilities, for training and held-out pairs."""
    figure, axes = new_axes(1, 3, width=10.5, height=3.1)
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
        results: ``{benchmark: {model label: result}}`` as :func:`grath_utils.loop.results` returns.
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


def _model_name(label: str) -> str:
    return "base" if label == "base" else f"round {int(label.rsplit('_', 1)[1]) + 1}"
