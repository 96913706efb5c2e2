"""The command line as a user meets it: help, exit codes, clear errors, the same results."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import finish, start

from grath_utils import __version__
from grath_utils.cli import commands as cli
from grath_utils.cli import runs
from grath_utils.cli.settings import KINDS
from grath_utils.config import BUILT_IN_SOURCES, PROFILES, load_config, profile_names
from grath_utils.engine.course_models import COURSE_MODELS
from grath_utils.errors import ConfigError, RunError, UsageError
from grath_utils.evaluation.benchmarks import BENCHMARKS
from grath_utils.files import read_yaml
from grath_utils.loop.plan import check_settings
from grath_utils.loop.run_dir import open_run
from grath_utils.pairs.judge import JUDGES
from grath_utils.pairs.modes import MODES


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Run a command in this process; return exit code, output and errors."""
    try:
        code = cli.main([str(a) for a in arguments])
    except SystemExit as stop:  # argparse
        code = int(stop.code or 0)
    out, err = capsys.readouterr()
    return code, out, err


def test_help_of_every_command_ends_with_an_example_that_parses(capsys) -> None:
    parser = cli.build_parser()
    (commands,) = (action.choices for action in parser._actions if action.choices)
    assert len(commands) == 21
    for command in commands:
        code, out, _ = call(capsys, command, "--help")
        assert code == 0
        assert "%%" not in out
        examples = out.partition("\nExample:\n")[2].splitlines()
        assert examples, command
        for example in examples:
            _, _, words = example.partition("  grath ")
            options = parser.parse_args(shlex.split(words.partition(" -- ")[0]))
            assert options.command.work.__name__ == f"do_{command}"


@pytest.mark.parametrize("value", ["-1", "4294967296", "1e3", "1.5", "", "9" * 5000, "nan", "²"])
def test_every_whole_number_of_every_command_is_checked_first(value: str) -> None:
    parser, found = cli.build_parser(), set()
    (commands,) = (action.choices for action in parser._actions if action.choices)
    for name, command in commands.items():
        for action in command._actions:
            option = action.option_strings[-1] if action.option_strings else ""
            if option in ("--seed", "--limit", "--jobs", "--cell-timeout", "--max-new-tokens"):
                found.add(option)
                with pytest.raises(UsageError, match="seed|" + option) as error:
                    parser.parse_args([name, f"{option}={value}"])
                assert re.search(r" is .*; expected a whole number from [01] to", str(error.value))
                assert len(str(error.value)) < 120
            else:  # a new one must join them
                assert action.type not in (int, float) or option == "--held-out"
    assert len(found) == 5


def test_no_command_is_answered_with_the_help_and_counts_as_wrong_usage(capsys) -> None:
    code, out, err = call(capsys)
    assert (code, out) == (2, "")
    assert err.startswith("usage: grath ")
    assert "\n    evaluate " in err


def test_the_version(capsys) -> None:
    assert call(capsys, "--version")[:2] == (0, f"grath {__version__}\n")


def test_a_run_directory_is_a_word_or_an_option(capsys, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    open_run(Path("runs/mine"), load_config("smoke"))
    said = [
        call(capsys, "status", *words)
        for words in (["runs/mine"], ["--run-dir", "runs/mine"], ["--run-dir=runs/mine"])
    ]
    assert said[0][0] == 0
    assert said[1:] == said[:-1]
    for words in (["--json", "runs/mine"], ["runs/mine", "--json"]):
        code, out, _ = call(capsys, "status", *words)
        found = json.loads(out)
        assert code == 0
        assert (found["profile"], found["done"], len(found["stages"])) == ("smoke", 0, 13)
    code, _, err = call(capsys, "status")
    assert code == 2
    assert "name a run directory, as in `grath status runs/cpu`; here are runs/mine" in err
    for words in (["a", "--run-dir", "b"], ["--run-dir", "a", "b"], ["a", "b"]):
        assert call(capsys, "status", *words)[0] == 2


@pytest.mark.parametrize("kind", KINDS)
def test_what_there_is_to_choose_from_is_listed(capsys, kind: str) -> None:
    code, out, _ = call(capsys, "ls", kind, "--json")
    (rows,) = json.loads(out).values()
    assert code == 0
    lines = call(capsys, "ls", kind)[1].splitlines()
    assert [line.split()[0] for line in lines] == [*rows]
    assert all(rows.values())
    assert (
        set(rows)
        >= {
            "benchmarks": set(BENCHMARKS),
            "profiles": set(profile_names()),
            "questions": set(BUILT_IN_SOURCES),
            "modes": set(MODES),
            "judges": {"none", *JUDGES},
            "models": set(COURSE_MODELS),
        }[kind]
    )


def test_init_writes_a_profile_that_is_the_same_and_never_overwrites(capsys, tmp_path) -> None:
    mine = tmp_path / "mine.yaml"
    code, out, _ = call(capsys, "init", mine, "--profile", "smoke")
    assert code == 0
    assert str(mine) in out
    ours, theirs = load_config(str(mine)).flat(), load_config("smoke").flat()
    assert {**ours, "profile": ""} == {**theirs, "profile": ""}
    text = mine.read_text()
    assert text.startswith("# yaml-language-server: $schema=grath.schema.json\n")
    assert "Far too little data" in text  # its own comments are there
    code, _, err = call(capsys, "init", mine)
    assert code == 2
    assert "is there already" in err
    assert mine.read_text() == text
    again = tmp_path / "again.yaml"  # a copy of a copy names the schema once
    assert call(capsys, "init", again, "--profile", mine)[0] == 0
    assert again.read_text().count("$schema=") == 1
    assert call(capsys, "init", tmp_path / "mine")[0] == 2


def test_the_schema_takes_every_profile_and_no_wrong_one(capsys, tmp_path) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads(call(capsys, "schema")[1])
    for name in profile_names():
        jsonschema.validate(read_yaml(PROFILES / f"{name}.yaml"), schema)
    for wrong in (
        {"dpo": {"bta": 1}},
        {"dpo": {"beta": 0}},
        {"dpo": {"steps": 1.5}},
        {"model": {"dtype": "half"}},
        {"pairs": {"mode": "papper"}},
        {"evaluation": {"benchmarks": ["prob"]}},
        {"seed": None},
    ):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, schema)
        with pytest.raises(ConfigError):
            check_settings(load_config(wrong))
    for right in ({"dpo": None}, {"questions": {"limit": None}}, {"lora": {"targets": "q_proj"}}):
        jsonschema.validate(right, schema)


def test_env_prints_what_a_bug_report_needs(capsys) -> None:
    code, out, _ = call(capsys, "env")
    assert code == 0
    for word in ("torch:", "transformers:", "trl:", "bitsandbytes:", "cache:", "accelerator:"):
        assert word in out


def test_options_lists_every_setting(capsys) -> None:
    code, out, _ = call(capsys, "options", "--profile", "paper-llama2")
    assert code == 0
    assert "dpo.steps = 1000" in out
    assert all(f"{key} = " in out for key in load_config("cpu").flat())
    rows = json.loads(call(capsys, "options", "--profile", "paper-llama2", "--json")[1])
    values = load_config("paper-llama2").to_dict()
    assert rows["dpo.steps"]["value"] == values["dpo"]["steps"] == 1000
    assert rows.keys() == load_config("cpu").flat().keys()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("run", "--profile", "cpuu"), 'unknown profile "cpuu"; did you mean "cpu"'),
        (("run", "--profile", "cpu", "--set", "dpo.bta=1"), 'unknown key "dpo.bta"'),
        (("run", "--profile", "cpu", "--set", "dpo.beta=-1"), '"dpo.beta" is -1.0'),
        (("run", "--profile", "cpu", "--seed", "-3"), '"seed" is -3'),
        (("run", "--profile", "cpu", "--set", "dpo.beta"), "expected key=value"),
        (("status", "--run-dir", "nowhere"), "holds no run"),
        (("report", "--run-dir", "nowhere"), "holds no run"),
        (
            ("evaluate", "--model", "defualt", "--benchmark", "probe", "--out", "x.json"),
            'unknown model "defualt"',
        ),
        (
            ("evaluate", "--benchmark", "truthfulqa", "--out", "x.json"),
            'unknown benchmark "truthfulqa"',
        ),
        (
            ("evaluate", "--benchmark", "probe", "--limit", "0", "--out", "x.json"),
            "--limit is 0",
        ),
        (
            ("pairs", "--questions", "absent.jsonl", "--out", "x.jsonl"),
            "absent.jsonl: no such file",
        ),
        (("pairs", "--questions", "onw", "--out", "x.jsonl"), 'did you mean "own"'),
        (("train", "--pairs", "absent.jsonl", "--out", "x"), "absent.jsonl: no such file"),
    ],
)
def test_wrong_usage_is_exit_code_2_and_one_clear_sentence(
    capsys, tmp_path: Path, monkeypatch, arguments: tuple[str, ...], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = call(capsys, *arguments)
    assert code == 2
    assert message in err
    assert err.startswith("error: ")
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []  # nothing was begun


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no question"),
        (b'{"question": "Why?"}\n{"question": \n', "line 2"),
        (b'{"question": "Why?"}\n{"text": "x"}\n', "line 2"),
        (b'{"question": "Why?"}\n{"question": ""}\n', "line 2"),
        (b'{"question": "Why?"}\n{"question": 3}\n', "line 2"),
        (b'{"question": "Why?"}\n\xff\xfe\n', "line 2"),
        (b'{"question": "Why?"}\n{"question": "Why?"}\n', "line 2"),
    ],
)
def test_bad_question_files_name_the_line(capsys, tmp_path: Path, content, message) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_bytes(content)
    out = tmp_path / "pairs.jsonl"
    code, _, err = call(capsys, "pairs", "--questions", path, "--out", out)
    assert code == 2
    assert "mine.jsonl" in err
    assert message in err
    code, _, err = call(
        capsys, "run", "--profile", "smoke", "--run-dir", tmp_path / "run",
        "--set", f"questions.source={path}",
    )  # fmt: skip
    assert code == 2
    assert message in err
    assert not out.exists()
    assert not (tmp_path / "run" / "run.json").exists()


def test_a_run_directory_of_another_configuration_is_refused(capsys, tmp_path: Path) -> None:
    open_run(tmp_path / "run", load_config("smoke"))
    code, _, err = call(
        capsys, "run", "--profile", "smoke", "--run-dir", tmp_path / "run", "--set", "dpo.beta=0.5"
    )
    assert code == 2
    assert "dpo.beta: 0.5 here, 0.1 there" in err


def test_status_says_what_is_done_and_what_is_not(capsys, tmp_path: Path) -> None:
    run = open_run(tmp_path / "run", load_config("smoke"))
    run.iteration(0).mkdir()
    run.pairs(0).write_text("{}\n")
    code, out, _ = call(capsys, "status", "--run-dir", run.path)
    assert code == 0
    assert "done    write pairs, round 1" in out
    assert "to do   train, round 1" in out
    assert "1 of 13 stages done" in out


def test_the_module_runs_as_a_program() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "grath_utils", "run", "--profile", "nope"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith('error: unknown profile "nope"')


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (KeyboardInterrupt(), 130, "interrupted: the same command resumes"),
        (BrokenPipeError(32, "Broken pipe"), 141, ""),
        (OSError(28, "No space left on device", "x.json"), 1, "error: x.json: No space left on"),
        (RunError("it is damaged"), 1, "error: it is damaged"),
        (MemoryError(), 1, "error: the memory does not suffice"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), 1, "suffice.* .CUDA out of memory.$"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 1, "the memory does not suff"),
        (ZeroDivisionError("at"), 70, "Traceback(.|\n)*error: this is a fault of grath_utils"),
    ],
)
def test_every_end_has_its_exit_code_and_sentence(
    capsys, monkeypatch, error: BaseException, code: int, message: str
) -> None:
    def do_env(options: object) -> None:
        raise error

    monkeypatch.setattr(runs, "do_env", replace(runs.do_env, work=do_env))
    ended, _, said = call(capsys, "env")
    assert ended == code
    assert re.search(message, said)
    assert ("Traceback" in said) == (code == 70)


def test_a_reader_that_leaves_early_is_no_error() -> None:
    process = start("options")
    process.stdout.close()
    assert process.wait(timeout=60) == 141
    assert process.stderr.read() == ""


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_what_a_console_cannot_show_is_escaped(tmp_path: Path, encoding: str) -> None:
    """As on Windows, where output goes to a file."""
    profile = tmp_path / "雪😀.yaml"
    profile.write_text("profile: x\nquestions: {source: 问题.jsonl}\n", encoding="utf-8")
    narrow = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}
    code, out, err = finish(start("options", "--profile", profile, env=narrow))
    assert (code, err) == (0, "")
    assert "questions.source = \\u95ee\\u9898.jsonl\n" in out
    code, _, err = finish(start("options", "--profile", tmp_path / "风.yaml", env=narrow))
    assert code == 2
    assert "\\u98ce.yaml: no such file" in err


@pytest.mark.parametrize("text", ["a\0b", "caf\udce9"])
def test_arguments_that_no_file_can_hold_are_refused(capsys, text: str) -> None:
    assert call(capsys, "status", "--run-dir", text)[0] == 2


# --- the steps, on a tiny model ------------------------------------------------------------------


def test_evaluate_train_and_evaluate_again(capsys, tmp_path: Path, tiny_llama: Path) -> None:
    pairs = tmp_path / "pairs.jsonl"
    rows = [
        {"id": f"q{i}", "question": f"What is {i}?", "correct": f"{i}.", "incorrect": f"Not {i}.",
         "iteration": 0}
        for i in range(10)
    ]  # fmt: skip
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    settings = ("--set", "model.dtype=float32", "dpo.steps=2", "dpo.learning_rate=1e-2")

    first = tmp_path / "before.json"
    model = ("--model", tiny_llama)
    measure = ("evaluate", "--benchmark", "probe", "--limit", "8", "--dtype", "float32")
    assert call(capsys, *measure, *model, "--out", first)[0] == 0
    code, out, err = call(
        capsys, "train", "--pairs", pairs, *model, "--out", tmp_path / "r0", *settings
    )
    assert code == 0, err
    assert "9 pairs" in out
    assert "1 held out" in out
    second = tmp_path / "after.json"
    code, out, _ = call(capsys, *measure, "--model", tmp_path / "r0", "--out", second)
    assert code == 0
    before, after = json.loads(first.read_text()), json.loads(second.read_text())
    for name in ("mc1", "mc2"):
        low, high = after["metrics"][name]["ci95"]
        assert low <= after["metrics"][name]["value"] <= high
    assert [i["id"] for i in before["items"]] == [i["id"] for i in after["items"]]
    assert before["items"][0]["scores"] != after["items"][0]["scores"]
    assert before["model"]["fingerprint"] != after["model"]["fingerprint"]

    code, _, err = call(
        capsys, "train", "--pairs", pairs, *model, "--out", tmp_path / "r0", *settings
    )
    assert code == 2
    assert "exists already" in err


def test_several_benchmarks_have_a_file_each_and_are_not_measured_twice(
    capsys, tmp_path: Path, tiny_llama: Path
) -> None:
    out, alone = tmp_path / "results", tmp_path / "alone.json"
    command = ("evaluate", "--model", tiny_llama, "--dtype", "float32", "--benchmark")
    several = (*command, "probe", "retention", "--out", out, "--limit")
    assert call(capsys, *several, "4")[0] == 0
    assert call(capsys, *command, "probe", "--limit", "4", "--out", alone)[0] == 0
    one, two = (json.loads(file.read_text()) for file in (out / "probe.json", alone))
    assert one["items"] == two["items"]
    (out / "retention.json").unlink()  # as if it had been stopped before this one
    code, said, _ = call(capsys, *several, "4")
    assert code == 0
    assert "probe: measured already" in said
    assert "retention: measured already" not in said
    assert "measured already" not in call(capsys, *several, "5")[1]
    more = ("5", "--set", "evaluation.bootstrap=100")
    assert "measured already" not in call(capsys, *several, *more)[1]


def test_a_dry_run_shows_the_plan_and_leaves_nothing(tmp_path: Path, capsys) -> None:
    folder = tmp_path / "planned"
    arguments = ["run", "--dry-run", "--profile", "smoke", "--run-dir", str(folder)]
    assert cli.main([*arguments, "--set", "loop.iterations=3", "pairs.candidates=2"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("to do   train") == 3
    assert "to do   evaluate after round 3 on retention" in shown
    # 12 questions; the first iteration asks 1 + 2 x 2 times, the others not for incorrect answers.
    assert "completions to write, at most: 132" in shown
    assert "optimiser steps: 9" in shown
    assert not folder.exists()
