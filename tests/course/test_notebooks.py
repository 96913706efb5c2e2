"""The form that every notebook keeps, of the course and of the side trips in ``appendix``."""

from __future__ import annotations

import ast
import itertools
import re
import tomllib
from pathlib import Path

import nbformat
import pytest

from grath_utils.course.execute import execute_notebook
from grath_utils.course.notebooks import PARAMETERS, numbered_notebooks

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = ROOT / "notebooks"
COURSE = numbered_notebooks()
APPENDIX = sorted((NOTEBOOKS / "appendix").glob("*.ipynb"))
NEEDS_MODEL = {"nf4_by_hand"}
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
REPOSITORY = PYPROJECT["project"]["urls"]["Repository"]

every_notebook = pytest.mark.parametrize("path", [*COURSE, *APPENDIX], ids=lambda path: path.stem)


def prose(path: Path) -> str:
    cells = nbformat.read(path, as_version=4).cells
    return "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")


def code_cells(path: Path) -> list[nbformat.NotebookNode]:
    cells = nbformat.read(path, as_version=4).cells
    return [cell for cell in cells if cell.cell_type == "code"]


def is_parameters(cell: nbformat.NotebookNode) -> bool:
    return "parameters" in cell.metadata.get("tags", [])


def folded_solutions(path: Path) -> list[str]:
    """Return the code of the solutions that unfold below the exercises of a side trip."""
    return re.findall(r"<summary>Solution</summary>\n\n```python\n(.*?)```", prose(path), re.DOTALL)


@every_notebook
def test_one_typed_documented_parameters_cell(path: Path) -> None:
    import papermill

    assert sum(map(is_parameters, code_cells(path))) == 1
    found = papermill.inspect_notebook(str(path))
    types = {name: parameter["inferred_type_name"] for name, parameter in found.items()}
    if path in COURSE:
        assert tuple(found) == PARAMETERS
        assert types == {"PROFILE": "str", "RUN_DIR": "str", "SEED": "int", "OVERRIDES": "str"}
    assert "SEED" in found
    assert set(types.values()) <= {"str", "int", "float"}
    for name, parameter in found.items():
        assert parameter["help"], f"{path.name}: {name} has no help"
        ast.literal_eval(parameter["default"])


@every_notebook
def test_it_has_the_parts_that_readers_look_for(path: Path) -> None:
    text = prose(path)
    for part in ("What you will learn", "What it costs", "Gotcha", "Exercises", "Recap"):
        assert part in text, f"{path.name} lacks {part!r}"
    for level in ("Easy", "Medium", "Hard"):
        assert re.search(rf"^#+ .*{level}", text, re.MULTILINE), f"{path.name}: no {level} exercise"
    place = f"blob/main/{path.relative_to(ROOT).as_posix()}"
    owner = REPOSITORY.removeprefix("https://github.com/")
    assert f"colab.research.google.com/github/{owner}/{place}" in text
    assert f"kaggle.com/kernels/welcome?src={REPOSITORY}/{place}" in text
    assert "COSTS" not in text
    assert "TODO" not in text


@every_notebook
def test_the_set_up_cell_is_the_same_everywhere(path: Path) -> None:
    first = code_cells(path)[0].source
    assert first == code_cells(COURSE[0])[0].source
    assert REPOSITORY in first


@every_notebook
def test_cells_are_short_and_hold_no_plumbing(path: Path) -> None:
    for cell in code_cells(path)[1:]:
        lines = [line for line in cell.source.splitlines() if line.strip()]
        assert len(lines) <= 16, f"{path.name}, cell {cell.id}: {len(lines)} lines"


@every_notebook
def test_no_path_of_a_machine(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"(?<![\w.])/(home|Users|root|work|tmp)/\w+", text)


def test_no_function_is_defined_in_two_notebooks() -> None:
    seen: dict[str, str] = {}
    for path in [*COURSE, *APPENDIX]:
        for cell in code_cells(path):
            source = re.sub(r"^[%!].*$", "", cell.source, flags=re.MULTILINE)
            for node in ast.walk(ast.parse(source)):
                if isinstance(node, ast.FunctionDef):
                    first = seen.setdefault(node.name, path.name)
                    assert first == path.name, f"{node.name}: {first}, {path.name}"


def test_the_course_leads_on_and_its_exercises_have_solutions() -> None:
    for path, following in itertools.pairwise(COURSE):
        assert f"]({following.name})" in prose(path), f"{path.name}: no link to the next notebook"
    for path in COURSE:
        assert f"solutions/{path.name}" in prose(path)
    assert [p.name for p in sorted((NOTEBOOKS / "solutions").glob("*.ipynb"))] == [
        path.name for path in COURSE
    ]


def test_the_side_trips_know_each_other_and_the_readme_knows_them() -> None:
    assert [path.stem for path in APPENDIX] == [
        "dpo_by_hand",
        "mc_metrics_and_how_they_mislead",
        "nf4_by_hand",
        "recipe_search",
    ]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for path in APPENDIX:
        text = prose(path)
        assert text.count("<summary>Hint</summary>") == 3
        assert len(folded_solutions(path)) == 3
        for other in APPENDIX:
            assert other == path or f"]({other.name})" in text, f"{path.name}: {other.name}?"
        assert f"(notebooks/appendix/{path.name})" in readme


@pytest.mark.notebook
@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, id=path.stem, marks=[pytest.mark.model] * (path.stem in NEEDS_MODEL))
        for path in APPENDIX
    ],
)
def test_a_side_trip_runs_from_top_to_bottom_and_so_do_its_solutions(
    path: Path, tmp_path: Path
) -> None:
    notebook = nbformat.read(path, as_version=4)
    notebook.cells += [nbformat.v4.new_code_cell(source) for source in folded_solutions(path)]
    source = tmp_path / path.name
    nbformat.write(notebook, source)
    execute_notebook(source, tmp_path / "executed.ipynb", {"SEED": 0})
    executed = nbformat.read(tmp_path / "executed.ipynb", as_version=4)
    outputs = [out for cell in executed.cells for out in cell.get("outputs", [])]
    assert not [out for out in outputs if out.output_type == "error"]
    pictures = [out for out in outputs if "image/png" in out.get("data", {})]
    assert len(pictures) >= 4
    assert len(executed.cells) >= len(notebook.cells)
    # A library's warnings are no part of the lesson.
    noise = [out.text for out in outputs if out.get("name") == "stderr"]
    assert not noise, f"{path.name} prints to stderr: {noise}"
