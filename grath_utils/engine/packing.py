"""A batch of preference pairs in few rows: each distinct prefix is computed once, and back.

The two answers of a pair follow the same prompt, and all prompts of a chat template begin alike.
The usual batch repeats all of that in every sequence and pads it to the longest. Here the batch is
a trie (:mod:`.trie`): one row holds many pairs, a mask lets every token see its own prefix only,
and the output head runs only where an answer's token is predicted. Two pairs with the template S::

    padded   S P1 P2 C1 C2       packed, one row     S P1 P2 C1 R1 Q1 D1 T1
             S P1 P2 R1 R2       position            0  1  2  3  3  1  2  2
             S Q1 D1 D2 --       predicts an answer        ^  ^  ^  ^  ^  ^
             S Q1 T1 T2 --       its targets              C1 C2 R2 D1 D2 T2
                                                          R1       T1

P2 predicts the first token of the chosen answer C and of the rejected answer R. Gradients of all
answers add up in the tokens that they share, so loss and gradient are those of the padded batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from grath_utils.engine.models import Policy
from grath_utils.engine.scoring import LOGIT_ROWS, alone, row_logits, tree_row, why_no_trees
from grath_utils.engine.trie import Trie, build_trie

# The longest row in training, which keeps its graph for the backward pass: on a CPU 256 tokens take
# no longer than the 512 of scoring, and 1.2 GB less at 1.5 billion weights. On a GPU 2048 fill the
# device, and masked-out attention stays below a tenth.
CPU_ROW_TOKENS, GPU_ROW_TOKENS = 256, 2048

Example = dict[str, Any]  # prompt_ids, chosen_ids, rejected_ids: lists of token ids
Side = tuple[Sequence[int], Sequence[int], int]  # prompt, answer, its row in the padded batch


def row_limit(policy: Policy, longest: int) -> int:
    """Return how many tokens a row may have; 0 if sequences cannot share one (each goes alone)."""
    limit = CPU_ROW_TOKENS if policy.device.type == "cpu" else GPU_ROW_TOKENS
    return 0 if why_no_trees(policy, longest, limit) else limit


def row_groups(examples: Sequence[Example], row_tokens: int) -> list[list[int]]:
    """Return which pairs, by their place, go into one row: as many as fit, in their order."""
    everything = list(range(len(examples)))
    if 0 < len(_trie(_sides(examples, everything))[0]) <= row_tokens:
        return [everything]
    groups: list[list[int]] = []
    for i in everything:
        if groups and len(_trie(_sides(examples, [*groups[-1], i]))[0]) <= row_tokens:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def pack(examples: Sequence[Example], row_tokens: int) -> list[dict[str, torch.Tensor]]:
    """Merge pairs into rows of at most ``row_tokens`` distinct tokens, or of one longer pair.

    With 0, each answer gets a row of its own, after its prompt (:func:`.scoring.alone`).

    A row is a :func:`.scoring.tree_row` and, for each of the ``E`` answer tokens predicted in it:
    ``which`` of the ``predictors`` does so; ``targets``, its id; ``sequence``, its row in the
    padded batch (all chosen answers, then all rejected ones); ``column``, its position there less
    one.
    """
    if not row_tokens:
        return [alone(_row([side])) for side in _sides(examples, range(len(examples)))]
    return [_row(_sides(examples, group)) for group in row_groups(examples, row_tokens)]


def _sides(examples: Sequence[Example], group: Sequence[int]) -> list[Side]:
    """Return the chosen answers of some pairs, then the rejected ones."""
    return [
        (examples[i]["prompt_ids"], examples[i][key], side * len(examples) + i)
        for side, key in enumerate(("chosen_ids", "rejected_ids"))
        for i in group
    ]


def _trie(sides: Sequence[Side]) -> tuple[Trie, list[Any]]:
    # Nothing is predicted from an answer's last token, so the model need not read it.
    return build_trie([[*prompt, *answer[:-1]] for prompt, answer, _ in sides])


def _row(sides: Sequence[Side]) -> dict[str, torch.Tensor]:
    trie, paths = _trie(sides)
    nodes = [path[len(p) - 1 :] for path, (p, _, _) in zip(paths, sides, strict=True)]
    predictors, which = np.unique(np.concatenate(nodes), return_inverse=True)
    edges = {
        "which": which.ravel(),
        "targets": np.concatenate([np.asarray(a, dtype=np.int64) for _, a, _ in sides]),
        "sequence": np.concatenate([np.full(len(a), i) for _, a, i in sides]),
        "column": np.concatenate([len(p) - 1 + np.arange(len(a)) for p, a, _ in sides]),
    }
    row = tree_row(trie, np.arange(len(trie)), predictors)
    return row | {name: torch.from_numpy(array) for name, array in edges.items()}


@dataclass
class PackedCollator:
    """TRL's padded batch, with the same batch packed beside it as ``rows``."""

    padded: Callable[[list[Example]], dict[str, Any]]  # TRL's DataCollatorForPreference
    row_tokens: int

    def __call__(self, examples: Sequence[Example]) -> dict[str, Any]:
        return {**self.padded(list(examples)), "rows": pack(examples, self.row_tokens)}

    def groups(self, examples: Sequence[Example]) -> list[list[int]]:
        """Return the pairs of each row: one backward pass each keeps no more than its graph."""
        return row_groups(examples, self.row_tokens)


@dataclass(frozen=True)
class PerToken:
    """What TRL's loss and log read of each answer token: all (2 B, T - 1), 0 elsewhere."""

    log_probs: torch.Tensor  # float32: log-probability of the token at the next position
    entropy: torch.Tensor  # of the distribution that the token was drawn from, in nats
    mean_logits: torch.Tensor
    is_top1: torch.Tensor


def packed_forward(
    model: Callable[..., Any], dtype: torch.dtype, *, selects: bool
) -> Callable[..., PerToken]:
    """Return a stand-in for ``model`` that computes TRL's per-token outputs from packed rows.

    TRL calls it as it would call the model (``input_ids``, ``labels``, ...); what it needs beyond
    the shape is in ``rows``. The arguments are those of :func:`.scoring.row_logits`.
    """

    def forward(*, input_ids: torch.Tensor, rows: list[dict[str, Any]], **_: Any) -> PerToken:
        parts = []
        for row in rows:
            logits = row_logits(model, row, dtype, selects=selects)
            parts.append(_target_outputs(logits, row["which"], row["targets"]))
        place = tuple(torch.cat([row[name] for row in rows]) for name in ("sequence", "column"))
        return _per_token(
            [torch.cat(values) for values in zip(*parts, strict=True)], input_ids, place
        )

    return forward


def padded_forward(model: Callable[..., Any], *, selects: bool) -> Callable[..., PerToken]:
    """Return a stand-in for ``model`` that computes them from the padded batch, in a single call.

    TRL's own multiplies hidden states by the output head's weight, past what else a model does.
    """

    def forward(
        *, input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor, **_: Any
    ) -> PerToken:
        sequence, column = torch.nonzero(labels[:, 1:] != -100, as_tuple=True)
        first = int(column.min()) if selects else 0
        # As indices: for a number, torch may copy the output head for each row.
        kept = torch.arange(first, labels.shape[1], device=labels.device)
        options = {"logits_to_keep": kept} if selects else {}
        batch = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
        logits = model(**batch, **options).logits[sequence, column - first]  # (E, vocabulary)
        which = torch.arange(len(logits), device=logits.device)
        outputs = _target_outputs(logits, which, labels[sequence, column + 1])
        return _per_token(outputs, input_ids, (sequence, column))

    return forward


def _per_token(
    outputs: Sequence[torch.Tensor], input_ids: torch.Tensor, place: tuple[torch.Tensor, ...]
) -> PerToken:
    shape = (input_ids.shape[0], input_ids.shape[1] - 1)
    return PerToken(*(values.new_zeros(shape).index_put(place, values) for values in outputs))


def _target_outputs(
    logits: torch.Tensor, which: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the fields of :class:`PerToken`, each (E,); only the first carries a gradient."""
    totals, statistics = [], []
    for rows in logits.split(LOGIT_ROWS):  # a float32 copy of some rows stays in the cache
        rows = rows.float()
        total = rows.logsumexp(-1)
        totals.append(total)
        with torch.no_grad():
            expected = (rows * (rows - total[:, None]).exp()).sum(-1)
            statistics.append((total - expected, rows.mean(-1), rows.argmax(-1)))
    entropy, mean, top = (torch.cat(parts)[which] for parts in zip(*statistics, strict=True))
    log_probs = logits[which, targets].float() - torch.cat(totals)[which]
    return log_probs, entropy, mean, top == targets
