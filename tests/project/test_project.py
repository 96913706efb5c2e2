"""The project as a whole: package lists agree, modules import one way only, nothing leaks."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import grath_utils

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "grath_utils"


def pins(name: str) -> dict[str, tuple[str, str]]:
    """Return package -> (version, comment) of a requirements file."""
    found = {}
    for line in (ROOT / name).read_text(encoding="utf-8").splitlines():
        if line.strip() and not line.startswith("#"):
            pin, _, comment = line.partition("#")
            package, _, version = pin.strip().partition("==")
            found[package] = (version, comment.strip())
    return found


def test_requirements_environment_and_pyproject_agree() -> None:
    pinned = pins("requirements.txt")
    conda = (ROOT / "environment.yml").read_text(encoding="utf-8")
    in_conda = {
        match[1]: (match[2], match[3].strip())
        for match in re.finditer(r"^ {6}- ([\w-]+)==(\S+)\s+#(.*)$", conda, re.MULTILINE)
    }
    assert in_conda == pinned
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    needed = project["dependencies"] + project["optional-dependencies"]["lab"]
    ranges = {r.name: r.specifier for r in map(Requirement, needed)}
    assert ranges.keys() == pinned.keys()
    for package, (version, comment) in pinned.items():
        assert version in ranges[package], f"{package}: {version} is outside {ranges[package]}"
        assert comment, f"{package}: say where it is used"
    dev = {r.name: r.specifier for r in map(Requirement, project["optional-dependencies"]["dev"])}
    pinned_dev = pins("requirements-dev.txt") | pins("requirements-book.txt")
    assert dev.keys() == pinned_dev.keys()
    for package, (version, _) in pinned_dev.items():
        assert version in dev[package]
    extra = {
        r.name: r.specifier for r in map(Requirement, project["optional-dependencies"]["sweep"])
    }
    assert extra.items() <= dev.items(), "what `sweep` needs is tested with what dev installs"
    assert f"- python{project['requires-python']}\n" in conda


def test_the_packages_that_the_project_is_about_are_there() -> None:
    wanted = "jupyterlab torch transformers trl peft bitsandbytes datasets matplotlib papermill"
    assert set(wanted.split()) <= pins("requirements.txt").keys()


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder)


def test_the_rooms_import_one_way_only(tmp_path: Path) -> None:
    done = lint_imports(ROOT)
    assert done.returncode == 0, done.stdout
    # The contract sees an import of either form that goes up.
    shutil.copytree(PACKAGE, tmp_path / "grath_utils")
    shutil.copyfile(ROOT / "pyproject.toml", tmp_path / "pyproject.toml")
    for room, planted in (
        ("pairs", "from grath_utils import loop"),
        ("engine", "import grath_utils.dpo"),
    ):
        path = tmp_path / "grath_utils" / room / "planted.py"
        path.write_text(planted + "\n", encoding="utf-8")
        done = lint_imports(tmp_path)
        assert (done.returncode, "BROKEN" in done.stdout) == (1, True), f"{room}: {planted}"
        path.unlink()


def test_every_room_is_in_the_contract_the_docstring_and_the_wheel() -> None:
    rooms = {path.parent.name for path in PACKAGE.glob("*/__init__.py")} - {"profiles"}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    (contract,) = project["tool"]["importlinter"]["contracts"]
    layers = re.findall(r"grath_utils\.(\w+)", " ".join(contract["layers"]))
    assert rooms <= set(layers)
    described = re.findall(r"^    (\w+)  +\S", grath_utils.__doc__ or "", re.MULTILINE)
    assert [name for name in reversed(layers) if name in rooms] == described
    packages = project["tool"]["setuptools"]["packages"]
    folders = {path.parent for path in PACKAGE.rglob("__init__.py")}
    assert {".".join(path.relative_to(ROOT).parts) for path in folders} <= set(packages)


def imports_of(notebook: Path) -> set[tuple[str, str]]:
    """Return (module, name) of everything that a notebook imports from the package."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    code = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code")
    code = re.sub(r"^\s*[%!].*$", "", code, flags=re.MULTILINE)
    return {
        (node.module, alias.name)
        for node in ast.walk(ast.parse(code))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("grath_utils")
        for alias in node.names
    }


NOTEBOOKS = sorted((ROOT / "notebooks").rglob("*.ipynb"))


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_notebook_imports_what_the_rooms_offer(notebook: Path) -> None:
    for module, name in imports_of(notebook):
        assert module.count(".") <= 1, f"{notebook.name}: import {name} from its room"
        found = hasattr(importlib.import_module(module), name)
        assert found or importlib.util.find_spec(f"{module}.{name}"), f"no {name} in {module}"


LIGHT = ["grath_utils", "grath_utils.cli.commands", "grath_utils.config", "grath_utils.pairs"]


@pytest.mark.parametrize("module", LIGHT)
def test_light_modules_do_not_load_torch(module: str) -> None:
    code = f"import sys, {module}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "False", done.stderr


def test_importing_the_loop_says_nothing() -> None:
    """A library's notice would stand at the top of every notebook and command."""
    code = "import grath_utils.loop.stages"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (done.stdout, done.stderr, done.returncode) == ("", "", 0)


def tracked_text_files() -> list[Path]:
    done = subprocess.run(["git", "ls-files", "-z"], capture_output=True, text=True, cwd=ROOT)
    if done.returncode != 0:
        pytest.skip("not a git checkout")
    suffixes = {".py", ".ipynb", ".md", ".yml", ".yaml", ".toml", ".txt", ".jsonl", ".cff", ""}
    return [
        ROOT / name for name in done.stdout.split("\0") if name and Path(name).suffix in suffixes
    ]


def test_no_absolute_path_of_a_machine_is_in_the_repository() -> None:
    pattern = re.compile(r"(?<![\w.])/(home|Users|root|work)/\w+")
    for path in tracked_text_files():
        if path.is_file():
            found = pattern.search(path.read_text(encoding="utf-8", errors="replace"))
            assert not found, f"{path.relative_to(ROOT)} holds {found.group()}"


def test_nothing_at_the_top_that_the_layout_does_not_have() -> None:
    allowed = {
        "notebooks", "grath_utils", "data", "tests", "environment.yml", "README.md",
        "pyproject.toml", "requirements.txt", "requirements-dev.txt", "Makefile", "LICENSE",
        "requirements-book.txt", "CHANGELOG.md", ".devcontainer",
        "CITATION.cff", "CONTRIBUTING.md", "requirements.lock", ".ci", ".github", ".gitignore",
    }  # fmt: skip
    top = {path.relative_to(ROOT).parts[0] for path in tracked_text_files()}
    assert top <= allowed, f"not in the layout: {sorted(top - allowed)}"
