"""The files that benchmarks are made of: splits on the Hub, each with its place in a mirror.

Rows come from exactly one place: the mirror that ``GRATH_MIRROR`` names, or the Hub at a pinned
revision. A file missing from a mirror is an error; nothing is fetched in its place.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from grath_utils.errors import DataError, FetchError, reason_of
from grath_utils.files import mirror_dir, read_jsonl


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


def read_rows(file: HubFile) -> list[dict[str, Any]]:
    """Return the rows of a file from the mirror, if there is one, and from the Hub otherwise.

    Raises:
        DataError: the mirror lacks the file, or the file is not JSONL.
        FetchError: the Hub cannot be reached.
    """
    mirror = mirror_dir()
    if mirror is None:
        return hub_rows(file)
    if not is_available(file):
        raise DataError(
            f"the mirror {mirror} (GRATH_MIRROR) has no {file.path}; add it with "
            "`python -m grath_utils mirror --to DIR`, or unset GRATH_MIRROR to use the Hub"
        )
    return read_jsonl(mirror / file.path)


def hub_rows(file: HubFile) -> list[dict[str, Any]]:
    """Download (or take from the Hub's cache) one split, at its pinned revision."""
    from datasets import load_dataset

    try:
        split = load_dataset(file.dataset, file.config, split=file.split, revision=file.revision)
    except Exception as error:  # datasets raises a different kind for each way to be offline
        raise FetchError(
            f"{file.dataset} cannot be fetched from the Hub ({reason_of(error)}). Without network "
            "there are two ways: set GRATH_MIRROR to a benchmark mirror (made elsewhere with "
            "`python -m grath_utils mirror --to DIR`), or measure on our own data, `--benchmark "
            "probe`"
        ) from error
    return list(split)


def is_available(file: HubFile) -> bool:
    """Return False if there is a mirror and it lacks the file."""
    mirror = mirror_dir()
    return mirror is None or (mirror / file.path).is_file()


def source_of(file: HubFile) -> str:
    """Return in words where :func:`read_rows` takes the file from."""
    mirror = mirror_dir()
    return f"mirror {mirror.name}" if mirror else f"Hub {file.dataset}@{file.revision[:8]}"
