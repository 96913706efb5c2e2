"""Install the course from a classroom folder, with no network; run by learners as ``install.py``.

`python -m grath_utils classroom --to DIR` puts a copy of this file into the folder. Standard
library only, because nothing is installed yet when this runs::

    python install.py              # checks the folder, makes course/.venv, says how to start
    python install.py --at 03      # besides, puts the checkpoint for notebook 03 in its place
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

HERE = Path(__file__).resolve().parent
SETTINGS = "grath_classroom.pth"  # read by the environment's Python whenever it starts


class InstallError(Exception):
    """The course cannot be installed; the message says why and what to do."""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--at", metavar="NN", help="put the checkpoint for this notebook in place")
    options = parser.parse_args(arguments)
    try:
        manifest = read_manifest(HERE)
        check_machine(manifest)
        check_files(HERE, manifest)
        bootstrap = load_bootstrap(HERE)
        if bootstrap.main(["--wheels", str(HERE / "wheels")]) != 0:
            return 1
        python = bootstrap.python_of(HERE / "course" / ".venv")
        remember_places(HERE, python)
        if options.at:
            command = [str(python), "-m", "grath_utils", "checkpoint", "--at", options.at]
            if subprocess.run([*command, "--from", str(HERE)]).returncode != 0:
                return 1
    except InstallError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"\nInstalled. Start it with:\n\n  {python} -m jupyterlab {HERE / 'course/notebooks'}\n")
    return 0


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return what the folder is said to hold.

    Raises:
        InstallError: there is no list, or packing never came to its end.
    """
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InstallError(f"{folder} has no readable manifest.json; copy it again") from error
    if not manifest.get("finished"):
        raise InstallError(
            f"{folder} was not packed to the end; whoever made it should run the same command again"
        )
    return manifest


def check_machine(manifest: dict[str, Any]) -> None:
    """Refuse a machine or a Python that the folder has no packages for.

    Raises:
        InstallError: says which there are.
    """
    here = (platform.system(), platform.machine(), "{}.{}".format(*sys.version_info))
    there = [(t["system"], t["machine"], t["python"]) for t in manifest["targets"]]
    if not there:
        raise InstallError(
            "this folder was packed without packages (--no-wheels). With a network, `make setup` "
            "in course/ installs them; GRATH_CACHE=model is the model then"
        )
    if here not in there:
        listed = "; ".join(f"Python {python} on {system} {m}" for system, m, python in there)
        raise InstallError(
            f"this is Python {here[2]} on {here[0]} {here[1]}, and the folder has packages for: "
            f"{listed}. Use such a Python, or have the folder packed with --platform and "
            "--python-version for yours"
        )


def check_files(folder: Path, manifest: dict[str, Any]) -> None:
    """Compare every file with its size and checksum.

    Raises:
        InstallError: names the files that are missing or damaged.
    """
    wrong = []
    for name, entry in manifest["files"].items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != entry["bytes"]:
            wrong.append(name)
            continue
        with open(path, "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != entry["sha256"]:
                wrong.append(name)
    if wrong:
        shown = "\n  ".join(wrong[:10]) + ("\n  ..." if len(wrong) > 10 else "")
        raise InstallError(
            f"{len(wrong)} files are missing or damaged; copy the folder again:\n  {shown}"
        )


def load_bootstrap(folder: Path) -> ModuleType:
    """Import the course's own set-up program, alone, from its file."""
    path = folder / "course" / "grath_utils" / "bootstrap.py"
    spec = importlib.util.spec_from_file_location("grath_bootstrap", path)
    if spec is None or spec.loader is None:
        raise InstallError(f"{path} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def remember_places(folder: Path, python: Path) -> None:
    """Tell the environment where model and benchmarks are, whichever way it is started.

    A line that begins with ``import`` in a ``.pth`` file is executed when Python starts (see the
    documentation of its module ``site``). What the user has set in the environment goes first.
    """
    places = {"GRATH_CACHE": str(folder / "model"), "HF_HUB_OFFLINE": "1"}
    if (folder / "mirror").is_dir():
        places["GRATH_MIRROR"] = str(folder / "mirror")
    asked = [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    site = Path(subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip())
    settings = "; ".join(f"os.environ.setdefault({k!r}, {v!r})" for k, v in places.items())
    aside = site / f"{SETTINGS}.new"
    aside.write_text(f"import os; {settings}\n", encoding="utf-8")
    os.replace(aside, site / SETTINGS)


if __name__ == "__main__":
    sys.exit(main())
