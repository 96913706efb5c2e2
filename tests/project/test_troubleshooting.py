"""The pages of help quote what the program says, name tests that exist, and lead to the terms."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from prose import ROOT, anchors, markdown_pages

from grath_utils.config import ModelConfig, load_config
from grath_utils.engine.models import resolve
from grath_utils.errors import RunError, UsageError
from grath_utils.loop.run_dir import load_run, lock_run, open_run, record_made

NOTEBOOKS = ROOT / "notebooks"
HELP = (NOTEBOOKS / "TROUBLESHOOTING.md").read_text(encoding="utf-8")
ENTRIES = {part.splitlines()[0]: part for part in re.split(r"^### ", HELP, flags=re.MULTILINE)[1:]}
QUOTED = re.findall(r"^```text\n(.*?)\n```$", HELP, re.MULTILINE | re.DOTALL)
VARIES = "…"


def messages() -> str:
    """Return every text of the package's code, with a mark where a value is filled in."""
    found = []
    for path in sorted((ROOT / "grath_utils").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = (
                    part.value if isinstance(part, ast.Constant) else VARIES for part in node.values
                )
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


MESSAGES = messages()


@pytest.mark.parametrize("quoted", QUOTED)
def test_quoted_messages_are_what_the_program_says(quoted: str) -> None:
    pieces = [piece.strip() for piece in quoted.split(VARIES)]
    missing = [piece for piece in pieces if piece and piece not in MESSAGES]
    assert not missing, f"the program says no such thing: {missing}"
    assert max(map(len, pieces)) > 8, "too little to be recognised by"


@pytest.mark.parametrize("title", ENTRIES)
def test_every_entry_is_tested_or_dated(title: str) -> None:
    text = " ".join(ENTRIES[title].split())
    assert re.search(r"\*Tested: `tests/\w+/test_|Checked 20\d\d-\d\d", text), (
        f"{title}: how is it known?"
    )
    for name, _, test in re.findall(r"(tests/\w+/test_\w+\.py)(::(\w+))?", text):
        path = ROOT / name
        assert path.is_file(), f"{title}: {path.name}"
        source = path.read_text(encoding="utf-8")
        assert not test or f"def {test}(" in source, f"{title}: {path.name} has no {test}"


def test_the_checks_can_fail() -> None:
    assert "is in use by another process; wait" in MESSAGES
    assert "is in use by another process; go away" not in MESSAGES


# --- errors that no other test brings about ------------------------------------------------------


def said_in_help(error: BaseException) -> bool:
    """Return True if the page quotes what an error says."""
    return any(
        all(piece.strip() in str(error) for piece in quoted.split(VARIES)) for quoted in QUOTED
    )


def test_a_run_directory_that_is_in_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = open_run(tmp_path / "run", load_config("smoke"))
    code = (
        "import sys; from grath_utils.loop.run_dir import load_run, lock_run\n"
        "with lock_run(load_run(sys.argv[1])):\n"
        "    print('held', flush=True); sys.stdin.readline()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(run.path)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
    ) as other:  # fmt: skip
        assert other.stdout is not None
        assert other.stdout.readline().strip() == "held"
        with pytest.raises(RunError) as caught, lock_run(run):
            pass
        other.communicate("\n")
    assert said_in_help(caught.value)
    with lock_run(run):  # it went with its process
        pass


def test_a_file_that_was_changed_by_hand(tmp_path: Path) -> None:
    run = open_run(tmp_path / "run", load_config("smoke"))
    run.iteration(0).mkdir()
    run.pairs(0).write_text("{}\n")
    record_made(run, run.pairs(0))
    load_run(run.path)
    run.pairs(0).write_text("")
    with pytest.raises(RunError) as caught:
        load_run(run.path)
    assert said_in_help(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there() -> None:
    with pytest.raises(UsageError) as caught:
        resolve(ModelConfig(device="cuda"))
    assert said_in_help(caught.value)


def test_a_kernel_can_be_made_known_by_hand(tmp_path: Path) -> None:
    command = re.search(r"-m (ipykernel install) --user (--name grath .*)", HELP)
    assert command
    subprocess.run(
        [
            sys.executable,
            "-m",
            "ipykernel",
            "install",
            "--prefix",
            str(tmp_path),
            "--name",
            "grath",
        ],
        check=True,
        capture_output=True,
    )
    spec = tmp_path / "share" / "jupyter" / "kernels" / "grath" / "kernel.json"
    assert sys.executable in spec.read_text(encoding="utf-8")


# --- the glossary --------------------------------------------------------------------------------


GLOSSARY = NOTEBOOKS / "GLOSSARY.md"


def terms() -> dict[str, str]:
    """Return the glossary's entries: the term, and what is said of it."""
    if not GLOSSARY.is_file():
        return {}
    text = GLOSSARY.read_text(encoding="utf-8")
    return dict(re.findall(r"^\*\*(.+?)\*\*(.+?)(?=\n\n|\Z)", text, re.MULTILINE | re.DOTALL))


def section(path: Path, anchor: str) -> str:
    """Return the prose of the second-level section of a notebook that has a heading."""
    (page,) = (page for page in markdown_pages() if page.path == path)
    parts = re.split(r"^(?=## )", page.text, flags=re.MULTILINE)
    for part in parts:
        slugs = [
            re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
            for heading in re.findall(r"^#{1,4} +(.+)$", part, re.MULTILINE)
        ]
        if anchor in slugs:
            return part
    raise AssertionError(f"{path.name} has no section {anchor}")


@pytest.mark.parametrize("term", terms())
def test_every_term_leads_to_a_section_that_uses_it(term: str) -> None:
    said = terms()[term]
    targets = re.findall(r"\]\(([^)#]+)#([^)]+)\)", said)
    assert targets, f"{term}: no link"
    for name, anchor in targets:
        path = (NOTEBOOKS / name).resolve()
        assert anchor in anchors(path)
        text = section(path, anchor).lower()
        words = [word.strip().lower() for word in re.split(r"[,()/]", term) if word.strip()]
        assert any(word in text for word in words), f"{term} is not in {name}#{anchor}"


def test_the_glossary_is_in_order() -> None:
    names = [term.lower() for term in terms()]
    assert names == sorted(names)
