"""A batch of preference pairs in few rows: each distinct prefix is computed once, and back.

The two answers of a pair follow the same prompt, and all prompts of a chat template begin alike.
The usual batch repeats all of that in every sequence and pads it to the longest. Here the batch is
a trie (:mod:`.trie`): one row holds many pairs, a mask lets every token see its own
prefix only, and the output head runs only where an answer's token is predicted. Gradients of all
answers add up in the tokens that they share, so loss and gradient are those of the usual batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from trl.trainer.dpo_trainer import DataCollatorForPreference

from grath_utils.engine.scoring import CPU_ROW_TOKENS, LOGIT_ROWS, additive_mask
from grath_utils.engine.trie import attention_mask, build_trie

GPU_ROW_TOKENS = 2048
"""Longest row on a GPU: it fills the device, and masked-out attention stays below a tenth."""

Example = dict[str, Any]
"""``prompt_ids``, ``chosen_ids``, ``rejected_ids``: lists of token ids."""


def pack(examples: Sequence[Example], row_tokens: int) -> list[dict[str, torch.Tensor]]:
    """Merge pairs into rows of at most ``row_tokens`` distinct tokens (a pair is never cut).

    Args:
        examples: the pairs of a batch.
        row_tokens: tokens in a row; only a pair that is longer by itself passes it.

    Returns:
        One dict a row, ``T`` tokens long, with ``P`` places that predict ``E`` answer tokens:
        ``ids`` and ``positions`` (1, T); ``visible`` (T, T) boolean, query first; ``predictors``
        (P,) places in the row, ascending; ``which`` (E,) index into ``predictors``; ``targets``
        (E,) token ids; ``sequence`` (E,) index into the padded batch, all chosen answers before all
        rejected ones; ``column`` (E,) the target's position in its sequence, less one.
    """
    rows = []
    for chunk in _chunks(examples, row_tokens):
        rows.append(_row([examples[i] for i in chunk], chunk, len(examples)))
    return rows


def _chunks(examples: Sequence[Example], row_tokens: int) -> list[list[int]]:
    """Cut the batch, in its order, where the next pair would make a row too long."""
    chunks: list[list[int]] = []
    size = 0
    for i, example in enumerate(examples):
        tokens = sum(len(example[k]) for k in ("prompt_ids", "chosen_ids", "rejected_ids"))
        if not chunks or size + tokens > row_tokens:
            chunks.append([])
            size = 0
        chunks[-1].append(i)
        size += tokens
    return chunks


def _row(examples: Sequence[Example], indices: Sequence[int], batch: int) -> dict[str, Any]:
    sides = [(e["prompt_ids"], e["chosen_ids"], i) for e, i in zip(examples, indices, strict=True)]
    sides += [
        (e["prompt_ids"], e["rejected_ids"], batch + i)
        for e, i in zip(examples, indices, strict=True)
    ]
    # Nothing is predicted from an answer's last token, so the model need not read it.
    trie, paths = build_trie([[*prompt, *answer[:-1]] for prompt, answer, _ in sides])
    nodes = np.concatenate(
        [path[len(p) - 1 :] for path, (p, _, _) in zip(paths, sides, strict=True)]
    )
    predictors, which = np.unique(nodes, return_inverse=True)
    columns = [np.arange(len(p) - 1, len(p) - 1 + len(a)) for p, a, _ in sides]
    arrays = {
        "ids": trie.token[None],
        "positions": trie.depth[None],
        "visible": attention_mask(trie, np.arange(len(trie))),
        "predictors": predictors,
        "which": which.ravel(),
        "targets": np.concatenate([np.asarray(a, dtype=np.int64) for _, a, _ in sides]),
        "sequence": np.concatenate([np.full(len(a), i) for _, a, i in sides]),
        "column": np.concatenate(columns),
    }
    return {name: torch.from_numpy(np.ascontiguousarray(a)) for name, a in arrays.items()}


@dataclass
class PackedCollator:
    """TRL's padded batch, with the same batch packed beside it as ``rows``."""

    padded: DataCollatorForPreference
    row_tokens: int

    def __call__(self, examples: Sequence[Example]) -> dict[str, Any]:
        return {**self.padded(list(examples)), "rows": pack(examples, self.row_tokens)}


@dataclass(frozen=True)
class PerToken:
    """What TRL's loss and log read of each answer token, in the layout of the padded batch."""

    log_probs: torch.Tensor
    """(2 B, T - 1) float32: log-probability of the token at the next position; 0 elsewhere."""
    entropy: torch.Tensor
    """(2 B, T - 1) of the distribution that the token was drawn from, in nats."""
    mean_logits: torch.Tensor
    is_top1: torch.Tensor


def packed_forward(
    model: Callable[..., Any], dtype: torch.dtype, *, selects: bool
) -> Callable[..., PerToken]:
    """Return a stand-in for ``model`` that computes TRL's per-token outputs from packed rows.

    TRL calls it as it would call the model (``input_ids``, ``labels``, ...); what it needs beyond
    the shape is in ``rows``.

    Args:
        model: the causal language model, wrapped or not.
        dtype: of its hidden states.
        selects: its forward takes ``logits_to_keep``, so the head runs on chosen places only.
    """

    def forward(*, input_ids: torch.Tensor, rows: list[dict[str, Any]], **_: Any) -> PerToken:
        shape = (input_ids.shape[0], input_ids.shape[1] - 1)
        parts = [
            _target_outputs(
                row_logits(model, row, dtype, selects=selects), row["which"], row["targets"]
            )
            for row in rows
        ]
        place = [torch.cat([row[name] for row in rows]) for name in ("sequence", "column")]

        def grid(index: int) -> torch.Tensor:
            values = torch.cat([part[index] for part in parts])
            return values.new_zeros(shape).index_put(tuple(place), values)

        return PerToken(grid(0), grid(1), grid(2), grid(3))

    return forward


def row_logits(
    model: Callable[..., Any], row: dict[str, torch.Tensor], dtype: torch.dtype, *, selects: bool
) -> torch.Tensor:
    """Return the logits at the places of a row that predict an answer's token: (P, vocabulary)."""
    logits = model(
        input_ids=row["ids"],
        position_ids=row["positions"],
        attention_mask=additive_mask(row["visible"], dtype),
        use_cache=False,
        **({"logits_to_keep": row["predictors"]} if selects else {}),
    ).logits[0]
    return logits if selects else logits[row["predictors"]]


def _target_outputs(
    logits: torch.Tensor, which: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return log-probability, entropy, mean logit and "is the most probable" of a row's targets.

    Each of shape (E,); only the first carries a gradient.
    """
    totals, entropies, means, tops = [], [], [], []
    for rows in logits.split(LOGIT_ROWS):  # a float32 copy of some rows stays in the cache
        rows = rows.float()
        total = rows.logsumexp(-1)
        totals.append(total)
        with torch.no_grad():
            expected = (rows * (rows - total[:, None]).exp()).sum(-1)
            entropies.append(total - expected)
            means.append(rows.mean(-1))
            tops.append(rows.argmax(-1))
    log_probs = logits[which, targets].float() - torch.cat(totals)[which]
    is_top1 = torch.cat(tops)[which] == targets
    return log_probs, torch.cat(entropies)[which], torch.cat(means)[which], is_top1


def row_limit(device: torch.device) -> int:
    """Return how many tokens a row may have on a device."""
    return CPU_ROW_TOKENS if device.type == "cpu" else GPU_ROW_TOKENS
