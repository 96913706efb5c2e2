"""The run directory: made once, continued only by the configuration that made it."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from filelock import FileLock, Timeout

from grath_utils.config import LoraConfig, load_config, option, own_settings
from grath_utils.errors import ConfigError, DataError, RunError, UsageError
from grath_utils.files import atomic_path, fingerprint, read_json, write_json
from grath_utils.loop.run_dir import (
    Run,
    check_not_of_a_run,
    check_run_dir,
    load_run,
    lock_run,
    open_run,
    record_made,
)


def test_made_once_and_opened_again(tmp_path: Path) -> None:
    config = load_config("smoke")
    run = open_run(tmp_path / "r", config, {"fact": 1})
    record = run.info()
    assert record["config"] == json.loads(json.dumps(config.to_dict()))
    assert record["fact"] == 1
    assert record["seed"] == 0
    assert open_run(tmp_path / "r", config).info() == record
    assert load_run(tmp_path / "r").config == config


def test_a_warm_up_longer_than_the_training_is_said_when_a_run_begins(tmp_path: Path) -> None:
    config = load_config("smoke", "dpo.warmup_steps=4")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        check_run_dir(tmp_path / "r", config)  # as a start does before any work
        open_run(tmp_path / "r", config)
    (warning,) = said
    assert "dpo.warmup_steps (4) is more than dpo.steps (3)" in str(warning.message)
    with warnings.catch_warnings(action="error"):
        open_run(tmp_path / "r", config)
        open_run(tmp_path / "as long", load_config("smoke", "dpo.warmup_steps=3"))


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


# --- runs of other versions ----------------------------------------------------------------------

OLD = read_json(Path(__file__).with_name("run_of_schema_1.json"))
"""What the first version of the schema wrote for the smoke profile, with the options of its day."""


def recorded(folder: Path, change: Callable[[dict], object] = lambda made: None) -> Path:
    """Write an older run's ``run.json``, changed, to a folder; return the folder."""
    made = copy.deepcopy(OLD)
    change(made)
    write_json(folder / "run.json", made)
    return folder


def test_every_option_that_came_later_says_so() -> None:
    config = load_config("smoke")
    assert json.loads(json.dumps(own_settings(config))) == OLD["config"]
    assert fingerprint(own_settings(config)) == "00f2c9b6d4b0288f"  # what sweeps of then go by
    assert fingerprint(own_settings(config.pairs)) == "25eebf03cd06cecc"  # and journals of pairs


@dataclass(frozen=True)
class Later:
    """A section that has got an option."""

    old: int = option(1, "there from the beginning")
    new: int = option(2, "came later", added=True)


def test_an_added_option_counts_where_it_is_not_at_its_default() -> None:
    assert own_settings(Later()) == {"old": 1}
    assert own_settings(Later(old=3, new=4)) == {"old": 3, "new": 4}


def test_a_run_that_lacks_options_goes_on_with_their_defaults(tmp_path: Path) -> None:
    def without(made: dict) -> None:
        del made["config"]["dpo"]["max_displacement"], made["config"]["lora"]
        del made["schema_version"]

    config, folder = load_config("smoke"), recorded(tmp_path, without)
    before = (folder / "run.json").read_bytes()
    assert load_run(folder).config.dpo == config.dpo
    same = {f"lora.{key}": value for key, value in dataclasses.asdict(LoraConfig()).items()}
    assert open_run(folder, load_config("smoke", same)).path == folder
    assert (folder / "run.json").read_bytes() == before
    with pytest.raises(ConfigError, match=r"dpo.max_displacement: 5.0 here, 300.0 there"):
        open_run(folder, load_config("smoke", {**same, "dpo.max_displacement": 5.0}))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda made: made.update(schema_version=2), RunError, r"a newer one \(schema_version 2;"),
        (
            lambda made: made["config"]["dpo"].update(bta=1, alpha=2),
            ConfigError,
            r"options that this one does not have: dpo\.alpha, dpo\.bta\. Continue it with that",
        ),
        (lambda made: made["config"].update(dpo=3), ConfigError, '"dpo" holds 3'),
        (lambda made: made["config"]["dpo"].update(beta=-1), ConfigError, '"dpo.beta" is -1'),
        (lambda made: made.update(schema_version="1"), RunError, "damaged"),
    ],
)
def test_a_run_that_this_version_cannot_continue(
    tmp_path: Path, change: Callable[[dict], object], error: type[Exception], message: str
) -> None:
    folder = recorded(tmp_path, change)
    for opening in (lambda: load_run(folder), lambda: open_run(folder, load_config("smoke"))):
        with pytest.raises(error, match=message) as caught:
            opening()
        assert str(folder / "run.json") in str(caught.value)


@pytest.mark.parametrize("section", ["model", "questions", "resolved", "device", "versions"])
@pytest.mark.parametrize("value", [None, 3, {}, []])
def test_facts_that_are_no_longer_there_are_named(tmp_path: Path, section: str, value) -> None:
    run = load_run(recorded(tmp_path, lambda made: made.update({section: value})))
    if (section, value) == ("versions", {}):
        assert run.info()["versions"] == {}
        return
    with pytest.raises(RunError, match=f'run.json: "{section}.* is .*expected'):
        run.info()


# --- what is there -------------------------------------------------------------------------------


def test_no_run_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no run"):
        load_run(tmp_path)


def test_a_folder_of_something_else_is_not_taken(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(ConfigError, match="not empty and holds no run"):
        open_run(tmp_path, load_config("smoke"))
    with pytest.raises(ConfigError, match="is a file"):
        open_run(tmp_path / "thesis.tex", load_config("smoke"))
    with pytest.raises(UsageError, match=r"thesis\.tex is a file, not a folder"):
        open_run(tmp_path / "thesis.tex" / "run", load_config("smoke"))


def test_a_run_killed_in_its_first_file_is_begun_again(tmp_path: Path) -> None:
    with contextlib.suppress(KeyError), atomic_path(tmp_path / "run.json") as partial:
        shutil.copytree(partial.parent, tmp_path / partial.parent.name.replace("run", "ran"))
        raise KeyError
    assert len(list(tmp_path.iterdir())) == 1
    run = open_run(tmp_path, load_config("smoke"))
    with lock_run(run):
        assert {path.name for path in tmp_path.iterdir()} == {"run.json", ".lock"}


def test_what_a_run_has_made_is_no_place_for_another_output(tmp_path: Path) -> None:
    run = open_run(tmp_path / "run", load_config("smoke"))
    write_json(run.pairs(0), {})
    (tmp_path / "link").symlink_to(run.path)
    for path in (run.pairs(0), tmp_path / "link" / "iter_0" / "pairs.jsonl"):
        check_not_of_a_run(path)
        record_made(run, run.pairs(0))
        with pytest.raises(UsageError, match="belongs to the run in"):
            check_not_of_a_run(path)
        run.manifest.unlink()
    check_not_of_a_run(run.path / "my.jsonl")


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


def test_one_process_holds_several_runs(tmp_path: Path) -> None:
    first, second = (open_run(tmp_path / name, load_config("smoke")) for name in "ab")

    def free(run: Run) -> bool:
        with contextlib.suppress(Timeout), FileLock(run.path / ".lock", timeout=0):
            return True
        return False

    with lock_run(first):
        with pytest.raises(KeyError), lock_run(second), lock_run(first), lock_run(second):
            assert not free(first)
            assert not free(second)
            raise KeyError
        assert free(second)
        with lock_run(first):
            pass
        assert not free(first)  # taken twice, it is free when the outer one ends
    assert free(first)
    one, other = lock_run(first), lock_run(second)
    one.__enter__()
    other.__enter__()
    one.__exit__(None, None, None)  # not in the order of a stack
    assert free(first)
    assert not free(second)
    with lock_run(second):
        pass
    other.__exit__(None, None, None)
    assert free(second)


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
