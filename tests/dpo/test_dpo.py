"""One DPO round: the mathematics, where a round starts, what moves and what does not."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import DPO, LORA, PAIRS
from safetensors.torch import load_file

from grath_utils.config import DPO_LOSSES, DPOConfig, ModelConfig
from grath_utils.dpo.data import collate, tokenize_pair, tokenize_pairs
from grath_utils.dpo.global_batch import split_batch
from grath_utils.dpo.round import (
    Weights,
    add_adapter,
    completion_log_probs,
    model_after,
    preference_loss,
    reference_of_round,
    start_of_round,
    train_round,
)
from grath_utils.engine.models import Policy, load_base
from grath_utils.errors import ConfigError, DataError, ModelError, TrainingError
from grath_utils.files import read_json, read_jsonl
from grath_utils.loop.named_models import load_policy
from grath_utils.pairs.generate import Pair


@pytest.fixture(scope="module")
def base(tiny_llama: Path) -> ModelConfig:
    return ModelConfig(name=str(tiny_llama), dtype="float32", device="cpu")


def one_round(base: ModelConfig, folder: Path, previous: Path | None = None, **changes):
    dpo = replace(DPO, **changes)
    return train_round(
        base,
        PAIRS[:4],
        PAIRS[4:],
        folder,
        dpo=dpo,
        lora=LORA,
        seed=0,
        previous=previous,
        progress=False,
    )


def log_probs(policy: Policy) -> torch.Tensor:
    examples = tokenize_pairs(
        policy.tokenizer, PAIRS, max_prompt_length=200, max_length=300
    ).examples
    with torch.no_grad():
        return completion_log_probs(policy.model, collate(examples, 2))


# --- the mathematics -----------------------------------------------------------------------------


def test_loss_is_ln2_and_margin_0_where_policy_is_reference() -> None:
    chosen, rejected = torch.tensor([-5.0, -70.0]), torch.tensor([-9.0, -3.0])
    losses, margins = preference_loss(chosen, rejected, chosen, rejected, beta=0.1)
    assert torch.equal(margins, torch.zeros(2))
    assert losses.tolist() == pytest.approx([math.log(2)] * 2)


def test_loss_against_the_equation_worked_by_hand() -> None:
    one = torch.tensor([1.0])
    losses, margins = preference_loss(-2 * one, -5 * one, -3 * one, -4 * one, beta=0.5)
    # margin = 0.5 * ((-2 + 3) - (-5 + 4)) = 1; loss = -log sigmoid(1) = log(1 + e^-1)
    assert margins.item() == pytest.approx(1.0)
    assert losses.item() == pytest.approx(math.log1p(math.exp(-1)))


def test_loss_equals_trl_on_the_same_batch(base: ModelConfig, tmp_path: Path) -> None:
    """TRL's own loss, reward margin and log-probabilities, from its reference and its masks."""
    from datasets import Dataset
    from trl import DPOConfig as TRLConfig
    from trl import DPOTrainer

    policy = add_adapter(load_base(base), LORA, seed=0)
    with torch.no_grad():  # away from the reference, so that the comparison is about something
        for name, parameter in policy.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.2)
    examples = tokenize_pairs(
        policy.tokenizer, PAIRS[:4], max_prompt_length=200, max_length=300
    ).examples
    batch = collate(examples, policy.tokenizer.pad_token_id)
    reference = load_base(base)
    with torch.no_grad():
        ours = completion_log_probs(policy.model, batch)
        theirs = completion_log_probs(reference.model, batch)
    losses, margins = preference_loss(*ours.chunk(2), *theirs.chunk(2), beta=0.1)

    rows = [
        {
            "prompt": policy.tokenizer.decode(e.prompt_ids),
            "chosen": policy.tokenizer.decode(e.chosen_ids),
            "rejected": policy.tokenizer.decode(e.rejected_ids),
        }
        for e in examples
    ]
    trainer = DPOTrainer(
        model=policy.model,
        ref_model=reference.model,
        args=TRLConfig(
            output_dir=str(tmp_path),
            beta=0.1,
            per_device_eval_batch_size=4,
            report_to="none",
            use_cpu=True,
            bf16=False,
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows),
        processing_class=policy.tokenizer,
    )
    assert trainer.train_dataset[0]["chosen_ids"] == list(examples[0].chosen_ids)
    measured = trainer.evaluate()
    assert measured["eval_loss"] == pytest.approx(losses.mean().item(), abs=1e-5)
    assert measured["eval_rewards/margins"] == pytest.approx(margins.mean().item(), abs=1e-5)
    assert measured["eval_logps/chosen"] == pytest.approx(ours[:4].mean().item(), abs=1e-3)
    assert measured["eval_logps/rejected"] == pytest.approx(ours[4:].mean().item(), abs=1e-3)


def test_completion_log_probs_against_a_plain_sum(tiny_policy: Policy) -> None:
    example = tokenize_pair(tiny_policy.tokenizer, PAIRS[0])
    ids = torch.tensor([example.prompt_ids + example.chosen_ids])
    with torch.no_grad():
        table = tiny_policy.model(ids).logits[0].log_softmax(-1)
    start = len(example.prompt_ids)
    by_hand = sum(table[t - 1, ids[0, t]].item() for t in range(start, ids.shape[1]))
    with torch.no_grad():
        sums = completion_log_probs(tiny_policy.model, collate([example], 2))
    assert sums[0].item() == pytest.approx(by_hand, abs=1e-4)


def test_padding_does_not_change_a_log_probability(tiny_policy: Policy) -> None:
    examples = [tokenize_pair(tiny_policy.tokenizer, pair) for pair in PAIRS]
    with torch.no_grad():
        together = completion_log_probs(tiny_policy.model, collate(examples, 2))
        alone = [completion_log_probs(tiny_policy.model, collate([e], 2)) for e in examples]
    assert torch.allclose(
        together, torch.cat([torch.stack(alone)[:, 0], torch.stack(alone)[:, 1]]), atol=1e-4
    )


# --- preference data -----------------------------------------------------------------------------


def test_the_prompt_is_masked_and_the_end_of_turn_is_not(tiny_policy: Policy) -> None:
    tokenizer = tiny_policy.tokenizer
    example = tokenize_pair(tokenizer, PAIRS[0])
    text = "<|im_start|>user\nWhat is the sun?<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(example.prompt_ids) == text
    assert tokenizer.decode(example.chosen_ids) == "It is the star.<|im_end|>"
    assert tokenizer.decode(example.rejected_ids) == "The stone in the air.<|im_end|>"
    batch = collate([example], tokenizer.pad_token_id)
    shown = batch["input_ids"][0][batch["completion_mask"][0].bool()]
    assert tuple(shown.tolist()) == example.chosen_ids


def test_question_answer_format_starts_the_answer_with_a_space(tiny_policy: Policy) -> None:
    example = tokenize_pair(tiny_policy.tokenizer, PAIRS[0], "qa")
    assert tiny_policy.tokenizer.decode(example.prompt_ids) == "Q: What is the sun?\nA:"
    assert tiny_policy.tokenizer.decode(example.chosen_ids) == " It is the star.<|im_end|>"


def test_over_long_pairs_are_counted_not_cut(tiny_policy: Policy) -> None:
    tall = Pair("tall", "What is the sun?", "It is " + "very " * 100 + "hot.", "Cold.", 0)
    data = tokenize_pairs(
        tiny_policy.tokenizer, [PAIRS[0], tall], max_prompt_length=200, max_length=300
    )
    assert [e.id for e in data.examples] == ["q0"]
    assert data.over_long == ("tall",)
    with pytest.raises(DataError, match="no pair to train on: 1 given, 1 longer"):
        tokenize_pairs(tiny_policy.tokenizer, [tall], max_prompt_length=200, max_length=300)


# --- where a round starts ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_rounds(base: ModelConfig, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two rounds for each way to chain: adapters by (chain, round)."""
    folder = tmp_path_factory.mktemp("rounds")
    found = {}
    for chain in ("continue", "merge", "fresh"):
        previous = None
        for t in range(2):
            out = folder / chain / f"iter_{t}"
            one_round(base, out, previous, chain=chain)
            previous = out / "adapter"
            found[f"{chain} {t}"] = previous
    return found


def test_the_first_round_is_the_same_however_rounds_are_chained(two_rounds) -> None:
    weights = [
        load_file(two_rounds[f"{chain} 0"] / "adapter_model.safetensors")
        for chain in ("continue", "merge", "fresh")
    ]
    for other in weights[1:]:
        assert all(torch.equal(weights[0][key], other[key]) for key in weights[0])


def test_recipes_of_weights(base: ModelConfig, two_rounds) -> None:
    assert start_of_round(base, None, "continue") == (Weights(base), False)
    first = two_rounds["merge 0"]
    assert start_of_round(base, first, "fresh") == (Weights(base), False)
    assert start_of_round(base, first, "merge") == (Weights(base, (first,)), False)
    assert start_of_round(base, first, "continue") == (Weights(base, (first,)), True)
    assert reference_of_round(base, first, "base") == Weights(base)
    assert reference_of_round(base, first, "current") == Weights(base, (first,))
    # After a merge, the model is the base with the first adapter folded in and the second on top.
    second = two_rounds["merge 1"]
    assert model_after(base, second).adapters == (first, second)
    assert model_after(base, two_rounds["continue 1"]).adapters == (two_rounds["continue 1"],)


@pytest.mark.parametrize("chain", ["continue", "merge", "fresh"])
def test_a_saved_round_reloads_to_the_same_model_by_name(
    base: ModelConfig, two_rounds, chain: str
) -> None:
    adapter = two_rounds[f"{chain} 1"]
    by_recipe = log_probs(model_after(base, adapter).load())
    for name in (adapter, adapter.parent):
        assert torch.equal(log_probs(load_policy(str(name))), by_recipe)


# --- what moves ----------------------------------------------------------------------------------


def test_adapters_move_and_base_weights_do_not(base: ModelConfig, tmp_path: Path) -> None:
    before = {k: v.clone() for k, v in load_base(base).model.state_dict().items()}
    one_round(base, tmp_path)
    policy = model_after(base, tmp_path / "adapter").load()
    after = policy.model.state_dict()
    for key, value in before.items():
        wrapped = f"base_model.model.{key}"
        if wrapped not in after:
            wrapped = wrapped.replace(".weight", ".base_layer.weight")
        assert torch.equal(after[wrapped], value), key
    adapter = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert any("lora_B" in key for key in adapter)
    assert all(value.abs().max() > 0 for key, value in adapter.items() if "lora_B" in key)
    names = {part for key in adapter for part in ("q_proj", "k_proj", "v_proj") if part in key}
    assert names == {"q_proj", "k_proj", "v_proj"}


def test_a_round_lowers_the_loss_and_logs_it(base: ModelConfig, tmp_path: Path) -> None:
    report = one_round(base, tmp_path, steps=8)
    rows = read_jsonl(tmp_path / "training_log.jsonl")
    assert rows == list(report.log)
    train = [row for row in rows if row["split"] == "train"]
    assert [row["step"] for row in train] == list(range(1, 9))
    assert train[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert train[-1]["loss"] < 0.65
    assert train[-1]["margin"] > 0.1
    assert [r["step"] for r in rows if r["split"] == "held_out"] == [0, 2, 4, 6, 8]
    assert (report.pairs, report.held_out, report.steps) == (4, 2, 8)
    assert not (tmp_path / "checkpoints").exists()


def test_the_same_seed_gives_the_same_adapter_and_another_does_not(
    base: ModelConfig, tmp_path: Path
) -> None:
    def adapter(name: str, seed: int) -> dict[str, torch.Tensor]:
        train_round(
            base, PAIRS[:4], [], tmp_path / name, dpo=DPO, lora=LORA, seed=seed, progress=False
        )
        return load_file(tmp_path / name / "adapter" / "adapter_model.safetensors")

    first, again, other = adapter("a", 1), adapter("b", 1), adapter("c", 2)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)


def test_an_interrupted_round_ends_with_the_same_adapter(
    base: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one_round(base, tmp_path / "whole", steps=6)
    import grath_utils.dpo.trainer as trainer

    class Interrupted(trainer._Watch):
        def on_step_end(self, args, state, control, **kwargs):
            super().on_step_end(args, state, control, **kwargs)
            if state.global_step == 5:  # a checkpoint was written after step 4
                raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "_Watch", Interrupted)
        with pytest.raises(KeyboardInterrupt):
            one_round(base, tmp_path / "broken", steps=6)
    assert not (tmp_path / "broken" / "adapter").exists()
    # What a process killed in the middle of saving would leave.
    half = tmp_path / "broken" / "checkpoints" / "checkpoint-5"
    half.mkdir()
    (half / "trainer_state.json").write_text("{")
    one_round(base, tmp_path / "broken", steps=6)
    whole, resumed = (
        load_file(tmp_path / name / "adapter" / "adapter_model.safetensors")
        for name in ("whole", "broken")
    )
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    assert read_jsonl(tmp_path / "whole" / "training_log.jsonl") == read_jsonl(
        tmp_path / "broken" / "training_log.jsonl"
    )


def test_the_adapter_names_its_base_and_no_path_of_this_machine(
    base: ModelConfig, tmp_path: Path
) -> None:
    one_round(base, tmp_path)
    record = read_json(tmp_path / "adapter" / "grath.json")
    assert record["merged"] == []
    assert record["base"] == base.name
    settings = read_json(tmp_path / "adapter" / "adapter_config.json")
    assert settings["target_modules"] == ["k_proj", "q_proj", "v_proj"]
    assert settings["base_model_name_or_path"] == base.name


# --- wrong input ---------------------------------------------------------------------------------


def test_a_target_that_matches_nothing_is_an_error(tiny_policy: Policy) -> None:
    targets = ("q_proj", "out_proj", "fc_in")
    with pytest.raises(TrainingError, match=r"out_proj, fc_in; its linear layers are .*q_proj"):
        add_adapter(tiny_policy, replace(LORA, targets=targets), seed=0)


def test_all_linear_adapts_every_linear_layer_but_the_head(tiny_policy: Policy) -> None:
    policy = add_adapter(tiny_policy, replace(LORA, targets=("all-linear",)), seed=0)
    adapted = {
        name.split(".")[-4] for name, _ in policy.model.named_parameters() if "lora_A" in name
    }
    layers = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj"
    assert adapted == set(layers.split())


def test_no_pairs_is_an_error(base: ModelConfig, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no pair to train on"):
        train_round(base, [], [], tmp_path, dpo=DPO, lora=LORA, seed=0, progress=False)


def test_the_global_batch_is_what_is_configured() -> None:
    config = DPOConfig(batch_size=16, micro_batch_size=4)
    shapes = [split_batch(config, processes) for processes in (1, 2, 4, 8)]
    assert [(shape.piece, shape.accumulation) for shape in shapes] == [
        (4, 4),
        (4, 2),
        (4, 1),
        (2, 1),
    ]
    with pytest.raises(ConfigError, match="cannot be divided among 3 processes"):
        split_batch(config, 3)


def test_an_unknown_loss_or_optimizer_is_a_config_error(base: ModelConfig, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the trainer refuses"):
        one_round(base, tmp_path, optimizer="adamm")


def test_the_losses_are_those_of_the_installed_trl() -> None:
    import inspect
    import re

    from trl import DPOTrainer

    code = inspect.getsource(DPOTrainer._compute_loss)
    assert set(re.findall(r'loss_type == "(\w+)"', code)) == set(DPO_LOSSES)


@pytest.mark.parametrize("loss", ["ipo", "hinge", "robust"])
def test_other_losses_of_trl_train_by_name(base: ModelConfig, tmp_path: Path, loss: str) -> None:
    report = one_round(base, tmp_path, loss=loss, label_smoothing=0.1, steps=1)
    assert all(math.isfinite(row["loss"]) for row in report.log)


def test_an_adapter_of_another_base_is_refused(base: ModelConfig, tmp_path: Path) -> None:
    from conftest import make_tiny_llama

    one_round(base, tmp_path / "round")
    other = make_tiny_llama(tmp_path / "other", seed=1)
    with pytest.raises(ModelError, match="was trained on"):
        model_after(
            dataclasses.replace(base, name=str(other)), tmp_path / "round" / "adapter"
        ).load()


def test_a_diverging_loss_stops_the_round(base: ModelConfig, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="training has diverged; lower dpo.learning_rate"):
        one_round(base, tmp_path, learning_rate=1e30, steps=4, max_grad_norm=1e30)
    assert not (tmp_path / "adapter").exists()


def test_a_collapse_stops_the_round_and_names_the_step(base: ModelConfig, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"at step \d+ the chosen answers have lost .* Raise"):
        one_round(base, tmp_path, learning_rate=0.5, steps=8, max_displacement=0.5)
    assert not (tmp_path / "adapter").exists()
