"""Running notebooks unattended, and opening a run from inside one."""

from __future__ import annotations

import json
import re
from pathlib import Path

import nbformat
import pytest
from IPython.core.interactiveshell import InteractiveShell
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook

from grath_utils.config import load_config
from grath_utils.course.execute import execute_notebook, run_notebooks
from grath_utils.course.notebooks import (
    PARAMETERS,
    default_run_dir,
    main_line,
    numbered_notebooks,
    refuse_unknown_parameters,
    run_parameters,
)
from grath_utils.errors import GrathError, RunError, UsageError
from grath_utils.loop.run_dir import open_run

ROOT = Path(__file__).resolve().parents[2]
PARAMETERS_CELL = 'PROFILE = "cpu"\nRUN_DIR = ""\nSEED = 0\nOVERRIDES = ""'


def read(path: Path) -> nbformat.NotebookNode:
    return nbformat.read(path, as_version=4)


def write(path: Path, *cells: str) -> Path:
    """Write a notebook whose first cell is its parameters cell."""
    nodes = [nbformat.v4.new_code_cell(source) for source in cells]
    nodes[0].metadata["tags"] = ["parameters"]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=nodes, metadata=kernel), path)
    return path


def test_parameters_carry_a_whole_configuration(tmp_path: Path) -> None:
    config = load_config(
        "smoke",
        {
            "dpo.beta": 0.05,
            "questions.source": "my own questions.jsonl",
            "lora.targets": ["q_proj", "v_proj"],
            "evaluation.limit": None,
            "questions.skip_bad": True,
        },
        seed=9,
    )
    run = open_run(tmp_path / "run", config)
    parameters = run_parameters(run)
    assert tuple(parameters) == PARAMETERS
    again = load_config(parameters["PROFILE"], parameters["OVERRIDES"], seed=parameters["SEED"])
    assert again == config
    plain = open_run(tmp_path / "plain", load_config("smoke"))
    assert run_parameters(plain)["OVERRIDES"] == ""


def test_an_executed_notebook_is_kept_whole_and_not_executed_twice(tmp_path: Path) -> None:
    run = open_run(tmp_path / "run", load_config("smoke"))
    counter = tmp_path / "count.txt"
    source = write(
        tmp_path / "01_x.ipynb",
        PARAMETERS_CELL,
        f"open({str(counter)!r}, 'a').write('x'); print(PROFILE, SEED, RUN_DIR)",
    )
    lines: list[str] = []
    (executed,) = run_notebooks(run, [source], say=lines.append)
    assert executed == run.executed_notebooks / "01_x.ipynb"
    assert f"smoke 0 {run.path}" in json.dumps(read(executed).cells[-1]["outputs"])
    assert re.fullmatch(r"01_x +done in \d+ s, at most \d\.\d GiB of memory", lines[0])
    run_notebooks(run, [source], say=lines.append)
    assert lines[1].endswith("done before")
    assert counter.read_text() == "x"
    kept = read(executed).metadata["grath_execution"]
    assert kept["seconds"] > 0
    assert kept["peak_memory_gib"] > 0
    assert kept["files"] == 0
    assert kept["earlier"] is None
    write(source, PARAMETERS_CELL, "print('changed')")
    run_notebooks(run, [source], say=lines.append)
    assert "changed" in json.dumps(read(executed).cells[-1]["outputs"])
    assert read(executed).metadata["grath_execution"]["earlier"] == {
        name: value for name, value in kept.items() if name != "earlier"
    }


@pytest.mark.parametrize(
    ("cell", "error", "message"),
    [
        ("raise ValueError('no luck')", GrathError, r"bad.ipynb, cell \d+: ValueError: no luck"),
        (
            "while True: X += 1",
            RunError,
            r"bad.ipynb, cell \d+ \(while True: X \+= 1\): not done after 2 s, the --cell-timeout",
        ),
        ("import os; os._exit(9)", RunError, "bad.ipynb: the kernel died"),
    ],
)
def test_what_stopped_a_notebook_is_named_and_the_notebook_kept(
    tmp_path: Path, cell: str, error: type[GrathError], message: str
) -> None:
    source = write(tmp_path / "bad.ipynb", "X = 1", "print('so far')", cell)
    target, kept = tmp_path / "out" / "bad.ipynb", tmp_path / "out" / "bad.failed.ipynb"
    with pytest.raises(error, match=message) as caught:
        execute_notebook(source, target, {"X": 2}, cell_timeout=2)
    assert not target.exists()
    assert kept.is_file()
    if "died" not in message:
        assert str(kept) in str(caught.value)
        assert "so far" in kept.read_text(encoding="utf-8")


def test_papermill_alone_refuses_an_unknown_parameter_too(tmp_path: Path) -> None:
    refuse_unknown_parameters()  # no notebook here, nothing to refuse
    notebook = load_notebook_node(str(write(tmp_path / "x.ipynb", PARAMETERS_CELL)))
    shell = InteractiveShell.instance()
    try:
        for values in ({"SEED": 1}, {"SEED": 1, "PROFIL": "a\nb = 1"}):
            cells = parameterize_notebook(notebook, values).cells
            shell.user_ns["In"] = ["", "# My parameters\nX = 1", *(cell.source for cell in cells)]
            if "PROFIL" in values:
                with pytest.raises(UsageError, match='parameter "PROFIL"; did you mean "PROFILE"'):
                    refuse_unknown_parameters()
            else:
                refuse_unknown_parameters()
    finally:
        InteractiveShell.clear_instance()


def test_executed_notebooks_keep_no_widgets_and_kernels_no_warnings(tmp_path: Path, capfd) -> None:
    source = write(
        tmp_path / "w.ipynb",
        "X = 1",
        "import ipywidgets\nfrom tqdm.auto import tqdm\n"
        "for _ in tqdm(range(3)): pass\nprint('stays')\nipywidgets.IntSlider(value=7)",
    )
    execute_notebook(source, tmp_path / "out.ipynb", {"X": 2})
    assert "WARNING" not in capfd.readouterr().err, "of the kernel's own connection"
    executed = read(tmp_path / "out.ipynb")
    assert "widgets" not in executed.metadata
    assert [out.output_type for out in executed.cells[-1].outputs] == ["stream"]
    assert executed.cells[-1].outputs[0].text == "stays\n"


def test_an_unknown_parameter_is_refused(tmp_path: Path) -> None:
    source = write(tmp_path / "x.ipynb", "PROFILE = 'cpu'")
    with pytest.raises(UsageError, match='has no parameter "PROFIL"; did you mean "PROFILE"'):
        execute_notebook(source, tmp_path / "out.ipynb", {"PROFIL": "smoke"})


def test_the_default_run_directory_does_not_depend_on_where_one_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert default_run_dir("cpu") == ROOT / "runs" / "cpu"
    assert default_run_dir("somewhere/mine.yaml") == ROOT / "runs" / "mine"


def test_the_main_line_is_the_run_and_leaves_out_what_stands_on_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("00_a", "00b_e", "04_b", "05_c", "10_d"):
        write(tmp_path / f"{name}.ipynb", 'PROFILE = "cpu"')
    monkeypatch.setattr("grath_utils.course.notebooks.notebooks_dir", lambda: tmp_path)
    assert [path.stem for path in numbered_notebooks()] == [
        "00_a", "00b_e", "04_b", "05_c", "10_d"
    ]  # fmt: skip
    assert [path.stem for path in main_line()] == ["00_a", "00b_e", "04_b"]
