"""The time of each section, from what papermill left in executed notebooks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers import FACTS

from grath_utils.cli import commands as cli
from grath_utils.config import load_config
from grath_utils.errors import DataError
from grath_utils.loop.run_dir import Run, open_run
from grath_utils.workshop import timings


def cell(kind: str, source: str, seconds: float | None = None) -> dict:
    metadata = {} if seconds is None else {"papermill": {"duration": seconds}}
    return {"cell_type": kind, "source": [source], "metadata": metadata}


NOTEBOOK = {
    "metadata": {"grath_execution": {"date": "2026-11-24"}},
    "cells": [
        cell("markdown", "# Title\n\n### What it costs"),
        cell("code", "import x", 3.0),
        cell("markdown", "## 1 · First\n\nText", None),
        cell("code", "a", 0.2),
        cell("markdown", "text\n\n## 2 · Second"),
        cell("code", "b", 100.0),
        cell("markdown", "### Easy"),
        cell("code", "c", 20.0),
        cell("code", "never run", None),
    ],
}


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return open_run(tmp_path / "run", load_config("smoke"), FACTS)


def test_seconds_are_added_up_by_section() -> None:
    assert [*timings.section_times(NOTEBOOK).items()] == [
        ("Set-up", 3.0), ("1 · First", 0.2), ("2 · Second", 120.0)
    ]  # fmt: skip


def test_the_table_goes_between_the_marks_of_a_page(tmp_path: Path, run: Run) -> None:
    with pytest.raises(DataError, match="holds no executed notebook"):
        timings.timings_table(run, [Path("00_start_here.ipynb")])
    run.executed_notebooks.mkdir()
    (run.executed_notebooks / "00_start_here.ipynb").write_text(json.dumps(NOTEBOOK))
    page = tmp_path / "page.md"
    page.write_text(f"before\n{timings.BEGIN}\nold\n{timings.END}\nafter\n", encoding="utf-8")
    for _ in range(2):
        assert cli.main(["timings", "--run-dir", str(run.path), "--into", str(page)]) == 0
    text = page.read_text(encoding="utf-8")
    assert text.startswith(f"before\n{timings.BEGIN}\nMeasured 2026-11-24: profile `smoke`, 2 CPU")
    assert text.endswith(f"{timings.END}\nafter\n")
    assert "old" not in text
    for line in (
        "| **00_start_here** | | **2.1 min** |",
        "| | Set-up | 3 s |",
        "| | 2 · Second | 2.0 min |",
        "| | the other sections | 0 s |",
    ):
        assert " ".join(text.split()).count(line) == 1
    page.write_bytes(f"a\r\n{timings.BEGIN}\r\n{timings.END}\r\nb\r\n".encode())
    assert cli.main(["timings", "--run-dir", str(run.path), "--into", str(page)]) == 0
    assert page.read_bytes().startswith(b"a\r\n<!--")
    assert page.read_bytes().endswith(b"-->\r\nb\r\n")
    for content in (b"no marks", b"caf\xe9", None):  # the last one: no such page
        page.unlink()
        if content:
            page.write_bytes(content)
        assert cli.main(["timings", "--run-dir", str(run.path), "--into", str(page)]) == 2
        assert (page.read_bytes() if content else page.exists() or None) == content
        page.touch()


def test_the_instructors_page_has_the_marks() -> None:
    page = Path(__file__).resolve().parents[2] / "notebooks" / "INSTRUCTOR.md"
    text = page.read_text(encoding="utf-8")
    assert text.count(timings.BEGIN) == text.count(timings.END) == 1
