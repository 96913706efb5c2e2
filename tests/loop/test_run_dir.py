"""The run directory: made once, continued only by the configuration that made it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from grath_utils.config import load_config
from grath_utils.errors import ConfigError, DataError, RunError
from grath_utils.loop.run_dir import load_run, lock_run, open_run


def test_made_once_and_opened_again(tmp_path: Path) -> None:
    config = load_config("smoke")
    run = open_run(tmp_path / "r", config, {"fact": 1})
    record = run.info()
    assert record["config"] == json.loads(json.dumps(config.to_dict()))
    assert record["fact"] == 1
    assert record["seed"] == 0
    assert open_run(tmp_path / "r", config).info() == record
    assert load_run(tmp_path / "r").config == config


def test_another_configuration_is_refused_with_the_keys(tmp_path: Path) -> None:
    open_run(tmp_path / "r", load_config("smoke"))
    other = load_config("smoke", "dpo.beta=0.2 loop.iterations=3", seed=5)
    with pytest.raises(ConfigError) as caught:
        open_run(tmp_path / "r", other)
    message = str(caught.value)
    assert "dpo.beta: 0.2 here, 0.1 there" in message
    assert "loop.iterations: 3 here, 2 there" in message
    assert "seed: 5 here, 0 there" in message
    assert "lora.r" not in message


@pytest.mark.parametrize("text", ["{", "[]", '{"config": 3}', '{"schema_version": 1}'])
def test_a_damaged_record_is_named(tmp_path: Path, text: str) -> None:
    run = open_run(tmp_path / "r", load_config("smoke"))
    (run.path / "run.json").write_text(text, encoding="utf-8")
    for opening in (lambda: load_run(run.path), lambda: open_run(run.path, run.config)):
        with pytest.raises(RunError, match=r"run\.json is damaged"):
            opening()


def test_no_run_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no run"):
        load_run(tmp_path)


def test_a_folder_of_something_else_is_not_taken(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(ConfigError, match="not empty and holds no run"):
        open_run(tmp_path, load_config("smoke"))
    with pytest.raises(ConfigError, match="is a file"):
        open_run(tmp_path / "thesis.tex", load_config("smoke"))


HOLD = """
import sys, time; from grath_utils.loop.run_dir import load_run, lock_run
with lock_run(load_run(sys.argv[1])):
    print("held", flush=True); time.sleep(float(sys.argv[2]))
"""


def test_a_second_process_is_told_and_stops(tmp_path: Path) -> None:
    run = open_run(tmp_path / "r", load_config("smoke"))

    def other_process(environment: dict[str, str] | None = None) -> subprocess.CompletedProcess:
        command = [sys.executable, "-c", HOLD, str(run.path), "0"]
        return subprocess.run(command, capture_output=True, text=True, env=environment)

    stranger = {k: v for k, v in os.environ.items() if k != "GRATH_RUN_LOCK"}
    with lock_run(run), lock_run(run):  # the holder may take it again
        refused = other_process(stranger)
        assert refused.returncode != 0
        assert "in use by another process" in refused.stderr
        assert other_process().returncode == 0  # a kernel that the holder starts inherits it
    assert other_process(stranger).returncode == 0


def test_the_lock_goes_with_a_killed_process(tmp_path: Path) -> None:
    run = open_run(tmp_path / "r", load_config("smoke"))
    command = [sys.executable, "-c", HOLD, str(run.path), "60"]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(RunError, match="in use"), lock_run(run):
        pass
    holder.kill()
    holder.wait()
    with lock_run(run):
        pass
