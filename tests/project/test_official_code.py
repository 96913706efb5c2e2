"""The page on the official code: each difference names file and lines, and what stands there."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

PAGE = (Path(__file__).parents[2] / "notebooks" / "OFFICIAL_CODE.md").read_text(encoding="utf-8")
COMMIT = re.search(r"GRATH/tree/([0-9a-f]{40})", PAGE)[1]
ROWS = [line.strip("| ").split(" | ") for line in PAGE.splitlines() if line.startswith("| ")]
ROWS = [row for row in ROWS if row[0] != "official code"]
PROOF = re.compile(r"(?:`([\w.]+)` )?(\d+)(?:-(\d+))?: `([^`]+)`(?:; |$)")


def proofs(cell: str) -> list[tuple[str, int, int, str]]:
    """Return (file, first line, last line, what stands there) of each proof in a cell."""
    assert not PROOF.sub("", cell), f"not of the form `FILE` LINE: `CODE`: {cell}"
    found, file = [], ""
    for name, first, last, code in PROOF.findall(cell):
        file = name or file
        found.append((file, int(first), int(last or first), code))
    return found


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0][:40])
def test_each_difference_has_its_proof_and_what_is_done_here(row: list[str]) -> None:
    assert len(row) == 3
    assert row[2]
    for file, first, last, _ in proofs(row[1]):
        assert file
        assert 0 < first <= last


def test_the_official_code_holds_what_the_page_says() -> None:
    """Where there is a clone, whose place ``GRATH_OFFICIAL_CODE`` names."""
    clone = os.environ.get("GRATH_OFFICIAL_CODE")
    if not clone:
        pytest.skip("GRATH_OFFICIAL_CODE names no clone of the official repository")
    for row in ROWS:
        for file, first, last, code in proofs(row[1]):
            show = ["git", "-C", clone, "show", f"{COMMIT}:{file}"]
            shown = subprocess.run(show, capture_output=True, text=True, check=True)
            lines = shown.stdout.split("\n")[first - 1 : last]
            assert code in "\n".join(lines), f"{file} {first}-{last}: no {code}"
