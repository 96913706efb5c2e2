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

Corners = tuple[float, float, float, float]  # left, bottom, width, height


def _canvas(width: float, height: float, x: tuple, y: tuple) -> tuple[Figure, Axes]:
    """Return a figure without an axis to draw on: inches, and the limits of ``x`` and ``y``."""
    figure, axes = new_axes(width=width, height=height)
    axes.set_axis_off()
    axes.set(xlim=x, ylim=y)
    return figure, axes


def _box(axes: Axes, corners: Corners, text: str, colour: str, *, hatched: bool = False) -> None:
    x, y, width, height = corners
    looks = [{"facecolor": colour + "22", "edgecolor": "none"}]
    if hatched:  # lighter than the outline, so that the text stays readable
        lines = {"edgecolor": colour + "44", "linewidth": 0, "hatch": "///"}
        looks.append({"facecolor": "none", **lines})
    looks.append({"facecolor": "none", "edgecolor": colour, "linewidth": 1.8})
    for look in looks:
        shape = "round,pad=0.02,rounding_size=0.12"
        axes.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=shape, **look))
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=10.5)


def _arrow(axes: Axes, start: tuple, end: tuple, bend: float = 0.0) -> None:
    look = {"arrowstyle": "-|>", "mutation_scale": 14, "linewidth": 1.4, "color": "#333333"}
    axes.add_patch(FancyArrowPatch(start, end, connectionstyle=f"arc3,rad={bend}", **look))


def _caption(axes: Axes, x: float, y: float, text: str, va: str = "center") -> None:
    axes.text(x, y, text, ha="center", va=va, fontsize=9.5, style="italic")


def draw_loop() -> Figure:
    """Draw the GRATH loop: questions, pairs, DPO, a more truthful model, and round again."""
    figure, axes = _canvas(8.2, 3.3, x=(0, 10), y=(0, 4))
    _box(axes, (0.1, 2.35, 1.9, 1.2), "Questions\nother domain,\nno answers", GREY)
    _box(axes, (2.75, 2.35, 1.9, 1.2), "Model $M_t$\nwrites answers", BLUE)
    _box(axes, (5.4, 2.35, 1.9, 1.2), "Pairs\ncorrect / incorrect", ORANGE)
    _box(axes, (8.05, 2.35, 1.9, 1.2), "DPO\nprefer correct", GREEN)
    _box(axes, (5.4, 0.35, 1.9, 1.0), "Model $M_{t+1}$", BLUE)
    for left in (2.0, 4.65, 7.3):
        _arrow(axes, (left, 2.95), (left + 0.75, 2.95))
    _arrow(axes, (9.0, 2.35), (7.3, 0.85), bend=-0.25)
    _arrow(axes, (5.4, 0.85), (3.7, 2.35), bend=-0.25)
    _caption(axes, 3.05, 1.0, "next round:\nbetter correct answers,\nsame incorrect ones")
    _caption(axes, 9.0, 0.3, "measured on TruthfulQA-style\nquestions it never saw")
    return figure


def draw_rounds(iterations: int = 2) -> Figure:
    """Draw what each round keeps and what it writes again, and which model does the writing."""
    width, right = 2.0 + 3.6 * iterations, 1.4 + 3.3 * iterations
    figure, axes = _canvas(width, 2.7, x=(0, right), y=(0.9, 3.5))
    _box(axes, (0.05, 1.6, 0.85, 0.9), "base\n$M_0$", GREY)
    for t in range(iterations):
        left = 1.3 + 3.3 * t
        for bottom, text, colour, kept in (
            (2.1, "correct answers", BLUE, False),
            (1.1, "incorrect answers", VERMILION, t > 0),
        ):
            label = f"{text}\n{'kept' if kept else 'written'}"
            _box(axes, (left, bottom, 1.5, 0.85), label, colour, hatched=kept)
            _arrow(axes, (left + 1.5, bottom + 0.42), (left + 2.05, 2.05))
            if not kept:
                _arrow(axes, (left - 0.4, 2.05), (left, 2.5 if colour == BLUE else 1.55))
        _box(axes, (left + 2.05, 1.6, 0.85, 0.9), f"DPO\n→ $M_{{{t + 1}}}$", GREEN)
        axes.text(left + 0.75, 3.2, f"round {t + 1}", ha="center", weight="bold")
    return figure


def draw_dpo_step() -> Figure:
    """Draw one DPO step: four log-probabilities become one margin and one loss."""
    figure, axes = _canvas(8.6, 3.2, x=(0, 11), y=(0, 4))
    _box(axes, (0.1, 2.5, 2.0, 0.9), "prompt + chosen\n$(x, y_w)$", BLUE)
    _box(axes, (0.1, 0.6, 2.0, 0.9), "prompt + rejected\n$(x, y_l)$", VERMILION)
    _box(axes, (3.0, 2.5, 1.9, 0.9), "policy $\\pi_\\theta$\n(trained)", GREEN)
    _box(axes, (3.0, 0.6, 1.9, 0.9), "reference $\\pi_{ref}$\n(fixed)", GREY)
    _box(axes, (5.9, 1.5, 2.3, 1.0), "4 summed\nlog-probabilities", ORANGE)
    _box(axes, (9.1, 1.5, 1.7, 1.0), "margin\n→ loss", PURPLE)
    for y in (2.95, 1.05):
        for target in (2.95, 1.05):
            _arrow(axes, (2.1, y), (3.0, target))
        _arrow(axes, (4.9, y), (5.9, 2.2 if y > 2 else 1.8))
    _arrow(axes, (8.2, 2.0), (9.1, 2.0))
    _arrow(axes, (9.9, 2.5), (4.0, 3.4), bend=0.3)
    _caption(axes, 7.0, 3.1, "gradient, to the adapter only", va="baseline")
    return figure


def draw_qlora() -> Figure:
    """Draw what QLoRA stores for one linear layer: 4-bit codes, block scales, two thin matrices."""
    figure, axes = _canvas(8.6, 2.9, x=(0, 11), y=(0, 3.6))
    _box(axes, (0.1, 0.6, 2.6, 2.4), "frozen $W$\n4-bit codes\n(NF4 levels)", GREY)
    _box(axes, (2.9, 0.6, 0.9, 2.4), "1 scale\nper 64", SKY)
    axes.text(4.2, 1.8, "+", fontsize=20, ha="center", va="center")
    axes.text(4.95, 1.8, r"$\frac{\alpha}{r}\ \times$", fontsize=15, ha="center", va="center")
    _box(axes, (5.5, 0.6, 0.6, 2.4), "$B$", GREEN)
    _box(axes, (6.3, 1.5, 2.6, 0.6), "$A$", GREEN)
    axes.text(9.2, 2.4, "trained,\n16 or 32 bits", fontsize=10, va="center")
    axes.text(9.2, 1.1, "$B = 0$ at first:\nnothing changes", fontsize=10, va="center")
    axes.text(1.9, 0.2, "about 4.1 bits a weight, no gradient", fontsize=10, ha="center")
    axes.text(7.2, 0.2, "rank $r$: a few percent of the weights", fontsize=10, ha="center")
    return figure


def draw_tokens(
    tokens: Sequence[str], mask: Sequence[int], *, colour: str = BLUE, title: str = ""
) -> Figure:
    """Draw the texts of tokens as boxes; where the mask is 1, coloured and underlined."""
    lines = _wrap(tokens, mask, 88)
    height = 0.5 + 0.36 * len(lines)
    figure, axes = _canvas(9.0, height, x=(0, 88), y=(-len(lines), 0.1))
    _draw_lines(axes, lines, 0, colour)
    axes.set_title(title, fontsize=10.5, loc="left")
    return figure


def draw_pair(question: Sequence[str], correct: Sequence[str], incorrect: Sequence[str]) -> Figure:
    """Draw the anatomy of a pair, given as words or tokens: what its two sides do not share.

    Only the coloured tokens differ; in the incorrect answer they are hatched as well.
    """
    differs = [1] * len(correct), [1] * len(incorrect)
    for match in SequenceMatcher(None, correct, incorrect, autojunk=False).get_matching_blocks():
        for marks, start in zip(differs, match[:2], strict=True):
            marks[start : start + match.size] = [0] * match.size
    parts = [
        ("question", GREY, _wrap(question, [0] * len(question), 74)),
        ("correct\n(chosen)", BLUE, _wrap(correct, differs[0], 74)),
        ("incorrect\n(rejected)", VERMILION, _wrap(incorrect, differs[1], 74)),
    ]
    height = sum(len(lines) + 0.5 for _, _, lines in parts)
    figure, axes = _canvas(9.0, 0.3 + 0.36 * height, x=(-14, 74), y=(-height, 0.1))
    top = 0.0
    for name, colour, lines in parts:
        axes.text(-14, top - 0.5, name, va="center", fontsize=10, color=colour, weight="bold")
        _draw_lines(axes, lines, top, colour, hatched=colour == VERMILION)
        top -= len(lines) + 0.5
    return figure


def _wrap(
    tokens: Sequence[str], marks: Sequence[int], per_line: float
) -> list[list[tuple[float, float, str, int]]]:
    """Lay tokens out in lines; return (x, width, shown text, mark) of each, in characters."""
    lines, used = [[]], 0.0
    for token, mark in zip(tokens, marks, strict=True):
        shown = token.replace("\n", "\u21b5").replace(" ", "\u00b7")
        width = len(shown) + 1.4
        if used and used + width > per_line:
            lines.append([])
            used = 0.0
        lines[-1].append((used, width - 0.3, shown, mark))
        used += width
    return lines


def _draw_lines(
    axes: Axes, lines: Sequence[Sequence], top: float, colour: str, *, hatched: bool = False
) -> None:
    """Draw lines of tokens as boxes; those with a mark are coloured and underlined."""
    for row, line in enumerate(lines):
        y = top - row
        for x, width, text, mark in line:
            face, ink = (colour + "33", "#111111") if mark else ("#f0f0f0", "#555555")
            corner = (x, y - 0.9)
            axes.add_patch(Rectangle(corner, width, 0.72, facecolor=face, linewidth=0))
            if mark and hatched:
                look = {"facecolor": "none", "edgecolor": colour + "55", "hatch": "///"}
                axes.add_patch(Rectangle(corner, width, 0.72, linewidth=0, **look))
            if mark:
                axes.plot([x, x + width], [y - 0.9] * 2, color=colour, linewidth=2)
            look = {"ha": "center", "va": "center", "fontsize": 8.5, "family": "monospace"}
            axes.text(x + width / 2, y - 0.54, text.replace("$", r"\$"), color=ink, **look)


def draw_mc_scoring(
    choices: Sequence[str], scores: Sequence[float], labels: Sequence[int]
) -> Figure:
    """Draw how MC1, MC2 and MC3 read the same scores: a duel, a share, and a count.

    Args:
        choices: answer texts; the first is MC1's one true answer.
        scores: summed log-probability of each (nats).
        labels: 1 for a true answer, 0 for a false one.
    """
    height = 1.3 + 0.36 * len(choices)
    figure, (left, right) = new_axes(1, 2, width=9.6, height=height, width_ratios=(3, 2))
    answers = list(zip(choices, scores, labels, strict=True))
    best_false = max(score for _, score, label in answers if not label)
    wins = [score > best_false for _, score, label in answers if label]
    for i, (_, score, label) in enumerate(answers):
        mark, colour = ("o", BLUE) if label else ("X", ORANGE)
        face = "white" if label and score <= best_false else colour
        left.plot([score], [i], mark, color=colour, markersize=9, markerfacecolor=face)
    left.axvline(best_false, color=ORANGE, linestyle="--", linewidth=1.2)
    place = {"xytext": (4, 0), "textcoords": "offset points", "va": "center"}
    left.annotate("best false answer", (best_false, len(choices) - 0.4), fontsize=9, **place)
    names = [f"{choice}  ({'true' if label else 'false'})" for choice, _, label in answers]
    left.set_yticks(range(len(names)), [textwrap.fill(name, 40) for name in names])
    left.set_ylim(len(names) - 0.1, -0.6)
    left.margins(x=0.12)
    left.set_xlabel("summed log-probability (nats)")
    left.grid(axis="y", visible=False)
    left.set_title(
        f"MC1: does the first true one pass the line?  {int(wins[0])}\n"
        f"MC3: which share of the true ones does?  {sum(wins)} of {len(wins)}",
        fontsize=10,
        loc="left",
    )
    weights = [math.exp(score - max(scores)) for score in scores]
    shares = [(y, weight / sum(weights)) for y, weight in zip(labels, weights, strict=True)]
    begin = 0.0
    for label, share in sorted(shares, reverse=True):
        colour, hatch = (BLUE, "") if label else (ORANGE, "///")
        look = {"color": colour, "hatch": hatch, "edgecolor": "white", "linewidth": 1.5}
        bar = right.barh([0], [share], left=begin, height=0.5, **look)
        begin += share
        if share > 0.08:
            behind = {"facecolor": "white", "linewidth": 0, "pad": 1.5}  # a hatch hides text
            ink = {"color": "white"} if label else {"color": "black", "bbox": behind}
            right.bar_label(bar, [f"{share:.0%}"], label_type="center", fontsize=9.5, **ink)
    mc2 = sum(share for label, share in shares if label)
    right.plot([mc2, mc2], [-0.32, 0.32], color="black", linewidth=1.5)
    right.annotate(f"{mc2:.3f}", (mc2, 0.34), ha="center", va="bottom", fontsize=10)
    right.set(xlim=(0, 1), ylim=(-1, 1), yticks=[])
    right.grid(visible=False)
    right.spines["left"].set_visible(False)
    right.set_xlabel("share of the probability (false: hatched)")
    right.set_title("MC2: how much lies on true ones?", fontsize=10, loc="left")
    return figure
