"""The configured global batch, over however many processes train.

One process takes ``micro_batch_size`` pairs at a time and adds up the gradients of a whole batch
before it steps. Several take the same micro-batches of the same step, cut into *pieces* where there
are not enough of them, and each piece counts by its share of its micro-batch. So order of the data,
gradient and logged means are those of one process, also in an epoch's last step, which may be
short (the usual way is to fill it with pairs from the beginning again).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from accelerate.data_loader import SeedableRandomSampler
from torch.utils.data import DataLoader

from grath_utils.config import DPOConfig
from grath_utils.engine import processes
from grath_utils.errors import ConfigError

# Losses that are no mean over pairs: they need their micro-batch in one piece.
BATCHWISE_LOSSES = ("aot", "aot_unpaired", "sft")


def piece_size(config: DPOConfig, processes: int) -> int:
    """Return how many pairs one of several processes takes at a time.

    ``dpo.batch_size`` is never changed silently: ConfigError if it cannot be divided among them.
    """
    each, left = divmod(config.batch_size, processes)
    if left:
        raise ConfigError(
            f"dpo.batch_size={config.batch_size} cannot be divided among {processes} processes: "
            f"choose a multiple of {processes}, or another number of processes"
        )
    # A piece never crosses the border of a micro-batch, which counts as a whole.
    piece = math.gcd(config.micro_batch_size, each)
    if piece < config.micro_batch_size and config.loss in BATCHWISE_LOSSES:
        raise ConfigError(
            f"dpo.loss={config.loss} looks at all pairs of a micro-batch together, and {processes} "
            f"processes would have to cut dpo.micro_batch_size={config.micro_batch_size} into "
            f"pieces of {piece}: choose dpo.batch_size and dpo.micro_batch_size so that each "
            "process gets whole micro-batches"
        )
    return piece


@dataclass(frozen=True)
class Piece:
    """Pairs that one process computes at once."""

    indices: tuple[int, ...]
    share: float  # of its micro-batch; 0 for a process with nothing left to do in a short step
    scale: float  # of its mean loss, so that the step's gradient is that of one process


def deal(order: Sequence[int], config: DPOConfig, processes: int) -> list[list[Piece]]:
    """Return each process's pieces of one epoch, which takes the pairs in ``order`` (indices)."""
    hands: list[list[Piece]] = [[] for _ in range(processes)]
    size, per_step = piece_size(config, processes), config.batch_size // config.micro_batch_size
    for step in _cut(_cut(order, config.micro_batch_size), per_step):
        parts = [(part, len(micro)) for micro in step for part in _cut(micro, size)]
        turns = math.ceil(len(parts) / processes) * processes
        # The trainer averages over all turns; one process would have averaged over the step's
        # micro-batches.
        pieces = [
            Piece(tuple(part), len(part) / whole, turns * len(part) / (whole * len(step)))
            for part, whole in parts
        ]
        pieces += [Piece(tuple(step[0][:1]), 0.0, 0.0)] * (turns - len(pieces))
        for rank, hand in enumerate(hands):
            hand += pieces[rank::processes]
    return hands


def _cut(items: Sequence[Any], size: int) -> list[Sequence[Any]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


class PieceBatches:
    """One process's batches, epoch by epoch: data set and batch sampler of a ``DataLoader``."""

    def __init__(
        self, rows: Sequence[dict[str, Any]], collate: Callable, config: DPOConfig, seed: int
    ) -> None:
        self.rows, self.collate, self.config = rows, collate, config
        self.sampler = SeedableRandomSampler(range(len(rows)), data_seed=seed)
        # The trainer calls it through the loader, or, resuming within an epoch, directly.
        self.set_epoch = self.sampler.set_epoch

    def loader(self) -> DataLoader:
        """Return the batches, each with its ``share`` and ``scale`` (:class:`Piece`)."""
        loader = DataLoader(self, batch_sampler=self, collate_fn=lambda batch: batch)
        loader.set_epoch = self.set_epoch
        return loader

    def __iter__(self) -> Iterator[Piece]:
        yield from deal(list(self.sampler), self.config, processes.size())[processes.rank()]

    def __len__(self) -> int:  # equal for all ranks
        return len(deal(range(len(self.rows)), self.config, processes.size())[0])

    def __getitems__(self, piece: Piece) -> dict[str, Any]:
        """Return a batch for each backward pass: the first one, with the others in ``more``.

        Where pairs count one by one, those of one row go back before the next are computed. Several
        processes must go back equally often, so each of their pieces stays whole.
        """
        rows = [self.rows[i] for i in piece.indices]
        cut = processes.size() == 1 and self.config.loss not in BATCHWISE_LOSSES
        groups = self.collate.groups(rows) if cut and hasattr(self.collate, "groups") else None
        batches = []
        for group in groups or [range(len(rows))]:
            part = len(group) / len(rows)
            weights = {"share": piece.share * part, "scale": piece.scale * part}
            batches.append({**self.collate([rows[i] for i in group]), **weights})
        return {**batches[0], "more": batches[1:]}
