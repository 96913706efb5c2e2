"""Which exercises a learner has passed, kept in the run directory; read without loading checks."""

from __future__ import annotations

import datetime
from collections import Counter
from collections.abc import Iterable

from grath_utils.files import read_json, write_cache
from grath_utils.loop.run_dir import Run

FORM = {str: {"passed": bool, "when": (str, None)}}


def read_progress(run: Run) -> dict[str, dict[str, object]]:
    """Return each exercise's verdict and when it was reached; nothing before the first check."""
    return read_json(run.exercises, FORM) if run.exercises.exists() else {}


def note_verdict(run: Run | None, name: str, passed: bool, names: Iterable[str]) -> None:
    """Keep the verdict on an exercise, of all ``names``; what was passed once stays passed.

    Where there is no run yet, or it cannot be written to, nothing is kept.
    """
    if run is None or not (run.path / "run.json").is_file():
        return
    kept = read_progress(run)
    if kept.get(name, {}).get("passed"):
        return
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    blank = {each: {"passed": False, "when": None} for each in names}
    write_cache(run.exercises, blank | kept | {name: {"passed": passed, "when": now}})


def exercises_line(run: Run) -> str:
    """Return how many exercises are passed, by notebook; nothing before the first check."""
    kept = read_progress(run)
    there = Counter(name.partition(".")[0] for name in kept)
    passed = Counter(name.partition(".")[0] for name, row in kept.items() if row["passed"])
    parts = (f"{notebook}: {passed[notebook]} of {n}" for notebook, n in there.items())
    total = f"exercises: {passed.total()} of {there.total()} passed"
    return f"{total} ({', '.join(parts)})" if kept else ""
