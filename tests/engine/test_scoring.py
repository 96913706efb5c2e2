"""The scorer gives each completion the log-probability that a plain forward pass gives it."""

from __future__ import annotations

import copy
import functools
import warnings
from dataclasses import replace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from architectures import tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

from grath_utils.config import ModelConfig
from grath_utils.engine import scoring, slices
from grath_utils.engine.encoding import Request, encode_requests
from grath_utils.engine.models import Policy, load_base
from grath_utils.engine.scoring import (
    edge_logprobs,
    plan_requests,
    score_completions,
    why_no_trees,
)
from grath_utils.engine.trie import attention_mask, build_trie, plan_blocks, sequence_blocks
from grath_utils.errors import ScoringError, UsageError

PRIMER = "Q: What is the primer for?\nA: The primer shows the form of an answer.\n\n" * 4
QUESTIONS = {
    "Why is the sea salty?": [" Rivers bring salt.", " Rivers bring sand.", " It is not."],
    "Why is the sky blue?": [" The air scatters blue light.", " The sea is in the sky."],
    "Why?": [" Because."],
}
REQUESTS = [
    Request(f"{PRIMER}Q: {question}\nA:", answer, f"item-{i}")
    for i, (question, answers) in enumerate(QUESTIONS.items())
    for answer in answers
]


def by_hand(policy: Policy, request: Request) -> float:
    """Score one request in the most obvious way."""
    (encoded,) = encode_requests(policy.tokenizer, [request], policy.max_length)
    ids = torch.tensor([[*encoded.prompt, *encoded.completion]])
    with torch.inference_mode():
        logprobs = policy.model(ids).logits[0].float().log_softmax(-1)
    n = len(encoded.prompt)
    return sum(logprobs[n - 1 + i, t].item() for i, t in enumerate(encoded.completion))


sequences = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=9), min_size=1, max_size=25)


@given(sequences, st.integers(0, 40), st.sampled_from([3, 8, 17, 64]))
@settings(max_examples=150, deadline=None)
def test_every_prefix_is_one_node_and_is_computed_once_after_its_prefix(
    rows: list[list[int]], primer: int, budget: int
) -> None:
    rows = [[7] * primer + row for row in rows]
    trie, paths = build_trie(rows)
    assert len(trie) == len({tuple(row[: i + 1]) for row in rows for i in range(len(row))})
    for row, path in zip(rows, paths, strict=True):
        assert trie.token[path].tolist() == row
        assert trie.depth[path].tolist() == list(range(len(row)))
        assert trie.ancestors(int(path[-1])) == path[:-1].tolist()
    for blocks in (plan_blocks(trie, budget), sequence_blocks(trie)):
        own = [node for block in blocks for node in range(block.first, block.last)]
        assert sorted(own) == list(range(len(trie)))
        for number, block in enumerate(blocks):
            assert all(p < number and blocks[p].keep for p in block.prefix)
            cached = {n for p in block.prefix for n in blocks[p].nodes.tolist()}
            fed = block.nodes.tolist()
            assert not cached & set(fed)
            for node in fed:
                above = set(trie.ancestors(node))
                assert cached <= above <= cached | set(fed)


@given(sequences)
@settings(max_examples=50, deadline=None)
def test_a_token_sees_itself_and_what_is_before_it_and_nothing_else(rows: list[list[int]]) -> None:
    trie, _ = build_trie(rows)
    mask = attention_mask(trie, np.arange(len(trie)))
    for node in range(len(trie)):
        assert np.flatnonzero(mask[node]).tolist() == [*trie.ancestors(node), node]


def test_a_long_primer_is_kept_and_few_tokens_are_fed_twice() -> None:
    rows = [[9] * 200 + [q] * 20 + [a] * 5 for q in range(30) for a in range(4)]
    trie, _ = build_trie(rows)
    blocks = plan_blocks(trie, 256)
    assert [block.keep for block in blocks] == [True] + [False] * (len(blocks) - 1)
    assert sum(len(block.nodes) for block in blocks) == len(trie)
    assert max(len(block.nodes) for block in blocks) <= 256


@pytest.mark.parametrize("method", ["tree", "plain"])
@pytest.mark.parametrize("batch_tokens", [24, 96, 4096])
def test_scores_are_those_of_a_plain_forward_pass(
    tiny_policy: Policy, method: str, batch_tokens: int
) -> None:
    scores = score_completions(tiny_policy, REQUESTS, method=method, batch_tokens=batch_tokens)
    expected = [by_hand(tiny_policy, request) for request in REQUESTS]
    assert [score.logprob for score in scores] == pytest.approx(expected, abs=1e-4)
    assert len({round(score.logprob, 3) for score in scores}) == len(REQUESTS)


def test_duplicates_cost_nothing(tiny_policy: Policy) -> None:
    once = plan_requests(tiny_policy, REQUESTS)
    twice = plan_requests(tiny_policy, REQUESTS + REQUESTS[::-1])
    assert twice.work.distinct == once.work.distinct
    assert twice.work.naive == 2 * once.work.naive
    scores = score_completions(tiny_policy, REQUESTS + REQUESTS[::-1])
    assert scores[: len(REQUESTS)] == scores[: len(REQUESTS) - 1 : -1]


def test_only_distinct_tokens_are_fed(tiny_policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_requests(tiny_policy, REQUESTS)
    fed, heads = [], []
    real = tiny_policy.model.forward

    @functools.wraps(real)  # the signature tells that logits can be selected
    def counting(*args: Any, **options: Any) -> Any:
        output = real(*args, **options)
        fed.append(options["input_ids"].numel())
        heads.append(output.logits.shape[1])
        return output

    monkeypatch.setattr(tiny_policy.model, "forward", counting)
    scoring.run_plan(tiny_policy, REQUESTS, plan)
    assert sum(fed) == plan.work.computed < 1.1 * plan.work.distinct
    # The head runs where an answer is predicted, not over the questions.
    assert sum(heads) <= sum(len(e.completion) for e in plan.encoded) + len(plan.blocks)


def test_in_bfloat16_the_sum_is_close(tiny_llama: Any) -> None:
    policy = load_base(ModelConfig(name=str(tiny_llama), dtype="bfloat16", device="cpu"))
    scores = score_completions(policy, REQUESTS, method="tree")
    for score, request in zip(scores, REQUESTS, strict=True):
        assert score.logprob == pytest.approx(by_hand(policy, request), abs=0.02 * score.tokens)


def test_with_an_adapter(tiny_policy: Policy) -> None:
    from peft import LoraConfig, get_peft_model

    before = [score.logprob for score in score_completions(tiny_policy, REQUESTS)]
    torch.manual_seed(3)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    adapted = replace(tiny_policy, model=get_peft_model(tiny_policy.model, config).eval())
    assert plan_requests(adapted, REQUESTS).method == "tree"
    after = [score.logprob for score in score_completions(adapted, REQUESTS)]
    assert after == pytest.approx([by_hand(adapted, r) for r in REQUESTS], abs=1e-4)
    assert np.abs(np.subtract(after, before)).max() > 0.01


def test_dropout_is_off_while_scoring_and_on_again_afterwards(tiny_policy: Policy) -> None:
    tiny_policy.model.train()
    tiny_policy.model.config.attention_dropout = 0.5
    for layer in tiny_policy.model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    first, second = (score_completions(tiny_policy, REQUESTS) for _ in range(2))
    assert first == second
    assert tiny_policy.model.training


def deafen(policy: Policy, monkeypatch: pytest.MonkeyPatch, *ignored: str) -> None:
    """Let the model's forward take these arguments, and not heed them."""
    real = policy.model.forward

    @functools.wraps(real)
    def deaf(*arguments: Any, **options: Any) -> Any:
        return real(*arguments, **options | dict.fromkeys(ignored))

    monkeypatch.setattr(policy.model, "forward", deaf)


def test_a_model_that_ignores_positions_or_masks_is_scored_plainly(
    tiny_policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = [by_hand(tiny_policy, request) for request in REQUESTS]
    deafen(tiny_policy, monkeypatch, "attention_mask", "position_ids")
    scores = score_completions(tiny_policy, REQUESTS)
    assert [score.logprob for score in scores] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("ignored", ["attention_mask", "position_ids"])
def test_in_half_precision_a_model_that_ignores_one_of_them_is_found_out(
    tiny_policy: Policy, monkeypatch: pytest.MonkeyPatch, ignored: str
) -> None:
    """Rounding may be larger there than what a wrong mask does; the slice is in float32."""
    tiny_policy.model.to(torch.bfloat16)
    assert not why_no_trees(tiny_policy, 100, 512)
    deafen(tiny_policy, monkeypatch, ignored)
    tiny_policy = replace(tiny_policy, model=copy.copy(tiny_policy.model))  # asked again
    assert "change by" in why_no_trees(tiny_policy, 100, 512)


def test_a_window_is_found_out_where_a_sequence_is_longer(tiny_policy: Policy) -> None:
    model = tiny_model("mistral-window", len(tiny_policy.tokenizer))  # of 32 tokens
    policy = replace(tiny_policy, model=model)
    assert [bool(why_no_trees(policy, longest, 512)) for longest in (33, 32, 20, 40)] == [
        *(True, False, False, True)
    ]


def test_a_window_in_places_of_the_row_is_found_out_for_short_sequences_too(
    tiny_policy: Policy,
) -> None:
    policy = replace(tiny_policy, model=tiny_model("gpt-neo", len(tiny_policy.tokenizer)))
    assert why_no_trees(policy, 20, 512)


def test_a_model_is_asked_once_and_says_so_once(
    tiny_policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = Mock(side_effect=slices.float_slice)
    monkeypatch.setattr(slices, "float_slice", asked)
    policy = replace(tiny_policy, model=tiny_model("gpt-neo", len(tiny_policy.tokenizer)))
    with warnings.catch_warnings(record=True, action="always") as warned:
        for requests in (REQUESTS, REQUESTS, REQUESTS[:2]):
            score_completions(policy, requests)
    assert sum("each is scored alone" in str(w.message) for w in warned) == 1
    assert asked.call_count <= 2  # the shorter requests are another question


def test_no_memory_for_the_slice_is_not_an_answer(
    tiny_policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory"))
    monkeypatch.setattr(slices, "float_slice", full)
    with pytest.raises(torch.OutOfMemoryError):
        why_no_trees(tiny_policy, 100, 512)


def test_a_slice_has_each_kind_of_layer_and_few_tokens(tiny_policy: Policy) -> None:
    model = tiny_model("gemma3", 300).to(torch.bfloat16)  # five layers with a window, one without
    small = slices.float_slice(model)
    assert len(small.model.layers) == small.config.num_hidden_layers == 6
    assert small.dtype == torch.float32
    assert small.get_input_embeddings().weight.shape[0] == slices.TOKENS
    assert len(slices.float_slice(tiny_model("llama", 300)).model.layers) == 1
    assert model.dtype == torch.bfloat16
    assert model.get_input_embeddings().weight.shape[0] == 300


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_log_probabilities_are_computed_in_float32(dtype: torch.dtype) -> None:
    logits = (torch.randn(40, 300) * 5).to(dtype)
    which, targets = torch.tensor([0, 0, 39]), torch.tensor([5, 6, 299])
    expected = logits.double().log_softmax(-1)[which, targets]
    assert torch.allclose(edge_logprobs(logits, which, targets).double(), expected, atol=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_score_that_is_not_finite_names_the_item(tiny_policy: Policy, value: float) -> None:
    with torch.no_grad():
        tiny_policy.model.lm_head.weight[5] = value
    with pytest.raises(ScoringError, match=r"item item-0: .*not finite"):
        score_completions(tiny_policy, REQUESTS, method="tree")


def test_resuming_gives_the_same_numbers_and_runs_only_what_is_missing(tiny_policy: Policy) -> None:
    plan = plan_requests(tiny_policy, REQUESTS, batch_tokens=40)
    passes: dict[int, list[float]] = {}

    def on_batch(number: int, values: list[float], tokens: int) -> None:
        assert number not in passes
        passes[number] = values

    whole = scoring.run_plan(tiny_policy, REQUESTS, plan, on_batch=on_batch)
    everything = dict(passes)
    assert len(everything) > 4
    del passes[max(passes)]
    done = dict(passes)
    assert scoring.run_plan(tiny_policy, REQUESTS, plan, done=done, on_batch=on_batch) == whole
    assert passes == everything


def test_an_unknown_method_and_nothing_to_score(tiny_policy: Policy) -> None:
    with pytest.raises(UsageError, match="auto, tree and plain"):
        score_completions(tiny_policy, REQUESTS, method="fast")
    assert score_completions(tiny_policy, []) == []


def test_trailing_spaces_move_to_the_completion(tiny_policy: Policy) -> None:
    left, right = encode_requests(
        tiny_policy.tokenizer,
        [Request("Is it the?  ", "end", "a"), Request("Is it the?", "  end", "b")],
        100,
    )
    assert (left.prompt.tolist(), left.completion) == (right.prompt.tolist(), right.completion)
    assert tiny_policy.tokenizer.decode(left.completion) == "  end"


def test_a_token_across_the_boundary_is_split_as_lm_eval_does_and_marked(
    tiny_policy: Policy,
) -> None:
    tokenizer = tiny_policy.tokenizer
    merged, plain = encode_requests(
        tokenizer, [Request("at", "he end", "a"), Request("at", " end", "b")], 100
    )
    # "a" + "the" in one, "a" + "t" for the prompt alone: the prompt keeps its own two tokens.
    assert merged.straddles
    assert tokenizer.decode(merged.prompt) == "at"
    assert merged.completion == tuple(tokenizer("athe end")["input_ids"][2:])
    assert not plain.straddles


def test_an_empty_prompt_is_conditioned_on_the_start_token(tiny_policy: Policy) -> None:
    (encoded,) = encode_requests(tiny_policy.tokenizer, [Request("", "the", "a")], 100)
    assert encoded.prompt.tolist() == [tiny_policy.tokenizer.bos_token_id]
    assert tiny_policy.tokenizer.decode(encoded.completion) == "the"


@pytest.mark.parametrize(
    ("request_", "length", "message"),
    [
        (Request("Q:", "", "q7"), 100, "item q7: an empty completion"),
        (Request("Q: " * 50, " yes", "q8"), 60, r"item q8: .* tokens, and the model takes 60"),
    ],
)
def test_what_cannot_be_scored_names_the_item(
    tiny_policy: Policy, request_: Request, length: int, message: str
) -> None:
    with pytest.raises(ScoringError, match=message):
        encode_requests(tiny_policy.tokenizer, [request_], length)
