"""How long work is kept for resuming: its finished parts, one line each."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grath_utils.errors import DataError, RunError
from grath_utils.files.reading import check_form
from grath_utils.files.whole import explained_write_errors, jsonl_line


@dataclass(frozen=True)
class Journal:
    """The finished parts of long work, one JSON line each; the first line says whose they are.

    A line is on the disk before the next part begins, so a killed process loses only the part that
    it was working on. Only one process may append.
    """

    path: Path | None
    """None: nothing is kept."""
    identity: str
    """A fingerprint of whatever must be equal for the parts to be used again."""

    @staticmethod
    def beside(out: Path | None, identity: str) -> Journal:
        """Return the journal of an output file: ``OUT.journal``."""
        return Journal(out and out.with_name(f"{out.name}.journal"), identity)

    def read(self, sizes: Sequence[int], form: Any) -> dict[int, list[Any]]:
        """Return the finished parts by number; drop a line that a killed writer left unfinished.

        A part that is not as this program writes it is made again: part ``n`` has ``sizes[n]`` rows
        of a form (:func:`.check_form`). A journal of other work is moved to ``NAME.old``
        (``NAME.old2``, ...) with a warning: its parts belong to other results.
        """
        if self.path is None or not self.path.is_file():
            return {}
        content, rows, end = self.path.read_bytes(), [], 0
        with suppress(ValueError, RecursionError):
            for raw in content.splitlines(keepends=True):
                row = json.loads(raw)
                if not raw.endswith(b"\n") or not isinstance(row, dict):
                    break
                rows.append(row)
                end += len(raw)
        head, *parts = rows or [{}]
        ours = head.get("identity") == self.identity
        ours &= all(row.keys() == {"part", "rows"} for row in parts)
        if not rows:  # killed in its first line?
            ours = self._head().startswith(content)
        if not ours:
            names = (self.path.with_name(f"{self.path.name}.old{n}") for n in ("", *range(2, 1000)))
            aside = next(name for name in names if not name.exists())
            os.replace(self.path, aside)
            warnings.warn(
                f"{self.path} was left by work with other inputs or settings; it is now "
                f"{aside.name}, and the work starts from the beginning",
                stacklevel=2,
            )
            return {}
        # Append after the last whole line, or the next one would be joined to a torn one.
        os.truncate(self.path, end)
        done = {}
        for row in parts:
            with suppress(DataError):
                check_form(row, {"part": int, "rows": [form]}, str(self.path))
                part, made = row["part"], row["rows"]
                if 0 <= part < len(sizes) and len(made) == sizes[part]:
                    done[part] = made
        return done

    def _head(self) -> bytes:
        return jsonl_line({"identity": self.identity}).encode()

    def append(self, part: int, rows: Sequence[Any]) -> None:
        """Add a finished part and flush it to the disk.

        Raises:
            RunError: the journal cannot be written to, or is that of other work by now.
        """
        if self.path is None:
            return
        with explained_write_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a+b") as handle:
                handle.seek(0)
                head = handle.readline()
                if not head:
                    handle.write(self._head())
                elif head != self._head():
                    raise RunError(
                        f"{self.path} is that of other work now: does another process write the "
                        "same output? Let it end, then run the same command again"
                    )
                handle.write(jsonl_line({"part": part, "rows": list(rows)}).encode())
                handle.flush()
                os.fsync(handle.fileno())

    def remove(self) -> None:
        """Delete the journal once the output is whole."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)
