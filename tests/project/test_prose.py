"""Spelling of what readers read, in one variety of English, and commands that exist."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from prose import ROOT, Page, markdown_pages, python_prose, without_code

from grath_utils.cli.commands import build_parser, command_parsers

codespell = pytest.importorskip("codespell_lib")

PAGES = markdown_pages()
CODE = sorted([*(ROOT / "grath_utils").rglob("*.py"), ROOT / "notebooks" / "book" / "conf.py"])


def misspelt(texts: dict[str, str], folder: Path, *options: str) -> list[str]:
    """Return codespell's findings as ``file: word ==> better``."""
    for name, text in texts.items():
        (folder / f"{name.replace('/', '__')}.txt").write_text(text, encoding="utf-8")
    # Words to leave alone are in pyproject.toml.
    done = subprocess.run(
        [sys.executable, "-m", "codespell_lib", *options, str(folder)],
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert not done.stderr, done.stderr
    return [line.removeprefix(str(folder)) for line in done.stdout.splitlines()]


def test_spelling_of_pages_notebooks_docstrings_and_comments(tmp_path: Path) -> None:
    texts = {page.name: without_code(page.text) for page in PAGES}
    texts |= {path.relative_to(ROOT).as_posix(): python_prose(path) for path in CODE}
    found = misspelt(texts, tmp_path, "--builtin", "clear,rare")
    assert not found, "\n".join(found)


def test_the_checker_finds_mistakes(tmp_path: Path) -> None:
    found = misspelt({"page": "Teh model recieves a prompt."}, tmp_path, "--builtin", "clear,rare")
    assert len(found) == 2


def american_words() -> dict[str, str]:
    """Return American -> British spellings, from codespell's own list of the opposite."""
    folder = Path(codespell.__file__).parent / "data"
    lines = (folder / "dictionary_en-GB_to_en-US.txt").read_text(encoding="utf-8").splitlines()
    pairs = (line.split("->") for line in lines if "," not in line)
    # The same word in both, as a term of art, or where British English has either.
    both = {"story", "stories", "storied", "biased", "biasing", "unbiased", "program", "programs",
            "license", "licenses", "licensed", "math", "disk", "disks"}  # fmt: skip
    return {us: gb for gb, us in pairs if us not in both}


def test_one_variety_of_english() -> None:
    words = american_words()
    assert {"color", "optimizer", "center"} <= words.keys()
    found = []
    for page in PAGES:
        # Quotations keep the spelling of what they quote.
        text = re.sub(r'"[^"\n]*"|\*[^*\n]*\?\*', "", without_code(page.text))
        for word in re.findall(r"[A-Za-z]+", text):
            if word.lower() in words:
                found.append(f"{page.name}: {word} ==> {words[word.lower()]}")
    assert not found, "\n".join(found)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_formulas_have_no_doubled_backslash(page: Page) -> None:
    """A doubled one breaks the line, and shows the name of a letter instead of the letter."""
    formulas = re.findall(r"\$[^$`]+\$", without_code(page.text))
    assert not [f for f in formulas if re.search(r"\\\\[a-zA-Z]", f)]


def commands() -> set[str]:
    """Return the names of the command line's commands."""
    return set(command_parsers(build_parser()))


def targets() -> set[str]:
    """Return the names of what ``make`` makes."""
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_that_pages_name_exist(page: Page) -> None:
    known, made = commands(), targets()
    assert "python -m grath_utils " not in page.text, f"{page.name}: it is called grath"
    for command in re.findall(r"(?:^|`|\\)grath ([a-z]+)", page.text, re.MULTILINE):
        assert command in known, f"{page.name}: grath {command}"
    for target in re.findall(r"(?:^|`)make ([a-z-]+)", page.text, re.MULTILINE):
        assert target in made, f"{page.name}: make {target}"


def test_contributors_find_every_command() -> None:
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    names = [f"make {name}" for name in targets()] + [f"grath {name}" for name in commands()]
    assert not [name for name in names if f"| `{name}`" not in page and f"` `{name}`" not in page]


def test_pages_name_the_pythons_that_the_project_allows() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    first, below = re.findall(r"3\.(\d+)", project["requires-python"])
    text = "\n".join(page.text for page in PAGES)
    spans = re.findall(r"Python 3\.(\d+) (to 3\.(\d+)|(?:and|or) newer)", text)
    assert len(spans) >= 5
    assert {(begin, end) for begin, _, end in spans} == {(first, str(int(below) - 1))}
