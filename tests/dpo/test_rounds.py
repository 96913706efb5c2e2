"""Rounds: where one starts and what it is compared with, what moves, resuming, wrong input."""

from __future__ import annotations

import gc
import itertools
import math
import shutil
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from architectures import tiny_model
from helpers import DPO, LORA, make_tiny_llama
from peft import PeftModel
from peft.utils.integrations import dequantize_bnb_weight
from safetensors.torch import load_file
from tiny_rounds import HELD_OUT, LIMITS, TRAINED, one_round, scalars, tokens

from grath_utils.config import DPO_LOSSES, ModelConfig, load_config
from grath_utils.dpo import trainer
from grath_utils.dpo.adapters import Weights, add_adapter, model_after
from grath_utils.dpo.data import collate, tokenize_pairs
from grath_utils.dpo.loss import completion_log_probs, dpo_loss
from grath_utils.dpo.round import TrainingReport, check_folder, train_round
from grath_utils.engine.models import Policy, load_base, unwrapped
from grath_utils.errors import (
    CollapseError,
    ConfigError,
    DataError,
    ModelError,
    RunError,
    TrainingError,
    UsageError,
)
from grath_utils.files import read_json, read_jsonl, write_json
from grath_utils.loop.named_models import load_policy

ADAPTER = "adapter/adapter_model.safetensors"
MODES = list(itertools.product(("current", "base"), ("continue", "merge", "fresh")))


@pytest.fixture(scope="module")
def base(tiny_llama: Path) -> ModelConfig:
    return ModelConfig(name=str(tiny_llama), dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def done(
    base: ModelConfig, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, TrainingReport]:
    """A round of eight steps, and its report."""
    folder = tmp_path_factory.mktemp("done")
    return folder, one_round(base, folder, steps=8)


def test_the_model_after_a_round(tmp_path: Path) -> None:
    base = ModelConfig()
    first, second = tmp_path / "iter_0" / "adapter", tmp_path / "iter_1" / "adapter"
    assert model_after(base, None) == Weights(base)
    assert model_after(base, second).adapters == (second,)
    # After a merge, the model is the base with the first adapter folded in and the second on top.
    second.mkdir(parents=True)
    write_json(second / "grath.json", {"merged": ["../../iter_0/adapter"]})
    assert model_after(base, second).adapters == (first, second)


def test_a_trained_model_is_gone_when_the_next_is_loaded(
    base: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After training it refers to itself: left alone, two models would be in memory."""
    trained = []

    def remembered(*arguments) -> Policy:
        policy = add_adapter(*arguments)
        trained.append(weakref.ref(unwrapped(policy.model)))
        return policy

    monkeypatch.setattr("grath_utils.dpo.round.add_adapter", remembered)
    gc.disable()
    try:
        one_round(base, tmp_path / "round", steps=1)
        load_base(base)
        assert trained[0]() is None
    finally:
        gc.enable()


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
def kind_base(kind: Kind, tiny_llama: Path) -> ModelConfig:
    where = {"dtype": kind.dtype, "device": kind.device}
    return ModelConfig(name=str(tiny_llama), quantization=kind.quantization, **where)


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
    examples = tokenize_pairs(tokenizer, HELD_OUT, **LIMITS).examples
    batch = collate(examples, tokenizer.pad_token_id, base.device)
    with torch.no_grad():
        return completion_log_probs(plain_model(base, adapters).eval(), batch).cpu().chunk(2)


@pytest.mark.slow
@pytest.mark.parametrize(("reference", "chain"), MODES)
def test_where_rounds_start(
    kind: Kind, kind_base: ModelConfig, tmp_path: Path, reference: str, chain: str
) -> None:
    """Step 0 is that of the intended models, put together here with plain ``peft`` calls."""
    base = kind_base
    pristine = held_out_log_probs(base, [])
    done: list[Path] = []
    rounds = 3 if chain == "merge" else 2  # a second merge folds one adapter on another
    for t in range(rounds):
        folder = tmp_path / f"iter_{t}"
        previous = done[-1] if done else None
        report = one_round(
            base, folder, previous, seed=t, steps=2, reference=reference, chain=chain
        )
        # What this round should have started from, and been compared with.
        before = {"continue": done[-1:], "merge": done, "fresh": []}[chain]
        wrote_pairs = {"continue": done[-1:], "merge": done, "fresh": done[-1:]}[chain]
        start = held_out_log_probs(base, before)
        compared = held_out_log_probs(base, [] if reference == "base" else wrote_pairs)
        losses, chosen, rejected = dpo_loss(*start, *compared, beta=DPO.beta)
        margins = chosen - rejected
        first = next(row for row in report.log if row["split"] == "held_out")
        assert first["step"] == 0
        assert first["loss"] == pytest.approx(losses.mean().item(), abs=kind.exact)
        assert first["margin"] == pytest.approx(margins.mean().item(), abs=kind.exact)
        assert first["logp_chosen"] == pytest.approx(start[0].mean().item(), abs=100 * kind.exact)
        if t == 0 or (reference == "base") == (chain == "fresh"):  # the two coincide
            assert first["loss"] == pytest.approx(math.log(2), abs=kind.exact)
            assert first["margin"] == pytest.approx(0, abs=kind.exact)
        else:
            assert abs(first["margin"]) > 10 * kind.exact

        # The adapter moved; what is saved is what is loaded again, by recipe and by name.
        done.append(folder / "adapter")
        weights = load_file(folder / ADAPTER)
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


def test_a_round_lowers_the_loss_and_logs_it(done: tuple[Path, TrainingReport]) -> None:
    folder, report = done
    rows = read_jsonl(folder / "training_log.jsonl")
    assert rows == list(report.log)
    train = [row for row in rows if row["split"] == "train"]
    assert [row["step"] for row in train] == list(range(1, 9))
    assert train[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert train[-1]["loss"] < 0.65
    assert train[-1]["margin"] > 0.1
    assert [r["step"] for r in rows if r["split"] == "held_out"] == [0, 2, 4, 6, 8]
    assert (report.pairs, report.held_out, report.steps) == (4, 2, 8)
    assert not (folder / "checkpoints").exists()


def test_each_held_out_pair_counts_alike_in_batches_of_two_sizes(
    base: ModelConfig, tmp_path: Path
) -> None:
    some = {"lora": LORA, "seed": 0, "progress": False}
    logs = [
        train_round(
            base,
            TRAINED,
            TRAINED[:3],
            tmp_path / str(size),
            dpo=replace(DPO, micro_batch_size=size, log_every=2, evaluate_every=1),
            **some,
        ).log
        for size in (1, 2)  # three batches of one pair; one of two and one of one
    ]
    alone, together = ([row for row in log if row["split"] == "held_out"] for log in logs)
    assert [row["step"] for row in together] == [0, 1, 2, 3, 4]
    for one, other in zip(alone[1:], together[1:], strict=True):  # at step 0 margins are ties
        numbers = [{k: v for k, v in row.items() if k != "split"} for row in (one, other)]
        assert numbers[1] == pytest.approx(numbers[0], abs=1e-4)


def test_the_adapter_moved_and_names_its_base_and_no_path_of_this_machine(
    base: ModelConfig, done: tuple[Path, TrainingReport]
) -> None:
    folder, _ = done
    weights = load_file(folder / ADAPTER)
    assert {name.split(".")[-3] for name in weights} == {"q_proj", "k_proj", "v_proj"}
    assert all(value.abs().max() > 0 for value in weights.values())
    record = read_json(folder / "adapter" / "grath.json")
    assert (record["base"], record["merged"]) == (base.name, [])
    settings = read_json(folder / "adapter" / "adapter_config.json")
    assert settings["target_modules"] == ["k_proj", "q_proj", "v_proj"]
    assert settings["base_model_name_or_path"] == base.name


@pytest.mark.slow
def test_the_same_seed_gives_the_same_adapter_and_another_does_not(
    base: ModelConfig, tmp_path: Path
) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        one_round(base, tmp_path / name, seed=seed, steps=2)
    first, again, other = (tmp_path / name / ADAPTER for name in "abc")
    assert first.read_bytes() == again.read_bytes()
    assert first.read_bytes() != other.read_bytes()


def test_an_interrupted_round_ends_with_the_same_adapter_and_log(
    base: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    # An epoch has four steps; the only checkpoint is written in the middle of the second one, and
    # where nothing is measured on held-out pairs.
    settings = {"steps": 8, "save_every": 6, "evaluate_every": 4}
    settings |= {"batch_size": 1, "micro_batch_size": 1, "report_to": ("tensorboard",)}
    one_round(base, whole, **settings)

    class Interrupted(trainer._Watch):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 7:
                raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "_Watch", Interrupted)
        with pytest.raises(KeyboardInterrupt):
            one_round(base, broken, **settings)
    assert not (broken / "adapter").exists()
    # What a process killed in the middle of saving would leave.
    half = broken / "checkpoints" / "checkpoint-7"
    half.mkdir()
    (half / "trainer_state.json").write_text("{")
    one_round(base, broken, **settings)
    for name in (ADAPTER, "training_log.jsonl"):
        assert (whole / name).read_bytes() == (broken / name).read_bytes()
    shown = scalars(broken / "tensorboard")["train/loss"]
    assert [step for step, _ in shown] == list(range(1, 9)), "no point is doubled"


@pytest.mark.slow
def test_a_stopped_round_is_continued_by_the_same_training_alone(
    base: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checkpoints of other pairs or settings would be trained on silently."""

    class Stopped(trainer._Watch):
        at: int | None

        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == self.at:
                raise KeyboardInterrupt

    monkeypatch.setattr(trainer, "_Watch", Stopped)
    for Stopped.at, beta in (
        (0, 0.2),
        (3, 0.1),
    ):  # before the first checkpoint, nothing is at stake
        with pytest.raises(KeyboardInterrupt):
            one_round(base, tmp_path, beta=beta)
        check_folder(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    how = {"dpo": DPO, "lora": LORA, "seed": 0, "progress": False}
    for other in (
        lambda: one_round(base, tmp_path, beta=0.2),
        lambda: one_round(base, tmp_path, seed=1),
        lambda: train_round(base, HELD_OUT, HELD_OUT, tmp_path, **how),
        lambda: train_round(
            base, TRAINED, HELD_OUT, tmp_path, **{**how, "lora": replace(LORA, r=2)}
        ),
    ):
        with pytest.raises(RunError, match="left by a training on other pairs, or with other set"):
            other()
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    (tmp_path / "checkpoints" / "identity.json").unlink()  # as older versions left it
    check_folder(tmp_path)
    Stopped.at = None
    assert one_round(base, tmp_path, report_to=("none",)).steps == 4
    with pytest.raises(UsageError, match="adapter exists already"):
        check_folder(tmp_path)


@pytest.mark.parametrize(
    "names", ["identity.json", "checkpoint-500/model.bin", "checkpoint-5/complete.json notes.txt"]
)
def test_checkpoints_of_another_tool_stay(names: str, tmp_path: Path) -> None:
    for name in names.split():
        path = tmp_path / "checkpoints" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text('{"run": "of another tool"}')
    with pytest.raises(UsageError, match="not empty, and stays"):
        check_folder(tmp_path)


@pytest.mark.parametrize("left", ["", ".identity.json.x1.grath-partial"])
def test_a_round_killed_in_its_first_moment_can_be_given_again(
    left: str, base: ModelConfig, tmp_path: Path
) -> None:
    (tmp_path / "checkpoints" / left).mkdir(parents=True)
    check_folder(tmp_path)
    assert one_round(base, tmp_path, steps=1).steps == 1
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize(
    "stored", ["[]", "5", '{"chosen": 3}', '{"chosen": [null], "rejected": []}']
)
def test_a_reference_of_another_form_in_the_cache_is_computed_again(
    stored: str, base: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRATH_CACHE", str(tmp_path / "cache"))
    logs = []
    for name in "ab":
        logs.append(one_round(base, tmp_path / name, steps=1).log)
        for file in (tmp_path / "cache" / "reference").iterdir():
            file.write_text(stored)
    assert logs[0] == logs[1]


# Architecture, targets, and the number of layers that get an adapter, or what the refusal says.
TARGETS = [
    ("llama", "all-linear", 14),
    ("llama", "q_proj k_proj", 4),
    ("llama", "self_attn.q_proj layers.1.mlp.up_proj", 3),
    ("gpt2", "c_attn", 2),  # a Conv1D
    ("gpt2", "attn.c_proj", 2),
    ("gpt2", "all-linear", 8),
    ("phi3", "qkv_proj", 2),
    ("falcon", "query_key_value", 2),
    ("qwen2-moe", "q_proj shared_expert.up_proj", 4),
    ("llama", "q_proj out_proj fc_in", "not have: out_proj, fc_in; its linear layers are .*q_proj"),
    ("gpt2", "q_proj", "not have: q_proj; its linear layers are c_attn, c_fc, c_proj, or say"),
    ("llama", "lm_head", r"cannot be adapted: lm_head \(the output head\); its .* are down_proj"),
    ("llama", "embed_tokens norm", r"embed_tokens \(Embedding\), norm \(LlamaRMSNorm\)"),
    ("llama", "self_attn", r"self_attn \(LlamaAttention\)"),
    ("qwen2-moe", "experts.gate_up_proj", r"experts.gate_up_proj \(weights without a layer\)"),
    ("mamba", "out_proj", "'out_proj' is incompatible with Mamba-based models"),
    ("phimoe", "q_proj router", "the model's forward pass fails"),
]


@pytest.mark.parametrize(("name", "targets", "expected"), TARGETS)
def test_the_layers_that_an_adapter_names(
    tiny_policy: Policy, name: str, targets: str, expected: int | str
) -> None:
    policy = replace(tiny_policy, model=tiny_model(name, len(tiny_policy.tokenizer)))
    lora = replace(LORA, targets=tuple(targets.split()))
    if isinstance(expected, str):
        with pytest.raises(TrainingError, match=expected):
            add_adapter(policy, lora, seed=0)
        return
    model = add_adapter(policy, lora, seed=0).model
    assert sum("lora_A" in name for name, _ in model.named_parameters()) == expected
    assert all(("lora_" in name) == p.requires_grad for name, p in model.named_parameters())
    assert all(p.grad is None for p in model.parameters()), "trying it out leaves nothing"


@pytest.mark.parametrize(
    "change",
    [
        lambda values: [values[0] + 5, *values[1:]],
        pytest.param(lambda values: values[:-1], marks=pytest.mark.slow),
    ],
)
def test_a_stored_reference_that_does_not_fit_is_computed_again(
    base: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable
) -> None:
    monkeypatch.setenv("GRATH_CACHE", str(tmp_path / "cache"))
    first = one_round(base, tmp_path / "a", steps=1)
    [stored] = (tmp_path / "cache" / "reference").glob("*.json")
    right = stored.read_bytes()
    write_json(stored, {side: change(values) for side, values in read_json(stored).items()})
    assert one_round(base, tmp_path / "b", steps=1).log == first.log
    assert stored.read_bytes() == right


def test_no_pairs_is_an_error(base: ModelConfig, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no pair to train on"):
        train_round(base, [], [], tmp_path, dpo=DPO, lora=LORA, seed=0, progress=False)


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"optimizer": "adamm"}, ConfigError, "the trainer refuses"),
        ({"optimizer": "lomo"}, ConfigError, "dpo.optimizer=lomo cannot be used here: .*lomo_opt"),
        ({"max_grad_norm": 1e30}, TrainingError, "has diverged; lower dpo.learning_rate"),
        ({"max_displacement": 0.5}, CollapseError, r"at step \d+ the chosen .* lost .* Raise"),
    ],
)
def test_what_stops_a_round(
    base: ModelConfig, tmp_path: Path, changes: dict, kind: type[Exception], message: str
) -> None:
    rate = changes.get("max_grad_norm", 0.5)
    with pytest.raises(kind, match=message):
        one_round(base, tmp_path, learning_rate=rate, steps=8, **changes)
    assert not (tmp_path / "adapter").exists()


REFUSED = {("exo_pair", 0.0): "above 0", ("robust", 0.5): "below 0.5"}


@pytest.mark.parametrize("smoothing", [0.0, 0.5])
@pytest.mark.parametrize(
    "loss",
    [
        pytest.param(name, marks=[pytest.mark.slow] * (name not in ("sigmoid", "ipo")))
        for name in DPO_LOSSES
    ],
)
def test_every_loss_trains_by_name_or_is_refused(
    tiny_policy: Policy, tmp_path: Path, loss: str, smoothing: float
) -> None:
    settings = {"dpo.loss": loss, "dpo.label_smoothing": smoothing}
    if problem := REFUSED.get((loss, smoothing)):
        with pytest.raises(ConfigError, match=rf'"dpo.loss" {loss} needs .*{problem}'):
            load_config("smoke", settings)
        return
    load_config("smoke", settings)
    config = replace(DPO, loss=loss, label_smoothing=smoothing, steps=1)
    policy = add_adapter(tiny_policy, LORA, seed=0)
    rows = [
        {**vars(e), "ref_chosen_logps": -9.0, "ref_rejected_logps": -5.0} for e in tokens(policy)
    ]
    log = trainer.run_trainer(
        policy, rows[:4], rows[4:], folder=tmp_path, config=config, seed=0, progress=False
    )
    assert len(log) == 3
    assert all(math.isfinite(row["loss"]) for row in log)


@pytest.mark.slow
def test_dropout_is_the_adapter_s_alone(base: ModelConfig, tmp_path: Path) -> None:
    """A model's own would make the first loss another than ln 2; the adapter's changes training."""
    own = tmp_path / "own"
    shutil.copytree(base.name, own)
    write_json(own / "config.json", read_json(own / "config.json") | {"attention_dropout": 0.5})
    logs = {}
    for name, model, dropout in (("none", base.name, 0.0), ("own", own, 0.0), ("lora", own, 0.5)):
        logs[name] = train_round(
            replace(base, name=str(model)),
            *(TRAINED, HELD_OUT, tmp_path / name),
            dpo=replace(DPO, steps=2),
            lora=replace(LORA, dropout=dropout),
            seed=0,
            progress=False,
        ).log
    losses = {name: [row["loss"] for row in log] for name, log in logs.items()}
    assert losses["own"] == pytest.approx(losses["none"], abs=1e-5)
    assert losses["lora"][:2] == pytest.approx([math.log(2)] * 2, abs=1e-5)
    assert abs(losses["lora"][-1] - losses["none"][-1]) > 1e-4


def test_what_a_model_cannot_recompute_is_said(tiny_policy: Policy, tmp_path: Path) -> None:
    model = tiny_model("jetmoe", len(tiny_policy.tokenizer))
    policy = replace(tiny_policy, model=model, name="jetmoe")
    rows = [{**vars(e), "ref_chosen_logps": 0.0, "ref_rejected_logps": 0.0} for e in tokens(policy)]
    config = replace(DPO, gradient_checkpointing=True)
    policy = add_adapter(policy, replace(LORA, targets=("all-linear",)), seed=0)
    with pytest.raises(ConfigError, match=r"dpo.gradient_checkpointing: a JetMoeForCausalLM"):
        trainer.run_trainer(policy, rows, [], folder=tmp_path, config=config, seed=0)


def test_an_adapter_of_another_base_is_refused(
    base: ModelConfig, tmp_path: Path, done: tuple[Path, TrainingReport]
) -> None:
    other = replace(base, name=str(make_tiny_llama(tmp_path / "other", seed=1)))
    with pytest.raises(ModelError, match="was trained on"):
        model_after(other, done[0] / "adapter").load()


def test_pairs_longer_than_the_model_takes_are_left_out(base: ModelConfig, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(base.name, tmp_path / "short"))
    settings = read_json(folder / "config.json")
    write_json(folder / "config.json", {**settings, "max_position_embeddings": 40})
    with pytest.raises(DataError, match="or 40 with its answers"):
        one_round(replace(base, name=str(folder)), tmp_path / "round")
