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
from grath_utils.text import duration, table

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
    executed = [
        path for source in sources if (path := run.executed_notebooks / source.name).is_file()
    ]
    if not executed:
        raise DataError(
            f"{run.path} holds no executed notebook; `python -m grath_utils run --profile "
            f"{run.config.profile} --run-dir {run.path}` executes them"
        )
    rows, dates = [], []
    for path in executed:
        notebook = read_json(path)
        times, took = section_times(notebook), notebook["metadata"].get("grath_execution", {})
        dates.append(took.get("date", ""))
        earlier = (took.get("earlier") or {}).get("stages", [])
        before = len(earlier) > len(took.get("stages", []))
        note = " (most of its work was done before)" if before else ""
        rows.append((f"**{path.stem}**", note, f"**{duration(times.total())}**"))
        rows += [
            ("", name, duration(seconds)) for name, seconds in times.items() if seconds >= SHORT
        ]
        rest = sum(seconds for seconds in times.values() if seconds < SHORT)
        rows.append(("", "the other sections", duration(rest)))
    device, dtype = run.info()["device"], run.info()["resolved"]["dtype"]
    return (
        f"Measured {max(dates) or 'some time ago'}: profile `{run.config.profile}`, "
        f"{device['cpu_count']} CPU cores, {device['memory_gib']:.0f} GiB of memory, accelerator "
        f"{device['accelerator']}, {dtype}.\n\n"
        + table(["notebook", "section", "machine time"], rows, "github")
    )


def refresh(page: Path, text: str) -> None:
    """Put a table between a page's two marks.

    Raises:
        DataError: the page does not have both marks, once each.
    """
    before, *inside = page.read_text(encoding="utf-8").split(BEGIN)
    if len(inside) != 1 or inside[0].count(END) != 1 or END in before:
        raise DataError(f'{page} needs the lines "{BEGIN}" and "{END}", once each')
    write_text(page, f"{before}{BEGIN}\n{text}\n{END}{inside[0].partition(END)[2]}")
