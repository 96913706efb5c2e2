"""Execute notebooks unattended, and keep in each copy what its execution took.

That is in the copy's metadata, under ``grath_execution``::

    seconds, date
    peak_memory_gib   the most that the kernel and what it started held together
    files             how many files the run gained: what there was to do
    earlier           the same facts of an earlier execution which had more to do
"""

from __future__ import annotations

import datetime
import json
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import psutil

from grath_utils.course.notebooks import run_parameters
from grath_utils.errors import GrathError, RunError, UsageError, did_you_mean
from grath_utils.files import atomic_path, read_json
from grath_utils.loop.run_dir import Run, lock_run
from grath_utils.text import duration

TOOK = {"files": (int, None), "date": (str, None)}
NOTEBOOK = {  # what is read of an executed notebook, as a form for files.read_json
    "metadata": {"grath_execution": ({**TOOK, "earlier": (TOOK, None)}, None)},
    "cells": [
        {
            "cell_type": str,
            "source": [str],
            "metadata": {"tags": ([str], None), "papermill": ({"duration": (float, None)}, None)},
        }
    ],
}
WIDGET = "application/vnd.jupyter.widget-view+json"  # the kind of output that needs a kernel


def run_notebooks(
    run: Run,
    notebooks: list[Path],
    *,
    cell_timeout: int | None = None,
    say: Callable[[str], None] = print,
) -> list[Path]:
    """Execute notebooks in order with the run's configuration; one line of progress for each.

    The executed copies land in ``RUN/notebooks/``. One that was executed before, from the same
    code, is not executed again.

    Raises:
        GrathError: as :func:`execute_notebook`.
    """
    targets = [run.executed_notebooks / path.name for path in notebooks]
    with lock_run(run):
        for path, target in zip(notebooks, targets, strict=True):
            if is_current(target, path):
                say(f"{path.stem:24} done before")
                continue
            if sys.stdout.isatty():  # a passing line: a log file gets only what stays
                print(f"{path.stem:24} running ...", end="\r", flush=True)
            took = execute_notebook(
                path, target, run_parameters(run), cell_timeout=cell_timeout, run=run
            )
            time_taken, most = duration(took["seconds"]), took["peak_memory_gib"]
            say(f"{path.stem:24} done in {time_taken}, at most {most:.1f} GiB of memory")
    return targets


def is_current(target: Path, source: Path) -> bool:
    """Return True if an executed notebook was made from the code as it is now; prose may differ."""
    return target.is_file() and _code(target) == _code(source)


def _code(notebook: Path) -> list[str]:
    return [
        "".join(cell["source"])
        for cell in read_json(notebook, NOTEBOOK)["cells"]
        if cell["cell_type"] == "code"
        and "injected-parameters" not in (cell["metadata"].get("tags") or [])
    ]


def most_work(*took: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """Return what that execution took which had the most to do: later ones find the files there."""
    return max(filter(None, took), key=lambda one: one.get("files") or 0, default=None)


def execute_notebook(
    path: Path,
    target: Path,
    parameters: Mapping[str, Any],
    *,
    cell_timeout: int | None = None,
    run: Run | None = None,
) -> dict[str, Any]:
    """Execute one notebook by papermill and keep the executed copy, whole, at ``target``.

    Return what its execution took, as the copy has it: with a ``run``, also what that gained. A
    cell may take ``cell_timeout`` seconds.

    Raises:
        UsageError: a parameter that the notebook does not have (papermill alone only warns).
        GrathError: a cell failed; the notebook as far as it came is kept as ``NAME.failed.ipynb``.
        RunError: a cell took longer than ``cell_timeout``, or the kernel died.
    """
    import papermill
    from nbclient.exceptions import CellTimeoutError
    from papermill.exceptions import PapermillExecutionError

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        known = papermill.inspect_notebook(path)
    for name in parameters:
        if name not in known:
            raise UsageError(f'{path.name} has no parameter "{name}"{did_you_mean(name, known)}')
    failed = target.with_suffix(".failed.ipynb")
    failed.unlink(missing_ok=True)
    # Kernels import the package also from a checkout that is not installed.
    places = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    importable = patch.dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, places)))
    files = _count_files(run) if run else 0
    start = time.monotonic()
    with atomic_path(target) as partial, importable, _peak_memory() as peak:
        try:
            papermill.execute_notebook(
                path,
                partial,
                dict(parameters),
                kernel_name="python3",
                cwd=path.parent,
                progress_bar=False,
                execution_timeout=cell_timeout,
                # A kernel warns of its own local connection, and has errors when that is cut off.
                extra_arguments=["--IPKernelApp.log_level=50"],
            )
        except (PapermillExecutionError, CellTimeoutError, RuntimeError) as error:
            os.replace(partial, failed)
            raise _explained(error, path, failed, cell_timeout) from error
        executed = read_json(partial)
        executed["metadata"]["grath_execution"] = took = {
            "seconds": round(time.monotonic() - start, 1),
            "peak_memory_gib": round(peak["bytes"] / 2**30, 2),
            "date": datetime.date.today().isoformat(),
        }
        if run:
            took["files"] = max(_count_files(run) - files, 0)
            took["earlier"] = _earlier(target)
        # Progress bars would stay at 0 %, sliders be dead; what was drawn beside them stays.
        executed["metadata"].pop("widgets", None)
        for outputs in (cell["outputs"] for cell in executed["cells"] if "outputs" in cell):
            outputs[:] = [out for out in outputs if WIDGET not in out.get("data", {})]
        partial.write_text(json.dumps(executed, indent=1, ensure_ascii=False), encoding="utf-8")
    return took


def _count_files(run: Run) -> int:
    """Return how many files a run holds beside its notebooks."""
    files = (path for path in run.path.rglob("[!.]*") if path.is_file())
    return sum(run.executed_notebooks not in path.parents for path in files)


def _earlier(executed: Path) -> Mapping[str, Any] | None:
    """Return the most that an execution of the copy that is there now has taken."""
    if not executed.is_file():
        return None
    last = read_json(executed, NOTEBOOK)["metadata"].get("grath_execution") or {}
    return most_work({k: v for k, v in last.items() if k != "earlier"}, last.get("earlier"))


def _explained(error: Any, path: Path, failed: Path, cell_timeout: int | None) -> GrathError:
    """Return the error that says where a notebook stopped, and what to do."""
    if isinstance(error, RuntimeError):
        return RunError(
            f"{path.name}: the kernel died ({error}); most often memory ran out. Try smaller "
            "batches (dpo.micro_batch_size, evaluation.batch_tokens) and run the same again"
        )
    if isinstance(error, TimeoutError):
        code = [cell for cell in read_json(failed)["cells"] if cell["cell_type"] == "code"]
        status = [cell["metadata"].get("papermill", {}).get("status") for cell in code]
        running = next((i for i, s in enumerate(status) if s != "completed"), len(code) - 1)
        begins = "".join(code[running]["source"]).strip().splitlines()[0]
        return RunError(
            f"{path.name}, cell {running + 1} ({begins}): not done after {cell_timeout} s, the "
            "--cell-timeout. What was finished is kept: run the same again with more time, or "
            f"see how far it came in {failed}"
        )
    return GrathError(
        f"{path.name}, cell {error.exec_count}: {error.ename}: {error.evalue}\n"
        f"The notebook as far as it came: {failed}"
    )


@contextmanager
def _peak_memory() -> Iterator[dict[str, int]]:
    """Watch the processes that this one starts; ``bytes`` is the most that they held together."""
    peak, over, ours = {"bytes": 0}, threading.Event(), psutil.Process()
    before = set(ours.children(recursive=True))

    def watch() -> None:
        while not over.wait(0.3):
            with suppress(psutil.Error):  # one has just ended
                started = set(ours.children(recursive=True)) - before
                held = sum(process.memory_info().rss for process in started)
                peak["bytes"] = max(peak["bytes"], held)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield peak
    finally:
        over.set()
        watcher.join()
