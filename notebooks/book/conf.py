"""The course as an HTML book: ``make book`` builds it in ``build/book`` (open ``index.html``).

Sphinx reads the pages where they stand: README.md, the notebooks, the side trips, the solutions
and the other pages in ``notebooks/``. Nothing is executed: the book shows the outputs that the
notebooks are committed with. What GitHub does not need and a book does (a table of contents, links
out of the book, collapsed set-up cells) is added here while a page is read, never to the files.
Formulas become MathML, which browsers show by themselves, so that the book reads without network.
"""

from __future__ import annotations

import json
import posixpath
import re
import shutil
import tomllib
from pathlib import Path

import latex2mathml.converter
from docutils import nodes
from sphinx.application import Sphinx

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = ROOT / "notebooks"
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
REPOSITORY = PYPROJECT["project"]["urls"]["Repository"]
VERSION = PYPROJECT["tool"]["grath"]["version"]

project = "GRATH in notebooks"
author = "the GRATH tutorial authors"
root_doc = "README"
language = "en"
extensions = ["myst_nb"]
include_patterns = [
    "README.md",
    "CONTRIBUTING.md",
    "data/README.md",
    "notebooks/**.md",
    "notebooks/**.ipynb",
]
exclude_patterns = ["**/.*", "build", "runs", ".venv", "tests", "grath_utils"]
# Notebooks begin with a title and continue at the third level, which reads well on GitHub.
suppress_warnings = ["myst.header"]

nb_execution_mode = "off"
nb_merge_streams = True
nb_code_prompt_show = "Show the set-up"
nb_code_prompt_hide = "Hide the set-up"
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 4

html_theme = "sphinx_book_theme"
html_title = project
html_math_renderer = "mathml"
html_copy_source = False
html_static_path = ["_static"]
html_css_files = ["book.css"]
html_theme_options = {
    "repository_url": REPOSITORY,
    "repository_branch": VERSION,
    "use_repository_button": True,
    "use_download_button": False,
    "launch_buttons": {"colab_url": "https://colab.research.google.com"},
    "show_navbar_depth": 1,
    "home_page_in_toc": True,
    "navbar_persistent": [],  # the search stands in the side bar
}

# Captions of the navigation, and which pages stand under them.
PARTS = (
    ("The course", ("notebooks/[0-9][0-9]*_*.ipynb",)),
    ("Side trips", ("notebooks/appendix/*.ipynb",)),
    ("Solutions", ("notebooks/solutions/*.ipynb",)),
    ("Results, help and teaching", ("notebooks/*.md", "data/README.md", "CONTRIBUTING.md")),
)


def table_of_contents() -> str:
    """Return the book's parts as MyST directives: every page there is, found by its place."""
    blocks = []
    for caption, patterns in PARTS:
        pages = [
            path.relative_to(ROOT).with_suffix("").as_posix()
            for pattern in patterns
            for path in sorted(ROOT.glob(pattern))
        ]
        if pages:
            listed = "\n".join(pages)
            blocks.append(f"```{{toctree}}\n:hidden:\n:caption: {caption}\n\n{listed}\n```")
    return "\n\n".join(blocks)


def links_that_lead_out(text: str, folder: str) -> str:
    """Let links to files that are no pages of the book lead to the repository.

    Args:
        text: Markdown.
        folder: of the page, relative to the repository's root.
    """

    def change(match: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(folder, match[1]))
        target = ROOT / path
        if target.suffix in (".md", ".ipynb", ".png", ".svg") or not target.exists():
            return match[0]  # a page or a picture; what does not exist is Sphinx's to report
        kind = "tree" if target.is_dir() else "blob"
        return f"]({REPOSITORY}/{kind}/{VERSION}/{path}{match[2] or ''})"

    return re.sub(r"\]\((?!https?:|#|mailto:)([^)#\s]+)(#[^)\s]*)?\)", change, text)


def without_badges(text: str) -> str:
    """Leave badges out: the book has a button for Colab, and shows no pictures from elsewhere."""
    return re.sub(r"^\[!\[.*\]\(https:.*\n?", "", text, flags=re.MULTILINE)


def origin(stamp: dict) -> str:
    """Return a line that says what the outputs of a notebook come from."""
    cost, device, profile = stamp["cost"], stamp["device"], stamp["profile"]
    by = f"the `{profile}` profile" if profile else "one execution"
    took = f"{cost['seconds']:.0f} s" if cost["seconds"] else "an unknown time"
    memory = f", {cost['peak_memory_gib']:.1f} GiB" if cost["peak_memory_gib"] else ""
    cores = f"{device['cpu_count']} CPU cores"
    where = cores if device["accelerator"] == "none" else f"{device['accelerator']}, {cores}"
    torch = stamp["versions"]["torch"]
    return f"*Outputs of {by}, {cost['date']}: {took}{memory} on {where}, torch {torch}.*"


def describe_figures(cells: list[dict]) -> None:
    """Give figures the caption below them (a paragraph in italics) as their alt text."""
    text = ""
    for cell in reversed(cells):
        shown = [kind for out in cell.get("outputs", []) for kind in out.get("data", {})]
        if cell["cell_type"] == "code":
            if text and "image/png" in shown:
                cell["metadata"]["mystnb"] = {"image": {"alt": text}}
            else:
                text = ""
        else:
            start = "".join(cell["source"])
            caption = re.match(r"\*([^*].*?[^*])\*(?:\n|$)", start, re.DOTALL)
            text = re.sub(r"[*`$]", "", caption[1]).replace("\n", " ") if caption else ""


def read_page(app: Sphinx, page: str, source: list[str]) -> None:
    """Turn a page as it stands in the repository into a page of the book."""
    folder = posixpath.dirname(page)
    if app.env.doc2path(page, base=False).suffix == ".md":
        source[0] = without_badges(links_that_lead_out(source[0], folder))
        if page == root_doc:
            source[0] += "\n\n" + table_of_contents() + "\n"
        return
    notebook = json.loads(source[0])
    for cell in notebook["cells"]:
        if cell["cell_type"] == "markdown":
            cell["source"] = links_that_lead_out("".join(cell["source"]), folder)
            cell["source"] = without_badges(cell["source"])
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    if code and "importlib.util.find_spec" in "".join(code[0]["source"]):
        # The same in every notebook, and of no use to a reader.
        code[0]["metadata"]["tags"] = ["hide-input"]
    describe_figures(notebook["cells"])
    stamp = notebook["metadata"].get("grath")
    if stamp:
        notebook["cells"][0]["source"] += f"\n\n{origin(stamp)}\n"
    source[0] = json.dumps(notebook)


def mathml(latex: str, display: str) -> str:
    """Return a formula as MathML; browsers put no space after the name of a function."""
    written = latex2mathml.converter.convert(latex, display=display)
    return re.sub(r"(<mi>(?:log|ln|exp|max|min)</mi>)", r'\1<mspace width="0.17em"/>', written)


def visit_math(translator, node: nodes.math) -> None:
    translator.body.append(mathml(node.astext(), "inline"))
    raise nodes.SkipNode


def visit_math_block(translator, node: nodes.math_block) -> None:
    # A formula that is wider than the page scrolls.
    style = "margin: 1em 0; overflow: auto hidden; text-align: center"
    formula = mathml(node.astext(), "block")
    translator.body.append(f'<div class="formula" style="{style}">{formula}</div>')
    raise nodes.SkipNode


def add_index(app: Sphinx, exception: Exception | None) -> None:
    """Give the front page the name that browsers and servers look for."""
    if exception is None and app.builder.format == "html":
        front = Path(app.outdir) / f"{root_doc}.html"
        shutil.copyfile(front, front.with_name("index.html"))


def setup(app: Sphinx) -> None:
    app.connect("source-read", read_page)
    app.connect("build-finished", add_index)
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_math_block, None))
