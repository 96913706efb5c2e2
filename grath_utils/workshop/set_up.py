"""Make ``.venv`` with the pinned packages; ``make`` runs this file with nothing but Python.

Standard library only, because nothing is installed yet when this runs::

    python3 grath_utils/workshop/set_up.py [--dev | --book] [--wheels DIR]

A second call finds its stamp and does nothing. Where uv is on the PATH it installs, in seconds
instead of a minute; otherwise pip. Versions and checksums are those of requirements.lock, except
for torch and what its build brings (:func:`torch_arguments`).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
VENV = ROOT / ".venv"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"  # documented at pytorch.org, "Get started"
PYTHONS = ((3, 11), (3, 15))  # from, and below; as in pyproject.toml
OLDEST_MACOS = 14  # for the pinned torch
PIP = ["-m", "pip", "--disable-pip-version-check"]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dev", action="store_true", help="install the test tools too")
    parser.add_argument("--book", action="store_true", help="install only what the book needs")
    parser.add_argument(
        "--wheels", metavar="DIR", type=Path, help="take all packages from here, with no network"
    )
    options = parser.parse_args(arguments)
    if reason := unsuitable():
        sys.exit(f"error: {reason}")
    install(dev=options.dev, book=options.book, wheels=options.wheels)


def unsuitable() -> str | None:
    """Return why the course cannot be installed with this Python, or on this machine, or None."""
    if not PYTHONS[0] <= sys.version_info[:2] < PYTHONS[1]:
        return (
            f"Python 3.11, 3.12, 3.13 or 3.14 is needed, this is {platform.python_version()} "
            f"({sys.executable}). Name another: make PYTHON=python3.12 ..."
        )
    if platform.system() != "Darwin":
        return None
    if platform.machine() != "arm64":
        return (
            "PyTorch has no packages for Macs with an Intel processor (on a newer Mac, for a "
            "Python that was built for one). Use Colab: the badge in README.md opens it"
        )
    if int(platform.mac_ver()[0].partition(".")[0] or OLDEST_MACOS) < OLDEST_MACOS:
        return (
            f"{torch_pin()} needs macOS {OLDEST_MACOS} or newer, this is {platform.mac_ver()[0]}. "
            "Update macOS, or use Colab: the badge in README.md opens it"
        )
    return None


def install(*, dev: bool, book: bool = False, wheels: Path | None = None) -> None:
    """Create the environment and install what it lacks; exit with a message where that fails."""
    make_venv()
    offline = ["--no-index", "--find-links", str(wheels.resolve())] if wheels else []
    lock = ROOT / "requirements.lock"
    asked = {
        "requirements.txt": not book,
        "requirements-book.txt": dev or book,
        "requirements-dev.txt": dev,
    }
    for name in (name for name, needed in asked.items() if needed):
        sources = (ROOT / name).read_bytes() + lock.read_bytes() + str(ROOT).encode()
        wanted, stamp = hashlib.sha256(sources).hexdigest(), VENV / f".{name}.stamp"
        if stamp.is_file() and stamp.read_text(encoding="utf-8") == wanted:
            continue
        print(f"Installing {name} into {VENV.name} (a few minutes the first time) ...", flush=True)
        if name == "requirements.txt" and not wheels:
            pip_install("--no-deps", "--require-hashes", "--requirement", str(lock))
            pip_install(*torch_arguments(python_of(VENV)))
        else:
            # In constraints pip takes checksums for a demand on everything, torch included; and a
            # classroom's wheels, some of them built there, have checksums of their own.
            versions = VENV / "constraints.txt"
            versions.write_text(without_checksums(lock), encoding="utf-8")
            what = ["--requirement", str(ROOT / name), "--constraint", str(versions)]
            pip_install(*offline, *what)
        if name == "requirements.txt":
            # setuptools is there already (torch needs it), so nothing more has to be fetched.
            alone = ["--no-deps", "--no-build-isolation"]
            pip_install(*offline, *alone, "--editable", str(ROOT))
        stamp.write_text(wanted, encoding="utf-8")


def without_checksums(lock: Path) -> str:
    """Return the versions of requirements.lock, without the checksums of their files."""
    return re.sub(r"\s*\\\n\s*--hash=\S+", "", lock.read_text(encoding="utf-8"))


def make_venv() -> None:
    """Create ``.venv`` unless there is one that works."""
    if python_of(VENV).is_file():
        asked = subprocess.run([str(python_of(VENV)), *PIP, "--version"], capture_output=True)
        if asked.returncode == 0:
            return
        print(f"{VENV.name} no longer works (was Python moved?): making it again", flush=True)
    if VENV.exists() and any(VENV.iterdir()) and not (VENV / "pyvenv.cfg").is_file():
        sys.exit(f"error: {VENV} is no virtual environment, so it stays; move it away")
    shutil.rmtree(VENV, ignore_errors=True)
    made = subprocess.run([sys.executable, "-m", "venv", str(VENV)], capture_output=True, text=True)
    if made.returncode != 0:
        shutil.rmtree(VENV, ignore_errors=True)
        sys.exit(
            "error: this Python cannot make a virtual environment. On Debian and Ubuntu install it "
            f"with `sudo apt install python{sys.version_info[0]}.{sys.version_info[1]}-venv`.\n"
            + (made.stdout + made.stderr).strip()
        )


def python_of(venv: Path) -> Path:
    return venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def pip_install(*arguments: str) -> None:
    """Run ``pip install`` in the environment; it prints only warnings and errors.

    uv takes the same arguments. ``pyproject.toml`` tells it what a lock leaves out, which holds
    for a lock only; and it does not read pip's settings, so whoever has any keeps pip.
    """
    python, options = str(python_of(VENV)), ["install", *arguments, "--quiet"]
    command = [python, *PIP, *options]
    if (uv := shutil.which("uv")) and not pip_is_configured(python):
        command = [uv, "pip", *options, "--no-config", "--python", python]
    if subprocess.run(command).returncode != 0:
        sys.exit(
            "error: installing failed (the reason is above). Check the network and the disk, then "
            f"run the same command again; the step was: {' '.join(command)}"
        )


def pip_is_configured(python: str) -> bool:
    """Return True if pip was told of another index, a proxy, a certificate or the like."""
    asked = subprocess.run([python, *PIP, "config", "list"], capture_output=True, text=True)
    return bool(re.search(r"index|find-links|proxy|cert|constraint", asked.stdout))


def torch_pin() -> str:
    """Return the pin of torch in requirements.txt, such as ``torch==2.13.0``."""
    text = (ROOT / "requirements.txt").read_text(encoding="utf-8")
    return re.search(r"^torch==[\w.]+", text, re.MULTILINE).group()


def torch_arguments(python: Path, *, cpu: bool = False) -> list[str]:
    """Return what to ask pip for, so that the build of torch suits the machine.

    On Linux, a plain ``pip install torch`` takes the CUDA build and several gigabytes of NVIDIA
    packages. Without an NVIDIA GPU (or with ``cpu``) the pip of ``python`` is therefore asked for
    its *plan*, which downloads nothing, and where that has NVIDIA packages, PyTorch's own CPU build
    is taken instead. ``GRATH_TORCH_INDEX`` overrides all this with an index of the user's choice.
    """
    pin = torch_pin()
    if chosen := os.environ.get("GRATH_TORCH_INDEX"):
        return [pin, "--index-url", chosen]
    plain = platform.system() != "Linux" or (has_nvidia_gpu() and not cpu)
    if plain or not plan_has_cuda(pin, python):
        return [pin]
    reason = "The CPU is enough here" if cpu else "No NVIDIA GPU here"
    print(f"{reason}: taking PyTorch's CPU build, a tenth of the size", flush=True)
    return [pin, "--index-url", CPU_INDEX]


def has_nvidia_gpu() -> bool:
    """Return True if the NVIDIA driver sees a GPU."""
    tool = shutil.which("nvidia-smi")
    return (
        bool(tool) and b"GPU" in subprocess.run([tool, "--list-gpus"], capture_output=True).stdout
    )


def plan_has_cuda(pin: str, python: Path) -> bool:
    """Return True if ``pip install torch`` would bring NVIDIA packages."""
    options = ["--dry-run", "--ignore-installed", "--quiet", "--report", "-"]
    command = [str(python), *PIP, "install", *options, pin]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        return True  # the CPU index may still have it
    names = [entry["metadata"]["name"].lower() for entry in json.loads(done.stdout)["install"]]
    return any(name.startswith(("nvidia-", "cuda-", "triton")) for name in names)


if __name__ == "__main__":
    main()
