"""Preference data: from pairs of answers to token ids that DPO can be computed on.

A pair becomes ``prompt`` (the bare question), ``chosen`` (the correct answer) and ``rejected`` (the
incorrect one). The prompt is context only: the loss sees the log-probability of the answer tokens
and of the end-of-turn token after them, nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from grath_utils.errors import DataError
from grath_utils.pairs.generate import Pair
from grath_utils.pairs.prompts import training_prompt


@dataclass(frozen=True)
class PreferenceExample:
    """One pair as token ids."""

    id: str
    prompt_ids: tuple[int, ...]
    chosen_ids: tuple[int, ...]
    rejected_ids: tuple[int, ...]

    @property
    def length(self) -> int:
        """Tokens of the longer of the two sequences."""
        return len(self.prompt_ids) + max(len(self.chosen_ids), len(self.rejected_ids))


@dataclass(frozen=True)
class PreferenceData:
    """Tokenized pairs, and how many were left out for being too long."""

    examples: tuple[PreferenceExample, ...]
    over_long: tuple[str, ...]
    """Ids of pairs that exceed the limits: dropped, never cut in the middle of an answer."""


def tokenize_pair(
    tokenizer: PreTrainedTokenizerBase, pair: Pair, prompt_format: str = "chat"
) -> PreferenceExample:
    """Return the token ids of a pair.

    Prompt and answer are tokenized apart and joined, so the prompt's ids are the same for both
    answers and no token spans the border. The end-of-turn token closes each answer: a model that
    is never shown where an answer ends would learn to ramble.
    """
    prompt = training_prompt(tokenizer, pair.question, prompt_format)
    # A chat template writes the beginning-of-sequence token itself; plain text relies on the
    # tokenizer to add it. Doing both is the doubled BOS of the official code.
    prompt_ids = tokenizer(prompt, add_special_tokens=prompt_format != "chat")["input_ids"]
    lead = "" if prompt_format == "chat" else " "  # after `A:` an answer starts with a space

    def answer_ids(answer: str) -> tuple[int, ...]:
        ids = tokenizer(lead + answer, add_special_tokens=False)["input_ids"]
        return (*ids, tokenizer.eos_token_id)

    return PreferenceExample(
        pair.id, tuple(prompt_ids), answer_ids(pair.correct), answer_ids(pair.incorrect)
    )


def tokenize_pairs(
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[Pair],
    *,
    prompt_format: str = "chat",
    max_prompt_length: int,
    max_length: int,
) -> PreferenceData:
    """Tokenize all pairs, leaving out those longer than the limits (in tokens).

    Raises:
        DataError: no pair is left.
    """
    kept, over_long = [], []
    for pair in pairs:
        example = tokenize_pair(tokenizer, pair, prompt_format)
        fits = len(example.prompt_ids) <= max_prompt_length and example.length <= max_length
        if fits:
            kept.append(example)
        else:
            over_long.append(pair.id)
    if not kept:
        raise DataError(
            f"no pair to train on: {len(pairs)} given, {len(over_long)} longer than "
            f"dpo.max_prompt_length={max_prompt_length} or dpo.max_length={max_length} tokens"
        )
    return PreferenceData(tuple(kept), tuple(over_long))


def collate(
    examples: Sequence[PreferenceExample], pad_token_id: int, device: torch.device | str = "cpu"
) -> dict[str, torch.Tensor]:
    """Stack examples into one batch: all chosen sequences, then all rejected ones.

    Returns:
        ``input_ids``, ``attention_mask`` and ``completion_mask``, each of shape (2 B, T), padded
        on the right; ``completion_mask`` is 1 on answer tokens.
    """
    rows = [(e.prompt_ids, e.chosen_ids) for e in examples]
    rows += [(e.prompt_ids, e.rejected_ids) for e in examples]
    longest = max(len(p) + len(c) for p, c in rows)
    input_ids = torch.full((len(rows), longest), pad_token_id, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    completion_mask = torch.zeros_like(input_ids)
    for i, (prompt, completion) in enumerate(rows):
        end = len(prompt) + len(completion)
        input_ids[i, :end] = torch.tensor(prompt + completion)
        attention_mask[i, :end] = 1
        completion_mask[i, len(prompt) : end] = 1
    batch = {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "completion_mask": completion_mask,
    }
    return {key: value.to(device) for key, value in batch.items()}
