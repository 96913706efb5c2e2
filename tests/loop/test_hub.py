"""A run on a model of the Hub: from an empty cache, and whatever happens on the Hub later."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import PAIRS, config_for, make_tiny_llama, write_pairs, write_questions
from loopback_hub import Hub, loopback_hub

from grath_utils.cli import main
from grath_utils.config import Config
from grath_utils.course.execute import execute_notebook
from grath_utils.course.notebooks import numbered_notebooks, run_parameters
from grath_utils.errors import ConfigError
from grath_utils.files import write_json, write_jsonl
from grath_utils.loop.named_models import load_policy
from grath_utils.loop.stages import load_model, start_run, train_iteration

FIRST, SECOND = "a" * 40, "b" * 40
SET = "model.name=org/tiny model.dtype=float32 model.device=cpu".split()


@pytest.fixture
def hub(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub with the model ``org/tiny``, an empty cache and an empty working folder."""
    with loopback_hub() as hub:
        hub.add("org/tiny", tiny_llama, FIRST)
        hub.use(monkeypatch, tmp_path / "hf")
        monkeypatch.chdir(tmp_path)
        write_questions(tmp_path / "q.jsonl")
        yield hub


def settings(tmp_path: Path, **more: Any) -> Config:
    return config_for(Path("org/tiny"), tmp_path / "q.jsonl", **more)


@pytest.mark.parametrize(
    "command",
    [
        "pairs --questions q.jsonl --limit 1 --out p.jsonl --profile smoke",
        "train --pairs pairs.jsonl --out round --profile smoke --set dpo.steps=1",
        "evaluate --benchmark probe --limit 2 --out r.json",
        "run --no-notebooks --profile smoke --run-dir run --set questions.source=q.jsonl",
    ],
)
def test_a_model_that_was_never_loaded_is_fetched(hub: Hub, capsys, command: str) -> None:
    write_jsonl(Path("pairs.jsonl"), [{**vars(pair), "iteration": 0} for pair in PAIRS])
    code, err = main([*command.split(), "--set", *SET]), capsys.readouterr().err
    # A random model answers nothing that is of use.
    assert code == 0 or "usable pair" in err, err
    assert any("/model.safetensors" in request for request in hub.seen)


def test_a_run_stays_with_the_commit_that_it_was_begun_with(hub: Hub, tmp_path: Path) -> None:
    config = settings(tmp_path)
    run = start_run(tmp_path / "run", config)
    before = load_model(run, None)
    assert run.info()["model"]["commit"] == before.config.revision == FIRST
    hub.add("org/tiny", make_tiny_llama(tmp_path / "other", seed=1), SECOND)
    hub.seen.clear()
    again = load_model(start_run(run.path, config), None)
    assert again.fingerprint == before.fingerprint
    assert load_policy(f"{run.path}@base").fingerprint == before.fingerprint
    assert hub.seen == []
    assert start_run(tmp_path / "new", config).info()["model"]["commit"] == SECOND


def test_a_run_that_noted_no_commit_sees_that_its_model_has_moved(hub: Hub, tmp_path: Path) -> None:
    config = settings(tmp_path)
    run = start_run(tmp_path / "run", config)
    record = run.info()
    del record["model"]["commit"]  # as older versions left it
    write_json(run.path / "run.json", record)
    start_run(run.path, config)
    hub.add("org/tiny", make_tiny_llama(tmp_path / "other", seed=1), SECOND)
    with pytest.raises(ConfigError, match="the base model's weights have changed"):
        start_run(run.path, config)


def test_an_adapter_names_the_commit_of_its_base(hub: Hub, tmp_path: Path) -> None:
    run = start_run(tmp_path / "run", settings(tmp_path, **{"dpo.steps": 1}))
    write_pairs(run, 0)
    train_iteration(run, 0, progress=False)
    record = json.loads((run.adapter(0) / "grath.json").read_text())
    assert record["model"]["revision"] == FIRST
    hub.add("org/tiny", make_tiny_llama(tmp_path / "other", seed=1), SECOND)
    for name in (f"{run.path}@0", str(run.adapter(0))):
        assert load_policy(name).config.revision == FIRST


@pytest.mark.parametrize(
    "command",
    [
        "status --run-dir run",
        "report --run-dir run",
        "run --dry-run --profile colab-t4 --run-dir new --set questions.source=own",
        "options --profile colab-t4",
        "env",
    ],
)
def test_who_only_looks_does_not_ask_the_hub(
    hub: Hub, tmp_path: Path, capsys, command: str
) -> None:
    start_run(tmp_path / "run", settings(tmp_path))
    hub.seen.clear()
    assert main(command.split()) == 0
    assert hub.seen == []


@pytest.mark.slow
@pytest.mark.notebook
@pytest.mark.parametrize("number", ["00", "02"])
def test_a_notebook_fetches_what_it_stands_on(hub: Hub, tmp_path: Path, number: str) -> None:
    """Its kernel begins with an empty cache, as one on a new machine does."""
    config = settings(tmp_path, **{"dpo.steps": 1})
    run = start_run(tmp_path / "run", config)
    write_pairs(run, 0)
    write_jsonl(run.rejects(0), [])
    (tmp_path / "hf").rename(tmp_path / "put away")
    hub.seen.clear()
    (notebook,) = (path for path in numbered_notebooks() if path.name.startswith(f"{number}_"))
    execute_notebook(notebook, tmp_path / "done.ipynb", run_parameters(run))
    assert any("/model.safetensors" in request for request in hub.seen)
