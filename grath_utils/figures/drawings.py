"""Drawings of ideas, for the notebooks and the README: boxes, arrows, tokens, made-up scores.

Colours and type are those of :mod:`.plots`, which draws what was measured: blue is correct and
chosen, vermilion incorrect and rejected, green what is trained, grey all else.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from difflib import SequenceMatcher
from typing import NamedTuple

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle
from scipy.special import softmax

from grath_utils.figures.plots import BLUE, GREEN, GREY, VERMILION, new_axes


def _canvas(width: float, height: float, x: tuple, y: tuple) -> tuple[Figure, Axes]:
    """Return a figure without an axis to draw on: inches, and the limits of ``x`` and ``y``."""
    figure, axes = new_axes(width=width, height=height)
    axes.set_axis_off()
    axes.set(xlim=x, ylim=y)
    return figure, axes


def _box(axes: Axes, corners: tuple, text: str, colour: str, hatch: str = "") -> None:
    """Draw a box; its ``corners`` are left, bottom, width and height."""
    x, y, width, height = corners
    for look in (  # the inside is lighter than the outline, so that the text stays readable
        {"facecolor": colour + "22", "edgecolor": colour + "44", "linewidth": 0, "hatch": hatch},
        {"facecolor": "none", "edgecolor": colour, "linewidth": 1.8},
    ):
        shape = "round,pad=0.02,rounding_size=0.12"
        axes.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=shape, **look))
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=10.5)


def _arrow(axes: Axes, start: tuple, end: tuple, bend: float = 0.0) -> None:
    look = {"arrowstyle": "-|>", "mutation_scale": 14, "linewidth": 1.4, "color": "#333333"}
    axes.add_patch(FancyArrowPatch(start, end, connectionstyle=f"arc3,rad={bend}", **look))


def _caption(axes: Axes, x: float, y: float, text: str) -> None:
    axes.text(x, y, text, ha="center", va="center", fontsize=9.5, style="italic")


def draw_loop() -> Figure:
    """Draw the GRATH loop: questions, pairs, DPO, a more truthful model, and round again."""
    figure, axes = _canvas(8.2, 3.3, x=(0, 10), y=(0, 4))
    _box(axes, (0.1, 2.35, 1.9, 1.2), "Questions\nother domain,\nno answers", GREY)
    _box(axes, (2.75, 2.35, 1.9, 1.2), "Model $M_t$\nwrites answers", GREEN)
    _box(axes, (5.4, 2.35, 1.9, 1.2), "Pairs\ncorrect / incorrect", GREY)
    _box(axes, (8.05, 2.35, 1.9, 1.2), "DPO\nprefer correct", GREY)
    _box(axes, (5.4, 0.35, 1.9, 1.0), "Model $M_{t+1}$", GREEN)
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
        done, hatch = ("kept", "///") if t else ("written", "")
        _box(axes, (left, 2.1, 1.5, 0.85), "correct answers\nwritten", BLUE)
        _box(axes, (left, 1.1, 1.5, 0.85), f"incorrect answers\n{done}", VERMILION, hatch)
        _arrow(axes, (left - 0.4, 2.05), (left, 2.5))
        if t == 0:
            _arrow(axes, (left - 0.4, 2.05), (left, 1.55))
        for y in (2.52, 1.52):
            _arrow(axes, (left + 1.5, y), (left + 2.05, 2.05))
        _box(axes, (left + 2.05, 1.6, 0.85, 0.9), f"DPO\n→ $M_{{{t + 1}}}$", GREEN)
        axes.text(left + 0.75, 3.2, f"round {t + 1}", ha="center", weight="bold")
    return figure


def draw_dpo_step() -> Figure:
    """Draw one DPO step: four log-probabilities become one margin and one loss."""
    figure, axes = _canvas(8.6, 3.2, x=(0, 11), y=(0, 4))
    _box(axes, (0.1, 2.5, 2.0, 0.9), "prompt + chosen\n$(x, y_w)$", BLUE)
    _box(axes, (0.1, 0.6, 2.0, 0.9), "prompt + rejected\n$(x, y_l)$", VERMILION)
    _box(axes, (3.0, 2.5, 1.9, 0.9), "policy $\\pi_\\theta$\n(trained)", GREEN)
    _box(axes, (3.0, 0.6, 1.9, 0.9), "reference $\\pi_{\\mathrm{ref}}$\n(fixed)", GREY)
    _box(axes, (5.9, 1.5, 2.3, 1.0), "4 summed\nlog-probabilities", GREY)
    _box(axes, (9.1, 1.5, 1.7, 1.0), "margin\n→ loss", GREY)
    for y in (2.95, 1.05):
        for target in (2.95, 1.05):
            _arrow(axes, (2.1, y), (3.0, target))
        _arrow(axes, (4.9, y), (5.9, 2.2 if y > 2 else 1.8))
    _arrow(axes, (8.2, 2.0), (9.1, 2.0))
    _arrow(axes, (9.9, 2.5), (4.0, 3.4), bend=0.3)
    axes.text(7.0, 3.1, "gradient, to the adapter only", ha="center", fontsize=9.5, style="italic")
    return figure


def draw_qlora() -> Figure:
    """Draw what QLoRA stores for one linear layer: 4-bit codes, block scales, two thin matrices."""
    figure, axes = _canvas(8.6, 2.9, x=(0, 11), y=(0, 3.6))
    _box(axes, (0.1, 0.6, 2.6, 2.4), "frozen $W$\n4-bit codes\n(NF4 levels)", GREY)
    _box(axes, (2.9, 0.6, 0.9, 2.4), "1 scale\nper 64", GREY)
    axes.text(4.2, 1.8, "+", fontsize=20, ha="center", va="center")
    axes.text(4.95, 1.8, r"$\frac{\alpha}{r}\ \times$", fontsize=15, ha="center", va="center")
    _box(axes, (5.5, 0.6, 0.6, 2.4), "$B$", GREEN)
    _box(axes, (6.3, 1.5, 2.6, 0.6), "$A$", GREEN)
    axes.text(9.2, 2.4, "trained,\n16 or 32 bits", fontsize=10, va="center")
    axes.text(9.2, 1.1, "$B = 0$ at first:\nnothing changes", fontsize=10, va="center")
    axes.text(1.9, 0.2, "about 4.1 bits a weight, no gradient", fontsize=10, ha="center")
    axes.text(7.2, 0.2, "rank $r$: under one percent of the weights", fontsize=10, ha="center")
    return figure


def draw_tokens(
    tokens: Sequence[str], mask: Sequence[int], *, colour: str = BLUE, title: str = ""
) -> Figure:
    """Draw the texts of tokens as boxes; where the mask is 1, coloured and underlined."""
    figure, axes = _canvas(9.0, 1.0, x=(0, 88), y=(-1, 0.1))
    bottom = _tokens(axes, tokens, [_Look(colour) if m else _Look() for m in mask], 0)
    axes.set_title(title, fontsize=10.5, loc="left")
    return _cut(figure, bottom, 0.5)


def draw_pair(question: Sequence[str], correct: Sequence[str], incorrect: Sequence[str]) -> Figure:
    """Draw the anatomy of a pair, given as words or tokens: what its two sides do not share.

    Only the coloured tokens differ; in the incorrect answer they are hatched as well.
    """
    differs = [1] * len(correct), [1] * len(incorrect)
    for match in SequenceMatcher(None, correct, incorrect, autojunk=False).get_matching_blocks():
        for marks, start in zip(differs, match[:2], strict=True):
            marks[start : start + match.size] = [0] * match.size
    figure, axes = _canvas(9.0, 1.0, x=(-14, 74), y=(-1, 0.1))
    y = 0.0
    for name, tokens, marks, colour, hatch in (
        ("question", question, [0] * len(question), GREY, ""),
        ("correct\n(chosen)", correct, differs[0], BLUE, ""),
        ("incorrect\n(rejected)", incorrect, differs[1], VERMILION, "///"),
    ):
        axes.text(-14, y - 0.5, name, va="center", fontsize=10, color=colour, weight="bold")
        looks = [_Look(colour, hatch) if mark else _Look() for mark in marks]
        y = _tokens(axes, tokens, looks, y) - 0.5
    return _cut(figure, y)


def draw_log_ratios(sides: Sequence[tuple[str, Sequence[str], Sequence[float]]]) -> Figure:
    """Draw the tokens of answers, coloured by their log pi/pi_ref, which stands below in nats.

    What training has done to an answer: purple tokens have become more probable, orange ones less,
    white ones did not move. A side is its name, the texts of its tokens, and their log-ratios.
    """
    figure, axes = _canvas(9.0, 1.0, x=(-16, 72), y=(-1, 0.1))
    reach, y = max(1.0, *(abs(ratio) for *_, ratios in sides for ratio in ratios)), 0.0
    for name, tokens, ratios in sides:
        axes.text(-16, y - 0.7, f"{name}\n{sum(ratios) + 0:+.1f} nats", va="center", fontsize=10)
        faces = (to_hex(colormaps["PuOr"](0.5 + 0.35 * ratio / reach)) for ratio in ratios)
        notes = (f"{round(ratio, 1) + 0:+.1f}" for ratio in ratios)
        looks = [_Look(face, note=note) for face, note in zip(faces, notes, strict=True)]
        y = _tokens(axes, tokens, looks, y) - 0.4
    return _cut(figure, y)


def _cut(figure: Figure, bottom: float, head: float = 0.3) -> Figure:
    """End a drawing of tokens where their last line ends; ``head`` is what stands above, inches."""
    figure.axes[0].set_ylim(bottom, 0.1)
    figure.set_figheight(head - 0.36 * bottom)
    return figure


class _Look(NamedTuple):
    """How a token is drawn: plain without a colour, on its colour with a note, else underlined."""

    colour: str = ""
    hatch: str = ""
    note: str = ""


def _tokens(axes: Axes, tokens: Sequence[str], looks: Sequence[_Look], y: float) -> float:
    """Draw tokens as boxes, from ``y`` down in as many lines as they need; return where they end.

    One unit is a character wide and a line high.
    """
    x, right = 0.0, axes.get_xlim()[1]
    line = 1.6 if any(look.note for look in looks) else 1
    for token, (colour, hatch, note) in zip(tokens, looks, strict=True):
        shown = token.replace("\n", "\u21b5").replace(" ", "\u00b7").replace("$", r"\$")
        width = max(len(token), len(note)) + 1.1
        if x and x + width + 0.3 > right:
            x, y = 0.0, y - line
        face, ink = (colour + "33", "#111111") if colour else ("#f0f0f0", "#555555")
        box = {"facecolor": colour if note else face, "edgecolor": f"{colour or GREY}55"}
        axes.add_patch(Rectangle((x, y - 0.9), width, 0.72, linewidth=0, hatch=hatch, **box))
        if colour and not note:
            axes.plot([x, x + width], [y - 0.9] * 2, color=colour, linewidth=2)
        middle = {"ha": "center", "va": "center", "family": "monospace"}
        axes.text(x + width / 2, y - 0.54, shown, color=ink, fontsize=8.5, **middle)
        axes.text(x + width / 2, y - 1.15, note, fontsize=7, **middle)
        x += width + 0.3
    return y - line


def draw_mc_scoring(
    choices: Sequence[str], scores: Sequence[float], labels: Sequence[int]
) -> Figure:
    """Draw how MC1, MC2 and MC3 read the same scores: a duel, a share, and a count.

    True answers have the label 1; the first answer is MC1's one true one.
    """
    n = len(choices)
    figure, (left, right) = new_axes(1, 2, width=9.6, height=1.3 + 0.36 * n, width_ratios=(3, 2))
    scores, true = np.array(scores), np.array(labels, dtype=bool)
    best_false = scores[~true].max()
    passes = scores > best_false
    for i in range(n):
        mark, colour = ("o", BLUE) if true[i] else ("X", VERMILION)
        face = "white" if true[i] and not passes[i] else colour
        left.plot(scores[i], i, mark, color=colour, markersize=9, markerfacecolor=face)
    left.axvline(best_false, color=VERMILION, linestyle="--", linewidth=1.2)
    place = {"xytext": (4, 0), "textcoords": "offset points", "va": "center"}
    left.annotate("best false answer", (best_false, n - 0.4), fontsize=9, **place)
    names = [f"{c}  ({'true' if t else 'false'})" for c, t in zip(choices, true, strict=True)]
    left.set_yticks(range(n), [textwrap.fill(name, 40) for name in names])
    left.set(xlabel="summed log-probability (nats)", xmargin=0.12, ylim=(n - 0.1, -0.6))
    left.grid(axis="y", visible=False)
    mc1 = f"MC1: does the first true one pass the line?  {int(passes[0])}"
    mc3 = f"MC3: which share of the true ones does?  {passes.sum()} of {true.sum()}"
    left.set_title(f"{mc1}\n{mc3}", fontsize=10, loc="left")
    shares, begin = softmax(scores), 0.0
    for label, share in sorted(zip(labels, shares, strict=True), reverse=True):
        colour, hatch = (BLUE, "") if label else (VERMILION, "///")
        look = {"color": colour, "hatch": hatch, "edgecolor": "white", "linewidth": 1.5}
        bar = right.barh(0, share, left=begin, height=0.5, **look)
        begin += share
        if share > 0.08:
            behind = {"facecolor": "white", "linewidth": 0, "pad": 1.5}  # a hatch hides text
            ink = {"color": "white"} if label else {"color": "black", "bbox": behind}
            right.bar_label(bar, [f"{share:.0%}"], label_type="center", fontsize=9.5, **ink)
    mc2 = shares[true].sum()
    right.plot([mc2, mc2], [-0.32, 0.32], color="black", linewidth=1.5)
    right.annotate(f"{mc2:.3f}", (mc2, 0.34), ha="center", va="bottom", fontsize=10)
    right.set(xlim=(0, 1), ylim=(-1, 1), yticks=[])
    right.set_xlabel("share of the probability (false: hatched)")
    right.grid(visible=False)
    right.spines["left"].set_visible(False)
    right.set_title("MC2: how much lies on true ones?", fontsize=10, loc="left")
    return figure
