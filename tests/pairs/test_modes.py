"""The registry of modes, and what CONTRIBUTING.md says about adding one."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
from helpers import follow_contributing

from grath_utils.config import PairsConfig
from grath_utils.errors import ConfigError
from grath_utils.pairs.modes import MODES, check_pairs_config, find_mode
from grath_utils.pairs.writers import PairMode

ROOT = Path(__file__).parents[2]


def test_an_unknown_mode_gets_the_nearest_name():
    with pytest.raises(ConfigError, match='cannot be "papr"; did you mean "paper"'):
        find_mode("papr")


def test_every_mode_is_described_and_says_what_it_asks():
    for name, mode in MODES.items():
        assert mode.card.endswith(".")
        first, later = (mode.asked(PairsConfig(mode=name), iteration) for iteration in (0, 1))
        assert sum(later) <= sum(first)
        if not mode.writer.kinds:
            assert first.pairs == first.answers == 0


def test_a_mode_states_what_the_model_card_says():
    """A default would say "written by the model" of whatever is added."""
    facts = {field.name: getattr(MODES["pick"], field.name) for field in fields(PairMode)}
    for name in ("origin", "card"):
        with pytest.raises(TypeError, match=name):
            PairMode(**{key: value for key, value in facts.items() if key != name})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "pick", "annotated": True}, '"pairs.annotated" belongs to pairs.mode=default or'),
        ({"mode": "random", "self_check": True}, '"pairs.self_check" belongs to .*with random'),
        ({"mode": "default", "ground_truth": True}, '"pairs.ground_truth" belongs to .*mode=paper'),
        ({"mode": "pick", "prompt_file": "x"}, '"pairs.prompt_file" belongs to pairs.mode=paper'),
        ({"mode": "paper", "annotated": True, "ground_truth": True}, "annotated.* has no place"),
        ({"legacy": True}, '"pairs.legacy" belongs to pairs.mode=paper; with default leave it out'),
        ({"filters": ("near_equals",)}, 'did you mean "near_equal"'),
        ({"filters": ("none", "equal")}, 'cannot hold "none"'),
    ],
)
def test_settings_that_cannot_go_together(settings, message):
    with pytest.raises(ConfigError, match=message):
        check_pairs_config(PairsConfig(**settings))


def test_the_official_parser_knows_no_other_labels(tmp_path):
    file = tmp_path / "prompt.yaml"
    legacy = PairsConfig(mode="paper", legacy=True, shots=0, prompt_file=str(file))
    file.write_text("instruction: '{question}'\nlabels: {correct: 'True:', incorrect: 'False:'}\n")
    assert check_pairs_config(replace(legacy, legacy=False))
    with pytest.raises(ConfigError, match=r'"pairs.legacy" reads .*leave "labels" out of .*yaml'):
        check_pairs_config(legacy)
    file.write_text("instruction: '{question}'\nlabels: {question: 'The question:'}\n")
    assert check_pairs_config(legacy)


def test_listing_the_modes_loads_neither_torch_nor_numpy():
    code = "import sys, grath_utils.pairs.modes; print({'torch', 'numpy'} & sys.modules.keys())"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert run.stdout == "set()\n", run.stderr


FOLLOW = """
import sys
from pathlib import Path

from grath_utils.cli import main
from grath_utils.config import load_config
from grath_utils.course.export import model_card
from grath_utils.loop import start_run

model, questions, folder = sys.argv[1:]
overrides = [f"model.name={model}", "model.device=cpu", "model.dtype=float32",
             f"questions.source={questions}", "questions.limit=null", "pairs.mode=single"]
assert not main(["options"])
step = ["--questions", questions, "--model", model, "--out", f"{folder}/pairs.jsonl"]
assert not main(["pairs", "--mode", "single", *step, "--set", "pairs.filters=[none]",
                 "pairs.judge=none"])
assert not main(["run", "--dry-run", "--profile", "smoke", "--set", *overrides])
print(model_card(start_run(f"{folder}/run", load_config("smoke", overrides)), 0))
"""


@pytest.mark.slow
def test_the_page_on_adding_a_mode(tiny_llama, questions, tmp_path):
    follow_contributing("Add a pair mode", "pairs", '    "controls:RANDOM",\n', tmp_path)

    run = subprocess.run(
        [sys.executable, "-c", FOLLOW, tiny_llama, questions, tmp_path],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert "`single`: one greedy answer to each of two prompts" in run.stdout
    assert "8 pairs from 8 questions; 16 completions" in run.stdout
    assert "32" in re.search(r"completions to write, at most\D*(\d+)", run.stdout)[1]
    assert "on the model's first answer to each prompt" in run.stdout
    assert "mode `single`, all written by the model" in run.stdout
