"""Committed notebooks show the outputs of a real run: taken over, cleaned, stamped.

``make render`` takes the outputs from the executed copies in ``RUN/notebooks/``, executes what is
missing there, and writes them into the notebooks of the repository. What must not be published or
would change with every run is left out. A stamp in a notebook's metadata (``grath``) says what its
outputs come from::

    source_sha256, code_sha256   of the cells, so that a test notices when the outputs are stale
    profile, versions, device    what it was run with; no profile for side trips
    cost                         of the execution that had the most to do
"""

from __future__ import annotations

import base64
import copy
import hashlib
import io
import json
import re
import socket
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import nbformat

from grath_utils.course.execute import execute_notebook, is_current, most_work, run_notebooks
from grath_utils.course.notebooks import numbered_notebooks
from grath_utils.errors import DataError, GrathError, UsageError
from grath_utils.files import cache_dir, notebooks_dir, user_path, write_text
from grath_utils.loop.run_dir import Run, environment_facts, lock_run

STAMP = "grath"
LARGEST = 400_000
"""Bytes that a committed notebook may have: GitHub shows it at once, and a clone stays small."""
FIGURE_COLOURS = 64  # few enough for a small file, more than a figure here uses
STAMPED_PACKAGES = ("python", "torch", "transformers", "trl", "peft", "bitsandbytes")
COST = ("seconds", "peak_memory_gib", "files", "date")
DEVICE = ("system", "cpu_count", "torch_threads", "memory_gib", "accelerator")

PROGRESS = re.compile(r"\d+%\|.*\| *\d[\d.,kM]*/\d|\d+it \[\d")
MACHINE_PATH = re.compile(
    r"(?<![\w.~:/-])(/(home|Users|root|work|tmp|var|mnt|opt|srv|private)/\w|[A-Z]:\\\w).{,36}"
)
_KERNEL_FILE = re.compile(r"\S*ipykernel_\d+[/\\]\d+\.py")
_ADDRESS = re.compile(r" at 0x[0-9A-Fa-f]+")


def rendered_notebooks() -> list[Path]:
    """Return the notebooks that are committed with outputs: the course's and the side trips."""
    course = numbered_notebooks()
    return [*course, *sorted((course[0].parent / "appendix").glob("*.ipynb"))]


def source_digest(cells: Iterable[Mapping[str, Any]], *, code_only: bool = False) -> str:
    """Return the SHA-256 of the sources of cells; outputs depend on those of the code alone."""
    kinds = ("code",) if code_only else ("code", "markdown", "raw")
    sources = [[c.cell_type, c.source] for c in cells if c.cell_type in kinds]
    return hashlib.sha256(json.dumps(sources, ensure_ascii=False).encode("utf-8")).hexdigest()


def _code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    """Return the cells of code, without the one that papermill injects."""
    code = (cell for cell in notebook.cells if cell.cell_type == "code")
    return [cell for cell in code if "injected-parameters" not in cell.metadata.get("tags", [])]


def _read(path: Path) -> nbformat.NotebookNode:
    try:
        return nbformat.read(path, as_version=4)
    except Exception as error:  # nbformat's own, and of whatever it meets first
        raise DataError(f"{path}: not a notebook that can be read ({error})") from error


def render(
    run: Run,
    notebooks: Sequence[Path] = (),
    *,
    again: bool = False,
    say: Callable[[str], None] = print,
) -> list[Path]:
    """Bring the outputs of committed notebooks up to date from a run; return those written.

    Only notebooks whose stamp does not match are touched (or, ``again``, all that are named; none
    means every one). If only prose was edited, the outputs stay. Otherwise they come from the
    executed copy in ``RUN/notebooks/``, made now if there is none from this code. Side trips have
    no profile and are executed as they are.

    Raises:
        GrathError: a cell failed, or a notebook is too large with its outputs.
        UsageError: a file that is not a notebook of this repository.
    """
    written, folder = [], notebooks_dir()
    with lock_run(run):
        for path in notebooks or rendered_notebooks():
            if folder is None or not path.resolve().is_relative_to(folder) or not path.is_file():
                raise UsageError(f"{path} is not a notebook of this repository's folder notebooks/")
            source = _read(path)
            stamp = source.metadata.get(STAMP) or {}
            digest = source_digest(source.cells)
            side_trip = path.resolve().parent.name == "appendix"
            profile = None if side_trip else run.config.profile
            if again or stamp.get("profile") != profile:
                stamp = {}
            if stamp.get("source_sha256") == digest:
                say(f"{path.stem:32} up to date")
                continue
            if stamp.get("code_sha256") == source_digest(source.cells, code_only=True):
                source.metadata[STAMP] = {**stamp, "source_sha256": digest}
                _write(path, source)
                say(f"{path.stem:32} only its prose was edited")
            else:
                executed = run.executed_notebooks / "appendix" / path.name
                if not side_trip:
                    [executed] = run_notebooks(run, [path], say=lambda line: None)
                elif not is_current(executed, path):
                    execute_notebook(path, executed, {})
                facts = environment_facts() if side_trip else run.info()
                places = _places(run, folder.parent)
                _write(path, take_over(source, _read(executed), facts, profile, places))
                say(f"{path.stem:32} {path.stat().st_size / 1000:.0f} kB")
            written.append(path)
    return written


def _places(run: Run, root: Path) -> list[tuple[str, str]]:
    """Return this machine's places and what to show in their place, the most specific first."""
    places = {run.path: f"runs/{run.path.name}", cache_dir(): "CACHE", root: "."}
    places[user_path("~")] = "~"
    return [(text, name) for p, name in places.items() for text in {str(p), p.as_posix()}]


def _write(path: Path, notebook: nbformat.NotebookNode) -> None:
    nbformat.validate(notebook)
    text = nbformat.writes(notebook) + "\n"
    size, host = len(text.encode("utf-8")), socket.gethostname()
    if size > LARGEST:
        sizes = [(len(json.dumps(cell.get("outputs", []))), cell.id) for cell in notebook.cells]
        largest = ", ".join(f"{name} ({n:,})" for n, name in sorted(sizes, reverse=True)[:3])
        raise GrathError(
            f"{path.name} would have {size:,} bytes with its outputs, more than {LARGEST:,}; make "
            f"smaller what the cells {largest} show"
        )
    if re.search(r"[\d-]", host) and re.search(rf"\b{re.escape(host)}\b", text):
        raise GrathError(f'{path.name} shows the name of this machine, "{host}"; do not print it')
    write_text(path, text)


def take_over(
    source: nbformat.NotebookNode,
    executed: nbformat.NotebookNode,
    facts: Mapping[str, Any],
    profile: str | None,
    places: Sequence[tuple[str, str]] = (),
) -> nbformat.NotebookNode:
    """Return a notebook with the cells of ``source`` and the cleaned outputs of ``executed``.

    The prose of the source may be newer than that of papermill's copy. ``facts`` are ``versions``
    and ``device``, as in ``run.json``; there is no profile for a side trip.
    """
    result = copy.deepcopy(source)
    both = zip(_code_cells(result), _code_cells(executed), strict=True)
    for number, (cell, done) in enumerate(both, start=1):  # papermill's cell is not counted
        cell.execution_count = number
        cell.outputs = clean_outputs(done.outputs, places)
        for output in cell.outputs:
            if output.output_type == "execute_result":
                output.execution_count = number
    last, old = executed.metadata.get("grath_execution", {}), result.metadata.pop(STAMP, {})
    costs = [last, last.get("earlier"), old.get("cost") if old.get("profile") == profile else None]
    most = most_work(*costs) or {}
    result.metadata[STAMP] = {
        "source_sha256": source_digest(source.cells),
        "code_sha256": source_digest(source.cells, code_only=True),
        "profile": profile,
        "versions": {name: facts["versions"][name] for name in STAMPED_PACKAGES},
        "device": {name: facts["device"][name] for name in DEVICE},
        "cost": {name: most.get(name) for name in COST},
    }
    return result


def clean_outputs(
    outputs: Iterable[Mapping[str, Any]], places: Sequence[tuple[str, str]] = ()
) -> list[nbformat.NotebookNode]:
    """Return a cell's outputs as they are published.

    Left out: progress bars, memory addresses. Changed: this machine's paths, figures (to few
    colours). Parts of one stream become one output.
    """
    cleaned: list[nbformat.NotebookNode] = []
    for output in map(nbformat.from_dict, copy.deepcopy(list(outputs))):
        data = output.get("data", {})
        if output.output_type == "stream":
            # A progress bar rewrites its line with carriage returns.
            lines = [line.rstrip("\r").rsplit("\r", 1)[-1] for line in output.text.split("\n")]
            shown = "\n".join(line for line in lines if not PROGRESS.search(line))
            output.text = _neutral(shown, places)
            if cleaned and cleaned[-1].get("name") == output.name:
                cleaned[-1].text += output.text
            elif output.text.strip():
                cleaned.append(output)
        elif len(data) != 1 or not PROGRESS.search(data.get("text/plain", "")):
            for kind, value in data.items():
                if kind.startswith("text/"):
                    data[kind] = _neutral(value, places)
                elif kind == "image/png":
                    picture = smaller_png(base64.b64decode(value))
                    data[kind] = base64.b64encode(picture).decode("ascii")
            cleaned.append(output)
    return cleaned


def _neutral(text: str, places: Sequence[tuple[str, str]]) -> str:
    text = _ADDRESS.sub("", _KERNEL_FILE.sub("cell", text))
    for place, name in places:
        if name == ".":
            text = text.replace(place + "/", "").replace(place + "\\", "")
        text = text.replace(place, name)
    if found := MACHINE_PATH.search(text):
        raise GrathError(f"an output shows a path of this machine: {found[0]!r}; do not print it")
    return text


def smaller_png(picture: bytes) -> bytes:
    """Return a PNG with few colours, if that makes it smaller; thin lines keep their own."""
    from PIL import Image

    image = Image.open(io.BytesIO(picture))
    flat = Image.new("RGB", image.size, "white")
    flat.paste(image, mask=image.getchannel("A") if "A" in image.getbands() else None)
    few = flat.quantize(FIGURE_COLOURS, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
    out = io.BytesIO()
    few.save(out, "PNG", optimize=True)
    return min(out.getvalue(), picture, key=len)
