"""Attention over a prefix that many sequences share, without a copy of it for any of them.

The keys and values of the prefix are kept once. For the prefix part of attention the batch is
folded into the query length, so that one large product serves all sequences; each sequence's own
tokens lie in a preallocated cache. The two parts are merged exactly, by their log-sum-exp (as
FlashAttention merges blocks, arXiv 2205.14135, section 3.1; for shared prefixes: Hydragen,
arXiv 2402.05099).

Works for every model of transformers that calls the attention interface with plain causal
attention; :func:`can_share_prefix` finds out by trying.
"""

from __future__ import annotations

import contextlib
import math
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import AttentionInterface, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

NAME = "grath_shared_prefix"


class SharedPrefixCache(Cache):
    """Keys and values: of the prefix once, and of ``slots`` sequences with ``room`` tokens each.

    Slot ``s`` holds ``lengths[s]`` tokens after the prefix. A forward pass works on the slots
    ``start … start + batch`` of :meth:`select`, which are views: nothing is gathered.
    """

    def __init__(self, prefix: Sequence[tuple[torch.Tensor, torch.Tensor]], slots: int, room: int):
        """Take over the prefix's (keys, values) of each layer, of shape (1, heads, tokens, dim)."""
        super().__init__(layers=[])
        self.prefix = [(keys[0], values[0]) for keys, values in prefix]
        keys = self.prefix[0][0]
        self.prefix_length = keys.shape[1]
        self.device = keys.device
        self.lengths = torch.zeros(slots, dtype=torch.long, device=keys.device)
        self.own = [
            tuple(side.new_zeros((slots, side.shape[0], room, side.shape[2])) for side in layer)
            for layer in self.prefix
        ]
        self.select(0, slots, 1)

    def select(self, start: int, batch: int, width: int, reach: int | None = None) -> None:
        """Choose the slots and the number of new tokens of the next forward pass.

        Args:
            start, batch: the slots.
            width: new tokens a sequence, padding included.
            reach: longest own part afterwards, if known (saves asking the device).
        """
        self._rows = slice(start, start + batch)
        lengths = self.lengths[self._rows]
        # (batch, width): where in its slot each new token goes, and so its distance to the prefix
        self._places = lengths[:, None] + torch.arange(width, device=self.device)
        self._reach = int(lengths.max()) + width if reach is None else reach
        own = torch.arange(self._reach, device=self.device)
        visible = own <= self._places[:, :, None]  # (batch, width, reach): causal, no padding
        keys = self.prefix[0][0]
        zero = torch.zeros((), dtype=keys.dtype, device=self.device)
        self.mask = torch.where(visible, zero, float("-inf"))[:, None]
        self._batch_index = torch.arange(start, start + batch, device=self.device)[:, None]

    @property
    def position_ids(self) -> torch.Tensor:
        """(batch, width): the positions of the new tokens, counted from the prefix's first."""
        return self._places + self.prefix_length

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *_: Any,
        **__: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store the new (batch, heads, width, dim); return each slot's own part, not the prefix."""
        out = []
        for store, new in zip(self.own[layer_idx], (key_states, value_states), strict=True):
            store[self._batch_index, :, self._places] = new.transpose(1, 2)
            out.append(store[self._rows, :, : self._reach])
        return out[0], out[1]

    def advance(self, counts: torch.Tensor | int) -> None:
        """Count the tokens just stored as there to stay; what lies beyond is overwritten later."""
        self.lengths[self._rows] += counts

    def move(self, source: int, target: int, length: int) -> None:
        """Copy a slot with ``length`` tokens onto another one."""
        for layer in self.own:
            for side in layer:
                side[target, :, :length] = side[source, :, :length]
        self.lengths[target] = length

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the prefix's length; the model is given its position ids, so needs no more."""
        return self.prefix_length


_active: SharedPrefixCache | None = None


def shared_prefix_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attend to the shared prefix and to the own tokens, merged by log-sum-exp.

    Args:
        query: (batch, heads, width, dim).
        key, value: (batch, kv heads, reach, dim), the own part as the cache returned it.

    Returns:
        (batch, width, heads, dim), and None in the place of attention weights.
    """
    cache = _active
    if cache is None:
        raise RuntimeError(f"{NAME} attention runs only inside shared_prefix(...)")
    batch, heads, width, dim = query.shape
    kv_heads = key.shape[1]
    scale = dim**-0.5 if scaling is None else scaling
    # Query heads of one group share keys: fold the group into the query length, (b, kv, g*w, dim).
    folded = query.reshape(batch, kv_heads, -1, dim)
    group = heads // kv_heads
    mask = cache.mask if width == 1 else cache.mask.repeat(1, 1, group, 1)
    own, own_lse = _attend(folded, key, value, mask, scale)
    if cache.prefix_length == 0:
        return own.reshape(batch, heads, width, dim).transpose(1, 2), None
    # For the prefix, the batch goes into the query length too: (1, kv, b*g*w, dim).
    together = folded.transpose(0, 1).reshape(1, kv_heads, -1, dim)
    prefix_key, prefix_value = cache.prefix[module.layer_idx]
    first, first_lse = _attend(together, prefix_key[None], prefix_value[None], None, scale)
    first = first.view(kv_heads, batch, -1, dim).transpose(0, 1)
    first_lse = first_lse.view(kv_heads, batch, -1).transpose(0, 1)
    # exp(lse) of a part is its softmax denominator, so this is the weight that it has in the whole.
    weight = torch.sigmoid(first_lse - own_lse).unsqueeze(-1)
    merged = torch.lerp(own.float(), first.float(), weight).to(query.dtype)
    return merged.view(batch, heads, width, dim).transpose(1, 2), None


AttentionInterface.register(NAME, shared_prefix_attention)


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return attention (b, h, q, dim) and the log-sum-exp of its scores (b, h, q), in float32."""
    if query.device.type == "cpu" and _has_cpu_kernel():
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, attn_mask=mask, scale=scale
        )
    scores = torch.matmul(query, key.transpose(-1, -2)).float() * scale
    if mask is not None:
        scores = scores + mask
    lse = torch.logsumexp(scores, dim=-1)
    return torch.matmul(torch.exp(scores - lse[..., None]).to(value.dtype), value), lse


def _has_cpu_kernel() -> bool:
    """Tell whether torch has the CPU kernel that also returns the log-sum-exp (a private name)."""
    return hasattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu")


@contextlib.contextmanager
def shared_prefix(model: PreTrainedModel, cache: SharedPrefixCache) -> Iterator[None]:
    """Make the model attend through ``cache`` while the context lasts."""
    global _active
    inner = base_model(model)
    before = inner.config._attn_implementation
    inner.set_attn_implementation(NAME)
    outer, _active = _active, cache
    try:
        yield
    finally:
        _active = outer
        inner.set_attn_implementation(before)


def base_model(model: Any) -> PreTrainedModel:
    """Return the transformers model inside a PEFT wrapper (with its adapter layers in place)."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@torch.inference_mode()
def compute_prefix(
    model: PreTrainedModel, token_ids: Sequence[int]
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return the (keys, values) of a prefix, for each layer, of shape (1, heads, tokens, dim)."""
    cache = DynamicCache()
    ids = torch.tensor([list(token_ids)], device=model.get_input_embeddings().weight.device)
    model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return [(layer.keys, layer.values) for layer in cache.layers]


# --- which models can ----------------------------------------------------------------------------

_trials: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()


def why_not_shared(model: PreTrainedModel, longest: int) -> str:
    """Return why a model cannot share a prefix up to ``longest`` tokens, or '' where it can.

    What attends in windows shorter than ``longest`` is left out by its configuration; for the
    rest a few tokens are computed in both ways once for each model, and must agree.
    """
    inner = base_model(model)
    config = inner.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    if getattr(config, "use_sliding_window", True) and window and window < longest:
        return f"it attends within a window of {window} tokens"
    if inner not in _trials:
        _trials[inner] = _trial(model)
    return _trials[inner]


@torch.inference_mode()
def _trial(model: PreTrainedModel) -> str:
    """Compute the last logits of two short sequences with and without a shared prefix."""
    inner = base_model(model)
    if not inner._can_set_attn_implementation():
        return "it does not use transformers' attention interface"
    device = inner.get_input_embeddings().weight.device
    vocabulary = inner.get_input_embeddings().weight.shape[0]
    ids = torch.arange(3, 27, device=device).remainder(vocabulary).view(2, 12)
    ids[1, :8] = ids[0, :8]  # two sequences of 12 tokens that share 8
    plain = model(input_ids=ids, use_cache=False, logits_to_keep=1).logits[:, -1].float()
    try:
        cache = SharedPrefixCache(compute_prefix(model, ids[0, :8].tolist()), slots=2, room=4)
        with shared_prefix(model, cache):
            for part in (ids[:, 8:11], ids[:, 11:]):
                cache.select(0, 2, part.shape[1])
                positions = cache.position_ids
                options = {"past_key_values": cache, "use_cache": True, "logits_to_keep": 1}
                logits = model(input_ids=part, position_ids=positions, **options).logits
                cache.advance(part.shape[1])
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError) as error:
        return f"its forward pass fails with a shared prefix ({error})"
    # Half-precision logits differ by rounding; a wrong mask or position differs by far more.
    tolerance = 1e-3 if plain.dtype == torch.float32 and inner.dtype == torch.float32 else 0.1
    distance = float((logits[:, -1].float() - plain).norm() / plain.norm())
    if math.isfinite(distance) and distance < tolerance:
        return ""
    return f"its logits change when the prefix is shared (by {distance:.1%})"
