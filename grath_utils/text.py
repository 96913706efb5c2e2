"""Numbers and times as people read them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


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


def metric_line(metric: Mapping[str, Any]) -> str:
    """Return ``25.1 % [21.0, 29.1], n = 419`` for a metric of an evaluation's result."""
    low, high = metric["ci95"]
    return f"{percent(metric['value'])} % [{percent(low)}, {percent(high)}], n = {metric['n']}"
