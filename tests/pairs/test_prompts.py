"""Prompts: the official structure, any chat template, and what DPO trains on."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from transformers import AutoTokenizer

from grath_utils.errors import UsageError
from grath_utils.pairs import prompts
from grath_utils.pairs.modes import MODES, demonstrations
from grath_utils.pairs.parsing import check_pair, parse_pair
from grath_utils.pairs.prompts import (
    answer_messages,
    pair_messages,
    question_messages,
    render_chat,
    training_completion,
    training_prompt,
)
from grath_utils.pairs.questions import Question


@pytest.fixture(scope="module")
def tokenizer(tiny_llama):
    return AutoTokenizer.from_pretrained(tiny_llama)


@pytest.mark.parametrize("mode", ["paper", "default"])
def test_pair_prompt_has_the_official_structure(mode):
    messages = pair_messages("Why?", demonstrations(mode, "pair", 6))
    assert [m["role"] for m in messages] == ["user", "assistant"] * 6 + ["user"]
    for user, assistant in zip(messages[:-1:2], messages[1::2], strict=True):
        first, second = user["content"].split("\n")
        asked = first.removeprefix("Consider the following question: ")
        assert asked != first
        assert "one correct answer and one incorrect answer" in second
        question, correct, incorrect = assistant["content"].split("\n")
        assert question == f"Question: {asked}"
        assert correct.startswith("Correct answer: ")
        assert incorrect.startswith("Incorrect answer: ")
    assert messages[-1]["content"].startswith("Consider the following question: Why?\n")


@pytest.mark.parametrize("mode", ["paper", "default"])
def test_demonstrations_pass_their_own_parser_and_filters(mode):
    shots = demonstrations(mode, "pair", 6)
    for shot, message in zip(shots, pair_messages("Why?", shots)[1::2], strict=True):
        parsed = parse_pair(message["content"])
        assert (parsed.correct, parsed.incorrect) == (shot.correct, shot.incorrect)
        if shot.correct != "I have no comment.":
            assert check_pair(shot.question, parsed) is None


def test_zero_shot_and_too_many_shots():
    assert len(pair_messages("Why?", demonstrations("paper", "pair", 0))) == 1
    with pytest.raises(UsageError, match="there are 6"):
        demonstrations("paper", "pair", 7)


def test_sets_of_demonstrations_are_disjoint():
    sets = (("paper", "pair"), ("default", "pair"), ("default", "single"))
    assert len({shot.question for each in sets for shot in demonstrations(*each, 6)}) == 18


def test_only_paper_mode_shows_benchmark_text():
    overlaps = {name: mode.prompt_overlap for name, mode in MODES.items() if mode.prompt_overlap}
    assert overlaps.keys() == {"paper"}
    assert "TruthfulQA" in overlaps["paper"]


def test_paper_mode_has_the_primer_of_lm_eval():
    """Questions and right answers, as its TruthfulQA tasks put them before each question."""
    lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is a development extra")
    task = Path(lm_eval.__file__).parent / "tasks" / "truthfulqa" / "truthfulqa_mc1.yaml"
    template = yaml.safe_load(task.read_text(encoding="utf-8"))["doc_to_text"]
    theirs = re.findall(r"Q: (.+\?)\s+A: (.+\.)", template)
    ours = [(shot.question, shot.correct) for shot in demonstrations("paper", "pair", 6)]
    assert ours == theirs


def test_ground_truth_is_shown_in_the_demonstrations_too():
    shots = demonstrations("paper", "pair", 2)
    messages = answer_messages("Why?", shots, "pair", truth=("So.", "{question}"))
    shown = [message["content"] for message in messages[::2]]
    truths = [*(shot.candidates for shot in shots), ("So.", "{question}")]
    for text, (right, wrong) in zip(shown, truths, strict=True):
        assert f"A correct answer is known: {right}\nSo is an incorrect answer: {wrong}\n" in text
    assert [m["content"] for m in messages[1::2]] == [
        m["content"] for m in pair_messages("Why?", shots)[1::2]
    ]


def test_single_answer_prompts_differ_in_kind_only():
    shots = demonstrations("default", "single", 2)
    true, false = (answer_messages("Why?", shots, kind) for kind in ("correct", "incorrect"))
    assert true[1]["content"] == shots[0].correct
    assert false[1]["content"] == shots[0].incorrect
    assert true[0]["content"] != false[0]["content"]
    assert true[-1]["content"].endswith(": Why?")


def test_candidates_are_shown_only_where_given():
    for kind in ("pair", "correct"):
        (message,) = answer_messages("Why?", (), kind, candidates=("this", "that"))
        assert "this; that" in message["content"]
    assert "candidates" not in pair_messages("Why?", ())[-1]["content"]


def test_chat_prompt_ends_where_the_answer_begins(tokenizer):
    text = training_prompt(tokenizer, Question("q", "Why?"))
    assert text == "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    assert text == render_chat(tokenizer, question_messages("Why?"))


def test_qa_prompt_is_the_one_of_the_test(tokenizer):
    assert training_prompt(tokenizer, "Why?", "qa").endswith("Q: Why?\nA:")
    with pytest.raises(UsageError, match="valid ones are: chat, qa"):
        training_prompt(tokenizer, "Why?", "plain")


def test_completion_ends_with_the_end_token_once(tokenizer):
    assert training_completion(tokenizer, "So.", "chat") == "So.<|im_end|>"
    assert training_completion(tokenizer, "So.", "qa") == " So.<|im_end|>"


@pytest.mark.parametrize("prompt_format", ["chat", "qa"])
def test_prompt_and_completion_tokenize_apart_as_together(tokenizer, prompt_format):
    prompt = training_prompt(tokenizer, "Why is the sky there?", prompt_format)
    completion = training_completion(tokenizer, "The end.", prompt_format)
    ids = [prompts.token_ids(tokenizer, text) for text in (prompt, completion, prompt + completion)]
    assert ids[0] + ids[1] == ids[2]


def test_without_a_template_there_are_plain_lines(tiny_llama):
    base = AutoTokenizer.from_pretrained(tiny_llama)
    base.chat_template = None
    text = render_chat(base, pair_messages("Why?", demonstrations("default", "pair", 1)))
    assert text.startswith("User: Consider the following question: ")
    assert text.endswith("\nAssistant:")
    assert text.count("Assistant:") == 2
