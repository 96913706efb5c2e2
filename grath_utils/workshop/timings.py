"""How long each section of each notebook took in a run, for those who plan a lesson.

papermill leaves the seconds of every cell in an executed notebook; here they are added up.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from grath_utils.errors import DataError
from grath_utils.files import read_json, write_text
from grath_utils.loop.run_dir import Run
from grath_utils.text import duration

BEGIN, END = "<!-- timings: begin -->", "<!-- timings: end -->"
SHORT = 1.0
"""Sections of fewer seconds are reading time and are summed up in one line."""


def section_times(notebook: dict[str, Any]) -> Counter[str]:
    """Return the seconds of each section of an executed notebook, in order.

    Sections are the headings of the second level; cells before the first belong to ``Set-up``.
    """
    times: Counter[str] = Counter()
    section = "Set-up"
    for cell in notebook["cells"]:
        if cell["cell_type"] == "markdown":
            headings = re.findall(r"^## +(.+?) *$", "".join(cell["source"]), re.MULTILINE)
            section = headings[-1] if headings else section
        times[section] += cell["metadata"].get("papermill", {}).get("duration") or 0.0
    return times


def timings_table(run: Run, sources: Sequence[Path]) -> str:
    """Return a Markdown table of the sections of a run's executed notebooks.

    Raises:
        DataError: no notebook of the run was executed.
    """
    lines: list[str] = []
    date = ""
    for source in sources:
        executed = run.executed_notebooks / source.name
        if not executed.is_file():
            continue
        notebook = read_json(executed)
        took = notebook["metadata"].get("grath_execution", {})
        date = max(date, took.get("date", ""))
        times = section_times(notebook)
        earlier = (took.get("earlier") or {}).get("stages", [])
        before = len(earlier) > len(took.get("stages", []))
        note = " (most of its work was done before)" if before else ""
        rest = sum(seconds for seconds in times.values() if seconds < SHORT)
        lines.append(f"| **{source.stem}** | {note} | **{duration(times.total())}** |")
        lines += [f"| | {name} | {duration(s)} |" for name, s in times.items() if s >= SHORT]
        lines.append(f"| | the other sections | {duration(rest)} |")
    if not lines:
        raise DataError(
            f"{run.path} holds no executed notebook; `python -m grath_utils run --profile "
            f"{run.config.profile} --run-dir {run.path}` executes them"
        )
    device = run.info()["device"]
    return "\n".join(
        [
            f"Measured {date or 'some time ago'}: profile `{run.config.profile}`, "
            f"{device['cpu_count']} CPU cores, {device['memory_gib']:.0f} GiB of memory, "
            f"accelerator {device['accelerator']}, {run.info()['resolved']['dtype']}.",
            "",
            "| notebook | section | machine time |",
            "|---|---|---|",
            *lines,
        ]
    )


def refresh(page: Path, table: str) -> None:
    """Put a table between a page's two marks.

    Raises:
        DataError: the page does not have both marks, once each.
    """
    before, *inside = page.read_text(encoding="utf-8").split(BEGIN)
    if len(inside) != 1 or inside[0].count(END) != 1 or END in before:
        raise DataError(f'{page} needs the lines "{BEGIN}" and "{END}", once each')
    write_text(page, f"{before}{BEGIN}\n{table}\n{END}{inside[0].partition(END)[2]}")
