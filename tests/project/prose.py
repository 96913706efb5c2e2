"""What readers read: the Markdown of pages and notebooks, and the words of docstrings."""

from __future__ import annotations

import ast
import io
import json
import re
import tokenize
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Page:
    """A page of Markdown, and the file that it stands in."""

    path: Path
    text: str

    @property
    def name(self) -> str:
        return self.path.relative_to(ROOT).as_posix()


def markdown_pages() -> list[Page]:
    """Return every Markdown page and notebook of the repository, notebooks' prose only."""
    plain = [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *(ROOT / "data").glob("*.md"),
        *(ROOT / "notebooks").rglob("*.md"),
    ]
    pages = [Page(path, path.read_text(encoding="utf-8")) for path in sorted(plain)]
    for path in sorted((ROOT / "notebooks").rglob("*.ipynb")):
        if ".ipynb_checkpoints" in path.parts:
            continue
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        prose = ["".join(c["source"]) for c in cells if c["cell_type"] == "markdown"]
        pages.append(Page(path, "\n\n".join(prose)))
    return pages


def python_prose(path: Path) -> str:
    """Return the docstrings and comments of a Python file."""
    source = path.read_text(encoding="utf-8")
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = [
        ast.get_docstring(node) or ""
        for node in ast.walk(ast.parse(source))
        if isinstance(node, documented)
    ]
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    found += [token.string for token in tokens if token.type == tokenize.COMMENT]
    return "\n".join(found)


def without_code(text: str) -> str:
    """Leave code blocks, code spans, formulas and addresses out of Markdown."""
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    text = re.sub(r"\$\$.*?\$\$|\$[^$\n]+\$", "", text, flags=re.DOTALL)
    text = re.sub(r"`[^`\n]*`", "", text)
    return re.sub(r"\]\([^)]*\)|https?://\S+", "] ", text)


def anchors(path: Path) -> set[str]:
    """Return the anchors that GitHub gives a page's headings."""
    (page,) = (page for page in markdown_pages() if page.path == path)
    found: dict[str, int] = {}
    names = set()
    text = re.sub(r"```.*?```", "", page.text, flags=re.DOTALL)
    for heading in re.findall(r"^#{1,6} +(.+?) *#*$", text, re.MULTILINE):
        plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        count = found.get(slug, 0)
        found[slug] = count + 1
        names.add(f"{slug}-{count}" if count else slug)
    return names | set(re.findall(r"<a (?:id|name)=\"([^\"]+)\"", page.text))
