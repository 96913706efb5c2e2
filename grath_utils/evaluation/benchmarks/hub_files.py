"""The files that benchmarks are made of: splits on the Hub, each with its place in a mirror.

Rows come from exactly one place: the mirror that ``GRATH_MIRROR`` names, or the Hub at a pinned
revision. A file missing from a mirror is an error; nothing is fetched in its place.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from grath_utils.errors import DataError
from grath_utils.files import mirror_dir, read_jsonl
from grath_utils.pairs.hub import hub_rows


@dataclass(frozen=True)
class HubFile:
    """One split of a Hub data set."""

    dataset: str
    revision: str
    config: str | None
    split: str

    @property
    def path(self) -> str:
        """Its place in a mirror."""
        parts = (self.dataset.split("/")[1], self.config, f"{self.split}.jsonl")
        return "/".join(part for part in parts if part)

    def from_hub(self) -> list[dict[str, Any]]:
        """Return its rows, see :func:`.hub_rows`."""
        return hub_rows(self.dataset, self.config, self.split, self.revision)


def read_rows(file: HubFile) -> list[dict[str, Any]]:
    """Return the rows of a file from the mirror, if there is one, and from the Hub otherwise.

    Raises:
        DataError: the mirror lacks the file, or it is not JSONL; or the Hub has no such split.
        FetchError: the Hub cannot be reached.
    """
    mirror = mirror_dir()
    if mirror is None:
        return file.from_hub()
    if not is_available(file):
        raise DataError(
            f"the mirror {mirror} (GRATH_MIRROR) has no {file.path}; add it with "
            "`grath mirror --to DIR`, or unset GRATH_MIRROR to use the Hub"
        )
    return read_jsonl(mirror / file.path)


def is_available(file: HubFile) -> bool:
    """Return False if there is a mirror and it lacks the file."""
    mirror = mirror_dir()
    return mirror is None or (mirror / file.path).is_file()


def source_of(file: HubFile) -> str:
    """Return in words where :func:`read_rows` takes the file from."""
    mirror = mirror_dir()
    return f"mirror {mirror.name}" if mirror else f"Hub {file.dataset}@{file.revision[:8]}"
