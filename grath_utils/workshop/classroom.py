"""The whole course in one folder that works with no network: for rooms with bad Wi-Fi.

::

    DIR/ START.md · install.py · manifest.json (sizes and checksums of everything)
         course/      this repository
         model/       the default model, converted (GRATH_CACHE)
         wheels/      every package, for each kind of machine that was asked for
         checkpoints/NAME/  a finished run, to start at any notebook
         mirror/      the benchmarks (GRATH_MIRROR), where a mirror was named

Every file appears whole or not at all, and what is there already is not made again. The manifest is
marked as finished last, and ``install.py`` refuses a folder without that mark.
"""

from __future__ import annotations

import email
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name, parse_wheel_filename

from grath_utils.engine.models import CONVERSION, DEFAULT_MODEL, default_model_dir
from grath_utils.errors import DataError, FetchError, RunError, UsageError
from grath_utils.files import (
    atomic_path,
    notebooks_dir,
    read_json,
    sha256_file,
    write_json,
    write_text,
)
from grath_utils.loop.run_dir import Run
from grath_utils.loop.stages import run_stages
from grath_utils.workshop import classroom_install
from grath_utils.workshop import set_up as bootstrap
from grath_utils.workshop.checkpoints import CHECKPOINTS, PARTS

MANIFEST = "manifest.json"
LEFT_OUT = {".git", ".venv", ".cache", "runs", "build", "dist", "__pycache__", "classroom"}
"""Folders that are no part of the course, for a checkout that git does not know."""


# --- machines ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """A kind of machine that wheels are packed for."""

    system: str
    """As ``platform.system()`` says it there: Linux, Windows, Darwin."""
    machine: str
    """As ``platform.machine()`` says it there: x86_64, AMD64, arm64, aarch64."""
    python: str
    """Such as 3.12."""
    tags: tuple[str, ...] = ()
    """pip's platform tags; none for the machine that packs."""

    @property
    def name(self) -> str:
        return f"{self.system}-{self.machine}-{self.python}".lower()

    def markers(self) -> dict[str, str]:
        """Return the values that requirements' conditions have on such a machine (PEP 508)."""
        known = {"Linux": ("linux", "posix"), "Darwin": ("darwin", "posix")}
        sys_platform, os_name = known.get(self.system, ("win32", "nt"))
        return {
            "sys_platform": sys_platform,
            "os_name": os_name,
            "platform_system": self.system,
            "platform_machine": self.machine,
            "python_version": self.python,
            "python_full_version": f"{self.python}.0",
        }


def this_machine() -> Target:
    """Return the machine that packs."""
    version = "{}.{}".format(*sys.version_info)
    return Target(platform.system(), platform.machine(), version)


def find_target(tag: str, python: str) -> Target:
    """Return what a platform tag of pip stands for.

    Args:
        tag: such as ``win_amd64``, ``macosx_14_0_arm64``, ``manylinux_2_28_x86_64``.
        python: such as ``3.12``.

    Raises:
        UsageError: a tag of another form, or a Python version that is none.
    """
    major, _, minor = python.partition(".")
    if not (major.isdigit() and minor.isdigit()):
        raise UsageError(f'--python-version is "{python}"; it looks like 3.12')
    for start, system in (("win_", "Windows"), ("macosx_", "Darwin"), ("manylinux_", "Linux")):
        if not tag.startswith(start):
            continue
        parts = tag.split("_")
        if system == "Windows":
            return Target(system, tag.removeprefix(start).upper(), python, (tag,))
        if len(parts) > 3 and parts[1].isdigit() and parts[2].isdigit():
            machine = "_".join(parts[3:])
            # A newer glibc runs what was built for an older one; pip must be told of each.
            older = [f"manylinux_2_{i}_{machine}" for i in range(int(parts[2]), 4, -1)]
            older += [f"manylinux{year}_{machine}" for year in (2014, 2010)]
            return Target(system, machine, python, tuple(older) if system == "Linux" else (tag,))
    raise UsageError(
        f'unknown platform "{tag}"; such as win_amd64, macosx_14_0_arm64, manylinux_2_28_x86_64'
    )


# --- packing -------------------------------------------------------------------------------------


def pack(
    to: str | Path,
    run: Run,
    *,
    targets: Sequence[Target] = (),
    mirror: Path | None = None,
    wheels: bool = True,
    say: Callable[[str], None] = print,
) -> Path:
    """Make or complete a classroom folder.

    Args:
        to: the folder; made if need be.
        run: the run to pack as a checkpoint; stages that it lacks are done first.
        targets: kinds of machines besides this one.
        mirror: a benchmark mirror to pack.
        wheels: pack the packages, too.
        say: takes lines of progress.

    Returns:
        The folder.

    Raises:
        UsageError: the run cannot be repeated elsewhere, or the place is wrong.
        FetchError: the packages for this machine cannot be had.
        RunError: the disk is full.
    """
    folder = Path(to).expanduser().resolve()
    root = _checkout()
    _check_place(folder, root)
    _check_portable(run, mirror)
    benchmarks = _mirror(mirror)
    run_stages(run, say=say)
    sources = {**_course(root), **_model(), **_checkpoint(run), **benchmarks}
    sources["install.py"] = Path(classroom_install.__file__)
    record = folder / MANIFEST
    before = read_json(record)["files"] if record.is_file() else {}
    begun = {name: before.get(name, {}) for name in before.keys() | sources.keys()}
    write_json(record, {"finished": False, "files": begun})
    say(f"Copying {len(sources)} files to {folder} ...")
    for name, source in sources.items():
        _copy(source, folder / name)
    for name in before.keys() - sources.keys():
        if not name.startswith("wheels/"):
            (folder / name).unlink(missing_ok=True)
    packed: list[dict[str, Any]] = []
    if wheels:
        for target in (this_machine(), *targets):
            listed = pack_wheels(folder / "wheels", root, target, say=say)
        packed = _keep_current(folder / "wheels", listed["requirements"])
    write_text(folder / "START.md", start_page(packed, mirror=bool(mirror)))
    names = [*sources, "START.md"]
    names += [path.relative_to(folder).as_posix() for path in sorted(folder.glob("wheels/*.whl"))]
    files = {
        name: {"bytes": (folder / name).stat().st_size, "sha256": sha256_file(folder / name)}
        for name in names
    }
    write_json(record, {"finished": True, "targets": packed, "files": files})
    total = sum(entry["bytes"] for entry in files.values())
    say(f"{folder}: {len(files)} files, {total / 1e9:.2f} GB")
    return folder


def _checkout() -> Path:
    notebooks = notebooks_dir()
    if notebooks is None or not (notebooks.parent / "requirements.txt").is_file():
        raise UsageError("the notebooks are not here: run this in a checkout of the repository")
    return notebooks.parent


def _check_place(folder: Path, root: Path) -> None:
    if folder.is_file():
        raise UsageError(f"{folder} is a file; name a folder")
    if folder == root or folder in root.parents:
        raise UsageError(f"{folder} holds this checkout; name a folder of its own")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / MANIFEST).is_file():
        raise UsageError(f"{folder} is not empty and no classroom folder; choose another")


def _check_portable(run: Run, mirror: Path | None) -> None:
    """Refuse a run that a learner's machine could not open."""
    if run.config.model.name != DEFAULT_MODEL:
        raise UsageError(
            f'the run uses the model "{run.config.model.name}"; a classroom folder carries the '
            "default model only"
        )
    source = run.config.questions.source
    if source != "own" and not (mirror and source == "arc_challenge"):
        raise UsageError(
            f'the run takes its questions from "{source}", which a classroom folder does not '
            "carry; use questions.source=own"
        )


def _course(root: Path) -> dict[str, Path]:
    """Return the repository's files: those that git knows, or all but the usual leftovers."""
    done = subprocess.run(["git", "ls-files", "-z"], capture_output=True, text=True, cwd=root)
    if done.returncode == 0 and done.stdout:
        paths: Iterable[Path] = (root / name for name in done.stdout.split("\0") if name)
    else:
        found = sorted(root.rglob("*"))
        paths = (path for path in found if not LEFT_OUT & {*path.relative_to(root).parts})
    return {f"course/{p.relative_to(root).as_posix()}": p for p in paths if p.is_file()}


def _model() -> dict[str, Path]:
    folder = default_model_dir()
    return {f"model/{CONVERSION}/{p.name}": p for p in sorted(folder.iterdir()) if p.is_file()}


def _checkpoint(run: Run) -> dict[str, Path]:
    """Return what a run's stages left; not its notebooks, which name places on this machine."""
    found = [run.path / "run.json", run.manifest, run.questions, run.report]
    for part in (path for kind in PARTS for path in run.path.glob(kind)):
        found += [part, *part.rglob("*")]
    return {
        f"{CHECKPOINTS}/{Path(run.config.profile).stem}/{p.relative_to(run.path).as_posix()}": p
        for p in found
        if p.is_file() and not p.name.startswith(".")
    }


def _mirror(mirror: Path | None) -> dict[str, Path]:
    if mirror is None:
        return {}
    if not any(mirror.rglob("*.jsonl")):
        raise UsageError(
            f"{mirror} holds no benchmark; `python -m grath_utils mirror --to DIR` makes a mirror"
        )
    return {
        f"mirror/{path.relative_to(mirror).as_posix()}": path
        for path in sorted(mirror.rglob("*"))
        if path.suffix in (".jsonl", ".json", ".md") and path.is_file()
    }


def _copy(source: Path, target: Path) -> None:
    """Copy a file whole, unless it is there already."""
    if (
        target.is_file()
        and target.stat().st_size == source.stat().st_size
        and sha256_file(target) == sha256_file(source)
    ):
        return
    with atomic_path(target) as partial:
        shutil.copyfile(source, partial)


# --- wheels --------------------------------------------------------------------------------------


def pack_wheels(
    folder: Path, root: Path, target: Target, *, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """Bring every package for a kind of machine into a folder of wheels, and return the record.

    The record is ``NAME.json`` beside the wheels: system, machine, Python, the names of the
    wheels, and what could not be had (``missing``). For this machine pip builds what exists as
    source only. For others it takes wheels alone, and one by one: pip evaluates conditions such as
    ``sys_platform == "win32"`` for the machine that it runs on, so here they are followed instead,
    with the versions that pip chose for this machine wherever there are such wheels.

    Raises:
        FetchError: packages for this machine cannot be had.
    """
    requirements = root / "requirements.txt"
    wanted = sha256_file(requirements)
    record = folder / f"{target.name}.json"
    if record.is_file():
        known = read_json(record)
        there = all((folder / name).is_file() for name in known["wheels"])
        if known["requirements"] == wanted and there and not known["missing"]:
            return known
    say(f"Packages for Python {target.python} on {target.system} {target.machine} ...")
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(".pip.*"):  # of a packing that was killed
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=".pip.", dir=folder) as name:
        scratch = Path(name)
        fetch = _fetch_elsewhere if target.tags else _fetch_here
        missing = fetch(scratch, folder, requirements, target)
        wheels = sorted(path.name for path in scratch.glob("*.whl"))
        for wheel in wheels:
            if not (folder / wheel).is_file():
                os.replace(scratch / wheel, folder / wheel)
    found = {
        "system": target.system,
        "machine": target.machine,
        "python": target.python,
        "requirements": wanted,
        "wheels": wheels,
        "missing": missing,
    }
    write_json(record, found)
    if missing:
        say(f"  NOT to be had for {target.name}: {', '.join(missing)}")
    return found


def _fetch_here(scratch: Path, folder: Path, requirements: Path, target: Target) -> list[str]:
    """Fetch, or build, wheels for this machine with the CPU build of torch."""
    links = ["--wheel-dir", str(scratch), "--find-links", str(folder)]
    torch = bootstrap.torch_arguments(Path(sys.executable), cpu=True)
    for what in (torch, ["--find-links", str(scratch), "--requirement", str(requirements)]):
        if reason := _pip("wheel", *links, *what):
            raise FetchError(f"the packages for this machine cannot be had: {reason}")
    return []


def _fetch_elsewhere(scratch: Path, folder: Path, requirements: Path, target: Target) -> list[str]:
    """Fetch wheels for another kind of machine; return what could not be had."""
    options = ["--no-deps", "--dest", str(scratch), "--find-links", str(folder)]
    options += ["--only-binary=:all:", "--implementation", "cp", "--python-version", target.python]
    for tag in target.tags:
        options += ["--platform", tag]
    lines = (line.partition("#")[0].strip() for line in _lines(requirements))
    roots = [Requirement(line) for line in lines if line]
    known = _versions(folder / f"{this_machine().name}.json")
    missing: dict[str, str] = {}
    if target.system == "Linux":  # the plain package would bring CUDA, several gigabytes
        index = os.environ.get("GRATH_TORCH_INDEX", bootstrap.CPU_INDEX)
        if _pip("download", *options, bootstrap.torch_pin(), "--index-url", index):
            missing["torch"] = bootstrap.torch_pin()
    while True:
        lacking = lacking_requirements(scratch.glob("*.whl"), target, roots)
        asked = {name: text for name, text in lacking.items() if name not in missing}
        if not asked:
            return sorted(missing.values())
        same = [f"{name}=={known[name]}" if name in known else asked[name] for name in asked]
        if not _pip("download", *options, *same):
            continue
        for name, text in asked.items():
            ways = [f"{name}=={known[name]}", text] if name in known else [text]
            if all(_pip("download", *options, way) for way in ways):
                missing[name] = text


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


def _versions(record: Path) -> dict[str, str]:
    """Return the versions that were packed for a machine, without local parts such as ``+cpu``."""
    wheels = read_json(record)["wheels"] if record.is_file() else []
    return {name: version.public for name, version, *_ in map(parse_wheel_filename, wheels)}


def lacking_requirements(
    wheels: Iterable[Path], target: Target, roots: Iterable[Requirement]
) -> dict[str, str]:
    """Return what is needed on a kind of machine and is not among the wheels.

    Args:
        wheels: those that are there.
        target: the kind of machine, whose values conditions are evaluated with.
        roots: what is wanted to begin with.

    Returns:
        Names, and each with the versions that are asked for, such as ``{"a": "a>=1,<3"}``.

    Raises:
        DataError: a file is not a wheel.
    """
    present = {parse_wheel_filename(path.name)[0]: path for path in wheels}
    requires: dict[str, list[Requirement]] = {}
    lacking: dict[str, SpecifierSet] = {}
    seen: set[tuple[str, str]] = set()
    queue = list(roots)
    while queue:
        wanted = queue.pop()
        name = canonicalize_name(wanted.name)
        if name not in present:
            lacking[name] = lacking.get(name, SpecifierSet()) & wanted.specifier
            continue
        if name not in requires:
            requires[name] = [Requirement(line) for line in _requires(present[name])]
        for extra in {"", *wanted.extras} - {e for n, e in seen if n == name}:
            seen.add((name, extra))
            environment = {**target.markers(), "extra": extra}
            for line in requires[name]:
                if line.marker is None or line.marker.evaluate(environment):
                    queue.append(line)
    return {name: f"{name}{specifier}" for name, specifier in lacking.items()}


def _requires(wheel: Path) -> list[str]:
    """Return the requirements that a wheel's metadata lists."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            name = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
            metadata = email.message_from_bytes(archive.read(name))
    except (zipfile.BadZipFile, StopIteration) as error:
        raise DataError(f"{wheel} is not a wheel; remove it and run the same again") from error
    return [str(line) for line in metadata.get_all("Requires-Dist", [])]


def _pip(*arguments: str) -> str:
    """Run pip; return the reason of its failure, or nothing."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments, "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return ""
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    if any("no space left" in line.lower() for line in lines):
        raise RunError("no space left on the disk; free some and run the same command again")
    errors = [line for line in lines if line.startswith("ERROR")]
    return (errors or lines or ["pip gave no reason"])[-1]


def _keep_current(folder: Path, requirements: str) -> list[dict[str, Any]]:
    """Remove wheels that no current record names; return the records of all kinds of machines."""
    records = {path: read_json(path) for path in sorted(folder.glob("*.json"))}
    for path, record in records.items():
        if record["requirements"] != requirements:
            path.unlink()
    current = [r for r in records.values() if r["requirements"] == requirements]
    named = {wheel for record in current for wheel in record["wheels"]}
    for path in folder.glob("*.whl"):
        if path.name not in named:
            path.unlink()
    keys = ("system", "machine", "python", "missing")
    return [{key: record[key] for key in keys} for record in current]


# --- the page that learners read -----------------------------------------------------------------


def start_page(targets: Sequence[dict[str, Any]], *, mirror: bool) -> str:
    """Return START.md."""
    lines = [
        f"- Python {t['python']} on {t['system']} {t['machine']}"
        + (f" (**without** {', '.join(t['missing'])})" if t["missing"] else "")
        for t in targets
    ]
    machines = "\n".join(lines) or "- none: this folder was packed without packages"
    benchmarks = "`mirror/` holds the benchmarks; `GRATH_MIRROR` names it." if mirror else (
        "No benchmark mirror was packed: the course measures on its own probe and retention set."
    )  # fmt: skip
    return _START.format(machines=machines, benchmarks=benchmarks)


_START = """\
# The course, without network

1. Copy this whole folder to your own disk (a USB stick is slow, and some are read-only).
2. In a terminal, in the copied folder:

   ```console
   python3 install.py          # on Windows: py install.py
   ```

   It checks every file, makes `course/.venv` from `wheels/` and says how to start, all without
   network.
3. Start JupyterLab with the line that it printed, and open `00_start_here.ipynb`.

The packages here are for

{machines}

`install.py` says so if yours is another. Whoever made this folder can have tried only the kind of
machine that it was made on: try the others before the day.

## Late, or something was lost

With the Python of the environment (`course/.venv/bin/python`, on Windows
`course\\.venv\\Scripts\\python`), in this folder:

```console
course/.venv/bin/python -m grath_utils checkpoint --at 03 --from .
```

puts the state that notebook 03 starts from into `course/runs/`; `--at end` is the finished run.
Results of your own that do not fit to it are not overwritten: the command says so, and `--run-dir`
names another place.

## What is where

{benchmarks}

`model/` is the model cache; the environment knows it as `GRATH_CACHE`. The environment also sets
`HF_HUB_OFFLINE=1`, so that nothing waits for a network; set it to 0 to use the Hub from
here. If the folder moves, run `install.py` again.
"""
