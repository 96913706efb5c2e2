"""The loss and the log-probabilities: worked by hand, against TRL, and followed by training."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from tiny_rounds import moved_policy, one_round, tokens
from trl import DPOConfig as TRLConfig
from trl import DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from grath_utils.config import DPO_LOSSES, ModelConfig
from grath_utils.dpo import loss, trainer
from grath_utils.dpo.data import collate
from grath_utils.dpo.loss import completion_log_probs, dpo_loss
from grath_utils.engine.models import Policy, load_base
from grath_utils.engine.packing import PackedCollator


@pytest.fixture(scope="module")
def base(tiny_llama: Path) -> ModelConfig:
    return ModelConfig(name=str(tiny_llama), dtype="float32", device="cpu")


def test_loss_is_ln2_and_rewards_0_where_policy_is_reference() -> None:
    chosen, rejected = torch.tensor([-5.0, -70.0]), torch.tensor([-9.0, -3.0])
    losses, *rewards = dpo_loss(chosen, rejected, chosen, rejected, beta=0.1)
    assert all(torch.equal(reward, torch.zeros(2)) for reward in rewards)
    assert losses.tolist() == pytest.approx([math.log(2)] * 2)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_against_the_equation_worked_by_hand(smoothing: float) -> None:
    four = (torch.tensor([value]) for value in (-2.0, -5.0, -3.0, -4.0))
    losses, chosen, rejected = dpo_loss(*four, beta=0.5, label_smoothing=smoothing)
    # 0.5 * (-2 + 3) and 0.5 * (-5 + 4): margin 1, so -log sigmoid(1) = log(1 + e^-1)
    assert (chosen.item(), rejected.item()) == (0.5, -0.5)
    right, flipped = math.log1p(math.exp(-1)), math.log1p(math.exp(1))
    assert losses.item() == pytest.approx((1 - smoothing) * right + smoothing * flipped)


def test_completion_log_probs_against_a_plain_sum_and_whatever_the_padding(
    tiny_policy: Policy,
) -> None:
    examples = tokens(tiny_policy)
    sequences = [(e.prompt_ids, e.chosen_ids) for e in examples]
    sequences += [(e.prompt_ids, e.rejected_ids) for e in examples]
    by_hand = []
    with torch.no_grad():
        for prompt, answer in sequences:
            table = tiny_policy.model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
            by_hand.append(sum(table[t, i].item() for t, i in enumerate(answer, len(prompt) - 1)))
        together = completion_log_probs(tiny_policy.model, collate(examples, 2))
    assert together.tolist() == pytest.approx(by_hand, abs=1e-4)


@pytest.mark.parametrize("name", DPO_LOSSES)
def test_every_loss_is_trls_from_text_to_gradient(
    base: ModelConfig, tmp_path: Path, name: str
) -> None:
    """TRL tokenizes, masks and asks its own reference; we pack, and bring the reference along."""
    policy, reference = moved_policy(base), load_base(base)
    examples = tokens(policy)
    with torch.no_grad():
        sums = completion_log_probs(reference.model, collate(examples, 2)).chunk(2)
    ready = [
        {**vars(example), "ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
        for example, chosen, rejected in zip(examples, *map(torch.Tensor.tolist, sums), strict=True)
    ]
    sides = ("prompt", "chosen", "rejected")
    texts = [{x: policy.tokenizer.decode(row[f"{x}_ids"]) for x in sides} for row in ready]
    arguments = TRLConfig(
        output_dir=str(tmp_path),
        beta=0.1,
        loss_type=[name],
        label_smoothing=0.0 if name == "sigmoid" else 0.1,  # which TRL does not smooth
        max_length=None,
        gradient_checkpointing=False,
        report_to="none",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
    )
    common = {"model": policy.model, "args": arguments, "processing_class": policy.tokenizer}
    padded = DataCollatorForPreference(2)
    theirs = DPOTrainer(**common, ref_model=reference.model, train_dataset=Dataset.from_list(texts))
    ours = trainer.ReadyDataTrainer(
        **common, train_dataset=Dataset.from_list(ready), data_collator=PackedCollator(padded, 150)
    )
    found = []
    batches = padded(list(theirs.train_dataset)), ours.data_collator(ready)
    for side, batch in zip((theirs, ours), batches, strict=True):
        side.model.train()
        side.model.zero_grad()
        value = side.compute_loss(side.model, batch)
        value.backward()
        gradients = [p.grad.clone() for p in side.model.parameters() if p.grad is not None]
        found.append((value.item(), gradients, side._metrics["train"]))
    (loss_a, gradients_a, logged_a), (loss_b, gradients_b, logged_b) = found
    assert loss_b == pytest.approx(loss_a, rel=1e-4)
    assert len(gradients_a) == len(gradients_b) > 0
    for a, b in zip(gradients_a, gradients_b, strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-5)
    assert any(a.abs().max() > 1e-3 for a in gradients_a)
    assert logged_b.keys() == logged_a.keys()
    for key, values in logged_a.items():
        assert logged_b[key] == pytest.approx(values, rel=1e-3, abs=1e-4), key


def test_our_losses_are_those_of_the_installed_trl(base: ModelConfig, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Unknown loss type: newest") as error:
        one_round(base, tmp_path, loss="newest")
    assert set(re.findall(r"'(\w+)'", str(error.value))) == set(DPO_LOSSES)


def test_whoever_changes_the_loss_changes_training(
    base: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flipped(chosen, rejected, reference_chosen, reference_rejected, beta, **options):
        return dpo_loss(rejected, chosen, reference_rejected, reference_chosen, beta, **options)

    assert trainer.dpo_loss is loss.dpo_loss
    monkeypatch.setattr(trainer, "dpo_loss", flipped)
    report = one_round(base, tmp_path, steps=8)
    assert [row["margin"] < 0 for row in report.log[-2:]] == [True, True]
