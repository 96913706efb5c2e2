"""What a notebook stands on: its parameters, the run that they name, and tables to look at."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grath_utils.config import changed_settings, load_config
from grath_utils.errors import KIND_NAMES, UsageError, brief, did_you_mean
from grath_utils.files import notebooks_dir
from grath_utils.loop.run_dir import Run
from grath_utils.loop.stages import start_run
from grath_utils.text import table

PARAMETERS = ("PROFILE", "RUN_DIR", "SEED", "OVERRIDES")
SHOWN_PACKAGES = ("torch", "transformers", "trl", "peft")


@dataclass(frozen=True)
class Table:
    """Rows to look at: an HTML table in a notebook, aligned text elsewhere."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]

    def _repr_html_(self) -> str:
        return table(self.columns, self.rows, "html")

    def __repr__(self) -> str:
        return table(self.columns, self.rows)


def numbered_notebooks() -> list[Path]:
    """Return the course's main notebooks in order.

    Raises:
        UsageError: only the package is installed here, without the notebooks.
    """
    folder = notebooks_dir()
    found = sorted(folder.glob("[0-9][0-9]*_*.ipynb")) if folder else []
    if not found:
        raise UsageError(
            "the notebooks are not here: run this in a checkout of the repository, or pass "
            "--no-notebooks to do the same work without them"
        )
    return found


def main_line() -> list[Path]:
    """Return the notebooks that make a whole run, in order; those from 05 on add nothing to it."""
    return [path for path in numbered_notebooks() if path.name < "05"]


def open_notebook_run(profile: str, run_dir: str, seed: int, overrides: str) -> Run:
    """Open the run that a notebook's ``parameters`` cell names, and print what it stands on.

    An empty ``run_dir`` means ``runs/PROFILE`` in the repository.

    Raises:
        UsageError: papermill was given an unknown parameter, or a value of another type.
    """
    refuse_unknown_parameters()
    for name, value in zip(PARAMETERS, (profile, run_dir, seed, overrides), strict=True):
        kind = int if name == "SEED" else str
        if type(value) is not kind:  # papermill's `-p SEED None` is None
            raise UsageError(f"{name} is {brief(value)}; expected {KIND_NAMES[kind]}")
    config = load_config(profile, overrides, seed=seed)
    run = start_run(run_dir or default_run_dir(profile), config)
    info = run.info()
    questions, resolved, versions = info["questions"], info["resolved"], info["versions"]
    packages = ", ".join(f"{name} {versions[name]}" for name in SHOWN_PACKAGES)
    print(
        f"Run       {run.path} (profile {profile}, seed {config.seed})\n"
        f"Model     {config.model.name}, quantization {run.quantization()}\n"
        f"Questions {questions['n']} from {questions['source']}\n"
        f"Device    {resolved['device']} ({info['device']['accelerator']}), {resolved['dtype']}, "
        f"{info['device']['cpu_count']} CPU cores\n"
        f"Packages  Python {versions['python']}, {packages}"
    )
    return run


def refuse_unknown_parameters() -> None:
    """Stop where papermill has set a parameter that does not exist: by itself it only warns.

    It puts its values into a cell of their own, which the kernel's history shows.
    """
    from IPython import get_ipython

    shell = get_ipython()
    inputs = shell.user_ns.get("In", []) if shell else []
    injected = "\n".join(source for source in inputs if source.startswith("# Parameters\n"))
    for name in re.findall(r"^(\w+) = ", injected, re.MULTILINE):
        if name not in PARAMETERS:
            raise UsageError(f'there is no parameter "{name}"{did_you_mean(name, PARAMETERS)}')


def default_run_dir(profile: str) -> Path:
    """Return ``runs/PROFILE`` in the repository, whatever the working directory is."""
    folder = notebooks_dir()
    root = folder.parent if folder else Path.cwd()
    return root / "runs" / Path(profile).stem


def run_parameters(run: Run) -> dict[str, Any]:
    """Return the ``parameters`` that make a notebook use this run and its configuration."""
    # JSON values are YAML values (if emoji are not escaped), and quoting keeps spaces together.
    settings = [
        f"{key}={json.dumps(value, ensure_ascii=False)}"
        for key, value in changed_settings(run.config).items()
    ]
    return {
        "PROFILE": run.config.profile,
        "RUN_DIR": str(run.path),
        "SEED": run.config.seed,
        "OVERRIDES": shlex.join(settings),
    }


def changed_parameters(run: Run) -> dict[str, Any]:
    """Return what a reader must change in a ``parameters`` cell as committed to open this run."""
    folder = str(default_run_dir(run.config.profile))
    committed = {"PROFILE": "cpu", "SEED": 0, "OVERRIDES": "", "RUN_DIR": folder}
    return {name: v for name, v in run_parameters(run).items() if v != committed[name]}
