"""Multiple-choice scoring against lm-evaluation-harness, side by side in one process.

Same machine, model object, dtype, threads and rows; lm-eval with the fastest of several batch
sizes. Both times are those of the whole evaluation, from rows to metrics (ours with intervals and
controls). Needs a mirror (GRATH_MIRROR) and lm-eval; saves nothing.

    GRATH_MIRROR=DIR python tests/benchmarks/bench_scoring.py
    GRATH_MIRROR=DIR python tests/benchmarks/bench_scoring.py --truthfulqa 40 --only truthfulqa
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import io
import logging
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")
ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "evaluation")]

import lm_eval_tasks as harness  # noqa: E402
import numpy as np  # noqa: E402
import psutil  # noqa: E402
import torch  # noqa: E402

from grath_utils.engine.models import Policy  # noqa: E402
from grath_utils.evaluation.benchmarks import mmlu  # noqa: E402
from grath_utils.evaluation.measure import evaluate  # noqa: E402
from grath_utils.files import mirror_dir  # noqa: E402
from grath_utils.loop.named_models import load_policy  # noqa: E402

SUBJECTS = ("anatomy", "high_school_us_history", "marketing", "professional_law")


def main() -> None:
    options = parse()
    mirror = mirror_dir()
    if mirror is None:
        sys.exit("set GRATH_MIRROR to a benchmark mirror")
    if options.threads:
        torch.set_num_threads(options.threads)
    for dtype in options.dtype:
        policy = load_policy(options.model, dtype=dtype, device=options.device)
        print(
            f"\n{policy.name}, {dtype}, {policy.device}, {torch.get_num_threads()} threads, "
            f"bare forward pass: {bare_rate(policy):,.0f} tokens/s",
            flush=True,
        )
        rows = []
        for case in cases(options):
            with tempfile.TemporaryDirectory() as scratch:
                folder = harness.small_mirror(mirror, Path(scratch), case["sizes"])
                with (
                    mock.patch.dict(os.environ, GRATH_MIRROR=str(folder)),
                    mock.patch.object(mmlu, "SUBJECTS", SUBJECTS),
                ):
                    rows.append(measure(policy, folder, case, options.batch_sizes))
            print(line(rows[-1]), flush=True)
        print("\n" + table(rows, dtype), flush=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="default")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", nargs="+", default=["bfloat16"])
    parser.add_argument("--threads", type=int)
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 4, 8, 16, 32])
    parser.add_argument("--only", nargs="+", help="truthfulqa, arc_challenge, hellaswag, mmlu")
    parser.add_argument("--truthfulqa", type=int, help="questions; all of the mirror by default")
    parser.add_argument("--items", type=int, default=16, help="items of each other benchmark")
    return parser.parse_args()


def cases(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return what to compare: our benchmark and protocol, lm-eval's tasks, and the rows."""
    n = options.items
    few = {"truthful_qa/multiple_choice/validation.jsonl": options.truthfulqa}
    arc = {"ai2_arc/ARC-Challenge/test.jsonl": n, "ai2_arc/ARC-Challenge/train.jsonl": None}
    swag = {"hellaswag/validation.jsonl": n, "hellaswag/train.jsonl": None}
    each = max(n // len(SUBJECTS), 1)
    tests: dict[str, int | None] = {f"mmlu/{s}/dev.jsonl": None for s in SUBJECTS}
    tests |= {f"mmlu/{s}/test.jsonl": each for s in SUBJECTS}
    rows = [
        ("truthfulqa", "truthfulqa_mc", ["truthfulqa_mc1", "truthfulqa_mc2"], 0, few),
        ("arc_challenge", "arc_challenge", ["arc_challenge"], 25, arc),
        ("hellaswag", "hellaswag", ["hellaswag"], 10, swag),
        ("mmlu", "mmlu", [f"mmlu_{s}" for s in SUBJECTS], 5, tests),
    ]
    keys = ("name", "benchmark", "tasks", "shots", "sizes")
    found = [dict(zip(keys, row, strict=True)) for row in rows]
    return [case for case in found if not options.only or case["name"] in options.only]


def measure(
    policy: Policy, folder: Path, case: dict[str, Any], batch_sizes: list[int]
) -> dict[str, Any]:
    """Run both sides, each in its own peak of memory."""
    tasks = [harness.task(folder, name) for name in case["tasks"]]
    evaluate(policy, case["benchmark"], limit=2, progress=False)  # both sides start warm
    ours, our_seconds, our_peak = timed(lambda: evaluate(policy, case["benchmark"], progress=False))
    with quiet():
        trials = {
            size: timed(lambda s=size: harness.run(policy, tasks, case["shots"], s, limit=3))[1]
            for size in batch_sizes
        }
        best = min(trials, key=trials.__getitem__)
        theirs, their_seconds, their_peak = timed(
            lambda: harness.run(policy, tasks, case["shots"], best)
        )
    return {
        "name": case["name"],
        "n": ours["n"],
        "lm_eval_s": their_seconds,
        "batch": best,
        "ours_s": our_seconds,
        "ratio": their_seconds / our_seconds,
        "their_peak": their_peak,
        "our_peak": our_peak,
        "their_tokens": fed_by_lm_eval(policy, theirs),
        "cost": ours["cost"],
        "rate": bare_rate(policy),
        "difference": largest_difference(ours, theirs, case["tasks"]),
        "metrics": metric_pairs(ours, theirs, case["tasks"]),
    }


def timed(work: Callable[[], Any]) -> tuple[Any, float, float]:
    """Return the result, the seconds, and the highest resident memory meanwhile, in MiB."""
    give_back_memory()
    process, peak, over = psutil.Process(), [0], threading.Event()

    def watch() -> None:
        while not over.wait(0.05):
            peak[0] = max(peak[0], process.memory_info().rss)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    start = time.perf_counter()
    result = work()
    seconds = time.perf_counter() - start
    over.set()
    watcher.join()
    return result, seconds, peak[0] / 2**20


def give_back_memory() -> None:
    """Hand freed memory back to the system, so that the next peak is not this one's."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # glibc only
        ctypes.CDLL("libc.so.6").malloc_trim(0)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    logging.disable(logging.WARNING)
    with contextlib.redirect_stderr(io.StringIO()):
        yield
    logging.disable(logging.NOTSET)


@torch.inference_mode()
def bare_rate(policy: Policy, row: int = 512, seconds: float = 2.0) -> float:
    """Return tokens a second of the model's own forward pass, logits at every place."""
    ids = torch.randint(100, policy.model.config.vocab_size, (1, row), device=policy.device)
    best, until = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < until:
        start = time.perf_counter()
        policy.model(ids, use_cache=False).logits[0, -1, -1].item()
        best = min(best, time.perf_counter() - start)
    return row / best


def fed_by_lm_eval(policy: Policy, theirs: dict[str, Any]) -> int:
    """Return the tokens of all its requests (those that differ in the last token count once)."""
    seen = {}
    for name, samples in theirs["samples"].items():
        texts = [pair for sample in samples for pair in sample["arguments"]]
        encoded = policy.tokenizer([a + b for a, b in texts])["input_ids"]
        for ids in encoded:
            seen[name, tuple(ids[:-1])] = len(ids) - 1
    return sum(seen.values())


def largest_difference(ours: dict[str, Any], theirs: dict[str, Any], tasks: list[str]) -> float:
    """Return the largest difference of two log-probabilities of the same answer, in nats."""
    samples = []
    for name in tasks[-1:] if tasks[0].startswith("truthfulqa") else tasks:
        samples += sorted(theirs["samples"][name], key=lambda s: s["doc_id"])
    return max(
        float(np.abs(np.subtract(harness.logprobs(sample), item["scores"])).max())
        for sample, item in zip(samples, ours["items"], strict=True)
    )


def metric_pairs(
    ours: dict[str, Any], theirs: dict[str, Any], tasks: list[str]
) -> list[tuple[str, float, float]]:
    """Return (metric, ours, lm-eval's)."""
    values = {name: metric["value"] for name, metric in ours["metrics"].items()}
    found = theirs["results"]
    if tasks[0].startswith("truthfulqa"):
        pairs = zip(("mc1", "mc2"), tasks, strict=True)
        return [(m, values[m], float(found[t]["acc,none"])) for m, t in pairs]
    counts = {task: len(theirs["samples"][task]) for task in tasks}
    return [
        (
            metric,
            value,
            sum(found[t][f"{metric},none"] * counts[t] for t in tasks) / sum(counts.values()),
        )
        for metric, value in values.items()
    ]


def line(row: dict[str, Any]) -> str:
    """Return one comparison in words."""
    cost = row["cost"]
    distinct, computed = cost["distinct_tokens"], cost["computed_tokens"]
    floor = distinct / row["rate"]
    metrics = ", ".join(f"{m} {100 * a:.2f} / {100 * b:.2f}" for m, a, b in row["metrics"])
    return (
        f"{row['name']}, {row['n']} items: ours {row['ours_s']:.1f} s, lm-eval "
        f"{row['lm_eval_s']:.1f} s (batch {row['batch']}), {row['ratio']:.1f} times faster\n"
        f"  tokens: lm-eval {row['their_tokens']:,}, distinct {distinct:,} (the floor: "
        f"{row['their_tokens'] / distinct:.1f} times fewer), ours {computed:,}\n"
        f"  floor at the rate of a bare forward pass {floor:.1f} s; ours takes "
        f"{row['ours_s'] / floor:.2f} of it\n"
        f"  ours / lm-eval: {metrics}; largest difference of a log-probability "
        f"{row['difference']:.1e}"
    )


def table(rows: list[dict[str, Any]], dtype: str) -> str:
    """Return the ratio table."""
    lines = [
        f"| {dtype} | items | lm-eval s | ours s | ratio | by tokens | peak MiB lm-eval | ours |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        by_tokens = row["their_tokens"] / row["cost"]["distinct_tokens"]
        numbers = [row["lm_eval_s"], row["ours_s"], row["ratio"], by_tokens]
        cells = [row["name"], row["n"], *(f"{x:.1f}" for x in numbers)]
        cells += [f"{row['their_peak']:.0f}", f"{row['our_peak']:.0f}"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
