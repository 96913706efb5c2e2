"""The names of a run's rounds."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import write_questions

from grath_utils.config import load_config
from grath_utils.course.notebooks import run_parameters
from grath_utils.errors import ConfigError, ModelError, UsageError
from grath_utils.files import write_json
from grath_utils.loop.named_models import load_policy
from grath_utils.loop.run_dir import load_run, open_run
from grath_utils.loop.stages import load_model, start_run


def test_run_names(tmp_path: Path, tiny_llama: Path) -> None:
    config = load_config("smoke", {"model.name": str(tiny_llama)})
    run = open_run(tmp_path / "run", config)
    assert load_policy(f"{run.path}@base").config.name == str(tiny_llama)
    with pytest.raises(ModelError, match="round 1 has no adapter.*none yet"):
        load_policy(f"{run.path}@0")
    with pytest.raises(ModelError, match="after @ comes `base`, or a number"):
        load_policy(f"{run.path}@last")
    with pytest.raises(UsageError, match="holds no run"):
        load_policy(f"{tmp_path / 'elsewhere'}@0")


@pytest.fixture
def here(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder: with ``model`` and ``q.jsonl`` in it, and ``elsewhere``."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "model").symlink_to(tiny_llama)
    write_questions(tmp_path / "q.jsonl")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", ["model", "./model", "model/", "elsewhere/../model"])
def test_a_relative_model_is_found_from_other_folders(
    here: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    config = load_config("smoke", {"model.name": name, "questions.source": "./q.jsonl"})
    assert (config.model.name, config.questions.source) == (
        str(here / "model"),
        str(here / "q.jsonl"),
    )
    start_run("run", config)
    monkeypatch.chdir(here / "elsewhere")
    run = start_run("../run", load_run("../run").config)
    assert load_model(run, None).fingerprint == load_policy("../run@base").fingerprint


def test_an_older_run_that_recorded_a_relative_name_goes_on_where_it_was_begun(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config("smoke", {"model.name": "model", "questions.source": "q.jsonl"})
    run = start_run("run", config)
    record = run.info()
    record["config"]["model"]["name"] = "model"
    record["config"]["questions"]["source"] = "q.jsonl"
    write_json(run.path / "run.json", record)
    start_run("run", config)
    monkeypatch.chdir(here / "elsewhere")
    with pytest.raises(ConfigError, match=f"model.name: {here / 'model'} here, model there"):
        start_run(run.path, config)


def test_a_relative_name_in_a_profile_reaches_the_notebooks(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("own.yaml").write_text("model: {name: model}\nquestions: {source: q.jsonl}\n")
    run = start_run("run", load_config("own.yaml"))
    given = run_parameters(run)
    monkeypatch.chdir(here / "elsewhere")  # where the kernels of notebooks are, say
    assert load_config(given["PROFILE"], given["OVERRIDES"], seed=given["SEED"]) == run.config


@pytest.mark.parametrize("name", ["tiny", "org/model"])
def test_a_name_that_is_no_path_stays(here: Path, name: str) -> None:
    (here / "tiny").mkdir()
    (here / "own").touch()
    config = load_config("smoke", {"model.name": name, "questions.source": "own"})
    assert (config.model.name, config.questions.source) == (name, "own")
