"""The cost model: counted parts exactly, rates held out from their fit, the table as published."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tabulate import tabulate

from grath_utils.cli import commands as cli
from grath_utils.config import LoraConfig, ModelConfig, load_config, profile_names
from grath_utils.errors import DataError, ModelError
from grath_utils.evaluation.benchmarks import BENCHMARKS
from grath_utils.files import read_jsonl
from grath_utils.loop.plan import plan_stages
from grath_utils.loop.run_dir import Run
from grath_utils.scale import costs, shapes
from grath_utils.scale.costs import DEVICES, GIB, cpu_device, estimate, total
from grath_utils.scale.shapes import KNOWN, NF4_BYTES, shape_of
from grath_utils.text import duration

ROOT = Path(__file__).resolve().parents[2]
CPU = cpu_device(1e12, 24 * GIB)
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.mark.parametrize(
    ("name", "parameters"),
    [  # as the models' pages on the Hub state them
        ("tiny", 134_515_008),
        ("HuggingFaceTB/SmolLM2-360M-Instruct", 361_821_120),
        ("HuggingFaceTB/SmolLM2-1.7B-Instruct", 1_711_376_384),
        ("meta-llama/Llama-2-7b-chat-hf", 6_738_415_616),
        ("HuggingFaceH4/zephyr-7b-beta", 7_241_732_096),
        ("meta-llama/Llama-2-70b-chat-hf", 68_976_648_192),
    ],
)
def test_parameters_of_the_known_models(name: str, parameters: int) -> None:
    assert KNOWN[name].parameters == parameters


def test_a_shape_is_read_from_a_folder_and_its_parameters_are_the_models(tiny_llama: Path) -> None:
    from transformers import AutoModelForCausalLM

    shape = shape_of(ModelConfig(name=str(tiny_llama)))
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    assert shape.weight_bytes("float32") == sum(p.nbytes for p in model.parameters())


@pytest.mark.parametrize("targets", [("q_proj", "k_proj", "v_proj"), ("all-linear",)])
def test_lora_parameters_are_those_that_peft_adds(tiny_policy, tiny_llama, targets) -> None:
    from grath_utils.dpo.adapters import add_adapter

    lora = LoraConfig(r=4, alpha=8, targets=targets)
    policy = add_adapter(tiny_policy, lora, seed=0)
    trained = sum(p.numel() for p in policy.model.parameters() if p.requires_grad)
    assert shape_of(ModelConfig(name=str(tiny_llama))).lora_parameters(lora) == trained


def test_the_cache_of_keys_and_values_has_the_bytes_that_are_counted(tiny_policy) -> None:
    shape = shape_of(tiny_policy.config)
    cache = tiny_policy.model(torch.arange(3, 40)[None], use_cache=True).past_key_values
    found = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert shape.kv_cache_bytes(37, "float32") == found


def test_four_bits_are_4_127_bits() -> None:
    assert abs(8 * NF4_BYTES - 4.127) < 5e-4  # QLoRA, arXiv 2305.14314, section 3


@pytest.mark.parametrize("targets", [("q_proj", "k_proj", "v_proj"), ("q_proj",), ALL])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_are_what_autograd_keeps(tiny_llama, targets, checkpointing) -> None:
    rest = (targets, dtype := "bfloat16", checkpointing)
    two, four = (saved_bytes(tiny_llama, layers, *rest) for layers in (2, 4))
    shape, lora = shape_of(ModelConfig(name=str(tiny_llama))), LoraConfig(r=4, targets=targets)
    counted = costs.activation_bytes(shape, lora, dtype, checkpointing=checkpointing)
    assert (four - two) / 2 == pytest.approx(counted, rel=0.02)


def saved_bytes(folder: Path, layers: int, targets, dtype: str, checkpointing: bool) -> float:
    """Bytes a token that the forward pass of a model with an adapter keeps for the backward."""
    from peft import LoraConfig as PeftLora
    from peft import get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig.from_pretrained(folder, num_hidden_layers=layers)
    model = LlamaForCausalLM(config).to(getattr(torch, dtype))
    model = get_peft_model(model, PeftLora(r=4, target_modules=list(targets)))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    model.train()
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    tokens = 64
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        ids = torch.arange(3, 3 + tokens)[None]
        mask = torch.zeros(1, 1, tokens, tokens, dtype=getattr(torch, dtype))
        output = model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=1)
    assert output.logits.requires_grad
    return sum(t.untyped_storage().nbytes() for t in kept.values()) / tokens


def test_a_model_of_unknown_shape_is_said_to_be_so(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="shape of the model .*not known here"):
        shape_of(ModelConfig(name="someone/unheard-of"))
    (tmp_path / "config.json").write_text('{"hidden_size": 8, "vocab_size": 9}')
    with pytest.raises(ModelError, match="lacks intermediate_size, num_hidden_layers"):
        shape_of(ModelConfig(name=str(tmp_path)))


@pytest.mark.parametrize("profile", profile_names())
def test_every_stage_has_an_estimate_and_every_benchmark(profile: str, tmp_path: Path) -> None:
    for settings in ({}, {"evaluation.benchmarks": list(BENCHMARKS)}, {"loop.placebo": True}):
        config = load_config(profile, settings)
        stages = [stage.id for stage in plan_stages(Run(tmp_path, config))]
        for device in (DEVICES["H100"], CPU):
            found = estimate(config, device)
            assert [cost.id for cost in found] == stages
            free = [cost.id for cost in found if not (cost.seconds > 0 and cost.memory > 0)]
            assert all("relabel" in id for id in free)  # no model takes part in it


def cost_of(overrides: str = "", profile: str = "cpu-tiny", device: costs.Device = CPU):
    return total(estimate(load_config(profile, overrides), device))


@pytest.mark.parametrize(
    "more",
    "dpo.steps=60 questions.limit=300 pairs.candidates=8 loop.iterations=3 "
    "dpo.gradient_checkpointing=true loop.placebo=true "
    "model.name=HuggingFaceTB/SmolLM2-360M-Instruct".split(),
)
def test_more_work_takes_longer(more: str) -> None:
    assert cost_of(more).seconds > cost_of().seconds


def test_a_prompt_that_shows_the_truth_takes_longer() -> None:
    shown = "questions.source=arc_challenge pairs.mode=paper pairs.ground_truth={}"
    assert cost_of(shown.format("true")).seconds > cost_of(shown.format("false")).seconds


def test_the_faster_the_machine_the_shorter_the_run_but_not_in_proportion() -> None:
    slow, fast, idle = (cost_of(device=cpu_device(p, 24 * GIB)).seconds for p in (1e11, 1e12, 1e15))
    assert idle < fast < slow < 10 * fast  # norms, softmax and Python get no faster
    one, eight = (cost_of(profile="paper-llama2", device=DEVICES[d]) for d in ("H100", "8xH100"))
    assert one.seconds / 8 < eight.seconds < one.seconds


def test_what_takes_memory_on_a_gpu_and_on_a_cpu() -> None:
    def peak(overrides: str = "", device: costs.Device = DEVICES["H100"]) -> float:
        config = load_config("paper-llama2", overrides)
        return sum(costs.training_memory(config, device).values())

    assert peak() < peak("dpo.gradient_checkpointing=false")
    assert peak() < peak("dpo.micro_batch_size=16") < peak("dpo.micro_batch_size=16 lora.r=64")
    assert peak() < peak("model.quantization=int8") < peak("model.quantization=none") - 3 * GIB
    # A CPU holds the rounded weights in 16 bits.
    assert peak(device=CPU) == peak("model.quantization=none", CPU)
    larger = cost_of("model.name=HuggingFaceTB/SmolLM2-360M-Instruct")
    assert larger.memory > cost_of().memory


def test_unknown_sizes_are_said_to_be_so() -> None:
    config = load_config("cpu", {"questions.source": "someone/set", "questions.limit": None})
    with pytest.raises(DataError, match=r"set questions\.limit"):
        costs.question_count(config)
    assert costs.question_count(load_config("paper-llama2")) == 1119


ROWS = read_jsonl(Path(costs.__file__).with_name("measurements.jsonl"))
KINDS = {"dpo step": "train", "scoring": "score", "pairs": "write"}


def test_the_constants_are_fitted_to_what_was_measured() -> None:
    for what, unit, measured, predicted in costs.compare_with_measurements():
        assert predicted == pytest.approx(measured, rel=0.5), f"{what} ({unit})"


@pytest.mark.parametrize(
    "held_out", [row for row in ROWS if row["kind"] in KINDS and row["device"] == "cpu"],
    ids=lambda row: row["what"],
)  # fmt: skip
def test_a_machine_is_predicted_from_measurements_on_others(held_out, monkeypatch) -> None:
    """Without the row, the rate of its kind of work is fitted again: one factor for the rest."""
    kind = KINDS[held_out["kind"]]
    alike = [row for row in ROWS if (row["kind"], row["device"]) == (held_out["kind"], "cpu")]
    rest = [row for row in alike if row["peak"] != held_out["peak"]]
    assert rest
    monkeypatch.setitem(costs.CPU_COSTS, kind, (1.0, 2e-12))  # a guess, not the constants as fitted
    factor = np.mean([row["measured"] / costs.predict(row) for row in rest])
    monkeypatch.setitem(costs.CPU_COSTS, kind, (factor, factor * 2e-12))
    assert held_out["measured"] / 2 < costs.predict(held_out) < held_out["measured"] * 2


def test_what_no_constant_is_fitted_to_comes_out_within_a_factor() -> None:
    """A whole run is the sum of its stages; memory is counted."""
    rows = [row for row in ROWS if row["kind"] in ("run", "training memory")]
    assert {row["kind"] for row in rows} == {"run", "training memory"}
    for row in rows:
        assert row["measured"] / 2 < costs.predict(row) < row["measured"] * 2, row["what"]


def test_the_page_of_results_holds_the_table_as_it_is_computed() -> None:
    """Memory, and time for the paper's recipe / for the course's: every stage is counted."""
    rows = []
    for name in ("SMOLLM2_135M", "SMOLLM2_1_7B", "LLAMA2_7B", "LLAMA2_70B"):
        shape, stored = getattr(shapes, name), "none" if name == "SMOLLM2_135M" else "nf4"
        cells, most = [], 0.0
        for device in DEVICES.values():
            both = [
                total(estimate(load_config(p, {"model.quantization": stored}), device, shape=shape))
                for p in ("paper-llama2", "cpu")
            ]
            memory = max(cost.memory for cost in both)
            times = " / ".join(duration(cost.seconds) for cost in both)
            cells.append(times if memory <= device.memory else "does not fit")
            most = max(most, memory)
        weights = "16-bit" if stored == "none" else "NF4"
        rows.append([shape.name, weights, f"{most / GIB:.1f}", *cells])
    columns = ["model", "weights", "memory, one GPU (GiB)", *(d.name for d in DEVICES.values())]
    table = tabulate(rows, columns, tablefmt="github", disable_numparse=True)
    text = (ROOT / "notebooks" / "RESULTS.md").read_text(encoding="utf-8")
    assert table in text, f"notebooks/RESULTS.md, `How long on what`: put in\n{table}"


@pytest.mark.parametrize("profile", profile_names())
def test_a_dry_run_estimates_time_and_memory(profile, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(costs, "this_device", lambda model: CPU)
    folder = tmp_path / "planned"
    assert cli.main(["run", "--dry-run", "--profile", profile, "--run-dir", str(folder)]) == 0
    shown = capsys.readouterr().out
    lines = [line for line in shown.splitlines() if line.startswith("  to do")]
    assert len(lines) == len(plan_stages(Run(folder, load_config(profile))))
    assert all(line.endswith("GiB") for line in lines)
    assert "to do: about" in shown
    assert ("on one H100" in shown) == profile.startswith("paper-")
    assert ("on one T4" in shown) == (profile == "colab-t4")
    assert not folder.exists()


def test_a_dry_run_without_a_known_shape_still_shows_the_plan(tmp_path, capsys) -> None:
    arguments = ["run", "--dry-run", "--profile", "smoke", "--run-dir", str(tmp_path / "x")]
    assert cli.main([*arguments, "--set", "model.name=someone/unheard-of"]) == 0
    shown = capsys.readouterr().out
    assert "to do   train, round 2" in shown
    assert "no estimate of time and memory: the shape of the model" in shown


def test_this_machine_can_be_measured() -> None:
    device = costs.this_device(ModelConfig(), seconds=0.05)
    assert device.peak > 1e8
    assert device.memory > GIB
