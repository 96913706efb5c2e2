"""Shared fixtures: a tiny random Llama for what is about code, the default model for the rest."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from helpers import SMALL, config_for, finish, make_tiny_llama, start, write_pairs, write_questions

from grath_utils.config import ModelConfig
from grath_utils.engine.models import Policy, load_base
from grath_utils.loop.run_dir import Run, load_run
from grath_utils.loop.stages import run_stages, start_run

# The test files that use the one smoke run: the same worker does them all.
SMOKE = ("test_end_to_end.py", "test_browser.py", "test_exercises.py", "test_widgets.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with what takes longest, so that no worker waits for it at the end."""
    for item in items:
        assert "smoke" not in item.fixturenames or item.path.name in SMOKE, f"{item.path}: SMOKE"
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: (item.path.name not in SMOKE, item.path not in slow))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """Give whole files to the workers, and all that use the smoke run to one of them."""
    from xdist.scheduler import LoadScopeScheduling

    class WholeFiles(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return "smoke" if file.endswith(SMOKE) else file

    return WholeFiles(config, log)


# Tests never ask a hub for anything; the default model comes from the package index.
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny random Llama."""
    return make_tiny_llama(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture
def tiny_policy(tiny_llama: Path) -> Policy:
    """A freshly loaded tiny policy in float32."""
    return load_base(ModelConfig(name=str(tiny_llama), dtype="float32", device="cpu"))


@pytest.fixture(scope="session")
def default_policy() -> Policy:
    """The real default model in float32, shared by the session: never train it."""
    return load_base(ModelConfig(dtype="float32", device="cpu"))


@pytest.fixture(scope="session")
def mirror() -> Path:
    """The benchmark mirror; skips where GRATH_MIRROR is unset."""
    from grath_utils.files import mirror_dir

    folder = mirror_dir()
    if folder is None:
        pytest.skip("GRATH_MIRROR is not set: no benchmark data here")
    return folder


@pytest.fixture(scope="session")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, str]:
    """One smoke run through every notebook, started from another working directory.

    Returns the run, which tests may read but not change, and what the command printed.
    """
    folder = tmp_path_factory.mktemp("end-to-end")
    process = start("run", "--all", "--profile", "smoke", "--run-dir", folder / "run", cwd=folder)
    code, out, err = finish(process)
    assert code == 0, err
    return load_run(folder / "run"), out


@pytest.fixture(scope="session")
def small_run(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Run:
    """A finished run of a tiny model on made-up pairs, in seconds: copy it before you change it."""
    folder = tmp_path_factory.mktemp("small")
    config = config_for(tiny_llama, write_questions(folder / "questions.jsonl"), **SMALL)
    run = start_run(folder / "run", config)
    for t in range(config.loop.iterations):
        write_pairs(run, t)
    run_stages(run, progress=False, say=lambda line: None)
    return run


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    """A file with eight questions."""
    return write_questions(tmp_path / "questions.jsonl")
