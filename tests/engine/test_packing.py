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


def rows_of(policy: Policy) -> list[dict]:
    limits = {"max_prompt_length": 200, "max_length": 300}
    examples = tokenize_pairs(policy.tokenizer, PAIRS, **limits).examples
    return [
        {"prompt_ids": list(e.prompt_ids), "chosen_ids": list(e.chosen_ids)}
        | {"rejected_ids": list(e.rejected_ids), "ref_chosen_logps": -9.0 - i}
        | {"ref_rejected_logps": -8.0 + i}
        for i, e in enumerate(examples)
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


def trained_adapter(policy: Policy) -> Policy:
    policy = add_adapter(policy, replace(LORA, targets=("all-linear",)), seed=0)
    torch.manual_seed(1)
    with torch.no_grad():  # away from 0, where half of the gradients vanish
        for name, parameter in policy.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    return policy


def loss_and_gradients(policy: Policy, folder: Path, collator, **options):
    rows = rows_of(policy)
    arguments = TRLConfig(
        output_dir=str(folder),
        beta=0.1,
        max_length=None,
        use_cpu=True,
        bf16=False,
        report_to="none",
        **{"gradient_checkpointing": False, **options},
    )
    trainer = ReadyDataTrainer(
        model=policy.model,
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=policy.tokenizer,
        data_collator=collator,
    )
    trainer.model.train()
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, collator(rows))
    loss.backward()
    gradients = {
        name: parameter.grad.clone()
        for name, parameter in trainer.model.named_parameters()
        if parameter.grad is not None
    }
    metrics = {key: value[-1] for key, value in trainer._metrics["train"].items()}
    return loss.item(), gradients, metrics


@pytest.mark.parametrize("limit", [10**6, 150])
@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", "sft"])
def test_loss_gradients_and_log_are_those_of_the_padded_batch(
    tiny_llama: Path, tmp_path: Path, limit: int, loss_type: str
) -> None:
    config = ModelConfig(name=str(tiny_llama), dtype="float32", device="cpu")
    padded = DataCollatorForPreference(2)
    kind = {"loss_type": [loss_type]}
    plain = loss_and_gradients(trained_adapter(load_base(config)), tmp_path, padded, **kind)
    collator = PackedCollator(padded, limit)
    packed = loss_and_gradients(trained_adapter(load_base(config)), tmp_path, collator, **kind)
    assert packed[0] == pytest.approx(plain[0], rel=1e-5)
    assert packed[1].keys() == plain[1].keys()
    assert all("lora_" in name for name in plain[1])
    for name, gradient in plain[1].items():
        assert torch.allclose(packed[1][name], gradient, rtol=1e-3, atol=1e-6), name
    assert any(gradient.abs().max() > 1e-3 for gradient in plain[1].values())
    for key, value in plain[2].items():
        assert packed[2][key] == pytest.approx(value, rel=1e-4, abs=1e-5), key


def test_gradient_checkpointing_changes_nothing(tiny_llama: Path, tmp_path: Path) -> None:
    config = ModelConfig(name=str(tiny_llama), dtype="float32", device="cpu")
    collator = PackedCollator(DataCollatorForPreference(2), 10**6)
    results = [
        loss_and_gradients(
            trained_adapter(load_base(config)), tmp_path, collator, gradient_checkpointing=again
        )
        for again in (False, True)
    ]
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-6)
    for name, gradient in results[0][1].items():
        assert torch.allclose(results[1][1][name], gradient, rtol=1e-4, atol=1e-7), name


def test_reference_log_probs_are_the_plain_sums(tiny_policy: Policy) -> None:
    limits = {"max_prompt_length": 200, "max_length": 300}
    examples = tokenize_pairs(tiny_policy.tokenizer, PAIRS, **limits).examples
    with torch.no_grad():
        plain = completion_log_probs(tiny_policy.model, collate(examples, 2))
    chosen, rejected = reference_log_probs(tiny_policy, examples, progress=False)
    assert [*chosen, *rejected] == pytest.approx(plain.tolist(), abs=1e-3)
