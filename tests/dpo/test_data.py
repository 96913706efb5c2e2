"""From pairs of answers to token ids."""

from __future__ import annotations

import pytest
from helpers import PAIRS
from tiny_rounds import LIMITS

from grath_utils.dpo.data import collate, tokenize_pair, tokenize_pairs
from grath_utils.engine.models import Policy
from grath_utils.errors import DataError
from grath_utils.pairs.generate import Pair


def test_the_prompt_is_masked_and_the_end_of_turn_is_not(tiny_policy: Policy) -> None:
    tokenizer = tiny_policy.tokenizer
    example = tokenize_pair(tokenizer, PAIRS[0])
    text = "<|im_start|>user\nWhat is the sun?<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(example.prompt_ids) == text
    assert tokenizer.decode(example.chosen_ids) == "It is the star.<|im_end|>"
    assert tokenizer.decode(example.rejected_ids) == "The stone in the air.<|im_end|>"
    batch = collate([example], tokenizer.pad_token_id)
    shown = batch["input_ids"][0][batch["completion_mask"][0].bool()]
    assert tuple(shown.tolist()) == example.chosen_ids


def test_question_answer_format_starts_the_answer_with_a_space(tiny_policy: Policy) -> None:
    example = tokenize_pair(tiny_policy.tokenizer, PAIRS[0], "qa")
    assert tiny_policy.tokenizer.decode(example.prompt_ids) == "Q: What is the sun?\nA:"
    assert tiny_policy.tokenizer.decode(example.chosen_ids) == " It is the star.<|im_end|>"


def test_over_long_pairs_are_counted_not_cut(tiny_policy: Policy) -> None:
    tall = Pair("tall", "What is the sun?", "It is " + "very " * 100 + "hot.", "Cold.", 0)
    data = tokenize_pairs(tiny_policy.tokenizer, [PAIRS[0], tall], **LIMITS)
    assert [e.id for e in data.examples] == ["q0"]
    assert data.over_long == ("tall",)
    with pytest.raises(DataError, match="no pair to train on: 1 given, 1 longer"):
        tokenize_pairs(tiny_policy.tokenizer, [tall], **LIMITS)
