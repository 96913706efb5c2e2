"""Summed log-probabilities of completions: every distinct prefix is computed once.

The requests' tokens form a trie (:mod:`.trie`). It is computed in a few hundred forward
passes of some hundred tokens each. One pass holds many questions with all their answers in one
row; a mask lets every token see its own prefix only, and its position is its depth. The keys and
values of a long common prefix (the few-shot primer) are computed once and put before each row. The
language-model head runs only where an answer's token is predicted.

A model that does not honour such masks (found out by trying it on a small trie) is scored in plain
padded batches instead: slower, the same numbers.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from grath_utils.engine import processes
from grath_utils.engine.encoding import Encoded, Request, encode_requests
from grath_utils.engine.trie import (
    Block,
    Trie,
    attention_mask,
    build_trie,
    plan_blocks,
    sequence_blocks,
)
from grath_utils.errors import ScoringError, UsageError

if TYPE_CHECKING:
    from grath_utils.engine.models import Policy

CPU_ROW_TOKENS = 512
"""Longest row on a CPU: the fastest measured. Beyond it, masked-out attention costs more than
larger matrix products save."""

LOGIT_ROWS = 32
"""Rows of logits turned to float32 at a time, so that they stay in the processor's cache."""

KeysValues = list[tuple[torch.Tensor, torch.Tensor]]
"""For each layer, tensors of shape (1, heads, tokens, head dimension)."""


@dataclass(frozen=True)
class Score:
    """What a completion got."""

    logprob: float
    """Sum over the completion's tokens, in nats."""
    tokens: int
    """Number of tokens of the completion."""
    straddles: bool
    """A token spans the boundary between prompt and completion."""


@dataclass(frozen=True)
class Work:
    """How much there was to compute, in tokens fed to the model."""

    naive: int
    """One sequence for each request."""
    distinct: int
    """One token for each distinct prefix: the floor."""
    computed: int
    """What the plan really feeds."""


@dataclass(frozen=True)
class Plan:
    """Requests, encoded and cut into forward passes. The same requests give the same plan."""

    method: str
    """``tree`` or ``plain``."""
    encoded: list[Encoded]
    trie: Trie
    blocks: list[Block]
    edge_node: np.ndarray
    """(edges,) ascending: the node that predicts, for each distinct (prefix, next token)."""
    edge_token: np.ndarray
    """(edges,) the token predicted there."""
    edges: list[np.ndarray]
    """For each request, the indices of its completion's edges."""

    @property
    def work(self) -> Work:
        return Work(
            naive=sum(e.length for e in self.encoded),
            distinct=len(self.trie),
            computed=sum(len(block.nodes) for block in self.blocks),
        )

    def own_edges(self, block: Block) -> slice:
        """Return the edges whose node belongs to ``block``."""
        first, last = np.searchsorted(self.edge_node, [block.first, block.last])
        return slice(int(first), int(last))


def score_completions(
    policy: Policy,
    requests: Sequence[Request],
    *,
    batch_tokens: int = 4096,
    method: str = "auto",
    done: Mapping[int, Sequence[float]] | None = None,
    on_batch: Callable[[int, list[float], int], None] | None = None,
) -> list[Score]:
    """Return the summed log-probability of each request's completion given its prompt.

    Args:
        policy: any causal language model with a fast tokenizer.
        requests: duplicates cost nothing.
        batch_tokens: tokens in one forward pass; on a CPU at most ``CPU_ROW_TOKENS`` are taken.
        method: ``tree``, ``plain``, or ``auto`` (tree where the model can).
        done: log-probabilities of passes computed before, by their number, to resume from.
        on_batch: called after each pass with its number, its log-probabilities and its tokens.

    Raises:
        ScoringError: an item cannot be encoded, or a score is not finite; the item is named.
    """
    plan = plan_requests(policy, requests, batch_tokens=batch_tokens, method=method)
    return run_plan(policy, requests, plan, done=done, on_batch=on_batch)


def plan_requests(
    policy: Policy, requests: Sequence[Request], *, batch_tokens: int = 4096, method: str = "auto"
) -> Plan:
    """Encode the requests and decide on the forward passes, without running any of them."""
    encoded = encode_requests(policy.tokenizer, requests, policy.max_length)
    return plan_encoded(policy, encoded, batch_tokens=batch_tokens, method=method)


def plan_encoded(
    policy: Policy, encoded: list[Encoded], *, batch_tokens: int = 4096, method: str = "auto"
) -> Plan:
    """Decide on the forward passes for prompts and completions that are token ids already."""
    longest = max((e.length for e in encoded), default=0)
    budget = min(batch_tokens, CPU_ROW_TOKENS) if policy.device.type == "cpu" else batch_tokens
    if method == "auto":
        method = "tree" if can_run_trees(policy, longest) else "plain"
    if method not in ("tree", "plain"):
        raise UsageError(f'unknown scoring method "{method}"; there are auto, tree and plain')
    return _plan(encoded, method, budget)


def _plan(encoded: list[Encoded], method: str, budget: int) -> Plan:
    trie, paths = build_trie([e.inputs for e in encoded])
    blocks = plan_blocks(trie, budget) if method == "tree" else sequence_blocks(trie)

    counts = np.array([len(e.completion) for e in encoded], dtype=np.int64)
    node = [path[len(path) - count :] for path, count in zip(paths, counts, strict=True)]
    pairs = np.stack(
        [
            np.concatenate([np.empty(0, np.int64), *node]),
            np.array([token for e in encoded for token in e.completion], dtype=np.int64),
        ]
    )
    distinct, inverse = np.unique(pairs, axis=1, return_inverse=True)
    edges = np.split(inverse.ravel(), np.cumsum(counts)[:-1]) if len(counts) else []
    return Plan(method, encoded, trie, blocks, distinct[0], distinct[1], edges)


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
        policy, requests, plan: what to score, and how.
        done: log-probabilities of passes computed before, by their number.
        on_batch: called after each pass with its number, its log-probabilities and its tokens.
        split: divide the passes among the processes of this launch. Each runs passes that one
            process would run, and all return all scores; ``on_batch`` is called in all.

    Raises:
        ScoringError: a score is not finite; names the item.
    """
    done = done or {}
    logprobs = np.full(len(plan.edge_node), np.nan, dtype=np.float32)
    todo = [number for number in range(len(plan.blocks)) if number not in done]
    own, turns = processes.own_share(todo) if split else (todo, len(todo))
    runner = _Runner(policy, plan)
    with _without_dropout(policy.model):
        for number in done.keys() & range(len(plan.blocks)):
            logprobs[plan.own_edges(plan.blocks[number])] = done[number]
        found = _passes(plan, own, runner)
        for _ in range(turns):
            mine = next(found, None)
            for number, values in filter(None, processes.gather(mine) if split else [mine]):
                block = plan.blocks[number]
                edges = plan.own_edges(block)
                logprobs[edges] = values
                _check_finite(requests, plan, edges, logprobs)
                if on_batch is not None:
                    on_batch(number, values.tolist(), len(block.nodes))
    return [
        Score(float(logprobs[edges].sum(dtype=np.float64)), len(edges), encoded.straddles)
        for edges, encoded in zip(plan.edges, plan.encoded, strict=True)
    ]


@contextmanager
def _without_dropout(model: torch.nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode for a while: dropout would make a score a matter of luck."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _passes(plan: Plan, own: Sequence[int], runner: _Runner) -> Iterator[tuple[int, np.ndarray]]:
    """Run the passes ``own`` and the prefixes that they stand on; yield the values of ``own``."""
    wanted = set(own)
    for number in sorted(wanted.union(*(plan.blocks[n].prefix for n in own))):
        block = plan.blocks[number]
        values = runner.run(number, block, plan.own_edges(block))
        if number in wanted:
            yield number, values


def _check_finite(
    requests: Sequence[Request], plan: Plan, own: slice, logprobs: np.ndarray
) -> None:
    bad = np.flatnonzero(~np.isfinite(logprobs[own])) + own.start
    if len(bad):
        hit = next(i for i, edges in enumerate(plan.edges) if np.isin(bad, edges).any())
        raise ScoringError(
            f"item {requests[hit].item}: the log-probability of {requests[hit].completion!r} is "
            "not finite; the model's weights are damaged or its training diverged (a score of NaN "
            "is never counted as an answer)"
        )


@dataclass
class _Runner:
    """Runs blocks one after another, keeping the caches that are still needed."""

    policy: Policy
    plan: Plan
    caches: dict[int, KeysValues] = field(default_factory=dict)
    """By block: keys and values of everything up to and including it."""

    def run(self, number: int, block: Block, own: slice) -> np.ndarray:
        """Return the log-probabilities of the block's own edges."""
        for old in set(self.caches) - set(block.prefix):
            del self.caches[old]
        plan, device = self.plan, self.policy.device
        ids = torch.from_numpy(plan.trie.token[block.nodes])[None].to(device)
        predictors, which = np.unique(plan.edge_node[own], return_inverse=True)
        scored = torch.from_numpy(np.searchsorted(block.nodes, predictors)).to(device)
        if plan.method == "plain":
            logits = self.policy.model(input_ids=ids, use_cache=False).logits[0, scored]
            return self._logprobs(logits, which, own)
        before = self.caches[block.prefix[-1]] if block.prefix else None
        logits, cache = forward(
            self.policy,
            ids,
            torch.from_numpy(plan.trie.depth[block.nodes])[None].to(device),
            torch.from_numpy(attention_mask(plan.trie, block.nodes)).to(device),
            scored,
            before,
            keep=block.keep,
        )
        if cache is not None:
            self.caches[number] = cache
        return self._logprobs(logits, which, own)

    def _logprobs(self, logits: torch.Tensor, which: np.ndarray, own: slice) -> np.ndarray:
        rows = torch.from_numpy(which).to(logits.device)
        targets = torch.from_numpy(self.plan.edge_token[own]).to(logits.device)
        return edge_logprobs(logits, rows, targets).cpu().numpy()


def forward(
    policy: Policy,
    ids: torch.Tensor,
    positions: torch.Tensor,
    visible: torch.Tensor,
    scored: torch.Tensor,
    before: KeysValues | None,
    *,
    keep: bool,
) -> tuple[torch.Tensor, KeysValues | None]:
    """Run one row of tokens, which all see the whole prefix and of the row what ``visible`` says.

    Args:
        policy: the model.
        ids: (1, row) token ids.
        positions: (1, row) position of each token in its own sequence.
        visible: (row, row) boolean, query first.
        scored: (scored,) places in the row whose logits are wanted, ascending.
        before: keys and values of the prefix.
        keep: return the keys and values of prefix and row.

    Returns:
        Logits (scored, vocabulary) in the model's dtype, and the new keys and values, if kept.
    """
    from transformers import DynamicCache

    past = before[0][0].shape[2] if before else 0
    mask = additive_mask(visible, policy.model.dtype, past)
    cache = DynamicCache(before) if before else DynamicCache()
    options: dict[str, Any] = {}
    selects = accepts(policy.model, "logits_to_keep")
    if selects:  # 1 stands for "the last only": there is no way to ask for none
        options["logits_to_keep"] = scored if len(scored) else 1
    output = policy.model(
        input_ids=ids,
        position_ids=positions,
        attention_mask=mask,
        past_key_values=cache,
        use_cache=True,
        **options,
    )
    logits = output.logits[0]
    if not selects:
        logits = logits[scored]
    elif not len(scored):
        logits = logits[:0]
    kept = [(layer.keys, layer.values) for layer in cache.layers] if keep else None
    return logits, kept


def additive_mask(visible: torch.Tensor, dtype: torch.dtype, past: int = 0) -> torch.Tensor:
    """Return what is added to the attention scores, shape (1, 1, row, past + row).

    A boolean mask would be turned into this in every layer.

    Args:
        visible: (row, row) boolean, query first.
        dtype: of the hidden states.
        past: tokens before the row, which all of it sees.
    """
    row = len(visible)
    mask = torch.zeros(row, past + row, dtype=dtype, device=visible.device)
    mask[:, past:].masked_fill_(~visible, torch.finfo(dtype).min)
    return mask[None, None]


def edge_logprobs(logits: torch.Tensor, which: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return log softmax of chosen logits, in float32.

    Args:
        logits: (rows, vocabulary), any floating dtype.
        which: (edges,) the row of each wanted value.
        targets: (edges,) its token.

    Returns:
        (edges,) float32.
    """
    if not len(which):
        return torch.empty(0)
    # A few rows at a time: a float32 copy of all logits would go through memory several times.
    total = torch.cat([rows.float().logsumexp(-1) for rows in logits.split(LOGIT_ROWS)])
    return logits[which, targets].float() - total[which]


def accepts(model: torch.nn.Module, argument: str) -> bool:
    """Tell whether the model's forward (below any adapter) has a parameter of this name."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return argument in inspect.signature(inner.forward).parameters


# --- can this model do it? -----------------------------------------------------------------------


HALF_PRECISION_NATS = 0.5
"""What a token's log-probability may differ by in a 16-bit type, computed in two orders. It says
little about masks: rounding gave up to 0.16 on a model that training had drifted, and letting the
branches see each other 0.08 on its base. Hence :func:`_heeds_mask_and_positions`."""


def can_run_trees(policy: Policy, longest: int) -> bool:
    """Tell whether the model honours 4-D masks, position ids and a given cache.

    Asked of the model itself: a small trie is scored both ways, and must come out the same; and
    what it says must depend on mask and positions. Attention over a sliding window shorter than the
    longest sequence is refused, since the mask says nothing of windows.
    """
    config = policy.model.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    if window is not None and getattr(config, "use_sliding_window", True) and longest > window:
        return False
    needed = ("position_ids", "attention_mask", "past_key_values")
    if not all(accepts(policy.model, argument) for argument in needed):
        return False
    plans = [_trial_plan(policy, method) for method in ("tree", "plain")]
    requests = [Request("", "", "trial")] * len(plans[0].encoded)
    try:
        if not _heeds_mask_and_positions(policy):
            return False
        tree, plain = (run_plan(policy, requests, plan) for plan in plans)
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError):
        return False  # the ways in which models refuse a mask, a cache or a position
    exact = policy.model.dtype == torch.float32
    per_token = 1e-3 if exact else HALF_PRECISION_NATS
    return all(
        abs(a.logprob - b.logprob) <= per_token * a.tokens for a, b in zip(tree, plain, strict=True)
    )


@torch.inference_mode()
def _heeds_mask_and_positions(policy: Policy) -> bool:
    """Tell whether another mask, and other positions, change the logits at all.

    A model that ignores either computes the very same numbers without it, in any precision.
    """
    tokens = [
        token % policy.model.get_input_embeddings().num_embeddings for token in range(7, 163, 13)
    ]
    ids = torch.tensor([tokens], device=policy.device)
    in_order = torch.arange(12, device=policy.device)[None]
    branches = torch.tensor([[*range(8), *range(4, 8)]], device=policy.device)
    causal = torch.ones(12, 12, dtype=torch.bool, device=policy.device).tril()
    apart = causal.clone()
    apart[8:, 4:8] = False  # the second branch does not see the first
    last = torch.tensor([11], device=policy.device)
    with _without_dropout(policy.model):
        right, other_mask, other_positions = (
            forward(policy, ids, positions, visible, last, None, keep=False)[0]
            for positions, visible in ((branches, apart), (branches, causal), (in_order, apart))
        )
    return not (torch.equal(right, other_mask) or torch.equal(right, other_positions))


def _trial_plan(policy: Policy, method: str) -> Plan:
    """A primer and three branches, in rows so short that primer, row and cut all occur."""
    size = policy.model.get_input_embeddings().num_embeddings
    token = [(7 + 13 * i) % size for i in range(48)]
    primer = np.array(token[:20], dtype=np.int32)
    branches = [token[20:27], token[20:23] + token[30:36], token[36:48]]
    encoded = [
        Encoded(
            np.append(primer, np.array(branch[:2], dtype=np.int32)),
            tuple(branch[2:]),
            straddles=False,
        )
        for branch in branches
    ]
    return _plan(encoded, method, budget=10)
