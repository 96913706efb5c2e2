"""Numbers, times and tables as people read them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tabulate import tabulate


def duration(seconds: float) -> str:
    """Return a duration: ``40 s``, ``3.5 min``, ``2.1 h``, ``5 days``."""
    for limit, unit, name in ((90, 1, "s"), (5400, 60, "min"), (172_800, 3600, "h")):
        if seconds < limit:
            value = seconds / unit
            return f"{value:.0f} {name}" if value >= 10 or unit == 1 else f"{value:.1f} {name}"
    return f"{seconds / 86_400:.0f} days"


def percent(value: float) -> str:
    """Return ``25.1`` for 0.251."""
    return f"{100 * value:.1f}"


def brackets(ci95: Sequence[float] | None, spec: str = ".1f", scale: float = 1) -> str:
    """Return ``[21.0, 29.1]``, or ``[–]`` where there is no interval."""
    return f"[{', '.join(f'{scale * end:{spec}}' for end in ci95)}]" if ci95 else "[–]"


def with_interval(
    value: float, ci95: Sequence[float] | None, spec: str = ".1f", scale: float = 1
) -> str:
    """Return ``25.1 [21.0, 29.1]``; ``spec`` is the format of each number."""
    return f"{scale * value:{spec}} {brackets(ci95, spec, scale)}"


def in_percent(result: Mapping[str, Any], metric: str) -> tuple[float, list[float] | None]:
    """Return a metric of an evaluation's result and its interval; None for a single item."""
    found = result["metrics"][metric]
    return 100 * found["value"], found["ci95"] and [100 * end for end in found["ci95"]]


def metric_line(metric: Mapping[str, Any]) -> str:
    """Return ``25.1 % [21.0, 29.1], n = 419`` for a metric of an evaluation's result."""
    ends = brackets(metric["ci95"], scale=100)
    return f"{percent(metric['value'])} % {ends}, n = {metric['n']}"


def quantization_line(kind: str, part: Mapping[str, int] | None) -> str:
    """Return ``nf4 (8 of 14 matrices, 11.1 % of their weights)``; the kind alone without a count.

    ``part`` has the fields of :class:`.engine.quantization.Quantized`.
    """
    if not part:
        return kind
    share = percent(part["weights"] / part["of_weights"])
    counts = f"{part['matrices']} of {part['of_matrices']} matrices"
    return f"{kind} ({counts}, {share} % of their weights)"


def table(
    columns: Sequence[str],
    rows: Iterable[Sequence[Any]],
    form: str = "plain",
    *,
    numbers_from: int | None = None,
) -> str:
    """Return rows as a table; floats get three decimals.

    Args:
        columns: their headings; empty for a table without.
        rows: one cell a column.
        form: tabulate's name of the format: ``plain``, ``simple``, ``github``, ``html``.
        numbers_from: columns from this one on are right-aligned, as are those that begin with a
            number.
    """
    rows = [list(row) for row in rows]
    sides = [
        "right"
        if isinstance(cell, (int, float)) or (numbers_from is not None and i >= numbers_from)
        else "left"
        for i, cell in enumerate(rows[0] if rows else [])
    ]
    shown = [[f"{c:,.3f}" if isinstance(c, float) else str(c) for c in row] for row in rows]
    text = tabulate(shown, columns, form, disable_numparse=True, colalign=sides)
    if form == "html":  # Jupyter would put texts to the right, and in the middle of high rows
        text = re.sub(r"(?<=>) +| +(?=</)", "", text)  # padding
        text = re.sub(r'<(t[dh]) style="', r'<\1 style="vertical-align: top; ', text)
        text = re.sub(r"<(t[dh])>", r'<\1 style="vertical-align: top; text-align: left;">', text)
        text = text.replace("<th ", '<th scope="col" ')  # for those who hear a table
    return text
