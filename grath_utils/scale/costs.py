"""What a run will take: operations, memory and time, before anything is loaded.

A weight costs 2 operations a token in the forward pass and 2 more in the backward pass, as the base
is frozen (its weights get no gradient); gradient checkpointing adds another forward pass. The time
of a piece of work is the longest of three: its operations over the rate that the device reaches,
its bytes over the bandwidth (each pass reads every weight), and the time to launch it (on a GPU,
Python starts some hundred kernels a layer). Rates and token counts come from measurements
(``measurements.jsonl``), or are assumptions and say so.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from grath_utils.config import OWN_QUESTIONS, Config, LoraConfig, ModelConfig, load_config
from grath_utils.engine.trie import CPU_ROW_TOKENS
from grath_utils.errors import DataError
from grath_utils.evaluation.benchmarks import BENCHMARKS
from grath_utils.files import read_jsonl
from grath_utils.loop.plan import Stage, plan_stages
from grath_utils.loop.run_dir import Run
from grath_utils.pairs.modes import find_mode
from grath_utils.pairs.questions import load_questions, names_file
from grath_utils.scale.shapes import BYTES, Shape, shape_of

GIB = 2**30

# --- the work: token counts are those of SmolLM2's tokenizer -------------------------------------

QUESTIONS = {("arc_challenge", "train"): 1119, ("arc_easy", "train"): 2251}
"""Sizes of the Hub's question sets (their dataset cards), so that no network is needed."""
OWN_QUESTION_TOKENS, QUESTION_TOKENS = 15, 25  # means: of our own, and of ARC's and all others
TEMPLATE_TOKENS = 25  # instruction and markers around a question, in a prompt for pairs
SHOT_TOKENS = 115  # a demonstration: six are a prompt of 689 tokens
TYPICAL_ANSWER_TOKENS = 17  # an answer as the default model writes it
PAIR_TOKENS = 36  # both answers and their labels; the question is restated before them
CANDIDATE = (33, 29)  # tokens read and predicted to credit one candidate
PAIR_DISTINCT = 32  # distinct tokens of a training pair beside its question, packed
PAIR_PREDICTED = 25  # places in it that predict an answer's token
SIGNAL_ANSWERS, SIGNAL_TOKENS = 32, 48  # free answers behind the signals of a round


def question_count(config: Config) -> int:
    """Return how many questions a run asks, or a DataError where only the Hub knows."""
    settings, source, limit = config.questions, config.questions.source, config.questions.limit
    if source in OWN_QUESTIONS or names_file(source):
        return len(load_questions(settings, config.seed).questions)
    if found := QUESTIONS.get((source, settings.split), limit):
        return min(found, limit or found)
    raise DataError(
        f'how many questions "{source}" ({settings.split}) holds is not known without loading it; '
        "set questions.limit"
    )


def workload(config: Config) -> dict[str, int]:
    """Return how much a whole run does; raises as :func:`question_count`."""
    questions, rounds = question_count(config), config.loop.iterations
    models = 1 + (rounds if config.evaluation.every_iteration else 1)
    mode = find_mode(config.pairs.mode)
    written = sum(sum(mode.asked(config.pairs, t)[:2]) for t in range(rounds))
    steps = sum(config.round_dpo(t).steps for t in range(rounds))
    return {
        "questions": questions,
        "completions to write, at most": questions * written,
        "optimiser steps": steps,
        "pairs seen in training": steps * config.dpo.batch_size,
        "evaluations": models * len(config.evaluation.benchmarks),
    }


# --- devices -------------------------------------------------------------------------------------

# Fitted to measurements.jsonl. Seconds of an operation: the first number over the rate of a matrix
# product on the same machine, plus the second. That part (norms, softmax, memory, Python) gets no
# faster where products do, so the faster the products, the smaller the share of their rate.
CPU_COSTS = {"write": (0.88, 2.3e-12), "train": (1.2, 4.5e-12), "score": (1.6, 1.3e-12)}
FITTED_WIDTH = 576  # of SmolLM2-135M
CPU_KEPT = 2 * GIB  # freed blocks that the allocator may keep (machine.keep_freed_memory)
LIBRARIES = 0.6e9  # bytes; on a GPU the CUDA context
# Assumed: no GPU run was long enough to be limited by its arithmetic.
GPU_REACHED = (("write", 0.3), ("train", 0.4), ("score", 0.4))
GPU_BANDWIDTH_REACHED = 0.8  # assumed
LAUNCH = 2.8e-3  # fitted to the one measured GPU step (H100, Llama-2-7B's shape, NF4)
NF4_MOVED = 4.5  # bytes a 4-bit weight moves in a pass: 0.5 read, 2 written, 2 read again


@dataclass(frozen=True, kw_only=True)
class Device:
    """What work runs on. Memory and rates are those of one device; ``count`` work side by side."""

    name: str
    peak: float  # operations a second in the compute type, dense
    memory: float  # bytes
    bandwidth: float  # bytes a second
    kind: str = "gpu"  # or "cpu"
    reached: tuple[tuple[str, float], ...] = GPU_REACHED  # share of the peak, by kind of work
    beside: tuple[tuple[str, float], ...] = ()  # seconds an operation of all but the products
    launch: float = LAUNCH  # seconds to launch one layer once; a backward pass counts as two
    count: int = 1
    dtype: str = "bfloat16"  # the compute type
    source: str = "the vendor's data sheet; peak without sparsity"

    def rate(self, kind: str, width: int) -> float:
        """Return the operations a second of a kind of work, in a model with so wide a residual.

        Products grow with the square of the width, all else with the width: the wider the model,
        the less of its time goes beside the products.
        """
        products = 1 / (self.peak * dict(self.reached)[kind])
        return 1 / (products + dict(self.beside).get(kind, 0.0) * FITTED_WIDTH / width)


_H100 = Device(name="H100 80 GB", peak=989e12, memory=80e9, bandwidth=3350e9)
DEVICES = {
    # The T4 has no bfloat16 units.
    "T4": Device(name="T4", peak=65e12, memory=16e9, bandwidth=320e9, dtype="float16"),
    "A100": Device(name="A100 80 GB", peak=312e12, memory=80e9, bandwidth=2039e9),
    "H100": _H100,
    "8xH100": replace(_H100, name="8 × H100 80 GB", count=8),
}
"""NVIDIA T4; A100 80GB SXM; H100 SXM: bf16/fp16 tensor rate, memory, memory bandwidth."""


def meant_for(profile: str) -> Device | None:
    """Return the GPU that a profile is made for; None: the machine at hand."""
    if profile.startswith("paper-"):
        return DEVICES["H100"]
    return DEVICES["T4"] if profile.startswith("colab-t4") else None


def cpu_device(peak: float, memory: float, *, dtype: str = "bfloat16") -> Device:
    """Return a CPU of ``memory`` bytes whose matrix products reach ``peak`` operations a second."""
    reached = tuple((kind, 1 / products) for kind, (products, _) in CPU_COSTS.items())
    beside = tuple((kind, rest) for kind, (_, rest) in CPU_COSTS.items())
    this = {"name": "this CPU", "kind": "cpu", "dtype": dtype, "source": "measured now"}
    return Device(
        **this, peak=peak, memory=memory, bandwidth=30e9, reached=reached, beside=beside, launch=0
    )


def this_device(model: ModelConfig, seconds: float = 0.8) -> Device:
    """Return the machine at hand, its rate measured for ``seconds`` with matrix products."""
    import psutil
    import torch
    from torch.utils.benchmark import Timer

    from grath_utils.engine.models import resolve

    here, memory = resolve(model), float(psutil.virtual_memory().total)
    if here.device == "cuda":
        gpu = torch.cuda.get_device_properties(0)
        memory = float(gpu.total_memory)
        for key, known in DEVICES.items():
            if key in gpu.name:
                return replace(known, memory=memory)
    # Products such as a row of tokens makes; the rate of the fastest tenth of them.
    kind = {"device": here.device, "dtype": getattr(torch, here.dtype)}
    a, b = torch.randn(512, 1024, **kind), torch.randn(1024, 1024, **kind)
    timer = Timer("a @ b", globals={"a": a, "b": b}, num_threads=torch.get_num_threads())
    times = sorted(timer.blocked_autorange(min_run_time=seconds).times)
    peak = 2 * 512 * 1024 * 1024 / times[len(times) // 10]
    found = {"peak": peak, "memory": memory, "dtype": here.dtype}
    if here.device == "cpu":
        return cpu_device(**found)
    return Device(name=here.device, bandwidth=300e9, source="measured now", **found)


# --- memory --------------------------------------------------------------------------------------


def stored_quantization(config: Config, device: Device) -> str:
    """Return how the weights lie in memory: a CPU holds rounded weights in the compute type."""
    return config.model.quantization if device.kind == "gpu" else "none"


def pairs_at_once(config: Config, device: Device) -> int:
    """Return how many pairs one device trains on in one pass."""
    return min(config.dpo.micro_batch_size, max(1, config.dpo.batch_size // device.count))


def activation_bytes(shape: Shape, lora: LoraConfig, dtype: str, *, checkpointing: bool) -> int:
    """Return what one token leaves in one layer for the backward pass, in bytes.

    Queries, keys, values (repeated for all query heads) and attention's output; three tensors of
    the MLP; two norms in float32; for each adapted matrix its input and the rank-r product in
    float32, the adapter's type. Checkpointing leaves the layer's input.
    """
    size, targets = BYTES[dtype], shape.lora_targets(lora)
    if checkpointing:
        return round(shape.hidden * size)
    kept = size * (4 * shape.heads * shape.head_dim + 3 * shape.intermediate) + 8 * shape.hidden
    return round(kept + 4 * sum(shape.linears[name][0] + lora.r for name in targets))


def training_memory(
    config: Config, device: Device, *, shape: Shape | None = None, pair_tokens: int = 57
) -> dict[str, float]:
    """Return the bytes of training an adapter on one device, by part.

    AdamW holds two float32 moments for each trained weight, and its gradient is float32. Logits
    count 8 bytes each: in float32 for the loss, in 16 bits the head's output and its gradient.
    """
    shape = shape or shape_of(config.model)
    dtype, stored = device.dtype, stored_quantization(config, device)
    pairs, adapter = pairs_at_once(config, device), shape.lora_parameters(config.lora)
    one_layer, each = (
        pairs * pair_tokens * activation_bytes(shape, config.lora, dtype, checkpointing=kept)
        for kept in (False, config.dpo.gradient_checkpointing)
    )
    largest = max(a * b for a, b in shape.linears.values())
    return {
        "weights": shape.weight_bytes(dtype, stored),
        "adapter": 4 * adapter,
        "gradient and optimiser": 12 * adapter,
        "activations": each * shape.layers + one_layer,
        "logits": 8 * pairs * PAIR_PREDICTED * shape.vocabulary,
        "working space": largest * BYTES[dtype] * (stored != "none") + LIBRARIES,  # one unpacked
    }


def full_training_memory(shape: Shape) -> dict[str, float]:
    """Return the bytes of training all weights in 16 bits with AdamW, activations left out.

    Weight and gradient in 16 bits, a master copy and two moments in float32 (arXiv 1910.02054).
    """
    return {"weights": 2 * shape.parameters, "gradient and optimiser": 14 * shape.parameters}


# --- time ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StageCost:
    """What one stage of a run takes; ``memory`` is the highest on one device, in bytes."""

    id: str
    title: str
    memory: float
    seconds: float


class CostModel:
    """What each stage of a configuration takes on a device."""

    def __init__(self, config: Config, device: Device, shape: Shape | None = None):
        self.config, self.device = config, device
        self.shape = shape or shape_of(config.model)
        self.quantization = stored_quantization(config, device)
        self.questions = question_count(config)
        own = config.questions.source in OWN_QUESTIONS
        self.question_tokens = OWN_QUESTION_TOKENS if own else QUESTION_TOKENS
        gpu = device.kind == "gpu"
        self.row_tokens = config.evaluation.batch_tokens if gpu else CPU_ROW_TOKENS

    def seconds(
        self, kind: str, tokens: float, predicted: float, context: float, passes: float
    ) -> float:
        """Return the time of reading ``tokens`` in so many passes: the longest of three times.

        A token attends to ``context`` others (2 operations for each query-key and weight-value
        pair); those that are ``predicted`` go through the head.
        """
        device, s = self.device, self.shape
        attention = 4 * s.layers * s.heads * s.head_dim * context
        flops = tokens * (2 * s.linear_parameters + attention)
        flops += predicted * 2 * s.vocabulary * s.hidden
        moved = BYTES[device.dtype] if self.quantization == "none" else NF4_MOVED
        bandwidth = device.bandwidth * (GPU_BANDWIDTH_REACHED if device.kind == "gpu" else 1.0)
        computing = flops / device.rate(kind, s.hidden)
        reading = passes * s.linear_parameters * moved / bandwidth
        launching = passes * s.layers * device.launch
        return max(computing, reading, launching) / device.count

    def writing(self, completions: float, prompt: float, new: float, prefix: float) -> float:
        """Seconds of writing: prompts after a shared prefix, then ``new`` tokens each."""
        tokens, predicted = completions * (prompt + new), completions * (new + 1)
        batches = completions / self.config.pairs.batch_size
        passes = math.ceil(batches / self.device.count) * self.device.count * (new + 1)
        return self.seconds("write", tokens, predicted, prefix + (prompt + new) / 2, passes)

    def scoring(self, items: float, tokens: float, predicted: float, context: float) -> float:
        """Seconds of scoring: each item has tokens to read, some of which are predicted."""
        passes = math.ceil(items * tokens / self.row_tokens)
        return self.seconds("score", items * tokens, items * predicted, context, passes)

    def training(self, pairs: float, tokens: float, predicted: float) -> float:
        """Seconds of DPO on pairs of ``tokens`` each.

        A backward pass launches twice what a forward pass does, and moves the weights once.
        """
        forwards = 3 if self.config.dpo.gradient_checkpointing else 2
        passes = pairs / pairs_at_once(self.config, self.device) * (forwards + 1)
        computed = forwards * pairs
        return self.seconds("train", computed * tokens, computed * predicted, tokens, passes)

    def inference_memory(self, *, write: bool) -> float:
        """Return the bytes of writing pairs (``write``) or of scoring."""
        pairs, dtype, shape = self.config.pairs, self.device.dtype, self.shape
        rows, cached = self.row_tokens, self.row_tokens + 2048  # and the beginning that rows share
        if write:
            rows = pairs.batch_size
            cached = rows * (3 * TEMPLATE_TOKENS + pairs.max_new_tokens) + pairs.shots * SHOT_TOKENS
        logits = rows * shape.vocabulary * (BYTES[dtype] + 4 * write)
        working = rows * shape.intermediate * BYTES[dtype] * 3 + LIBRARIES
        weights = shape.weight_bytes(dtype, self.quantization)
        return weights + shape.kv_cache_bytes(cached, dtype) + logits + working

    def stage(self, stage: Stage) -> StageCost:
        """Return what a stage takes, with loading at an assumed 1 GB a second."""
        config, n, q = self.config, self.questions, self.question_tokens
        prompt, pair = q + TEMPLATE_TOKENS, q + PAIR_DISTINCT
        held_out = n * config.questions.held_out
        kind = stage.id.partition("_")[0]
        memory = self.inference_memory(write=kind != "evaluate")
        match kind:
            case "pairs":
                asked = find_mode(config.pairs.mode).asked(config.pairs, stage.iteration)
                pairs, answers, scored = (n * times for times in asked)
                truth = 2 * TYPICAL_ANSWER_TOKENS if config.pairs.ground_truth else 0
                prefix = config.pairs.shots * (SHOT_TOKENS + truth)
                seconds = [
                    self.writing(pairs, prompt + truth, q + PAIR_TOKENS, prefix),
                    self.writing(answers, prompt, TYPICAL_ANSWER_TOKENS, prefix / 2),
                    self.scoring(scored, *CANDIDATE, prefix / 2),
                ]
            case "relabel":  # the main arm's pairs, with other labels
                return StageCost(stage.id, stage.title, 0.0, 0.0)
            case "train":
                parts = training_memory(config, self.device, shape=self.shape, pair_tokens=pair)
                dpo = config.round_dpo(stage.iteration)
                memory, seen = sum(parts.values()), dpo.steps * dpo.batch_size
                # By the reference, once; held-out pairs by the policy, now and then.
                scored = n + held_out * (dpo.steps // dpo.evaluate_every + 1)
                seconds = [
                    self.training(seen, pair, PAIR_PREDICTED),
                    self.scoring(scored, pair, PAIR_PREDICTED, pair),
                ]
            case "measure":  # the signals of a round: free answers, and held-out pairs
                pairs = max(1, round(held_out))
                seconds = [
                    self.writing(min(pairs, SIGNAL_ANSWERS), prompt, SIGNAL_TOKENS, 0),
                    self.scoring(3 * pairs, pair, PAIR_PREDICTED, pair),
                ]
            case _:
                row = BENCHMARKS[stage.output.stem]
                size, new = row.size, row.size.predicted
                items = min(size.items, config.evaluation.limit or size.items)
                if row.score is None:
                    seconds = [self.writing(items, size.tokens - new, new, size.context)]
                else:
                    seconds = [self.scoring(items, size.tokens, new, size.context)]
        kept = CPU_KEPT if self.device.kind == "cpu" else 0
        loading = 4 + self.shape.weight_bytes("bfloat16") / 1e9
        return StageCost(stage.id, stage.title, memory + kept, loading + sum(seconds))


def estimate(config: Config, device: Device, *, shape: Shape | None = None) -> list[StageCost]:
    """Return the cost of every stage of a run with all its rounds, in the order of the plan."""
    model, nothing_done = CostModel(config, device, shape), Run(Path(os.devnull), config)
    return [model.stage(stage) for stage in plan_stages(nothing_done)]


def total(stages: Sequence[StageCost]) -> StageCost:
    """Add stages up; memory is the highest of any."""
    memory = max((stage.memory for stage in stages), default=0.0)
    return StageCost("total", "the whole run", memory, sum(stage.seconds for stage in stages))


# --- against what was measured -------------------------------------------------------------------


def compare_with_measurements() -> list[tuple[str, str, float, float]]:
    """Return (what, unit, measured, predicted) for each line of ``measurements.jsonl``."""
    rows = read_jsonl(Path(__file__).with_name("measurements.jsonl"))
    return [(row["what"], row["unit"], float(row["measured"]), predict(row)) for row in rows]


def predict(row: Mapping[str, Any]) -> float:
    """Return the prediction for a line of ``measurements.jsonl``."""
    device = DEVICES.get(row["device"]) or cpu_device(row["peak"], 24 * GIB)
    config = load_config(row.get("profile", "cpu-tiny"), row.get("settings", {}))
    model = CostModel(config, device)
    match row["kind"]:
        case "dpo step":
            sizes = row["pair_tokens"], row["pair_predicted"]
            return model.training(config.dpo.batch_size, *sizes)
        case "training memory":
            parts = training_memory(config, device, pair_tokens=row["pair_tokens"])
            return sum(parts.values()) / GIB
        case "scoring":
            size = BENCHMARKS[row["benchmark"]].size
            return model.scoring(row["items"], size.tokens, size.predicted, size.context)
        case "pairs":
            return estimate(config, device)[0].seconds
        case _:  # a whole run
            return total(estimate(config, device)).seconds
