"""What the benchmark compares: our engine and others on the same token ids, an arm a function.

An arm runs in a process of its own (see :mod:`bench`). It returns its seconds without loading, the
tokens that went through the model, and its results, to be held against ours.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import tempfile
import time
from argparse import Namespace
from itertools import islice
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "evaluation")]

import lm_eval_tasks as harness  # noqa: E402
import torch  # noqa: E402
from helpers import make_tiny_llama  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

from grath_utils.config import DPOConfig, LoraConfig, PairsConfig, QuestionsConfig  # noqa: E402
from grath_utils.dpo.adapters import add_adapter  # noqa: E402
from grath_utils.dpo.data import PreferenceExample, tokenize_pairs  # noqa: E402
from grath_utils.dpo.round import reference_log_probs  # noqa: E402
from grath_utils.dpo.trainer import run_trainer  # noqa: E402
from grath_utils.engine.chat import end_ids  # noqa: E402
from grath_utils.engine.encoding import encode_requests  # noqa: E402
from grath_utils.engine.generation import generate  # noqa: E402
from grath_utils.engine.machine import TRAINING_BLOCK, keep_freed_memory  # noqa: E402
from grath_utils.engine.models import Policy  # noqa: E402
from grath_utils.engine.packing import pack  # noqa: E402
from grath_utils.engine.stored import find_model  # noqa: E402
from grath_utils.evaluation.benchmarks import load_benchmark  # noqa: E402
from grath_utils.evaluation.benchmarks.truthfulqa import MULTIPLE_CHOICE  # noqa: E402
from grath_utils.evaluation.measure import evaluate  # noqa: E402
from grath_utils.evaluation.protocols import build_requests, find_protocol  # noqa: E402
from grath_utils.files import data_dir, mirror_dir, read_jsonl, write_json, write_jsonl  # noqa: E402
from grath_utils.loop.named_models import load_policy  # noqa: E402
from grath_utils.pairs.generate import Pair  # noqa: E402
from grath_utils.pairs.modes import MODES  # noqa: E402
from grath_utils.pairs.questions import load_questions  # noqa: E402
from grath_utils.pairs.writers import Task  # noqa: E402

SHAPES = {  # hidden, intermediate, layers, heads, key-value heads, vocabulary
    "llama2-7b": (4096, 11008, 32, 32, 32, 32000),
    "llama3-8b": (4096, 14336, 32, 32, 8, 128256),
}
BENCHMARK, TASKS = "truthfulqa_mc", ["truthfulqa_mc1", "truthfulqa_mc2"]
PAPER = PairsConfig(mode="paper")


def load(options: Namespace) -> Policy:
    settings = {"dtype": options.dtype, "device": options.device}
    name = str(options.job / "shape") if options.shape else options.model
    return load_policy(name, quantization=options.quantization, **settings)


def weights(policy: Policy) -> tuple[int, int]:
    """Return the numbers of weights in the layers and in the head."""
    head = policy.model.get_output_embeddings().weight.numel()
    table = policy.model.get_input_embeddings().weight.numel()
    tied = policy.model.config.tie_word_embeddings
    return sum(p.numel() for p in policy.model.parameters()) - table - (0 if tied else head), head


def questions(options: Namespace) -> list[Any]:
    return load_questions(QuestionsConfig(limit=options.questions), 0).questions


def make_shape(folder: Path, shape: str) -> None:
    """Write a Llama with random weights, and a byte-level tokenizer that is hardly used."""
    hidden, intermediate, layers, heads, kv_heads, vocabulary = SHAPES[shape]
    make_tiny_llama(folder)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        max_position_embeddings=4096,
        eos_token_id=2,
        pad_token_id=2,
    )
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = LlamaForCausalLM(config)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder)


def prepare(options: Namespace) -> dict[str, Any]:
    """Write the inputs of all arms, the same token ids for each, into ``options.job``."""
    if options.shape:
        make_shape(options.job / "shape", options.shape)
        return {"source": "not scored", "items": 0}
    policy, job = load(options), options.job
    rows = read_jsonl(data_dir() / "probe.jsonl")
    if mirror := mirror_dir():
        rows = harness.sample_rows(mirror, MULTIPLE_CHOICE.path, options.items)
    write_jsonl(job / "mirror" / MULTIPLE_CHOICE.path, rows[: options.items])
    os.environ["GRATH_MIRROR"] = str(job / "mirror")
    benchmark = load_benchmark(BENCHMARK)
    protocol = find_protocol(BENCHMARK, None)
    items = build_requests(benchmark, protocol, policy.tokenizer)
    flat = [request for item in items for request in item]
    encoded = iter(encode_requests(policy.tokenizer, flat, policy.max_length))
    asked = [[(e.prompt.tolist(), e.completion) for e in islice(encoded, len(i))] for i in items]
    write_json(job / "scoring.json", {"requests": asked})
    writer = MODES["paper"].writer(policy, PAPER, 0)
    prompts = [writer.token_ids(question, "pair") for question in questions(options)]
    ends = sorted(end_ids(policy.tokenizer, policy.model.generation_config.eos_token_id))
    wanted = {"prompts": prompts, "ends": ends, "max_new_tokens": PAPER.max_new_tokens}
    write_json(job / "pairs.json", wanted)
    source = "mirror" if mirror else "probe"
    return {"source": source, "items": len(items), "folder": str(find_model(policy.config).folder)}


def floor(options: Namespace) -> dict[str, Any]:
    """Measure the rate of large matrix products, in operations a second."""
    size = 8192 if options.device == "cuda" else 2048
    dtype = getattr(torch, options.dtype)
    a, b = (torch.randn(size, size, device=options.device).to(dtype) for _ in range(2))
    times = []
    for _ in range(12):
        start = time.perf_counter()
        float((a @ b)[0, 0])  # waits for it
        times.append(time.perf_counter() - start)
    return {"rate": 2 * size**3 / min(times), "seconds": min(times)}


# --- scoring -------------------------------------------------------------------------------------


def scoring_ours(options: Namespace) -> dict[str, Any]:
    policy = load(options)
    evaluate(policy, BENCHMARK, limit=2, progress=False)  # the trial of the model is not timed
    start = time.perf_counter()
    found = evaluate(policy, BENCHMARK, progress=False)
    seconds = time.perf_counter() - start
    body, head = weights(policy)
    tokens, predicted = (
        found["cost"]["computed_tokens"],
        sum(sum(i["tokens"]) for i in found["items"]),
    )
    return {
        "seconds": seconds,
        "tokens": tokens,
        "operations": 2 * (found["cost"]["distinct_tokens"] * body + predicted * head),
        "values": [item["scores"] for item in found["items"]],
    }


def scoring_lm_eval(options: Namespace, batch: int | str) -> dict[str, Any]:
    policy, folder = load(options), options.job / "mirror"
    tasks = [harness.task(folder, name) for name in TASKS]
    logging.disable(logging.WARNING)
    start = time.perf_counter()
    found = harness.run(policy, tasks, 0, batch)
    seconds = time.perf_counter() - start
    fed = {}  # requests that differ in the last token alone are computed once
    for name, samples in found["samples"].items():
        texts = [a + b for sample in samples for a, b in sample["arguments"]]
        for ids in policy.tokenizer(texts)["input_ids"]:
            fed[name, tuple(ids[:-1])] = len(ids) - 1
    samples = sorted(found["samples"][TASKS[1]], key=lambda sample: sample["doc_id"])
    values = [harness.logprobs(sample) for sample in samples]
    return {"seconds": seconds, "tokens": sum(fed.values()), "values": values}


# --- writing pairs -------------------------------------------------------------------------------


def pairs_ours(options: Namespace, adapter: bool = False) -> dict[str, Any]:
    policy = load(options)
    if adapter:
        policy = add_adapter(policy, LoraConfig(), seed=0)
        policy.model.eval()
    asked = json.loads((options.job / "pairs.json").read_text())["prompts"]
    generate(policy, asked[:2], max_new_tokens=2)  # the trial of the model is not timed
    tasks = [Task(question) for question in questions(options)]
    start = time.perf_counter()
    writer = MODES["paper"].writer(policy, PAPER, 0)
    written = writer.write(tasks)  # the prompts' beginning is in the price
    seconds = time.perf_counter() - start
    common = next(i for i, ids in enumerate(zip(*asked, strict=False)) if len({*ids}) > 1)
    new = sum(each.tokens for each in written)
    tokens = common + sum(len(ids) - common for ids in asked) + new
    body, head = weights(policy)
    return {
        "seconds": seconds,
        "tokens": tokens,
        "operations": 2 * (tokens * body + new * head),
        "values": [[each.correct, each.incorrect] for each in written],
    }


def texts(policy: Policy, ids: list[list[int]]) -> list[str]:
    return policy.tokenizer.batch_decode(ids, skip_special_tokens=True)


def pairs_generate(options: Namespace, batch: int = 16) -> dict[str, Any]:
    """transformers' ``generate`` in padded batches of like length."""
    policy = load(options)
    job = json.loads((options.job / "pairs.json").read_text())
    order = sorted(range(len(job["prompts"])), key=lambda n: len(job["prompts"][n]))
    written, fed = {}, 0
    start = time.perf_counter()
    for first in range(0, len(order), batch):
        now = order[first : first + batch]
        asked = [job["prompts"][n] for n in now]
        width = max(map(len, asked))
        ids = torch.tensor([[0] * (width - len(p)) + p for p in asked], device=policy.device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in asked])
        with torch.inference_mode():
            out = policy.model.generate(
                ids,
                attention_mask=mask.to(policy.device),
                max_new_tokens=job["max_new_tokens"],
                do_sample=False,
                eos_token_id=job["ends"],
                pad_token_id=job["ends"][0],
            )
        fed += out.numel()
        written |= dict(zip(now, out[:, width:].tolist(), strict=True))
    seconds = time.perf_counter() - start
    return {
        "seconds": seconds,
        "tokens": fed,
        "texts": texts(policy, [written[n] for n in sorted(written)]),
    }


def pairs_generate_batch(options: Namespace) -> dict[str, Any]:
    """transformers' continuous batching, with the blocks of a prompt's beginning shared."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    policy = load(options)
    job = json.loads((options.job / "pairs.json").read_text())
    longest = max(map(len, job["prompts"])) + job["max_new_tokens"]
    settings = GenerationConfig(
        max_new_tokens=job["max_new_tokens"],
        do_sample=False,
        eos_token_id=job["ends"],
        pad_token_id=job["ends"][0],
    )
    room = {"page_size": 32, "num_blocks": 64 * (longest // 32 + 1), "max_batch_tokens": 512}
    start = time.perf_counter()
    found = policy.model.generate_batch(
        inputs=job["prompts"],
        generation_config=settings,
        continuous_batching_config=ContinuousBatchingConfig(**room),
    )
    seconds = time.perf_counter() - start
    done = [
        found[key].generated_tokens for key in sorted(found, key=lambda k: int(k.split("_")[-1]))
    ]
    tokens = sum(map(len, job["prompts"])) + sum(map(len, done))
    return {"seconds": seconds, "tokens": tokens, "texts": texts(policy, done)}


# --- DPO -----------------------------------------------------------------------------------------


def examples(policy: Policy, options: Namespace) -> list[PreferenceExample]:
    """Return pairs of everyday lengths, of the probe's annotated answers; or of random tokens."""
    wanted = options.steps * options.batch
    if options.lengths:
        size, draw = policy.model.config.vocab_size, torch.Generator().manual_seed(0)
        ids = [
            [tuple(torch.randint(3, size, (n,), generator=draw).tolist()) for n in options.lengths]
            for _ in range(wanted)
        ]
        return [PreferenceExample(str(i), *three) for i, three in enumerate(ids)]
    pairs = []
    for row in read_jsonl(data_dir() / "probe.jsonl"):
        choices, labels = row["mc1_targets"]["choices"], row["mc1_targets"]["labels"]
        sides = choices[labels.index(1)], choices[labels.index(0)]
        pairs.append(Pair(row["id"], row["question"], *sides, 0))
    pairs = (pairs * (wanted // len(pairs) + 1))[:wanted]
    limits = {"max_prompt_length": 512, "max_length": 1024}
    return list(tokenize_pairs(policy.tokenizer, pairs, **limits).examples)


def dpo(options: Namespace, side: str) -> dict[str, Any]:
    """Train one round; its time is that of the whole round, reference included."""
    if side == "trl":  # our loader asks glibc to keep freed blocks; TRL's user has nothing of that
        os.environ["MALLOC_TRIM_THRESHOLD_"] = str(128 << 10)
    policy = load(options)
    pairs = examples(policy, options)
    body, head = weights(policy)
    policy = add_adapter(policy, LoraConfig(), seed=0)
    rows: list[dict[str, Any]] = [
        {name: list(getattr(pair, name)) for name in ("prompt_ids", "chosen_ids", "rejected_ids")}
        for pair in pairs
    ]
    start = time.perf_counter()
    if side != "trl":
        columns = reference_log_probs(policy, pairs, progress=False)
        for row, *both in zip(rows, *columns, strict=True):
            row["ref_chosen_logps"], row["ref_rejected_logps"] = both
        keep_freed_memory(policy.config.device, TRAINING_BLOCK)
    with tempfile.TemporaryDirectory() as folder:
        train = train_ours if side == "ours" else train_trl
        losses = train(policy, rows, Path(folder), options, side)
    seconds = time.perf_counter() - start
    padded = distinct = 0
    for at in range(0, len(pairs), options.micro):
        batch = pairs[at : at + options.micro]
        padded += 2 * len(batch) * max(pair.length for pair in batch)
        distinct += sum(row["ids"].shape[1] for row in pack([vars(p) for p in batch], 10**9))
    # Forward and back to the inputs (the base is frozen), and once for the reference. TRL's
    # defaults compute the reference in each step, and the forward pass again for the backward one.
    tokens = {"ours": 3 * distinct, "tuned": 2 * padded + distinct, "trl": 4 * padded}[side]
    predicted = sum(len(p.chosen_ids) + len(p.rejected_ids) for p in pairs)
    operations = 2 * 3 * (distinct * body + predicted * head)
    return {"seconds": seconds, "tokens": tokens, "operations": operations, "values": losses}


def train_ours(
    policy: Policy, rows: list[dict[str, Any]], folder: Path, options: Namespace, side: str
) -> list[float]:
    config = DPOConfig(
        learning_rate=2e-4,
        warmup_steps=2,
        batch_size=options.batch,
        micro_batch_size=options.micro,
        steps=options.steps,
        log_every=1,
        save_every=10**6,
    )
    log = run_trainer(policy, rows, [], folder=folder, config=config, seed=0, progress=False)
    return [row["loss"] for row in log if row["split"] == "train"]


def train_trl(
    policy: Policy, rows: list[dict[str, Any]], folder: Path, options: Namespace, side: str
) -> list[float]:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    class FromIds(DPOTrainer):  # the same token ids on both sides
        def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
            return dataset

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
            max_length=None,
            bf16=False if policy.config.dtype == "float32" else None,
            use_cpu=policy.device.type == "cpu",
            seed=0,
            data_seed=0,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **({"gradient_checkpointing": False} if side == "tuned" else {}),
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=policy.tokenizer,
    )
    if side == "tuned":
        trainer.precompute_ref_logps = True
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]
