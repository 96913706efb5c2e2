"""How a benchmark's questions are put to the model: prompts, shots, and what is scored.

The protocols themselves stand in the benchmarks' rows. ``lm-eval`` is lm-evaluation-harness's own
form, token for token, and the default wherever there is one.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

from grath_utils.engine.chat import render_chat
from grath_utils.engine.encoding import Request
from grath_utils.errors import DataError, UsageError, did_you_mean
from grath_utils.evaluation.benchmarks import find_benchmark
from grath_utils.evaluation.benchmarks.base import Benchmark, Item, Protocol

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LM_EVAL_SHOT_SEED = 1234  # its default ``fewshot_random_seed``: each item gets the very same shots


def find_protocol(benchmark: str, name: str | None) -> Protocol:
    """Return a benchmark's protocol by name, the default one for None; UsageError if unknown."""
    protocols = {p.name: p for p in find_benchmark(benchmark).protocols}
    name = name or next(iter(protocols))
    if name not in protocols:
        raise UsageError(f'{benchmark} has no protocol "{name}"{did_you_mean(name, protocols)}')
    return protocols[name]


def build_prompts(
    benchmark: Benchmark, protocol: Protocol, tokenizer: PreTrainedTokenizerBase
) -> list[str]:
    """Return each item's prompt, shots included."""
    if protocol.chat and not tokenizer.chat_template:
        raise UsageError(
            "the protocol `chat` needs a model with a chat template, and this one has none; "
            "use `lm-eval`"
        )
    prompts = []
    for item, shots in zip(benchmark.items, choose_shots(benchmark, protocol), strict=True):
        solved = [protocol.question(shot) + protocol.answer(shot, shot.gold) for shot in shots]
        text = protocol.before(item) + "\n\n".join([*solved, protocol.question(item)])
        if protocol.chat:
            text = render_chat(tokenizer, [{"role": "user", "content": text}])
        prompts.append(text)
    return prompts


def build_requests(
    benchmark: Benchmark, protocol: Protocol, tokenizer: PreTrainedTokenizerBase
) -> list[list[Request]]:
    """Return for each item one request for each choice."""
    prompts = build_prompts(benchmark, protocol, tokenizer)
    return [
        [Request(prompt, protocol.answer(item, i), item.id) for i in range(len(item.choices))]
        for item, prompt in zip(benchmark.items, prompts, strict=True)
    ]


def choose_shots(benchmark: Benchmark, protocol: Protocol) -> list[Sequence[Item]]:
    """Return each item's solved examples, never the item itself.

    As lm-eval draws them, with one generator through all items in their order: an item keeps its
    shots whatever part of the benchmark is asked for.
    """
    count = protocol.shots
    if not count:
        return [()] * len(benchmark.items)
    if protocol.draw == "first":
        return [_pool(benchmark, protocol, item.category)[:count] for item in benchmark.items]
    pool, once = _pool(benchmark, protocol, None), protocol.draw == "once"
    generator = random.Random(LM_EVAL_SHOT_SEED)
    times = 1 if once else benchmark.total
    drawn = [generator.sample(pool, count + protocol.spare) for _ in range(times)]
    chosen = []
    for item in benchmark.items:
        text = (item.question, item.choices)
        examples = drawn[0 if once else item.position]
        chosen.append([e for e in examples if (e.question, e.choices) != text][:count])
    return chosen


def _pool(benchmark: Benchmark, protocol: Protocol, category: str | None) -> Sequence[Item]:
    """Return the examples to choose from."""
    pool = benchmark.shots.get(category or "", ())
    if len(pool) < protocol.shots + protocol.spare:
        where = f"{benchmark.name}, {category}" if category else benchmark.name
        raise DataError(
            f"{where}: {protocol.shots} shots are needed, and there are {len(pool)} examples"
        )
    return pool
