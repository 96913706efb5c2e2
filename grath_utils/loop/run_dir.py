"""The run directory: the contract between notebooks, command line and report.

::

    RUN/ run.json · manifest.json · questions.jsonl
         iter_0/{pairs.jsonl, rejects.jsonl, training_log.jsonl, adapter/} · iter_1/…
         signals/MODEL.json · evaluation/MODEL/BENCHMARK.json
         arms/random/ (a placebo: a run directory of its own, see :meth:`Run.placebos`)
         figures/ · notebooks/ (executed) · report.html

``run.json`` says what made it. A run directory is continued only by the configuration that made it.
``manifest.json`` holds a hash of each stage's output: what was changed by hand is noticed.
"""

from __future__ import annotations

import datetime
import os
import platform
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from grath_utils.config import (
    Config,
    LoopConfig,
    ModelConfig,
    config_from_dict,
    differing_keys,
    unknown_keys,
    warn_of_long_warmup,
)
from grath_utils.engine import processes
from grath_utils.errors import ConfigError, DataError, RunError, UsageError
from grath_utils.files import (
    PARTIAL,
    check_form,
    check_place,
    explained_write_errors,
    fingerprint_folder,
    read_json,
    sha256_file,
    sweep_partials,
    user_path,
    write_json,
)
from grath_utils.text import quantization_line

RUN_SCHEMA = 1  # raised where an older version could no longer continue a run
FACTS = {  # what is read of run.json beside the configuration, as a form for files.read_json
    "model": {"name": str, "weights": str},
    "questions": {"source": str, "n": int, "fingerprint": str},
    "resolved": {"device": str, "dtype": str},
    "device": {"cpu_count": (int, None), "memory_gib": float, "accelerator": str},
    "versions": {str: str},
}
LOG_ROW = {"step": int, "split": str, str: (float, None)}  # a line of training_log.jsonl
PACKAGES = (
    "torch transformers trl peft bitsandbytes datasets accelerate gguf matplotlib papermill "
    "jupyterlab numpy"
)
BASE = "base"

# Change no result: a run may be continued with others.
WITHOUT_EFFECT = ("dpo.report_to", "pairs.server_url")


def model_label(iteration: int | None) -> str:
    """Return the name of a model in a run's folders: ``base``, or ``iter_0`` after round 0."""
    return BASE if iteration is None else f"iter_{iteration}"


def _in_run(name: str) -> property:
    return property(lambda run: run.path / name)


def _in_iteration(name: str) -> Callable[[Run, int], Path]:
    return lambda run, t: run.iteration(t) / name


@dataclass(frozen=True)
class Run:
    """A run directory and the configuration that it belongs to. All paths come from here."""

    path: Path
    config: Config
    beside: Path | None = field(default=None, compare=False)  # see :attr:`main`

    record = _in_run("run.json")
    manifest = _in_run("manifest.json")
    questions = _in_run("questions.jsonl")
    figures = _in_run("figures")
    report = _in_run("report.html")
    exercises = _in_run("exercises.json")  # which ones a learner has passed
    executed_notebooks = _in_run("notebooks")

    pairs = _in_iteration("pairs.jsonl")
    rejects = _in_iteration("rejects.jsonl")
    adapter = _in_iteration("adapter")
    training_log = _in_iteration("training_log.jsonl")
    collapsed = _in_iteration("collapsed.json")  # in place of an adapter, with the reason

    def iteration(self, t: int) -> Path:
        """Return the folder of iteration ``t`` (0 is the first DPO round)."""
        return self.path / f"iter_{t}"

    def signals(self, model: str) -> Path:
        """Return what a model (``base``, ``iter_0``, ...) was measured on to choose a round."""
        return self.path / "signals" / f"{model}.json"

    def evaluation(self, model: str, benchmark: str) -> Path:
        """Return the result file of a model (``base``, ``iter_0``, ...) on a benchmark."""
        return self.path / "evaluation" / model / f"{benchmark}.json"

    def placebos(self, final: int) -> dict[str, Run]:
        """Return the placebos that the configuration asks for, by their labels; maybe none.

        Each is a run that differs in its labels alone, as far as to round ``final``: its pairs,
        steps and seeds are this run's. Over ``random`` labels this run's model gains by *which*
        answer it was taught; over ``mismatched`` ones by what the answers say of their question.
        """
        config = self.config
        rounds = {"iterations": final + 1, "keep": "last", "early_stop": False, "signals": False}
        none = {"placebo": False, "placebo_labels": LoopConfig.placebo_labels}
        like_all = replace(
            config,
            loop=replace(config.loop, **none, **rounds),
            evaluation=replace(config.evaluation, every_iteration=False),
        )
        return {
            labels: Run(
                self.path / "arms" / labels,
                replace(like_all, pairs=replace(config.pairs, labels=labels, flipped=0.0)),
                beside=self.path,  # which may not have begun
            )
            for labels in (config.loop.placebo_labels if config.loop.placebo else ())
        }

    @property
    def main(self) -> Path | None:
        """The run directory that this one is an arm of, if it is one."""
        folder = self.path.parent.parent
        is_arm = self.path.parent.name == "arms" and (folder / "run.json").is_file()
        return folder if is_arm else self.beside

    def base_model(self) -> ModelConfig:
        """Return the base model; one of the Hub at the commit that the run was begun with."""
        begun = self.record.is_file() and self.info().get("model", {}).get("commit")
        return replace(self.config.model, revision=begun or self.config.model.revision)

    def quantization(self) -> str:
        """Return how the base weights are held, and how many of them, in words."""
        return quantization_line(self.config.model.quantization, self.info().get("quantized"))

    def info(self) -> dict[str, Any]:
        """Return the contents of ``run.json``.

        Raises:
            RunError: it is damaged, or lacks some of the facts that are read of it.
        """
        return _read_record(self.record, FACTS, may_lack_all=True)


def open_run(path: str | Path, config: Config, facts: Mapping[str, Any] | None = None) -> Run:
    """Create the run directory, or check that an existing one was made by the same configuration.

    ``facts`` is what else to record when it is made: package versions, device, fingerprints.

    Raises:
        UsageError, RunError: see :func:`check_run_dir`; or something in the run was changed by
            hand, or the place cannot be written to.
    """
    run = check_run_dir(path, config)
    if run.record.exists():
        _check_untouched(run)
        return run
    if not run.main:  # an arm trains as its main run does
        warn_of_long_warmup(config.dpo)
    made = {
        "schema_version": RUN_SCHEMA,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "seed": config.seed,
        "config": config.to_dict(),
        **(facts or {}),
    }
    write_json(run.record, made)
    return run


def check_run_dir(path: str | Path, config: Config) -> Run:
    """Check, before any work, that a configuration may use a run directory, old or new.

    Raises:
        ConfigError: the directory was made by another configuration (the keys are named), or it
            is not a run directory and not empty. An option that is not recorded had its default.
        UsageError: a part of its path is a file.
        RunError: ``run.json`` is damaged, or of a newer version.
    """
    run = Run(user_path(path), config)
    if run.record.exists():
        differing = differing_keys(config, _recorded_config(run.record))
        if lines := [line for line in differing if line.partition(":")[0] not in WITHOUT_EFFECT]:
            raise ConfigError(
                f"{run.path} was made by another configuration:\n  "
                + "\n  ".join(lines)
                + "\nUse the same settings to continue it, or another run directory"
            )
        return run
    if run.path.is_file():
        raise ConfigError(f"{run.path} is a file; name a folder for the run")
    # A run that was killed before its first file was whole leaves what is swept away later.
    there = run.path.iterdir() if run.path.is_dir() else ()
    if any(path.name != ".lock" and path.suffix != PARTIAL for path in there):
        raise ConfigError(f"{run.path} is not empty and holds no run.json; choose another folder")
    check_place(run.record)
    return run


def load_run(path: str | Path) -> Run:
    """Open an existing run directory with the configuration recorded in it.

    Raises:
        DataError: there is no run there.
        ConfigError: another version made it, with options that this one does not have.
        RunError: its record is damaged or of a newer version, or something was changed by hand.
    """
    folder = user_path(path)
    record = folder / "run.json"
    if not record.exists():
        raise DataError(
            f"{folder} holds no run (no run.json); make one with "
            "`grath run --profile cpu --run-dir DIR`"
        )
    run = Run(folder, _recorded_config(record))
    _check_untouched(run)
    return run


def _recorded_config(record: Path) -> Config:
    made = _read_record(record, {"schema_version": (int, None), "config": dict})
    schema, tree = made.get("schema_version") or RUN_SCHEMA, made["config"]
    another = f"{record} was made by another version of grath_utils"
    if schema > RUN_SCHEMA:
        raise RunError(
            f"{another}, a newer one (schema_version {schema}; this one knows {RUN_SCHEMA}): "
            "continue it with that one"
        )
    if unknown := unknown_keys(tree):
        raise ConfigError(
            f"{another}, with options that this one does not have: {', '.join(unknown)}. Continue "
            "it with that one, or start a new run directory"
        )
    return config_from_dict(tree, where=str(record))


def _read_record(
    record: Path, form: dict[str, Any], *, may_lack_all: bool = False
) -> dict[str, Any]:
    try:
        made = read_json(record)
        check_form(made, {}, record.name)
        if not may_lack_all or made.keys() & form.keys():
            check_form(made, form, record.name)
        return made
    except DataError as error:
        raise RunError(
            f"{record} is damaged or was edited by hand ({error}); restore it, or start again in a "
            "new folder"
        ) from error


def check_not_of_a_run(path: Path) -> None:
    """Raise UsageError for a file that a run has made: nothing but the run may replace it."""
    path = user_path(path)
    for folder in path.parents:
        made = _manifest(folder / "manifest.json") if (folder / "run.json").is_file() else {}
        if path.relative_to(folder).as_posix() in made:
            raise UsageError(f"{path} belongs to the run in {folder}; choose another output")


def record_made(run: Run, output: Path) -> bool:
    """Note the hash of a stage's output; return whether it takes the place of another one."""

    def note() -> bool:
        made = _manifest(run.manifest)
        name, value = output.relative_to(run.path).as_posix(), _hash(output)
        if made.get(name) == value:
            return False
        write_json(run.manifest, {**made, name: value})
        return name in made

    return processes.on_main(note)


def _check_untouched(run: Run) -> None:
    """Check that what the stages left is still as they left it; what is missing is made again."""
    for name, value in _manifest(run.manifest).items():
        path = run.path / name
        if path.exists() and _hash(path) != value:
            raise RunError(
                f"{path} is not as it was made: it was changed or cut short. Restore it, or delete "
                "it, and the same command makes it again (to train on pairs that you have edited: "
                "grath train --pairs FILE)"
            )


def _manifest(path: Path) -> dict[str, str]:
    if not path.exists():
        return {}
    try:
        return read_json(path, {str: str})
    except DataError as error:
        raise RunError(
            f"{path} is damaged. Delete it: what the run holds is then taken as it is"
        ) from error


def _hash(path: Path) -> str:
    return fingerprint_folder(path) if path.is_dir() else sha256_file(path)


LOCK_HOLDER = "GRATH_RUN_LOCK"
"""Environment variable: the run directories, one a line, that this process has locked, or one that
started it."""


def _held() -> list[str]:
    return os.environ.get(LOCK_HOLDER, "").split("\n")


@contextmanager
def lock_run(run: Run) -> Iterator[None]:
    """Hold the run directory for one process; the lock goes with the process, even if killed.

    Whoever holds it may take it again, and so may the kernels that it starts. The processes of
    one launch share it: the main one takes it for all. A process may hold several.

    Raises:
        RunError: another process holds it, or the place cannot be written to.
    """
    own = str(run.path)
    if own in _held():
        yield
        return
    lock = FileLock(run.path / ".lock", timeout=0)

    def take() -> None:
        with explained_write_errors(run.path):
            run.path.mkdir(parents=True, exist_ok=True)
            try:
                lock.acquire()
            except Timeout:
                raise RunError(
                    f"{run.path} is in use by another process; wait for it to end, or choose "
                    "another folder"
                ) from None
        sweep_partials(run.path)

    try:
        processes.on_main(take)
        os.environ[LOCK_HOLDER] = "\n".join([*_held(), own])
        yield
    finally:
        os.environ[LOCK_HOLDER] = "\n".join(path for path in _held() if path != own)
        lock.release()


def environment_facts() -> dict[str, Any]:
    """Return package versions, and what the work runs on, for ``run.json`` and bug reports."""
    import psutil
    import torch

    versions = {"python": platform.python_version()}
    for package in PACKAGES.split():
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    device = {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "processes": processes.launched(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "accelerator": "none",
    }
    if torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(0).total_memory
        device["accelerator"] = torch.cuda.get_device_name()
        device["accelerator_memory_gib"] = round(memory / 2**30, 1)
    elif torch.backends.mps.is_available():
        device["accelerator"] = "Apple MPS"
    return {"versions": versions, "device": device}
