"""One step of DPO on every architecture: the loss and the gradient of plain forward passes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from architectures import ARCHITECTURES, tiny_model
from helpers import DPO, LORA
from tiny_rounds import tokens

from grath_utils.dpo.adapters import add_adapter
from grath_utils.dpo.data import PreferenceExample
from grath_utils.dpo.loss import dpo_loss
from grath_utils.dpo.trainer import run_trainer
from grath_utils.engine import processes
from grath_utils.engine.models import Policy
from grath_utils.errors import TrainingError

EVERYWHERE = ("all-linear",)
# Of those that recompute activations, some in which a mode, a state or dropout is in the way.
RECOMPUTING = "llama opt gpt2 gemma3n mixtral gpt-oss biogpt mamba rwkv qwen3-next".split()
# Of those that are trained on a padded batch where several processes split the weights: some whose
# logits are more than a product with the output head.
PADDED = "llama gpt2 gemma2 cohere granite recurrent-gemma llama4 xlstm".split()
# Where that is refused: why, and what can be adapted.
MAMBA = (
    r"'out_proj' is incompatible with Mamba.*; its linear layers are dt_proj, in_proj",
    "in_proj",
)
ROUTER = (r"forward pass fails .*; its linear layers are .*, q_proj, router", "q_proj o_proj")
SOME = {
    "mamba": MAMBA,
    "mamba2": (
        r"'out_proj' is incompatible with Mamba.*; its linear layers are in_proj",
        "in_proj",
    ),
    "falcon-mamba": MAMBA,
    "falcon-h1": (r"'out_proj' is incompatible with Mamba", "q_proj in_proj"),
    "jamba": (r"adapters on dt_proj would never be trained", "in_proj x_proj q_proj down_proj"),
    "phimoe": ROUTER,
    "llama4": ROUTER,
}


def adapted(policy: Policy, name: str, targets: Sequence[str]) -> Policy:
    """Return a tiny policy of an architecture with an adapter that changes what it says."""
    model = tiny_model(name, len(policy.tokenizer))
    policy = replace(policy, model=model, name=name)
    policy = add_adapter(policy, replace(LORA, targets=tuple(targets)), seed=0)
    draw = torch.Generator().manual_seed(0)
    for parameter in policy.model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(0, 0.1, generator=draw)
    return policy


def sums_alone(
    model: torch.nn.Module, examples: Sequence[PreferenceExample], side: str
) -> torch.Tensor:
    """Return the log-probability of each answer, one plain forward pass for each: (B,)."""
    sums = []
    for example in examples:
        answer = torch.tensor(getattr(example, side))
        ids = torch.tensor([[*example.prompt_ids, *answer]])
        table = model(input_ids=ids, use_cache=False).logits[0, :-1].log_softmax(-1)
        sums.append(table[-len(answer) :].gather(1, answer[:, None]).sum())
    return torch.stack(sums)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "name"),
    [
        *(("", name) for name in ARCHITECTURES),
        *(("recomputing", name) for name in RECOMPUTING),
        *(("padded", name) for name in PADDED),
    ],
)
def test_one_step(
    tiny_policy: Policy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str, name: str
) -> None:
    """With plain descent of rate 1, what the adapter has moved by is the gradient."""
    monkeypatch.setattr(processes, "sharded", lambda: how == "padded")
    targets = EVERYWHERE
    if name in SOME:
        message, other = SOME[name]
        with pytest.raises(TrainingError, match=message):
            adapted(tiny_policy, name, targets)
        targets = other.split()
    policy = adapted(tiny_policy, name, targets)
    trained = {n: p for n, p in policy.model.named_parameters() if p.requires_grad}
    examples, sides = tokens(policy)[:4], ("chosen_ids", "rejected_ids")
    policy.model.eval()
    sums = [sums_alone(policy.model, examples, side) for side in sides]
    reference = [sums[0].detach() + 1, sums[1].detach() - 1]
    losses, *_ = dpo_loss(*sums, *reference, DPO.beta)
    losses.mean().backward()
    expected = torch.cat([p.grad.flatten() for p in trained.values()])
    before = torch.cat([p.detach().clone().flatten() for p in trained.values()])
    policy.model.zero_grad()

    rows = [
        {**vars(example), "ref_chosen_logps": float(chosen), "ref_rejected_logps": float(rejected)}
        for example, chosen, rejected in zip(examples, *reference, strict=True)
    ]
    plain = {"optimizer": "sgd", "learning_rate": 1.0, "max_grad_norm": 1e9, "steps": 1}
    config = replace(DPO, **plain, gradient_checkpointing=how == "recomputing")
    log = run_trainer(policy, rows, [], folder=tmp_path, config=config, seed=0, progress=False)
    assert log[0]["loss"] == pytest.approx(losses.mean().item(), abs=1e-3)
    gradient = before - torch.cat([p.detach().flatten() for p in trained.values()])
    assert expected.norm() > 0.1
    assert (gradient - expected).norm() < 1e-3 * expected.norm()
