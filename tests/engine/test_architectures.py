"""Every architecture gets right numbers and right completions: by the fast path or by a plain one.

What is right is what transformers computes for each sequence alone, in one plain forward pass.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from architectures import ARCHITECTURES, tiny_model

from grath_utils.engine.encoding import Request
from grath_utils.engine.generation import generate
from grath_utils.engine.models import Policy
from grath_utils.engine.scoring import plan_requests, run_plan, score_completions

pytestmark = pytest.mark.slow

PRIMER = "Q: Is a primer long?\nA: It is longer than a window of 32 tokens.\n\n" * 2
REQUESTS = [
    Request(f"{PRIMER}Q: {question}\nA:", answer, str(i))
    for i, question in enumerate(["Why is the sea salty?", "Why is the sky blue?", "Why?"])
    for answer in [" Rivers bring salt.", " The air scatters blue light.", " It is not so."]
] + [Request("Short", f" answer {i}", "short") for i in range(3)]
PROMPTS = [PRIMER + "Q: Who?\nA:", PRIMER + "Q: Who is in there, and why?\nA:", "Why?"]


@pytest.fixture(params=ARCHITECTURES)
def policy(request: pytest.FixtureRequest, tiny_policy: Policy) -> Policy:
    model = tiny_model(request.param, len(tiny_policy.tokenizer))
    return replace(tiny_policy, model=model, name=request.param)


def logits_alone(policy: Policy, ids: list[int]) -> torch.Tensor:
    """Return the logits (tokens, vocabulary) by a copy that has never seen another sequence."""
    fresh = tiny_model(policy.name, len(policy.tokenizer))
    with torch.inference_mode():
        return fresh(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float()


def test_scores(policy: Policy) -> None:
    plan = plan_requests(policy, REQUESTS)
    for score, encoded in zip(run_plan(policy, REQUESTS, plan), plan.encoded, strict=True):
        logprobs = logits_alone(policy, [*encoded.prompt, *encoded.completion]).log_softmax(-1)
        rows = logprobs[len(encoded.prompt) - 1 : -1]
        expected = rows[range(len(rows)), encoded.completion].sum().item()
        assert score.logprob == pytest.approx(expected, abs=1e-3)


def test_completions(policy: Policy) -> None:
    """At each token, what was written is the most probable, up to a tie."""
    for prompt, completion in zip(
        PROMPTS, generate(policy, PROMPTS, max_new_tokens=12), strict=True
    ):
        ids = policy.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        end = [policy.tokenizer.eos_token_id] if completion.finished == "eos" else []
        tokens = [*completion.token_ids, *end]
        logits = logits_alone(policy, [*ids, *tokens[:-1]])[len(ids) - 1 :]
        chosen = logits[range(len(tokens)), tokens]
        assert torch.allclose(chosen, logits.max(-1).values, atol=1e-3)


def test_scores_are_those_of_lm_eval(policy: Policy) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is a development extra")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    policy.model.config.use_cache = False  # transformers' xLSTM fails with a cache of this size
    # One at a time: its padded batches are wrong for models with a state.
    harness = HFLM(pretrained=policy.model, tokenizer=policy.tokenizer, batch_size=1, device="cpu")
    texts = [(request.prompt, request.completion) for request in REQUESTS]
    asked = [Instance("loglikelihood", {}, text, i) for i, text in enumerate(texts)]
    expected = [score for score, _ in harness.loglikelihood(asked, disable_tqdm=True)]
    scores = [score.logprob for score in score_completions(policy, REQUESTS)]
    assert scores == pytest.approx(expected, abs=1e-3)
