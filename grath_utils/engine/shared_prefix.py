"""Attention over prefixes that many sequences share, without a copy of one for any of them.

The keys and values of a prefix are kept once. For the prefix part of attention the batch is
folded into the query length, so that one large product serves all sequences; each sequence's own
tokens lie in a preallocated cache. The two parts are merged exactly, by their log-sum-exp (as
FlashAttention merges blocks, arXiv 2205.14135, section 3.1; for shared prefixes: Hydragen,
arXiv 2402.05099).

Works for every model of transformers that calls the attention interface with plain causal
attention; :func:`why_not_shared` finds out by trying.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from transformers import AttentionInterface, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from grath_utils.engine.attention import attend, attention
from grath_utils.engine.models import unwrapped
from grath_utils.engine.slices import TOKENS, plain_logits, why_not

NAME = "grath_shared_prefix"

# For each layer, keys and values of shape (1, kv heads, tokens, dim).
Layers = list[tuple[torch.Tensor, torch.Tensor]]


class SharedPrefixCache(Cache):
    """Keys and values: of each prefix once, and of ``slots`` sequences with ``room`` tokens each.

    Slot ``s`` holds ``lengths[s]`` tokens after the prefix number ``owners[s]``. A forward pass
    works on neighbouring slots, which are views: no keys or values are gathered.
    """

    def __init__(self, prefixes: Sequence[Layers], slots: int, room: int):
        super().__init__(layers=[])
        self.prefixes = [[(keys[0], values[0]) for keys, values in each] for each in prefixes]
        self.prefix_lengths = [layers[0][0].shape[1] for layers in self.prefixes]
        keys = self.prefixes[0][0][0]
        self.dtype, self.device = keys.dtype, keys.device
        self.lengths = torch.zeros(slots, dtype=torch.long, device=self.device)
        self.owners = [0] * slots
        self.own = [
            tuple(side.new_zeros((slots, side.shape[0], room, side.shape[2])) for side in layer)
            for layer in self.prefixes[0]
        ]

    def forward(
        self, model: Any, ids: torch.Tensor, *, reach: int, start: int = 0, keep: int = 1
    ) -> torch.Tensor:
        """Feed new tokens to the slots from ``start`` on; :meth:`advance` makes them stay.

        The model attends through this cache (:func:`attend_through`). ``ids`` are (batch, width),
        padding included; ``reach`` is the length of the longest own part afterwards. Returns the
        logits after the last ``keep`` input tokens: (batch, keep, vocabulary).
        """
        batch, width = ids.shape
        self._rows, self._reach = slice(start, start + batch), reach
        # (batch, width): where in its slot each new token goes, and so its distance to the prefix
        self._places = self.lengths[self._rows, None] + torch.arange(width, device=self.device)
        own = torch.arange(reach, device=self.device)
        visible = own <= self._places[:, :, None]  # (batch, width, reach): causal, no padding
        owners = self.owners[self._rows]
        self._before = torch.tensor([self.prefix_lengths[o] for o in owners], device=self.device)
        places: dict[int, list[int]] = {}
        for place, owner in enumerate(owners):
            places.setdefault(owner, []).append(place)
        # By prefix with tokens in it: which of the pass's sequences follow it, and its layers.
        self.parts = [
            (places[o] if len(places) > 1 else slice(None), self.prefixes[o])
            for o in places
            if self.prefix_lengths[o]
        ]
        zero = torch.zeros((), dtype=self.dtype, device=self.device)
        self.mask = torch.where(visible, zero, float("-inf"))[:, None]
        return model(
            input_ids=ids,
            position_ids=self.position_ids,
            past_key_values=self,
            use_cache=True,
            # As indices: of a strided slice, a number, torch may make one product for each row, and
            # for each a copy of the output head.
            logits_to_keep=torch.arange(width - keep, width, device=self.device),
        ).logits

    @property
    def position_ids(self) -> torch.Tensor:
        """(batch, width): the positions of the new tokens, counted from the prefix's first."""
        return self._places + self._before[:, None]

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *_: Any,
        **__: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store the new (batch, heads, width, dim); return each slot's own part, not the prefix."""
        keys, values = (store[self._rows] for store in self.own[layer_idx])  # views
        batch = torch.arange(len(keys), device=self.device)[:, None]
        keys[batch, :, self._places] = key_states.transpose(1, 2)
        values[batch, :, self._places] = value_states.transpose(1, 2)
        return keys[:, :, : self._reach], values[:, :, : self._reach]

    def advance(self, counts: torch.Tensor | int) -> None:
        """Count the tokens just stored as there to stay; what lies beyond is overwritten later."""
        self.lengths[self._rows] += counts

    def move(self, source: int, target: int, length: int) -> None:
        """Copy a slot with ``length`` tokens onto another one."""
        for side in (side for layer in self.own for side in layer):
            side[target, :, :length] = side[source, :, :length]
        self.lengths[target] = length
        self.owners[target] = self.owners[source]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return a prefix's length; the model is given its position ids, so needs no more."""
        return max(self.prefix_lengths)


_active: SharedPrefixCache | None = None


def shared_prefix_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *_: Any,
    scaling: float | None = None,
    **__: Any,
) -> tuple[torch.Tensor, None]:
    """Attend to each shared prefix and to the own tokens, merged by log-sum-exp.

    From the query (batch, heads, width, dim) and the own keys and values as the cache returned
    them (batch, kv heads, reach, dim) to (batch, width, heads, dim) and no attention weights.
    """
    cache = _active  # set by attend_through
    batch, heads, width, dim = query.shape
    kv_heads = key.shape[1]
    scale = dim**-0.5 if scaling is None else scaling
    # Query heads of one group share keys: fold the group into the query length, (b, kv, g*w, dim).
    folded = query.reshape(batch, kv_heads, -1, dim)
    merged, own_lse = attend(folded, key, value, cache.mask, scale)
    for places, layers in cache.parts:
        # For the prefix, the batch goes into the query length too: (1, kv, b*g*w, dim).
        some = folded[places]
        together = some.transpose(0, 1).reshape(1, kv_heads, -1, dim)
        prefix_key, prefix_value = layers[module.layer_idx]
        first, first_lse = attend(together, prefix_key[None], prefix_value[None], None, scale)
        first = first.view(kv_heads, len(some), -1, dim).transpose(0, 1)
        first_lse = first_lse.view(kv_heads, len(some), -1).transpose(0, 1)
        # exp(lse) of a part is its softmax denominator, so this is its weight in the whole.
        weight = torch.sigmoid(first_lse - own_lse[places]).unsqueeze(-1)
        mixed = torch.lerp(merged[places].float(), first.float(), weight)
        merged[places] = mixed.to(query.dtype)
    return merged.reshape(batch, heads, width, dim).transpose(1, 2), None


AttentionInterface.register(NAME, shared_prefix_attention)


@contextlib.contextmanager
def attend_through(model: PreTrainedModel, cache: SharedPrefixCache) -> Iterator[None]:
    """Make the model attend through ``cache`` while the context lasts."""
    global _active
    outer, _active = _active, cache
    try:
        with attention(model, NAME):
            yield
    finally:
        _active = outer


@torch.inference_mode()
def compute_prefix(model: PreTrainedModel, token_ids: Sequence[int]) -> Layers:
    """Return the (keys, values) of a prefix, for each layer."""
    cache = DynamicCache()
    ids = torch.tensor([list(token_ids)], device=model.get_input_embeddings().weight.device)
    last = torch.tensor([len(token_ids) - 1], device=ids.device)
    model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=last)
    return [(layer.keys, layer.values) for layer in cache.layers]


def why_not_shared(model: PreTrainedModel, longest: int) -> str:
    """Return why a model cannot share a prefix in sequences of ``longest`` tokens, or ''.

    Asked of the model itself (:mod:`.slices`).
    """
    if not unwrapped(model)._can_set_attn_implementation():
        return "it does not use transformers' attention interface"
    return why_not(model, "prefix", (longest,), lambda small: _trial(small, longest))


def _trial(model: PreTrainedModel, longest: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Decode two tokens each of a long and a short sequence that share a beginning, and alone."""
    device = model.get_input_embeddings().weight.device
    shared, short = 8, 14
    ids = torch.from_numpy(np.random.default_rng(0).integers(TOKENS, size=(2, max(longest, 16))))
    ids[1, :shared] = ids[0, :shared]
    ids = ids.to(device)
    lengths = (ids.shape[1], short)
    prefix = compute_prefix(model, ids[0, :shared].tolist())
    cache = SharedPrefixCache([prefix], slots=2, room=ids.shape[1])
    decoded = []
    with attend_through(model, cache):
        filled = torch.tensor([length - shared - 2 for length in lengths], device=device)
        cache.forward(model, ids[:, shared:-2], reach=ids.shape[1] - shared - 2)
        cache.advance(filled)
        for step in (2, 1):
            tokens = torch.stack([ids[i, length - step] for i, length in enumerate(lengths)])
            logits = cache.forward(model, tokens[:, None], reach=int(cache.lengths.max()) + 1)
            cache.advance(1)
            decoded.append(logits[:, -1])
    for i, length in enumerate(lengths):
        alone = plain_logits(model, ids[i : i + 1, :length])[0, -2:]
        yield torch.stack([logits[i] for logits in decoded]), alone
