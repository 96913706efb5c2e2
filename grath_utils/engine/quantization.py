"""Weights in 4 or 8 bits: bitsandbytes' layers on a GPU, weights rounded in place on a CPU."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from grath_utils.config import ModelConfig
from grath_utils.engine import processes
from grath_utils.engine.machine import quiet_transformers, return_freed_memory
from grath_utils.errors import ModelError, RunError, UsageError
from grath_utils.files import atomic_path

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel

Codes = dict[str, torch.Tensor]
CODES, SEPARATOR = "codes", "/"


@dataclass(frozen=True)
class Quantized:
    """How much of a model is quantized, of the matrices that are no embedding and no output head.

    Those are kept everywhere. Others that are kept are parameters without a layer around them (the
    experts of a mixture, convolutions), and what the architecture itself asks to be spared.
    """

    matrices: int
    of_matrices: int
    weights: int
    of_weights: int


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


def quantized_skeleton(config: PreTrainedConfig, quantization: str) -> PreTrainedModel:
    """Return a model without weights that has the layers which a GPU would hold.

    Transformers itself puts bitsandbytes' layers where they belong, so a CPU rounds the same ones.
    """
    from transformers import AutoModelForCausalLM
    from transformers.quantizers import AutoHfQuantizer

    settings = bitsandbytes_config(ModelConfig(quantization=quantization, dtype="float32"))
    quantizer = AutoHfQuantizer.from_config(settings, pre_quantized=False)
    with quiet_transformers():
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(copy.deepcopy(config))
        quantizer.preprocess_model(skeleton, device_map=None)
    return skeleton


def quantized_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return bitsandbytes' layers in a model, by name."""
    import bitsandbytes as bnb

    kinds = bnb.nn.Linear4bit, bnb.nn.Linear8bitLt
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


def quantized_part(model: PreTrainedModel) -> Quantized:
    """Count what bitsandbytes' layers hold of a model, or of a skeleton; ModelError if nothing."""
    layers, head = quantized_layers(model), model.get_output_embeddings()
    if not layers:
        raise ModelError(
            f"nothing of a {type(model).__name__} can be quantized: bitsandbytes knows plain "
            "linear layers (torch's Linear and GPT-2's Conv1D), and outside its output head this "
            "model has none; use model.quantization=none"
        )
    spared = {
        id(weight)
        for module in model.modules()
        if isinstance(module, nn.Embedding) or module is head
        for weight in module.parameters(recurse=False)
    }
    inside = [layer.in_features * layer.out_features for layer in layers.values()]
    outside = [
        weight.numel()
        for name, weight in model.named_parameters()
        if weight.ndim > 1 and id(weight) not in spared and name.rpartition(".")[0] not in layers
        if not name.endswith("bias")  # of all experts together
    ]
    matrices, weights = len(inside), sum(inside)
    return Quantized(matrices, matrices + len(outside), weights, weights + sum(outside))


def round_weights(model: PreTrainedModel, quantization: str, kept: Path | None = None) -> Quantized:
    """Round the weights that a GPU would hold quantized, in place, and count them.

    Forward and backward passes then give what QLoRA's dequantize-then-multiply gives. This is how
    the course runs QLoRA without a GPU: bitsandbytes' own CPU layers are 10 to 20 times slower than
    bfloat16, and stop giving gradients once they have run inference. ``kept`` is a file of this
    model's 4-bit codes, which is made where it is missing or damaged: to read them takes a
    twentieth of the time of finding them.
    """
    skeleton = quantized_skeleton(model.config, quantization)
    part = quantized_part(skeleton)
    known, found = _read_codes(kept) if kept else {}, {}
    for name in quantized_layers(skeleton):
        codes = round_layer(model.get_submodule(name), quantization, known.get(name))
        if kept and name not in known:
            found[name] = codes
            return_freed_memory()  # or these small blocks keep gigabytes between them from it
    if any(found.values()):
        _keep_codes(kept, found)
    return part


@torch.no_grad()
def round_layer(layer: nn.Module, quantization: str, codes: Codes | None = None) -> Codes:
    """Round the weight of a ``Linear``, or of GPT-2's ``Conv1D``, to a quantized type, in place.

    Return the 4-bit codes and their scales as bitsandbytes stores them (of 8 bits nothing): given
    as ``codes``, they need not be found again.
    """
    from bitsandbytes import functional as bnb
    from transformers.pytorch_utils import Conv1D

    weight = layer.weight
    if isinstance(layer, Conv1D):  # (in, out); blocks and rows are those of (out, in)
        weight = weight.T.contiguous()
    if quantization == "int8":
        numbers, scale, _ = bnb.int8_vectorwise_quant(weight.to(torch.float16))
        rounded = bnb.int8_vectorwise_dequant(numbers, scale)
        codes = {}
    else:
        if codes is None:
            # As one long row: on a CPU, blocks that cross the end of a row come back wrong.
            packed, state = bnb.quantize_4bit(
                weight.flatten(), blocksize=64, quant_type=quantization, compress_statistics=True
            )
            codes = {CODES: packed, **state.as_dict(packed=True)}
        scales = {key: value for key, value in codes.items() if key != CODES}
        state = bnb.QuantState.from_dict(scales, device=weight.device)
        rounded = bnb.dequantize_4bit(codes[CODES], state).view_as(weight)
    layer.weight.copy_((rounded.T if isinstance(layer, Conv1D) else rounded).to(weight.dtype))
    return codes


def _keep_codes(path: Path, found: Mapping[str, Codes]) -> None:
    """Keep the codes of layers, where the disk has room; otherwise they only cost time again."""
    tensors = {
        f"{name}{SEPARATOR}{key}": value.clone()  # one table of bitsandbytes serves all layers
        for name, codes in found.items()
        for key, value in codes.items()
    }
    with suppress(RunError, UsageError, OSError, SafetensorError), atomic_path(path) as partial:
        save_file(tensors, partial)


def _read_codes(path: Path) -> dict[str, Codes]:
    """Return what was kept in a file, by layer; nothing where it is missing or damaged."""
    found: dict[str, Codes] = defaultdict(dict)
    with suppress(OSError, SafetensorError):
        for key, value in load_file(path).items():
            layer, _, name = key.partition(SEPARATOR)
            found[layer][name] = value
    return found
