"""What tests share and is no fixture: tiny models, a few pairs, a short round, small runs."""

from __future__ import annotations

import csv
import re
import shutil
import subprocess
import sys
from pathlib import Path

import torch
import yaml

from grath_utils.config import Config, DPOConfig, LoraConfig, load_config
from grath_utils.files import write_jsonl, write_text
from grath_utils.loop.run_dir import Run
from grath_utils.loop.stages import run_questions
from grath_utils.pairs.generate import Pair

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# What run.json records beside the configuration.
FACTS = {
    "model": {"name": "default", "weights": "0123456789abcdef"},
    "questions": {"source": "own data", "n": 12, "fingerprint": "0123456789abcdef"},
    "resolved": {"device": "cpu", "dtype": "bfloat16"},
    "device": {"cpu_count": 2, "memory_gib": 23.5, "accelerator": "none"},
    "versions": {"python": "3.12.1", "torch": "2.13.0", "transformers": "5.23.0"},
}

ROOT = Path(__file__).resolve().parents[1]

# A few pairs and a short round, for what is about training.
PAIRS = [
    Pair(f"q{i}", f"What is the {thing}?", f"It is the {right}.", f"The {wrong} in the air.", 0)
    for i, (thing, right, wrong) in enumerate(
        [
            ("sun", "star", "stone"),
            ("moon", "satellite", "lantern"),
            ("rain", "water", "sand"),
            ("wind", "moving air", "moving light"),
            ("ice", "solid water", "solid wood"),
            ("coal", "old plants", "old iron"),
        ]
    )
]
DPO = DPOConfig(
    learning_rate=5e-3,
    warmup_steps=0,
    batch_size=4,
    micro_batch_size=2,
    steps=4,
    max_prompt_length=200,
    max_length=300,
    log_every=1,
    evaluate_every=2,
    save_every=2,
)
LORA = LoraConfig(r=4, alpha=8)
# The settings of a run that is as short as can be.
SMALL = {"dpo.steps": 1, "evaluation.bootstrap": 100, "loop.early_stop": False}

LIMIT = 1800  # seconds; a smoke run takes two or three minutes, its experiments as long again


def start(*arguments: object, **options) -> subprocess.Popen[str]:
    """Start the command line in a process of its own."""
    command = [sys.executable, "-m", "grath_utils", *map(str, arguments)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Wait for a process; return its exit status, output and messages."""
    out, err = process.communicate(timeout=LIMIT)
    return process.returncode, out, err


def make_tiny_llama(folder: Path, *, seed: int = 0) -> Path:
    """Write a random two-layer Llama with a byte-level tokenizer (as in GPT-2) to ``folder``."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(specials + alphabet)}
    # A few merges, so that a token can span the boundary of a prompt as it does in real models.
    merges = []
    for left, right in [("t", "h"), ("th", "e"), ("i", "n"), ("Ġ", "a"), ("Ġ", "the"), ("e", "r")]:
        vocab[left + right] = len(vocab)
        merges.append((left, right))
    raw = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(vocab),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_questions(path: Path, n: int = 8) -> Path:
    """Write ``n`` questions to a file; return its path."""
    write_jsonl(path, ({"id": f"q{i}", "question": f"What is thing number {i}?"} for i in range(n)))
    return path


def config_for(model: Path, questions: Path, **more: object) -> Config:
    """Return the smoke profile with a tiny model and eight questions."""
    settings = {
        "model.name": str(model),
        "model.dtype": "float32",
        "model.device": "cpu",
        "questions.source": str(questions),
        "questions.limit": None,
        "evaluation.limit": 4,
        **more,
    }
    return load_config("smoke", settings)


def write_pairs(run: Run, t: int) -> None:
    """Write made-up pairs to all questions of a run, as an iteration would have left them."""
    rows = [
        {"id": q.id, "question": q.text, "correct": f"It is {q.id}.", "incorrect": "It is lost.",
         "iteration": t}
        for q in run_questions(run)
    ]  # fmt: skip
    write_jsonl(run.pairs(t), rows)


def follow_contributing(title: str, room: str, last: str, folder: Path) -> None:
    """Copy the package to ``folder``, with the file and the line that a section adds.

    Args:
        title: of the section of CONTRIBUTING.md.
        room: where both files are, such as ``pairs``.
        last: the registry's last line, which the new one follows.
        folder: where the copy goes.
    """
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    section = page.partition(f"## {title}")[2].partition("\n## ")[0]
    code, line = re.findall(r"```(?:python|text)\n(.*?)```", section, re.DOTALL)
    new, registry = re.findall(rf"`(grath_utils/{room}/\w+\.py)`", section)
    for name in ("grath_utils", "data"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / new).write_text(code, encoding="utf-8")
    rows = (folder / registry).read_text(encoding="utf-8")
    assert last in rows
    (folder / registry).write_text(rows.replace(last, last + line), encoding="utf-8")


def write_grid(path: Path, common: dict[str, object], grid: dict[str, object]) -> Path:
    """Write a grid of sweeps on the profile ``smoke``."""
    tree = {"profile": "smoke", "set": common, "grid": grid}
    write_text(path, yaml.safe_dump(tree, sort_keys=False))
    return path


def rows_in(sweep: Path) -> list[str]:
    """Return the points of a sweep that have their numbers."""
    return sorted(path.stem for path in (sweep / "rows").glob("*.json"))


def table_of(sweep: Path) -> list[dict[str, str]]:
    """Return what a sweep ended in."""
    with open(sweep / "table.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))
