"""Token sequences as a trie, and the plan of forward passes that computes each of its nodes once.

Evaluation asks one model about thousands of sequences that begin alike: the few-shot primer, then
the question, then the first words of an answer. A node of the trie is one distinct prefix, so no
scorer that looks at every distinct prefix can run fewer tokens than there are nodes. Two answers
to one question, and what each token sees::

    P1 P2 Q1 +- A1 A2 (A3)        fed, in one row:     P1 P2 Q1 A1 A2 B1
             +- B1 (B2)           depth = position:     0  1  2  3  4  3
                                  end of the subtree:   6  6  6  5  5  6
    attention        P1 P2 Q1 A1 A2 B1
           P1         x                         the logits at Q1 give log p(A1) and log p(B1),
           P2         x  x                      those at A1 give log p(A2), those at A2 log p(A3),
           Q1         x  x  x                   those at B1 give log p(B2);
           A1         x  x  x  x                the last token of an answer is never fed
           A2         x  x  x  x  x
           B1         x  x  x  .  .  x          B1 does not see the other answer

Nodes are numbered in depth-first preorder, which is the lexicographic order of the sequences. Then
the subtree of node ``a`` is the range ``a .. end[a]``, "``a`` is an ancestor of ``d`` or ``d``
itself" is ``a <= d < end[a]``, and any cut of the preorder is a batch (tree attention as in
SpecInfer, arXiv 2305.09781). This module is plain numpy: it knows nothing of models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# The longest row on a CPU, the fastest measured. Beyond it, masked-out attention costs more than
# larger matrix products save.
CPU_ROW_TOKENS = 512
PASS_OVERHEAD = 64  # tokens that cost as much as starting a forward pass does (measured, CPU)


@dataclass(frozen=True)
class Trie:
    """Distinct prefixes of token sequences, in preorder. All arrays have shape (nodes,)."""

    token: np.ndarray
    depth: np.ndarray  # position of the node's token in its sequence, from 0
    end: np.ndarray  # one past the last node of the subtree
    parent: np.ndarray  # -1 for the first token of a sequence

    def __len__(self) -> int:
        return len(self.token)

    def ancestors(self, node: int) -> list[int]:
        """Return the nodes above ``node``, the topmost first."""
        path = []
        while (node := int(self.parent[node])) >= 0:
            path.append(node)
        return path[::-1]


def build_trie(sequences: Sequence[Sequence[int]]) -> tuple[Trie, list[np.ndarray]]:
    """Merge token sequences (none empty) into a trie; return it and each sequence's nodes."""
    # Big-endian bytes sort as the numbers do, and much faster than lists of them.
    keys = [np.asarray(ids, dtype=">u4").tobytes() for ids in sequences]
    none = np.empty(0, dtype=np.int64)
    paths = [none] * len(sequences)
    tokens, depths, parents, closed = [none], [none], [none], []
    before, path, count = none, none, 0
    for index in sorted(range(len(keys)), key=keys.__getitem__):
        ids = np.asarray(sequences[index], dtype=np.int64)
        both = min(len(before), len(ids))
        different = np.flatnonzero(before[:both] != ids[:both])
        shared = int(different[0]) if len(different) else both
        if shared < len(ids):  # otherwise it is the sequence before it, once more
            closed.append((path[shared:], count))  # nothing more comes below these nodes
            path = np.concatenate([path[:shared], np.arange(count, count + len(ids) - shared)])
            tokens.append(ids[shared:])
            depths.append(np.arange(shared, len(ids)))
            parents.append(np.concatenate([[-1], path])[shared:-1])
            before, count = ids, count + len(ids) - shared
        paths[index] = path
    end = np.full(count, count)
    for nodes, at in closed:
        end[nodes] = at
    token, depth, parent = (np.concatenate(parts) for parts in (tokens, depths, parents))
    return Trie(token, depth, end, parent), paths


@dataclass(frozen=True)
class Block:
    """One forward pass: some nodes of the trie, over the cached keys and values of their prefix.

    Its own nodes are ``first .. last`` (exclusive); each node of the trie belongs to one block.
    """

    nodes: np.ndarray  # what is fed in, ascending: uncached ancestors, then first .. last
    first: int
    last: int
    prefix: tuple[int, ...] = ()  # blocks whose keys and values come before, outermost first
    keep: bool = False  # later blocks need this one's keys and values


def plan_blocks(trie: Trie, budget: int) -> list[Block]:
    """Cut the trie into forward passes of at most about ``budget`` tokens.

    A long unbranched run with much below it (a few-shot primer) becomes a kept block of its own;
    the rest is cut in preorder, preferably between questions, and what few ancestors a cut divides
    are fed twice: only these may take a block over the budget. Every prefix comes before its use.
    """
    blocks: list[Block] = []

    def add(first: int, last: int, prefix: tuple[int, ...], cached: int, keep: bool) -> None:
        nodes = np.array([*trie.ancestors(first)[cached:], *range(first, last)])
        blocks.append(Block(nodes, first, last, prefix, keep))

    def cut(start: int, stop: int, prefix: tuple[int, ...], cached: int) -> None:
        """Cut ``start .. stop`` into rows: each takes the most new tokens for what it costs."""
        while start < stop:
            last = min(start + max(budget - int(trie.depth[start]) + cached, 1), stop)
            if last < stop:
                # After a row of 1, 2, ... tokens, how many ancestors the next has to feed again.
                repeated = trie.depth[start + 1 : last + 1] - cached
                taken = np.arange(1, len(repeated) + 1)
                last = start + 1 + int(np.argmax(taken / (taken + PASS_OVERHEAD + repeated)))
            add(start, last, prefix, cached, keep=False)
            start = last

    def plan(start: int, stop: int, prefix: tuple[int, ...], cached: int) -> None:
        """Plan ``start .. stop``, which all stand below the ``cached`` nodes of ``prefix``."""
        node = start
        while node < stop:
            end = int(trie.end[node])
            if end - node <= budget:
                node = end
                continue
            branching = np.flatnonzero(trie.end[node:end] != end)
            chain = int(branching[0]) if len(branching) else end - node  # the unbranched run
            kept = _worth_keeping(chain, end - node, budget)
            if not kept:
                node += chain
                continue
            cut(start, node, prefix, cached)
            inner, below, pieces = prefix, cached, -(-kept // budget)
            for piece in range(pieces):
                first, last = (node + kept * p // pieces for p in (piece, piece + 1))
                add(first, last, inner, below, keep=True)
                inner, below = (*inner, len(blocks) - 1), int(trie.depth[last - 1]) + 1
            plan(node + kept, end, inner, below)
            start = node = end
        cut(start, stop, prefix, cached)

    plan(0, len(trie), (), 0)
    return blocks


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


def sequence_blocks(trie: Trie) -> list[Block]:
    """Return one block for each whole sequence: no cache, no mask but the causal one."""
    leaves = np.flatnonzero(trie.end == np.arange(len(trie)) + 1).tolist()
    starts = [0, *(leaf + 1 for leaf in leaves[:-1])]
    return [
        Block(np.array([*trie.ancestors(leaf), leaf]), start, leaf + 1)
        for start, leaf in zip(starts, leaves, strict=False)
    ]


def attention_mask(trie: Trie, nodes: np.ndarray) -> np.ndarray:
    """Return which of a block's nodes see which: shape (len(nodes), len(nodes)), query first."""
    query, key = nodes[:, None], nodes[None, :]
    return (key <= query) & (query < trie.end[nodes][None, :])
