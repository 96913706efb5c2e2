"""One DPO round against TRL's DPOTrainer with its defaults, on the same pairs in the same order.

Each side runs in a process of its own, from the same weights, pairs, batches, adapter and seed; the
time is that of the whole round, reference included, without loading. ``trl`` leaves to TRL what its
defaults decide (reference in each step, gradient checkpointing, padded batches); ``trl-tuned`` has
the reference computed before, no checkpointing, and our allocator settings, and so shows what
packing alone brings. Saves nothing.

    python tests/benchmarks/bench_dpo.py
    python tests/benchmarks/bench_dpo.py --dtype float32 --steps 5
    python tests/benchmarks/bench_dpo.py --shape llama2-7b --quantization nf4 --lengths 60 20 20
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import psutil  # noqa: E402
import torch  # noqa: E402

SIDES = ("ours", "trl", "trl-tuned")
SHAPES = {  # hidden, intermediate, layers, heads, key-value heads, vocabulary
    "llama2-7b": (4096, 11008, 32, 32, 32, 32000),
    "llama3-8b": (4096, 14336, 32, 32, 8, 128256),
}


def main() -> None:
    options = parse()
    if options.child:
        print("RESULT " + json.dumps(child(options)), flush=True)
        return
    with tempfile.TemporaryDirectory() as scratch:
        if options.shape:
            options.model = str(make_shape(options.shape, Path(scratch) / options.shape))
        rows = {side: run_child(options, side) for side in options.sides}
    print(table(rows, options), flush=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="default")
    parser.add_argument("--shape", choices=SHAPES, help="a model of this shape, random weights")
    parser.add_argument("--lengths", nargs=3, type=int, help="random ids: prompt, chosen, rejected")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--quantization", default="none")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--micro", type=int, default=8)
    parser.add_argument("--checkpointing", action="store_true", help="ours: gradient checkpointing")
    parser.add_argument("--optimizer", default="adamw_torch")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--child", choices=SIDES, help=argparse.SUPPRESS)
    return parser.parse_args()


def run_child(options: argparse.Namespace, side: str) -> dict[str, Any]:
    command = [sys.executable, __file__, "--child", side]
    for key in ("model", "device", "dtype", "quantization", "steps", "batch", "micro", "optimizer"):
        command += [f"--{key}", str(getattr(options, key))]
    command += ["--lengths", *map(str, options.lengths)] if options.lengths else []
    command += ["--checkpointing"] if options.checkpointing else []
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not found:
        return {"failed": (done.stderr.strip().splitlines() or ["no message"])[-1]}
    return json.loads(found[0].removeprefix("RESULT "))


# --- one side ------------------------------------------------------------------------------------


def child(options: argparse.Namespace) -> dict[str, Any]:
    from grath_utils.config import LoraConfig, ModelConfig
    from grath_utils.dpo.adapters import add_adapter
    from grath_utils.dpo.round import reference_log_probs
    from grath_utils.engine.machine import TRAINING_BLOCK, keep_freed_memory
    from grath_utils.engine.models import load_base

    side = options.child
    if side == "trl":  # our loader asks glibc to keep freed blocks; TRL's user has nothing of that
        os.environ["MALLOC_TRIM_THRESHOLD_"] = str(128 << 10)
    policy = load_base(
        ModelConfig(
            name=options.model,
            quantization=options.quantization,
            dtype=options.dtype,
            device=options.device,
        )
    )
    examples = random_pairs(policy, options) if options.lengths else probe_pairs(policy, options)
    peak_flops = matmul_rate(policy) if policy.device.type == "cuda" else None
    policy = add_adapter(policy, LoraConfig(), seed=0)
    settings = arguments(policy, options, side)
    with tempfile.TemporaryDirectory() as scratch, peak_memory(policy) as peak:
        start = time.perf_counter()
        chosen = rejected = None
        if side != "trl":
            chosen, rejected = reference_log_probs(policy, examples, progress=False)
            keep_freed_memory(policy.config.device, TRAINING_BLOCK)
        ready = time.perf_counter() - start
        with step_times() as times:
            log = train(policy, examples, chosen, rejected, Path(scratch), settings, options)
        if policy.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    padded, distinct, real = token_counts(examples, options.micro)
    return {
        "seconds": seconds,
        "reference_seconds": ready,
        "step_seconds": statistics.median(times[1:] or times),  # the first warms up
        "peak_gib": peak["bytes"] / 2**30,
        "losses": [row["loss"] for row in log if row["split"] == "train"],
        "pairs_seen": options.steps * options.batch,
        "tokens_per_pair": {"padded": padded, "real": real, "distinct": distinct},
        "parameters": sum(p.numel() for p in load_shape(policy)),
        "peak_flops": peak_flops,
        "device": torch.cuda.get_device_name() if policy.device.type == "cuda" else "cpu",
        "dtype": policy.config.dtype,
    }


def probe_pairs(policy: Any, options: argparse.Namespace) -> list[Any]:
    """Return preference examples of everyday lengths, made from the probe's annotated answers."""
    from grath_utils.dpo.data import tokenize_pairs
    from grath_utils.pairs.generate import Pair

    rows = [json.loads(line) for line in (ROOT / "data" / "probe.jsonl").open(encoding="utf-8")]
    pairs = []
    for row in rows:
        choices, labels = row["mc1_targets"]["choices"], row["mc1_targets"]["labels"]
        sides = choices[labels.index(1)], choices[labels.index(0)]
        pairs.append(Pair(row["id"], row["question"], *sides, 0))
    wanted = options.steps * options.batch
    pairs = (pairs * (wanted // len(pairs) + 1))[:wanted]
    limits = {"max_prompt_length": 512, "max_length": 1024}
    return list(tokenize_pairs(policy.tokenizer, pairs, **limits).examples)


def random_pairs(policy: Any, options: argparse.Namespace) -> list[Any]:
    """Return examples of random token ids with given lengths."""
    from grath_utils.dpo.data import PreferenceExample

    size = policy.model.config.vocab_size
    draw = torch.Generator().manual_seed(0)
    ids = [
        [tuple(torch.randint(3, size, (n,), generator=draw).tolist()) for n in options.lengths]
        for _ in range(options.steps * options.batch)
    ]
    return [PreferenceExample(str(i), *three) for i, three in enumerate(ids)]


def arguments(policy: Any, options: argparse.Namespace, side: str) -> dict[str, Any]:
    """Return the settings in which the sides differ."""
    if side == "ours":
        return {"gradient_checkpointing": options.checkpointing}
    if side == "trl-tuned":
        return {"gradient_checkpointing": False}
    return {}  # TRL's own defaults


def train(
    policy: Any,
    examples: list[Any],
    chosen: list[float] | None,
    rejected: list[float] | None,
    folder: Path,
    settings: dict[str, Any],
    options: argparse.Namespace,
) -> list[dict[str, Any]]:
    from grath_utils.config import DPOConfig
    from grath_utils.dpo.trainer import run_trainer

    rows = [
        {"prompt_ids": list(e.prompt_ids), "chosen_ids": list(e.chosen_ids)}
        | {"rejected_ids": list(e.rejected_ids)}
        for e in examples
    ]
    if chosen and rejected:
        for row, a, b in zip(rows, chosen, rejected, strict=True):
            row |= {"ref_chosen_logps": a, "ref_rejected_logps": b}
    if options.child == "ours":
        config = DPOConfig(
            learning_rate=2e-4,
            warmup_steps=2,
            batch_size=options.batch,
            micro_batch_size=options.micro,
            steps=options.steps,
            optimizer=options.optimizer,
            log_every=1,
            save_every=10**6,
            **settings,
        )
        return run_trainer(policy, rows, [], folder=folder, config=config, seed=0, progress=False)
    return train_with_trl(policy, rows, folder, settings, options)


def train_with_trl(
    policy: Any,
    rows: list[dict[str, Any]],
    folder: Path,
    settings: dict[str, Any],
    options: argparse.Namespace,
) -> list[dict[str, Any]]:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    class FromIds(DPOTrainer):  # the same token ids on both sides
        def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
            return dataset

    exact = policy.config.dtype == "float32"
    trainer = FromIds(
        model=policy.model,
        args=DPOConfig(
            output_dir=str(folder),
            beta=0.1,
            learning_rate=2e-4,
            lr_scheduler_type="cosine",
            warmup_steps=2,
            max_grad_norm=0.3,
            max_steps=options.steps,
            per_device_train_batch_size=options.micro,
            gradient_accumulation_steps=options.batch // options.micro,
            optim=options.optimizer,
            max_length=None,
            bf16=False if exact else None,
            use_cpu=policy.device.type == "cpu",
            seed=0,
            data_seed=0,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **settings,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=policy.tokenizer,
    )
    if "ref_chosen_logps" in rows[0]:
        trainer.precompute_ref_logps = True
    trainer.train()
    return [{"loss": r["loss"], "split": "train"} for r in trainer.state.log_history if "loss" in r]


def token_counts(examples: list[Any], micro: int) -> tuple[float, float, float]:
    """Return tokens for each pair: padded to the batch's longest, distinct, and all real ones."""
    from grath_utils.engine.packing import pack

    padded = distinct = real = 0
    for at in range(0, len(examples), micro):
        batch = examples[at : at + micro]
        padded += 2 * len(batch) * max(e.length for e in batch)
        real += sum(2 * len(e.prompt_ids) + len(e.chosen_ids) + len(e.rejected_ids) for e in batch)
        rows = [vars(e) for e in batch]
        distinct += sum(row["ids"].shape[1] for row in pack(rows, 10**9))
    n = len(examples)
    return padded / n, distinct / n, real / n


@contextlib.contextmanager
def step_times() -> Iterator[list[float]]:
    """Collect the seconds of each optimiser step of whatever Trainer runs inside the block."""
    from transformers.trainer_callback import CallbackHandler

    times: list[float] = []
    began = [0.0]
    begin, end = CallbackHandler.on_step_begin, CallbackHandler.on_step_end

    def on_begin(self: Any, *args: Any, **kwargs: Any) -> Any:
        wait()
        began[0] = time.perf_counter()
        return begin(self, *args, **kwargs)

    def on_end(self: Any, *args: Any, **kwargs: Any) -> Any:
        wait()
        times.append(time.perf_counter() - began[0])
        return end(self, *args, **kwargs)

    with (
        mock.patch.object(CallbackHandler, "on_step_begin", on_begin),
        mock.patch.object(CallbackHandler, "on_step_end", on_end),
    ):
        yield times


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


# --- the machine ---------------------------------------------------------------------------------


class peak_memory:
    """The highest resident (CPU) or allocated (GPU) memory inside the block, in bytes."""

    def __init__(self, policy: Any) -> None:
        self.gpu = policy.device.type == "cuda"
        self.found = {"bytes": 0}

    def __enter__(self) -> dict[str, int]:
        if self.gpu:
            torch.cuda.reset_peak_memory_stats()
            return self.found
        self.over = threading.Event()
        self.watcher = threading.Thread(target=self._watch, daemon=True)
        self.watcher.start()
        return self.found

    def _watch(self) -> None:
        process = psutil.Process()
        while not self.over.wait(0.05):
            self.found["bytes"] = max(self.found["bytes"], process.memory_info().rss)

    def __exit__(self, *_: object) -> None:
        if self.gpu:
            self.found["bytes"] = torch.cuda.max_memory_allocated()
        else:
            self.over.set()
            self.watcher.join()


def matmul_rate(policy: Any, size: int = 8192) -> float:
    """Return the measured rate of a large matrix product in the model's dtype, in FLOP/s."""
    dtype = getattr(torch, policy.config.dtype)
    a, b = (torch.randn(size, size, device=policy.device, dtype=dtype) for _ in range(2))
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times = []
    for i in range(13):
        begin.record()
        a @ b
        end.record()
        torch.cuda.synchronize()
        if i >= 3:
            times.append(begin.elapsed_time(end) / 1000)
    return 2 * size**3 / sorted(times)[len(times) // 2]


def load_shape(policy: Any) -> list[torch.Tensor]:
    """Return the base model's parameters as an empty model has them (4-bit ones are packed)."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(policy.model.config)
    return list(model.parameters())


def make_shape(shape: str, folder: Path) -> Path:
    """Write a Llama with random weights, and a byte-level tokenizer that is never used."""
    from helpers import make_tiny_llama
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, intermediate, layers, heads, kv_heads, vocabulary = SHAPES[shape]
    make_tiny_llama(folder)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=4096,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )
    where = "cuda" if torch.cuda.is_available() else "cpu"
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(where):
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(before)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="4GB")
    return folder


def table(rows: dict[str, dict[str, Any]], options: argparse.Namespace) -> str:
    good = {side: row for side, row in rows.items() if "failed" not in row}
    lines = [f"{side} failed: {row['failed']}" for side, row in rows.items() if "failed" in row]
    if not good:
        return "\n".join(lines)
    first = next(iter(good.values()))
    counts = first["tokens_per_pair"]
    lines += [
        f"{options.shape or options.model}, {options.quantization}, {first['dtype']}, "
        f"{first['device']}, {options.steps} steps of {options.batch} pairs, "
        f"{options.micro} at a time",
        f"tokens for each pair: padded {counts['padded']:.0f}, real {counts['real']:.0f}, "
        f"distinct {counts['distinct']:.0f}",
        "| side | round s | of it reference s | median step s | round: times faster than trl | "
        "step: times faster | real tokens/s in a step | peak GiB | share of peak |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    slowest = good.get("trl", first)
    for side, row in good.items():
        step = row["step_seconds"]
        # Forward and backward to the inputs, 2 operations a weight and token each; the useful
        # work alone, so recomputation counts as overhead.
        used = 4 * row["parameters"] * options.batch * counts["distinct"] / step
        share = f"{100 * used / row['peak_flops']:.1f} %" if row["peak_flops"] else "-"
        lines.append(
            f"| {side} | {row['seconds']:.1f} | {row['reference_seconds']:.1f} | {step:.2f} | "
            f"{slowest['seconds'] / row['seconds']:.2f} | {slowest['step_seconds'] / step:.2f} | "
            f"{options.batch * counts['real'] / step:.0f} | {row['peak_gib']:.2f} | {share} |"
        )
    for side, row in good.items():
        far = max(abs(a - b) for a, b in zip(row["losses"], first["losses"], strict=True))
        curve = " ".join(f"{x:.4f}" for x in row["losses"])
        lines.append(f"{side}: losses {curve} (largest difference to the first side {far:.1e})")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
