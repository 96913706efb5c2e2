"""How fast pairs are generated, against the official way; run by `make bench`, not by pytest.

The official way asks one question at a time with ``model.generate``, the whole few-shot prompt
each time. Both get the same model, questions, machine and prompt (mode `paper`, greedy). The
answers must be the same: in float32 for at least 99 % of the questions; in bfloat16 rounding
decides close calls, so there the share is shown only.

    python tests/benchmarks/bench_generation.py --dtype float32 --questions 100
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch

from grath_utils.config import PairsConfig, QuestionsConfig
from grath_utils.engine.generation import generate
from grath_utils.engine.models import Policy
from grath_utils.files import write_json
from grath_utils.loop.named_models import load_policy
from grath_utils.pairs.modes import make_writer
from grath_utils.pairs.parsing import parse_pair
from grath_utils.pairs.prompts import token_ids
from grath_utils.pairs.questions import load_questions
from grath_utils.pairs.writers import Task

GOAL = 15.0  # times as fast as the official way, on a CPU
SAME = 0.99  # share of equal answers, in float32


def official(policy: Policy, prompts: list[list[int]], limit: int) -> tuple[list[str], float]:
    """One prompt at a time through transformers' own generate; return texts and seconds."""
    texts = []
    started = time.perf_counter()
    with torch.inference_mode():
        for ids in prompts:
            inputs = torch.tensor([ids], device=policy.device)
            out = policy.model.generate(
                inputs,
                attention_mask=torch.ones_like(inputs),
                max_new_tokens=limit,
                do_sample=False,
                pad_token_id=policy.tokenizer.pad_token_id,
            )
            texts.append(policy.tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True))
    return texts, time.perf_counter() - started


def answers(text: str) -> tuple[str | None, str | None]:
    """Return what the parser takes from a completion."""
    parsed = parse_pair(text)
    return parsed.correct, parsed.incorrect


def measure(policy: Policy, source: str, count: int, sequential: int, batch: int) -> dict:
    """Time both ways and compare their answers on the first ``sequential`` questions."""
    questions = load_questions(QuestionsConfig(source=source, limit=count), 0).questions
    config = PairsConfig(mode="paper", batch_size=batch)
    writer = make_writer(policy, config, 0)
    prompts = [token_ids(policy.tokenizer, writer.prompt(q, "pair")) for q in questions]
    generate(policy, prompts[:2], max_new_tokens=2)  # the trial of the model is not timed
    official(policy, prompts[:1], 2)

    started = time.perf_counter()
    writer = make_writer(policy, config, 0)  # the prefix is part of the price
    outcomes = writer.write([Task(q) for q in questions])
    ours = (time.perf_counter() - started) / len(questions)
    stop_early = writer.complete("pair", questions[:sequential])
    texts, seconds = official(policy, prompts[:sequential], config.max_new_tokens)
    theirs = seconds / sequential
    same = sum(answers(a) == answers(b.text) for a, b in zip(texts, stop_early, strict=True))
    return {
        "dtype": policy.config.dtype,
        "threads": torch.get_num_threads(),
        "prompt_tokens": sum(map(len, prompts)) / len(prompts),
        "new_tokens": sum(o.tokens for o in outcomes) / len(questions),
        "official_seconds_per_question": theirs,
        "seconds_per_question": ours,
        "times_as_fast": theirs / ours,
        "questions_timed": len(questions),
        "questions_compared": sequential,
        "same_answers": same / sequential,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="default")
    parser.add_argument("--dtype", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--source", default="own", help="as questions.source")
    parser.add_argument("--questions", type=int, default=128, help="timed our way")
    parser.add_argument("--sequential", type=int, default=12, help="of them, the official way too")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    options = parser.parse_args()
    rows = []
    for dtype in options.dtype:
        policy = load_policy(options.model, dtype=dtype)
        count = min(options.sequential, options.questions)
        row = measure(policy, options.source, options.questions, count, options.batch_size)
        print(json.dumps(row, indent=2), flush=True)
        rows.append(row)
    if options.out:
        write_json(options.out, rows)
    slow = [row for row in rows if row["times_as_fast"] < GOAL]
    wrong = [r for r in rows if r["dtype"] == "float32" and r["same_answers"] < SAME]
    for row in slow:
        print(f"{row['dtype']}: {row['times_as_fast']:.1f} times as fast; the goal is {GOAL:.0f}")
    for row in wrong:
        print(f"float32: {row['same_answers']:.1%} of the answers are the same; goal {SAME:.0%}")
    return 1 if slow or wrong else 0


if __name__ == "__main__":
    sys.exit(main())
