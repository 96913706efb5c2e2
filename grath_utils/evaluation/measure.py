"""Measure a model on a benchmark: scores, metrics with intervals, controls, one JSON file.

The result, schema version 1 (all values are fractions; percent is for display)::

    schema_version, benchmark, protocol, source, n, total, seed, limit, data_fingerprint
    model        name, fingerprint, quantization, dtype, device
    metrics      NAME -> value, ci95 [low, high], n
    controls     question-blind RULE -> value (multiple choice only)
    per_category CATEGORY -> METRIC -> value, n (where the benchmark has categories)
    calibration  ece, bins, selective_accuracy (multiple choice only)
    answers      mean_words, median_words, mean_tokens, most_common (generation only)
    notes        what a reader must know to read the numbers right
    items        id, category, metrics; labels, scores (summed log-probabilities) and tokens of
                 each choice, or the answer
    cost         seconds, tokens (fed one sequence for each answer), distinct_tokens (the floor),
                 computed_tokens, peak_memory_mib

A stopped evaluation resumes: its finished passes are kept in a journal beside the output.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from grath_utils.engine import processes
from grath_utils.engine.scoring import Plan, Score, plan_requests, run_plan
from grath_utils.errors import UsageError
from grath_utils.evaluation import blind_rules as question_blind
from grath_utils.evaluation.benchmarks import Benchmark, Item, load_benchmark
from grath_utils.evaluation.metrics import (
    accuracy_metrics,
    choice_probabilities,
    truthfulqa_metrics,
)
from grath_utils.evaluation.protocols import Protocol, build_requests, find_protocol
from grath_utils.evaluation.statistics import (
    expected_calibration_error,
    paired_difference,
    reliability,
    selective_accuracy,
    summarize,
)
from grath_utils.files import Journal, fingerprint, write_json

if TYPE_CHECKING:
    from grath_utils.engine.models import Policy

SCHEMA_VERSION = 1
TRUTHFULQA_LIKE = ("truthfulqa_mc", "probe")
METRICS: dict[str, tuple[str, ...]] = {
    "truthfulqa_mc": ("mc1", "mc2", "mc3"),
    "probe": ("mc1", "mc2", "mc3"),
    "truthfulqa_binary": ("acc",),
    "arc_challenge": ("acc", "acc_norm"),
    "hellaswag": ("acc", "acc_norm"),
    "mmlu": ("acc",),
    "retention": ("acc", "acc_norm"),
}
"""Metrics of the multiple-choice benchmarks, the headline first (acc_norm for ARC, HellaSwag)."""


def evaluate(
    policy: Policy,
    benchmark: str | Benchmark,
    *,
    protocol: str | None = None,
    limit: int | None = None,
    seed: int = 0,
    batch_tokens: int = 4096,
    bootstrap: int = 2000,
    out: Path | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Measure ``policy`` on a benchmark and return the result described above.

    Args:
        policy: the model.
        benchmark: a name, or a benchmark that is already loaded (then ``limit`` is its own).
        protocol: how questions are put; None for the benchmark's default.
        limit: use this many items, drawn by the seed.
        seed: of the draw and of the bootstrap.
        batch_tokens: tokens scored together.
        bootstrap: resamples behind each interval.
        out: write the result there, atomically, and resume from what was left beside it.
        progress: show a bar with the remaining time.

    Raises:
        UsageError: unknown benchmark or protocol.
        DataError, FetchError: the data cannot be had.
        ScoringError: an item cannot be scored, or a score is not finite.
    """
    if isinstance(benchmark, str):
        benchmark = load_benchmark(benchmark, limit=limit, seed=seed)
    chosen = find_protocol(benchmark.name, protocol)
    if benchmark.name == "truthfulqa_gen":
        from grath_utils.evaluation.free_answers import evaluate_answers

        measured = evaluate_answers(policy, benchmark, chosen, out=out, progress=progress)
    else:
        measured = _evaluate_choices(
            policy, benchmark, chosen, batch_tokens=batch_tokens, out=out, progress=progress
        )
    items = measured.pop("items")
    names = list(items[0]["metrics"])
    result = {
        "schema_version": SCHEMA_VERSION,
        "benchmark": benchmark.name,
        "protocol": chosen.name,
        "source": benchmark.source,
        "n": len(items),
        "total": benchmark.total,
        "seed": seed,
        "limit": benchmark.limit,
        "data_fingerprint": benchmark.fingerprint,
        "model": describe_model(policy),
        "metrics": {
            name: summarize([item["metrics"][name] for item in items], bootstrap, seed)
            for name in names
        },
        "controls": {},
        "per_category": per_category(items, names),
        **measured,
        "items": items,
    }
    if benchmark.name != "truthfulqa_gen":
        result["controls"] = control_values(benchmark.items)
        result["notes"] += explained_by_rules(result["metrics"], result["controls"])
    # Seconds and memory are the main process's in all of them.
    return processes.on_main(lambda: _keep(result, out))


def _keep(result: dict[str, Any], out: Path | None) -> dict[str, Any]:
    if out is not None:
        write_json(out, result)
        Journal.beside(out, "").remove()
    return result


def describe_model(policy: Policy) -> dict[str, Any]:
    """Return what identifies the measured model."""
    return {
        "name": policy.name,
        "fingerprint": policy.fingerprint,
        "quantization": policy.config.quantization,
        "dtype": policy.config.dtype,
        "device": policy.config.device,
    }


# --- multiple choice -----------------------------------------------------------------------------


def _evaluate_choices(
    policy: Policy,
    benchmark: Benchmark,
    protocol: Protocol,
    *,
    batch_tokens: int,
    out: Path | None,
    progress: bool,
) -> dict[str, Any]:
    started = time.perf_counter()
    requests = build_requests(benchmark, protocol, policy.tokenizer)
    flat = [request for group in requests for request in group]
    plan = plan_requests(policy, flat, batch_tokens=batch_tokens)
    identity = fingerprint(
        [
            SCHEMA_VERSION,
            policy.fingerprint,
            str(policy.device),
            benchmark.fingerprint,
            protocol.name,
            [[block.first, block.last] for block in plan.blocks],
            [e.inputs[-8:].tolist() for e in plan.encoded],
        ]
    )
    journal = Journal.beside(out if processes.is_main() else None, identity)
    done = processes.on_main(journal.read)
    with tqdm(
        total=plan.work.computed,
        desc=f"{benchmark.name} ({policy.name})",
        unit="tok",
        unit_scale=True,
        disable=not (progress and processes.is_main()),
        initial=sum(len(plan.blocks[number].nodes) for number in done),
    ) as bar:

        def on_batch(number: int, values: list[float], tokens: int) -> None:
            journal.append(number, values)
            bar.update(tokens)

        scores = run_plan(policy, flat, plan, done=done, on_batch=on_batch, split=True)
    seconds = time.perf_counter() - started
    rows = iter(scores)
    items = [
        _item_result(benchmark.name, item, [next(rows) for _ in group])
        for item, group in zip(benchmark.items, requests, strict=True)
    ]
    return {
        "calibration": calibration(benchmark.items, items),
        "notes": _notes(benchmark, plan, scores),
        "cost": {
            "seconds": round(seconds, 3),
            "resumed": bool(done),
            "tokens": plan.work.naive,
            "distinct_tokens": plan.work.distinct,
            "computed_tokens": plan.work.computed,
            "peak_memory_mib": peak_memory_mib(policy),
        },
        "items": items,
    }


def _item_result(benchmark: str, item: Item, scores: Sequence[Score]) -> dict[str, Any]:
    logprobs = [score.logprob for score in scores]
    if benchmark in TRUTHFULQA_LIKE:
        values = truthfulqa_metrics(item, logprobs)
    else:
        values = accuracy_metrics(item, logprobs)
    return {
        "id": item.id,
        "category": item.category,
        "labels": list(item.labels),
        "scores": logprobs,
        "tokens": [score.tokens for score in scores],
        "metrics": {name: values[name] for name in METRICS[benchmark]},
    }


def _notes(benchmark: Benchmark, plan: Plan, scores: Sequence[Score]) -> list[str]:
    notes = list(benchmark.notes)
    straddling = sum(score.straddles for score in scores)
    if straddling:
        notes.append(
            f"in {straddling} of {len(scores)} answers a token spans the end of the prompt; split "
            "as lm-eval does"
        )
    if plan.method == "plain":
        notes.append("scored one sequence at a time: this model takes no tree-shaped masks")
    return notes


def calibration(items: Sequence[Item], results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return how far the choices' probabilities (MC1 form, normalised) can be believed."""
    confidence, correct = [], []
    for item, result in zip(items, results, strict=True):
        probabilities = choice_probabilities(item, result["scores"])
        confidence.append(max(probabilities))
        correct.append(result["metrics"].get("mc1", result["metrics"].get("acc")))
    return {
        "ece": expected_calibration_error(confidence, correct),
        "bins": reliability(confidence, correct),
        "selective_accuracy": selective_accuracy(confidence, correct),
    }


def per_category(
    items: Sequence[Mapping[str, Any]], names: Sequence[str]
) -> dict[str, dict[str, dict[str, float]]]:
    """Return each metric's mean in each category, in the order of the data."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for item in items:
        if item["category"] is not None:
            groups.setdefault(item["category"], []).append(item)
    return {
        category: {
            name: {
                "value": sum(item["metrics"][name] for item in group) / len(group),
                "n": len(group),
            }
            for name in names
        }
        for category, group in groups.items()
    }


# --- controls ------------------------------------------------------------------------------------


def control_values(items: Sequence[Item]) -> dict[str, float]:
    """Return what each question-blind rule scores on the same items."""
    rows = [
        {"mc1_targets": _targets(item, item.mc1), "mc2_targets": _targets(item, item.mc2)}
        for item in items
    ]
    return {
        name: sum(values) / len(values) for name, values in question_blind.controls(rows).items()
    }


def _targets(item: Item, indices: Sequence[int]) -> dict[str, list[Any]]:
    return {
        "choices": [item.choices[i] for i in indices],
        "labels": [item.labels[i] for i in indices],
    }


def explained_by_rules(
    metrics: Mapping[str, Mapping[str, Any]], rules: Mapping[str, float]
) -> list[str]:
    """Return a note for each metric whose interval does not lie above the best rule."""
    notes = []
    for name, metric in metrics.items():
        if name == "mc2":
            rule = question_blind.UNIFORM_MC2
        elif name in ("mc1", "acc", "acc_norm"):
            rule = max(question_blind.RULES, key=lambda r: rules[r])
        else:
            continue
        if rules[rule] >= metric["ci95"][0]:
            notes.append(
                f"{name} {100 * metric['value']:.1f} % is explained by question-blind rules: "
                f"{rule.replace('_', ' ')} reaches {100 * rules[rule]:.1f} %, and the interval "
                f"starts at {100 * metric['ci95'][0]:.1f} %"
            )
    return notes


def peak_memory_mib(policy: Policy) -> float | None:
    """Return the highest memory use so far: of the GPU, or of this process; None if unknown."""
    import torch

    if policy.device.type == "cuda":
        return round(torch.cuda.max_memory_allocated() / 2**20, 1)
    try:
        import resource
        import sys
    except ImportError:  # Windows
        return None
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(used / (2**20 if sys.platform == "darwin" else 2**10), 1)


# --- before and after ----------------------------------------------------------------------------

MUST_MATCH = ("benchmark", "protocol", "data_fingerprint")


def compare(
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    *,
    bootstrap: int = 2000,
    seed: int = 0,
) -> dict[str, Any]:
    """Compare two results on the same items.

    Returns:
        ``benchmark``, ``n``, ``models`` and for each metric what
        :func:`.statistics.paired_difference` returns: the change with its paired
        interval and p-value (exact McNemar for 0/1 metrics).

    Raises:
        UsageError: the results differ in benchmark, protocol, data or items.
    """
    for key in MUST_MATCH:
        if before[key] != after[key]:
            raise UsageError(
                f"the two results cannot be compared: {key} is {before[key]!r} in one and "
                f"{after[key]!r} in the other"
            )
    first, second = before["items"], after["items"]
    if [item["id"] for item in first] != [item["id"] for item in second]:
        raise UsageError("the two results cannot be compared: they are of different items")
    return {
        "benchmark": before["benchmark"],
        "n": len(first),
        "models": [before["model"]["name"], after["model"]["name"]],
        "metrics": {
            name: paired_difference(
                [item["metrics"][name] for item in first],
                [item["metrics"][name] for item in second],
                bootstrap,
                seed,
            )
            for name in before["metrics"]
        },
    }
