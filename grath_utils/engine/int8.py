"""Products in 8 bits, to write with: half the bytes to read, and on a CPU up to half as fast again.

The weights of frozen linear layers are rounded to int8 with one scale for each output; what comes
in is rounded with one scale for each token, so that nothing depends on who else is in the batch.
An answer may come out in other words: this is for writing pairs, never for scores or training.
The scales are those of vector-wise quantization (LLM.int8(), arXiv 2208.07339); oneDNN multiplies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from grath_utils.engine.models import Policy
from grath_utils.errors import UsageError

MIDDLE = 128  # unsigned codes: of signed ones oneDNN has no fast way
Forward = Callable[[torch.Tensor], torch.Tensor]


def int8_layers(policy: Policy) -> dict[nn.Linear, Forward]:
    """Return what takes the place of each frozen linear layer's forward, the output head's apart.

    Raises:
        UsageError: the model is not on a CPU, has no such layers, or torch no such products.
    """
    if policy.device.type != "cpu" or not hasattr(torch.ops.onednn, "qlinear_prepack"):
        raise UsageError(
            '"pairs.backend=int8" is for models on a CPU, and a torch with oneDNN: '
            "leave it out (pairs.backend=own)"
        )
    head = policy.model.get_output_embeddings()
    layers = [
        layer
        for name, layer in policy.model.named_modules()
        if isinstance(layer, nn.Linear) and layer is not head and ".lora_" not in name
    ]
    if not layers:
        raise UsageError(
            f'"pairs.backend=int8": {policy.name} has no plain linear layer besides its output '
            "head; leave it out (pairs.backend=own)"
        )
    return {layer: _product(layer) for layer in layers}


@torch.no_grad()
def _product(layer: nn.Linear) -> Forward:
    weight = layer.weight.float()
    step = _steps(weight)
    packed = torch.ops.onednn.qlinear_prepack((weight / step).round_().to(torch.int8), None)
    scale = step[:, 0].contiguous()
    zeros = torch.zeros(len(scale), dtype=torch.int32)

    def forward(x: torch.Tensor) -> torch.Tensor:
        rows = x.flatten(0, -2).float()
        step = _steps(rows)
        codes = (rows / step).round_().add_(MIDDLE).to(torch.uint8)
        product = torch.ops.onednn.qlinear_pointwise(
            codes, 1.0, MIDDLE, packed, scale, zeros, None, 1.0, 0, torch.float32, "none", [], ""
        )
        y = product * step
        if layer.bias is not None:
            y += layer.bias
        return y.to(x.dtype).unflatten(0, x.shape[:-1])

    return forward


def _steps(rows: torch.Tensor) -> torch.Tensor:
    """Return for each row, as (rows, 1), what one step of its 8 bits is worth."""
    return rows.abs().amax(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny) / 127


@contextmanager
def multiplied_by(layers: Mapping[nn.Linear, Forward]) -> Iterator[None]:
    """Let some layers multiply another way for a while; without any, nothing changes."""
    for layer, forward in layers.items():
        layer.forward = forward
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward
