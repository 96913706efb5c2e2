"""Batched decoding: the completions of `model.generate`, whoever else is in the batch."""

from __future__ import annotations

import dataclasses
import warnings
from unittest.mock import Mock

import pytest
import torch
from architectures import tiny_model
from transformers import ByT5Tokenizer

from grath_utils.config import ModelConfig
from grath_utils.engine import generation, shared_prefix
from grath_utils.engine.generation import (
    Order,
    Stop,
    common_prefix,
    generate,
    generate_together,
    sample_tokens,
)
from grath_utils.engine.models import load_base
from grath_utils.engine.shared_prefix import SharedPrefixCache
from grath_utils.errors import GrathError, UsageError

PREFIX = "<|im_start|>user\nthe other thing in the end<|im_end|>\n" * 3
LONG = "what is in there then, and who put it there in the first place?"
ENDINGS = ("a", "why is the sky blue?", "the", LONG, "in it", "who?", "the other")
PROMPTS = [PREFIX + ending for ending in ENDINGS]


def reference(policy, prompt: str, count: int) -> list[int]:
    """Greedy tokens by transformers' own generate: alone, the whole prompt, up to the end token."""
    ids = policy.tokenizer(prompt, add_special_tokens=False, return_tensors="pt")["input_ids"]
    out = policy.model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False
    )
    new = out[0, ids.shape[1] :].tolist()
    end = policy.tokenizer.eos_token_id
    return new[: new.index(end)] if end in new else new


@pytest.fixture(scope="module")
def expected_tokens(tiny_llama) -> list[list[int]]:
    policy = load_base(ModelConfig(name=str(tiny_llama), dtype="float32", device="cpu"))
    return [reference(policy, prompt, 12) for prompt in PROMPTS]


@pytest.mark.parametrize("method", ["shared", "plain"])
@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_greedy_equals_generate(tiny_policy, expected_tokens, method, batch_size):
    done = generate(tiny_policy, PROMPTS, max_new_tokens=12, batch_size=batch_size, method=method)
    for expected, completion in zip(expected_tokens, done, strict=True):
        assert list(completion.token_ids) == expected
        assert completion.text == tiny_policy.tokenizer.decode(expected, skip_special_tokens=True)


@pytest.mark.parametrize("prompts", [["the sky", "a stone", "who is there?"], PROMPTS[:1], []])
def test_prompts_without_a_common_beginning_one_and_none(tiny_policy, prompts):
    done = generate(tiny_policy, prompts, max_new_tokens=8, method="shared")
    assert [list(c.token_ids) for c in done] == [reference(tiny_policy, p, 8) for p in prompts]


def test_token_ids_or_a_given_prefix_make_no_difference(tiny_policy):
    expected = generate(tiny_policy, PROMPTS, max_new_tokens=6)
    ids = [tiny_policy.tokenizer(p, add_special_tokens=False)["input_ids"] for p in PROMPTS]
    assert generate(tiny_policy, ids, max_new_tokens=6) == expected
    prefix = generation.shared_beginning(tiny_policy, PROMPTS)
    some = generate(tiny_policy, PROMPTS[2:4], prefix=prefix, max_new_tokens=6)
    assert some == expected[2:4]
    with pytest.raises(UsageError, match="prompt 1 does not begin with the prefix"):
        generate(tiny_policy, [PROMPTS[0], "else"], prefix=prefix)


def test_the_prefix_is_neither_copied_nor_grown(tiny_policy):
    prefix = generation.shared_beginning(tiny_policy, PROMPTS)
    cache = SharedPrefixCache([prefix.layers], slots=7, room=20)
    (layers,) = cache.prefixes
    for (keys, values), (kept_keys, kept_values) in zip(prefix.layers, layers, strict=True):
        assert kept_keys.data_ptr() == keys.data_ptr()
        assert kept_values.data_ptr() == values.data_ptr()
    own = cache.own[0][0]
    assert own.shape == (7, 2, 20, 16)  # (slots, kv heads, room, head dimension): no prefix in it


def test_works_through_an_adapter(tiny_policy):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    adapted = dataclasses.replace(
        tiny_policy, model=get_peft_model(tiny_policy.model, config).eval()
    )
    done = generate(adapted, PROMPTS, max_new_tokens=8, batch_size=3, method="shared")
    assert [list(c.token_ids) for c in done] == [reference(adapted, p, 8) for p in PROMPTS]


def test_stop_string_ends_a_completion_and_stays_in_it(tiny_policy):
    (free,) = generate(tiny_policy, PROMPTS[:1], max_new_tokens=12)
    piece = tiny_policy.tokenizer.decode(free.token_ids[4:5])
    (stopped,) = generate(tiny_policy, PROMPTS[:1], max_new_tokens=12, stop=Stop.at(piece))
    assert stopped.finished == "stop"
    assert piece in stopped.text
    assert piece not in tiny_policy.tokenizer.decode(stopped.token_ids[:-1])
    assert free.token_ids[: len(stopped.token_ids)] == stopped.token_ids


def test_the_limit_is_reported_and_the_model_attends_as_before(tiny_policy):
    before = tiny_policy.model.config._attn_implementation
    for completion in generate(tiny_policy, PROMPTS, max_new_tokens=3):
        assert completion.finished == ("length" if len(completion.token_ids) == 3 else "eos")
    assert tiny_policy.model.config._attn_implementation == before


def test_trigger_saves_asking(tiny_policy):
    for trigger, times in (("", 12), ("\x00never\x00", 0)):
        asked: list[str] = []  # append returns None: the condition never holds
        generate(tiny_policy, PROMPTS[:2], max_new_tokens=6, stop=Stop(asked.append, trigger))
        assert len(asked) == times


def sampled(policy, prompts, **options):
    options = {"max_new_tokens": 8, "do_sample": True, "top_k": 0, "seed": 3, **options}
    return generate(policy, prompts, **options)


def test_a_sample_does_not_depend_on_its_company(tiny_policy):
    keys = [f"question {i}" for i in range(len(PROMPTS))]
    together = sampled(tiny_policy, PROMPTS, keys=keys)
    for i in (0, 3, 6):
        (alone,) = sampled(tiny_policy, PROMPTS[i : i + 1], keys=keys[i : i + 1])
        assert alone == together[i]
    assert sampled(tiny_policy, PROMPTS, keys=keys, batch_size=2) == together
    assert sampled(tiny_policy, PROMPTS, keys=keys, method="plain") == together


def test_seed_and_key_make_the_sample(tiny_policy):
    one = sampled(tiny_policy, PROMPTS)
    assert sampled(tiny_policy, PROMPTS) == one
    assert sampled(tiny_policy, PROMPTS, seed=4) != one
    repeated = sampled(tiny_policy, PROMPTS[:1] * 5, batch_size=5)
    assert len({c.token_ids for c in repeated}) > 1  # one prompt, five streams


@pytest.mark.parametrize("method", ["shared", "plain"])
@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_orders_that_are_done_together_get_what_each_gets_alone(tiny_policy, batch_size, method):
    """Two shared beginnings, greedy, with drafts and drawn, of several lengths, and nothing."""
    other = ["who is there, in the end? " + ending for ending in ENDINGS]
    prefix = generation.shared_beginning(tiny_policy, PROMPTS)
    drawn = {"top_k": 0, "seed": 3, "temperature": 0.9}
    orders = [
        Order(prompts=PROMPTS, prefix=prefix, max_new_tokens=12, drafts=["the other"] * 7),
        Order(prompts=PROMPTS[::2], prefix=prefix, max_new_tokens=5),
        Order(prompts=PROMPTS * 2, prefix=prefix, max_new_tokens=9, **drawn),
        Order(prompts=[]),
        Order(prompts=other, stop=Stop.at("e"), max_new_tokens=9),
        Order(prompts=other, max_new_tokens=6, top_p=0.7, keys=[*"abcdefg"], **drawn),
    ]
    alone = [generate_together(tiny_policy, [order], method=method)[0] for order in orders]
    options = {"batch_size": batch_size, "method": method}
    assert generate_together(tiny_policy, orders, **options) == alone
    assert list(map(len, alone)) == [7, 4, 14, 0, 7, 7]


def test_copies_of_a_prompt_are_like_prompts_of_their_own(tiny_policy):
    prompts = [PROMPTS[1], PROMPTS[3], PROMPTS[1], PROMPTS[1], PROMPTS[0], PROMPTS[3]]
    done = generate(tiny_policy, prompts, max_new_tokens=9, batch_size=4, method="shared")
    assert [list(c.token_ids) for c in done] == [reference(tiny_policy, p, 9) for p in prompts]


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_drafts_change_nothing_but_the_time(tiny_policy, expected_tokens, batch_size, monkeypatch):
    """Right, half right, wrong, too long and empty guesses, for prompts that come twice too."""
    wrong = tiny_policy.tokenizer("of course not")["input_ids"]
    guesses = [tokens[:9] for tokens in expected_tokens]
    guesses[1] = expected_tokens[1][:3] + wrong
    guesses[2] = wrong
    guesses[3] = expected_tokens[3] + wrong * 5
    guesses[4] = []
    prompts, drafts = PROMPTS + PROMPTS[:3], [*guesses, *guesses[:2], expected_tokens[2]]
    expected = expected_tokens + expected_tokens[:3]
    spy = Mock(wraps=tiny_policy.model.forward)
    monkeypatch.setattr(tiny_policy.model, "forward", spy)
    options = {"max_new_tokens": 12, "batch_size": batch_size}
    plain = generate(tiny_policy, prompts, **options)
    without = spy.call_count
    done = generate(tiny_policy, prompts, drafts=drafts, **options)
    assert [list(c.token_ids) for c in done] == expected
    assert done == plain
    if batch_size == 1:  # the right guesses were not decoded one by one
        assert spy.call_count - without < without - 10


def test_drafts_stop_where_decoding_would(tiny_policy, expected_tokens):
    decode = tiny_policy.tokenizer.decode
    stop = Stop.at(decode(expected_tokens[0][3:4]))
    plain = generate(tiny_policy, PROMPTS[:2], max_new_tokens=12, stop=stop)
    drafts = expected_tokens[:2]
    assert plain[0].finished == "stop"
    assert generate(tiny_policy, PROMPTS[:2], max_new_tokens=12, stop=stop, drafts=drafts) == plain


def test_tokens_are_drawn_by_probability():
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.2]])).repeat(1000, 1)
    draws = [(i + 0.5) / 1000 for i in range(1000)]
    tokens = sample_tokens(logits, draws, temperature=1.0, top_k=0)
    assert [tokens.count(t) for t in range(3)] == [500, 300, 200]


@pytest.mark.parametrize(
    ("options", "kept"), [({"top_p": 0.6}, {1, 2}), ({"top_p": 0.4}, {1}), ({"top_k": 2}, {1, 2})]
)
def test_only_top_p_and_top_k_are_drawn_from(options, kept):
    logits = torch.log(torch.tensor([[0.2, 0.5, 0.3]])).repeat(100, 1)
    draws = [i / 100 for i in range(100)]
    assert set(sample_tokens(logits, draws, temperature=1.0, **options)) == kept


def test_last_draw_stays_inside():
    assert sample_tokens(torch.zeros(1, 7), [0.999999999], temperature=1.0, top_k=0)[0] in range(7)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_diverged_weights_are_an_error(bad, temperature):
    with pytest.raises(GrathError, match="not finite"):
        sample_tokens(torch.tensor([[0.0, bad, 1.0]]), [0.5], temperature=temperature)


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        (["a", ""], {}, "prompt 1 is empty"),
        (["a b c"], {"max_new_tokens": 2047}, "context of 2048 tokens"),
        (["a"], {"method": "fast"}, "unknown method"),
        (["a"], {"do_sample": True, "temperature": -1.0}, "impossible sampling"),
        (["a"], {"do_sample": True, "drafts": ["x"]}, "greedy"),
    ],
)
def test_bad_input(tiny_policy, prompts, options, message):
    with pytest.raises(UsageError, match=message):
        generate(tiny_policy, prompts, **options)


def test_sliding_window_falls_back_and_says_so(tiny_policy):
    model = tiny_model("mistral-window", len(tiny_policy.tokenizer))
    policy = dataclasses.replace(tiny_policy, model=model)
    with pytest.warns(UserWarning, match=r"cannot share .* writes in padded batches"):
        done = generate(policy, PROMPTS[:2], max_new_tokens=4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert generate(policy, PROMPTS[:2], max_new_tokens=4) == done  # it is said once
    with pytest.raises(UsageError, match="cannot share a prefix: its logits change by"):
        generate(policy, PROMPTS[:2], max_new_tokens=4, method="shared")


def test_a_model_that_is_wrong_with_a_shared_prefix_is_found_out(tiny_policy, monkeypatch):
    monkeypatch.setattr(SharedPrefixCache, "position_ids", property(lambda self: self._places))
    reason = shared_prefix.why_not_shared(tiny_policy.model, 100)
    assert reason.startswith("its logits change by")


@pytest.mark.parametrize(
    ("sequences", "shared"),
    [
        ([[1, 2, 3], [1, 2, 4, 5]], [1, 2]),
        ([[1, 2], [1, 2, 3]], [1]),  # each keeps a token of its own
        ([[1, 2, 3]], [1, 2]),
        ([[1], [2]], []),
    ],
)
def test_common_prefix(sequences, shared):
    assert common_prefix(sequences) == shared


def test_a_slow_tokenizer_takes_no_harm_from_the_ids_of_a_padded_vocabulary(tiny_policy):
    tokenizer = ByT5Tokenizer(extra_ids=2)
    policy = dataclasses.replace(
        tiny_policy, model=tiny_model("mistral-window", 512), tokenizer=tokenizer
    )
    (done,) = generate(policy, [[70, 71, 72]], max_new_tokens=16)
    known = [i for i in done.token_ids if i < 261]  # 256 bytes, 3 special tokens, 2 more
    assert 0 < len(known) < len(done.token_ids)
    assert done.text == tokenizer.decode(known, skip_special_tokens=True)
