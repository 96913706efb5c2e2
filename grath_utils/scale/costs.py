"""What a run will take: tokens, operations, bytes, memory and time, before anything is loaded.

The arithmetic is on the back of an envelope, written down. A weight costs 2 operations a token in
the forward pass and 2 more in the backward pass, as the base is frozen (its weights get no
gradient); gradient checkpointing adds another forward pass. The time of a piece of work is the
longest of three: its operations over the rate that the device reaches, its bytes over the bandwidth
(each pass reads every weight), and the time to launch it (on a GPU, Python starts some hundred
kernels a layer). Rates and token counts come from measurements, or are assumptions and say so.
``measurements.jsonl`` holds what was measured; a test compares.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from grath_utils.config import (
    UNASKED_MODES,
    Config,
    DPOConfig,
    LoraConfig,
    ModelConfig,
    load_config,
)
from grath_utils.errors import DataError
from grath_utils.files import read_jsonl
from grath_utils.pairs.questions import load_questions
from grath_utils.scale.shapes import (
    BYTES,
    LLAMA2_7B,
    LLAMA2_70B,
    SMOLLM2_1_7B,
    SMOLLM2_135M,
    Shape,
    shape_of,
)

GIB = 2**30
MEASUREMENTS = Path(__file__).with_name("measurements.jsonl")

# --- what there is to do: token counts, with SmolLM2's tokenizer ---------------------------------

QUESTIONS = {("arc_challenge", "train"): 1119, ("arc_easy", "train"): 2251}
"""Sizes of the Hub's question sets (their dataset cards), so that no network is needed."""
QUESTION_TOKENS = {"own": 15, "arc_challenge": 25, "arc_easy": 22}
"""Mean tokens of a question, measured (arc_easy: assumed)."""
OTHER_QUESTION_TOKENS = 25
TEMPLATE_TOKENS = 25  # instruction and markers around a question, in a prompt for pairs
SHOT_TOKENS = 115  # a demonstration: six are a prompt of 689 tokens
ANSWER_TOKENS = 17  # an answer as the default model writes it
PAIR_TOKENS = 36  # both answers and their labels; the question is restated before them
CANDIDATE_SCORED = (33, 29)  # mode default: tokens read and predicted to credit one candidate
PAIR_DISTINCT = 32  # distinct tokens of a training pair beside its question, packed
PAIR_PREDICTED = 25  # places in it that predict an answer's token
SIGNAL_ANSWERS, SIGNAL_TOKENS = 32, 48  # free answers behind the signals of a round

BENCHMARK_WORK = {  # items; per item: distinct tokens read, places that predict
    "truthfulqa_mc": (817, 71, 58),
    "truthfulqa_binary": (790, 40, 12),
    "truthfulqa_gen": (817, 65, 50),
    "arc_challenge": (1172, 990, 18),
    "hellaswag": (10042, 569, 59),
    "mmlu": (14042, 176, 1),
    "probe": (199, 74, 61),
    "retention": (200, 13, 3),
}
"""Counted with the default protocols; ARC, HellaSwag and MMLU on 200 to 400 items; those of
truthfulqa_binary and truthfulqa_gen are assumed."""


def question_count(config: Config) -> int:
    """Return how many questions a run asks, without network access.

    Raises:
        DataError: the size of a Hub data set is not known; with ``questions.limit`` it is.
    """
    source, limit = config.questions, config.questions.limit
    local = source.source == "own" or source.source.endswith((".jsonl", ".csv"))
    if local:
        return len(load_questions(source, config.seed).questions)
    found = QUESTIONS.get((source.source, source.split), limit)
    if found is None:
        raise DataError(
            f'how many questions "{source.source}" ({source.split}) holds is not known without '
            "loading it; set questions.limit"
        )
    return min(found, limit or found)


def workload(config: Config) -> dict[str, int]:
    """Return how much a whole run does.

    Raises:
        DataError: the questions cannot be read or counted.
    """
    questions, rounds = question_count(config), config.loop.iterations
    first, later = (completions_each(config, t) for t in (0, 1))
    models = 1 + (rounds if config.evaluation.every_iteration else 1)
    return {
        "questions": questions,
        "completions to write, at most": questions * (first + later * (rounds - 1)),
        "optimiser steps": rounds * config.dpo.steps,
        "pairs seen in training": rounds * config.dpo.steps * config.dpo.batch_size,
        "evaluations": models * len(config.evaluation.benchmarks),
    }


def completions_each(config: Config, iteration: int) -> int:
    """Return how many completions one question gets; later rounds write one answer anew."""
    if config.pairs.mode != "default":
        return 1 if config.pairs.mode == "paper" else 0
    return 1 + config.pairs.candidates * (1 if iteration else 2)


# --- what does it: devices -----------------------------------------------------------------------


@dataclass(frozen=True)
class Device:
    """What work runs on. Memory and rates are those of one device; ``count`` work side by side."""

    name: str
    kind: str
    """``cpu`` or ``gpu``."""
    peak: float
    """Operations a second in the compute type, dense."""
    memory: float
    """Bytes."""
    bandwidth: float
    """Bytes a second."""
    reached: tuple[tuple[str, float], ...]
    """Share of the peak that each kind of work reaches: ``write``, ``train``, ``score``."""
    launch: float = 0.0
    """Seconds to launch one layer once; a backward pass counts as two."""
    count: int = 1
    dtype: str = "bfloat16"
    """The compute type."""
    source: str = ""


# Fitted to measurements.jsonl. Seconds of an operation: the first number over the rate of a matrix
# product on the same machine, plus the second. That part (norms, softmax, memory, Python) gets no
# faster where products do, so the faster the products, the smaller the share of their rate.
CPU_COSTS = {"write": (0.88, 2.3e-12), "train": (1.2, 4.5e-12), "score": (1.6, 1.3e-12)}
CPU_KEPT = 2 * GIB  # freed blocks that the allocator may keep (models.keep_freed_memory)
# Assumed: no GPU run was long enough to be limited by its arithmetic.
GPU_REACHED = (("write", 0.3), ("train", 0.4), ("score", 0.4))
GPU_BANDWIDTH_REACHED = 0.8  # assumed
LAUNCH = 2.8e-3  # fitted to the one measured GPU step (H100, Llama-2-7B's shape, NF4)
NF4_MOVED = 4.5  # bytes a 4-bit weight moves in a pass: 0.5 read, 2 written, 2 read again


def _gpu(
    name: str, peak: float, memory: float, bandwidth: float, count: int = 1, dtype: str = "bfloat16"
) -> Device:
    source = "the vendor's data sheet; peak without sparsity"
    return Device(name, "gpu", peak, memory, bandwidth, GPU_REACHED, LAUNCH, count, dtype, source)


DEVICES = {
    "T4": _gpu("T4", 65e12, 16e9, 320e9, dtype="float16"),  # it has no bfloat16 units
    "A100": _gpu("A100 80 GB", 312e12, 80e9, 2039e9),
    "H100": _gpu("H100 80 GB", 989e12, 80e9, 3350e9),
    "8xH100": _gpu("8 × H100 80 GB", 989e12, 80e9, 3350e9, count=8),
}
"""NVIDIA T4; A100 80GB SXM; H100 SXM: bf16/fp16 tensor rate, memory, memory bandwidth."""


def cpu_device(
    peak: float, memory: float, bandwidth: float = 30e9, *, dtype: str = "bfloat16"
) -> Device:
    """Return a CPU whose matrix products reach ``peak`` operations a second.

    Args:
        peak: measured in the compute type.
        memory: bytes.
        bandwidth: bytes a second.
        dtype: the compute type.
    """
    reached = tuple((kind, 1 / (part + rest * peak)) for kind, (part, rest) in CPU_COSTS.items())
    source = "measured now"
    return Device("this CPU", "cpu", peak, memory, bandwidth, reached, dtype=dtype, source=source)


def this_device(model: ModelConfig, seconds: float = 0.8) -> Device:
    """Return the machine at hand, its rates measured for ``seconds`` with matrix products.

    Of the products the fastest tenth counts: what others take of the machine is not foreseen.
    """
    import psutil
    import torch

    from grath_utils.engine.models import resolve

    resolved = resolve(model)
    if resolved.device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        known = [d for key, d in DEVICES.items() if key in properties.name and d.count == 1]
        if known:
            return replace(known[0], memory=float(properties.total_memory))
    dtype = getattr(torch, resolved.dtype)
    peak = _matmul_rate(torch, dtype, resolved.device, seconds)
    if resolved.device != "cpu":
        memory = float(psutil.virtual_memory().total)
        if resolved.device == "cuda":
            memory = float(torch.cuda.get_device_properties(0).total_memory)
        rates = (peak, memory, 300e9, GPU_REACHED, LAUNCH)
        return Device(resolved.device, "gpu", *rates, dtype=resolved.dtype)
    memory = float(psutil.virtual_memory().total)
    return cpu_device(peak, memory, dtype=resolved.dtype)


def _matmul_rate(torch: Any, dtype: Any, device: str, seconds: float) -> float:
    """Return the rate of products of the size that a row of tokens makes (fastest tenth)."""
    a = torch.randn(512, 1024, device=device).to(dtype)
    b = torch.randn(1024, 1024, device=device).to(dtype)
    times: list[float] = []
    begin = time.perf_counter()
    while len(times) < 3 or (time.perf_counter() - begin < seconds and len(times) < 10_000):
        start = time.perf_counter()
        product = a @ b
        product[0, 0].item()  # waits for a GPU
        times.append(time.perf_counter() - start)
    return 2 * 512 * 1024 * 1024 / sorted(times)[len(times) // 10]


MEANT_FOR = {"colab-t4": "T4", "paper-": "H100"}
"""The device that profiles whose names begin so are made for."""


def meant_for(profile: str) -> Device | None:
    """Return the GPU that a profile is made for; None: the machine at hand."""
    return next((DEVICES[d] for start, d in MEANT_FOR.items() if profile.startswith(start)), None)


# --- memory --------------------------------------------------------------------------------------


def stored_quantization(config: Config, device: Device) -> str:
    """Return how the weights lie in memory: a CPU holds rounded weights in the compute type."""
    return config.model.quantization if device.kind == "gpu" else "none"


def activation_bytes(shape: Shape, lora: LoraConfig, dtype: str, *, checkpointing: bool) -> int:
    """Return what one token leaves in one layer for the backward pass, in bytes.

    Counted, and held to what autograd saves by a test: queries, keys, values and attention's
    output; three tensors of the MLP; two norms in float32; and for each adapted matrix its input in
    float32 (the adapter's type) and the rank-r product. Checkpointing leaves the layer's input.
    """
    size = BYTES[dtype]
    if checkpointing:
        return round(shape.hidden * size)
    query = shape.heads * shape.head_dim  # keys and values are repeated for all query heads
    kept = size * (4 * query + 3 * shape.intermediate) + 8 * shape.hidden
    kept += 8 + 4 * shape.heads  # a number for each norm, and for each head's softmax
    inputs = [shape.linears[name][0] for name in shape.lora_targets(lora)]
    shared = {"q_proj": "a", "k_proj": "a", "v_proj": "a", "gate_proj": "m", "up_proj": "m"}
    if dtype == "float32":  # no copy is made: matrices with the same input share it
        groups = {shared.get(n, n): shape.linears[n][0] for n in shape.lora_targets(lora)}
        # The MLP's product and attention's output are kept already.
        inputs = [n for group, n in groups.items() if group != "o_proj"]
    return round(kept + 4 * sum(inputs) + 4 * lora.r * len(shape.lora_targets(lora)))


def training_memory(
    shape: Shape,
    lora: LoraConfig,
    dpo: DPOConfig,
    device: Device,
    *,
    dtype: str,
    quantization: str,
    pair_tokens: int = PAIR_DISTINCT + 25,
) -> dict[str, float]:
    """Return the bytes of training with an adapter, by part.

    AdamW holds two float32 moments for each trained weight, and its gradient is float32. The
    logits of a micro-batch count 8 bytes each: in float32 for the loss, and twice in 16 bits (the
    head's output and its gradient).
    """
    at_once = min(dpo.micro_batch_size, max(1, dpo.batch_size // device.count))
    tokens = at_once * pair_tokens
    checkpointing = dpo.gradient_checkpointing
    one_layer = tokens * activation_bytes(shape, lora, dtype, checkpointing=False)
    each = tokens * activation_bytes(shape, lora, dtype, checkpointing=checkpointing)
    adapter = shape.lora_parameters(lora)
    largest = max(a * b for a, b in shape.linears.values())
    unpacked = largest * BYTES[dtype] if quantization != "none" else 0
    return {
        "weights": shape.weight_bytes(dtype, quantization),
        "adapter": 4 * adapter,
        "gradient and optimiser": 12 * adapter,
        "activations": each * shape.layers + one_layer,
        "logits": 8 * at_once * PAIR_PREDICTED * shape.vocabulary,
        "working space": unpacked + 0.6e9,  # libraries; on a GPU the CUDA context
    }


def full_training_memory(shape: Shape) -> dict[str, float]:
    """Return the bytes of training all weights in 16 bits with AdamW, activations left out.

    16 bytes a parameter: weight and gradient in 16 bits; in float32 a master copy and two moments
    (ZeRO, arXiv 1910.02054, section 3.1).
    """
    n = shape.parameters
    return {"weights": 2.0 * n, "gradient and optimiser": 14.0 * n}


def inference_memory(
    config: Config, shape: Shape, device: Device, *, write: bool
) -> dict[str, float]:
    """Return the bytes of writing pairs (``write``) or of scoring, by part."""
    dtype = device.dtype
    weights = shape.weight_bytes(dtype, stored_quantization(config, device))
    if write:
        prefix = config.pairs.shots * SHOT_TOKENS
        room = 3 * TEMPLATE_TOKENS + config.pairs.max_new_tokens
        cached = prefix + config.pairs.batch_size * room
        rows = config.pairs.batch_size
    else:
        rows = config.evaluation.batch_tokens if device.kind == "gpu" else 512
        cached = rows + 2 * 1024  # one row and the long beginning that it shares
    return {
        "weights": weights,
        "keys and values": shape.kv_cache_bytes(cached, dtype),
        "logits": rows * shape.vocabulary * (BYTES[dtype] + (4 if write else 0)),
        "working space": rows * shape.intermediate * BYTES[dtype] * 3 + 0.6e9,
    }


# --- time ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StageCost:
    """What one stage of a run takes."""

    name: str
    tokens: float
    """Tokens that go through the model (distinct ones: shared beginnings count once)."""
    flops: float
    moved: float
    """Bytes of weights that go through memory, over all devices."""
    memory: float
    """Bytes at the highest, on one device."""
    seconds: float


@dataclass(frozen=True)
class _Setting:
    """A configuration on a device: what every estimate needs."""

    config: Config
    shape: Shape
    device: Device
    questions: int

    @property
    def question_tokens(self) -> int:
        return QUESTION_TOKENS.get(self.config.questions.source, OTHER_QUESTION_TOKENS)

    def flops(self, tokens: float, predicted: float, context: float) -> float:
        """Operations of a forward pass (attention: 2 for each query-key and weight-value pair)."""
        s = self.shape
        attention = 4 * s.layers * s.heads * s.head_dim * context
        return tokens * (2 * s.linear_parameters + attention) + (
            2 * s.vocabulary * s.hidden * predicted
        )

    @property
    def pass_bytes(self) -> float:
        """Bytes that the layers' weights move in one forward pass."""
        quantization = stored_quantization(self.config, self.device)
        each = BYTES[self.device.dtype] if quantization == "none" else NF4_MOVED
        return self.shape.linear_parameters * each

    def seconds(self, kind: str, flops: float, passes: float) -> float:
        """Return the time of ``flops`` in ``passes`` forward passes over all devices."""
        device = self.device
        reached = GPU_BANDWIDTH_REACHED if device.kind == "gpu" else 1.0
        roofs = (
            flops / (device.peak * dict(device.reached)[kind]),
            passes * self.pass_bytes / (device.bandwidth * reached),
            passes * self.shape.layers * device.launch,
        )
        return max(roofs) / device.count

    @property
    def loading(self) -> float:
        """Seconds to start and to read the weights, at an assumed 1 GB a second."""
        return 4 + self.shape.weight_bytes("bfloat16") / 1e9

    def stage(
        self, name: str, memory: dict[str, float], *work: tuple[str, float, float, float]
    ) -> StageCost:
        """Add up pieces of work (kind, tokens, flops, passes) of a stage."""
        kept = CPU_KEPT if self.device.kind == "cpu" else 0
        return StageCost(
            name,
            tokens=sum(tokens for _, tokens, _, _ in work),
            flops=sum(flops for _, _, flops, _ in work),
            moved=sum(passes for *_, passes in work) * self.pass_bytes,
            memory=sum(memory.values()) + kept,
            seconds=self.loading + sum(self.seconds(k, f, p) for k, _, f, p in work),
        )

    def decode(self, completions: float, prompt: float, new: float, prefix: float):
        """Work of writing: prompts after a shared prefix, then ``new`` tokens each, in batches."""
        tokens = prefix + completions * (prompt + new)
        flops = self.flops(tokens, completions * (new + 1), prefix + (prompt + new) / 2)
        at_once = self.config.pairs.batch_size
        passes = math.ceil(completions / at_once / self.device.count) * self.device.count
        return ("write", tokens, flops, passes * (new + 1))

    def scoring(self, tokens: float, predicted: float, context: float):
        """Work of scoring, in rows as long as the device's."""
        row = self.config.evaluation.batch_tokens if self.device.kind == "gpu" else 512
        flops = self.flops(tokens, predicted, context)
        return ("score", tokens, flops, math.ceil(tokens / row))

    def write_pairs(self, iteration: int) -> StageCost:
        pairs, q = self.config.pairs, self.question_tokens
        memory = inference_memory(self.config, self.shape, self.device, write=True)
        prefix, prompt = pairs.shots * SHOT_TOKENS, q + TEMPLATE_TOKENS
        both = self.decode(self.questions, prompt, q + PAIR_TOKENS, prefix)
        name = f"write pairs, iteration {iteration}"
        if pairs.mode in UNASKED_MODES:
            return self.stage(name, memory)
        if pairs.mode == "pick":
            read, predicted = (4 * self.questions * each for each in CANDIDATE_SCORED)
            return self.stage(name, memory, self.scoring(read, predicted, prefix / 2))
        if pairs.mode == "paper":
            return self.stage(name, memory, both)
        n = self.questions * completions_each(self.config, iteration)
        singles = self.decode(n - self.questions, prompt, ANSWER_TOKENS, prefix / 2)
        read, predicted = (n * each for each in CANDIDATE_SCORED)
        return self.stage(name, memory, both, singles, self.scoring(read, predicted, prefix / 2))

    def train(self, iteration: int) -> StageCost:
        dpo, lora = self.config.dpo, self.config.lora
        each = PAIR_DISTINCT + self.question_tokens
        seen = dpo.steps * dpo.batch_size
        forwards = 3 if dpo.gradient_checkpointing else 2
        flops = forwards * self.flops(seen * each, seen * PAIR_PREDICTED, each)
        flops += 6 * seen * each * self.shape.lora_parameters(lora)
        at_once = min(dpo.micro_batch_size, max(1, dpo.batch_size // self.device.count))
        # A backward pass launches twice what a forward pass does, and moves the weights once.
        passes = seen / at_once * (forwards + 1)
        held_out = self.questions * self.config.questions.held_out
        measured = self.questions + held_out * (dpo.steps // dpo.evaluate_every + 1)
        reference = self.scoring(measured * each, measured * PAIR_PREDICTED, each)
        memory = training_memory(
            self.shape,
            lora,
            dpo,
            self.device,
            dtype=self.device.dtype,
            quantization=stored_quantization(self.config, self.device),
            pair_tokens=each,
        )
        name = f"train, iteration {iteration}"
        return self.stage(name, memory, ("train", seen * each, flops, passes), reference)

    def signals(self, name: str) -> StageCost:
        memory = inference_memory(self.config, self.shape, self.device, write=True)
        held_out = max(1, round(self.questions * self.config.questions.held_out))
        each = PAIR_DISTINCT + self.question_tokens
        read = self.scoring(3 * held_out * each, 3 * held_out * PAIR_PREDICTED, each)
        asked = min(held_out, SIGNAL_ANSWERS)
        prompt = self.question_tokens + TEMPLATE_TOKENS
        return self.stage(name, memory, self.decode(asked, prompt, SIGNAL_TOKENS, 0), read)

    def evaluate(self, name: str, benchmark: str) -> StageCost:
        items, tokens, predicted = BENCHMARK_WORK[benchmark]
        items = min(items, self.config.evaluation.limit or items)
        memory = inference_memory(self.config, self.shape, self.device, write=False)
        context = 256 if tokens < 400 else 1024  # a primer, or several demonstrations
        if benchmark == "truthfulqa_gen":
            work = self.decode(items, tokens - predicted, predicted, 180)
        else:
            work = self.scoring(items * tokens, items * predicted, context)
        return self.stage(name, memory, work)


def estimate(
    config: Config, device: Device, *, shape: Shape | None = None, questions: int | None = None
) -> list[StageCost]:
    """Return the cost of every stage of a run with all its rounds, in the order of the plan.

    Args:
        config: the settings.
        device: what it would run on.
        shape: of the model; None for the configured one's.
        questions: how many; None for the configured ones.

    Raises:
        ModelError: the model's shape is not known.
        DataError: the number of questions is not known.
    """
    shape = shape or shape_of(config.model)
    count = question_count(config) if questions is None else questions
    setting = _Setting(config, shape, device, count)
    rounds = range(config.loop.iterations)
    plan = []
    for t in rounds:
        plan.append(setting.write_pairs(t))
        if t == 0:
            plan.append(setting.signals("measure base on held-out pairs"))
        plan.append(setting.train(t))
        plan.append(setting.signals(f"measure on held-out pairs, iteration {t}"))
    shown = rounds if config.evaluation.every_iteration else rounds[-1:]
    for label in ["base", *(f"iter_{t}" for t in shown)]:
        for name in config.evaluation.benchmarks:
            plan.append(setting.evaluate(f"evaluate {label} on {name}", name))
    return plan


def total(stages: Sequence[StageCost], name: str = "total") -> StageCost:
    """Add stages up; memory is the highest of any."""
    return StageCost(
        name,
        *(sum(getattr(s, key) for s in stages) for key in ("tokens", "flops", "moved")),
        memory=max((s.memory for s in stages), default=0.0),
        seconds=sum(s.seconds for s in stages),
    )


def show_seconds(seconds: float) -> str:
    """Return a duration as people say it: ``40 s``, ``3.5 min``, ``2.1 h``, ``5 days``."""
    for limit, unit, name in ((90, 1, "s"), (5400, 60, "min"), (172_800, 3600, "h")):
        if seconds < limit:
            value = seconds / unit
            return f"{value:.0f} {name}" if value >= 10 or unit == 1 else f"{value:.1f} {name}"
    return f"{seconds / 86_400:.0f} days"


# --- the table -----------------------------------------------------------------------------------

TABLE_MODELS = (
    (SMOLLM2_135M, "none"),
    (SMOLLM2_1_7B, "nf4"),
    (LLAMA2_7B, "nf4"),
    (LLAMA2_70B, "nf4"),
)


def scale_table() -> tuple[list[str], list[list[str]]]:
    """Return (columns, rows): memory, and time for the paper's recipe and for the course's.

    A cell reads ``paper's recipe / course's recipe``; every stage is counted, evaluation too.
    """
    columns = ["model", "weights", "memory, one GPU (GiB)", *(d.name for d in DEVICES.values())]
    rows = []
    for shape, quantization in TABLE_MODELS:
        recipes = [
            load_config(name, {"model.quantization": quantization})
            for name in ("paper-llama2", "cpu")
        ]
        cells, memory = [], 0.0
        for device in DEVICES.values():
            both = [total(estimate(config, device, shape=shape)) for config in recipes]
            highest = max(cost.memory for cost in both)
            memory = max(memory, highest)
            fits = highest <= device.memory
            times = " / ".join(show_seconds(cost.seconds) for cost in both)
            cells.append(times if fits else "does not fit")
        stored = "16-bit" if quantization == "none" else quantization.upper()
        rows.append([shape.name, stored, f"{memory / GIB:.1f}", *cells])
    return columns, rows


def scale_markdown() -> str:
    """Return the table for README.md (a test holds the two together)."""
    columns, rows = scale_table()
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


# --- what was measured ---------------------------------------------------------------------------


def compare_with_measurements() -> list[tuple[str, str, float, float]]:
    """Return (what, unit, measured, predicted) for each line of ``measurements.jsonl``."""
    return [
        (row["what"], row["unit"], float(row["measured"]), _predict(row))
        for row in read_jsonl(MEASUREMENTS)
    ]


def _predict(row: dict[str, Any]) -> float:
    """Predict one measurement from its settings."""
    if row["device"] in DEVICES:
        device = DEVICES[row["device"]]
    else:
        device = cpu_device(row["peak"], 24 * GIB)
    config = load_config("cpu", row.get("settings", {}))
    shape = shape_of(config.model)
    setting = _Setting(config, shape, device, question_count(config))
    kind = row["kind"]
    if kind == "dpo step":
        dpo = config.dpo
        flops = (3 if dpo.gradient_checkpointing else 2) * setting.flops(
            dpo.batch_size * row["pair_tokens"],
            dpo.batch_size * row["pair_predicted"],
            row["pair_tokens"],
        )
        passes = dpo.batch_size / dpo.micro_batch_size * 3
        return setting.seconds("train", flops, passes)
    if kind == "training memory":
        parts = training_memory(
            shape,
            config.lora,
            config.dpo,
            device,
            dtype=device.dtype,
            quantization=stored_quantization(config, device),
            pair_tokens=row["pair_tokens"],
        )
        return sum(parts.values()) / GIB
    if kind == "scoring":
        _, tokens, predicted = BENCHMARK_WORK[row["benchmark"]]
        work = setting.scoring(row["items"] * tokens, row["items"] * predicted, 256)
        return setting.seconds(work[0], work[2], work[3])
    if kind == "pairs":
        return setting.write_pairs(0).seconds
    return total(estimate(config, device)).seconds  # a whole run
