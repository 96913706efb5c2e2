"""A GGUF file as a model: the same logits as the model that it was made from, or refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers as T

from grath_utils.cli import main
from grath_utils.config import ModelConfig, load_config
from grath_utils.engine.models import load_base
from grath_utils.errors import ModelError

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "tie_word_embeddings": False,
}
KINDS: dict[str, Any] = {
    "llama": T.LlamaConfig,
    "mistral": T.MistralConfig,
    "qwen2": T.Qwen2Config,
    "qwen3": T.Qwen3Config,
}
CHANGES = Callable[[gguf.GGUFWriter], None]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GRATH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def permuted(weights: np.ndarray, heads: int) -> np.ndarray:
    """Return a llama's q or k with the rows of a head as llama.cpp wants them."""
    halves = weights.reshape(heads, 2, len(weights) // heads // 2, *weights.shape[1:])
    return halves.swapaxes(1, 2).reshape(weights.shape)


def write_gguf(
    kind: str, tokenizer: Path, file: Path, change: CHANGES = lambda writer: None, **more: Any
) -> T.PreTrainedModel:
    """Write a random model with a tokenizer as llama.cpp would; return the model."""
    vocabulary = json.loads((tokenizer / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    tokens = sorted(vocabulary["vocab"], key=vocabulary["vocab"].get)
    torch.manual_seed(0)
    more |= {"head_dim": 128} if kind == "qwen3" else {}  # as all of them have
    settings = KINDS[kind](**SMALL | {"vocab_size": len(tokens)} | more)
    model = T.AutoModelForCausalLM.from_config(settings).eval()
    with torch.no_grad():
        for weight in model.parameters():  # a norm of ones shows no mistake
            weight.add_(0.05 * torch.randn_like(weight)).copy_(weight.bfloat16())
    name = "llama" if kind == "mistral" else kind
    writer = gguf.GGUFWriter(file, name)
    writer.add_name(f"a small {kind}")
    writer.add_context_length(2048)
    writer.add_embedding_length(64)
    writer.add_block_count(2)
    writer.add_feed_forward_length(128)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_key_length(settings.head_dim if kind == "qwen3" else 16)
    writer.add_rope_dimension_count(settings.head_dim if kind == "qwen3" else 16)
    writer.add_rope_freq_base(settings.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(settings.rms_norm_eps)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token.startswith("<|") else 1 for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in vocabulary["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template((tokenizer / "chat_template.jinja").read_text(encoding="utf-8"))
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[name.upper()], 2)
    for key, weight in model.state_dict().items():
        stem, _, end = key.rpartition(".")
        numbers = weight.float().numpy()
        heads = {"q_proj": 4, "k_proj": 2}.get(stem.rpartition(".")[2])
        if name == "llama" and heads:
            numbers = permuted(numbers, heads)
        writer.add_tensor(f"{names.get_name(stem)}.{end}", np.ascontiguousarray(numbers))
    change(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def load(file: Path) -> Any:
    return load_base(ModelConfig(name=str(file), dtype="float32", device="cpu"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_gives_the_logits_of_its_model(kind: str, tiny_llama: Path, tmp_path: Path) -> None:
    model = write_gguf(kind, tiny_llama, tmp_path / "model.gguf")
    policy = load(tmp_path / "model.gguf")
    ids = torch.arange(5, 60)[None]
    with torch.no_grad():
        assert torch.allclose(policy.model(ids).logits, model(ids).logits, atol=1e-4)
    there = T.AutoTokenizer.from_pretrained(tiny_llama)
    text = "<|im_start|>The rain in the other water\n<|im_end|>"
    assert policy.tokenizer(text)["input_ids"] == there(text)["input_ids"]
    assert policy.tokenizer.chat_template == there.chat_template
    assert policy.tokenizer.eos_token == "<|im_end|>"


def test_it_is_converted_once_and_known_by_its_content(
    tiny_llama: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    file = tmp_path / "model.gguf"
    write_gguf("qwen2", tiny_llama, file)
    first = load(file).fingerprint
    assert capsys.readouterr().out.count("Converting model.gguf to safetensors") == 1
    moved = Path(shutil.copy(file, tmp_path / "moved.gguf"))
    assert load(moved).fingerprint == first
    assert "Converting" not in capsys.readouterr().out
    monkeypatch.chdir(tmp_path)
    assert load_config("smoke", {"model.name": "model.gguf"}).model.name == str(file)
    command = "evaluate --model model.gguf --benchmark probe --limit 2 --dtype float32 --out r.json"
    assert main(command.split()) == 0


def test_a_file_may_tie_its_head_to_its_embedding(tiny_llama: Path, tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"

    def without_head(writer: gguf.GGUFWriter) -> None:
        del writer.tensors[0]["output.weight"]

    write_gguf("qwen2", tiny_llama, file, without_head)
    model = load(file).model
    assert model.lm_head.weight is model.get_input_embeddings().weight


def set_type(writer: gguf.GGUFWriter) -> None:
    writer.add_type("adapter")


def another_architecture(writer: gguf.GGUFWriter) -> None:
    writer.kv_data[0]["general.architecture"].value = "mamba"


REFUSED: dict[str, tuple[CHANGES, str]] = {
    "an adapter": (set_type, "is a GGUF file of the kind adapter, not a model"),
    "another kind": (another_architecture, "of the architecture mamba, and of GGUF files only"),
    "a part": (lambda w: w.add_uint16("split.count", 3), "is one of 3 parts: join them first"),
    "stretched": (
        lambda w: w.add_string("qwen2.rope.scaling.type", "yarn"),
        r"stretches positions \(yarn\)",
    ),
    "Llama 3.1": (
        lambda w: w.add_tensor("rope_freqs.weight", np.ones(8, np.float32)),
        r"holds rope_freqs.weight \(of 1 weights\), which transformers does not read",
    ),
    "a weight missing": (lambda w: w.tensors[0].pop("blk.1.ffn_up.weight"), "lacks model.layers.1"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_would_come_out_wrong_is_refused(
    what: str, tiny_llama: Path, tmp_path: Path, cache: Path
) -> None:
    change, sentence = REFUSED[what]
    write_gguf("qwen2", tiny_llama, tmp_path / "m.gguf", change)
    with pytest.raises(ModelError, match=sentence) as caught:
        load(tmp_path / "m.gguf")
    assert "\n" not in str(caught.value)
    assert not list(cache.glob("gguf-*"))


@pytest.mark.parametrize("content", [b"", b"GGUF", b"not a model at all", None])
def test_a_damaged_file_is_refused(
    content: bytes | None, tiny_llama: Path, tmp_path: Path, cache: Path
) -> None:
    file = tmp_path / "m.gguf"
    if content is None:
        write_gguf("qwen2", tiny_llama, file)
        content = file.read_bytes()[:-9000]
    file.write_bytes(content)
    with pytest.raises(ModelError, match=r"m.gguf (is no whole GGUF file|cannot be converted)"):
        load(file)
    assert not list(cache.glob("gguf-*"))


def test_a_file_that_is_not_there_is_said_to_be_absent(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no such GGUF file"):
        load(tmp_path / "absent.gguf")
