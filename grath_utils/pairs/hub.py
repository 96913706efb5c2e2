"""Data sets on the Hugging Face Hub: one way to read a split, for questions and for benchmarks."""

from __future__ import annotations

from typing import Any

from grath_utils.errors import DataError, FetchError, reason_of


def hub_rows(
    data_set: str, subset: str | None, split: str, revision: str | None = None
) -> list[dict[str, Any]]:
    """Return the rows of one split, downloaded or from the Hub's cache."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        rows = list(load_dataset(data_set, subset, split=split, revision=revision))
    except (DatasetsError, ValueError) as error:  # ValueError: no such configuration or split
        raise DataError(
            f'the Hub data set "{data_set}", split "{split}", cannot be read: {reason_of(error)}'
        ) from error
    except Exception as error:  # datasets raises a different kind for each way to be offline
        raise FetchError(
            f'the Hub data set "{data_set}" cannot be fetched ({reason_of(error)}). Without a '
            "network, set GRATH_MIRROR to a mirror of the benchmarks (made elsewhere with `grath "
            "mirror --to DIR`), or use our own data: questions.source=own, `--benchmark probe`"
        ) from error
    if not rows:
        raise DataError(f'the Hub data set "{data_set}", split "{split}", has no rows')
    return rows
