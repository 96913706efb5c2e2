"""No input whatever ends in an unhandled exception: a search for bad input that has no row yet.

Command lines, profiles, grids, question files and damaged run directories are made at random. CI
tries the same few each time; ``make fuzz`` looks for new ones, ``GRATH_FUZZ`` says how many.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import write_questions
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from grath_utils.cli import build_parser, main
from grath_utils.config import Config
from grath_utils.course.notebooks import run_parameters
from grath_utils.errors import ModelError
from grath_utils.files import write_json
from grath_utils.loop.run_dir import Run

TRIES = int(os.environ.get("GRATH_FUZZ", 0))
NOTEBOOK = {
    "metadata": {"grath_execution": {"date": "2026-01-01", "files": 3}},
    "cells": [
        {"cell_type": "code", "source": ["x"], "metadata": {"papermill": {"duration": 2.5}}},
        {"cell_type": "markdown", "source": ["## 1"], "metadata": {}},
    ],
}
fuzz = settings(
    max_examples=TRIES or 60,
    derandomize=not TRIES,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)

NASTY = st.sampled_from(
    ["", " ", ".", "..", "/", "-", "--", "~", "a/b", "x" * 300, "雪😀", "\ud800", "a\0b", "=",
     *"nan 0 -1 1 1.5 1e400 true null [] { } %s \" ' a=b q.jsonl p.yaml".split(),
     *"run run@0 run@base run@x tiny own smoke".split(), "9" * 5000]
)  # fmt: skip
SCALAR = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([10**400, -(2**63), 1e308, float("nan"), float("inf"), "\ud800", "a\0b", ""]),
    st.floats(),
    st.text(max_size=8),
)
VALUE = st.recursive(
    SCALAR,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=6,
)


@pytest.fixture(scope="module", autouse=True)
def place(
    tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, small_run: Run
) -> Iterator[Path]:
    """A working folder with a tiny model, questions and a finished run."""
    folder = tmp_path_factory.mktemp("fuzz")
    shutil.copytree(tiny_llama, folder / "tiny")
    shutil.copytree(small_run.path, folder / "run")
    for name in ("00_start_here.ipynb", "01_pair_generation.ipynb"):
        write_json(folder / "run" / "notebooks" / name, NOTEBOOK)
    write_questions(folder / "q.jsonl")
    with contextlib.chdir(folder):
        yield folder


def outcome(*command: str) -> int:
    """Run a command; return its exit code, and check that an error has its sentence."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(command)
        except SystemExit as stop:  # argparse
            code = stop.code
    said = err.getvalue()
    assert code in (0, 1, 2), f"{command}: {code}, {said}"
    assert "Traceback" not in said
    assert (code != 0) == any("error: " in line for line in said.splitlines()), (command, said)
    return code


# --- command lines -------------------------------------------------------------------------------

(COMMANDS,) = (action.choices for action in build_parser()._actions if action.choices)
SETTINGS = st.builds(
    "{}={}".format, st.sampled_from([*Config().flat(), "x", ""]), NASTY | SCALAR.map(str)
)
# What may neither write to the repository nor ask the network, nor work for long.
ALWAYS = {
    "run": ["--dry-run"],
    "sweep": ["--plan"],
    "checkpoint": ["--run-dir", "made"],
    "render": ["absent.ipynb"],
    "classroom": ["--no-wheels", "--run-dir", "made"],
}


@st.composite
def command_lines(draw: st.DrawFn) -> list[str]:
    name = draw(st.sampled_from(sorted(COMMANDS.keys() - {"env"})))
    words = [name]
    for action in COMMANDS[name]._actions:
        asked = action.required or draw(st.integers(0, 3)) == 0
        if not asked or isinstance(action, argparse._HelpAction):
            continue
        words += action.option_strings[:1]
        if action.nargs != 0:
            value = SETTINGS if "--set" in action.option_strings else NASTY
            if action.choices:
                value |= st.sampled_from(sorted(action.choices))
            words += draw(st.lists(value, min_size=1, max_size=2 if action.nargs else 1))
    return [*words, *ALWAYS.get(name, [])]


@fuzz
@given(words=command_lines())
def test_any_command_line(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def none_here(*args: Any, **options: Any) -> None:
        raise ModelError("no model is loaded here")

    with monkeypatch.context() as patch:
        for place in ("models.load_stored", "stored.course_model_dir"):
            patch.setattr(f"grath_utils.engine.{place}", none_here)
        patch.setattr("grath_utils.evaluation.make_mirror", none_here)
        patch.setattr("builtins.input", lambda prompt: "")
        outcome(*words)
    shutil.rmtree("made", ignore_errors=True)


# --- profiles and grids --------------------------------------------------------------------------

SECTIONS = {key.partition(".")[0] for key in Config().flat()}
KEYS = st.sampled_from(sorted({key.rpartition(".")[2] for key in Config().flat()})) | st.text(
    max_size=3
)
TREES = st.dictionaries(
    st.sampled_from(sorted(SECTIONS)), VALUE | st.dictionaries(KEYS, VALUE, max_size=3), max_size=3
)
YAML = st.one_of(
    TREES.map(json.dumps).map(str.encode),
    st.text(st.sampled_from("ab:- \n\t[]{}&*!|>'\"#%@`,?=0189.~<"), max_size=40).map(str.encode),
    st.binary(max_size=40),
)


@fuzz
@given(content=YAML, override=SETTINGS)
def test_any_profile_and_any_grid(content: bytes, override: str) -> None:
    for file, command in (
        ("p.yaml", "options --profile p.yaml"),
        ("p.yaml", f"run --dry-run --run-dir absent --profile p.yaml --set\n{override}"),
        ("grid.yaml", "sweep grid.yaml --plan --out sweep"),
    ):
        Path(file).write_bytes(content)
        words, _, last = command.partition("\n")
        outcome(*words.split(), *([last] if last else []))


# --- question files ------------------------------------------------------------------------------

ROWS = st.dictionaries(
    st.sampled_from(["question", "id", "choices", "answerKey", "x", ""]),
    VALUE | st.fixed_dictionaries({"text": VALUE, "label": VALUE}),
    max_size=4,
)
LINES = st.one_of(
    ROWS.map(json.dumps).map(str.encode),
    VALUE.map(json.dumps).map(str.encode),
    st.text(st.sampled_from('ab,;"\r\0\u2028\u200bé'), max_size=12).map(str.encode),
    st.binary(max_size=12),
    st.sampled_from([b'{"question": "Why?"}', b"question,id", b"[" * 5000, b"9" * 5000]),
)


@fuzz
@given(lines=st.lists(LINES, max_size=4), kind=st.sampled_from(["jsonl", "csv"]))
def test_any_question_file(lines: list[bytes], kind: str) -> None:
    Path(f"mine.{kind}").write_bytes(b"\n".join(lines))
    for more in ([], ["--skip-bad"]):
        # No such model: that is what is wrong where the questions are not.
        words = ["--questions", f"mine.{kind}", "--model", "absent", "--out", "out.jsonl"]
        assert outcome("pairs", *words, *more) == 2


# --- run directories -----------------------------------------------------------------------------

READ = [
    "status --run-dir damaged",
    "report --run-dir damaged",
    "timings --run-dir damaged",
    "checkpoint --at 04 --from damaged --run-dir made",
]
LOAD = [
    "merge --model damaged@1 --to merged",
    "chat --run-dir damaged --ask Why --max-new-tokens 2",
    "evaluate --model damaged@0 --benchmark probe --limit 2 --out made.json",
]


def changed(draw: st.DrawFn, value: Any) -> Any:
    """Return JSON with one value, somewhere in it, taken away or replaced by another one."""
    if isinstance(value, (dict, list)) and value and draw(st.integers(0, 5)):
        keys = list(value) if isinstance(value, dict) else range(len(value))
        key = draw(st.sampled_from(keys))
        copy = value.copy()
        if draw(st.integers(0, 5)) == 0:
            del copy[key]
        else:
            copy[key] = changed(draw, value[key])
        return copy
    return draw(VALUE)


def damage(draw: st.DrawFn, file: Path) -> None:
    content = file.read_bytes()
    kind = draw(st.sampled_from(["cut", "flip", "gone", "folder", *["value"] * 6]))
    file.unlink()
    if kind == "folder":
        file.mkdir()
    elif kind == "cut":
        file.write_bytes(content[: draw(st.integers(0, len(content)))])
    elif kind == "flip":
        at = draw(st.integers(0, len(content) - 1))
        file.write_bytes(content[:at] + bytes([content[at] ^ 1 << at % 8]) + content[at + 1 :])
    elif kind == "value" and file.suffix in (".json", ".ipynb"):
        file.write_text(json.dumps(changed(draw, json.loads(content))), encoding="utf-8")
    elif kind == "value" and file.suffix == ".jsonl":
        rows = [changed(draw, json.loads(line)) for line in content.splitlines()]
        file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("commands", [READ, LOAD], ids=["read", "load"])
def test_any_damaged_run_directory(commands: list[str], small_run: Run) -> None:
    given_settings = shlex.split(run_parameters(small_run)["OVERRIDES"])
    again = ["run", "--no-notebooks", "--profile", "smoke", "--run-dir", "damaged", "--set"]

    @settings(fuzz, max_examples=TRIES or 30)
    @given(data=st.data())
    def search(data: st.DataObject) -> None:
        for name in ("damaged", "made", "merged"):
            shutil.rmtree(name, ignore_errors=True)
        shutil.copytree("run", "damaged")
        files = sorted(path for path in Path("damaged").rglob("*.*") if path.is_file())
        damage(data.draw, data.draw(st.sampled_from([f for f in files if f.name != ".lock"])))
        if data.draw(st.booleans()):  # or it would be noticed that something was changed
            Path("damaged/manifest.json").unlink(missing_ok=True)
        for command in commands:
            outcome(*command.split())
        if commands is LOAD:
            outcome(*again, *given_settings)

    search()
