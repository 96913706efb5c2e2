"""Drawings of ideas, for the notebooks and the README: boxes, arrows, tokens, made-up scores.

Colours and type are those of :mod:`.plots`, which draws what was measured.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from difflib import SequenceMatcher

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

from grath_utils.figures.plots import BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, VERMILION, new_axes


def _canvas(
    *, width: float, height: float, x: tuple[float, float], y: tuple[float, float]
) -> tuple[Figure, Axes]:
    """Return a figure without an axis to draw on; sizes in inches, ``x`` and ``y`` its corners."""
    figure, axes = new_axes(width=width, height=height)
    axes.set_axis_off()
    axes.set_xlim(*x)
    axes.set_ylim(*y)
    return figure, axes


def draw_loop() -> Figure:
    """Draw the GRATH loop: questions, pairs, DPO, a more truthful model, and round again."""
    figure, axes = _canvas(width=8.2, height=3.3, x=(0, 10), y=(0, 4))
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


def _box(
    axes: Axes,
    x: float,
    y: float,
    w: float,
    h: float,
    text: str,
    colour: str,
    hatch: str = "",
) -> None:
    shape = {"boxstyle": "round,pad=0.02,rounding_size=0.12"}
    fill = {"facecolor": colour + "22", "edgecolor": "none"}
    axes.add_patch(FancyBboxPatch((x, y), w, h, **shape, **fill))
    if hatch:  # lighter than the outline, so that the text stays readable
        lines = {"facecolor": "none", "edgecolor": colour + "44", "linewidth": 0, "hatch": hatch}
        axes.add_patch(FancyBboxPatch((x, y), w, h, **shape, **lines))
    outline = {"facecolor": "none", "edgecolor": colour, "linewidth": 1.8}
    axes.add_patch(FancyBboxPatch((x, y), w, h, **shape, **outline))
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


def draw_rounds(iterations: int = 2) -> Figure:
    """Draw what each round keeps and what it writes anew, and which model does the writing."""
    figure, axes = _canvas(
        width=2.0 + 3.6 * iterations, height=2.7, x=(0, 1.4 + 3.3 * iterations), y=(0.9, 3.5)
    )
    rows = ((2.1, "correct answers", BLUE), (1.1, "incorrect answers", VERMILION))
    _box(axes, 0.05, 1.6, 0.85, 0.9, "base\n$M_0$", GREY)
    for t in range(iterations):
        left = 1.3 + 3.3 * t
        for bottom, text, colour in rows:
            fresh = t == 0 or bottom > 2
            label = f"{text}\n{'written' if fresh else 'kept'}"
            _box(axes, left, bottom, 1.5, 0.85, label, colour, hatch="" if fresh else "///")
            _arrow(axes, (left + 1.5, bottom + 0.42), (left + 2.05, 2.05))
        _box(axes, left + 2.05, 1.6, 0.85, 0.9, f"DPO\n→ $M_{{{t + 1}}}$", GREEN)
        _arrow(axes, (left - 0.4, 2.05), (left, 2.5))
        if t == 0:
            _arrow(axes, (left - 0.4, 2.05), (left, 1.55))
        axes.text(left + 0.75, 3.2, f"round {t + 1}", ha="center", weight="bold")
    return figure


def draw_dpo_step() -> Figure:
    """Draw one DPO step: four log-probabilities become one margin and one loss."""
    figure, axes = _canvas(width=8.6, height=3.2, x=(0, 11), y=(0, 4))
    _box(axes, 0.1, 2.5, 2.0, 0.9, "prompt + chosen\n$(x, y_w)$", BLUE)
    _box(axes, 0.1, 0.6, 2.0, 0.9, "prompt + rejected\n$(x, y_l)$", VERMILION)
    _box(axes, 3.0, 2.5, 1.9, 0.9, "policy $\\pi_\\theta$\n(trained)", GREEN)
    _box(axes, 3.0, 0.6, 1.9, 0.9, "reference $\\pi_{ref}$\n(fixed)", GREY)
    _box(axes, 5.9, 1.5, 2.3, 1.0, "4 summed\nlog-probabilities", ORANGE)
    _box(axes, 9.1, 1.5, 1.7, 1.0, "margin\n→ loss", PURPLE)
    for y in (2.95, 1.05):
        for target in (2.95, 1.05):
            _arrow(axes, (2.1, y), (3.0, target))
        _arrow(axes, (4.9, y), (5.9, 2.2 if y > 2 else 1.8))
    _arrow(axes, (8.2, 2.0), (9.1, 2.0))
    _arrow(axes, (9.9, 2.5), (4.0, 3.4), bend=0.3)
    axes.text(7.0, 3.1, "gradient, to the adapter only", fontsize=9.5, style="italic", ha="center")
    return figure


def draw_qlora() -> Figure:
    """Draw what QLoRA stores for one linear layer: 4-bit codes, block scales, two thin matrices."""
    figure, axes = _canvas(width=8.6, height=2.9, x=(0, 11), y=(0, 3.6))
    _box(axes, 0.1, 0.6, 2.6, 2.4, "frozen $W$\n4-bit codes\n(NF4 levels)", GREY)
    _box(axes, 2.9, 0.6, 0.9, 2.4, "1 scale\nper 64", SKY)
    axes.text(4.2, 1.8, "+", fontsize=20, ha="center", va="center")
    axes.text(4.95, 1.8, r"$\frac{\alpha}{r}\ \times$", fontsize=15, ha="center", va="center")
    _box(axes, 5.5, 0.6, 0.6, 2.4, "$B$", GREEN)
    _box(axes, 6.3, 1.5, 2.6, 0.6, "$A$", GREEN)
    axes.text(9.2, 2.4, "trained,\n16 or 32 bits", fontsize=10, va="center")
    axes.text(9.2, 1.1, "$B = 0$ at first:\nnothing changes", fontsize=10, va="center")
    axes.text(1.9, 0.2, "about 4.1 bits a weight, no gradient", fontsize=10, ha="center")
    axes.text(7.2, 0.2, "rank $r$: a few percent of the weights", fontsize=10, ha="center")
    return figure


def draw_tokens(
    tokens: Sequence[str], mask: Sequence[int], *, colour: str = BLUE, title: str = ""
) -> Figure:
    """Draw a tokenized sequence as boxes; those that the loss sees are coloured and underlined.

    Args:
        tokens: the text of each token.
        mask: 1 where the loss sees the token.
        colour: of those tokens.
        title: above the drawing.
    """
    per_line = 88.0
    lines = _wrap(tokens, per_line)
    figure, axes = _canvas(
        width=9.0, height=0.5 + 0.36 * len(lines), x=(0, per_line), y=(-len(lines), 0.1)
    )
    seen = iter(mask)
    for row, line in enumerate(lines):
        for x, width, token in line:
            _token(axes, x, -row, width, token, colour if next(seen) else "")
    if title:
        axes.set_title(title, fontsize=10.5, loc="left")
    return figure


def draw_pair(question: Sequence[str], correct: Sequence[str], incorrect: Sequence[str]) -> Figure:
    """Draw the anatomy of a pair: which tokens its two sides share, and which tell them apart.

    Only the coloured tokens differ; in the incorrect answer they are hatched as well.

    Args:
        question: its words or tokens.
        correct: those of the correct answer, which DPO will call chosen.
        incorrect: those of the incorrect answer, rejected.
    """
    matcher = SequenceMatcher(None, correct, incorrect, autojunk=False)
    shared = matcher.get_matching_blocks()
    same = [{i for m in shared for i in range(m[side], m[side] + m.size)} for side in (0, 1)]
    rows = [
        ("question", question, set(range(len(question))), GREY),
        ("correct\n(chosen)", correct, same[0], BLUE),
        ("incorrect\n(rejected)", incorrect, same[1], VERMILION),
    ]
    laid = [(name, _wrap(tokens, 74.0), plain, colour) for name, tokens, plain, colour in rows]
    height = sum(len(lines) + 0.5 for _, lines, _, _ in laid)
    figure, axes = _canvas(width=9.0, height=0.3 + 0.36 * height, x=(-14, 74), y=(-height, 0.1))
    top = 0.0
    for name, lines, plain, colour in laid:
        axes.text(-14, top - 0.5, name, va="center", fontsize=10, color=colour, weight="bold")
        number = 0
        for line in lines:
            for x, width, token in line:
                differs = number not in plain
                twice = "///" if differs and colour == VERMILION else ""
                _token(axes, x, top, width, token, colour if differs else "", hatch=twice)
                number += 1
            top -= 1
        top -= 0.5
    return figure


def _wrap(tokens: Sequence[str], per_line: float) -> list[list[tuple[float, float, str]]]:
    """Lay tokens out in lines; return (x, width, shown text) of each, in characters."""
    lines: list[list[tuple[float, float, str]]] = [[]]
    used = 0.0
    for token in tokens:
        shown = token.replace("\n", "\u21b5").replace(" ", "\u00b7")
        width = len(shown) + 1.4
        if used and used + width > per_line:
            lines.append([])
            used = 0.0
        lines[-1].append((used, width, shown))
        used += width
    return lines


def _token(
    axes: Axes, x: float, top: float, width: float, text: str, colour: str, *, hatch: str = ""
) -> None:
    """Draw one token as a box; one with a colour is underlined as well."""
    w = width - 0.3
    face = colour + "33" if colour else "#f0f0f0"
    axes.add_patch(Rectangle((x, top - 0.9), w, 0.72, facecolor=face, linewidth=0))
    if hatch:
        lines = {"facecolor": "none", "edgecolor": colour + "55", "linewidth": 0, "hatch": hatch}
        axes.add_patch(Rectangle((x, top - 0.9), w, 0.72, **lines))
    if colour:
        axes.plot([x, x + w], [top - 0.9] * 2, color=colour, linewidth=2)
    axes.text(
        x + w / 2,
        top - 0.54,
        text.replace("$", r"\$"),
        ha="center",
        va="center",
        fontsize=8.5,
        family="monospace",
        color="#111111" if colour else "#555555",
    )


def draw_mc_scoring(
    choices: Sequence[str], scores: Sequence[float], labels: Sequence[int]
) -> Figure:
    """Draw how MC1, MC2 and MC3 read the same scores: a duel, a share, and a count.

    Args:
        choices: answer texts; the first is MC1's one true answer.
        scores: summed log-probability of each (nats).
        labels: 1 for a true answer, 0 for a false one.
    """
    figure, (left, right) = new_axes(
        1, 2, width=9.6, height=1.3 + 0.36 * len(choices), width_ratios=(3, 2)
    )  # fmt: skip
    best_false = max(s for s, y in zip(scores, labels, strict=True) if not y)
    for i, (score, label) in enumerate(zip(scores, labels, strict=True)):
        wins = label and score > best_false
        left.plot([score], [i], "o" if label else "X", color=BLUE if label else ORANGE,
                  markersize=9, markerfacecolor=None if wins or not label else "white")  # fmt: skip
    left.axvline(best_false, color=ORANGE, linestyle="--", linewidth=1.2)
    left.annotate("best false answer", (best_false, len(choices) - 0.4), (4, 0),
                  textcoords="offset points", fontsize=9, va="center")  # fmt: skip
    kinds = ["true" if label else "false" for label in labels]
    names = [f"{c}  ({k})" for c, k in zip(choices, kinds, strict=True)]
    left.set_yticks(range(len(choices)), [textwrap.fill(name, 40) for name in names])
    left.set_ylim(len(choices) - 0.1, -0.6)
    left.margins(x=0.12)
    left.set_xlabel("summed log-probability (nats)")
    left.grid(axis="y", visible=False)
    wins = [s > best_false for s, y in zip(scores, labels, strict=True) if y]
    left.set_title(
        f"MC1: does the first true one pass the line?  {int(wins[0])}\n"
        f"MC3: which share of the true ones does?  {sum(wins)} of {len(wins)}",
        fontsize=10,
        loc="left",
    )
    weights = [math.exp(s - max(scores)) for s in scores]
    shares = [w / sum(weights) for w in weights]
    begin = 0.0
    for share, label in sorted(zip(shares, labels, strict=True), key=lambda x: (-x[1], -x[0])):
        bar = right.barh([0], [share], left=begin, height=0.5, edgecolor="white", linewidth=1.5,
                         color=BLUE if label else ORANGE, hatch="" if label else "///")  # fmt: skip
        begin += share
        if share > 0.08:
            behind = {"facecolor": "white", "linewidth": 0, "pad": 1.5}  # a hatch hides text
            right.bar_label(
                bar,
                [f"{share:.0%}"],
                label_type="center",
                fontsize=9.5,
                color="white" if label else "black",
                bbox=None if label else behind,
            )
    mc2 = sum(share for share, label in zip(shares, labels, strict=True) if label)
    right.plot([mc2, mc2], [-0.32, 0.32], color="black", linewidth=1.5)
    right.annotate(f"{mc2:.3f}", (mc2, 0.34), ha="center", va="bottom", fontsize=10)
    right.set_xlim(0, 1)
    right.set_ylim(-1, 1)
    right.set_yticks([])
    right.grid(visible=False)
    right.spines["left"].set_visible(False)
    right.set_xlabel("share of the probability (false: hatched)")
    right.set_title("MC2: how much lies on true ones?", fontsize=10, loc="left")
    return figure
