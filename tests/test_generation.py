"""Batched decoding: the completions of `model.generate`, whoever else is in the batch."""

from __future__ import annotations

import pytest
import torch

from grath_utils import generation
from grath_utils.errors import GrathError, UsageError
from grath_utils.generation import Sampling, Stop, choose, common_prefix, generate

PREFIX = "<|im_start|>user\nthe other thing in the end<|im_end|>\n" * 3
PROMPTS = [
    PREFIX + text
    for text in (
        "a",
        "why is the sky blue?",
        "the",
        "what is in there then, and who put it there in the first place?",
        "in it",
        "who?",
        "the other",
    )
]


def reference(policy, prompt: str, count: int) -> list[int]:
    """Greedy tokens by transformers' own generate, alone, the whole prompt."""
    ids = policy.tokenizer(prompt, add_special_tokens=False, return_tensors="pt")["input_ids"]
    out = policy.model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False
    )
    return out[0, ids.shape[1] :].tolist()


def without_end(policy, ids: list[int]) -> list[int]:
    ends = generation.end_token_ids(policy)
    return ids[: next((i for i, t in enumerate(ids) if t in ends), len(ids))]


@pytest.mark.parametrize("method", ["shared", "plain"])
@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_greedy_equals_generate(tiny_policy, method, batch_size):
    done = generate(tiny_policy, PROMPTS, max_new_tokens=12, batch_size=batch_size, method=method)
    for prompt, completion in zip(PROMPTS, done, strict=True):
        expected = without_end(tiny_policy, reference(tiny_policy, prompt, 12))
        assert list(completion.token_ids) == expected
        assert completion.text == tiny_policy.tokenizer.decode(expected, skip_special_tokens=True)
