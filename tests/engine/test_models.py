"""Loading: names, refusals, adapters."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import DPO, LORA, PAIRS
from safetensors.torch import load_file, save_file

from grath_utils.config import ModelConfig
from grath_utils.dpo.round import train_round
from grath_utils.engine.machine import keep_freed_memory
from grath_utils.engine.models import ADAPTER_FILES, Policy, apply_adapters, base_of, load_base
from grath_utils.errors import FetchError, ModelError, UsageError

CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")


def load(name: str | Path, **options: str) -> Policy:
    return load_base(ModelConfig(name=str(name), **options))


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


HELD = """
import ctypes
import grath_utils
import torch

class Info(ctypes.Structure):  # mallinfo2 of glibc
    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
    _fields_ = [(name, ctypes.c_size_t) for name in names]

mallinfo = ctypes.CDLL("libc.so.6").mallinfo2
mallinfo.restype = Info
weights = [torch.zeros(rows, 256, dtype=torch.bfloat16) for rows in (256, 512, 1024)]
before = mallinfo().uordblks
with torch.inference_mode():
    for rows in range(1, 201):
        for weight in weights:
            torch.nn.functional.linear(torch.zeros(rows, 256, dtype=torch.bfloat16), weight)
print((mallinfo().uordblks - before) >> 20)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks glibc")
def test_products_of_many_shapes_leave_little_memory() -> None:
    """Each of 600 shapes has a compiled product, which was held twice: hundreds of megabytes."""
    command = [sys.executable, "-c", HELD]
    environment = {k: v for k, v in os.environ.items() if not k.endswith("CACHE_CAPACITY")}
    held = {
        "ours": int(subprocess.check_output(command, env=environment)),
        "a user's": int(
            subprocess.check_output(command, env={**environment, **dict.fromkeys(CACHES, "1024")})
        ),
    }
    assert held["ours"] < 150, held
    # Without bfloat16 units no such product is compiled.
    assert held["ours"] <= held["a user's"] + 10, held


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
    # Beside the weights they can be switched off; what was folded in cannot.
    with torch.no_grad(), base_of(beside) as base:
        assert torch.equal(base.model(ids).logits, pristine)
    with torch.no_grad():
        assert torch.equal(beside.model(ids).logits, two)
    assert not any(p.requires_grad for p in beside.model.parameters())
    with pytest.raises(UsageError, match="is folded into its weights"), base_of(merged):
        pass
    with base_of(merged, quantized) as base:
        assert base is quantized


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


def test_matrices_of_another_size_are_told_in_one_sentence(
    tiny_policy: Policy, adapters: list[Path], tmp_path: Path
) -> None:
    copied = Path(shutil.copytree(adapters[0], tmp_path / "adapter"))
    weights = load_file(copied / ADAPTER_FILES[1])
    save_file({n: torch.cat([w, w]) for n, w in weights.items()}, copied / ADAPTER_FILES[1])
    with pytest.raises(ModelError, match="cannot load the adapter in .*size mismatch") as caught:
        apply_adapters(tiny_policy, [copied])
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500
