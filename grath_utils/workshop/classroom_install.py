"""Install the course from a classroom folder, with no network; learners run it as ``install.py``.

``python -m grath_utils classroom --to DIR`` puts a copy of this file into the folder. Standard
library only, because nothing is installed yet when this runs::

    python install.py              # checks the folder, makes course/.venv, says how to start
    python install.py --at 03      # also puts the checkpoint for notebook 03 in its place
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
SET_UP = "course/grath_utils/workshop/set_up.py"


class InstallError(Exception):
    """The course cannot be installed; the message says why and what to do."""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--at", metavar="NN", help="put the checkpoint for this notebook in place")
    options = parser.parse_args(arguments)
    python = HERE / "course/.venv" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    try:
        manifest = read_manifest(HERE)
        check_machine(manifest)
        check_files(HERE, manifest)
    except InstallError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if subprocess.run([sys.executable, HERE / SET_UP, "--wheels", HERE / "wheels"]).returncode:
        return 1
    remember_places(HERE, python)
    if options.at:
        checkpoint = [python, "-m", "grath_utils", "checkpoint", "--at", options.at, "--from", HERE]
        if subprocess.run(checkpoint).returncode:
            return 1
    print(f"\nInstalled. Start it with:\n\n  {python} -m jupyterlab {HERE / 'course/notebooks'}\n")
    return 0


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return what the folder should hold: ``targets`` and ``files``.

    Raises:
        InstallError: there is no manifest, or packing was interrupted.
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
        InstallError: names those that it has packages for.
    """
    if not manifest["targets"]:
        raise InstallError(
            "this folder was packed without packages (--no-wheels). With a network, `make setup` "
            "in course/ installs them; GRATH_CACHE=model is the model then"
        )
    python = "{}.{}".format(*sys.version_info)
    system, machine = platform.system(), platform.machine()
    known = ["Python {python} on {system} {machine}".format(**t) for t in manifest["targets"]]
    if f"Python {python} on {system} {machine}" not in known:
        raise InstallError(
            f"this is Python {python} on {system} {machine}, and the folder has packages for: "
            f"{'; '.join(known)}. Use such a Python, or have the folder packed with --platform and "
            "--python-version for yours"
        )


def check_files(folder: Path, manifest: dict[str, Any]) -> None:
    """Compare every file with its checksum.

    Raises:
        InstallError: names the files that are missing or damaged.
    """
    wrong = [name for name, digest in manifest["files"].items() if sha256(folder / name) != digest]
    if wrong:
        shown = "\n  ".join(wrong[:10] + ["..."] * (len(wrong) > 10))
        raise InstallError(
            f"{len(wrong)} files are missing or damaged; copy the folder again:\n  {shown}"
        )


def sha256(path: Path) -> str | None:
    if not path.is_file():
        return None
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remember_places(folder: Path, python: Path) -> None:
    """Tell the environment where model and benchmarks are, however it is started.

    When it starts, Python executes a line of a ``.pth`` file that begins with ``import`` (see its
    module ``site``). What the user has set in the environment takes precedence.
    """
    places = {"GRATH_CACHE": str(folder / "model"), "HF_HUB_OFFLINE": "1"}
    if (folder / "mirror").is_dir():
        places["GRATH_MIRROR"] = str(folder / "mirror")
    asked = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    site = Path(subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip())
    settings = "; ".join(f"os.environ.setdefault({k!r}, {v!r})" for k, v in places.items())
    (site / "grath_classroom.pth").write_text(f"import os; {settings}\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
