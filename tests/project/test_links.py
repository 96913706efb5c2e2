"""Links: those inside the repository lead to files and headings that exist, the others are sound.

Nothing is asked of the network.
"""

from __future__ import annotations

import re
import tomllib
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
from prose import ROOT, Page, anchors, markdown_pages

PAGES = markdown_pages()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
REPOSITORY = PROJECT["urls"]["Repository"]
OWNER = urlsplit(REPOSITORY).path.strip("/").split("/")[0]

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def without_blocks(text: str) -> str:
    return re.sub(r"`[^`\n]*`", "", re.sub(r"```.*?```", "", text, flags=re.DOTALL))


def links(page: Page) -> list[str]:
    """Return the targets of a page's Markdown and HTML links and pictures."""
    text = without_blocks(page.text)
    found = re.findall(r"\]\(([^)\s]+)(?:\s+\"[^\"]*\")?\)", text)
    return found + re.findall(r"(?:href|src)=[\"']([^\"']+)[\"']", text)


def addresses(page: Page) -> set[str]:
    """Return every address that a page names, also outside of links and in code."""
    return {found.rstrip(".,;:*") for found in re.findall(r"https?://[^\s<>\"'`)\]]+", page.text)}


@each_page
def test_links_inside_the_repository_lead_somewhere(page: Page) -> None:
    for link in links(page):
        if re.match(r"https?:|mailto:|attachment:|data:", link):
            continue
        place, _, anchor = unquote(link).partition("#")
        target = (page.path.parent / place).resolve() if place else page.path
        assert target.exists(), f"{page.name} links to {link}"
        assert target.is_relative_to(ROOT), f"{page.name} links out of the repository: {link}"
        if anchor and target.suffix in (".md", ".ipynb"):
            assert anchor in anchors(target), f"{page.name} links to {link}: no such heading"


@each_page
def test_addresses_are_well_formed_and_secure(page: Page) -> None:
    for address in addresses(page):
        parts = urlsplit(address)
        if parts.hostname in ("localhost", "127.0.0.1"):
            continue
        assert parts.scheme == "https", f"{page.name}: {address}"
        assert re.fullmatch(r"([a-z0-9-]+\.)+[a-z]{2,}", parts.hostname or ""), address
        assert not parts.username, address
        if parts.hostname == "arxiv.org":
            assert re.fullmatch(r"/(abs|pdf)/\d{4}\.\d{4,5}(v\d+)?", parts.path), address


@each_page
def test_own_addresses_are_those_of_the_one_repository(page: Page) -> None:
    for address in addresses(page):
        whole = address
        if "kaggle.com/kernels/welcome" in address:
            (address,) = parse_qs(urlsplit(address).query)["src"]
        colab = "https://colab.research.google.com/github/"
        address = address.replace(colab, "https://github.com/")
        address = address.replace(f"https://{OWNER}.github.io/", f"https://github.com/{OWNER}/")
        if whole != address or urlsplit(address).path.startswith(f"/{OWNER}/"):
            assert re.match(rf"{re.escape(REPOSITORY)}(/|\.git$|$)", address), (
                f"{page.name}: {whole}"
            )
            found = re.match(r".*/(?:blob|tree)/main/([^#?]+)", address)
            assert not found or (ROOT / found[1]).exists(), f"{page.name}: {whole}"


@each_page
def test_pictures_have_a_text_for_those_who_do_not_see_them(page: Page) -> None:
    text = without_blocks(page.text)
    for alt, target in re.findall(r"!\[([^]]*)\]\(([^)\s]+)", text):
        assert len(alt) >= 8, f"{page.name}: {target} has no alt text"
    for tag in re.findall(r"<img[^>]*>", text):
        assert re.search(r"alt=[\"'][^\"']{8,}", tag), f"{page.name}: {tag}"


def test_the_citation_names_the_same_repository() -> None:
    assert REPOSITORY in (ROOT / "CITATION.cff").read_text(encoding="utf-8")


def test_headings_become_the_anchors_that_github_makes() -> None:
    assert "set-up-in-detail" in anchors(ROOT / "notebooks" / "RUNNING.md")
    assert "1--the-idea-in-one-picture" in anchors(ROOT / "notebooks" / "00_start_here.ipynb")
