"""Measure a model on a benchmark: scores, metrics with intervals, controls, one JSON file.

The result, schema version 1 (all values are fractions; percent is for display)::

    schema_version, benchmark, protocol, source, n, total, seed, limit, bootstrap (resamples),
    data_fingerprint
    model        name, fingerprint, quantization, dtype, device; where it is quantized, quantized:
                 matrices and weights that are, and of how many (engine/quantization.py)
    metrics      NAME -> value, ci95 [low, high] (None for a single item), n
    controls     question-blind RULE -> value (multiple choice only)
    per_category CATEGORY -> METRIC -> value, n (where the benchmark has categories)
    calibration  ece, bins, selective_accuracy (multiple choice only)
    answers      mean_words, median_words, mean_tokens, most_common (free answers only)
    notes        what a reader must know to read the numbers right
    items        id, category, metrics; labels, scores (summed log-probabilities) and tokens of
                 each choice, or the answer
    cost         seconds, tokens (fed one sequence for each answer), distinct_tokens (the floor),
                 computed_tokens, peak_memory_mib

A stopped evaluation resumes: its finished passes are kept in a journal beside the output.
"""

from __future__ import annotations

import math
import sys
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from grath_utils.config import config_from_dict
from grath_utils.engine import processes
from grath_utils.errors import DataError, ScoringError, UsageError
from grath_utils.evaluation import statistics
from grath_utils.evaluation.benchmarks import BENCHMARKS, load_benchmark
from grath_utils.evaluation.benchmarks.base import Benchmark, Protocol
from grath_utils.evaluation.blind_rules import RULES, UNIFORM_MC2, blind_rule_scores
from grath_utils.evaluation.protocols import build_requests, find_protocol
from grath_utils.files import Journal, check_output, fingerprint, read_json, write_json

if TYPE_CHECKING:
    from grath_utils.engine.models import Policy

SCHEMA_VERSION = 1
RESULT = {  # what is read of a result again, as a form for files.read_json
    "benchmark": str,
    "protocol": str,
    "data_fingerprint": str,
    "n": int,
    "metrics": {str: {"value": float, "ci95": ([float, float], None), "n": int}},
    "controls": ({str: float}, None),
    "notes": ([str], None),
    "model": {"name": str},
    "items": [{"id": str, "metrics": dict}],
}


def check_out(out: Path) -> None:
    """Check that :func:`evaluate` may write its result, see :func:`.files.check_output`."""
    check_output(out, read_json, ("benchmark", "protocol", "metrics", "items"))


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
        benchmark: a name, or a benchmark that is already loaded (then ``limit`` is its own).
        protocol: how questions are put; None for the benchmark's default.
        limit: use this many items, drawn by the seed.
        batch_tokens: tokens scored together.
        bootstrap: resamples behind each interval.
        out: write the result there, atomically, and resume from what was left beside it.

    Raises:
        ConfigError: a number is not one that the settings of the same name may have.
        UsageError: unknown benchmark or protocol; or ``out`` is something else than a result.
        DataError, FetchError: the data cannot be had.
        ScoringError: an item cannot be scored, or a score is not finite.
    """
    settings = {"bootstrap": bootstrap, "batch_tokens": batch_tokens}
    config_from_dict({"seed": seed, "evaluation": settings}, where="evaluate")
    if out is not None:
        processes.on_main(lambda: check_out(out))
    if isinstance(benchmark, str):
        benchmark = load_benchmark(benchmark, limit=limit, seed=seed)
    chosen, spec = find_protocol(benchmark.name, protocol), BENCHMARKS[benchmark.name]
    if not benchmark.items:
        raise DataError(f"{benchmark.name} holds no item")
    started = time.perf_counter()
    if spec.score is None:
        from grath_utils.evaluation.free_answers import evaluate_answers

        found = evaluate_answers(policy, benchmark, chosen, out=out, progress=progress)
        rules = {}
    else:
        found = _evaluate_choices(
            policy, benchmark, chosen, batch_tokens=batch_tokens, out=out, progress=progress
        )
        scores = blind_rule_scores(benchmark.items)
        rules = {name: sum(values) / len(values) for name, values in scores.items()}
    items, about, notes, cost = found
    seconds = round(time.perf_counter() - started, 3)
    metrics = {}
    for name in spec.metrics:
        values, how = metric_values(benchmark.name, items, name), {"bounds": _bounds(name)}
        metrics[name] = statistics.summarize(values, bootstrap, seed, **how, single=True)
    if len(items) == 1:
        notes = [*notes, "a single item gives no interval"]
    result = {
        "schema_version": SCHEMA_VERSION,
        "benchmark": benchmark.name,
        "protocol": chosen.name,
        "source": benchmark.source,
        "n": len(items),
        "total": benchmark.total,
        "seed": seed,
        "limit": benchmark.limit,
        "bootstrap": bootstrap,
        "data_fingerprint": benchmark.fingerprint,
        "model": {
            "name": policy.name,
            "fingerprint": policy.fingerprint,
            "quantization": policy.config.quantization,
            **({"quantized": asdict(policy.quantized)} if policy.quantized else {}),
            "dtype": policy.config.dtype,
            "device": policy.config.device,
        },
        "metrics": metrics,
        "controls": rules,
        "per_category": _per_category(items, spec.metrics),
        **about,
        "notes": [*benchmark.notes, *notes, *not_above_rules(metrics, rules)],
        "cost": {"seconds": seconds, **cost},
        "items": items,
    }

    def keep() -> dict[str, Any]:
        if out is not None:
            write_json(out, result)
            Journal.beside(out, "").remove()
        return result

    return processes.on_main(keep)  # seconds and memory are the main process's in all of them


def _evaluate_choices(
    policy: Policy,
    benchmark: Benchmark,
    protocol: Protocol,
    *,
    batch_tokens: int,
    out: Path | None,
    progress: bool,
) -> tuple[list[dict[str, Any]], dict[str, Any], list[str], dict[str, Any]]:
    """Score every choice; return items, calibration, notes and cost."""
    # Results are read and compared without loading what computes.
    from scipy.special import softmax

    from grath_utils.engine.scoring import plan_requests, run_plan

    spec = BENCHMARKS[benchmark.name]
    requests = list(chain(*build_requests(benchmark, protocol, policy.tokenizer)))
    plan = plan_requests(policy, requests, batch_tokens=batch_tokens)
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
    sizes = [(edges := plan.own_edges(block)).stop - edges.start for block in plan.blocks]
    done = processes.on_main(lambda: journal.read(sizes, float))
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

        scores = run_plan(policy, requests, plan, done=done, on_batch=on_batch, split=True)
    rest, items, confidence, correct = iter(scores), [], [], []
    for item in benchmark.items:
        own = list(islice(rest, len(item.choices)))
        logprobs = [score.logprob for score in own]
        values = spec.score(item, logprobs)
        items.append(
            {
                "id": item.id,
                "category": item.category,
                "labels": list(item.labels),
                "scores": logprobs,
                "tokens": [score.tokens for score in own],
                "metrics": {name: values[name] for name in spec.metrics},
            }
        )
        confidence.append(float(softmax([logprobs[i] for i in item.mc1]).max()))
        correct.append(values["mc1" if "mc1" in values else "acc"])
    notes = []
    if straddling := sum(score.straddles for score in scores):
        notes.append(
            f"in {straddling} of {len(scores)} answers a token spans the end of the prompt; split "
            "as lm-eval does"
        )
    if plan.method == "plain":
        notes.append("scored one sequence at a time: this model takes no tree-shaped masks")
    cost = {
        "resumed": bool(done),
        "tokens": plan.work.naive,
        "distinct_tokens": plan.work.distinct,
        "computed_tokens": plan.work.computed,
        "peak_memory_mib": _peak_memory_mib(policy),
    }
    return items, {"calibration": statistics.calibration(confidence, correct)}, notes, cost


def metric_values(benchmark: str, items: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    """Return a metric of each item of a result.

    Raises:
        ScoringError: items have none, or one that is not finite; they are named.
    """
    values = [item["metrics"].get(name) for item in items]
    bad = [
        str(item["id"])
        for item, value in zip(items, values, strict=True)
        if not isinstance(value, (int, float)) or not math.isfinite(value)
    ]
    if bad:
        named = ", ".join(bad[:5]) + (", ..." if len(bad) > 5 else "")
        raise ScoringError(f"{benchmark}: {name} of {len(bad)} items is not finite: {named}")
    return values


def _bounds(metric: str) -> tuple[float, float]:
    """Return what a metric of an item can be: a fraction, or a difference of two."""
    return (-1.0, 1.0) if metric.endswith("_diff") else statistics.FRACTION


def _per_category(items: Sequence[dict[str, Any]], names: Sequence[str]) -> dict[str, Any]:
    """Return each metric's mean in each category, in the order of the data."""
    groups = defaultdict(list)
    for item in items:
        if item["category"] is not None:
            groups[item["category"]].append(item["metrics"])
    return {
        group: {n: {"value": sum(r[n] for r in rows) / len(rows), "n": len(rows)} for n in names}
        for group, rows in groups.items()
    }


def not_above_rules(
    metrics: Mapping[str, Mapping[str, Any]], rules: Mapping[str, float]
) -> list[str]:
    """Return a note for each metric whose interval does not lie above the best rule."""
    if not rules:
        return []
    best = max(RULES, key=rules.__getitem__)
    rivals = {"mc1": best, "mc2": UNIFORM_MC2, "acc": best, "acc_norm": best}
    return [
        f"{name} {100 * metric['value']:.1f} % is not above question-blind rules: "
        f"{rivals[name].replace('_', ' ')} reaches {100 * rules[rivals[name]]:.1f} %, and the "
        f"interval starts at {100 * metric['ci95'][0]:.1f} %"
        for name, metric in metrics.items()
        if name in rivals and metric["ci95"] and rules[rivals[name]] >= metric["ci95"][0]
    ]


def _peak_memory_mib(policy: Policy) -> float | None:
    """Return the highest memory use so far: of the GPU, or of this process; None if unknown."""
    if policy.device.type == "cuda":
        import torch

        return round(torch.cuda.max_memory_allocated() / 2**20, 1)
    try:
        import resource
    except ImportError:  # Windows
        return None
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(used / (2**20 if sys.platform == "darwin" else 2**10), 1)


def check_comparable(before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    """Check that two results are of the same items, asked in the same way.

    Raises:
        UsageError: they differ in benchmark, protocol, items, their order, data, or metrics.
    """
    differ = "the two results cannot be compared"
    first, second = ([item["id"] for item in result["items"]] for result in (before, after))
    for key in ("benchmark", "protocol", "data_fingerprint"):
        if key == "data_fingerprint" and first != second:
            order = " in another order" if sorted(first) == sorted(second) else ""
            raise UsageError(
                f"{differ}: they are of different items{order} ({len(first)} in one, "
                f"{len(second)} in the other, {len({*first} & {*second})} in both); measure both "
                "with the same limit and seed"
            )
        if before[key] != after[key]:
            raise UsageError(
                f"{differ}: {key} is {before[key]!r} in one and {after[key]!r} in the other"
            )
    if before["metrics"].keys() != after["metrics"].keys():
        raise UsageError(f"{differ}: they have different metrics")


def compare(
    before: Mapping[str, Any], after: Mapping[str, Any], *, bootstrap: int = 2000, seed: int = 0
) -> dict[str, Any]:
    """Compare two results on the same items.

    The result has ``benchmark``, ``n``, ``models`` and, for each metric, what
    :func:`.statistics.paired_difference` says of the change.

    Raises:
        UsageError: the results differ in benchmark, protocol, items or data.
        ScoringError: a metric of an item is missing or not finite.
    """
    check_comparable(before, after)
    both, metrics = (before, after), {}
    for name in before["metrics"]:
        values = [metric_values(before["benchmark"], result["items"], name) for result in both]
        how = {"bounds": _bounds(name), "single": True}
        metrics[name] = statistics.paired_difference(*values, bootstrap, seed, **how)
    return {
        "benchmark": before["benchmark"],
        "n": len(before["items"]),
        "models": [result["model"]["name"] for result in both],
        "metrics": metrics,
    }
