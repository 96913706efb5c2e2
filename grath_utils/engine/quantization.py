"""Weights in 4 or 8 bits: bitsandbytes' layers on a GPU, weights rounded in place on a CPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from grath_utils.config import ModelConfig
from grath_utils.engine import processes

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig, PreTrainedModel


def bitsandbytes_config(config: ModelConfig) -> BitsAndBytesConfig:
    """Return what a GPU is told: 4-bit with double quantization, or 8-bit."""
    from transformers import BitsAndBytesConfig

    if config.quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=config.quantization,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, config.dtype),
        # FSDP splits only tensors of one type, so the packed bits are kept in that of the rest.
        bnb_4bit_quant_storage=getattr(torch, config.dtype if processes.sharded() else "uint8"),
    )


@torch.no_grad()
def round_weights(model: PreTrainedModel, quantization: str) -> int:
    """Round every linear layer but the output head to a quantized type, in place; count them.

    Forward and backward passes then give what QLoRA's dequantize-then-multiply gives. This is how
    the course runs QLoRA without a GPU: bitsandbytes' own CPU layers are 10 to 20 times slower than
    bfloat16, and stop giving gradients once they have run inference.
    """
    from bitsandbytes import functional as bnb

    head = model.get_output_embeddings()
    layers = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head]
    for layer in layers:
        weight = layer.weight
        if quantization == "int8":
            codes, scale, _ = bnb.int8_vectorwise_quant(weight.to(torch.float16))
            rounded = bnb.int8_vectorwise_dequant(codes, scale)
        else:
            # As one long row: on a CPU, blocks that cross the end of a row come back wrong.
            codes, state = bnb.quantize_4bit(
                weight.flatten(), blocksize=64, quant_type=quantization, compress_statistics=True
            )
            rounded = bnb.dequantize_4bit(codes, state).view_as(weight)
        weight.copy_(rounded.to(weight.dtype))
    return len(layers)
