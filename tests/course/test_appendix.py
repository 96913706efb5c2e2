"""The side trips in ``notebooks/appendix``: they run, their solutions too, and keep the form."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path

import nbformat
import pytest

from grath_utils.course.notebooks import execute_notebook, numbered_notebooks

ROOT = Path(__file__).resolve().parents[2]
APPENDIX = sorted((ROOT / "notebooks" / "appendix").glob("*.ipynb"))
NEEDS_MODEL = {"nf4_by_hand"}
REPOSITORY = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"][
    "urls"
]["Repository"]

each_notebook = pytest.mark.parametrize("path", APPENDIX, ids=lambda path: path.stem)


def read(path: Path) -> nbformat.NotebookNode:
    return nbformat.read(path, as_version=4)


def prose(path: Path) -> str:
    return "\n".join(cell.source for cell in read(path).cells if cell.cell_type == "markdown")


def code_cells(path: Path) -> list[nbformat.NotebookNode]:
    return [cell for cell in read(path).cells if cell.cell_type == "code"]


def is_parameters(cell: nbformat.NotebookNode) -> bool:
    return "parameters" in cell.metadata.get("tags", [])


def solutions(path: Path) -> list[str]:
    """Return the code of the solutions that unfold below the exercises."""
    return re.findall(r"<summary>Solution</summary>\n\n```python\n(.*?)```", prose(path), re.DOTALL)


def functions(source: str) -> set[str]:
    tree = ast.parse(re.sub(r"^[%!].*$", "", source, flags=re.MULTILINE))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def test_the_side_trips_are_there() -> None:
    assert [path.stem for path in APPENDIX] == [
        "dpo_by_hand",
        "mc_metrics_and_how_they_mislead",
        "nf4_by_hand",
        "recipe_search",
    ]


@pytest.mark.notebook
@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, id=path.stem, marks=[pytest.mark.model] * (path.stem in NEEDS_MODEL))
        for path in APPENDIX
    ],
)
def test_it_runs_from_top_to_bottom_and_so_do_its_solutions(path: Path, tmp_path: Path) -> None:
    notebook = read(path)
    cells = len(notebook.cells)
    notebook.cells += [nbformat.v4.new_code_cell(source) for source in solutions(path)]
    source = tmp_path / path.name
    nbformat.write(notebook, source)
    execute_notebook(source, tmp_path / "executed.ipynb", {"SEED": 0})
    executed = read(tmp_path / "executed.ipynb")
    outputs = [out for cell in executed.cells for out in cell.get("outputs", [])]
    assert not [out for out in outputs if out.output_type == "error"]
    pictures = [out for out in outputs if "image/png" in out.get("data", {})]
    assert len(pictures) >= 4
    assert len(executed.cells) >= cells + 3
    # A library's warnings are no part of the lesson.
    noise = [out.text for out in outputs if out.get("name") == "stderr"]
    assert not noise, f"{path.name} prints to stderr: {noise}"


@each_notebook
def test_no_path_of_a_machine(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"(?<![\w.])/(home|Users|root|work|tmp)/\w+", text)


@each_notebook
def test_one_typed_documented_parameters_cell(path: Path) -> None:
    import papermill

    assert sum(map(is_parameters, code_cells(path))) == 1
    found = papermill.inspect_notebook(str(path))
    assert "SEED" in found
    for name, parameter in found.items():
        assert parameter["inferred_type_name"] in ("str", "int", "float")
        assert parameter["help"], f"{path.name}: {name} has no help"
        ast.literal_eval(parameter["default"])


@each_notebook
def test_it_has_the_parts_that_readers_look_for(path: Path) -> None:
    text = prose(path)
    for part in ("What you will learn", "What it costs", "Gotcha", "Exercises", "Recap"):
        assert part in text, f"{path.name} lacks {part!r}"
    for level in ("Easy", "Medium", "Hard"):
        assert re.search(rf"^#+ .*{level}", text, re.MULTILINE), f"{path.name}: no {level} exercise"
    assert text.count("<summary>Hint</summary>") == 3
    assert len(solutions(path)) == 3
    place = f"blob/main/notebooks/appendix/{path.name}"
    owner = REPOSITORY.removeprefix("https://github.com/")
    assert f"colab.research.google.com/github/{owner}/{place}" in text
    assert f"kaggle.com/kernels/welcome?src={REPOSITORY}/{place}" in text
    for other in APPENDIX:
        assert other == path or f"]({other.name})" in text, f"no way to {other.name}"
    assert "COSTS" not in text
    assert "TODO" not in text


@each_notebook
def test_the_set_up_cell_is_the_course_s(path: Path) -> None:
    assert code_cells(path)[0].source == code_cells(numbered_notebooks()[0])[0].source


@each_notebook
def test_cells_are_short(path: Path) -> None:
    for cell in code_cells(path)[1:]:
        lines = [line for line in cell.source.splitlines() if line.strip()]
        assert len(lines) <= 16, f"{path.name}, cell {cell.id}: {len(lines)} lines"


def test_no_function_is_defined_in_two_notebooks() -> None:
    seen: dict[str, str] = {}
    for path in [*numbered_notebooks(), *APPENDIX]:
        for cell in code_cells(path):
            for name in functions(cell.source):
                assert name not in seen, f"{name}: {seen[name]}, {path.name}"
                seen[name] = path.name


def test_the_readme_names_them() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for path in APPENDIX:
        assert f"(notebooks/appendix/{path.name})" in readme
