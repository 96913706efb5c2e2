"""JupyterLab in a headless browser: what the browser tests need to drive it.

Nothing of the user's own Jupyter set-up is read or written: settings, runtime files and notebooks
live in one folder.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.error import URLError
from urllib.request import urlopen

import nbformat

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

ROOT = Path(__file__).resolve().parents[2]
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
WIDTH, HEIGHT = 1280, 1400  # of the window, in pixels; a laptop's width
START_LIMIT = 120.0  # seconds for the server to answer
# The first code cell has a number, and none waits: all done, or one failed and the rest let go.
DONE = """() => {
    const prompts = [...document.querySelectorAll('.jp-Notebook .jp-CodeCell .jp-InputPrompt')]
        .map(prompt => prompt.innerText.trim());
    return /\\d/.test(prompts[0]) && !prompts.some(prompt => prompt.includes('*'));
}"""
# What JupyterLab shows in red: an exception, or anything written to stderr.
ERROR = ".jp-OutputArea-output[data-mime-type='application/vnd.jupyter.stderr']"


def find_browser() -> str | None:
    """Return the path of an installed Chromium (``GRATH_BROWSER`` first), or None."""
    names = (os.environ.get("GRATH_BROWSER", ""), *BROWSERS)
    return next((found for name in names if name and (found := shutil.which(name))), None)


# --- the server ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Lab:
    """A running JupyterLab server and the folder that it serves."""

    folder: Path
    url: str
    token: str

    def add(self, source: Path, parameters: Mapping[str, Any] | None = None) -> str:
        """Copy a notebook in; with parameters: without outputs, and with these for its own.

        Returns:
            The notebook's path below the served folder.
        """
        from papermill.iorw import load_notebook_node
        from papermill.parameterize import parameterize_notebook

        notebook = load_notebook_node(str(source))
        if parameters is not None:
            for cell in notebook.cells:
                if cell.cell_type == "code":
                    cell.outputs, cell.execution_count = [], None
            notebook = parameterize_notebook(notebook, dict(parameters), kernel_name="python3")
            notebook.metadata["kernelspec"] = {
                "name": "python3", "display_name": "Python 3", "language": "python"
            }  # fmt: skip
        nbformat.write(notebook, self.folder / source.name)
        return source.name


@contextmanager
def serve(folder: Path) -> Iterator[Lab]:
    """Start JupyterLab on a free port, with settings of its own; stop it at the end.

    Raises:
        RuntimeError: the server ended, or did not answer in time; with what it said.
    """
    served, config, log = folder / "notebooks", folder / "config", folder / "lab.log"
    served.mkdir(parents=True)
    write(config / "labconfig" / "page_config.json", {
        # Asks on the first start whether to fetch news: neither a question nor a network here.
        "disabledExtensions": {"@jupyterlab/apputils-extension:announcements": True},
    })  # fmt: skip
    tracker = folder / "settings" / "@jupyterlab" / "notebook-extension"
    # All cells are in the page, not only those in view.
    write(tracker / "tracker.jupyterlab-settings", {"windowingMode": "none"})
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "JUPYTER_CONFIG_DIR": str(config),
        "JUPYTER_RUNTIME_DIR": str(folder / "runtime"),
        "JUPYTER_DATA_DIR": str(folder / "data"),
        "JUPYTERLAB_SETTINGS_DIR": str(folder / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(folder / "workspaces"),
        "IPYTHONDIR": str(folder / "ipython"),
    }
    token = secrets.token_hex(16)
    command = [
        sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--port=0",
        "--ServerApp.ip=127.0.0.1", f"--ServerApp.root_dir={served}",
        f"--IdentityProvider.token={token}",
    ]  # fmt: skip
    with log.open("w", encoding="utf-8") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=environment, cwd=served)
    try:
        yield Lab(served, wait_for_server(folder / "runtime", token, process, log), token)
    finally:
        process.terminate()  # also ends the kernels
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()


def wait_for_server(runtime: Path, token: str, process: subprocess.Popen, log: Path) -> str:
    """Return the server's address once it answers."""
    end = time.monotonic() + START_LIMIT
    while time.monotonic() < end and process.poll() is None:
        for path in runtime.glob("jpserver-*.json"):
            try:
                url = json.loads(path.read_text(encoding="utf-8"))["url"]
                with urlopen(f"{url}api/status?token={token}", timeout=5):
                    return url
            except (ValueError, URLError, OSError):
                pass  # not written whole, or not listening yet
        time.sleep(0.2)
    raise RuntimeError(f"JupyterLab did not start:\n{log.read_text(encoding='utf-8')[-3000:]}")


def write(path: Path, value: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(value), encoding="utf-8")


# --- one notebook in the browser -----------------------------------------------------------------


@dataclass
class Tab:
    """A notebook that is open in the browser."""

    page: Page
    lab: Lab
    name: str
    faults: list[str] = field(default_factory=list)

    def run_all(self, limit: float) -> None:
        """Choose "Run All Cells" from the menu and wait until no cell is left, or one failed.

        Args:
            limit: seconds.
        """
        self.page.get_by_role("menuitem", name="Run", exact=True).click()
        self.page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
        self.page.wait_for_function(DONE, timeout=1000 * limit)

    def saved(self) -> nbformat.NotebookNode:
        """Save by the keyboard and return what the file then holds."""
        path = self.lab.folder / self.name
        before = path.stat().st_mtime_ns
        self.page.keyboard.press("Control+s")
        end = time.monotonic() + 30
        while path.stat().st_mtime_ns == before and time.monotonic() < end:
            self.page.wait_for_timeout(100)
        return nbformat.read(path, as_version=4)

    def photograph(self, folder: Path) -> list[Path]:
        """Photograph the notebook from top to bottom, a window at a time."""
        folder.mkdir(parents=True, exist_ok=True)
        stem = Path(self.name).stem
        for old in folder.glob(f"{stem}-*.png"):
            old.unlink()
        panel = self.page.locator(".jp-WindowedPanel-outer").last
        step, total = panel.evaluate(  # to the last cell; below it is room to scroll
            """panel => {
                const bottoms = [...panel.querySelectorAll('.jp-Cell')]
                    .map(cell => cell.getBoundingClientRect().bottom);
                const top = panel.getBoundingClientRect().top - panel.scrollTop;
                return [panel.clientHeight - 40, Math.max(...bottoms) - top];
            }"""
        )
        pictures = []
        for number in range(math.ceil(total / step)):
            panel.evaluate("(p, y) => p.scrollTo(0, y)", number * step)
            self.page.wait_for_timeout(150)
            pictures.append(folder / f"{stem}-{number:02}.png")
            panel.screenshot(path=pictures[-1])
        return pictures

    def too_wide(self) -> list[str]:
        """Return the beginnings of outputs and texts that stick out of their cell."""
        return self.page.evaluate(
            """() => [...document.querySelectorAll(
                '.jp-OutputArea-output, .jp-MarkdownOutput')]
                .filter(part => part.scrollWidth > part.clientWidth + 2)
                .map(part => part.innerText.slice(0, 80))"""
        )

    def broken_pictures(self) -> list[str]:
        """Return the sources of pictures that did not load, badges of other sites apart."""
        return self.page.evaluate(
            """() => [...document.querySelectorAll('.jp-Notebook img')]
                .filter(image => !/^https/.test(image.src))
                .filter(image => !image.complete || image.naturalWidth === 0)
                .map(image => image.src.slice(0, 120))"""
        )


@contextmanager
def open_tab(browser: Browser, lab: Lab, name: str) -> Iterator[Tab]:
    """Open a notebook of the served folder and wait until its kernel can work."""
    page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT})
    tab = Tab(page, lab, name)
    page.on("pageerror", lambda error: tab.faults.append(str(error)))
    # One notebook and nothing else: no file list, no tabs of earlier tests.
    page.goto(f"{lab.url}doc/tree/{name}?token={lab.token}&reset")
    try:
        # Cells appear one by one. Before the kernel is ready, "Run" asks which kernel to take.
        cells = len(nbformat.read(lab.folder / name, as_version=4).cells)
        page.wait_for_function(
            "n => document.querySelectorAll('.jp-Notebook .jp-Cell').length >= n",
            arg=cells, timeout=120_000,
        )  # fmt: skip
        page.get_by_text("Python 3 (ipykernel) | Idle").wait_for(timeout=120_000)
        yield tab
    finally:
        page.close()
