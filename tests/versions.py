"""Run the course with other versions than the pinned ones.

``oldest`` and ``newest`` train and evaluate a tiny model with the bounds of pyproject.toml. Each is
a virtual environment in ``build/versions`` that lies over this one: it holds the packages whose
bounds are tried, and what these prescribe.

``colab`` and ``latest`` run the notebooks as a reader meets them who opens their badges: a machine
of its own, an empty folder, the set-up cell, the profile ``smoke``. ``colab`` starts from what
Colab's machines hold (``colab.txt``), ``latest`` from the newest torch and Jupyter::

    python tests/versions.py [oldest] [newest] [colab] [latest]

The two take the CPU build of torch, from ``GRATH_TORCH_INDEX`` if that names another index.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VARIED = {"trl", "transformers", "peft", "accelerate", "datasets", "bitsandbytes"}
PRESCRIBED = {"tokenizers", "huggingface-hub"}  # by transformers, within narrow bounds
RESOLUTION = {"oldest": "lowest-direct", "newest": "highest"}
TESTS = "tests/dpo/test_rounds.py tests/dpo/test_loss.py tests/evaluation/test_measure.py".split()
TORCH_INDEX = os.environ.get("GRATH_TORCH_INDEX", "https://download.pytorch.org/whl/cpu")
MACHINES = {"colab": ("3.13", ROOT / "tests" / "colab.txt"), "latest": (">=3.11,<3.15", None)}
OPENED = ("02_qlora_dpo", "04_evaluation")  # by their badges, each on a machine of its own


def named(lines: Iterable[str], names: set[str], *, without: bool = False) -> list[str]:
    """Return the requirements that are of these packages, or of others."""
    lines = [line.partition("#")[0].strip() for line in lines]
    return [x for x in lines if x and (re.match(r"[\w-]+", x)[0] in names) is not without]


def uv(*arguments: object, text: str = "") -> str:
    command = [sys.executable, "-m", "uv", *map(str, arguments), "--quiet"]
    return subprocess.run(command, input=text, stdout=subprocess.PIPE, text=True, check=True).stdout


def python_of(home: Path) -> Path:
    return home / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def environment(which: str) -> Path:
    """Make the environment of the oldest or the newest versions; return its Python."""
    home = ROOT / "build" / "versions" / which
    venv.create(home, clear=True, symlinks=os.name != "nt")
    python = python_of(home)
    place = {"base": str(home), "platbase": str(home)}
    below = Path(sysconfig.get_path("purelib", "venv", place)) / "below.pth"
    below.write_text(sysconfig.get_path("purelib"))

    bounds = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    pinned = (ROOT / "requirements.txt").read_text().splitlines()
    others = home / "others.txt"
    others.write_text("\n".join(named(pinned, VARIED, without=True)))
    how = ("--resolution", RESOLUTION[which], "--constraint", others, "--python", python)
    found = uv("pip", "compile", "-", *how, text="\n".join(named(bounds, VARIED))).splitlines()
    versions = named(found, VARIED | PRESCRIBED)
    print(f"{which}: {', '.join(versions)}", flush=True)
    uv("pip", "install", "--python", python, "--no-deps", *versions)
    return python


def rounds_and_scores(which: str) -> int:
    options = ["-q", "-n", "2", "-p", "no:cacheprovider", "-m", "not slow and not model"]
    command = [environment(which), "-m", "pytest", *options, *TESTS]
    return subprocess.run(command, cwd=ROOT, check=False).returncode


def machine(which: str) -> Path:
    """Make what a notebook service gives: Python, torch and Jupyter, and nothing of the course."""
    version, held = MACHINES[which]
    home = ROOT / "build" / "versions" / which
    # Settings of the lock (pyproject.toml) are no matter here.
    uv("venv", "--no-config", "--clear", "--seed", "--python", version, home)
    install = ("pip", "install", "--no-config", "--python", home)
    lines = held.read_text().splitlines() if held else ["torch", "ipykernel", "ipywidgets"]
    uv(*install, "--index-url", TORCH_INDEX, "--no-deps", *named(lines, {"torch"}))
    uv(*install, *named(lines, {"torch"}, without=True), *named(lines, {"torch"}))
    kernel = {"argv": [str(python_of(home)), "-m", "ipykernel_launcher", "-f", "{connection_file}"]}
    spec = home / "share" / "jupyter" / "kernels" / which / "kernel.json"
    spec.parent.mkdir(parents=True, exist_ok=True)
    spec.write_text(json.dumps({**kernel, "display_name": which, "language": "python"}))
    return home


def as_readers_do(which: str) -> int:
    """Open notebooks on a new machine; return 1 if one fails or Jupyter was replaced."""
    import papermill

    home = machine(which)
    frozen = ("pip", "freeze", "--python", home)
    before = uv(*frozen).splitlines()
    # The set-up cell fetches from here what it would fetch from the repository.
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    os.environ |= {
        "JUPYTER_PATH": str(home / "share" / "jupyter"),
        "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_KEY_0": f"url.{ROOT.as_uri()}.insteadOf",
        "GIT_CONFIG_VALUE_0": project["urls"]["Repository"],
    }
    for name in OPENED:
        place = home / "content" / name
        shutil.rmtree(place, ignore_errors=True)
        (place / "grath").mkdir(parents=True)  # as an earlier failure leaves it
        source, out = ROOT / "notebooks" / f"{name}.ipynb", place / "executed.ipynb"
        subprocess.run(
            [python_of(home), *"-m pip uninstall -qy grath-tutorial".split()], check=True
        )
        parameters = {"PROFILE": "smoke"}
        papermill.execute_notebook(source, out, parameters, kernel_name=which, cwd=place)
        results = place / "grath" / "runs" / "smoke" / "run.json"
        # After "Restart session" the package is found as it was, and the run with it.
        papermill.execute_notebook(source, out, parameters, kernel_name=which, cwd=place)
        made = sorted(place.rglob("run.json"))
        print(f"{which}: {name} ran twice, its run is {', '.join(map(str, made))}", flush=True)
        if results not in made or (place / "runs").exists():
            return 1
    after = uv(*frozen).splitlines()
    kept = {"torch", "ipython", "ipykernel", "ipywidgets", "notebook", "jupyterlab"}
    replaced = {line for line in after if named([line], kept)} - set(before)
    print(f"{which}: installed {len(set(after) - set(before))}: {sorted(set(after) - set(before))}")
    print(f"{which}: of torch and Jupyter replaced: {sorted(replaced) or 'nothing'}", flush=True)
    return int(bool(replaced))


def main(wanted: list[str]) -> int:
    failed = 0
    for which in wanted or RESOLUTION:
        failed |= (as_readers_do if which in MACHINES else rounds_and_scores)(which)
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
