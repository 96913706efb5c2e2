"""Make ``.venv`` with the pinned packages; run by ``make``, with nothing but Python at hand.

Standard library only, because nothing is installed yet when this runs::

    python3 grath_utils/workshop/set_up.py [--dev] [--wheels DIR]

A second call finds its stamp and does nothing. The one decision that takes thought is torch: on
Linux, a plain ``pip install torch`` takes the CUDA build and several gigabytes of NVIDIA packages.
On a machine without an NVIDIA GPU this asks pip for its *plan* first (nothing is downloaded for
that), and where the plan holds NVIDIA packages, takes PyTorch's own CPU build instead.
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
OLDEST_PYTHON = (3, 11)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dev", action="store_true", help="install the test tools too")
    parser.add_argument(
        "--wheels", metavar="DIR", type=Path, help="take all packages from here, with no network"
    )
    options = parser.parse_args(arguments)
    if sys.version_info < OLDEST_PYTHON:
        found = platform.python_version()
        return fail(
            f"Python 3.11 or newer is needed, this is {found} ({sys.executable}). "
            "Name a newer one: make PYTHON=python3.12 ..."
        )
    try:
        set_up(dev=options.dev, wheels=options.wheels)
    except subprocess.CalledProcessError as error:
        return fail(
            "installing failed (pip's own message is above). Check the network and the disk, then "
            f"run the same command again; the step was: {' '.join(map(str, error.cmd[1:]))}"
        )
    except SetUpError as error:
        return fail(str(error))
    return 0


class SetUpError(Exception):
    """The environment cannot be made; the message says what to do."""


def fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 1


def set_up(*, dev: bool, wheels: Path | None = None) -> None:
    """Create the environment and install what is missing from it."""
    offline = ["--no-index", "--find-links", str(wheels.resolve())] if wheels else []
    lists = ["requirements.txt"] + (["requirements-dev.txt"] if dev else [])
    for name in lists:
        make_venv()
        stamp = VENV / f".{name}.stamp"
        wanted = fingerprint(name)
        if stamp.is_file() and stamp.read_text(encoding="utf-8") == wanted:
            continue
        print(f"Installing {name} into {VENV.name} (a few minutes the first time) ...", flush=True)
        if name == "requirements.txt":
            pip("install", *([*offline, torch_pin()] if wheels else torch_arguments()))
        pip("install", *offline, "--requirement", str(ROOT / name))
        if name == "requirements.txt":
            # setuptools is there already (torch needs it), so nothing more has to be fetched.
            alone = ["--no-deps", "--no-build-isolation"]
            pip("install", *offline, *alone, "--editable", str(ROOT))
        stamp.write_text(wanted, encoding="utf-8")


def make_venv() -> None:
    """Create ``.venv`` where there is none that works."""
    if python_of(VENV).is_file():
        works = subprocess.run(
            [str(python_of(VENV)), "-m", "pip", "--version"], capture_output=True
        )
        if works.returncode == 0:
            return
        print(f"{VENV.name} does not work any more (was Python moved?): making it anew", flush=True)
    shutil.rmtree(VENV, ignore_errors=True)
    made = subprocess.run([sys.executable, "-m", "venv", str(VENV)], capture_output=True, text=True)
    if made.returncode != 0:
        shutil.rmtree(VENV, ignore_errors=True)
        raise SetUpError(
            "this Python cannot make a virtual environment. On Debian and Ubuntu install it with "
            f"`sudo apt install python{sys.version_info.major}.{sys.version_info.minor}-venv`.\n"
            + (made.stdout + made.stderr).strip()
        )


def python_of(venv: Path) -> Path:
    return venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def pip(*arguments: str) -> None:
    """Run the environment's pip, showing what it says only when it matters."""
    command = [str(python_of(VENV)), "-m", "pip", "--disable-pip-version-check", *arguments]
    subprocess.run([*command, "--quiet"], check=True)


def fingerprint(name: str) -> str:
    """Identify what a finished installation was made from."""
    text = (ROOT / name).read_text(encoding="utf-8") + str(ROOT)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def torch_pin() -> str:
    """Return the line of requirements.txt that pins torch, such as ``torch==2.13.0``."""
    text = (ROOT / "requirements.txt").read_text(encoding="utf-8")
    found = re.search(r"^torch==[\w.]+", text, re.MULTILINE)
    if not found:
        raise SetUpError("requirements.txt does not pin torch")
    return found.group()


def torch_arguments(python: Path | None = None, *, cpu: bool = False) -> list[str]:
    """Return what to ask pip for, so that the build of torch fits the machine.

    ``python`` is the environment's (its pip is asked for the plan); ``cpu`` takes the CPU build
    whatever this machine has.

    macOS and Windows: the plain package (CPU, and Metal on a Mac). Linux with an NVIDIA GPU: the
    plain package (CUDA). Linux without: the plain package where pip would not take NVIDIA packages
    with it (a local index of CPU builds, some processors), else PyTorch's CPU index.
    ``GRATH_TORCH_INDEX`` overrides all this with an index of the user's choice.
    """
    pin = torch_pin()
    chosen = os.environ.get("GRATH_TORCH_INDEX")
    if chosen:
        return [pin, "--index-url", chosen]
    if platform.system() != "Linux" or (has_nvidia_gpu() and not cpu):
        return [pin]
    if not plan_has_cuda(pin, python or python_of(VENV)):
        return [pin]
    reason = "The CPU is enough here" if cpu else "No NVIDIA GPU here"
    print(f"{reason}: taking PyTorch's CPU build, a tenth of the size", flush=True)
    return [pin, "--index-url", CPU_INDEX]


def has_nvidia_gpu() -> bool:
    """Tell whether the NVIDIA driver sees a GPU."""
    tool = shutil.which("nvidia-smi")
    if not tool:
        return False
    done = subprocess.run([tool, "--list-gpus"], capture_output=True, text=True)
    return done.returncode == 0 and "GPU" in done.stdout


def plan_has_cuda(pin: str, python: Path) -> bool:
    """Tell whether ``pip install torch`` would bring NVIDIA packages, without downloading them."""
    command = [str(python), "-m", "pip", "--disable-pip-version-check", "install"]
    command += ["--dry-run", "--ignore-installed", "--quiet", "--report", "-", pin]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        return True  # the CPU index may still have it
    plan = json.loads(done.stdout)["install"]
    names = [entry["metadata"]["name"].lower() for entry in plan]
    return any(name.startswith(("nvidia-", "cuda-")) or name == "triton" for name in names)


if __name__ == "__main__":
    sys.exit(main())
