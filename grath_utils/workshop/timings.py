"""How long each section of each notebook took in a run, for those who plan a lesson.

papermill leaves the seconds of every cell in an executed notebook; here they are added up.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from grath_utils.course.execute import NOTEBOOK, most_work
from grath_utils.errors import DataError
from grath_utils.files import read_json, read_text, write_text
from grath_utils.loop.run_dir import Run
from grath_utils.text import duration, table

BEGIN, END = "<!-- timings: begin -->", "<!-- timings: end -->"
SHORT = 1.0
"""Sections of fewer seconds are reading time and are summed up in one line."""


def section_times(notebook: dict[str, Any]) -> Counter[str]:
    """Return the seconds of each section of an executed notebook, in order.

    Sections are the headings of the second level; cells before the first belong to ``Set-up``.
    """
    times, section = Counter(), "Set-up"
    for cell in notebook["cells"]:
        if cell["cell_type"] == "markdown":
            headings = re.findall(r"^## +(.+?) *$", "".join(cell["source"]), re.MULTILINE)
            section = (headings or [section])[-1]
        times[section] += (cell["metadata"].get("papermill") or {}).get("duration") or 0.0
    return times


def timings_table(run: Run, sources: Sequence[Path]) -> str:
    """Return a Markdown table of the sections of a run's executed notebooks."""
    rows, dates = [], []
    paths = (run.executed_notebooks / source.name for source in sources)
    for path in filter(Path.is_file, paths):
        notebook = read_json(path, NOTEBOOK)
        times, took = section_times(notebook), notebook["metadata"].get("grath_execution") or {}
        dates.append(took.get("date") or "")
        before = most_work(took, took.get("earlier")) not in (took, None)
        note = " (most of its work was done before)" if before else ""
        rows.append((f"**{path.stem}**", note, f"**{duration(times.total())}**"))
        rows += [("", name, duration(time)) for name, time in times.items() if time >= SHORT]
        rest = sum(time for time in times.values() if time < SHORT)
        rows.append(("", "the other sections", duration(rest)))
    if not rows:
        raise DataError(
            f"{run.path} holds no executed notebook; `grath run --profile "
            f"{run.config.profile} --run-dir {run.path}` executes them"
        )
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
        DataError: the page cannot be read, or does not have both marks, once each.
    """
    parts = re.split(f"({BEGIN}|{END})", read_text(page))
    if parts[1::2] != [BEGIN, END]:
        raise DataError(f'{page} needs the lines "{BEGIN}" and "{END}", once each')
    write_text(page, f"{parts[0]}{BEGIN}\n{text}\n{END}{parts[4]}")
