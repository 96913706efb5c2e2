"""The drift from the base model, against the definition."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny_rounds import moved_policy, tokens

from grath_utils.dpo.drift import kl_per_token
from grath_utils.engine.models import Policy, load_base
from grath_utils.errors import UsageError


def test_a_policy_has_not_drifted_from_itself(tiny_policy: Policy) -> None:
    examples = tokens(tiny_policy)
    assert kl_per_token(tiny_policy, examples) == [0.0] * len(examples)


def test_the_drift_is_the_mean_divergence_over_the_answers_tokens(tiny_policy: Policy) -> None:
    moved = moved_policy(tiny_policy.config)
    examples, by_hand = tokens(tiny_policy), []
    for example in examples:
        values = []
        for answer in (example.chosen_ids, example.rejected_ids):
            ids = torch.tensor([example.prompt_ids + answer])
            with torch.no_grad():
                p, q = (m.model(ids).logits[0].log_softmax(-1) for m in (moved, tiny_policy))
            kl = (p.exp() * (p - q)).sum(-1)
            values += kl[len(example.prompt_ids) - 1 : -1].tolist()
        by_hand.append(sum(values) / len(values))
    found = kl_per_token(moved, examples, tiny_policy)
    assert found == pytest.approx(by_hand, rel=1e-3)
    assert min(found) > 1e-3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_model_gives_what_two_give_and_is_left_as_it_was(
    tiny_policy: Policy, dtype: str
) -> None:
    config = replace(tiny_policy.config, dtype=dtype)
    moved, examples = moved_policy(config), tokens(tiny_policy)
    ids = torch.tensor([examples[0].prompt_ids])
    logits = moved.model(ids).logits
    trained = [name for name, p in moved.model.named_parameters() if p.requires_grad]
    alone = kl_per_token(moved, examples)
    assert torch.equal(moved.model(ids).logits, logits)
    assert [name for name, p in moved.model.named_parameters() if p.requires_grad] == trained
    assert alone == kl_per_token(moved, examples, load_base(config))
    assert min(alone) > 1e-3


def test_no_pairs_is_an_error(tiny_policy: Policy) -> None:
    with pytest.raises(UsageError, match="no pairs to measure"):
        kl_per_token(tiny_policy, [])
