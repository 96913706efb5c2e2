"""From pairs of answers to token ids: prompt (the question), chosen (correct) and rejected.

The prompt is context only: the loss sees the log-probability of the answer's tokens and of the
end-of-turn token after them, nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from grath_utils.engine.chat import end_of_answer
from grath_utils.engine.encoding import encode_answers
from grath_utils.errors import DataError, ModelError
from grath_utils.pairs.generate import Pair
from grath_utils.pairs.prompts import training_completion, training_prompt


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
    """Tokenized pairs, and the ids of those that were too long: dropped, never cut."""

    examples: tuple[PreferenceExample, ...]
    over_long: tuple[str, ...]


def tokenize_pair(
    tokenizer: PreTrainedTokenizerBase, pair: Pair, prompt_format: str = "chat"
) -> PreferenceExample:
    """Return the token ids of a pair: those that scoring and generation have for the same texts.

    The prompt's ids are the same for both answers. The end-of-turn token closes each answer: a
    model that is never shown where an answer ends would learn to ramble.
    """
    if not end_of_answer(tokenizer):
        raise ModelError(
            "the tokenizer has no eos_token, and its chat template closes no turn, so the policy "
            "could not learn where an answer ends; name an eos_token in tokenizer_config.json"
        )
    prompt = training_prompt(tokenizer, pair.question, prompt_format)
    answers = [
        training_completion(tokenizer, text, prompt_format)
        for text in (pair.correct, pair.incorrect)
    ]
    prompt_ids, answer_ids = encode_answers(tokenizer, prompt, answers)
    return PreferenceExample(pair.id, prompt_ids, *answer_ids)


def tokenize_pairs(
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[Pair],
    *,
    prompt_format: str = "chat",
    max_prompt_length: int,
    max_length: int,
) -> PreferenceData:
    """Tokenize all pairs, leaving out those longer than the limits (in tokens)."""
    kept, over_long = [], []
    for pair in pairs:
        example = tokenize_pair(tokenizer, pair, prompt_format)
        if len(example.prompt_ids) <= max_prompt_length and example.length <= max_length:
            kept.append(example)
        else:
            over_long.append(pair.id)
    if pairs and not kept:
        raise DataError(
            f"no pair to train on: {len(pairs)} given, {len(over_long)} longer than "
            f"{max_prompt_length} tokens (dpo.max_prompt_length), or {max_length} with its answers "
            "(dpo.max_length, or the most that the model takes)"
        )
    return PreferenceData(tuple(kept), tuple(over_long))


def collate(
    examples: Sequence[PreferenceExample],
    pad_token_id: int | None,
    device: torch.device | str = "cpu",
) -> dict[str, torch.Tensor]:
    """Stack examples into one batch: all chosen sequences, then all rejected ones.

    ``input_ids``, ``attention_mask`` and ``completion_mask`` have shape (2 B, T) and are padded on
    the right; ``completion_mask`` is 1 on answer tokens.
    """
    from trl.trainer.dpo_trainer import DataCollatorForPreference  # as training collates

    batch = DataCollatorForPreference(pad_token_id or 0)([vars(example) for example in examples])
    return {key: value.to(device) for key, value in batch.items()}
