"""How long each section of each notebook took in a run, for those who plan a lesson.

papermill leaves the seconds of every cell in an executed notebook; here they are added up.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from grath_utils.errors import DataError
from grath_utils.files import read_json, write_text
from grath_utils.loop.run_dir import Run

BEGIN, END = "<!-- timings: begin -->", "<!-- timings: end -->"
SHORT = 1.0
"""Sections of fewer seconds are reading time and are summed up in one line."""


def section_times(notebook: dict[str, Any]) -> list[tuple[str, float]]:
    """Return (section, seconds) of an executed notebook, in order.

    Sections are the headings of the second level; cells before the first belong to ``Set-up``.
    """
    times: dict[str, float] = {"Set-up": 0.0}
    section = "Set-up"
    for cell in notebook["cells"]:
        if cell["cell_type"] == "markdown":
            for heading in re.findall(r"^## +(.+)$", "".join(cell["source"]), re.MULTILINE):
                section = heading.strip()
        seconds = cell["metadata"].get("papermill", {}).get("duration") or 0.0
        times[section] = times.get(section, 0.0) + seconds
    return list(times.items())


def timings_table(run: Run, sources: Sequence[Path]) -> str:
    """Return a Markdown table of the sections of a run's executed notebooks.

    Raises:
        DataError: no notebook of the run was executed.
    """
    rows: list[str] = []
    date = ""
    for source in sources:
        executed = run.executed_notebooks / source.name
        if not executed.is_file():
            continue
        notebook = read_json(executed)
        took = notebook["metadata"].get("grath_execution", {})
        date = max(date, took.get("date", ""))
        times = section_times(notebook)
        earlier = len((took.get("earlier") or {}).get("stages", []))
        note = (
            " (most of its work was done before)" if earlier > len(took.get("stages", [])) else ""
        )
        rows.append(f"| **{source.stem}** | {note} | **{_words(sum(s for _, s in times))}** |")
        rows += [f"| | {name} | {_words(s)} |" for name, s in times if s >= SHORT]
        rest = sum(s for _, s in times if s < SHORT)
        rows.append(f"| | the other sections | {_words(rest)} |")
    if not rows:
        raise DataError(
            f"{run.path} holds no executed notebook; `python -m grath_utils run --profile "
            f"{run.config.profile} --run-dir {run.path}` executes them"
        )
    device = run.info()["device"]
    what = (
        f"Measured {date or 'some time ago'}: profile `{run.config.profile}`, "
        f"{device['cpu_count']} CPU cores, {device['memory_gib']:.0f} GiB of memory, accelerator "
        f"{device['accelerator']}, {run.info()['resolved']['dtype']}."
    )
    return "\n".join([what, "", "| notebook | section | machine time |", "|---|---|---|", *rows])


def _words(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.1f} min"


def refresh(page: Path, table: str) -> None:
    """Put a table between a page's two marks.

    Raises:
        DataError: the page has not both marks, once each.
    """
    text = page.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise DataError(f'{page} needs the lines "{BEGIN}" and "{END}", once each')
    before, _, rest = text.partition(BEGIN)
    write_text(page, f"{before}{BEGIN}\n{table}\n{END}{rest.partition(END)[2]}")
