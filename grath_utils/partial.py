"""What a stopped evaluation leaves, so that the same evaluation goes on from there."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

from grath_utils import processes
from grath_utils.errors import RunError


class PartialResult:
    """Finished batches in a sidecar file ``OUT.partial.jsonl``.

    The first line identifies the evaluation; each further line is one batch. A line cut off by a
    killed process is dropped, and so is everything when the identity is another one (said aloud).
    """

    def __init__(self, out: Path | None, identity: str) -> None:
        """Read what is there for ``out``; with None, nothing is read or kept."""
        self.path = self.path_for(out) if out is not None else None
        self.identity = identity
        self.done: dict[int, list[Any]] = {}
        """Batches finished before, by their number."""
        if self.path is None:
            return
        self.done = self._read()
        lines = [{"identity": identity}]
        lines += [{"batch": number, "values": values} for number, values in self.done.items()]
        # Written anew, so that a line cut off in the middle is not continued.
        self._write("".join(json.dumps(line) + "\n" for line in lines), "w")

    @classmethod
    def shared(cls, out: Path | None, identity: str) -> PartialResult:
        """Return it for all processes of a launch: what the main one reads, and it alone writes."""
        kept = processes.on_main(lambda: cls(out, identity))
        if not processes.is_main():
            kept.path = None
        return kept

    @staticmethod
    def path_for(out: Path) -> Path:
        """Return the sidecar's place for a result file."""
        return Path(out).with_name(f"{Path(out).name}.partial.jsonl")

    def add(self, number: int, values: list[Any]) -> None:
        """Keep a finished batch."""
        if self.path is not None:
            self._write(json.dumps({"batch": number, "values": values}) + "\n", "a")

    def _write(self, text: str, mode: str) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, mode, encoding="utf-8", newline="\n") as handle:
                handle.write(text)
        except OSError as error:
            raise RunError(
                f"cannot write {self.path}: {error.strerror or error}; free some space or fix the "
                "permissions, then run the same command again (finished batches are kept)"
            ) from error

    def _read(self) -> dict[int, list[Any]]:
        done: dict[int, list[Any]] = {}
        if not self.path.is_file():
            return done
        head, *lines = self.path.read_text(encoding="utf-8", errors="replace").split("\n")
        with contextlib.suppress(json.JSONDecodeError, TypeError, KeyError):
            if json.loads(head)["identity"] == self.identity:
                for line in filter(None, lines):
                    row = json.loads(line)
                    done[int(row["batch"])] = row["values"]
                return done
        if not done:
            print(f"{self.path.name} belongs to another evaluation: starting anew")
        return done
