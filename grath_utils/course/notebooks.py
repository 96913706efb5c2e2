"""Run the numbered notebooks unattended, and open a run from inside one of them."""

from __future__ import annotations

import ast
import datetime
import html
import json
import os
import shlex
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grath_utils.config import changed_settings, load_config
from grath_utils.errors import GrathError, RunError, UsageError, did_you_mean
from grath_utils.files import atomic_path, notebooks_dir
from grath_utils.loop.run_dir import Run, lock_run
from grath_utils.loop.stages import plan_stages, start_run

PARAMETERS = ("PROFILE", "RUN_DIR", "SEED", "OVERRIDES")
WIDGET = "application/vnd.jupyter.widget-view+json"  # the kind of output that needs a kernel
LAST_OF_THE_MAIN_LINE = "04"
QUIET_KERNEL = "--IPKernelApp.log_level=40"  # errors only: it warns of its own local connection


# --- inside a notebook ---------------------------------------------------------------------------


def open_notebook_run(profile: str, run_dir: str, seed: int, overrides: str) -> Run:
    """Open the run that a notebook's ``parameters`` cell names, and print what it stands on.

    Args:
        profile: name of a profile.
        run_dir: the run directory; empty means ``runs/PROFILE`` in the repository.
        seed: replaces the profile's seed.
        overrides: such as ``"dpo.beta=0.05 loop.iterations=3"``.

    Raises:
        UsageError: papermill was given a parameter that the notebook does not have.
    """
    refuse_unknown_parameters()
    config = load_config(profile, overrides, seed=seed)
    run = start_run(run_dir or default_run_dir(profile), config)
    info = run.info()
    versions, device = info["versions"], info["device"]
    packages = ", ".join(
        f"{name} {versions[name]}" for name in ("torch", "transformers", "trl", "peft")
    )
    print(f"Run       {run.path} (profile {profile}, seed {config.seed})")
    print(f"Model     {config.model.name}, quantization {config.model.quantization}")
    print(f"Questions {info['questions']['n']} from {info['questions']['source']}")
    print(f"Device    {info['resolved']['device']} ({device['accelerator']}), "
          f"{info['resolved']['dtype']}, {device['cpu_count']} CPU cores")  # fmt: skip
    print(f"Packages  Python {versions['python']}, {packages}")
    return run


def refuse_unknown_parameters(known: Sequence[str] = PARAMETERS) -> None:
    """Stop where papermill has injected a parameter that is none: by itself it only warns.

    Papermill puts its values into a cell of their own, below the one tagged ``parameters``; the
    kernel's history of inputs shows it.

    Raises:
        UsageError: the parameter, and the nearest one that there is.
    """
    from IPython import get_ipython

    shell = get_ipython()
    for source in shell.user_ns.get("In", []) if shell is not None else []:
        for name in _injected(source):
            if name not in known:
                raise UsageError(f'there is no parameter "{name}"{did_you_mean(name, known)}')


def _injected(source: str) -> list[str]:
    """Return the names that a cell written by papermill sets; none for any other cell."""
    if not source.startswith("# Parameters\n"):
        return []
    statements = ast.parse(source).body
    targets = [t for s in statements if isinstance(s, ast.Assign) for t in s.targets]
    return [target.id for target in targets if isinstance(target, ast.Name)]


@dataclass(frozen=True)
class Table:
    """Rows to look at: an HTML table in a notebook, aligned text elsewhere."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]

    def _repr_html_(self) -> str:
        def line(cells: Sequence[Any], tag: str) -> str:
            return "".join(
                f"<{tag} style='text-align:{_side(cell)};vertical-align:top'>"
                f"{html.escape(_shown(cell))}</{tag}>"
                for cell in cells
            )

        # Headings stand where the first row's values do.
        sides = [_side(cell) for cell in self.rows[0]] if self.rows else []
        head = "".join(
            f"<th style='text-align:{side}'>{html.escape(name)}</th>"
            for name, side in zip(self.columns, sides or ["left"] * len(self.columns), strict=True)
        )
        body = "".join(f"<tr>{line(row, 'td')}</tr>" for row in self.rows)
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"

    def __repr__(self) -> str:
        lines = [list(self.columns), *[[_shown(cell) for cell in row] for row in self.rows]]
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.columns))]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in lines
        )


def _shown(cell: Any) -> str:
    return f"{cell:,.3f}" if isinstance(cell, float) else str(cell)


def _side(cell: Any) -> str:
    return "right" if isinstance(cell, (int, float)) else "left"


def default_run_dir(profile: str) -> Path:
    """Return ``runs/PROFILE`` in the repository, whatever the working directory is."""
    folder = notebooks_dir()
    root = folder.parent if folder else Path.cwd()
    return root / "runs" / Path(profile).stem


# --- running them --------------------------------------------------------------------------------


def numbered_notebooks() -> list[Path]:
    """Return the course's main notebooks in order.

    Raises:
        UsageError: only the package is installed here, without the notebooks.
    """
    folder = notebooks_dir()
    found = sorted(folder.glob("[0-9][0-9]_*.ipynb")) if folder else []
    if not found:
        raise UsageError(
            "the notebooks are not here: run this in a checkout of the repository, or pass "
            "--no-notebooks to do the same work without them"
        )
    return found


def main_line() -> list[Path]:
    """Return the notebooks that make a whole run, pairs to evaluation, in order.

    Those numbered higher stand on a run but add nothing to it: experiments beside it, and larger
    machines.

    Raises:
        UsageError: see :func:`numbered_notebooks`.
    """
    return [path for path in numbered_notebooks() if path.name[:2] <= LAST_OF_THE_MAIN_LINE]


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
        GrathError: a cell failed; the message names notebook and cell, and the notebook as far as
            it came is kept as ``NAME.failed.ipynb``.
    """
    executed = []
    with lock_run(run):
        for path in notebooks:
            target = run.executed_notebooks / path.name
            executed.append(target)
            if is_current(target, path):
                say(f"{path.stem:24} done before")
                continue
            start = time.monotonic()
            _show(f"{path.stem:24} running ...")
            before, held, earlier = _done(run), _files(run), most_work(target)
            execute_notebook(
                path,
                target,
                run_parameters(run),
                cell_timeout=cell_timeout,
                facts=lambda before=before, held=held, earlier=earlier: {
                    "stages": sorted(_done(run) - before),
                    "files": max(_files(run) - held, 0),
                    "earlier": earlier,
                },
            )
            _show("")
            say(f"{path.stem:24} done in {_duration(time.monotonic() - start)}")
    return executed


def _done(run: Run) -> set[str]:
    return {stage.name for stage in plan_stages(run) if stage.done}


def _files(run: Run) -> int:
    """Count what a run directory holds; experiments beside the stages are seen by their files."""
    aside = run.executed_notebooks
    found = (p for p in run.path.rglob("[!.]*") if aside not in p.parents)
    return sum(path.is_file() for path in found)


def most_work(executed: Path) -> dict[str, Any] | None:
    """Return what that execution of a notebook took which had the most to do.

    A notebook that is executed again after an edit finds its stages done; what the work costs is
    what the first execution took.
    """
    if not executed.is_file():
        return None
    metadata = json.loads(executed.read_text(encoding="utf-8"))["metadata"]
    last = metadata.get("grath_execution")
    if not last:
        return None
    both = [{k: v for k, v in last.items() if k != "earlier"}, last.get("earlier")]
    return max(filter(None, both), key=work_done)


def work_done(took: Mapping[str, Any]) -> tuple[int, int]:
    """Return how much an execution had to do: stages of the run, and files that it left there."""
    return len(took.get("stages") or []), took.get("files") or 0


def run_parameters(run: Run) -> dict[str, Any]:
    """Return the ``parameters`` that make a notebook use this run and its configuration."""
    config = run.config
    # JSON values are YAML values, and quoting keeps spaces together.
    parts = (f"{key}={json.dumps(value)}" for key, value in changed_settings(config).items())
    return {
        "PROFILE": config.profile,
        "RUN_DIR": str(run.path),
        "SEED": config.seed,
        "OVERRIDES": shlex.join(parts),
    }


def changed_parameters(run: Run) -> dict[str, Any]:
    """Return what a reader must change in a ``parameters`` cell as committed to open this run."""
    plain = {"PROFILE": "cpu", "SEED": 0, "OVERRIDES": ""}
    plain["RUN_DIR"] = str(default_run_dir(run.config.profile))
    return {name: value for name, value in run_parameters(run).items() if value != plain[name]}


def execute_notebook(
    path: Path,
    target: Path,
    parameters: Mapping[str, Any],
    *,
    cell_timeout: int | None = None,
    facts: Callable[[], Mapping[str, Any]] = dict,
) -> None:
    """Execute one notebook by papermill and keep the executed copy, whole, at ``target``.

    What the execution took is kept in the copy's metadata, under ``grath_execution``: ``seconds``,
    ``peak_memory_gib`` (highest resident size of the kernel and what it starts), ``date`` and
    ``facts``.

    Args:
        path: the notebook.
        target: where the executed copy goes.
        parameters: values for its cell tagged ``parameters``.
        cell_timeout: seconds that one cell may take; None for as long as it needs.
        facts: asked after the execution for what else to keep.

    Raises:
        UsageError: a parameter that the notebook does not have (papermill alone only warns).
        GrathError: a cell failed.
        RunError: a cell took longer than ``cell_timeout``, or the kernel died.
    """
    import papermill
    from nbclient.exceptions import CellTimeoutError
    from papermill.exceptions import PapermillExecutionError

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        known = papermill.inspect_notebook(str(path))
    for name in parameters:
        if name not in known:
            raise UsageError(f'{path.name} has no parameter "{name}"{did_you_mean(name, known)}')
    failed = target.with_suffix(".failed.ipynb")
    failed.unlink(missing_ok=True)
    start = time.monotonic()
    with atomic_path(target) as partial, _importable(), _peak_memory() as peak:
        try:
            papermill.execute_notebook(
                str(path), str(partial), dict(parameters), progress_bar=False, log_output=False,
                kernel_name="python3", cwd=str(path.parent), execution_timeout=cell_timeout,
                extra_arguments=[QUIET_KERNEL],
            )  # fmt: skip
        except PapermillExecutionError as error:
            os.replace(partial, failed)
            raise GrathError(
                f"{path.name}, cell {error.exec_count}: {error.ename}: {error.evalue}\n"
                f"The notebook as far as it came: {failed}"
            ) from error
        except CellTimeoutError as error:
            number, begins = _unfinished_cell(partial)
            os.replace(partial, failed)
            raise RunError(
                f"{path.name}, cell {number} ({begins}): not done after {cell_timeout} s, the "
                "--cell-timeout. What was finished is kept: run the same again with more time, or "
                f"see how far it came in {failed}"
            ) from error
        except RuntimeError as error:  # the kernel died
            os.replace(partial, failed)
            raise RunError(
                f"{path.name}: the kernel died ({error}); most often memory ran out. Try smaller "
                "batches (dpo.micro_batch_size, evaluation.batch_tokens) and run the same again"
            ) from error
        executed = json.loads(partial.read_text(encoding="utf-8"))
        executed["metadata"]["grath_execution"] = {
            "seconds": round(time.monotonic() - start, 1),
            "peak_memory_gib": round(peak["bytes"] / 2**30, 2),
            "date": datetime.date.today().isoformat(),
            **facts(),
        }
        _drop_widgets(executed)
        partial.write_text(json.dumps(executed, indent=1, ensure_ascii=False), encoding="utf-8")


def _drop_widgets(notebook: dict[str, Any]) -> None:
    """Take out what only lives with a kernel: progress bars would stay at 0 %, sliders dead.

    What was printed or drawn beside them stays.
    """
    notebook["metadata"].pop("widgets", None)
    for cell in notebook["cells"]:
        if "outputs" in cell:
            cell["outputs"] = [out for out in cell["outputs"] if WIDGET not in out.get("data", {})]


@contextmanager
def _peak_memory() -> Iterator[dict[str, int]]:
    """Watch the processes that this one starts; ``bytes`` is the most that they ever held."""
    import psutil

    peak, over = {"bytes": 0}, threading.Event()
    ours = psutil.Process()
    before = {child.pid for child in ours.children(recursive=True)}

    def watch() -> None:
        while not over.wait(0.3):
            children = [c for c in ours.children(recursive=True) if c.pid not in before]
            peak["bytes"] = max(peak["bytes"], sum(map(_highest_resident, children)))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield peak
    finally:
        over.set()
        watcher.join()


def _highest_resident(process: Any) -> int:
    """Return the highest resident size of a process in bytes, as far as the system remembers it."""
    import psutil

    try:
        # Linux and Windows keep the peak, so that nothing between two looks is missed.
        status = Path(f"/proc/{process.pid}/status")
        if status.is_file():
            kept = [line.split() for line in status.read_text().splitlines() if "VmHWM" in line]
            return int(kept[0][1]) * 1024 if kept else 0
        info = process.memory_info()
        return int(getattr(info, "peak_wset", info.rss))
    except (psutil.Error, OSError):  # it has ended
        return 0


def _unfinished_cell(notebook: Path) -> tuple[int, str]:
    """Return which code cell was running when papermill last saved (from 1), and how it begins."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    state = [cell["metadata"].get("papermill", {}).get("status") for cell in code]
    number = next((i for i, status in enumerate(state) if status != "completed"), len(code) - 1)
    return number + 1, "".join(code[number]["source"]).strip().split("\n")[0]


def is_current(target: Path, source: Path) -> bool:
    """Tell whether an executed notebook was made from the code as it is now (prose may differ)."""
    if not target.is_file():
        return False
    ours = json.loads(source.read_text(encoding="utf-8"))["cells"]
    theirs = json.loads(target.read_text(encoding="utf-8"))["cells"]

    def code(cells: list[dict[str, Any]]) -> list[str]:
        return [
            "".join(cell["source"])
            for cell in cells
            if cell["cell_type"] == "code"
            and "injected-parameters" not in cell["metadata"].get("tags", [])
        ]

    return code(ours) == code(theirs)


class _importable:
    """Let the kernels import the package also from a checkout that is not installed."""

    def __enter__(self) -> None:
        self.before = os.environ.get("PYTHONPATH")
        root = str(Path(__file__).resolve().parents[2])
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [root, self.before]))

    def __exit__(self, *exception: object) -> None:
        if self.before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = self.before


def _show(line: str) -> None:
    """Show a passing line on a terminal; a log file gets only what stays."""
    if sys.stdout.isatty():
        print(f"\r{line:60}\r" if line else f"\r{'':60}\r", end="", flush=True)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"
