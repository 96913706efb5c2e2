"""A classroom folder, packed as an instructor does and used by a learner without any network.

``make test-offline`` runs this: the folder gets real packages and a finished run of the profile
``smoke``; then, in a network namespace that has no network, its ``install.py`` installs the course
and notebooks 00 to 04 run from it. Linux, with ``unshare`` (util-linux)::

    python tests/workshop/offline.py [FOLDER]
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PROFILE = "smoke"
NUMBERS = ("00", "00b", "01", "02", "03", "04")
ALONE = ["unshare", "--net", "--map-root-user"]
# The loopback interface is down at first, and a notebook's kernel is spoken to over it.
LOOPBACK_UP = """
import fcntl, os, socket, struct, sys
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
    up = struct.pack("16sh", b"lo", 0x1 | 0x40)  # IFF_UP, IFF_RUNNING
    fcntl.ioctl(any_socket, 0x8914, up)  # SIOCSIFFLAGS
os.execvp(sys.argv[1], sys.argv[1:])
"""
INTERFACES = "print([name for _, name in __import__('socket').if_nameindex()])"


def learner(home: Path) -> dict[str, str]:
    """Return the environment of somebody who has Python and nothing else, caches included."""
    home.mkdir(parents=True, exist_ok=True)
    return {"HOME": str(home), "PATH": os.defpath, "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1"}


def without_network(home: Path, *command: str | Path) -> str:
    """Run a command where there is no network; return what it prints."""
    inside = [*ALONE, sys.executable, "-c", LOOPBACK_UP, *command]
    done = subprocess.run(inside, env=learner(home), cwd=home, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"{done.stdout}\nfailed without a network: {' '.join(map(str, command))}")
    return done.stdout


def main(folder: Path) -> None:
    python, home = Path(sys._base_executable), folder.with_name(f"{folder.name}_learner")
    for left in (home, folder / "course" / ".venv", folder / "course" / "runs"):
        shutil.rmtree(left, ignore_errors=True)  # or old work would pass for new
    here = without_network(home, python, "-c", INTERFACES).strip()
    if here != "['lo']":
        sys.exit(f"there is a network in here: {here}")
    pack = [sys.executable, "-m", "grath_utils", "classroom", "--to", folder]
    pack += ["--profile", PROFILE, "--run-dir", folder.with_name(f"{folder.name}_run")]
    subprocess.run(pack, check=True, cwd=ROOT)

    print(without_network(home, python, folder / "install.py", "--at", "04"), flush=True)
    grath, run_dir = folder / "course" / ".venv" / "bin" / "grath", home / "runs" / PROFILE
    run = ["run", "--profile", PROFILE, "--run-dir", run_dir]
    print(without_network(home, grath, *run), flush=True)
    executed = sorted(path.name.partition("_")[0] for path in run_dir.glob("notebooks/*.ipynb"))
    if missing := {*NUMBERS} - {*executed}:
        sys.exit(f"not executed: {sorted(missing)}")
    print(f"Installed and run without a network: notebooks {', '.join(executed)}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if sys.argv[1:] else ROOT / "build" / "classroom").resolve())
