"""Which model a command takes: one rule for all commands that take one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers import PAIRS, write_questions

from grath_utils.cli import main
from grath_utils.config import ModelConfig, load_config
from grath_utils.errors import GrathError
from grath_utils.files import write_jsonl
from grath_utils.loop.run_dir import open_run

TRAINED = {"name": "org/trained", "revision": "v1", "quantization": "nf4", "dtype": "float32"}
BRINGS_NOTHING = {"base_model_name_or_path": "org/elsewhere"}


class Seen(GrathError):
    """Raised in place of loading a model, once it is known which."""


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a profile, a run and two adapters; the loader says what it is asked."""
    monkeypatch.chdir(tmp_path)
    Path("own.yaml").write_text(
        "model: {name: org/profile, revision: v7, quantization: int8, dtype: float16}\n"
        "questions: {source: own}\n",
        encoding="utf-8",
    )
    write_jsonl(Path("pairs.jsonl"), [{**vars(pair), "iteration": 0} for pair in PAIRS])
    write_questions(Path("q.jsonl"))
    settings = {f"model.{key}": value for key, value in TRAINED.items()}
    open_run("run", load_config("smoke", settings))
    for name, record in {"run/iter_0/adapter": {}, "bare": {}, "whole": {"model": TRAINED}}.items():
        folder = Path(name)
        folder.mkdir(parents=True)
        (folder / "adapter_config.json").write_text(json.dumps(BRINGS_NOTHING))
        (folder / "grath.json").write_text(json.dumps(record))
    (tmp_path / "model").mkdir()

    def seen(base: ModelConfig, *_: Any, **__: Any) -> None:
        raise Seen(json.dumps(vars(base)))

    monkeypatch.setattr("grath_utils.loop.named_models.load_base", seen)
    monkeypatch.setattr("grath_utils.dpo.train_round", seen)
    monkeypatch.setattr("grath_utils.engine.pinned", lambda config: config)
    monkeypatch.setattr("grath_utils.engine.resolve", lambda config: config)
    return tmp_path


COMMANDS = {
    "pairs": "pairs --questions q.jsonl --out p.jsonl",
    "train": "train --pairs pairs.jsonl --out round",
    "evaluate": "evaluate --benchmark probe --out r.json",
}
PROFILE = {"name": "org/profile", "revision": "v7", "quantization": "int8", "dtype": "float16"}
# What is written, and what of the model's settings is then not as a ModelConfig has it.
RULE: dict[str, dict[str, Any]] = {
    "--profile own.yaml": PROFILE,
    "--profile own.yaml --set model.name=org/set": {**PROFILE, "name": "org/set"},
    "--profile own.yaml --set model.dtype=float32": {**PROFILE, "dtype": "float32"},
    "--profile own.yaml --set model.device=cpu": {**PROFILE, "device": "cpu"},
    "--profile own.yaml --set model.quantization=none": {**PROFILE, "quantization": "none"},
    "--profile own.yaml --set model.revision=v8": {**PROFILE, "revision": "v8"},
    "--profile smoke": {},
    "--profile smoke --model default": {},
    "--profile colab-t4": {
        "name": "small",
        "quantization": "nf4",
        "dtype": "float16",
    },
    # A revision is that of one model.
    "--profile own.yaml --model org/other": {**PROFILE, "name": "org/other", "revision": None},
    "--profile own.yaml --model org/profile": PROFILE,
    "--profile own.yaml --model org/other --set model.revision=v9": {
        **PROFILE,
        "name": "org/other",
        "revision": "v9",
    },
    "--profile own.yaml --model default": {**PROFILE, "name": "tiny", "revision": None},
    # What was trained brings the settings that it was trained with.
    "--profile own.yaml --model run@base": TRAINED,
    "--profile own.yaml --model run@0": TRAINED,
    "--profile own.yaml --model whole": TRAINED,
    "--profile own.yaml --model run@0 --set model.dtype=bfloat16": {**TRAINED, "dtype": "bfloat16"},
    "--model whole --set model.quantization=none model.device=cpu": {
        **TRAINED,
        "quantization": "none",
        "device": "cpu",
    },
    "--profile own.yaml --model bare": {**PROFILE, "name": "org/elsewhere", "revision": None},
}


@pytest.mark.parametrize("written", RULE)
@pytest.mark.parametrize("command", COMMANDS)
def test_the_model_is_that_of_the_option_or_of_the_settings(
    places: Path, capsys: pytest.CaptureFixture[str], command: str, written: str
) -> None:
    assert main([*COMMANDS[command].split(), *written.split()]) == 1
    found = json.loads(capsys.readouterr().err.removeprefix("error: "))
    assert found == {**vars(ModelConfig()), **RULE[written]}


@pytest.mark.parametrize(
    ("command", "expected"),
    [  # evaluate has no profile of itself
        ("pairs", ("small", "nf4")),
        ("train", ("small", "nf4")),
        ("evaluate", ("tiny", "none")),
    ],
)
def test_the_model_of_no_option_at_all(places: Path, capsys, command: str, expected) -> None:
    assert main(COMMANDS[command].split()) == 1
    found = json.loads(capsys.readouterr().err.removeprefix("error: "))
    assert (found["name"], found["quantization"]) == expected


@pytest.mark.parametrize("option", ["--dtype float32", "--set model.dtype=float32"])
def test_an_option_of_its_own_is_a_setting(places: Path, capsys, option: str) -> None:
    assert main([*COMMANDS["evaluate"].split(), "--model", "whole", *option.split()]) == 1
    assert json.loads(capsys.readouterr().err.removeprefix("error: "))["dtype"] == "float32"


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("written", "sentence"),
    [
        ("--model org/a --set model.name=org/b", 'names "org/a", and --set model.name "org/b"'),
        ("--model run@0 --set model.name=org/b", 'names "run@0", and --set model.name "org/b"'),
        ("--model run@7", "round 8 has no adapter"),
        ("--model nowhere@0", "holds no run"),
        ("--set model.nmae=x", 'did you mean "model.name"'),
    ],
)
def test_a_model_that_cannot_be_meant(
    places: Path, capsys, command: str, written: str, sentence: str
) -> None:
    assert main([*COMMANDS[command].split(), *written.split()]) == 2
    assert sentence in capsys.readouterr().err


def test_a_setting_that_is_given_twice(places: Path, capsys) -> None:
    command = f"{COMMANDS['evaluate']} --dtype float32 --set model.dtype=bfloat16"
    assert main(command.split()) == 2
    assert '"model.dtype" is given twice' in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("written", ["--model ./model", "--set model.name=model"])
def test_a_relative_folder_is_kept_by_its_whole_path(
    places: Path, capsys, command: str, written: str
) -> None:
    main([*COMMANDS[command].split(), *written.split()])
    found = json.loads(capsys.readouterr().err.removeprefix("error: "))
    assert found["name"] == str(places / "model")
