"""Pairs as prompt, chosen and rejected: others' tools take ours, and theirs are read here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers import PAIRS, write_questions
from transformers import AutoTokenizer
from trl.data_utils import is_conversational, maybe_apply_chat_template

from grath_utils.cli import main
from grath_utils.config import PairsConfig, QuestionsConfig
from grath_utils.engine.models import Policy
from grath_utils.errors import DataError
from grath_utils.files import read_jsonl, write_jsonl
from grath_utils.pairs.generate import generate_pairs, read_pairs
from grath_utils.pairs.preferences import FORMS, preference_row
from grath_utils.pairs.prompts import training_prompt
from grath_utils.pairs.questions import load_questions

ASKED = [{"role": "user", "content": "What is the sun?"}]
GOOD = {"role": "assistant", "content": "It is a star."}
BAD = {"role": "assistant", "content": "It is a lamp."}


@pytest.mark.parametrize("form", FORMS)
def test_what_is_exported_is_read_again(form: str, tmp_path: Path, capsys) -> None:
    write_jsonl(tmp_path / "own.jsonl", (pair.to_row() for pair in PAIRS))
    out = tmp_path / "out.jsonl"
    command = ["export", str(tmp_path / "own.jsonl"), "--to", str(out), "--form", form]
    assert main(command) == 0
    assert f"{len(PAIRS)} pairs" in capsys.readouterr().out
    assert read_pairs(out) == PAIRS
    assert main(command) == 0  # its own output may be replaced
    assert main([*command[:1], str(out), "--to", str(out)]) == 2  # what it reads may not


def test_trl_makes_of_it_the_prompt_that_we_train_on(tiny_llama: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    row = {
        key: value
        for key, value in preference_row(PAIRS[0], "conversational").items()
        if key in ("prompt", "chosen", "rejected")
    }
    assert is_conversational(row)
    made = maybe_apply_chat_template(row, tokenizer)
    assert made["prompt"] == training_prompt(tokenizer, PAIRS[0].question)
    assert made["chosen"].startswith(PAIRS[0].correct)
    assert made["rejected"].startswith(PAIRS[0].incorrect)


THEIRS: dict[str, dict[str, Any]] = {
    "plain, as TRL has it": {
        "prompt": "What is the sun?",
        "chosen": " It is a star.",
        "rejected": " It is a lamp.",
    },
    "a question": {
        "question": "What is the sun?",
        "chosen": "It is a star.",
        "rejected": "It is a lamp.",
    },
    "conversational": {"prompt": ASKED, "chosen": [GOOD], "rejected": [BAD]},
    "without a prompt": {"chosen": [*ASKED, GOOD], "rejected": [*ASKED, BAD]},
    "UltraFeedback": {
        "prompt": "What is the sun?",
        "chosen": [*ASKED, GOOD],
        "rejected": [*ASKED, BAD],
        "score_chosen": 8.0,
    },
}


@pytest.mark.parametrize("form", THEIRS)
@pytest.mark.parametrize("ending", [".jsonl", ".json"])
def test_theirs_are_read(form: str, ending: str, tmp_path: Path) -> None:
    file = tmp_path / f"theirs{ending}"
    file.write_text(json.dumps([THEIRS[form]] if ending == ".json" else THEIRS[form]))
    (pair,) = read_pairs(file)
    assert (pair.id, pair.question) == ("p-00001", "What is the sun?")
    assert (pair.correct, pair.incorrect) == ("It is a star.", "It is a lamp.")


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"prompt": [*ASKED, GOOD, *ASKED], "chosen": "a", "rejected": "b"}, "has 3 messages"),
        ({"prompt": [GOOD], "chosen": "a", "rejected": "b"}, 'by the user but by "assistant"'),
        ({"prompt": "Q?", "chosen": ASKED, "rejected": [BAD]}, 'by the assistant but by "user"'),
        ({"chosen": "a", "rejected": "b"}, '"prompt" is missing or no text'),
        ({"prompt": "Q?", "chosen": "a", "rejected": " "}, '"rejected" is missing or no text'),
        ({"prompt": "Q?", "chosen": "a", "rejected": "a"}, 'both answers are "a"'),
        ({"prompt": "Q?", "chosen": [1], "rejected": "a"}, '"chosen" is missing or no text'),
        (
            {"chosen": [{"role": "user", "content": "Other?"}, GOOD], "rejected": [*ASKED, BAD]},
            "do not answer the same",
        ),
        (
            {"prompt": "Other?", "chosen": [*ASKED, GOOD], "rejected": [*ASKED, BAD]},
            '"prompt" is not what "chosen" answers',
        ),
        (
            {"prompt": "Q?", "system": "Be brief.", "chosen": "a", "rejected": "b"},
            '"system" stands',
        ),
        ({"prompt": "Q?", "history": [["a", "b"]], "chosen": "a", "rejected": "b"}, '"history" st'),
        (
            {"prompt": "Q?", "chosen": [GOOD | {"tool_calls": [{}]}], "rejected": [BAD]},
            'has "tool_calls" beside its content',
        ),
        ({"prompt": "Q?\0", "chosen": "a", "rejected": "b"}, '"question" is missing or no text'),
    ],
)
def test_what_is_no_pair_is_named(row: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "p.jsonl", [THEIRS["conversational"], row])
    with pytest.raises(DataError, match=sentence) as caught:
        read_pairs(tmp_path / "p.jsonl")
    assert "p.jsonl, pair 2" in str(caught.value)


def test_a_run_can_be_trained_on_theirs(tiny_policy: Policy, tmp_path: Path) -> None:
    """As questions whose right answer the source knows, for pairs.mode=gold."""
    write_jsonl(tmp_path / "theirs.jsonl", [THEIRS["conversational"]])
    found = load_questions(QuestionsConfig(source=str(tmp_path / "theirs.jsonl")), 0)
    out, rejects = tmp_path / "pairs.jsonl", tmp_path / "rejects.jsonl"
    how = {"seed": 0, "out": out, "rejects": rejects, "progress": False}
    generate_pairs(tiny_policy, found.questions, PairsConfig(mode="gold"), **how)
    (row,) = read_jsonl(out)
    assert (row["correct"], row["incorrect"]) == ("It is a star.", "It is a lamp.")


@pytest.mark.parametrize("own", ["id question correct incorrect", "prompt chosen rejected id"])
def test_a_file_with_columns_of_its_user_stays(own: str, tmp_path: Path, capsys) -> None:
    write_jsonl(tmp_path / "own.jsonl", (pair.to_row() for pair in PAIRS))
    write_questions(tmp_path / "q.jsonl")
    mine = tmp_path / "mine.jsonl"
    write_jsonl(mine, [dict.fromkeys([*own.split(), "checked_by"], "me") | {"iteration": 0}])
    before, to = mine.read_bytes(), str(mine)
    for command in (
        ["export", str(tmp_path / "own.jsonl"), "--to", to],
        ["pairs", "--profile", "smoke", "--questions", str(tmp_path / "q.jsonl"), "--out", to],
    ):
        assert main(command) == 2
        assert "was not written by this command" in capsys.readouterr().err
        assert mine.read_bytes() == before


def test_an_export_replaces_nobody_s_file(tmp_path: Path, capsys) -> None:
    write_jsonl(tmp_path / "own.jsonl", (pair.to_row() for pair in PAIRS))
    write_questions(tmp_path / "mine.jsonl")
    before = (tmp_path / "mine.jsonl").read_bytes()
    arguments = ["export", str(tmp_path / "own.jsonl"), "--to", str(tmp_path / "mine.jsonl")]
    assert main(arguments) == 2
    assert "was not written by this command" in capsys.readouterr().err
    assert (tmp_path / "mine.jsonl").read_bytes() == before
