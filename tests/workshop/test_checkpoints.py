"""Jumping to a notebook: the state it needs, computed or copied, and never mixed."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import write_pairs

from grath_utils.config import Config
from grath_utils.course.notebooks import changed_parameters, default_run_dir, numbered_notebooks
from grath_utils.errors import ConfigError, DataError, RunError, UsageError
from grath_utils.files import read_json, sha256_file, write_json
from grath_utils.loop.run_dir import Run
from grath_utils.loop.stages import check_ready, plan_stages, start_run
from grath_utils.workshop import checkpoints


@pytest.fixture
def config(small_run: Run) -> Config:
    return small_run.config


@pytest.fixture
def finished(tmp_path: Path, small_run: Run) -> Run:
    """A run with both rounds; its pairs are written by hand, the rest is real."""
    run = Run(shutil.copytree(small_run.path, tmp_path / "finished"), small_run.config)
    for t in range(run.config.loop.iterations):
        run.rejects(t).write_text("", encoding="utf-8")
    return run


def test_each_notebook_needs_what_those_before_it_leave(tmp_path: Path, config: Config) -> None:
    run = start_run(tmp_path / "run", config)
    needed = {at: checkpoints.needed_stages(run, at) for at in checkpoints.NOTEBOOKS}
    outputs = {at: {stage.output for stage in plan} for at, plan in needed.items()}
    assert outputs["00"] == outputs["00b"] == outputs["01"] == set()
    assert outputs["02"] == {run.pairs(0)}
    assert {run.pairs(0), run.adapter(0)} <= outputs["03"]
    assert not {run.pairs(1), run.adapter(1)} & outputs["03"]
    assert not any("signals" in path.parts for path in outputs["03"])
    assert {run.pairs(1), run.adapter(1), run.signals("iter_1")} <= outputs["04"]
    assert not any("evaluation" in path.parts for path in outputs["04"])
    assert outputs["05"] == outputs["06"] == set()  # they make their own runs
    assert outputs["end"] == {stage.output for stage in plan_stages(run)}
    with pytest.raises(UsageError, match='no notebook "3"; did you mean "03"'):
        checkpoints.needed_stages(run, "3")


def test_the_map_covers_the_notebooks_and_their_own_checks(tmp_path: Path, config: Config) -> None:
    """Whatever a notebook checks for in its first cells is among what a checkpoint makes."""
    run = start_run(tmp_path / "run", config)
    for path in numbered_notebooks():
        at = path.name.partition("_")[0]
        assert at in checkpoints.NOTEBOOKS
        code = "".join(
            "".join(cell["source"]) + "\n"
            for cell in read_json(path)["cells"]
            if cell["cell_type"] == "code"
        )
        for wanted in re.findall(r"check_ready\(run, (\[.*?\]), \"", code):
            scope = {"run": run, "rounds": range(config.loop.iterations)}
            made = {stage.output for stage in checkpoints.needed_stages(run, at)}
            assert set(eval(wanted, scope)) <= made, f"{path.name} needs more"


def test_what_is_missing_is_computed_and_nothing_twice(tmp_path: Path, config: Config) -> None:
    run = start_run(tmp_path / "run", config)
    write_pairs(run, 0)
    lines: list[str] = []
    checkpoints.make_state(run, "03", say=lines.append)
    assert any("train, round 1" in line for line in lines)
    assert not any("pairs" in line for line in lines)
    assert run.adapter(0).is_dir()
    assert not run.pairs(1).exists()
    check_ready(run, [run.pairs(0), run.adapter(0)], "02_qlora_dpo")
    lines.clear()
    checkpoints.make_state(run, "03", say=lines.append)
    assert lines == []


def test_a_checkpoint_is_copied_up_to_the_notebook(
    tmp_path: Path, config: Config, finished: Run
) -> None:
    run = start_run(tmp_path / "late", config)
    lines: list[str] = []
    checkpoints.copy_state(run, "03", finished, say=lines.append)
    assert run.pairs(0).read_bytes() == finished.pairs(0).read_bytes()
    weights = "adapter_model.safetensors"
    assert sha256_file(run.adapter(0) / weights) == sha256_file(finished.adapter(0) / weights)
    assert run.training_log(0).exists()
    assert run.rejects(0).exists()
    assert not run.iteration(1).exists()
    assert run.info()["checkpoint"]["notebook"] == "03"
    assert run.info()["checkpoint"]["created"] == finished.info()["created"]
    assert str(finished.path) in lines[0]
    # It is continued from there, and a second copy changes nothing.
    before = (run.path / "run.json").read_bytes()
    checkpoints.copy_state(run, "03", finished, say=lines.append)
    assert (run.path / "run.json").read_bytes() == before
    assert start_run(run.path, config).config == config


def test_other_settings_questions_and_weights_are_refused(
    tmp_path: Path, config: Config, finished: Run
) -> None:
    changed = replace(config, dpo=replace(config.dpo, beta=0.5))
    other = start_run(tmp_path / "a", changed)
    with pytest.raises(ConfigError, match=r"dpo.beta: 0.5 here, 0.1 there"):
        checkpoints.copy_state(other, "02", finished)
    run = start_run(tmp_path / "b", config)
    for section, key in (("model", "weights"), ("questions", "fingerprint")):
        info = finished.info()
        write_json(finished.path / "run.json", {**info, section: {**info[section], key: "feed"}})
        with pytest.raises(ConfigError, match=rf"{section} \({key}\): \w+ here, feed there"):
            checkpoints.copy_state(run, "02", finished)
        write_json(finished.path / "run.json", info)
    assert not run.iteration(0).exists()


def test_own_results_are_not_mixed_with_others(
    tmp_path: Path, config: Config, finished: Run
) -> None:
    run = start_run(tmp_path / "mine", config)
    write_pairs(run, 0)
    text = run.pairs(0).read_text(encoding="utf-8")
    run.pairs(0).write_text(text.replace("It is q", "It must be q"), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"has its own iter_0/pairs.jsonl"):
        checkpoints.copy_state(run, "03", finished)
    assert not run.adapter(0).exists()
    run.pairs(0).write_text(text, encoding="utf-8")
    checkpoints.copy_state(run, "03", finished, say=lambda line: None)
    assert run.adapter(0).is_dir()


def test_an_unfinished_checkpoint_is_refused(tmp_path: Path, config: Config, finished: Run) -> None:
    shutil.rmtree(finished.adapter(1))
    run = start_run(tmp_path / "late", config)
    with pytest.raises(RunError, match="is not finished; it lacks: train, round 2"):
        checkpoints.copy_state(run, "04", finished)


def test_another_compute_type_is_said_and_recorded(
    tmp_path: Path, config: Config, finished: Run
) -> None:
    info = finished.info()
    resolved = {**info["resolved"], "dtype": "bfloat16"}
    write_json(finished.path / "run.json", {**info, "resolved": resolved})
    run = start_run(tmp_path / "late", config)
    lines: list[str] = []
    checkpoints.copy_state(run, "02", finished, say=lines.append)
    assert "computed in bfloat16; this machine computes in float32" in lines[-1]
    assert run.info()["resolved"]["dtype"] == "float32"
    assert run.info()["checkpoint"]["resolved"]["dtype"] == "bfloat16"


def test_a_classroom_folder_is_searched_and_its_checksums_count(
    tmp_path: Path, finished: Run
) -> None:
    folder = tmp_path / "classroom"
    shutil.copytree(finished.path, folder / "checkpoints" / "smoke")
    source = checkpoints.find_checkpoint(folder)
    assert source.path == folder / "checkpoints" / "smoke"
    log = source.signals("base")
    before = log.read_bytes()
    log.write_bytes(before + b"\n")
    with pytest.raises(RunError, match=r"signals/base.json is not as it was made"):
        checkpoints.find_checkpoint(folder)
    log.write_bytes(before)
    shutil.copytree(source.path, folder / "checkpoints" / "cpu")
    with pytest.raises(DataError, match="has checkpoints of cpu, smoke: name one with --profile"):
        checkpoints.find_checkpoint(folder)
    assert checkpoints.find_checkpoint(folder, "cpu").path.name == "cpu"
    with pytest.raises(DataError, match="neither a run directory nor a classroom folder"):
        checkpoints.find_checkpoint(tmp_path)


def test_what_to_write_into_the_parameters_cell(
    tmp_path: Path, config: Config, tiny_llama: Path
) -> None:
    changed = changed_parameters(Run(tmp_path / "late", config))
    assert changed["PROFILE"] == "smoke"
    assert changed["RUN_DIR"] == str(tmp_path / "late")
    assert json.dumps(str(tiny_llama)) in changed["OVERRIDES"]
    assert "SEED" not in changed
    assert "RUN_DIR" not in changed_parameters(Run(default_run_dir("smoke"), config))


def test_the_command(capsys: pytest.CaptureFixture[str], tmp_path: Path, finished: Run) -> None:
    from grath_utils.cli import commands as cli

    late = tmp_path / "late"
    wanted = ["--from", str(finished.path), "--run-dir", str(late)]
    assert cli.main(["checkpoint", "--at", "03", *wanted]) == 0
    out = capsys.readouterr().out
    assert "late is ready for notebook 03" in out
    assert "in its parameters cell: PROFILE = 'smoke'" in out
    assert (late / "iter_0" / "adapter").is_dir()
    assert cli.main(["checkpoint", "--at", "7", *wanted]) == 2
    assert 'there is no notebook "7"' in capsys.readouterr().err
