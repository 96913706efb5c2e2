"""Packed batches: nothing computed twice, and loss and gradient those of the padded batch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from helpers import LORA, PAIRS
from hypothesis import given, settings
from hypothesis import strategies as st
from trl import DPOConfig as TRLConfig
from trl.trainer.dpo_trainer import DataCollatorForPreference

from grath_utils.config import ModelConfig
from grath_utils.dpo.adapters import add_adapter
from grath_utils.dpo.data import collate, tokenize_pairs
from grath_utils.dpo.loss import completion_log_probs
from grath_utils.dpo.round import reference_log_probs
from grath_utils.dpo.trainer import ReadyDataTrainer
from grath_utils.engine.models import Policy, load_base
from grath_utils.engine.packing import PackedCollator, pack

LIMITS = {"max_prompt_length": 200, "max_length": 300}


def rows_of(policy: Policy) -> list[dict]:
    sides = ("prompt_ids", "chosen_ids", "rejected_ids")
    return [
        {side: list(getattr(example, side)) for side in sides}
        | {"ref_chosen_logps": -9.0 - i, "ref_rejected_logps": -8.0 + i}
        for i, example in enumerate(tokenize_pairs(policy.tokenizer, PAIRS, **LIMITS).examples)
    ]


token = st.integers(0, 3)  # few tokens, so that prefixes are shared in every way
ids = st.lists(token, min_size=1, max_size=5)
pairs = st.fixed_dictionaries({"prompt_ids": ids, "chosen_ids": ids, "rejected_ids": ids})


@given(st.lists(pairs, min_size=1, max_size=6), st.integers(1, 40))
@settings(deadline=None)
def test_a_packed_batch_holds_every_sequence_once(examples: list[dict], limit: int) -> None:
    """Each target is predicted from exactly the tokens before it, as ``visible`` has it."""
    rows = pack(examples, limit)
    found: dict[tuple[int, int], tuple[list[int], int]] = {}
    for row in rows:
        length = row["ids"].shape[1]
        own = {i % len(examples) for i in row["sequence"].tolist()}
        assert length <= limit or len(own) == 1
        for edge, target in enumerate(row["targets"].tolist()):
            at = int(row["predictors"][row["which"][edge]])
            seen = torch.nonzero(row["visible"][at]).ravel()
            order = row["positions"][0, seen].argsort()
            context = row["ids"][0, seen[order]].tolist()
            assert row["positions"][0, seen[order]].tolist() == list(range(len(context)))
            key = (int(row["sequence"][edge]), int(row["column"][edge]))
            found[key] = (context, target)
    wanted = {}
    for side, key in enumerate(("chosen_ids", "rejected_ids")):
        for i, example in enumerate(examples):
            whole = [*example["prompt_ids"], *example[key]]
            for place in range(len(example["prompt_ids"]), len(whole)):
                wanted[side * len(examples) + i, place - 1] = (whole[:place], whole[place])
    assert found == wanted


def test_one_row_has_one_token_for_each_distinct_prefix(tiny_policy: Policy) -> None:
    examples = rows_of(tiny_policy)
    (row,) = pack(examples, 10**6)
    sides = [e["prompt_ids"] + e[k][:-1] for e in examples for k in ("chosen_ids", "rejected_ids")]
    prefixes = {tuple(ids[: n + 1]) for ids in sides for n in range(len(ids))}
    assert row["ids"].shape[1] == len(prefixes) < 0.6 * sum(map(len, sides))


def loss_and_gradients(model: Path, folder: Path, collator, **options):
    config = ModelConfig(name=str(model), dtype="float32", device="cpu")
    policy = add_adapter(load_base(config), replace(LORA, targets=("all-linear",)), seed=0)
    torch.manual_seed(1)
    with torch.no_grad():  # away from 0, where half of the gradients vanish
        for name, parameter in policy.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    rows = rows_of(policy)
    settings = {"beta": 0.1, "max_length": None, "use_cpu": True, "bf16": False}
    settings |= {"report_to": "none", "gradient_checkpointing": False, **options}
    trainer = ReadyDataTrainer(
        model=policy.model,
        args=TRLConfig(output_dir=str(folder), **settings),
        train_dataset=Dataset.from_list(rows),
        processing_class=policy.tokenizer,
        data_collator=collator,
    )
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, collator(rows))
    loss.backward()
    parameters = trainer.model.named_parameters()
    gradients = {name: p.grad.clone() for name, p in parameters if p.grad is not None}
    metrics = {key: value[-1] for key, value in trainer._metrics["train"].items()}
    return loss.item(), gradients, metrics


@pytest.mark.parametrize("limit", [10**6, 150])
@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", "sft"])
def test_loss_gradients_and_log_are_those_of_the_padded_batch(
    tiny_llama: Path, tmp_path: Path, limit: int, loss_type: str
) -> None:
    padded = DataCollatorForPreference(2)
    loss, gradients, metrics = loss_and_gradients(
        tiny_llama, tmp_path, padded, loss_type=[loss_type]
    )
    packed_loss, packed_gradients, packed_metrics = loss_and_gradients(
        tiny_llama, tmp_path, PackedCollator(padded, limit), loss_type=[loss_type]
    )
    assert packed_loss == pytest.approx(loss, rel=1e-5)
    assert packed_gradients.keys() == gradients.keys()
    assert all("lora_" in name for name in gradients)
    for name, gradient in gradients.items():
        assert torch.allclose(packed_gradients[name], gradient, rtol=1e-3, atol=1e-6), name
    assert any(gradient.abs().max() > 1e-3 for gradient in gradients.values())
    for key, value in metrics.items():
        assert packed_metrics[key] == pytest.approx(value, rel=1e-4, abs=1e-5), key


def test_gradient_checkpointing_changes_nothing(tiny_llama: Path, tmp_path: Path) -> None:
    collator = PackedCollator(DataCollatorForPreference(2), 10**6)
    (loss, gradients, _), (same_loss, same_gradients, _) = (
        loss_and_gradients(tiny_llama, tmp_path, collator, gradient_checkpointing=again)
        for again in (False, True)
    )
    assert loss == pytest.approx(same_loss, rel=1e-6)
    for name, gradient in gradients.items():
        assert torch.allclose(same_gradients[name], gradient, rtol=1e-4, atol=1e-7), name


def test_reference_log_probs_are_the_plain_sums(tiny_policy: Policy) -> None:
    examples = tokenize_pairs(tiny_policy.tokenizer, PAIRS, **LIMITS).examples
    with torch.no_grad():
        plain = completion_log_probs(tiny_policy.model, collate(examples, 2))
    chosen, rejected = reference_log_probs(tiny_policy, examples, progress=False)
    assert [*chosen, *rejected] == pytest.approx(plain.tolist(), abs=1e-3)
