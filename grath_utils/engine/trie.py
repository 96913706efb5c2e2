"""Token sequences as a trie, and the plan of forward passes that computes each of its nodes once.

Evaluation asks one model about thousands of sequences that begin alike: all share the few-shot
primer, all answers to a question share the question, and answers share their first words. A node
of the trie is one distinct prefix, so the number of nodes is the floor of the work: no scorer that
looks at every distinct prefix can run fewer tokens.

Nodes are numbered in depth-first preorder, which is the lexicographic order of the sequences. Then
the subtree of node ``a`` is the range ``a .. end[a]``, "``a`` is an ancestor of ``d`` or ``d``
itself" is ``a <= d < end[a]``, and any cut of the preorder is a batch (tree attention as in
SpecInfer, arXiv 2305.09781). This module is plain numpy: it knows nothing of models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Trie:
    """Distinct prefixes of token sequences, in preorder. All arrays have shape (nodes,)."""

    token: np.ndarray
    depth: np.ndarray
    """Position of the node's token in its sequence, from 0."""
    end: np.ndarray
    """One past the last node of the subtree."""
    parent: np.ndarray
    """-1 for the first token of a sequence."""

    def __len__(self) -> int:
        return len(self.token)

    def ancestors(self, node: int) -> list[int]:
        """Return the nodes above ``node``, the topmost first."""
        path = []
        while (node := int(self.parent[node])) >= 0:
            path.append(node)
        return path[::-1]

    def chain_end(self, node: int) -> int:
        """Return one past the last node of the unbranched run that starts at ``node``."""
        end = self.end[node]
        branching = np.flatnonzero(self.end[node:end] != end)
        return node + int(branching[0]) if len(branching) else int(end)


def build_trie(sequences: Sequence[Sequence[int]]) -> tuple[Trie, list[np.ndarray]]:
    """Merge token sequences into a trie.

    Args:
        sequences: token ids; none may be empty. Duplicates are fine.

    Returns:
        The trie, and for each sequence, in the order given, the nodes of its tokens.
    """
    # Big-endian bytes sort as the numbers do, and much faster than lists of them.
    keys = [np.asarray(ids, dtype=">u4").tobytes() for ids in sequences]
    order = sorted(range(len(keys)), key=keys.__getitem__)
    none = np.empty(0, dtype=np.int64)
    paths = [none] * len(sequences)
    tokens, depths, parents = [], [], []
    before, before_path, count = none, none, 0
    for index in order:
        ids = np.asarray(sequences[index], dtype=np.int64)
        shared = _common_prefix(before, ids)
        if shared < len(ids):
            new = np.arange(count, count + len(ids) - shared)
            path = np.concatenate([before_path[:shared], new])
            tokens.append(ids[shared:])
            depths.append(np.arange(shared, len(ids)))
            parents.append(np.concatenate([[-1], path])[shared:-1])
            before, before_path, count = ids, path, count + len(new)
        # In this order, a sequence that brings no token is the one before it, once more.
        paths[index] = before_path
    depth = np.concatenate([none, *depths])
    trie = Trie(
        token=np.concatenate([none, *tokens]),
        depth=depth,
        end=_subtree_ends(depth),
        parent=np.concatenate([none, *parents]).astype(np.int64),
    )
    return trie, paths


def _common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    n = min(len(a), len(b))
    different = np.flatnonzero(a[:n] != b[:n])
    return int(different[0]) if len(different) else n


def _subtree_ends(depth: np.ndarray) -> np.ndarray:
    """Return for each node the next node in preorder that is not deeper than it."""
    ends = np.empty(len(depth), dtype=np.int64)
    open_nodes: list[int] = []
    depths = depth.tolist()
    for node, d in enumerate(depths):
        while open_nodes and depths[open_nodes[-1]] >= d:
            ends[open_nodes.pop()] = node
        open_nodes.append(node)
    ends[open_nodes] = len(depth)
    return ends


@dataclass(frozen=True)
class Block:
    """One forward pass: some nodes of the trie, over the cached keys and values of their prefix."""

    nodes: np.ndarray
    """What is fed in, ascending: uncached ancestors, fed again, then ``first .. last``."""
    first: int
    last: int
    """The block's own nodes are ``first .. last`` (exclusive); each node belongs to one block."""
    prefix: tuple[int, ...]
    """Indices of the blocks whose keys and values come before, outermost first."""
    keep: bool
    """Whether later blocks need this one's keys and values."""


def plan_blocks(trie: Trie, budget: int) -> list[Block]:
    """Cut the trie into forward passes of at most about ``budget`` tokens.

    A long unbranched run with much below it (a few-shot primer) becomes a kept block of its own;
    the rest is cut in preorder, preferably between questions, and what few ancestors a cut divides
    are fed twice. Blocks come in an order in which every prefix is computed before its use.

    Args:
        trie: what to compute.
        budget: tokens in one forward pass; a block passes it only by its repeated ancestors.
    """
    blocks: list[Block] = []
    _plan_range(trie, budget, 0, len(trie), (), 0, blocks)
    return blocks


def _plan_range(
    trie: Trie,
    budget: int,
    start: int,
    stop: int,
    prefix: tuple[int, ...],
    cached: int,
    blocks: list[Block],
) -> None:
    """Plan the nodes ``start .. stop``, whose first ``cached`` ancestors are in ``prefix``."""
    node = start
    while node < stop:
        size = int(trie.end[node]) - node
        if size <= budget:
            node += size
            continue
        chain = trie.chain_end(node)
        kept = _worth_keeping(chain - node, size, budget)
        if not kept:
            node = chain
            continue
        _cut_rows(trie, budget, start, node, prefix, cached, blocks)
        inner = prefix
        pieces = -(-kept // budget)
        for piece in range(pieces):
            first, last = (node + kept * p // pieces for p in (piece, piece + 1))
            # Later pieces of the run find the earlier ones in the cache; only the first piece
            # has ancestors to feed again.
            top = _uncached(trie, first, cached) if first == node else []
            blocks.append(Block(_nodes(top, first, last), first, last, inner, keep=True))
            inner = (*inner, len(blocks) - 1)
        below = int(trie.depth[node]) + kept
        _plan_range(trie, budget, node + kept, node + size, inner, below, blocks)
        start = node = node + size
    _cut_rows(trie, budget, start, stop, prefix, cached, blocks)


def _worth_keeping(chain: int, size: int, budget: int) -> int:
    """Return how many tokens of an unbranched run to compute once and keep.

    Keeping costs one more forward pass, whose fixed cost is that of some tens of tokens; not
    keeping costs the run again in each row below it.
    """
    whole_pieces = -(-(size - budget) // budget) * budget
    if whole_pieces <= chain:
        return whole_pieces  # what remains fits in one row, together with all that is below
    rows = -(-(size - chain) // max(budget - chain, 1))
    return chain if chain * (rows - 1) > PASS_OVERHEAD else 0


PASS_OVERHEAD = 64  # tokens that cost as much as starting a forward pass does (measured, CPU)


def _cut_rows(
    trie: Trie,
    budget: int,
    start: int,
    stop: int,
    prefix: tuple[int, ...],
    cached: int,
    blocks: list[Block],
) -> None:
    """Cut ``start .. stop`` into rows, preferably where few ancestors are divided."""
    while start < stop:
        top = _uncached(trie, start, cached)
        room = max(budget - len(top), 1)
        last = min(start + room, stop)
        if last < stop:
            last = start + _best_cut(trie.depth[start + 1 : last + 1] - cached)
        blocks.append(Block(_nodes(top, start, last), start, last, prefix, keep=False))
        start = last


def _best_cut(repeated: np.ndarray) -> int:
    """Return how many tokens to take into a row: the most new ones for what the row costs.

    Args:
        repeated: for a row of 1, 2, ... tokens, how many ancestors the cut after it divides, which
            the next row has to feed again.
    """
    taken = np.arange(1, len(repeated) + 1)
    return int(np.argmax(taken / (taken + PASS_OVERHEAD + repeated))) + 1


def _uncached(trie: Trie, node: int, cached: int) -> list[int]:
    return trie.ancestors(node)[cached:]


def _nodes(top: list[int], first: int, last: int) -> np.ndarray:
    return np.concatenate([np.asarray(top, dtype=np.int64), np.arange(first, last)])


def sequence_blocks(trie: Trie) -> list[Block]:
    """Return one block for each whole sequence: no cache, no mask but the causal one."""
    leaves = np.flatnonzero(trie.end == np.arange(len(trie)) + 1)
    starts = np.concatenate([[0], leaves[:-1] + 1])
    return [
        Block(np.array([*trie.ancestors(leaf), leaf]), int(start), int(leaf) + 1, (), keep=False)
        for start, leaf in zip(starts, leaves, strict=True)
    ]


def attention_mask(trie: Trie, nodes: np.ndarray) -> np.ndarray:
    """Return which of a block's nodes see which: shape (len(nodes), len(nodes)), query first."""
    query, key = nodes[:, None], nodes[None, :]
    return (key <= query) & (query < trie.end[nodes][None, :])
