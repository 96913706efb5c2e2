"""Figures of what was measured: one function each, from plain rows to a matplotlib figure.

One thing has one colour in all figures, of those that colour-blind readers tell apart (Okabe and
Ito's): the two sides of a pair, the models, the arms. All else is black and grey. Colour is never
the only sign: line style, marker, hatch or label says the same in a grey print. Every interval
shown is 95 %, and two strokes mark an axis that does not begin at 0. A *result* is what
:func:`.measure.evaluate` returns, a *log* the rows of ``training_log.jsonl``.
"""

from __future__ import annotations

import math
import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from grath_utils.evaluation.blind_rules import chance_level
from grath_utils.pairs.audit import wilson
from grath_utils.text import in_percent

Measured = Mapping[str, Any]
Numbers = Sequence[float]
Interval = Numbers | None  # its two ends
Bars = Mapping[str, Mapping[str, float]]  # name of a bar -> part -> size
Looks = Mapping[str, tuple[str, str]]  # part -> colour, and the hatch that says the same in grey

BLUE, ORANGE, GREEN = "#0072B2", "#E69F00", "#009E73"
VERMILION, PURPLE, SKY, GREY = "#D55E00", "#CC79A7", "#56B4E9", "#666666"
LOGPROB = "summed log-probability (nats)"
# Of the base model, of round 1, and so on.
MODEL_COLOURS = ("#8C8C8C", "#66C2A5", "#00694E", "#003324", "#B5E5D5", "black")
MODEL_LOOKS = [{"fmt": m, "color": c} for m, c in zip("osD^vP", MODEL_COLOURS, strict=True)]
ARMS = {  # labels of a run's pairs -> the arm's name, colour and marker
    "own": ("the model judges", GREEN, "D"),
    "random": ("labels by a coin (placebo)", ORANGE, "o"),
    "annotated": ("annotated answers", SKY, "s"),
    "mismatched": ("another pair's question", "#882E72", "^"),
    "inverted": ("turned round", "black", "v"),
    "unjudged": ("not judged", "#8B5A2B", "P"),
}
CHOSEN = {"color": BLUE, "linestyle": "-", "markersize": 4}  # and what is correct or true
REJECTED = {"color": VERMILION, "linestyle": "--", "markersize": 4}  # and incorrect or false
TRAINING = {"color": GREY, "linestyle": "-", "markersize": 4}
HELD_OUT = {"color": "black", "linestyle": "--", "markersize": 4, "marker": "o"}
CHANCE = {"color": GREY, "linewidth": 1, "linestyle": "--"}
ZERO = {"color": GREY, "linewidth": 1, "linestyle": ":"}
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
    rows: int = 1, columns: int = 1, *, width: float = 7.2, height: float = 3.4, **options: Any
) -> tuple[Figure, Any]:
    """Return ``plt.subplots`` in the course's style; sizes in inches."""
    use_style()
    return plt.subplots(rows, columns, figsize=(width, height), layout="constrained", **options)


def _panels(n: int, columns: int, height: float, width: float) -> tuple[Figure, list[Axes]]:
    """Return a figure and its first ``n`` axes, in rows; the others are hidden."""
    rows = math.ceil(n / columns)
    figure, grid = new_axes(rows, columns, width=width, height=height * rows, squeeze=False)
    for spare in grid.flat[n:]:
        spare.set_axis_off()
    return figure, list(grid.flat[:n])


def _reach(value: float, ci95: Interval) -> np.ndarray | None:
    """Return how far an interval reaches below and above the value, as error bars want it."""
    return None if ci95 is None else np.clip([[value - ci95[0]], [ci95[1] - value]], 0, None)


def _changes(axes: Axes, rows: Sequence[tuple]) -> None:
    """Draw rows of (name, change or None, interval or None) around a line of no change, in points.

    A diamond's interval excludes 0, a circle's does not; without one it is hollow. As much is shown
    on both sides of 0, at least one point.
    """
    for i, (_, value, ci95) in enumerate(rows):
        look = {"fmt": "o", "color": GREY, "mfc": "white" if ci95 is None else GREY}
        if ci95 is not None and (ci95[0] > 0 or ci95[1] < 0):
            look = {"fmt": "D", "color": "black"}
        if value is not None:
            value, ci95 = 100 * value, ci95 and [100 * end for end in ci95]
            axes.errorbar(value, i, xerr=_reach(value, ci95), capsize=4, **look)
    axes.set_yticks(range(len(rows)), [name for name, _, _ in rows])
    axes.axvline(0, color="black", linewidth=1)
    reach = max(*map(abs, axes.get_xlim()), 1)
    axes.set(xlim=(-reach, reach), ylim=(len(rows) - 0.4, -0.6))


def _with_interval(intervals: Iterable[Interval]) -> str:
    return "with 95 % interval" + ("" if all(intervals) else " (a single item has none)")


def _model_order(label: str) -> int:
    """Return 0 for the base model and the number of a round's, from 1."""
    return 0 if label == "base" else int(label.rsplit("_", 1)[1]) + 1


def model_name(label: str) -> str:
    """Return what readers call a model: ``round 1`` for ``iter_0``."""
    return f"round {_model_order(label)}" if _model_order(label) else "base"


def _name_rows(axes: Axes, names: Sequence[str]) -> None:
    """Name the rows of a bar chart, the first one on top."""
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)


def _bars(axes: Axes, names: list[str], values: Numbers, looks: Sequence[tuple], fmt: str) -> None:
    """Draw a row with a bar and its value for each name; a look is a colour and a hatch.

    Bars of log-probabilities grow with the probability, too: from a floor below all of them.
    """
    low, high = min(values), max(values)
    floor = low - 0.15 * (high - low) - 1 if low < 0 else 0
    colours, hatches = zip(*looks, strict=True)
    look = {"color": colours, "hatch": hatches, "edgecolor": "white", "left": floor}
    bars = axes.barh(range(len(names)), np.subtract(values, floor), **look)
    axes.bar_label(bars, [fmt % value for value in values], padding=4)
    axes.set_xlim(floor, high + 0.2 * (high - floor))
    if floor:
        _mark_break(axes, (0.02, 0), (0.028, 0))
    _name_rows(axes, names)


def _mark_break(axes: Axes, *places: tuple[float, float]) -> None:
    """Put strokes on an axis that does not begin at 0; places in fractions of the axes."""
    look = {"marker": [(-1, -2), (1, 2)], "markersize": 11, "color": "black", "linestyle": "none"}
    axes.plot(*zip(*places, strict=True), transform=axes.transAxes, clip_on=False, **look)


def _chance(axes: Axes, level: float | None, name: str) -> None:
    """Draw a level to compare with, and mark an axis that begins above 0."""
    if level is not None:
        axes.axhline(level, **CHANCE)
        place = {"xycoords": ("axes fraction", "data"), "ha": "right", "va": "bottom"}
        axes.annotate(name, (1, level), fontsize=8, color=GREY, **place)
    if axes.get_ylim()[0] > 0:
        _mark_break(axes, (0, 0.02), (0, 0.045))


def _stack(axes: Axes, bars: Bars, looks: Looks) -> None:
    """Draw a bar of parts for each name."""
    for row, parts in enumerate(bars.values()):
        end = 0.0
        for part, size in parts.items():
            colour, hatch = looks[part]
            look = {"color": colour, "hatch": hatch, "edgecolor": "white", "linewidth": 0.6}
            axes.barh(row, size, left=end, height=0.62, **look)
            end += size
    _name_rows(axes, list(bars))


def _explain(figure: Figure, looks: Looks) -> None:
    """Say below a figure which colour and hatch is which part."""
    patches = [
        Patch(facecolor=c, hatch=h, edgecolor="white", label=p) for p, (c, h) in looks.items()
    ]
    figure.legend(handles=patches, loc="outside lower center", ncols=len(looks), fontsize=9)


def plot_reject_reasons(pairs: int, rejects: Sequence[Measured]) -> Figure:
    """Show how many completions became pairs, and why the others did not."""
    reasons = Counter(str(row["reason"]).replace("_", " ") for row in rejects).most_common()
    names, counts = zip(("usable pair", pairs), *reasons, strict=True)
    figure, axes = new_axes(height=1.0 + 0.36 * len(names))
    _bars(axes, names, counts, [("#444444", "")] + [("#bbbbbb", "///")] * len(reasons), "%d")
    axes.set_xlabel("completions")
    return figure


def plot_lengths(pairs: Sequence[Any]) -> Figure:
    """Compare the lengths of correct and incorrect answers: DPO would learn a difference."""
    figure, axes = new_axes(height=2.8)
    words = [[len(side.split()) for side in (pair.correct, pair.incorrect)] for pair in pairs]
    correct, incorrect = zip(*words, strict=True)
    look = {"bins": range(np.max(words) + 2), "histtype": "step", "linewidth": 2}
    axes.hist(correct, color=BLUE, label="correct", **look)
    axes.hist(incorrect, color=VERMILION, linestyle="--", label="incorrect", **look)
    axes.set(xlabel="words in the answer", ylabel="answers")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend()
    return figure


def plot_dpo_point(beta: float, contrast: float) -> Figure:
    """Show the DPO loss against the contrast that it is made from, and where one pair stands.

    The contrast is the log-ratio of the chosen answer minus that of the rejected one, in nats;
    beta scales it to the margin.
    """
    figure, axes = new_axes(height=3.2)
    places, beside, margin = np.linspace(-40, 40, 401), np.array([-12, 12]), beta * contrast
    loss, slope = np.logaddexp(0, -margin), -beta / (1 + math.exp(margin))
    curve = {"color": "black", "label": f"loss, beta = {beta:.3g}"}
    axes.plot(places, np.logaddexp(0, -beta * places), **curve)
    tangent = {"color": GREY, "linestyle": "--", "label": f"slope {slope:.3g} (tangent)"}
    axes.plot(contrast + beside, loss + slope * beside, **tangent)
    axes.plot(contrast, loss, "o", color="black")
    axes.set_title(f"margin {margin:+.2f}, loss {loss:.3f}", fontsize=10.5, loc="left")
    axes.set_xlabel("contrast: log-ratio of chosen minus log-ratio of rejected (nats)")
    # The pair stays in sight.
    axes.set(ylabel="loss (nats)", xlim=(-40, 40), ylim=(-0.15, max(4.2, 1.1 * loss)))
    axes.legend(loc="upper right", fontsize=9)
    return figure


def plot_training(log: Sequence[Measured], title: str = "") -> Figure:
    """Show a round's loss, margin, answers since step 0, and gradient norm."""
    figure, grid = new_axes(2, 2, width=8.5, height=6.2)
    loss, margin, answers, gradient = grid.flat
    train = [row for row in log if row["split"] == "train"]
    held_out = [row for row in log if row["split"] == "held_out"]
    for axis, key, label in ((loss, "loss", "DPO loss"), (margin, "margin", "reward margin")):
        _curve(axis, train, key, label="training", **TRAINING)
        _curve(axis, held_out, key, label="held-out questions", **HELD_OUT)
        axis.set_ylabel(f"{label} (nats)")
    loss.set_ylim(0, None)
    loss.axhline(math.log(2), **ZERO)
    loss.annotate("ln 2", (0.98, math.log(2)), xycoords=("axes fraction", "data"), color=GREY,
                  ha="right", va="bottom")  # fmt: skip
    margin.axhline(0, **ZERO)
    _answers(answers, held_out or train)
    of_what = "held-out" if held_out else "training: other pairs in each step"
    answers.set_title(of_what, fontsize=10)
    _curve(gradient, train, "grad_norm", label="before clipping", **TRAINING)
    gradient.set(ylabel="norm of the gradient", ylim=(0, None))
    for axis in grid.flat:
        axis.set_xlabel("optimiser step")
        axis.legend(fontsize=9)
    figure.suptitle(title)
    return figure


def _curve(axis: Axes, rows: Sequence[Measured], key: str, *, begin: int = 0, change: bool = False,
           **look: Any) -> None:  # fmt: skip
    """Draw a number of a training log, or its change, over its steps, where it was logged."""
    points = [(begin + row["step"], row[key]) for row in rows if key in row]
    if points:
        steps, values = zip(*points, strict=True)
        axis.plot(steps, np.subtract(values, values[0] if change else 0), **look)


def _answers(axis: Axes, rows: Sequence[Measured], begin: int = 0) -> None:
    """Draw by how much chosen and rejected answers have changed since a round's first row."""
    hidden = "_" if begin else ""  # one legend entry for all rounds
    how = {"begin": begin, "change": True}
    _curve(axis, rows, "logp_chosen", label=f"{hidden}chosen", marker="o", **how, **CHOSEN)
    _curve(axis, rows, "logp_rejected", label=f"{hidden}rejected", marker="s", **how, **REJECTED)
    if not begin:
        axis.axhline(0, **ZERO)
    axis.set_ylabel("log-probability since step 0 (nats)")


def plot_rounds(logs: Sequence[Sequence[Measured]]) -> Figure:
    """Show answers since each round's step 0, and the margin; held out where there are any."""
    figure, axes = new_axes(1, 2, width=9.6, height=3.3)
    begin = 0
    for t, log in enumerate(logs):
        rows = [row for row in log if row["split"] == "held_out"] or log
        _answers(axes[0], rows, begin)
        _curve(axes[1], rows, "margin", begin=begin, **HELD_OUT)
        end = begin + max(row["step"] for row in log)
        for axis in axes:
            axis.axvspan(begin, end, color=GREY, alpha=0.10 if t % 2 else 0.03, linewidth=0)
            axis.annotate(f"round {t + 1}", ((begin + end) / 2, 1), ha="center", va="bottom",
                          xycoords=("data", "axes fraction"), fontsize=9.5)  # fmt: skip
            axis.set_xlabel("optimiser step, all rounds")
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        begin = end
    axes[0].legend(fontsize=9)
    axes[1].set_ylabel("reward margin (nats)")
    axes[1].axhline(0, **ZERO)
    return figure


def plot_dashboard(panels: Sequence[tuple], columns: int = 4) -> Figure:
    """Show each of :func:`.dashboard.dashboard_panels` in a small panel, over the rounds."""
    columns = min(columns, len(panels))
    figure, axes = _panels(len(panels), columns, 2.9, width=2.1 * columns + 1.4)
    for axis, (title, unit, points, level, named) in zip(axes, panels, strict=True):
        for label, value, ci95 in points:
            place = _model_order(label)
            look = {"capsize": 4, "markersize": 6, **MODEL_LOOKS[place % len(MODEL_LOOKS)]}
            axis.errorbar(place, value, yerr=_reach(value, ci95), **look)
            if value != level:  # a line through a number
                _beside(axis, f"{value:.1f}", (place, value), size=8.5)
        places = [_model_order(label) for label, *_ in points]
        axis.set_xticks(places, [model_name(label) for label, *_ in points], fontsize=9)
        axis.set(ylabel=unit, xlim=(-0.5, max(places) + 0.8))
        axis.set_title(title, fontsize=10)
        axis.grid(axis="x", visible=False)
        _chance(axis, level, named)
    return figure


def plot_levels(levels: Numbers, weights: Numbers, codes: Sequence[int], shown: int = 16) -> Figure:
    """Show the levels of a 4-bit type over the weights of blocks, and how weights are rounded.

    ``levels`` are in [-1, 1], ``weights`` divided by the largest of their block; ``codes`` are the
    indices of the levels that the weights are rounded to, which the first ``shown`` show.
    """
    figure, (left, right) = new_axes(1, 2, width=10.0, height=3.3)
    left.hist(weights, bins=60, range=(-1, 1), color="#bbbbbb", density=True)
    before, after = weights[:shown], [levels[code] for code in codes[:shown]]
    places = range(len(before))
    for level in levels:
        left.axvline(level, color="black", linewidth=1)
        right.axhline(level, color=GREY, linewidth=0.5)
    right.vlines(places, before, after, color=GREY, linewidth=1.5)
    right.plot(places, before, "o", color=GREY, label="weight")
    right.plot(places, after, "_", color="black", markersize=13, mew=2.5, label="rounded")
    left.set(xlabel="weight / largest weight of its block", ylabel="density of the weights")
    left.set_title(f"the {len(levels)} levels (lines)", fontsize=10)
    right.set_xlabel(f"first {len(before)} weights of a row")
    right.set_title("each weight goes to its nearest level", fontsize=10)
    for axis in (left, right):
        axis.grid(visible=False)
    figure.legend(fontsize=9, loc="outside lower right", ncols=2)  # inside, it could hide a weight
    return figure


METRIC_NAMES = {
    "mc1": "MC1",
    "mc2": "MC2",
    "mc3": "MC3",
    "acc": "accuracy",
    "acc_norm": "accuracy\n(length-normalised)",
}


def _metric(name: str) -> str:
    return METRIC_NAMES.get(name, name).replace("\n", " ")


def plot_metrics(results: Mapping[str, Mapping[str, Measured]]) -> Figure:
    """Show every metric of every model of :func:`.state.results`, with its 95 % interval."""
    panels = []
    for benchmark, models in results.items():
        first = next(iter(models.values()))
        for metric in filter(METRIC_NAMES.get, first["metrics"]):
            points = [(label, *in_percent(result, metric)) for label, result in models.items()]
            title, level = f"{benchmark}\n{METRIC_NAMES[metric]}", chance_level(first, metric)
            panels.append((title, "", points, level, "chance"))
    figure = plot_dashboard(panels, len(panels))
    shown = _with_interval(ci95 for _, _, points, *_ in panels for *_, ci95 in points)
    figure.axes[0].set_ylabel(f"percent, {shown}")
    return figure


def plot_choices(
    choices: Sequence[str], scores: Numbers, labels: Sequence[int], *, unit: str = LOGPROB
) -> Figure:
    """Show the score of each answer to one question; false ones (label 0) are hatched.

    The more probable an answer, the longer its bar.
    """
    figure, axes = new_axes(width=8.6, height=0.9 + 0.42 * len(choices))
    kinds = ["true" if label else "false" for label in labels]
    names = [textwrap.fill(f"{c}  ({k})", 46) for c, k in zip(choices, kinds, strict=True)]
    looks = [(BLUE, "") if label else (VERMILION, "///") for label in labels]
    _bars(axes, names, scores, looks, "%.1f" if max(map(abs, scores)) > 1 else "%.3f")
    axes.set_xlabel(unit)
    return figure


def plot_differences(rows: Sequence[tuple[str, Measured]]) -> Figure:
    """Show paired changes with their 95 % intervals around the line of no change.

    A row is a name and a difference as :func:`.measure.compare` returns it.
    """
    figure, axes = new_axes(width=7.6, height=1.0 + 0.42 * len(rows))
    least = np.array([100 * (change["smallest_detectable"] or 0) for _, change in rows])
    axes.barh(range(len(rows)), 2 * least, left=-least, height=0.5, color=GREY, alpha=0.15)
    _changes(axes, [(name, change["value"], change["ci95"]) for name, change in rows])
    shown = _with_interval(change["ci95"] for _, change in rows)
    band = "grey band: true changes this small are missed more than once in five"
    axes.set_xlabel(f"change in points, {shown}\n({band})")
    return figure


def plot_sweep(panels: Sequence[tuple[str, Sequence[Measured]]]) -> Figure:
    """Show the change in every cell of a sweep: each seed, their mean, its interval over seeds.

    A panel is (title, cells) for one metric, with the same cells in all panels. A cell has
    ``name``, ``seeds`` (a value for each), ``mean`` and ``ci95`` (:func:`.t_interval`).
    """
    columns, n = min(2, len(panels)), len(panels[0][1])
    figure, axes = _panels(len(panels), columns, 1.1 + 0.34 * n, width=5.4 * columns)
    for place, (axis, (title, cells)) in enumerate(zip(axes, panels, strict=True)):
        for i, cell in enumerate(cells):
            for value in cell["seeds"]:
                axis.plot(100 * value, i + 0.22, "|", color=GREY, markersize=9)
        named = place % columns == 0
        _changes(axis, [(c["name"] if named else "", c["mean"], c["ci95"]) for c in cells])
        axis.set_title(title, fontsize=10.5)
    figure.supxlabel(
        "change from the base model, in points (ticks: seeds; marker: their mean, with 95 %\n"
        "interval over seeds; diamond: interval without 0; hollow: none: one seed, or equal ones)",
        fontsize=9.5,
    )
    return figure


def plot_arms(rows: Sequence[Measured]) -> Figure:
    """Show what each arm gains over the base and over the placebo: rows of ``recipe_arms.jsonl``.

    A marker is filled where the interval excludes 0.
    """
    tests = {f"{r['benchmark']}\n{_metric(r['metric'])}, n = {r['n']}": r for r in rows}
    tests = {(r["benchmark"], r["metric"]): name for name, r in tests.items()}
    arms, step = _arms(rows), len(_arms(rows)) + 1  # from a test to the next one
    height = 1.4 + 0.19 * step * len(tests)
    figure, axes = new_axes(1, 2, width=9.6, height=height, sharex=True, sharey=True)
    for row in rows:
        _, colour, marker = ARMS[row["arm"]]
        test = list(tests).index((row["benchmark"], row["metric"]))
        place = step * test + arms.index(row["arm"])
        for axis, gain in zip(axes, (row, row.get("over_random")), strict=True):
            if gain:
                value, (low, high) = gain["change"], gain["ci95"]
                look = {"fmt": marker, "color": colour, "capsize": 3}
                look["mfc"] = colour if low * high > 0 else "white"
                axis.errorbar(value, place, xerr=_reach(value, (low, high)), **look)
                _beside(axis, f"{value + 0:+.1f}", (high, place))
    for axis in axes:
        axis.axvline(0, color="black", linewidth=1)
    axes[0].set_xlabel("change from the base model (points)\n95 % interval; filled: without 0")
    axes[1].set_xlabel("gain over the placebo (points)\nthe same items, paired")
    middles = [step * i + (len(arms) - 1) / 2 for i in range(len(tests))]
    axes[0].set(yticks=middles, yticklabels=tests.values(), ylim=(step * len(tests) - 1, -1))
    _name_arms(figure, arms, linestyle="none")
    return figure


def _beside(axes: Axes, text: str, place: tuple[float, float], size: float = 8) -> None:
    """Write to the right of a place."""
    how = {"xytext": (7, 0), "textcoords": "offset points", "va": "center", "fontsize": size}
    axes.annotate(text, place, **how)


def _grouped(rows: Sequence[Measured], key: str) -> dict[Any, list[Measured]]:
    """Return rows by what they have under a key, in the order in which it first occurs."""
    return {k: [row for row in rows if row[key] == k] for k in dict.fromkeys(r[key] for r in rows)}


def _arms(rows: Sequence[Measured]) -> list[str]:
    return [arm for arm in ARMS if arm in _grouped(rows, "arm")]


def _name_arms(figure: Figure, arms: Sequence[str], **look: Any) -> None:
    """Say above a figure which colour and marker is which arm."""
    named = [ARMS[arm] for arm in arms]
    handles = [Line2D([], [], label=n, color=c, marker=m, **look) for n, c, m in named]
    figure.legend(handles=handles, loc="outside upper center", ncols=3, fontsize=9)


NO_DOSE = {"steps": 0, "change": 0, "ci95": (0, 0), "nats_true": 0, "nats_false": 0}


def plot_dose(rows: Sequence[Measured]) -> Figure:
    """Show what the arms change with the steps of training: rows of ``recipe_dose.jsonl``.

    For each benchmark its metrics with their 95 % bands, then by how many nats the true answers
    (solid) and the false ones (dashed) have moved.
    """
    tests, panels = _grouped(rows, "benchmark"), []
    for test, found in tests.items():
        for metric, some in _grouped(found, "metric").items():
            panels.append((some, f"{test}, {_metric(metric)}", {"change": "-"}))
        lines = {"nats_true": "-", "nats_false": "--"}
        panels.append((some, "log-probability of true\nanswers (dashed: false)", lines))
    columns = math.ceil(len(panels) / len(tests))
    figure, axes = _panels(len(panels), columns, 2.9, width=3.3 * columns)
    for axis, (some, title, lines) in zip(axes, panels, strict=True):
        for arm, doses in _grouped(some, "arm").items():
            _, colour, marker = ARMS[arm]
            doses = [NO_DOSE, *sorted(doses, key=lambda row: row["steps"])]
            steps = [row["steps"] for row in doses]
            for key, line in lines.items():
                look = {"color": colour, "marker": marker, "markersize": 5}
                axis.plot(steps, [row[key] for row in doses], line, **look)
            if "change" in lines:
                ends = zip(*(row["ci95"] for row in doses), strict=True)
                axis.fill_between(steps, *ends, color=colour, alpha=0.15, linewidth=0)
        axis.axhline(0, **ZERO)
        unit = "points" if "change" in lines else "nats"
        axis.set(xlabel="optimiser steps", ylabel=f"change ({unit})")
        axis.set_title(title, fontsize=10)
    _name_arms(figure, _arms(rows))
    return figure


KINDS = {"plain": "facts", "misconception": "popular errors"}


def plot_judge(rows: Sequence[Measured]) -> Figure:
    """Show how far each judge can be trusted: rows of ``recipe_sealed.jsonl``.

    For each judge and kind of question the share of the pairs that it keeps, and of how many of
    those it is right.
    """
    judges, kinds = list(_grouped(rows, "judge")), list(_grouped(rows, "kind"))
    figure, axes = new_axes(1, 2, width=9.6, height=1.3 + 0.62 * len(judges), sharey=True)
    for row in rows:
        i, kind = kinds.index(row["kind"]), KINDS.get(row["kind"], row["kind"])
        place = judges.index(row["judge"]) + 0.36 * i - 0.18
        label = f"{kind} (n = {row['pairs']})" if row["judge"] == judges[0] else ""
        look = {"fmt": "os"[i], "color": "black", "mfc": ("black", "white")[i], "capsize": 3}
        for axis, part, n in zip(axes, ("kept", "kept_right"), ("pairs", "kept"), strict=True):
            if row[n]:  # of nothing kept, nothing is right
                share, ends = 100 * row[part] / row[n], [100 * e for e in wilson(row[part], row[n])]
                axis.errorbar(share, place, xerr=_reach(share, ends), label=label, **look)
                above = {"xytext": (0, 5), "textcoords": "offset points", "ha": "center"}
                axis.annotate(f"{share:.0f}", (share, place), fontsize=8, **above)
    _name_rows(axes[0], judges)
    axes[0].set(xlabel="pairs that the judge keeps, percent", ylim=(len(judges) - 0.6, -0.6))
    axes[1].set_xlabel("of these, labelled right, percent (dashed: by a coin)")
    axes[1].axvline(50, **CHANCE)
    for axis in axes:
        axis.set_xlim(0, 100)
        axis.grid(axis="y", visible=False)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper left", ncols=2)
    return figure


def plot_controls(results: Mapping[str, Measured]) -> Figure:
    """Show every model's MC1 on a benchmark beside what question-blind rules reach on it."""
    controls = next(iter(results.values()))["controls"]
    rules = {rule: 100 * value for rule, value in controls.items() if rule != "uniform_mc2"}
    rows, n = range(len(results) + len(rules)), len(results)
    figure, axes = new_axes(width=7.8, height=1.0 + 0.36 * len(rows))
    for i, result in enumerate(results.values()):
        value, ci95 = in_percent(result, "mc1")
        axes.errorbar(value, i, xerr=_reach(value, ci95), capsize=4, **MODEL_LOOKS[i % 6])
    look = {"height": 0.55, "color": "#dddddd", "hatch": "///", "edgecolor": "white"}
    bars = axes.barh(rows[n:], rules.values(), **look)
    axes.bar_label(bars, fmt="%.1f", padding=5, fontsize=9)
    axes.axhline(n - 0.5, color=GREY, linewidth=0.8)
    axes.axvline(rules["chance"], **CHANCE)
    _name_rows(axes, [*map(model_name, results), *(rule.replace("_", " ") for rule in rules)])
    axes.set(xlim=(0, None), xlabel="MC1, percent (hatched: never read the question)")
    return figure


MEMORY_LOOKS: Looks = {
    "weights": (BLUE, ""),
    "adapter": (ORANGE, "...."),
    "gradient and optimiser": (VERMILION, "////"),
    "activations": (SKY, "\\\\\\\\"),
    "logits": (PURPLE, "xxxx"),
    "working space": ("#bbbbbb", ""),
}
STAGE_LOOKS: Looks = {
    "write pairs": (BLUE, ""),
    "train": (ORANGE, "////"),
    "measure": (PURPLE, "xxxx"),
    "evaluate": (SKY, "\\\\\\\\"),
}


def plot_memory(models: Mapping[str, Bars], limits: Mapping[str, float]) -> Figure:
    """Show where the memory of training goes: a panel for each model, a bar for each way.

    A bar has parts of ``MEMORY_LOOKS``; ``limits`` is what each of two devices holds. All in bytes.
    """
    rows = len(models) // 2
    figure, axes = new_axes(rows, 2, width=10.4, height=0.7 + 2.2 * rows)
    behind = {"facecolor": "white", "linewidth": 0, "pad": 1}  # a line may pass here
    beside = {"xytext": (5, 0), "textcoords": "offset points", "va": "center", "bbox": behind}
    for axis, (model, ways) in zip(axes.flat, models.items(), strict=True):
        bars = {way: {p: size / 1e9 for p, size in parts.items()} for way, parts in ways.items()}
        _stack(axis, bars, MEMORY_LOOKS)
        ends = [sum(parts.values()) for parts in bars.values()]
        for i, end in enumerate(ends):
            size = f"{end:,.0f} GB" if end > 100 else f"{end:.1f} GB"
            axis.annotate(size, (end, i), **beside)
        right = 1.25 * max(ends)
        devices = sorted((size / 1e9, name) for name, size in limits.items())
        for (size, name), side in zip(devices, ("right", "left"), strict=True):  # may be close
            if size < right:
                axis.axvline(size, color="black", linewidth=1.1, linestyle="--")
                axis.text(size, -0.52, f" {name} ", ha=side, va="bottom", fontsize=9)
        axis.set(title=model, xlim=(0, right), ylim=(len(ends) - 0.5, -0.95))
    for axis in axes.flat[-2:]:
        axis.set_xlabel("GB")
    _explain(figure, MEMORY_LOOKS)
    return figure


def plot_stage_times(runs: Bars) -> Figure:
    """Show where the hours of whole runs go, in percent: run -> kind of stage -> seconds."""
    shares = {
        name: {kind: 100 * s / sum(times.values()) for kind, s in times.items()}
        for name, times in runs.items()
    }
    figure, axes = new_axes(width=9.0, height=1.2 + 0.42 * len(runs))
    _stack(axes, shares, STAGE_LOOKS)
    axes.set(xlim=(0, 100), xlabel="percent of the run's time")
    _explain(figure, STAGE_LOOKS)
    return figure
