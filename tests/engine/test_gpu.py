"""What only a GPU shows: layers that really are quantized, and the same numbers as on a CPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import DPO, LORA, PAIRS

from grath_utils.config import ModelConfig
from grath_utils.dpo.adapters import add_adapter
from grath_utils.dpo.data import collate, tokenize_pairs
from grath_utils.dpo.loss import completion_log_probs
from grath_utils.dpo.round import train_round
from grath_utils.engine.encoding import Request
from grath_utils.engine.generation import generate
from grath_utils.engine.models import Policy, load_base
from grath_utils.engine.scoring import score_completions, why_no_trees

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")


def tiny(folder: Path, quantization: str, dtype: str = "bfloat16", device: str = "cuda"):
    return load_base(
        ModelConfig(name=str(folder), quantization=quantization, dtype=dtype, device=device)
    )


def quantized_layers(policy: Policy, kind: str) -> list[torch.nn.Module]:
    layers = [m for m in policy.model.modules() if type(m).__name__ == kind]
    assert len(layers) == 2 * 7  # the tiny Llama's projections: four of attention, three of the MLP
    return layers


@pytest.mark.parametrize("quantization", ["nf4", "fp4"])
def test_the_layers_are_really_4_bit(tiny_llama: Path, quantization: str) -> None:
    for layer in quantized_layers(tiny(tiny_llama, quantization), "Linear4bit"):
        state = layer.weight.quant_state
        assert layer.weight.dtype == torch.uint8
        assert layer.weight.numel() == layer.in_features * layer.out_features // 2
        assert state.quant_type == quantization
        assert state.nested  # double quantization: the scales are quantized too
        assert layer.compute_dtype == torch.bfloat16


def test_the_layers_are_really_8_bit(tiny_llama: Path) -> None:
    layers = quantized_layers(tiny(tiny_llama, "int8", "float16"), "Linear8bitLt")
    assert all(layer.weight.dtype == torch.int8 for layer in layers)


@pytest.mark.parametrize(("quantization", "differ"), [("nf4", 0.0), ("fp4", 0.02)])
def test_weights_simulated_on_a_cpu_are_those_of_the_gpu(
    tiny_llama: Path, quantization: str, differ: float
) -> None:
    """FP4's kernels break ties differently; NF4's agree to the last bit."""
    import bitsandbytes.functional as bnb

    simulated = dict(tiny(tiny_llama, quantization, device="cpu").model.named_parameters())
    for name, layer in tiny(tiny_llama, quantization).model.named_modules():
        if type(layer).__name__ == "Linear4bit":
            real = bnb.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
            rounded = simulated[f"{name}.weight"]
            unequal = (real.to(torch.bfloat16).cpu() != rounded).float().mean().item()
            assert unequal <= differ, name


def test_gradients_through_4_bit_layers_are_those_of_the_rounded_weights(tiny_llama: Path) -> None:
    """Also after an inference pass: the trap of the CPU layers is not there on a GPU."""
    found = []
    for device in ("cuda", "cpu"):
        policy = add_adapter(tiny(tiny_llama, "nf4", "float32", device), LORA, seed=0)
        with torch.no_grad():
            torch.manual_seed(1)
            for name, parameter in policy.model.named_parameters():
                if "lora_B" in name:
                    parameter.copy_(0.1 * torch.randn(parameter.shape))
        limits = {"max_prompt_length": 200, "max_length": 300}
        examples = tokenize_pairs(policy.tokenizer, PAIRS, **limits).examples
        batch = collate(examples, policy.tokenizer.pad_token_id, device)
        with torch.no_grad():
            completion_log_probs(policy.model, batch)
        sums = completion_log_probs(policy.model, batch)
        sums.sum().backward()
        gradients = {n: p.grad.cpu() for n, p in policy.model.named_parameters() if p.requires_grad}
        found.append((sums.detach().cpu(), gradients))
    (gpu, gpu_gradients), (cpu, cpu_gradients) = found
    assert torch.allclose(gpu, cpu, rtol=1e-4, atol=1e-2)
    for name, gradient in cpu_gradients.items():
        assert torch.allclose(gpu_gradients[name], gradient, rtol=1e-2, atol=1e-3), name


REQUESTS = [
    Request("The sun is", f" {answer}.", str(i))
    for i, answer in enumerate(["a star", "a stone", "hot", "a star in the sky"])
]


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_scores_are_those_of_a_cpu(tiny_llama: Path, quantization: str) -> None:
    gpu, cpu = (
        score_completions(tiny(tiny_llama, quantization, "float32", device), REQUESTS)
        for device in ("cuda", "cpu")
    )
    assert [s.logprob for s in gpu] == pytest.approx([s.logprob for s in cpu], abs=1e-2)


@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
def test_trees_run_on_quantized_models(tiny_llama: Path, quantization: str) -> None:
    dtype = "float16" if quantization == "int8" else "bfloat16"
    assert not why_no_trees(tiny(tiny_llama, quantization, dtype), 64, 512)


def test_greedy_completions_are_those_of_a_cpu(tiny_llama: Path) -> None:
    prompts = [f"Q: What is the {thing}?\nA:" for thing in ("sun", "moon", "rain")]
    gpu, cpu = (
        generate(tiny(tiny_llama, "none", "float32", device), prompts, max_new_tokens=12)
        for device in ("cuda", "cpu")
    )
    assert gpu == cpu


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("optimizer", ["adamw_torch", "paged_adamw_32bit"])
def test_a_round_trains_in_half_precision(
    tiny_llama: Path, tmp_path: Path, dtype: str, optimizer: str
) -> None:
    base = ModelConfig(name=str(tiny_llama), quantization="nf4", dtype=dtype, device="cuda")
    dpo = replace(DPO, steps=8, optimizer=optimizer, gradient_checkpointing=True)
    report = train_round(
        base, PAIRS[:4], PAIRS[4:], tmp_path, dpo=dpo, lora=LORA, seed=0, progress=False
    )
    train = [row for row in report.log if row["split"] == "train"]
    assert train[-1]["loss"] < train[0]["loss"] - 0.02
    assert train[-1]["margin"] > 0.05
