"""Prompt files: the form, and what is said of one that cannot be used."""

from __future__ import annotations

from pathlib import Path

import pytest

from grath_utils.config import PairsConfig, load_config
from grath_utils.errors import ConfigError
from grath_utils.files import data_dir
from grath_utils.pairs.modes import check_pairs_config
from grath_utils.pairs.prompt_file import read_wording
from grath_utils.pairs.prompts import Labels, Wording

ASK = "instruction: 'About {question}:'\n"
SHOT = "{question: 'Is it?', correct: It is., incorrect: No."


def config_of(path: Path, **settings: object) -> PairsConfig:
    return PairsConfig(mode="paper", prompt_file=str(path), **{"shots": 0, **settings})


def test_without_a_file_the_words_are_our_own() -> None:
    assert read_wording(PairsConfig(mode="paper")) == Wording()


def test_the_empty_file_of_the_project_has_the_form() -> None:
    words = read_wording(config_of(data_dir() / "prompt_file.yaml", ground_truth=True))
    assert (words.labels, words.demonstrations) == (Labels(), ())


@pytest.mark.parametrize(
    ("text", "settings", "message"),
    [
        ("", {}, '"instruction" is missing'),
        ("3", {}, '"instruction" is missing'),
        ("instruction: Answer.", {}, '"instruction" has no place for the question: {question}'),
        ("instruction: 3", {}, '"instruction" is 3; expected text'),
        ("instruction: [", {}, "not valid YAML"),
        (f"{ASK}instructions: x", {}, 'unknown key "instructions"; did you mean "instruction"'),
        (f"{ASK}ground_truth: '{{question}}'", {}, '"ground_truth" has no place for the correct'),
        (ASK, {"ground_truth": True}, '"ground_truth" is missing'),
        (f"{ASK}labels: {{correct: 'Sure'}}", {}, '"labels" cannot be told'),
        (f"{ASK}labels: {{right: 'Right:'}}", {}, 'unknown key "labels.right"'),
        (f"{ASK}labels: x", {}, '"labels" holds .*; expected keys below it'),
        (f"{ASK}demonstrations: x", {}, '"demonstrations" is no list'),
        (f"{ASK}demonstrations: [x]", {}, r"demonstrations\[0\].* holds 'x'"),
        (f"{ASK}demonstrations: [{{}}]", {}, r'"demonstrations\[0\].question" is missing'),
        (f"{ASK}demonstrations: [{SHOT}, candidates: [a]}}]", {}, "a right answer and a wrong one"),
        (f"{ASK}demonstrations: [{SHOT}}}]", {"shots": 2}, "has 1 of them; set pairs.shots=1"),
    ],
)
def test_a_file_that_cannot_be_used_is_named_with_the_key(
    tmp_path: Path, text: str, settings: dict[str, object], message: str
) -> None:
    path = tmp_path / "prompt.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=f"prompt.yaml.*{message}"):
        check_pairs_config(config_of(path, **settings))


def test_a_file_is_found_from_other_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.yaml").write_text(ASK, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    config = load_config("paper-llama2", "pairs.prompt_file=mine.yaml pairs.shots=0")
    monkeypatch.chdir("/")
    assert read_wording(config.pairs).instruction == "About {question}:"
    missing = load_config("paper-llama2", "pairs.prompt_file=none.yaml").pairs
    with pytest.raises(ConfigError, match=r"none\.yaml"):
        read_wording(missing)
