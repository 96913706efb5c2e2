"""What leaves a run opens elsewhere: pushed to a Hub, and loaded from it by plain libraries."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import load_dataset
from helpers import config_for, write_pairs, write_questions
from huggingface_hub import ModelCard
from loopback_hub import Hub, down, loopback_hub, offline
from transformers import AutoModelForCausalLM, AutoTokenizer

from grath_utils.cli import main
from grath_utils.loop.named_models import load_policy
from grath_utils.loop.run_dir import Run
from grath_utils.loop.stages import start_run, train_iteration

BASE = "a" * 40


@pytest.fixture
def hub(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub with the model ``org/tiny``, on which we are logged in."""
    with loopback_hub() as hub:
        hub.add("org/tiny", tiny_llama, BASE)
        hub.use(monkeypatch, tmp_path / "hf")
        monkeypatch.setenv("HF_TOKEN", hub.token)
        monkeypatch.chdir(tmp_path)
        yield hub


def trained(model: str, folder: Path, **more: Any) -> Run:
    write_questions(folder / "q.jsonl")
    settings = {"loop.iterations": 1, "dpo.steps": 2, "dpo.learning_rate": 5e-2, **more}
    run = start_run(folder / "run", config_for(Path(model), folder / "q.jsonl", **settings))
    write_pairs(run, 0)
    train_iteration(run, 0, progress=False)
    return run


# What someone else does who has never heard of grath_utils.
PLAIN = """
import sys, torch
from peft import AutoPeftModelForCausalLM
model = AutoPeftModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
with torch.no_grad():
    torch.save(model(torch.arange(5, 40)[None]).logits, sys.argv[2])
assert "grath_utils" not in sys.modules
"""


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(5, 40)[None]).logits


def test_a_pushed_adapter_is_loaded_by_plain_peft(hub: Hub, tmp_path: Path, capsys) -> None:
    run = trained("org/tiny", tmp_path)
    assert main(["push", f"{run.path}@0", "--to", "me/truthful"]) == 0
    said = capsys.readouterr().out
    assert f"round 1 -> model repository {hub.url}/me/truthful" in said
    assert all(name in said for name in ("README.md", "adapter_model.safetensors", "grath.json"))
    hub.add("org/tiny", tmp_path / "nothing", "b" * 40)  # the adapter names the commit of its base
    shutil.rmtree(hub.home / "hub")  # as on another machine
    subprocess.run([sys.executable, "-c", PLAIN, "me/truthful", "logits.pt"], check=True)
    found = torch.load("logits.pt")
    assert torch.allclose(found, logits(load_policy(f"{run.path}@0").model), atol=1e-5)
    assert not torch.allclose(found, logits(load_policy(f"{run.path}@base").model))
    card = ModelCard.load(hub.home / "uploads" / "me" / "truthful" / "README.md")
    assert (card.data.base_model, card.data.library_name) == ("org/tiny", "peft")
    assert card.data.license == "mit", "that of the base model"
    assert 'AutoPeftModelForCausalLM.from_pretrained("me/truthful")' in card.text


def test_a_pushed_merged_model_is_loaded_by_plain_transformers(hub: Hub, tmp_path: Path) -> None:
    run = trained("org/tiny", tmp_path)
    assert main(["push", str(run.path), "--to", "me/merged", "--merged"]) == 0
    model = AutoModelForCausalLM.from_pretrained("me/merged", dtype=torch.float32)
    assert torch.allclose(logits(model), logits(load_policy(f"{run.path}@0").model), atol=1e-4)
    assert AutoTokenizer.from_pretrained("me/merged").chat_template
    assert (
        ModelCard.load(hub.home / "uploads" / "me" / "merged" / "README.md").data.library_name
        == "transformers"
    )
    held = b"".join(p.read_bytes() for p in (hub.home / "uploads").rglob("*.json"))
    assert str(tmp_path).encode() not in held


def test_pushed_pairs_are_a_data_set(hub: Hub, tmp_path: Path) -> None:
    run = trained("org/tiny", tmp_path)
    assert main(["push", str(run.path), "--to", "me/pairs", "--pairs"]) == 0
    folder = hub.home / "uploads" / "datasets" / "me" / "pairs"
    rows = load_dataset(str(folder), split="train", cache_dir=str(tmp_path / "cache"))
    plain = load_dataset(str(folder), "plain", split="train", cache_dir=str(tmp_path / "cache"))
    assert rows[0]["prompt"] == [{"role": "user", "content": plain[0]["prompt"]}]
    assert rows[0]["chosen"] == [{"role": "assistant", "content": plain[0]["chosen"]}]
    held = load_dataset(str(folder), split="held_out", cache_dir=str(tmp_path / "cache"))
    assert {*rows["id"]} | {*held["id"]} == {f"q{i}" for i in range(8)}


def test_a_dry_run_lists_and_asks_nobody(hub: Hub, tmp_path: Path, monkeypatch, capsys) -> None:
    run = trained("org/tiny", tmp_path)
    monkeypatch.delenv("HF_TOKEN")
    hub.seen.clear()
    for what in ("", "--merged", "--pairs"):
        arguments = ["push", str(run.path), "--to", "me/x", "--dry-run", what]
        assert main([each for each in arguments if each]) == 0
    said = capsys.readouterr().out
    assert "adapter_model.safetensors" in said
    assert " model.safetensors" in said
    assert "plain/held_out.jsonl" in said
    assert said.count("Nothing was uploaded") == 3
    assert not [request for request in hub.seen if request.startswith("POST")]


def no_token(hub: Hub, patch: pytest.MonkeyPatch) -> None:
    patch.delenv("HF_TOKEN")


def another_token(hub: Hub, patch: pytest.MonkeyPatch) -> None:
    hub.token = "hf_another"


def not_allowed(hub: Hub, patch: pytest.MonkeyPatch) -> None:
    hub.read_only.add("me")


@pytest.mark.parametrize(
    ("what", "to", "code", "sentence"),
    [
        (no_token, "me/x", 2, "not logged in to the Hub: run `hf auth login`"),
        (another_token, "me/x", 2, "does not know your token"),
        (not_allowed, "me/x", 2, "your token may not write to me/x"),
        (down, "me/x", 1, "the Hub is not reached ([Errno 111] Connection refused)"),
        (offline, "me/x", 1, "the Hub is not reached (HF_HUB_OFFLINE is set)"),
        (None, "me/x y", 2, '"me/x y" is no name for a repository'),
    ],
)
def test_what_keeps_a_push_away_is_one_sentence(
    hub: Hub, tmp_path: Path, monkeypatch, capsys, what, to: str, code: int, sentence: str
) -> None:
    run = trained("org/tiny", tmp_path)
    if what:
        what(hub, monkeypatch)
    assert main(["push", str(run.path), "--to", to]) == code
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert sentence in error


def test_an_adapter_that_nobody_else_could_load_is_not_pushed(
    hub: Hub, tiny_llama: Path, tmp_path: Path, capsys
) -> None:
    run = trained(str(tiny_llama), tmp_path)
    assert main(["push", str(run.path), "--to", "me/x"]) == 2
    assert "a base model on this machine alone" in capsys.readouterr().err
    record = run.adapter(0) / "grath.json"
    assert str(tiny_llama) in record.read_text()
    shutil.rmtree(hub.home / "uploads")
    hub.repos.pop("me/x")
    assert main(["push", str(run.path), "--to", "me/x", "--merged"]) == 0
    card = (hub.home / "uploads" / "me" / "x" / "README.md").read_text(encoding="utf-8")
    assert "base_model:" not in card
    assert str(tmp_path) not in card
    assert str(tiny_llama.parent) not in card


@pytest.mark.model
def test_an_adapter_on_a_course_model_names_the_publisher_s(hub: Hub, tmp_path: Path) -> None:
    run = trained("tiny", tmp_path, **{"dpo.steps": 1})
    settings = json.loads((run.adapter(0) / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert settings["revision"] == "12fd25f77366fa6b3b4b768ec3050bf629380bac"
    assert main(["push", str(run.path), "--to", "me/tiny"]) == 0
    folder = hub.home / "uploads" / "me" / "tiny"
    card = ModelCard.load(folder / "README.md").data
    assert card.base_model == settings["base_model_name_or_path"]
    assert (card.license, card.language) == ("apache-2.0", "en")
    assert load_policy(str(folder)).fingerprint == load_policy(f"{run.path}@0").fingerprint
    # As an older version left it, from which no other tool found the base.
    settings |= {"base_model_name_or_path": "default", "revision": None}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    assert load_policy(str(folder)).config.name == "tiny"
    (folder / "grath.json").unlink()
    assert load_policy(str(folder)).config.name == "tiny"
    (run.adapter(0) / "adapter_config.json").write_text(json.dumps(settings))
    (run.manifest).unlink()  # it would be noticed
    assert main(["push", str(run.path), "--to", "me/tiny"]) == 0
    pushed = json.loads((folder / "adapter_config.json").read_text())
    assert pushed["base_model_name_or_path"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
