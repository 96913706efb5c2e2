"""What a command is told to write never costs a file: whatever is there stays, and that is said."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from helpers import ROOT

from grath_utils import loop
from grath_utils.cli.commands import main
from grath_utils.config import load_config
from grath_utils.engine.course_models import COURSE_MODELS
from grath_utils.errors import UsageError
from grath_utils.loop import named_models, stages
from grath_utils.loop.run_dir import open_run

PAIR = {"question": "Why?", "correct": "So.", "incorrect": "Not so."}
WRITE_FILES = {
    "evaluate": ["evaluate", "--benchmark", "probe", "--out"],
    "pairs": ["pairs", "--questions", "asked.jsonl", "--out"],
    "export": ["export", "pairs.jsonl", "--to"],
}
MAKE_FOLDERS = {
    "train": ["train", "--pairs", "pairs.jsonl", "--out"],
    "merge": ["merge", "--model", "run@0", "--to"],
    "mirror": ["mirror", "--to"],
    "sweep": ["sweep", "smoke_2x2x2", "--plan", "--out"],
    "classroom": ["classroom", "--profile", "smoke", "--run-dir", "new", "--to"],
    "run": ["run", "--no-notebooks", "--profile", "smoke", "--run-dir"],
    "dry run": ["run", "--dry-run", "--profile", "smoke", "--run-dir"],
    "run with notebooks": ["run", "--profile", "smoke", "--run-dir"],
    "checkpoint": ["checkpoint", "--at", "01", "--profile", "smoke", "--run-dir"],
    "render": ["render", "--profile", "smoke", "--run-dir"],
}
COMMANDS = WRITE_FILES | MAKE_FOLDERS


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of a user, which is also the working directory; no model can be loaded from it."""
    for name in ("results/old/notes.txt", "thesis.txt", "results/.notes.bak/notes"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("precious")
    rows = [json.dumps({"id": f"q{i}", **PAIR, "question": f"{i}?"}) + "\n" for i in range(4)]
    for name in ("pairs.jsonl", "asked.jsonl", "asked.rejects.jsonl", "iter_0/pairs.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("".join(rows))
    weights = tmp_path / "trained" / "checkpoints" / "checkpoint-500" / "model.safetensors"
    weights.parent.mkdir(parents=True)
    weights.write_text("two weeks of computing")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("results")
    (tmp_path / "linked.jsonl").symlink_to("asked.jsonl")
    os.link(tmp_path / "asked.jsonl", tmp_path / "same.jsonl")
    for name in ("mirror.json", "web/manifest.json", "web/points.json", "web/mirror.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('{"mine": 1}')
    monkeypatch.chdir(tmp_path)

    def load(*args: object) -> None:
        raise AssertionError("a model was loaded before the output was looked at")

    monkeypatch.setattr(named_models, "load_base", load)
    monkeypatch.setattr(stages, "base_weights_fingerprint", load)
    return tmp_path


def contents(folder: Path) -> dict[str, object]:
    """Return everything that lies in a folder: what a link names, what a file holds."""
    return {
        path.relative_to(folder).as_posix(): (
            os.readlink(path) if path.is_symlink() else path.is_file() and path.read_bytes()
        )
        for path in folder.rglob("*")
    }


def refused(place: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run a command that must end with code 2 and change nothing; return its sentence."""
    before = contents(place)
    try:
        code = main(list(arguments))
    except SystemExit as stop:  # argparse
        code = stop.code
    said = capsys.readouterr().err
    assert code == 2, said
    assert contents(place) == before
    return said


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    "there",
    ["results", "results/", "./results/../results", "link", ".", "..", "/", "trained", "web"],
)
def test_a_folder_of_something_else_stays(place: Path, capsys, command: str, there: str) -> None:
    said = refused(place, capsys, *COMMANDS[command], there)
    assert any(word in said for word in ("folder", "not written by", "where you are")), said


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("there", ["thesis.txt", "thesis.txt/below", "thesis.txt/below/it"])
def test_a_file_of_something_else_stays(place: Path, capsys, command: str, there: str) -> None:
    said = refused(place, capsys, *COMMANDS[command], there)
    assert "thesis.txt" in said
    assert "file" in said or "not written by this command" in said


@pytest.mark.parametrize("command", [*WRITE_FILES, "train", "merge", "mirror", "sweep"])
def test_an_empty_name_is_refused(place: Path, capsys, command: str) -> None:
    assert "is empty" in refused(place, capsys, *COMMANDS[command], "")


@pytest.mark.parametrize("command", WRITE_FILES)
@pytest.mark.parametrize(
    ("there", "message"),
    [
        ("empty", "is a folder, and stays; name a file"),
        ("new/", "names a folder; name a file"),
        ("mirror.json", "was not written by this command"),
        ("/dev/null", "is no ordinary file"),
    ],
)
def test_a_file_is_to_be_named(place: Path, capsys, command: str, there: str, message: str) -> None:
    assert message in refused(place, capsys, *COMMANDS[command], there)


INPUTS = ["asked.jsonl", "linked.jsonl", "same.jsonl", "results/../asked.jsonl", "./asked.jsonl"]


@pytest.mark.parametrize("out", INPUTS)
def test_questions_are_not_overwritten_by_the_answers(place: Path, capsys, out: str) -> None:
    """A file of pairs can be asked again, so it looks like an earlier output."""
    for source in ("asked.jsonl", str(place / "asked.jsonl")):
        for command in (["pairs", "--questions", source, "--out"], ["export", source, "--to"]):
            assert "is read by this command" in refused(place, capsys, *command, out)


def test_nor_by_what_was_rejected(place: Path, capsys) -> None:
    row = {"id": "q", **PAIR, "question": "Q?", "iteration": 0}
    (place / "written.jsonl").write_text(json.dumps(row) + "\n")  # an earlier output
    (place / "asked.rejects.jsonl").rename(place / "written.rejects.jsonl")
    questions = ["pairs", "--questions", "written.rejects.jsonl", "--out", "written.jsonl"]
    assert "written.rejects.jsonl is read by" in refused(place, capsys, *questions)
    questions[2] = "own"
    said = refused(place, capsys, *questions)
    assert "written.rejects.jsonl exists and was not written by this command" in said


def test_a_runs_own_files_are_written_by_the_run_alone(place: Path, capsys) -> None:
    run = open_run(place / "run", load_config("smoke"))
    run.manifest.write_text(json.dumps({"iter_0/pairs.jsonl": "0"}))
    (place / "iter_0").rename(run.iteration(0))
    for command in WRITE_FILES.values():
        said = refused(place, capsys, *command, "run/iter_0/pairs.jsonl")
        assert "belongs to the run in" in said


@pytest.mark.parametrize("command", ["run", "checkpoint", "classroom", "render"])
def test_the_default_run_directory_is_that_of_the_notebooks(
    place: Path, capsys, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    def start_run(path: Path, config: object) -> None:
        raise UsageError(f"it is {path}")

    monkeypatch.setattr(loop, "start_run", start_run)
    arguments = [word for word in COMMANDS[command][:-1] if word not in ("--run-dir", "new")]
    arguments += ["--to", "new"] if command == "classroom" else []
    assert str(ROOT / "runs" / "smoke") in refused(place, capsys, *arguments)


@pytest.mark.parametrize(
    ("cache", "reason"),
    [("thesis.txt", "is a file"), ("thesis.txt/below", "is a file"), ("results", "is not empty")],
)
def test_a_cache_that_cannot_be_written_is_to_be_set(
    place: Path, capsys, monkeypatch: pytest.MonkeyPatch, cache: str, reason: str
) -> None:
    monkeypatch.undo()
    monkeypatch.chdir(place)
    monkeypatch.setenv("GRATH_CACHE", cache)
    conversion = place / "results" / COURSE_MODELS["tiny"].conversion
    conversion.mkdir()
    (conversion / "half.safetensors").write_text("half")
    said = refused(place, capsys, *COMMANDS["pairs"], "new.jsonl", "--model", "tiny")
    assert f"{reason}" in said
    assert "set the environment variable GRATH_CACHE to a folder that can be written" in said


def test_without_a_home_folder_the_cache_is_to_be_set(
    place: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    monkeypatch.chdir(place)
    monkeypatch.delenv("GRATH_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as without HOME and an account
    said = refused(place, capsys, *COMMANDS["pairs"], "new.jsonl")
    assert "no home folder is known here; set the environment variable GRATH_CACHE" in said


def test_a_page_without_marks_stays(place: Path, capsys) -> None:
    open_run(place / "run", load_config("smoke"))
    for page in ("thesis.txt", "absent.md", "results", "run/notebooks"):
        assert refused(place, capsys, "timings", "--run-dir", "run", "--into", page)
