"""Reference x chain over three rounds, quantized and not: step 0 is that of the intended models.

The models that a round should start from and be compared with are put together here with plain
``peft`` calls, without the code under test.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from conftest import DPO, LORA, PAIRS
from peft import PeftModel
from peft.utils.integrations import dequantize_bnb_weight
from safetensors.torch import load_file

from grath_utils.config import ModelConfig
from grath_utils.dpo.data import collate, tokenize_pairs
from grath_utils.dpo.round import completion_log_probs, preference_loss, train_round
from grath_utils.engine.models import load_base
from grath_utils.loop.named_models import load_policy

ROUNDS = 3
TRAINED, HELD_OUT = PAIRS[:4], PAIRS[4:]
MODES = list(itertools.product(("current", "base"), ("continue", "merge", "fresh")))


@dataclass(frozen=True)
class Kind:
    """How the base model is held, and how exact its numbers are."""

    device: str
    quantization: str
    dtype: str = "float32"
    exact: float = 1e-5


KINDS = [
    Kind("cpu", "none"),
    Kind("cpu", "nf4"),
    Kind("cuda", "none", exact=1e-4),
    Kind("cuda", "nf4", exact=1e-4),
    Kind("cuda", "fp4", exact=1e-4),
    # Its activations are rounded too, together with whatever else is in the batch.
    Kind("cuda", "int8", "float16", 3e-2),
]


@pytest.fixture(scope="module", params=KINDS, ids=lambda k: f"{k.device}-{k.quantization}")
def kind(request: pytest.FixtureRequest) -> Kind:
    if request.param.device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU here")
    return request.param


@pytest.fixture(scope="module")
def base(kind: Kind, tiny_llama: Path) -> ModelConfig:
    return ModelConfig(
        name=str(tiny_llama), quantization=kind.quantization, dtype=kind.dtype, device=kind.device
    )


def plain_model(base: ModelConfig, adapters: list[Path]) -> torch.nn.Module:
    """Return the base with all adapters but the last merged into it, by peft alone.

    Quantized layers become plain ones that hold the same numbers, so that merging rounds nothing.
    """
    model = load_base(base).model
    for name, layer in list(model.named_modules()):
        if type(layer).__name__ in ("Linear4bit", "Linear8bitLt"):
            plain = torch.nn.Linear(layer.in_features, layer.out_features, bias=False)
            weight = dequantize_bnb_weight(layer.weight, state=getattr(layer, "state", None))
            plain.weight = torch.nn.Parameter(weight.to(getattr(torch, base.dtype)))
            model.set_submodule(name, plain.to(weight.device))
    model.is_quantized = False
    for folder in adapters[:-1]:
        model = PeftModel.from_pretrained(model, str(folder)).merge_and_unload()
    return PeftModel.from_pretrained(model, str(adapters[-1])) if adapters else model


def held_out_log_probs(base: ModelConfig, adapters: list[Path]) -> tuple[torch.Tensor, ...]:
    tokenizer = load_base(base).tokenizer
    limits = {"max_prompt_length": 200, "max_length": 300}
    examples = tokenize_pairs(tokenizer, HELD_OUT, **limits).examples
    batch = collate(examples, tokenizer.pad_token_id, base.device)
    with torch.no_grad():
        return completion_log_probs(plain_model(base, adapters).eval(), batch).cpu().chunk(2)


@pytest.mark.parametrize(("reference", "chain"), MODES)
def test_three_rounds(
    kind: Kind, base: ModelConfig, tmp_path: Path, reference: str, chain: str
) -> None:
    pristine = held_out_log_probs(base, [])
    done: list[Path] = []
    for t in range(ROUNDS):
        folder = tmp_path / f"iter_{t}"
        report = train_round(
            base,
            TRAINED,
            HELD_OUT,
            folder,
            dpo=replace(DPO, reference=reference, chain=chain),
            lora=LORA,
            seed=t,
            previous=done[-1] if done else None,
            progress=False,
        )
        # What this round should have started from, and been compared with.
        before = {"continue": done[-1:], "merge": done, "fresh": []}[chain]
        wrote_pairs = {"continue": done[-1:], "merge": done, "fresh": done[-1:]}[chain]
        start = held_out_log_probs(base, before)
        compared = held_out_log_probs(base, [] if reference == "base" else wrote_pairs)
        losses, margins = preference_loss(*start, *compared, beta=DPO.beta)
        first = next(row for row in report.log if row["split"] == "held_out")
        assert first["step"] == 0
        assert first["loss"] == pytest.approx(losses.mean().item(), abs=kind.exact)
        assert first["margin"] == pytest.approx(margins.mean().item(), abs=kind.exact)
        assert first["logp_chosen"] == pytest.approx(start[0].mean().item(), abs=100 * kind.exact)
        coincide = t == 0 or (reference == "base") == (chain == "fresh")
        if coincide:
            assert first["loss"] == pytest.approx(math.log(2), abs=kind.exact)
            assert first["margin"] == pytest.approx(0, abs=kind.exact)
        else:
            assert abs(first["margin"]) > 10 * kind.exact

        # The adapter moved; what is saved is what is loaded again, by recipe and by name.
        done.append(folder / "adapter")
        weights = load_file(done[-1] / "adapter_model.safetensors")
        assert all(v.abs().max() > 0 for k, v in weights.items() if "lora_B" in k)
        stack = done if chain == "merge" else done[-1:]
        policy = load_policy(str(done[-1]), device=base.device)
        tokens = torch.arange(5, 25, device=base.device)[None]
        with torch.no_grad():
            by_name = policy.model(tokens).logits
            by_hand = plain_model(base, stack).eval()(tokens).logits
        assert torch.allclose(by_name, by_hand, rtol=0, atol=kind.exact)
    # The base never drifts: neither its file nor what is loaded from it.
    again = held_out_log_probs(base, [])
    assert all(torch.equal(a, b) for a, b in zip(pristine, again, strict=True))
