"""Products in 8 bits: near the exact ones, each token by itself, and gone when they should be."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from architectures import tiny_model
from helpers import LORA
from torch import nn

from grath_utils.config import ModelConfig
from grath_utils.dpo.adapters import add_adapter
from grath_utils.engine.int8 import int8_layers, multiplied_by
from grath_utils.engine.models import Policy, load_base
from grath_utils.errors import UsageError

IDS = torch.randint(0, 50, (5, 12), generator=torch.Generator().manual_seed(0))


def logits(policy: Policy, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        return policy.model(ids).logits.float()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_they_are_near_the_exact_products_and_leave_them_behind(
    dtype: str, tiny_llama: Path
) -> None:
    policy = load_base(ModelConfig(name=str(tiny_llama), dtype=dtype, device="cpu"))
    exact = logits(policy)
    with multiplied_by(int8_layers(policy)):
        rounded = logits(policy)
    assert not torch.equal(rounded, exact)
    assert (rounded - exact).norm() / exact.norm() < 0.03
    assert torch.equal(logits(policy), exact)


def test_a_product_is_that_of_the_rounded_operands(tiny_policy: Policy) -> None:
    layers = int8_layers(tiny_policy)
    layer = next(iter(layers))
    x = torch.randn(7, layer.in_features, generator=torch.Generator().manual_seed(1))
    both = []
    for operand in (layer.weight.detach(), x):
        scale = operand.abs().amax(1, keepdim=True) / 127
        both.append((operand / scale).round() * scale)
    torch.testing.assert_close(layers[layer](x), both[1] @ both[0].T, rtol=1e-4, atol=1e-5)


def test_who_else_is_in_the_batch_changes_nothing(tiny_policy: Policy) -> None:
    layers = int8_layers(tiny_policy)
    layer = next(iter(layers))
    x = torch.randn(9, layer.in_features, generator=torch.Generator().manual_seed(1))
    x[3] *= 1000  # an outlier of one token is no other token's loss
    together = layers[layer](x)
    for row, alone in zip(together, x, strict=True):
        assert torch.equal(layers[layer](alone[None])[0], row)


def test_an_error_inside_restores_the_exact_products(tiny_policy: Policy) -> None:
    exact = logits(tiny_policy)
    with pytest.raises(KeyError), multiplied_by(int8_layers(tiny_policy)):
        raise KeyError
    assert torch.equal(logits(tiny_policy), exact)


def test_an_adapter_keeps_its_own_precision(tiny_policy: Policy) -> None:
    policy = add_adapter(tiny_policy, LORA, seed=0)
    names = {layer: name for name, layer in policy.model.named_modules()}
    replaced = [names[layer] for layer in int8_layers(policy)]
    assert replaced
    assert not any(".lora_" in name or "lm_head" in name for name in replaced)


def test_a_model_without_plain_linear_layers_is_refused(tiny_policy: Policy) -> None:
    with pytest.raises(UsageError, match="no plain linear layer"):
        int8_layers(replace(tiny_policy, model=tiny_model("gpt2", 300)))


def test_a_layer_with_a_bias(tiny_policy: Policy) -> None:
    layer = nn.Linear(64, 32)
    tiny_policy.model.extra = layer
    x = torch.randn(4, 64)
    got = int8_layers(tiny_policy)[layer](x)
    assert (got - layer(x)).norm() / layer(x).norm() < 0.02
