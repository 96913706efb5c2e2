"""The HTML book: every page is in it, can be found, and links to pages and places that exist."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from urllib.parse import unquote

import pytest

pytest.importorskip("myst_nb")

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = ROOT / "notebooks"
PAGES = sorted(
    path.relative_to(ROOT).with_suffix("").as_posix()
    for path in [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        ROOT / "data" / "README.md",
        *NOTEBOOKS.glob("*.md"),
        *NOTEBOOKS.glob("*.ipynb"),
        *NOTEBOOKS.glob("appendix/*.ipynb"),
        *NOTEBOOKS.glob("solutions/*.ipynb"),
    ]
)


@pytest.fixture(scope="module")
def book(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The book as `make book` builds it; a warning (a broken link, say) fails."""
    folder = tmp_path_factory.mktemp("book")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going"]
    command += ["-c", NOTEBOOKS / "book", "-d", folder / "doctrees", ROOT, folder / "html"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "html"


@pytest.fixture(scope="module")
def conf() -> ModuleType:
    """The book's configuration as a module (it is no part of a package)."""
    import importlib.util

    spec = importlib.util.spec_from_file_location("book_conf", NOTEBOOKS / "book" / "conf.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Page(HTMLParser):
    """Collect where a page links to, what it loads, and which places in it have a name."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.names: set[str] = set()
        self.navigation: list[str] = []
        self.depth = 0  # inside the navigation
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        self.names |= {found[key] for key in ("id", "name") if key in found}
        if tag == "nav" and "bd-links" in found.get("class", ""):
            self.depth = 1
        if tag == "a" and "href" in found:
            self.links.append(found["href"])
            if self.depth:
                self.navigation.append(found["href"])
        if tag in ("script", "img") and "src" in found:
            self.loaded.append(found["src"])
        if tag == "link" and found.get("rel") == "stylesheet":
            self.loaded.append(found["href"])

    def handle_endtag(self, tag: str) -> None:
        if tag == "nav":
            self.depth = 0


def pages(book: Path) -> Iterator[tuple[Path, Page]]:
    for path in book.rglob("*.html"):
        if "_static" not in path.parts:
            yield path, Page(path)


def test_every_page_is_in_the_book_and_in_the_navigation(book: Path) -> None:
    for page in PAGES:
        assert (book / f"{page}.html").is_file(), page
    listed = {link.split("#")[0] for link in Page(book / "index.html").navigation}
    assert {f"{page}.html" for page in PAGES if page != "README"} <= listed


def test_every_page_can_be_found(book: Path) -> None:
    text = (book / "searchindex.js").read_text(encoding="utf-8")
    index = json.loads(re.fullmatch(r"Search\.setIndex\((.*)\)", text, re.DOTALL)[1])
    assert sorted(index["docnames"]) == PAGES
    found = index["terms"]["bradley"]  # Bradley and Terry's model
    names = [index["docnames"][i] for i in ([found] if isinstance(found, int) else found)]
    assert "notebooks/02_qlora_dpo" in names


def test_links_inside_the_book_lead_somewhere(book: Path) -> None:
    names = {path: page.names for path, page in pages(book)}
    for path, page in pages(book):
        for link in [*page.links, *page.loaded]:
            if re.match(r"[a-z]+:|//", link) or link == "#":
                continue
            place, _, name = unquote(link.split("?")[0]).partition("#")
            target = (path.parent / place).resolve() if place else path
            assert target.exists(), f"{path.name} links to {link}"
            if name and target.suffix == ".html":
                assert name in names[target], f"{path.name} links to {link}"


def test_the_book_reads_without_network(book: Path) -> None:
    for path, page in pages(book):
        elsewhere = [link for link in page.loaded if re.match(r"https?:|//", link)]
        assert not elsewhere, f"{path.name} loads {elsewhere}"


def test_formulas_are_there(book: Path) -> None:
    text = (book / "notebooks" / "02_qlora_dpo.html").read_text(encoding="utf-8")
    assert text.count("<math ") > 10
    assert "\\frac" not in re.sub(r"<(script|style).*?</\1>", "", text, flags=re.DOTALL)


def test_links_to_files_outside_the_book_lead_to_the_repository(conf: ModuleType) -> None:
    assert (
        conf.links_that_lead_out("[x](LICENSE#a)", "")
        == f"[x]({conf.REPOSITORY}/blob/main/LICENSE#a)"
    )
    assert (
        conf.links_that_lead_out("[x](../data)", "notebooks")
        == f"[x]({conf.REPOSITORY}/tree/main/data)"
    )
    for kept in ("[x](https://a.b)", "[x](#here)", "[x](README.md)", "[x](no_such_file.py)"):
        assert conf.links_that_lead_out(kept, "") == kept


def test_badges_are_left_out_and_other_pictures_stay(conf: ModuleType) -> None:
    badge = "[![Open in Colab](https://a.b/c.svg)](https://a.b/d)"
    picture = "![The loop](images/loop.png)"
    assert conf.without_badges(f"# A\n\n{badge}\n{badge}\n\n{picture}\n") == f"# A\n\n\n{picture}\n"
    assert conf.without_badges(badge) == ""


def test_a_stamp_becomes_a_line_for_readers(conf: ModuleType) -> None:
    stamp = {
        "profile": "cpu",
        "cost": {"seconds": 61.4, "peak_memory_gib": 2.25, "stages": [], "date": "2026-01-02"},
        "device": {"cpu_count": 2, "accelerator": "none"},
        "versions": {"torch": "2.9"},
    }
    line = conf.origin(stamp)
    assert (
        line
        == "*Outputs of the `cpu` profile, 2026-01-02: 61 s, 2.2 GiB on 2 CPU cores, torch 2.9.*"
    )
    assert "one execution" in conf.origin({**stamp, "profile": None})


def test_a_figure_has_its_caption_as_alt_text(conf: ModuleType) -> None:
    shown = {"output_type": "display_data", "data": {"image/png": ""}, "metadata": {}}
    code = {"cell_type": "code", "metadata": {}, "outputs": [shown], "source": ""}
    caption = {"cell_type": "markdown", "metadata": {}, "source": "*The loss*\n\nAnd **more**."}
    other = {"cell_type": "markdown", "metadata": {}, "source": "**No** caption."}
    bare = {**code, "metadata": {}}
    conf.describe_figures([code, caption, bare, other])
    assert code["metadata"] == {"mystnb": {"image": {"alt": "The loss"}}}
    assert bare["metadata"] == {}
