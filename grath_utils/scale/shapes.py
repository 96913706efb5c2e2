"""The shape of a Llama-like model, and what follows from it alone: parameters and bytes.

A shape is known for the models that the profiles name; for others it is read from ``config.json``,
without loading a weight.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from grath_utils.config import LoraConfig, ModelConfig
from grath_utils.errors import ModelError

NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""A weight in NF4 with double quantization (QLoRA, arXiv 2305.14314): 4 bits, an 8-bit scale for
each block of 64 weights, and a float32 scale for each 256 of those scales: 4.127 bits."""
BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0, "int8": 1.0}
BYTES |= {"nf4": NF4_BYTES, "fp4": NF4_BYTES}  # other 16 values, the same storage


@dataclass(frozen=True)
class Shape:
    """A decoder of Llama's form: gated MLP, RMS norms, no biases."""

    name: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool  # input and output embeddings are one matrix

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """The matrices of one layer, ``{name: (inputs, outputs)}``."""
        query, key = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "q_proj": (self.hidden, query),
            "k_proj": (self.hidden, key),
            "v_proj": (self.hidden, key),
            "o_proj": (query, self.hidden),
            "gate_proj": (self.hidden, self.intermediate),
            "up_proj": (self.hidden, self.intermediate),
            "down_proj": (self.intermediate, self.hidden),
        }

    @property
    def linear_parameters(self) -> int:
        """Weights in the layers' matrices: what is quantized, and what nearly all time goes to."""
        return self.layers * sum(a * b for a, b in self.linears.values())

    @property
    def parameters(self) -> int:
        """All weights: the layers' matrices, the embeddings, and the norms."""
        embeddings = self.vocabulary * self.hidden * (1 if self.tied else 2)
        return self.linear_parameters + embeddings + self.hidden * (2 * self.layers + 1)

    def weight_bytes(self, dtype: str, quantization: str = "none") -> int:
        """Return the bytes of the weights; only the layers' matrices are quantized."""
        stored = BYTES[dtype if quantization == "none" else quantization]
        rest = self.parameters - self.linear_parameters
        return round(self.linear_parameters * stored + rest * BYTES[dtype])

    def lora_targets(self, lora: LoraConfig) -> list[str]:
        """Return which of a layer's matrices are adapted."""
        return [n for n in self.linears if n in lora.targets or "all-linear" in lora.targets]

    def lora_parameters(self, lora: LoraConfig) -> int:
        """Return the weights of an adapter: r (inputs + outputs) for each adapted matrix."""
        sides = sum(sum(self.linears[name]) for name in self.lora_targets(lora))
        return self.layers * lora.r * sides

    def kv_cache_bytes(self, tokens: int, dtype: str) -> int:
        """Return the bytes of the keys and values of ``tokens`` tokens."""
        return round(2 * self.layers * self.kv_heads * self.head_dim * tokens * BYTES[dtype])


# hidden, intermediate, layers, heads, key-value heads, hidden / heads, vocabulary: from the models'
# config.json
SMOLLM2_135M = Shape("SmolLM2-135M", 576, 1536, 30, 9, 3, 64, 49152, tied=True)
SMOLLM2_360M = Shape("SmolLM2-360M", 960, 2560, 32, 15, 5, 64, 49152, tied=True)
SMOLLM2_1_7B = Shape("SmolLM2-1.7B", 2048, 8192, 24, 32, 32, 64, 49152, tied=True)
QWEN2_1_5B = Shape("Qwen2.5-1.5B", 1536, 8960, 28, 12, 2, 128, 151936, tied=True)
LLAMA2_7B = Shape("Llama-2-7B", 4096, 11008, 32, 32, 32, 128, 32000, tied=False)
LLAMA2_70B = Shape("Llama-2-70B", 8192, 28672, 80, 64, 8, 128, 32000, tied=False)
MISTRAL_7B = Shape("Mistral-7B", 4096, 14336, 32, 32, 8, 128, 32000, tied=False)

KNOWN = {
    "tiny": SMOLLM2_135M,
    "small": QWEN2_1_5B,
    "HuggingFaceTB/SmolLM2-135M-Instruct": SMOLLM2_135M,
    "HuggingFaceTB/SmolLM2-360M-Instruct": SMOLLM2_360M,
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": SMOLLM2_1_7B,
    "meta-llama/Llama-2-7b-chat-hf": LLAMA2_7B,
    "meta-llama/Llama-2-70b-chat-hf": LLAMA2_70B,
    "HuggingFaceH4/zephyr-7b-beta": MISTRAL_7B,
    "mistralai/Mistral-7B-Instruct-v0.2": MISTRAL_7B,
}
# A shape's fields, by their keys in config.json
FIELDS = {
    "hidden_size": "hidden",
    "intermediate_size": "intermediate",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "vocab_size": "vocabulary",
}


def shape_of(model: ModelConfig) -> Shape:
    """Return the shape of a configured model, without network access; ModelError if unknown."""
    if model.name in KNOWN:
        return KNOWN[model.name]
    from transformers import PreTrainedConfig

    place = {"revision": model.revision, "local_files_only": True}
    try:
        settings, _ = PreTrainedConfig.get_config_dict(os.path.expanduser(model.name), **place)
    except OSError as error:
        raise ModelError(
            f'the shape of the model "{model.name}" is not known here: it is none of '
            f"{', '.join(sorted(KNOWN))}, not a folder, and not in the Hub cache. Download the "
            "model (or its config.json alone) first"
        ) from error
    missing = [key for key in FIELDS if key not in settings]
    if missing:
        raise ModelError(
            f"{model.name}: config.json lacks {', '.join(missing)}; costs are known for models of "
            "Llama's form only"
        )
    return Shape(
        name=Path(model.name).name,
        kv_heads=settings.get("num_key_value_heads") or settings["num_attention_heads"],
        tied=settings.get("tie_word_embeddings", False),
        head_dim=settings.get("head_dim")
        or settings["hidden_size"] // settings["num_attention_heads"],
        **{field: settings[key] for key, field in FIELDS.items()},
    )
