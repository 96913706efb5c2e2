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


# Token ids of the default model's tokenizer, checked by decoding them once by hand.
SYSTEM = [1, 9690, 198, 2683, 359, 253, 5356, 5646, 11173, 3365, 3511, 308, 34519, 28, 7018, 411]
SYSTEM += [407, 19712, 8182, 2, 198, 1, 4093, 198]
ASKED = [2, 198, 1, 520, 9531, 198]
PINNED = [
    (
        ("What do bees make?", "Bees make honey.", "Bees make paper.", "chat"),
        [*SYSTEM, 1780, 536, 9356, 919, 47, *ASKED],
        [50, 4123, 919, 8450, 30, 2],
        [50, 4123, 919, 1941, 30, 2],
    ),
    (
        ("Why is the sky blue?", "Air scatters blue light most.", "It mirrors the sea.", "qa"),
        [65, 42, 4896, 314, 260, 6376, 4461, 47, 198, 49, 42],
        [5097, 806, 42154, 4461, 1420, 768, 30, 2],
        [657, 18173, 260, 3426, 30, 2],
    ),
    (
        ("How many legs has a spider?", "Eight.", "Six legs, like an ant.", "chat"),
        [*SYSTEM, 2020, 800, 7225, 553, 253, 16198, 47, *ASKED],
        [40477, 30, 2],
        [30263, 7225, 28, 702, 354, 1598, 30, 2],
    ),
]


@pytest.mark.model
@pytest.mark.parametrize(("texts", "prompt", "chosen", "rejected"), PINNED)
def test_the_token_ids_of_three_pairs(
    default_policy: Policy, texts: tuple[str, ...], prompt: list, chosen: list, rejected: list
) -> None:
    question, correct, incorrect, prompt_format = texts
    pair = Pair("pinned", question, correct, incorrect, 0)
    example = tokenize_pair(default_policy.tokenizer, pair, prompt_format)
    assert list(example.prompt_ids) == prompt
    assert list(example.chosen_ids) == chosen
    assert list(example.rejected_ids) == rejected
