"""Notebook 00b, which writes the method in plain torch, agrees with the package at every step."""

from __future__ import annotations

import importlib
import math
import random
import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn.utils.rnn import pad_sequence

from grath_utils.course.exercises import check, nb00b
from grath_utils.course.exercises.judging import NOT_YET, RIGHT
from grath_utils.dpo import dpo_loss
from grath_utils.engine import Policy, Request, generate, score_completions
from grath_utils.evaluation.metrics import mc1
from grath_utils.files import data_dir, read_jsonl
from grath_utils.pairs import (
    Case,
    check_pair,
    letters_question,
    pair_messages,
    parse_pair,
    render_chat,
)
from grath_utils.pairs.judge import by_letters
from grath_utils.pairs.prompts import own_demonstrations, training_request

NOTEBOOK = Path(__file__).resolve().parents[2] / "notebooks" / "00b_grath_by_hand.ipynb"
CELLS = nbformat.read(NOTEBOOK, as_version=4).cells
METHOD = [cell.source for cell in CELLS if "method" in cell.metadata.get("tags", [])]
PROSE = "\n".join(cell.source for cell in CELLS if cell.cell_type == "markdown")
PAIRS = [
    ("Why does a stone fall?", "Gravity pulls the stone down.", "The stone wants to be below."),
    ("What burns?", "Dry wood burns.", "Water burns when it is warm enough to do so."),
    ("How many legs has a spider?", "A spider has eight legs.", "A spider has six legs."),
    ("What do plants need?", "Plants need light.", "Plants need darkness."),
]
SIDES = "Correct answer: It rises.\nIncorrect answer: It sinks."


@pytest.fixture
def hand(tiny_policy: Policy) -> dict[str, Any]:
    """What the notebook's cells of the method define, with the tiny model's tokenizer."""
    rows = [row for row in read_jsonl(data_dir() / "demonstrations.jsonl") if row["set"] == "pair"]
    space = {
        "F": F, "LoraConfig": LoraConfig, "PeftModel": PeftModel, "SEED": 0,
        "get_peft_model": get_peft_model, "pad_sequence": pad_sequence, "random": random,
        "shown": rows[:3], "tokenizer": tiny_policy.tokenizer, "torch": torch,
    }  # fmt: skip
    for source in METHOD:
        exec(source, space)
    return space


def test_the_method_is_about_150_lines() -> None:
    lines = [line for source in METHOD for line in source.splitlines() if line.strip()]
    assert 100 < len(lines) <= 170
    assert "grath_utils" not in "\n".join(lines)


def test_the_same_question_is_asked_and_answered(hand: dict, tiny_policy: Policy) -> None:
    asked = [question for question, _, _ in PAIRS[:2]]
    shots = own_demonstrations("pair")[:3]
    prompts = [render_chat(tiny_policy.tokenizer, pair_messages(q, shots)) for q in asked]
    chats = [hand["pair_chat"](question) for question in asked]
    assert [hand["as_text"](chat) for chat in chats] == prompts
    done = generate(tiny_policy, prompts, max_new_tokens=80)
    assert hand["complete"](tiny_policy.model, chats) == [one.text for one in done]


@pytest.mark.parametrize(
    ("completion", "is_pair"),
    [
        (SIDES, True),
        (f"Question: Why?\n{SIDES}", True),
        (f"\n{SIDES}\n\nQuestion: Why?\n{SIDES.replace('It', 'She')}", True),
        ("Incorrect answer: It sinks.\nCorrect answer: It rises.", True),
        ("  Correct answer:   It rises. \n  Incorrect answer: Does it sink?", True),
        ("Correct answer: It rises.", False),
        ("Incorrect answer: It sinks.", False),
        ("It rises, and does not sink.", False),
        ("Correct answer:\nIncorrect answer: It sinks.", False),
        ("Correct answer: It sinks.\nIncorrect answer: It Sinks.", False),
        ("", False),
    ],
)
def test_a_completion_is_read_in_the_same_way(hand: dict, completion: str, is_pair: bool) -> None:
    parsed = parse_pair(completion)
    mine = hand["parse_completion"](completion)
    assert (mine is not None) == is_pair
    assert (check_pair("Why does it rise?", parsed) is None) == is_pair
    if is_pair:
        assert mine == parsed.sides


def test_what_the_strict_parser_takes_the_package_takes_as_well(hand: dict) -> None:
    texts = list(nb00b.decorated_completions())
    taken = [(text, mine) for text in texts if (mine := hand["parse_completion"](text))]
    assert 0 < len(taken) < len(texts)
    for text, mine in taken:
        assert parse_pair(text).sides == mine


def test_an_answer_that_was_cut_off_is_dropped(hand: dict) -> None:
    assert hand["parse_completion"](SIDES[:-1]) is None


def test_the_judge_gives_the_same_probabilities(hand: dict, tiny_policy: Policy) -> None:
    cases = [Case(question, question, sides) for question, *sides in PAIRS]
    package = by_letters(letters_question, tiny_policy, cases)
    for pair, shares in zip(PAIRS, package, strict=True):
        two = hand["judge_pair"](tiny_policy.model, *pair)
        assert sum(two) / 2 == pytest.approx(shares[0], abs=1e-5)
    kept, turned = hand["judged_pair"](*PAIRS[0], 0.55), hand["judged_pair"](*PAIRS[0], 0.45)
    assert kept == PAIRS[0]
    assert turned == (PAIRS[0][0], *PAIRS[0][:0:-1])
    assert hand["judged_pair"](*PAIRS[0], 0.5) is None


def test_log_probabilities_and_losses_are_the_same(hand: dict, tiny_policy: Policy) -> None:
    with torch.no_grad():
        sums = hand["pair_log_probs"](tiny_policy.model, PAIRS)
    for side, mine in zip((1, 2), sums, strict=True):
        requests = [
            training_request(tiny_policy.tokenizer, pair[0], pair[side], "qa", item=pair[0])
            for pair in PAIRS
        ]
        package = [score.logprob for score in score_completions(tiny_policy, requests)]
        assert mine.tolist() == pytest.approx(package, abs=1e-3)
    four = torch.randn(4, 50, generator=torch.Generator().manual_seed(0)) * 20 - 40
    losses, chosen, rejected = dpo_loss(*four, 0.3)
    mine, margins = hand["preference_loss"](*four, 0.3)
    assert torch.allclose(mine, losses, atol=1e-5)
    assert torch.allclose(margins, chosen - rejected, atol=1e-5)


def test_mc1_gives_the_same_verdict(hand: dict, tiny_policy: Policy) -> None:
    verdicts = []
    for item in read_jsonl(data_dir() / "probe.jsonl")[:12]:
        choices, labels = item["mc1_targets"]["choices"], item["mc1_targets"]["labels"]
        requests = [Request(f"Q: {item['question']}\nA:", f" {c}", item["id"]) for c in choices]
        scores = [score.logprob for score in score_completions(tiny_policy, requests)]
        verdicts.append(mc1(scores, labels.index(1)))
        assert (hand["lead_of_truth"](tiny_policy.model, item) > 0) == verdicts[-1]
    assert set(verdicts) == {0, 1}


def test_training_starts_at_ln_2_learns_and_leaves_the_base_as_it_was(
    hand: dict, tiny_policy: Policy
) -> None:
    with torch.no_grad():
        before = torch.stack(hand["pair_log_probs"](tiny_policy.model, PAIRS))
    model, logs = tiny_policy.model, []
    for name in ("own", "coin"):
        model = hand["with_adapter"](model, name)
        logs.append(hand["train_by_hand"](model, PAIRS, 5))
    assert logs[0] == logs[1]  # the same pairs: adapters start from the same numbers
    first, *_, last = logs[0]
    assert first == pytest.approx({"loss": math.log(2), "margin": 0, "chosen": 0}, abs=1e-5)
    assert last["margin"] > 0 > last["loss"] - math.log(2)
    with torch.no_grad(), model.disable_adapter():
        after = torch.stack(hand["pair_log_probs"](model, PAIRS))
    assert torch.allclose(after, before, atol=1e-4)


def test_refinement_keeps_the_incorrect_answers(hand: dict, tiny_policy: Policy) -> None:
    new = {"Why does a stone fall?": "The Earth attracts it.", "What burns?": None}
    hand["complete"] = lambda model, chats: [
        f"Correct answer: {new.get(question)}\nIncorrect answer: No." if new.get(question) else ""
        for question in (pair[0] for pair in PAIRS)
    ]
    for believed, wanted in ((0.6, "The Earth attracts it."), (0.5, PAIRS[0][1])):
        hand["judge_pair"] = lambda *pair, p=believed: (p, p)
        refined = hand["refined_pairs"](tiny_policy.model, PAIRS)
        assert refined == [(PAIRS[0][0], wanted, PAIRS[0][2]), *PAIRS[1:]]


def test_the_coin_turns_some_pairs_and_changes_no_text(hand: dict) -> None:
    tossed = hand["tossed_pairs"](PAIRS * 10, 0)
    turned = sum(a != b for a, b in zip(PAIRS * 10, tossed, strict=True))
    assert 10 < turned < 30
    assert [sorted(pair) for pair in tossed] == [sorted(pair) for pair in PAIRS * 10]


def test_the_table_names_what_there_is(hand: dict) -> None:
    rows = re.findall(r"^\| `(\w+)` \| (.+?) \|", PROSE, re.MULTILINE)
    assert len(rows) >= 12
    for mine, package in rows:
        assert callable(hand[mine])
        for room, name in re.findall(r"`(\w+)\.(\w+)`", package):
            assert callable(getattr(importlib.import_module(f"grath_utils.{room}"), name))


@pytest.mark.slow
def test_trls_lines_train(hand: dict, tiny_policy: Policy, tmp_path: Path) -> None:
    (lines,) = re.findall(r"```python\n(.*?)```", PROSE, re.DOTALL)
    lines = lines.replace('"somewhere"', f"{str(tmp_path)!r}, logging_steps=1, report_to='none'")
    space = {**hand, "policy": tiny_policy, "pairs": PAIRS}
    exec(lines.replace('"max_steps": 12', '"max_steps": 2'), space)
    losses = [row["loss"] for row in space["trainer"].state.log_history if "loss" in row]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-3)
    assert losses[1] != losses[0]


# --- the exercises -------------------------------------------------------------------------------


def parsed_sides(text: str) -> tuple[str, str] | None:
    parsed = parse_pair(text)
    return None if parsed.reason else parsed.sides


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (parsed_sides, RIGHT),
        (lambda text: (parsed_sides(text) or ())[::-1] or None, "correct first"),
        (lambda text: None, "holds both answers"),
        (lambda text: parsed_sides(text) or ("", ""), "one of the two answers is missing"),
        (lambda text: text.splitlines()[1:], "one of the two answers is missing|bare answers"),
        ("no function", "the function itself"),
    ],
)
def test_a_parser_is_tried_on_decorated_completions(answer: Any, says: str) -> None:
    assert re.search(says, repr(check(None, "00b.easy", answer)))


def test_the_strict_parser_of_the_notebook_is_not_enough(hand: dict) -> None:
    verdict = check(None, "00b.easy", hand["parse_completion"])
    assert verdict.state == NOT_YET
    assert "holds both answers" in verdict.text


def share(wanted: float, other: float) -> float:
    return 1 / (1 + math.exp(min(other - wanted, 700)))


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (lambda a, b: (share(*a) + share(*b[::-1])) / 2, RIGHT),
        (lambda a, b: (share(*a) + share(*b)) / 2, "is B, not A"),
        (lambda a, b: share(*a), "another probability"),
        (lambda a, b: share(a[0] + b[1], a[1] + b[0]), "another probability"),
        (lambda a, b: math.exp(a[0]) / (math.exp(a[0]) + math.exp(a[1])), "another|division"),
        (lambda a, b: 1 / 0, "See the hint"),
        (0.5, "the function itself"),
    ],
)
def test_the_average_over_both_orders_is_tried(answer: Any, says: str) -> None:
    assert re.search(says, repr(check(None, "00b.medium", answer)))


def loss_and_slope(c: float, r: float, rc: float, rr: float, beta: float) -> tuple[float, float]:
    margin = beta * ((c - rc) - (r - rr))
    small = math.exp(-abs(margin))
    weight = (1 if margin < 0 else small) / (1 + small)
    return max(-margin, 0) + math.log1p(small), -beta * weight


def as_the_formula_says(c: float, r: float, rc: float, rr: float, beta: float) -> tuple:
    margin = beta * ((c - rc) - (r - rr))
    return math.log(1 + math.exp(-margin)), -beta / (1 + math.exp(margin))


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (loss_and_slope, RIGHT),
        (as_the_formula_says, "See the hint"),
        (lambda *four: loss_and_slope(*four[:4], 0.1), "another loss"),
        (lambda *four: (loss_and_slope(*four)[0], 0.0), "another slope"),
        (lambda *four: loss_and_slope(*four)[0], "could not be used"),
        (lambda *four: 1 / 0, "See the hint"),
    ],
)
def test_the_loss_in_plain_python_is_tried(answer: Any, says: str) -> None:
    assert re.search(says, repr(check(None, "00b.hard", answer)))


def test_whatever_a_function_raises_is_a_verdict() -> None:
    said = repr(check(None, "02.easy", lambda *four: 1 / 0))
    assert "could not be used (ZeroDivisionError: division by zero)" in said
