"""Committed outputs: cleaned, stamped, and no older than the source that they stand under."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

import helpers
import nbformat
import numpy as np
import pytest
from PIL import Image

from grath_utils.config import load_config
from grath_utils.course.execute import WIDGET, is_current
from grath_utils.errors import GrathError, UsageError
from grath_utils.loop.run_dir import open_run
from grath_utils.workshop import render as rendering
from grath_utils.workshop.render import (
    LARGEST,
    MACHINE_PATH,
    PROGRESS,
    STAMP,
    clean_outputs,
    render,
    rendered_notebooks,
    source_digest,
    take_over,
)

FACTS = {
    "versions": dict.fromkeys(rendering.STAMPED_PACKAGES, "1.0"),
    "device": dict.fromkeys(rendering.DEVICE, 2),
}
PARAMETERS = 'PROFILE = "cpu"\nRUN_DIR = ""\nSEED = 0\nOVERRIDES = ""'


# --- what is committed ---------------------------------------------------------------------------


def problems(path: Path) -> list[str]:
    """Return what is wrong with a committed notebook's outputs; empty if nothing is."""
    notebook = nbformat.read(path, as_version=4)
    stamp = notebook.metadata.get(STAMP)
    if not stamp:
        return ["has no outputs yet (no stamp)"]
    size, found = path.stat().st_size, []
    if stamp["source_sha256"] != source_digest(notebook.cells):
        found.append("its outputs are older than its source")
    if size > LARGEST:
        found.append(f"has {size:,} bytes, more than {LARGEST:,}")
    if left := {"papermill", "widgets", "grath_execution"} & notebook.metadata.keys():
        found.append(f"carries metadata of its execution: {', '.join(sorted(left))}")
    for cell in (cell for cell in notebook.cells if cell.cell_type == "code"):
        if "injected-parameters" in cell.metadata.get("tags", []):
            found.append("holds papermill's injected cell")
        if cell.source.strip() and cell.execution_count is None:
            found.append(f"cell {cell.id} was not executed")
        found += [f"cell {cell.id} {wrong}" for wrong in map(wrong_output, cell.outputs) if wrong]
    return found


def wrong_output(output: nbformat.NotebookNode) -> str | None:
    data = output.get("data", {})
    shown = [value for kind, value in data.items() if kind.startswith("text/")]
    text = "\n".join([*shown, output.get("text", "")])
    if output.output_type == "error":
        return f"ended with {output.ename}"
    if WIDGET in data:
        return "shows a widget, which is nothing without its kernel"
    if match := MACHINE_PATH.search(text):
        return f"shows a path of a machine: {match.group()!r}"
    return "shows a progress bar" if PROGRESS.search(text) else None


@pytest.mark.parametrize("path", rendered_notebooks(), ids=lambda path: path.stem)
def test_committed_outputs_are_those_of_the_source(path: Path) -> None:
    assert problems(path) == [], f"{path.name} needs `make render`"


# --- cleaning ------------------------------------------------------------------------------------


def stream(text: str, name: str = "stdout") -> dict:
    return {"output_type": "stream", "name": name, "text": text}


def display(**data: str) -> dict:
    kinds = {"plain": "text/plain", "html": "text/html", "png": "image/png", "widget": WIDGET}
    return {
        "output_type": "display_data",
        "metadata": {},
        "data": {kinds[kind]: value for kind, value in data.items()},
    }


def png(colours: int = 3) -> str:
    noise = np.random.default_rng(0).integers(0, colours, (40, 60), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray((noise * (255 // colours)).astype(np.uint8)).convert("RGBA").save(out, "PNG")
    return base64.b64encode(out.getvalue()).decode()


def test_progress_bars_and_machines_paths_go_and_the_rest_stays() -> None:
    bar = (
        "train:  10%|#         | 1/10 [00:01<00:09]\rtrain: 100%|##########| 10/10 [00:10<00:00]\n"
    )
    outputs = [
        stream("first\n"),
        stream("Run /srv/me/course/runs/cpu\n"),
        stream(bar, "stderr"),
        stream("/srv/me/course/notebooks/x.py and ~\n/tmp/ipykernel_12/34.py:1: Warning", "stderr"),
    ]
    places = [("/srv/me/course/runs/cpu", "runs/cpu"), ("/srv/me/course", ".")]
    out, err = clean_outputs(outputs, places)
    assert out.text == "first\nRun runs/cpu\n"
    assert err.text == "notebooks/x.py and ~\ncell:1: Warning"
    assert clean_outputs([stream(bar, "stderr")]) == []
    assert clean_outputs([display(plain="  0%|          | 0/25 [00:00<?]")]) == []
    (kept,) = clean_outputs([display(plain="<Axes at 0x7f12ab>")])
    assert kept.data["text/plain"] == "<Axes>"


def test_a_figure_keeps_its_size_and_look_with_few_colours() -> None:
    before = png(colours=3)
    (kept,) = clean_outputs([display(png=before)])
    after = kept.data["image/png"]
    assert len(after) <= len(before)
    images = [
        np.asarray(Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB"), dtype=int)
        for text in (before, after)
    ]
    assert images[0].shape == images[1].shape
    assert abs(images[0] - images[1]).max() <= 2


# --- taking over ---------------------------------------------------------------------------------


def notebook_of(*sources: str, outputs: list | None = None) -> nbformat.NotebookNode:
    cells = [nbformat.v4.new_markdown_cell("# Title", id="title")]
    cells += [nbformat.v4.new_code_cell(s, id=f"c{i}") for i, s in enumerate(sources)]
    if outputs is not None:
        injected = nbformat.v4.new_code_cell("SEED = 3", id="injected")
        injected.metadata["tags"] = ["injected-parameters"]
        cells.insert(2, injected)
        for i, cell in enumerate(cells[1:], start=1):
            cell.execution_count, cell.outputs = i, []
        last = next(cell for cell in reversed(cells) if cell.id != "injected")
        last.outputs = [nbformat.from_dict(out) for out in outputs]
    return nbformat.v4.new_notebook(cells=cells)


def executed(*sources: str, outputs: list, files: int = 0, seconds: float = 60.0):
    copy = notebook_of(*sources, outputs=outputs)
    copy.metadata["papermill"] = {"duration": 1.0}
    copy.metadata["grath_execution"] = {
        "seconds": seconds, "peak_memory_gib": 1.5, "files": files, "date": "2026-01-02",
    }  # fmt: skip
    return copy


def test_outputs_are_taken_over_without_a_trace_of_papermill(tmp_path: Path) -> None:
    source = notebook_of("SEED = 0", "print(SEED)")
    done = executed("SEED = 0", "print(SEED)", outputs=[stream("3\n")], files=1)
    result = take_over(source, done, FACTS, "cpu")
    assert [cell.id for cell in result.cells] == ["title", "c0", "c1"]
    assert [cell.execution_count for cell in result.cells[1:]] == [1, 2]
    assert result.cells[2].outputs[0].text == "3\n"
    assert source.cells[2].outputs == []
    stamp = result.metadata[STAMP]
    assert stamp["profile"] == "cpu"
    assert stamp["cost"] == {
        "seconds": 60.0, "peak_memory_gib": 1.5, "files": 1, "date": "2026-01-02",
    }  # fmt: skip
    path = tmp_path / "x.ipynb"
    nbformat.write(result, path)
    assert problems(path) == []


def test_the_cost_stays_that_of_the_execution_that_did_the_work() -> None:
    first = executed("x = 1", outputs=[], files=2, seconds=200)
    source = take_over(notebook_of("x = 1"), first, FACTS, "cpu")
    quick = executed("x = 1", outputs=[], seconds=5)
    assert take_over(source, quick, FACTS, "cpu").metadata[STAMP]["cost"]["seconds"] == 200
    assert take_over(source, quick, FACTS, "smoke").metadata[STAMP]["cost"]["seconds"] == 5
    # The run directory remembers, too, where nothing was committed in between.
    quick.metadata["grath_execution"]["earlier"] = first.metadata["grath_execution"]
    cost = take_over(notebook_of("x = 1"), quick, FACTS, "cpu").metadata[STAMP]["cost"]
    assert (cost["seconds"], cost["files"]) == (200, 2)


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (stream("see " + "/home" + "/me/runs"), "path of a machine"),
        (stream(r"see C:\Users"), "path of a machine"),
        (stream(" 50%|####      | 5/10", "stderr"), "progress bar"),
        (display(widget="{}", plain="x"), "widget"),
        ({"output_type": "error", "ename": "E", "evalue": "", "traceback": []}, "ended with E"),
    ],
)
def test_what_may_not_be_committed_is_named(tmp_path: Path, output: dict, message: str) -> None:
    done = executed("x = 1", outputs=[])
    notebook = take_over(notebook_of("x = 1"), done, FACTS, "cpu")
    notebook.cells[1].outputs = [nbformat.from_dict(output)]
    nbformat.write(notebook, tmp_path / "x.ipynb")
    (found,) = problems(tmp_path / "x.ipynb")
    assert message in found


def test_an_edited_source_is_noticed(tmp_path: Path) -> None:
    done = executed("x = 1", outputs=[])
    notebook = take_over(notebook_of("x = 1"), done, FACTS, "cpu")
    notebook.cells[0].source = "# Another title"
    nbformat.write(notebook, tmp_path / "x.ipynb")
    assert problems(tmp_path / "x.ipynb") == ["its outputs are older than its source"]
    cells = notebook.cells
    assert source_digest(cells, code_only=True) == notebook.metadata[STAMP]["code_sha256"]


# --- the whole way -------------------------------------------------------------------------------


@pytest.fixture
def course(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A course of one notebook and one side trip, in the place of the repository's."""
    folder = tmp_path / "course" / "notebooks"
    (folder / "appendix").mkdir(parents=True)
    count = tmp_path / "count.txt"
    tell = f"open({str(count)!r}, 'a').write('x')\nprint('in', RUN_DIR)"
    for path, sources in (
        (folder / "00_a.ipynb", (PARAMETERS, tell)),
        (folder / "appendix" / "b.ipynb", ("SEED = 0", "print('side trip', SEED)")),
    ):
        notebook = notebook_of(*sources)
        notebook.cells[1].metadata["tags"] = ["parameters"]
        notebook.metadata["kernelspec"] = {
            "name": "python3", "display_name": "Python 3", "language": "python",
        }  # fmt: skip
        nbformat.write(notebook, path)
    monkeypatch.setattr(rendering, "notebooks_dir", lambda: folder)
    monkeypatch.setattr(rendering, "numbered_notebooks", lambda: [folder / "00_a.ipynb"])
    return folder


@pytest.mark.notebook
def test_render_executes_what_is_stale_and_nothing_else(course: Path, tmp_path: Path) -> None:
    facts = {
        **helpers.FACTS,
        "versions": FACTS["versions"],
        "device": {**helpers.FACTS["device"], "system": "Linux", "torch_threads": 2},
    }
    run = open_run(tmp_path / "course" / "runs" / "smoke", load_config("smoke"), facts)
    count, lines = tmp_path / "count.txt", []
    both = [course / "00_a.ipynb", course / "appendix" / "b.ipynb"]
    assert render(run, say=lines.append) == both
    assert [problems(path) for path in both] == [[], []]
    main, side = (nbformat.read(path, as_version=4) for path in both)
    assert main.cells[2].outputs[0].text == "in runs/smoke\n"
    assert main.metadata[STAMP]["profile"] == "smoke"
    assert side.metadata[STAMP]["profile"] is None
    assert is_current(run.executed_notebooks / "00_a.ipynb", both[0])

    assert render(run, say=lines.append) == []
    main.cells[0].source = "# Another title"
    nbformat.write(main, both[0])
    assert render(run, say=lines.append) == both[:1]
    assert lines[-2].endswith("only its prose was edited")
    assert render(run, [both[0]], again=True, say=lines.append) == both[:1]
    assert count.read_text() == "x", "executed once"

    main.cells[2].source += "  # edited"
    nbformat.write(main, both[0])
    assert problems(both[0]) == ["its outputs are older than its source"]
    render(run, say=lines.append)
    assert problems(both[0]) == []
    assert count.read_text() == "xx"


def test_a_notebook_that_is_too_large_names_its_largest_cells(course: Path) -> None:
    done = executed("x = 1", outputs=[stream("long " * 100_000)])
    notebook = take_over(notebook_of("x = 1"), done, FACTS, "cpu")
    before = (course / "00_a.ipynb").read_bytes()
    with pytest.raises(GrathError, match=r"00_a.ipynb would have .* cells c0 \(500,"):
        rendering._write(course / "00_a.ipynb", notebook)
    assert (course / "00_a.ipynb").read_bytes() == before


def test_a_path_of_this_machine_is_refused() -> None:
    shown = "/home" + "/me/runs"
    done = executed("x = 1", outputs=[stream(f"see {shown}")])
    with pytest.raises(GrathError, match=f"a path of this machine: '{shown}'"):
        take_over(notebook_of("x = 1"), done, FACTS, "cpu")


def test_a_notebook_of_somewhere_else_is_refused(course: Path, tmp_path: Path) -> None:
    run = open_run(tmp_path / "run", load_config("smoke"))
    (tmp_path / "x.ipynb").write_text(json.dumps(notebook_of("x = 1")), encoding="utf-8")
    with pytest.raises(UsageError, match="not a notebook of this repository"):
        render(run, [tmp_path / "x.ipynb"])
