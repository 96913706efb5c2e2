"""Install the course from a classroom folder, with no network; learners run it as ``install.py``.

``grath classroom --to DIR`` puts a copy of this file into the folder. Standard
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

HERE = Path(__file__).resolve().parent


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--at", metavar="NN", help="put the checkpoint for this notebook in place")
    at = parser.parse_args().at
    check(HERE)
    set_up = HERE / "course/grath_utils/workshop/set_up.py"
    python = HERE / "course/.venv" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if subprocess.run([sys.executable, set_up, "--wheels", HERE / "wheels"]).returncode:
        return 1
    remember_places(HERE, python)
    checkpoint = [python, "-m", "grath_utils", "checkpoint", "--at", at, "--from", HERE]
    if at and subprocess.run(checkpoint).returncode:
        return 1
    print(f"\nInstalled. Start it with:\n\n  {python} -m jupyterlab {HERE / 'course/notebooks'}\n")
    return 0


def check(folder: Path) -> None:
    """Exit, saying why, where the folder is unfinished or damaged, or is for other machines."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        targets = manifest.get("targets") or []
        known = ["{python} on {system} {machine}".format(**target) for target in targets]
        finished, files = manifest["finished"], dict(manifest.get("files") or {})
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        sys.exit(f"error: {folder} has no readable manifest.json; copy it again")
    if not finished:
        sys.exit(
            f"error: {folder} was not packed to the end; whoever made it should run the same "
            "command again"
        )
    if not known:
        sys.exit(
            "error: this folder was packed without packages (--no-wheels). With a network, `make "
            "setup` in course/ installs them; GRATH_CACHE=model is the model then"
        )
    here = "{}.{} on {} {}".format(*sys.version_info[:2], platform.system(), platform.machine())
    if here not in known:
        sys.exit(
            f"error: this is Python {here}, and the folder has packages for: Python "
            f"{'; Python '.join(known)}. Use such a Python, or have the folder packed with "
            "--platform and --python-version for yours"
        )
    wrong = [name for name, digest in files.items() if sha256(folder / name) != digest]
    if wrong:
        shown = "\n  ".join(wrong[:10] + ["..."] * (len(wrong) > 10))
        sys.exit(
            f"error: {len(wrong)} files are missing or damaged; copy the folder again:\n  {shown}"
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
