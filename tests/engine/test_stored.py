"""Stored models: fetched from the Hub at one commit, whole or refused by name, and how long."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as T
from loopback_hub import Hub, down, loopback_hub, offline
from safetensors.torch import load_file, save_file

from grath_utils.config import ModelConfig
from grath_utils.engine.models import load_base
from grath_utils.engine.stored import base_weights_fingerprint, find_model, pinned
from grath_utils.errors import FetchError, ModelError
from grath_utils.files import fingerprint

FIRST, SECOND = "a" * 40, "b" * 40


def load(name: str | Path, **settings: Any) -> Any:
    return load_base(ModelConfig(name=str(name), dtype="float32", device="cpu", **settings))


# --- from the Hub --------------------------------------------------------------------------------


@pytest.fixture
def hub(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub with the model ``org/tiny``, and an empty cache."""
    with loopback_hub() as hub:
        hub.add("org/tiny", tiny_llama, FIRST)
        hub.use(monkeypatch, tmp_path / "hf")
        yield hub


def test_the_fingerprint_is_that_of_the_commit_though_nothing_was_loaded(hub: Hub) -> None:
    hub.add("org/tiny", hub.repos["org/tiny"][FIRST], FIRST, ref="v1")
    expected = fingerprint(["org/tiny", FIRST])
    for revision in (None, "main", "v1", FIRST):
        config = ModelConfig(name="org/tiny", revision=revision)
        assert base_weights_fingerprint(config) == expected
        assert pinned(config).revision == FIRST


def test_a_commit_that_is_here_costs_no_request(hub: Hub) -> None:
    first = load("org/tiny")
    assert first.config.revision == FIRST
    assert any("model.safetensors" in request for request in hub.seen)
    hub.seen.clear()
    again = load("org/tiny", revision=FIRST)
    assert again.fingerprint == first.fingerprint
    assert hub.seen == []


def test_only_what_a_model_is_made_of_is_fetched(hub: Hub, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(hub.repos["org/tiny"][FIRST], tmp_path / "more"))
    (folder / "onnx").mkdir()
    for name in ("pytorch_model.bin", "consolidated.safetensors", "onnx/config.json", "model.gguf"):
        (folder / name).write_text("other formats of the same")
    hub.add("org/more", folder)
    assert {p.name for p in find_model(ModelConfig(name="org/more")).folder.iterdir()} == {
        path.name for path in hub.repos["org/tiny"][FIRST].iterdir()
    }


def test_a_branch_that_moves_is_another_model(hub: Hub, tmp_path: Path) -> None:
    before = pinned(ModelConfig(name="org/tiny"))
    hub.add("org/tiny", hub.repos["org/tiny"][FIRST], SECOND)
    after = pinned(ModelConfig(name="org/tiny"))
    assert (before.revision, after.revision) == (FIRST, SECOND)
    assert base_weights_fingerprint(before) != base_weights_fingerprint(after)


@pytest.mark.parametrize("without", ["down", "offline"])
def test_what_was_fetched_once_loads_without_the_hub(hub: Hub, monkeypatch, without: str) -> None:
    fetched = load("org/tiny").fingerprint
    globals()[without](hub, monkeypatch)
    hub.seen.clear()
    assert load("org/tiny").fingerprint == fetched
    assert hub.seen == []


def gated(hub: Hub, patch: pytest.MonkeyPatch) -> None:
    hub.gated.add("org/tiny")


def dying(hub: Hub, patch: pytest.MonkeyPatch) -> None:
    hub.breaks_off = "model.safetensors"
    patch.setattr("huggingface_hub.file_download.time.sleep", lambda _: None)


@pytest.mark.parametrize(
    ("what", "config", "kind", "sentence"),
    [
        (None, {"name": "org/absent"}, ModelError, 'the Hub has no model "org/absent"'),
        (None, {"name": "org/na me"}, ModelError, 'unknown model "org/na me"'),
        (None, {"name": "org/tiny", "revision": "v9"}, ModelError, 'no revision "v9"'),
        (gated, {"name": "org/tiny"}, ModelError, "accepted its conditions: do so on its page"),
        (down, {"name": "org/tiny"}, FetchError, "cannot be fetched .*Connection refused"),
        (offline, {"name": "org/tiny"}, FetchError, r"cannot be fetched \(HF_HUB_OFFLINE is set"),
        (dying, {"name": "org/tiny"}, FetchError, "cannot be fetched .*run the same again, which"),
    ],
)
def test_what_keeps_a_model_on_the_hub_is_one_sentence(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, what, config, kind, sentence: str
) -> None:
    if what:
        what(hub, monkeypatch)
    with pytest.raises(kind, match=sentence) as caught:
        load_base(ModelConfig(**config))
    assert "\n" not in str(caught.value)


def test_a_download_that_broke_off_is_taken_up_again(hub: Hub, monkeypatch) -> None:
    dying(hub, monkeypatch)
    with pytest.raises(FetchError):
        load("org/tiny")
    hub.breaks_off = ""
    assert load("org/tiny").fingerprint


# --- whole or refused ----------------------------------------------------------------------------


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def in_two_shards_but_one(folder: Path) -> None:
    path = folder / "model.safetensors"
    names = list(load_file(path))
    path.rename(folder / "model-00001-of-00002.safetensors")
    where = {name: f"model-0000{1 + (name > 'm')}-of-00002.safetensors" for name in names}
    index = {"metadata": {}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def as_pickle(folder: Path) -> None:
    path = folder / "model.safetensors"
    torch.save(load_file(path), folder / "pytorch_model.bin")
    path.unlink()


def with_own_code(folder: Path) -> None:
    (folder / "own.py").write_text("raise SystemExit('this code was run')")
    edit(folder, model_type="own", auto_map={"AutoConfig": "own.OwnConfig"})


def without_tokenizer(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).unlink(missing_ok=True)


def cut(folder: Path, name: str) -> None:
    path = folder / name
    path.write_bytes(path.read_bytes()[:150])


UP, BIAS = "model.layers.1.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.bias"
DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "weights cut short": (lambda f: cut(f, "model.safetensors"), "cannot load the weights"),
    "empty weights": (lambda f: (f / "model.safetensors").write_bytes(b""), "the weights"),
    "a pointer": (lambda f: (f / "model.safetensors").write_text("version 1"), "the weights"),
    "a shard missing": (in_two_shards_but_one, "No such file .*model-00002-of-00002"),
    "a weight missing": (lambda f: weights(f, lambda w: w.pop(UP)), f"they lack {UP}"),
    "the head missing": (lambda f: weights(f, lambda w: w.pop("lm_head.weight")), "lack lm_head"),
    "a bias too much": (
        lambda f: weights(f, lambda w: w.update({BIAS: torch.ones(64)})),
        f"they hold too much {BIAS}",
    ),
    "a layer too few": (lambda f: edit(f, num_hidden_layers=3), "they lack model.layers.2"),
    "a layer too many": (lambda f: edit(f, num_hidden_layers=1), "too much model.layers.1"),
    "other sizes": (lambda f: edit(f, intermediate_size=96), "wrong size model.layers.0.mlp"),
    "another vocabulary": (lambda f: edit(f, vocab_size=300), "wrong size lm_head.weight"),
    "pickled": (as_pickle, r"no \*.safetensors, only pytorch_model.bin"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), r"holds no \*.safetensors:"),
    "no tokenizer": (without_tokenizer, "cannot load the tokenizer"),
    "a tokenizer cut short": (lambda f: cut(f, "tokenizer.json"), "cannot load the tokenizer"),
    "another tokenizer.json": (
        lambda f: (f / "tokenizer.json").write_text('{"version": "1.0"}'),
        "cannot load the tokenizer",
    ),
    "a config cut short": (lambda f: cut(f, "config.json"), "cannot load the config.json"),
    "a config of no kind": (lambda f: (f / "config.json").write_text("{}"), "model_type"),
    "a config that is a list": (lambda f: (f / "config.json").write_text("[]"), "config.json"),
    "a config of wrong types": (
        lambda f: edit(f, num_hidden_layers="two"),
        "'num_hidden_layers': .*expected int",
    ),
    "an unknown kind": (lambda f: edit(f, model_type="unheard-of"), "unheard-of"),
    "code of its own": (with_own_code, "such code is never run here"),
    "a classifier": (
        lambda f: weights(f, lambda w: w.update({"score.weight": w.pop("lm_head.weight")[:2]})),
        "they lack lm_head.weight",
    ),
    "an adapter": (lambda f: (f / "adapter_config.json").write_text("{}"), "is an adapter, not"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_not_a_whole_model_is_refused(
    tiny_llama: Path, tmp_path: Path, damage: str
) -> None:
    folder = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    make, sentence = DAMAGES[damage]
    make(folder)
    with pytest.raises(ModelError, match=sentence) as caught:
        load(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_head_tied_to_the_embedding_is_stored_once(tiny_llama: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    weights(folder, lambda w: w.pop("lm_head.weight"))
    edit(folder, tie_word_embeddings=True)
    model = load(folder).model
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_what_belongs_to_no_layer_may_be_left_over(tiny_llama: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    weights(folder, lambda w: w.update({"v_head.summary.weight": torch.ones(1, 64)}))
    with torch.no_grad():
        ids = torch.arange(5, 30)[None]
        assert torch.equal(load(folder).model(ids).logits, load(tiny_llama).model(ids).logits)


SMALL = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
WIDE = SMALL | {"intermediate_size": 32}
OTHERS: dict[str, Callable[[], T.PreTrainedModel]] = {
    "T5ForConditionalGeneration": lambda: T.T5ForConditionalGeneration(
        T.T5Config(vocab_size=300, d_model=32, d_ff=32, d_kv=16, num_layers=1, num_heads=2)
    ),
    "BartForConditionalGeneration": lambda: T.BartForConditionalGeneration(
        T.BartConfig(vocab_size=300, d_model=32, encoder_layers=1, decoder_layers=1)
    ),
    "BertLMHeadModel": lambda: T.BertForMaskedLM(T.BertConfig(**WIDE)),
    "RobertaForCausalLM": lambda: T.RobertaForMaskedLM(T.RobertaConfig(**WIDE)),
    "DistilBertForMaskedLM": lambda: T.DistilBertForMaskedLM(
        T.DistilBertConfig(vocab_size=300, dim=32, n_layers=1, n_heads=2, hidden_dim=32)
    ),
    "XLNetLMHeadModel": lambda: T.XLNetLMHeadModel(
        T.XLNetConfig(vocab_size=300, d_model=32, n_layer=1, n_head=2, d_inner=32)
    ),
    "CLIPModel": lambda: T.CLIPModel(T.CLIPConfig(text_config=WIDE, vision_config=WIDE)),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_what_is_no_causal_language_model_is_refused(
    tiny_llama: Path, tmp_path: Path, kind: str
) -> None:
    folder = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    (folder / "model.safetensors").unlink()
    (folder / "generation_config.json").unlink()
    torch.manual_seed(0)
    OTHERS[kind]().save_pretrained(folder)
    with pytest.raises(ModelError, match=rf"\({kind}\) is not a causal language model"):
        load(folder)


def test_a_bert_that_was_made_to_write_is_let_in(tiny_llama: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    T.BertLMHeadModel(T.BertConfig(**WIDE, is_decoder=True)).save_pretrained(folder)
    assert load(folder).max_length == 512


# --- how long ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "tokenizer", "expected"),
    [
        (T.LlamaConfig(max_position_embeddings=4096), 2048, 4096),  # the weights know best
        (T.GPT2Config(n_positions=1024), 10**30, 1024),
        (T.MptConfig(max_seq_len=65536), 10**30, 65536),
        (T.Gemma3Config(text_config={"max_position_embeddings": 131072}), 10**30, 131072),
        (T.XLNetConfig(), 10**30, sys.maxsize),  # it says -1
        (T.BloomConfig(), 10**30, sys.maxsize),  # ALiBi
        (T.MambaConfig(), 10**30, sys.maxsize),
        (T.MambaConfig(), 2048, 2048),
    ],
)
def test_the_longest_text_is_what_the_model_takes(
    tiny_policy: Any, config: T.PreTrainedConfig, tokenizer: int, expected: int
) -> None:
    tiny_policy.model.config, tiny_policy.tokenizer.model_max_length = config, tokenizer
    assert tiny_policy.max_length == expected
