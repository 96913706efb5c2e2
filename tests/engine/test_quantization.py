"""Weights rounded on a CPU: which levels, whose numbers and gradients, and the library's trap."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from architectures import tiny_model
from helpers import DPO, LORA, PAIRS
from torch import nn
from transformers.pytorch_utils import Conv1D

from grath_utils.config import ModelConfig
from grath_utils.dpo.adapters import Weights
from grath_utils.dpo.round import train_round
from grath_utils.engine.models import load_base, part_to_quantize
from grath_utils.engine.quantization import Quantized, round_layer, round_weights
from grath_utils.errors import ModelError, TrainingError


def load(folder: Path, quantization: str = "none"):
    settings = {"dtype": "float32", "device": "cpu", "quantization": quantization}
    return load_base(ModelConfig(name=str(folder), **settings)).model


def test_nf4_keeps_sixteen_levels_a_block_and_spares_the_head(tiny_llama: Path) -> None:
    plain, rounded = load(tiny_llama), load(tiny_llama, "nf4")
    for name, module in rounded.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        before = plain.get_submodule(name).weight
        if name == "lm_head":
            assert torch.equal(module.weight, before)
            continue
        assert not torch.equal(module.weight, before)
        for block in module.weight.detach().reshape(-1, 64):
            assert len(block.unique()) <= 16
        # NF4's widest gap between levels is 0.3 of a block's largest weight (QLoRA, appendix E).
        largest = before.reshape(-1, 64).abs().max(dim=1).values.repeat_interleave(64)
        error = (module.weight - before).abs().reshape(-1)
        assert (error <= 0.2 * largest + 1e-6).all()
    assert torch.equal(rounded.get_input_embeddings().weight, plain.get_input_embeddings().weight)


# Of which matrices bitsandbytes takes the place (of how many), and of how many weights.
PARTS = {
    "llama": (14, 14, 18432, 18432),
    "gpt2": (8, 8, 24576, 24576),  # Conv1D
    "gpt-neo": (12, 12, 16384, 16384),
    "opt": (12, 12, 16384, 16384),
    # Experts and their router are parameters without a layer: 3 matrices of each block stay.
    "qwen2-moe": (16, 22, 9280, 21824),
    "mixtral": (8, 14, 6144, 55552),
    "gpt-oss": (8, 14, 6144, 55552),
    "mamba": (8, 12, 13824, 14848),  # not the convolution and the decay
}


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("name", PARTS)
def test_a_cpu_rounds_what_bitsandbytes_would_quantize(name: str, kind: str) -> None:
    model = tiny_model(name, 300)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    part = round_weights(model, kind)
    changed = [k for k, v in model.state_dict().items() if not torch.equal(before[k], v)]
    assert len(changed) == part.matrices
    assert sum(before[key].numel() for key in changed) == part.weights
    assert part == Quantized(*PARTS[name])


def test_kept_codes_give_the_same_weights_and_are_made_again_where_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, asked = tmp_path / "codes.safetensors", []
    find = bnb.functional.quantize_4bit
    monkeypatch.setattr(
        bnb.functional, "quantize_4bit", lambda *a, **k: asked.append(1) or find(*a, **k)
    )

    def rounded(name: str = "gpt2") -> dict[str, torch.Tensor]:  # it has Conv1D
        asked.clear()
        model = tiny_model(name, 300)
        round_weights(model, "nf4", kept)
        return model.state_dict()

    first = rounded()
    assert len(asked) == 8
    assert all(map(torch.equal, first.values(), rounded().values()))
    assert not asked
    kept.write_bytes(kept.read_bytes()[:-100])
    assert all(map(torch.equal, first.values(), rounded().values()))
    assert len(asked) == 8
    rounded()
    assert not asked  # the damaged file was replaced
    kept.unlink()
    kept.mkdir()  # nothing can be written there, and nothing fails
    (kept / "x").touch()
    assert all(map(torch.equal, first.values(), rounded().values()))


def test_only_codes_of_the_courses_models_are_kept(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRATH_CACHE", str(tmp_path))
    load(tiny_llama, "nf4")
    assert not (tmp_path / "rounded").exists()


def test_the_part_is_known_before_and_after_loading(tiny_llama: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_llama, tmp_path / "moe")
    tiny_model("qwen2-moe", 300).save_pretrained(tmp_path / "moe")
    config = ModelConfig(name=str(tmp_path / "moe"), quantization="nf4", device="cpu")
    assert part_to_quantize(config) == load_base(config).quantized == Quantized(*PARTS["qwen2-moe"])
    plain = replace(config, quantization="none")
    assert (part_to_quantize(plain), load_base(plain).quantized) == (None, None)


@pytest.mark.parametrize("load", [part_to_quantize, load_base])
def test_a_model_of_which_nothing_can_be_quantized_is_refused(
    tiny_llama: Path, tmp_path: Path, load: Callable
) -> None:
    """Falcon's layers are a class of their own, which transformers leaves as they are."""
    shutil.copytree(tiny_llama, tmp_path / "falcon")
    tiny_model("falcon", 300).save_pretrained(tmp_path / "falcon")
    config = ModelConfig(name=str(tmp_path / "falcon"), quantization="nf4", device="cpu")
    with pytest.raises(ModelError, match=r"FalconForCausalLM .* model.quantization=none"):
        load(config)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_conv1d_is_rounded_as_the_linear_layer_that_it_is(kind: str) -> None:
    """A GPU holds it as (out, in): blocks run along a row of that, and an int8 scale is a row's."""
    conv, linear = Conv1D(96, 64), nn.Linear(64, 96)
    with torch.no_grad():
        linear.weight.copy_(conv.weight.T)
    round_layer(conv, kind)
    round_layer(linear, kind)
    assert torch.equal(conv.weight, linear.weight.T)


def test_int8_rounds_to_255_levels_a_row(tiny_llama: Path) -> None:
    weight = load(tiny_llama, "int8").model.layers[0].mlp.up_proj.weight.detach()
    steps = weight / (weight.abs().max(dim=1, keepdim=True).values / 127)
    assert torch.allclose(steps, steps.round(), atol=2e-2)


class Net(nn.Module):
    """Two linear layers with a low-rank update on the first, as LoRA has it."""

    def __init__(self, layer: type[nn.Module] = nn.Linear, width: int = 128, **options: object):
        super().__init__()
        self.first = layer(width, 64, bias=False, **options)
        self.second = layer(64, width, bias=False, **options)
        draw = torch.Generator().manual_seed(0)
        self.a = nn.Parameter(torch.randn(4, width, generator=draw) / 11)
        self.b = nn.Parameter(torch.randn(64, 4, generator=draw) / 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x) + x @ self.a.T @ self.b.T)


def weights() -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    return torch.randn(64, 128, generator=draw) / 11, torch.randn(128, 64, generator=draw) / 8


def rounded(kind: str = "nf4") -> Net:
    """What this course trains on a CPU: rounded weights in an ordinary layer."""
    net = Net()
    with torch.no_grad():
        for layer, weight in zip((net.first, net.second), weights(), strict=True):
            layer.weight.copy_(weight)
            round_layer(layer, kind)
    return net


def four_bit(kind: str) -> Net:
    """bitsandbytes' own 4-bit layers, with the same weights."""
    options = {"quant_type": kind, "compress_statistics": True}
    net = Net(bnb.nn.Linear4bit, compute_dtype=torch.float32, **options)
    for layer, weight in zip((net.first, net.second), weights(), strict=True):
        layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, module=layer, **options)
    return net.to("cpu")  # quantizes


def outputs(net: Net) -> dict[str, torch.Tensor]:
    """Return what the network computes, and its gradients."""
    x = torch.randn(8, 128, generator=torch.Generator().manual_seed(2), requires_grad=True)
    net.zero_grad()
    y = net(x)
    y.square().sum().backward()
    found = {"output": y.detach(), "a": net.a.grad, "b": net.b.grad, "input": x.grad}
    return {name: value for name, value in found.items() if value is not None}


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_gradients_are_those_of_bitsandbytes_own_layers(kind: str) -> None:
    ours, theirs = outputs(rounded(kind)), outputs(four_bit(kind))
    assert ours.keys() == theirs.keys() == {"output", "a", "b", "input"}
    for name, value in theirs.items():
        assert torch.allclose(ours[name], value, rtol=1e-3, atol=1e-3), name
        assert value.abs().max() > 0.1, name


@pytest.mark.parametrize(("kind", "most"), [("nf4", 0.11), ("fp4", 0.15)])
def test_rounding_is_right_where_rows_are_no_whole_number_of_blocks(kind: str, most: float) -> None:
    """On a CPU, bitsandbytes gives such a matrix back with blocks in the wrong places."""
    net = Net(width=96)
    nn.init.normal_(net.first.weight)
    before = net.first.weight.detach().clone()
    round_layer(net.first, kind)
    assert 0.01 < (net.first.weight - before).norm() / before.norm() < most


def test_the_gradient_stays_after_an_inference_pass() -> None:
    """The trap: ``Linear4bit`` is repacked by inference on a CPU and then passes no gradient."""
    net = rounded()
    before = outputs(net)
    with torch.no_grad():
        net.eval()(torch.ones(1, 128))
    after = outputs(net.train())
    assert before.keys() == after.keys() == {"output", "a", "b", "input"}
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_whoever_walks_into_the_trap_is_told(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training on such layers is refused, whatever the installed version does with them."""
    base = ModelConfig(name=str(tiny_llama), dtype="float32", device="cpu")

    def load_with_4_bit_layers(self: Weights, **options: object):
        policy = load_base(base)
        layer = policy.model.model.layers[0].self_attn.q_proj
        small = bnb.nn.Linear4bit(layer.in_features, layer.out_features, bias=False)
        policy.model.set_submodule("model.layers.0.self_attn.q_proj", small)
        return policy

    monkeypatch.setattr(Weights, "load", load_with_4_bit_layers)
    with pytest.raises(TrainingError, match=r"q_proj is a bitsandbytes 4-bit layer on a CPU"):
        train_round(base, PAIRS, [], tmp_path, dpo=DPO, lora=LORA, seed=0, progress=False)
