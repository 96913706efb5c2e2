"""The notebooks in a real browser: JupyterLab in headless Chromium, driven by Playwright.

Where there is no browser these tests are skipped. Photographs of every notebook are kept in
``build/browser`` (or the folder that ``GRATH_BROWSER_SHOTS`` names), to be looked at.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import nbformat
import pytest
from helpers import DPO, LORA, PAIRS
from lab import ERROR, HEIGHT, ROOT, WIDTH, Lab, Tab, find_browser, open_tab, serve

from grath_utils.config import ModelConfig
from grath_utils.course.notebooks import numbered_notebooks
from grath_utils.dpo.round import train_round
from grath_utils.files import read_jsonl
from grath_utils.loop.run_dir import Run

if TYPE_CHECKING:
    from playwright.sync_api import Browser

CHROMIUM = find_browser()
SHOTS = Path(os.environ.get("GRATH_BROWSER_SHOTS") or ROOT / "build" / "browser")
LIMIT = 300  # seconds for one notebook in the smoke profile, on a slow machine

pytestmark = [
    pytest.mark.model,
    pytest.mark.notebook,
    pytest.mark.skipif(
        CHROMIUM is None,
        reason="no Chromium here (Debian: the package chromium; or name one in GRATH_BROWSER)",
    ),
]


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with serve(tmp_path_factory.mktemp("browser") / "lab") as server:
        yield server


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    with sync_api.sync_playwright() as playwright:
        # Chromium's own sandbox does not work for root and in most containers; the pages are ours.
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"]
        )
        yield browser
        browser.close()


def cells_of(name: str) -> list[nbformat.NotebookNode]:
    cells = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4).cells
    return [cell for cell in cells if cell.cell_type == "code"]


def check_looks(tab: Tab) -> None:
    """Hold what can be held without eyes: nothing failed, sticks out, or did not load."""
    assert tab.page.locator(ERROR).all_inner_texts() == []
    assert not tab.too_wide()
    assert not tab.broken_pictures()
    assert not tab.faults, "errors of the page's own scripts"


def test_run_all_of_the_first_notebook(lab: Lab, browser: Browser, tmp_path: Path) -> None:
    parameters = {"PROFILE": "smoke", "RUN_DIR": str(tmp_path / "run")}
    name = lab.add(ROOT / "notebooks" / "00_start_here.ipynb", parameters)
    with open_tab(browser, lab, name) as tab:
        assert tab.page.locator(".jp-OutputArea-output").count() == 0
        tab.run_all(LIMIT)
        tab.photograph(SHOTS)
        check_looks(tab)
        # What the reader sees: figures, tables, and the run's own words.
        assert tab.page.locator(".jp-RenderedImage img").count() >= 2
        assert tab.page.locator(".jp-OutputArea-output table").count() >= 5
        text = "\n".join(tab.page.locator(".jp-OutputArea-output").all_inner_texts())
        assert "profile smoke, seed 0" in text
        assert "million parameters on" in text
        assert text.count("-> MC1 = ") == 3
        saved = tab.saved()
    code = [cell for cell in saved.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [out for cell in code for out in cell.outputs]
    assert not [out for out in outputs if out.output_type == "error" or out.get("name") == "stderr"]
    assert (tmp_path / "run" / "questions.jsonl").is_file()


def test_hints_are_folded_until_asked_for(lab: Lab, browser: Browser) -> None:
    name = lab.add(ROOT / "notebooks" / "00_start_here.ipynb")
    with open_tab(browser, lab, name) as tab:
        hints = tab.page.locator(".jp-Notebook details")
        assert hints.count() == 3
        body = hints.first.locator("p")
        assert not body.first.is_visible()
        hints.first.locator("summary").click()
        assert body.first.is_visible()


def test_controls_redraw_in_place(lab: Lab, browser: Browser, tmp_path: Path) -> None:
    """The cells of notebooks 1 and 2 as they are; around them only what they need."""
    expect = pytest.importorskip("playwright.sync_api").expect
    needs = (
        "from grath_utils.figures import plots\nfrom grath_utils.pairs.generate import Pair\n"
        "plots.use_style()\nbeta, rejects = 0.1, []\n"
        'names = ("sun", "moon")\n'
        'train = [Pair(n, f"What is the {n}?", f"A {n}.", "A lamp.", 0) for n in names]'
    )
    cells = {c.id: c for n in ("01_pair_generation", "02_qlora_dpo") for c in cells_of(n)}
    parameters = cells["parameters"]
    notebook = nbformat.v4.new_notebook(
        cells=[parameters, nbformat.v4.new_code_cell(needs), cells["drag-loss"], cells["samples"]],
        metadata={"kernelspec": {"name": "python3", "display_name": "", "language": "python"}},
    )
    nbformat.write(notebook, tmp_path / "controls.ipynb")
    with open_tab(browser, lab, lab.add(tmp_path / "controls.ipynb", {})) as tab:
        tab.run_all(LIMIT)
        cell = tab.page.locator(".jp-CodeCell", has_text="explore_dpo_loss")
        picture, handles = cell.locator(".jp-RenderedImage img"), cell.locator(".noUi-handle")
        expect(handles).to_have_count(2, timeout=30_000)
        before = picture.get_attribute("src")
        assert before
        handles.first.press("ArrowRight")
        expect(picture).not_to_have_attribute("src", before, timeout=30_000)
        assert picture.count() == 1, "drawn again, not once more"
        cell = tab.page.locator(".jp-CodeCell", has_text="browse_pairs")
        rows = cell.locator("tbody tr")
        expect(rows).to_have_count(2)
        box = cell.get_by_placeholder("any")
        box.fill("moon")
        box.press("Enter")
        expect(rows).to_have_count(1, timeout=30_000)
        check_looks(tab)
        tab.photograph(SHOTS)


def test_tensorboard_s_page_shows_the_curves_of_a_round(
    browser: Browser, tiny_llama: Path, tmp_path: Path
) -> None:
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed")
    expect = pytest.importorskip("playwright.sync_api").expect
    base = ModelConfig(name=str(tiny_llama), dtype="float32", device="cpu")
    dpo = replace(DPO, report_to=("tensorboard",))
    settings = {"dpo": dpo, "lora": LORA, "progress": False}
    train_round(base, PAIRS[:4], PAIRS[4:], tmp_path, seed=0, previous=None, **settings)
    command = [sys.executable, "-m", "tensorboard.main", "--host=127.0.0.1", "--port=0"]
    command += [f"--logdir={tmp_path}", "--load_fast=false"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        address = next(
            found[0]
            for line in process.stderr
            if (found := re.search(r"http://127\.0\.0\.1:\d+/", line))
        )
        page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT})
        page.goto(f"{address}#timeseries")
        box = page.get_by_role("combobox", name="Filter tags (regex)")
        box.wait_for(timeout=60_000)
        rows = read_jsonl(tmp_path / "training_log.jsonl")
        for tag, split, key in (("train/loss", "train", "loss"), ("eval/loss", "held_out", "loss")):
            last = [row for row in rows if row["split"] == split][-1]
            box.fill(tag)
            card = page.locator("metrics-filtered-view scalar-card")
            expect(card).to_have_count(1, timeout=20_000)
            expect(card.locator(".tag")).to_have_attribute("title", tag)
            # Below a curve: the last value, as TensorBoard rounds it, and its step.
            expect(card).to_contain_text(f"{last[key]:.4f}".rstrip("0"), timeout=20_000)
            expect(card).to_contain_text(re.compile(rf"\b{last['step']}\b"))
            expect(card.locator("line-chart .series-view")).to_be_visible()
        SHOTS.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=SHOTS / "tensorboard.png")
        page.close()
    finally:
        process.terminate()
        process.wait(timeout=30)


def test_asking_both_models_as_a_person_does(
    smoke: tuple[Run, str], lab: Lab, browser: Browser, tmp_path: Path
) -> None:
    expect = pytest.importorskip("playwright.sync_api").expect
    code = (
        "from grath_utils.course import widgets\nfrom grath_utils.loop.run_dir import load_run\n"
        f"run = load_run({str(smoke[0].path)!r})\n"
        'widgets.ask_side_by_side(run, ["Is ice cold?"], max_new_tokens=5)'
    )
    notebook = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(code)],
        metadata={"kernelspec": {"name": "python3", "display_name": "", "language": "python"}},
    )
    nbformat.write(notebook, tmp_path / "ask.ipynb")
    with open_tab(browser, lab, lab.add(tmp_path / "ask.ipynb", {})) as tab:
        tab.run_all(LIMIT)
        rows, button = tab.page.locator("tbody tr"), tab.page.get_by_role("button", name="Ask both")
        expect(rows).to_have_count(1, timeout=30_000)
        button.click()
        expect(tab.page.get_by_text("Write a question first.")).to_be_visible(timeout=30_000)
        assert rows.count() == 1
        tab.page.get_by_placeholder("Your question?").press_sequentially("What is the Sun?")
        button.click()
        expect(rows).to_have_count(2, timeout=60_000)
        question, *answers = rows.first.locator("td").all_inner_texts()
        assert question == "What is the Sun?"
        assert len(answers) == 2
        assert all(answer.strip() for answer in answers)
        expect(button).to_be_enabled()
        expect(tab.page.get_by_text("answering ...")).to_have_count(0)
        check_looks(tab)
        tab.photograph(SHOTS)


@pytest.mark.parametrize("path", numbered_notebooks(), ids=lambda path: path.stem)
def test_executed_notebooks_look_right(
    smoke: tuple[Run, str], lab: Lab, browser: Browser, path: Path
) -> None:
    executed = smoke[0].executed_notebooks / path.name
    if not executed.is_file():
        pytest.skip(f"{path.name} is not among the notebooks that a run executes")
    with open_tab(browser, lab, lab.add(executed)) as tab:
        tab.photograph(SHOTS / "executed")
        check_looks(tab)
        assert tab.page.locator(".jp-RenderedImage img").count() >= 1
