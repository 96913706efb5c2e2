"""Summed log-probabilities of completions: every distinct prefix is computed once.

The requests' tokens form a trie, drawn in :mod:`.trie`: many questions with all their answers are
one row, after the cached keys and values of what they begin with (the few-shot primer). The
language-model head runs only where an answer's token is predicted.

A model that computes something else in such a row than for a sequence alone (found out by trying a
slice of it, :mod:`.slices`) is scored one whole sequence at a time instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import Cache, DynamicCache, PreTrainedModel

from grath_utils.engine import processes
from grath_utils.engine.attention import row_attention
from grath_utils.engine.encoding import Encoded, Request, encode_requests, refuse_unknown_ids
from grath_utils.engine.models import Policy, accepts
from grath_utils.engine.slices import TOKENS, plain_logits, say_once, why_not
from grath_utils.engine.trie import (
    CPU_ROW_TOKENS,
    Block,
    Trie,
    attention_mask,
    build_trie,
    plan_blocks,
    sequence_blocks,
)
from grath_utils.errors import ScoringError, UsageError

LOGIT_ROWS = 32  # rows of logits turned to float32 at a time: they stay in the processor's cache


@dataclass(frozen=True)
class Score:
    """What a completion got."""

    logprob: float  # sum over the completion's tokens, in nats
    tokens: int  # number of tokens of the completion
    straddles: bool  # a token spans the boundary between prompt and completion


class Work(NamedTuple):
    """How much there was to compute, in tokens fed to the model."""

    naive: int  # one sequence for each request
    distinct: int  # one token for each distinct prefix: the floor
    computed: int  # what the plan really feeds


@dataclass(frozen=True)
class Plan:
    """Requests, encoded and cut into forward passes. The same requests give the same plan."""

    method: str  # tree or plain
    encoded: list[Encoded]
    trie: Trie
    blocks: list[Block]
    # An edge is a distinct (prefix, next token): the node that predicts, and what it predicts.
    edge_node: np.ndarray  # (edges,) ascending
    edge_token: np.ndarray  # (edges,)
    edges: list[np.ndarray]  # for each request, the indices of its completion's edges

    @property
    def work(self) -> Work:
        computed = sum(len(block.nodes) for block in self.blocks)
        return Work(sum(e.length for e in self.encoded), len(self.trie), computed)

    def own_edges(self, block: Block) -> slice:
        """Return the edges whose node belongs to ``block``."""
        return slice(*np.searchsorted(self.edge_node, [block.first, block.last]).tolist())


def score_completions(policy: Policy, requests: Sequence[Request], **options: Any) -> list[Score]:
    """Return the summed log-probability of each request's completion given its prompt.

    Duplicates cost nothing. The options are those of :func:`plan_encoded`.

    Raises:
        ScoringError: an item cannot be encoded, or a score is not finite; the item is named.
    """
    return run_plan(policy, requests, plan_requests(policy, requests, **options))


def plan_requests(policy: Policy, requests: Sequence[Request], **options: Any) -> Plan:
    """Encode the requests and decide on the forward passes, without running any of them."""
    encoded = encode_requests(policy.tokenizer, requests, policy.max_length)
    return plan_encoded(policy, encoded, **options)


def plan_encoded(
    policy: Policy, encoded: list[Encoded], *, batch_tokens: int = 4096, method: str = "auto"
) -> Plan:
    """Decide on the forward passes for prompts and completions that are token ids already.

    A pass takes ``batch_tokens`` tokens, on a CPU at most ``CPU_ROW_TOKENS``. The method is
    ``tree``, ``plain``, or ``auto`` (tree where the model can).
    """
    budget = min(batch_tokens, CPU_ROW_TOKENS) if policy.device.type == "cpu" else batch_tokens
    if method == "auto":
        longest = max((e.length for e in encoded), default=0)
        reason = why_no_trees(policy, longest, budget) if encoded else ""
        method = "plain" if reason else "tree"
        if reason:
            say_once(
                policy.model,
                "rows",
                f"{policy.name}: sequences cannot share a row ({reason}), so each is scored alone: "
                "slower, and right",
            )
    if method not in ("tree", "plain"):
        raise UsageError(f'unknown scoring method "{method}"; there are auto, tree and plain')
    trie, paths = build_trie([e.inputs for e in encoded])
    blocks = plan_blocks(trie, budget) if method == "tree" else sequence_blocks(trie)

    pairs = [np.empty((2, 0), dtype=np.int64)]  # (2, completion) each: node, next token
    for path, e in zip(paths, encoded, strict=True):
        pairs.append(np.stack([path[len(path) - len(e.completion) :], e.completion]))
    edges, inverse = np.unique(np.concatenate(pairs, axis=1), axis=1, return_inverse=True)
    own = np.split(inverse.ravel(), np.cumsum([len(e.completion) for e in encoded[:-1]], dtype=int))
    refuse_unknown_ids(policy, [trie.token, edges[1]])
    return Plan(method, encoded, trie, blocks, *edges, own[: len(encoded)])


@torch.inference_mode()
def run_plan(
    policy: Policy,
    requests: Sequence[Request],
    plan: Plan,
    *,
    done: Mapping[int, Sequence[float]] | None = None,
    on_batch: Callable[[int, list[float], int], None] | None = None,
    split: bool = False,
) -> list[Score]:
    """Run the forward passes of ``plan`` and add up each request's score.

    Args:
        done: log-probabilities of passes computed before, by their number, to resume from.
        on_batch: called after each pass with its number, its log-probabilities and its tokens.
        split: divide the passes among the processes of this launch; each is told all of them.
    """
    done = done or {}
    logprobs = np.full(len(plan.edge_node), np.nan, dtype=np.float32)
    for number in done.keys() & range(len(plan.blocks)):
        logprobs[plan.own_edges(plan.blocks[number])] = done[number]
    todo = [number for number in range(len(plan.blocks)) if number not in done]
    own, turns = processes.own_share(todo) if split else (todo, len(todo))
    with _evaluating(policy.model), row_attention(policy.model, shared=plan.method == "tree"):
        found = _passes(policy, plan, set(own))
        for _ in range(turns):
            mine = next(found, None)
            for number, values in filter(None, processes.gather(mine) if split else [mine]):
                edges = plan.own_edges(plan.blocks[number])
                logprobs[edges] = values
                bad = np.flatnonzero(~np.isfinite(values)) + edges.start
                if len(bad):
                    hit = next(i for i, its in enumerate(plan.edges) if np.isin(bad, its).any())
                    raise ScoringError(
                        f"item {requests[hit].item}: the log-probability of "
                        f"{requests[hit].completion!r} is not finite; the model's weights are "
                        "damaged or its training diverged (a score of NaN is never counted as an "
                        "answer)"
                    )
                if on_batch is not None:
                    on_batch(number, values.tolist(), len(plan.blocks[number].nodes))
    return [
        Score(float(logprobs[edges].sum(dtype=np.float64)), len(edges), encoded.straddles)
        for edges, encoded in zip(plan.edges, plan.encoded, strict=True)
    ]


@contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Switch dropout off for a while: with it, a score would be a matter of luck."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _passes(policy: Policy, plan: Plan, wanted: set[int]) -> Iterator[tuple[int, np.ndarray]]:
    """Yield the number and log-probabilities of each wanted pass; run the prefixes they need."""
    model, selects = policy.model, accepts(policy.model, "logits_to_keep")
    kept: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}  # by block: keys, values so far
    for number in sorted(wanted.union(*(plan.blocks[n].prefix for n in wanted))):
        block = plan.blocks[number]
        kept = {n: layers for n, layers in kept.items() if n in block.prefix}
        edges = plan.own_edges(block)
        predictors, which = np.unique(plan.edge_node[edges], return_inverse=True)
        row = tree_row(plan.trie, block.nodes, np.searchsorted(block.nodes, predictors))
        row = {name: tensor.to(policy.device) for name, tensor in row.items()}
        if plan.method == "plain":
            row, cache = alone(row), None
        else:
            cache = DynamicCache(kept[block.prefix[-1]] if block.prefix else None)
        logits = row_logits(model, row, model.dtype, selects=selects, cache=cache)
        if block.keep:
            kept[number] = [(layer.keys, layer.values) for layer in cache.layers]
        if number in wanted:
            targets = torch.from_numpy(plan.edge_token[edges])
            yield number, edge_logprobs(logits, torch.from_numpy(which), targets).cpu().numpy()


def tree_row(trie: Trie, nodes: np.ndarray, predictors: np.ndarray) -> dict[str, torch.Tensor]:
    """Return what :func:`row_logits` reads, for a row of ``T`` nodes."""
    arrays = {
        "ids": trie.token[nodes][None],  # (1, T)
        "positions": trie.depth[nodes][None],  # (1, T)
        "visible": attention_mask(trie, nodes),  # (T, T) boolean, query first
        "predictors": predictors,  # (P,) ascending: the places whose logits are wanted
    }
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def alone(row: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a row that holds one sequence, to be fed without a mask or positions of ours."""
    return {name: values for name, values in row.items() if name not in ("positions", "visible")}


def row_logits(
    model: Callable[..., Any],
    row: Mapping[str, torch.Tensor],
    dtype: torch.dtype,
    *,
    selects: bool,
    cache: Cache | None = None,
) -> torch.Tensor:
    """Return the logits at the ``predictors`` of a :func:`tree_row`: (P, vocabulary).

    One that is :func:`alone` is computed as the model computes any sequence. ``dtype`` is that of
    the hidden states, and so of the mask. If the model ``selects``, its forward takes
    ``logits_to_keep``, and the head runs where it is needed. ``cache`` holds keys and values of a
    prefix that the whole row sees; the row's own are added.
    """
    places = row["predictors"]
    # There is no way to ask for none; for a number, torch may copy the output head for each row.
    kept = places if len(places) else places.new_tensor([row["ids"].shape[1] - 1])
    options = {"logits_to_keep": kept} if selects else {}
    if "visible" not in row:
        logits = plain_logits(model, row["ids"], **options)[0]
        return logits[: len(places)] if selects else logits[places]
    visible = row["visible"]
    past = cache.get_seq_length() if cache is not None else 0
    # Added to the attention scores, (1, 1, T, past + T); each layer would make it of a boolean one.
    mask = torch.zeros(len(visible), past + len(visible), dtype=dtype, device=visible.device)
    mask[:, past:].masked_fill_(~visible, torch.finfo(dtype).min)
    logits = model(
        input_ids=row["ids"],
        position_ids=row["positions"],
        attention_mask=mask[None, None],
        past_key_values=cache,
        use_cache=cache is not None,
        **options,
    ).logits[0]
    return logits[: len(places)] if selects else logits[places]


def edge_logprobs(logits: torch.Tensor, which: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return log softmax of ``logits`` (rows, vocabulary) at rows and tokens (edges,), float32."""
    if not len(which):
        return torch.empty(0)
    # A few rows at a time: a float32 copy of all logits would go through memory several times.
    total = torch.cat([rows.float().logsumexp(-1) for rows in logits.split(LOGIT_ROWS)])
    which, targets = which.to(logits.device), targets.to(logits.device)
    return logits[which, targets].float() - total[which]


def why_no_trees(policy: Policy, longest: int, row_tokens: int) -> str:
    """Return why sequences of up to ``longest`` tokens cannot share rows of a model, or ''.

    Asked of the model itself (:mod:`.slices`): a row as long as any of the plan's has to give each
    sequence in it the logits that it has alone.
    """
    # From 5.24 on, transformers says cache, and takes the older name until 5.40.
    for names in (("position_ids",), ("attention_mask",), ("past_key_values", "cache")):
        if not accepts(policy.model, *names):
            return f"its forward pass takes no {names[0]}"
    trial = partial(_trial, longest=longest, row_tokens=row_tokens)
    return why_not(policy.model, "rows", (longest, row_tokens), trial)


def _trial(
    model: PreTrainedModel, longest: int, row_tokens: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Compute a row of long sequences and, behind them, a short one; the last two also alone."""
    device = model.get_input_embeddings().weight.device
    draw, longest = np.random.default_rng(0), max(longest, 16)
    tail, cached = min(longest // 2, 32), 4  # of their tokens, own ones and those in the cache
    stem = draw.integers(TOKENS // 2, size=longest - tail)
    branches = draw.integers(TOKENS, size=(1 + row_tokens // tail, tail))
    short = [*stem[:cached], TOKENS - 1, *draw.integers(TOKENS, size=7)]  # it sorts behind the rest
    trie, paths = build_trie([*([*stem, *branch] for branch in sorted(branches.tolist())), short])

    cache, everything = DynamicCache(), np.arange(len(trie))
    places = np.unique(np.concatenate([path[cached:] for path in paths[-2:]]))
    for nodes, wanted in ((everything[:cached], []), (everything[cached:], places - cached)):
        row = tree_row(trie, nodes, np.asarray(wanted, dtype=np.int64))
        row = {name: tensor.to(device) for name, tensor in row.items()}
        selects = accepts(model, "logits_to_keep")
        with row_attention(model):
            shared = row_logits(model, row, torch.float32, selects=selects, cache=cache)
    for path in paths[-2:]:
        plain = plain_logits(model, torch.from_numpy(trie.token[path])[None].to(device))
        yield shared[np.searchsorted(places, path[cached:])], plain[0, cached:]
