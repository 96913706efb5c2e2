"""The whole course in one folder that works with no network: for rooms with bad Wi-Fi.

::

    DIR/ START.md · install.py · manifest.json (checksums of everything)
         course/      this repository
         model/       the run's model, converted (GRATH_CACHE)
         wheels/      every package, for each kind of machine that was asked for
         checkpoints/NAME/  a finished run, to start at any notebook
         mirror/      the benchmarks (GRATH_MIRROR), if a mirror was named

Every file appears whole or not at all, and what is there already is not made again. The manifest is
marked as finished last, and ``install.py`` refuses a folder without that mark.
"""

from __future__ import annotations

import filecmp
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from grath_utils.config import OWN_QUESTIONS, Config
from grath_utils.engine.course_models import COURSE_MODELS, course_model_dir, pip_reason
from grath_utils.errors import FetchError, RunError, UsageError
from grath_utils.files import (
    atomic_path,
    check_output,
    notebooks_dir,
    read_json,
    sha256_file,
    user_path,
    write_json,
    write_text,
)
from grath_utils.loop.run_dir import Run
from grath_utils.loop.stages import run_stages
from grath_utils.workshop import set_up
from grath_utils.workshop.checkpoints import CHECKPOINTS

MANIFEST = "manifest.json"
PACKED = {  # what is read of a manifest again, as a form for files.read_json
    "files": dict,
    "targets": [{"name": str, "lock": str, "wheels": [Path], "missing": list}],
}
LOCK = "requirements.lock"
LEFT_OUT = {".git", ".venv", ".cache", "runs", "build", "dist", "__pycache__", "classroom"}
"""Folders that are not part of the course, for a checkout without git."""
STAGE_FILES = ("iter_*/**/*", "signals/*.json", "evaluation/*/*.json")
"""What is packed of a run, as patterns: not its notebooks, which name places on this machine."""
HERE = Path(__file__).parent

# --- machines ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """A kind of machine that wheels are packed for, as :mod:`platform` names it there."""

    system: str  # Linux, Windows, Darwin
    machine: str  # x86_64, AMD64, arm64, aarch64
    python: str  # such as 3.12
    tags: tuple[str, ...] = ()  # pip's platform tags; empty for the machine that packs

    @property
    def name(self) -> str:
        return f"{self.system}-{self.machine}-{self.python}".lower()

    @property
    def environment(self) -> dict[str, str]:
        """What conditions such as ``sys_platform == "win32"`` are evaluated with."""
        windows = self.system == "Windows"
        return {
            "sys_platform": "win32" if windows else self.system.lower(),
            "os_name": "nt" if windows else "posix",
            "platform_system": self.system,
            "platform_machine": self.machine,
            "python_version": self.python,
            "python_full_version": f"{self.python}.0",
        }

    def pins(self, lock: Path) -> list[str]:
        """Return the pins of requirements.lock that hold on such a machine.

        pip itself evaluates conditions for the machine that it runs on.
        """
        lines = (line.partition("#")[0] for line in set_up.without_checksums(lock).splitlines())
        return [
            f"{pin.name}{pin.specifier}"
            for pin in (Requirement(line) for line in lines if line.strip())
            if not pin.marker or pin.marker.evaluate(self.environment)
        ]


def this_machine() -> Target:
    """Return the machine that packs."""
    return Target(platform.system(), platform.machine(), "{}.{}".format(*sys.version_info))


def find_target(tag: str, python: str) -> Target:
    """Return what a platform tag of pip stands for, such as ``win_amd64``."""
    if not re.fullmatch(r"\d+\.\d+", python):
        raise UsageError(f'--python-version is "{python}"; it looks like 3.12')
    if found := re.fullmatch(r"win_(\w+)", tag):
        return Target("Windows", found[1].upper(), python, (tag,))
    if found := re.fullmatch(r"macosx_\d+_\d+_(\w+)", tag):
        return Target("Darwin", found[1], python, (tag,))
    if found := re.fullmatch(r"manylinux_2_(\d+)_(\w+)", tag):
        # A newer glibc runs what was built for an older one; pip must be told of each.
        older = [f"_2_{minor}" for minor in range(int(found[1]), 4, -1)] + ["2014", "2010"]
        tags = tuple(f"manylinux{version}_{found[2]}" for version in older)
        return Target("Linux", found[2], python, tags)
    raise UsageError(
        f'unknown platform "{tag}"; such as win_amd64, macosx_14_0_arm64, manylinux_2_28_x86_64'
    )


# --- the folder ----------------------------------------------------------------------------------


def make_classroom(
    to: str | Path,
    run: Run,
    *,
    targets: Sequence[Target] = (),
    mirror: Path | None = None,
    say: Callable[[str], None] = print,
) -> Path:
    """Make or complete a classroom folder, and return it.

    Stages that the run lacks are done first; it is packed as a checkpoint. The packages are those
    for each of ``targets``, besides what an earlier call collected for others.

    Raises:
        UsageError: the run cannot be repeated elsewhere, or the place is wrong.
        FetchError: the packages for this machine cannot be had.
        RunError: the disk is full.
    """
    folder, root = check_possible(to, run.config, mirror)
    run_stages(run, say=say)
    sources = _sources(root, run, mirror)
    record, lock = folder / MANIFEST, root / LOCK
    old = read_json(record, PACKED) if record.is_file() else {"targets": [], "files": {}}
    manifest = {**old, "finished": False, "files": dict.fromkeys([*old["files"], *sources])}
    write_json(record, manifest)
    say(f"Copying {len(sources)} files to {folder} ...")
    for name, source in sources.items():
        copy = folder / name
        if not (copy.is_file() and filecmp.cmp(source, copy, shallow=False)):
            with atomic_path(copy) as partial:
                shutil.copyfile(source, partial)
    packed = {
        entry["name"]: entry
        for entry in old["targets"]
        if targets and entry["lock"] == sha256_file(lock)
        if all((folder / "wheels" / wheel).is_file() for wheel in entry["wheels"])
    }
    for target in targets:
        if target.name not in packed or packed[target.name]["missing"]:
            packed[target.name] = collect_wheels(folder / "wheels", lock, target, say=say)
            write_json(record, {**manifest, "targets": [*packed.values()]})
    write_text(folder / "START.md", start_page(packed.values()))
    kept = {f"wheels/{wheel}" for entry in packed.values() for wheel in entry["wheels"]}
    files = {name: sha256_file(folder / name) for name in [*sources, "START.md", *sorted(kept)]}
    packed_before = {f"wheels/{wheel}" for entry in old["targets"] for wheel in entry["wheels"]}
    for name in {*manifest["files"], *packed_before} - {*files}:
        old_file = folder / name
        if old_file.is_file() and old_file.resolve().is_relative_to(folder):
            old_file.unlink()
    write_json(record, {"finished": True, "targets": [*packed.values()], "files": files})
    total = sum((folder / name).stat().st_size for name in files)
    say(f"{folder}: {len(files)} files, {total / 1e9:.2f} GB")
    return folder


def check_possible(to: str | Path, config: Config, mirror: Path | None) -> tuple[Path, Path]:
    """Return the folder to write and the checkout, if both place and run are fit for learners.

    Raises:
        UsageError: the place is not free, or a learner's machine could not open the run.
    """
    folder, root = user_path(to), (notebooks_dir() or HERE).parent
    model, source, prompt = config.model.name, config.questions.source, config.pairs.prompt_file

    def hold(good: Any, problem: str) -> None:
        if not good:
            raise UsageError(problem)

    hold((root / LOCK).is_file(), "the notebooks are not here: run this in a checkout")
    above = folder == root or folder in root.parents
    hold(not above, f"{folder} holds this checkout; name a folder of its own")
    free = not folder.is_dir() or (folder / MANIFEST).is_file() or not any(folder.iterdir())
    hold(free, f"{folder} is neither empty nor a classroom folder; choose another")
    check_output(folder / MANIFEST, read_json, ("finished", "targets", "files"))
    lacks = "which a classroom folder does not have"
    known = " or ".join(COURSE_MODELS)
    hold(model in COURSE_MODELS, f'the run uses the model "{model}", {lacks}: it can have {known}')
    packed = source in OWN_QUESTIONS or (mirror and source == "arc_challenge")
    hold(packed, f'the run takes its questions from "{source}", {lacks}; use questions.source=own')
    without = "leave pairs.prompt_file out"
    hold(not prompt, f"the run takes its prompt from {prompt}, {lacks}; {without}")
    make = "`grath mirror --to DIR` makes a mirror"
    hold(not mirror or any(mirror.rglob("*.jsonl")), f"{mirror} holds no benchmark; {make}")
    return folder, root


def _sources(root: Path, run: Run, mirror: Path | None) -> dict[str, Path]:
    """Return the files to copy, by the names that they get."""
    state = ["run.json", run.manifest.name, run.questions.name, run.report.name, *STAGE_FILES]
    model = course_model_dir(run.config.model.name)
    benchmarks = ("**/*.jsonl", "**/*.json", "**/*.md") if mirror else ()
    return {
        **_course_files(root),
        **_files_below(f"model/{model.name}", model, "*"),
        **_files_below(f"{CHECKPOINTS}/{Path(run.config.profile).stem}", run.path, *state),
        **_files_below("mirror", mirror or root, *benchmarks),
        "install.py": HERE / "classroom_install.py",
    }


def _course_files(root: Path) -> dict[str, Path]:
    """Return the repository's files: those that git knows, or all but the usual leftovers."""
    done = subprocess.run(["git", "ls-files", "-z"], capture_output=True, text=True, cwd=root)
    if done.returncode == 0 and done.stdout:
        return {f"course/{n}": root / n for n in done.stdout.split("\0") if (root / n).is_file()}
    found = _files_below("course", root, "**/*")
    return {name: path for name, path in found.items() if not LEFT_OUT & {*name.split("/")}}


def _files_below(name: str, folder: Path, *patterns: str) -> dict[str, Path]:
    """Return the files of a folder that match patterns, by the names that they get."""
    found = sorted({path for pattern in patterns for path in folder.glob(pattern)})
    return {
        f"{name}/{path.relative_to(folder).as_posix()}": path
        for path in found
        if path.is_file() and not path.name.startswith(".")
    }


def start_page(packed: Iterable[dict[str, Any]]) -> str:
    """Return START.md, the page that learners read."""
    machines = [
        "- Python {python} on {system} {machine}".format(**entry)
        + (f" (**without** {', '.join(entry['missing'])})" if entry["missing"] else "")
        for entry in packed
    ] or ["- none: this folder was packed without packages"]
    return (HERE / "START.md").read_text(encoding="utf-8").format(machines="\n".join(machines))


# --- wheels --------------------------------------------------------------------------------------


def collect_wheels(
    folder: Path, lock: Path, target: Target, *, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """Bring every package for a kind of machine into a folder; return its entry in the manifest.

    For this machine pip takes the CPU build of torch, and builds what exists as source only; where
    packages cannot be had, that is a FetchError. For others it takes wheels alone, and what could
    not be had is noted as ``missing``.
    """
    say(f"Packages for Python {target.python} on {target.system} {target.machine} ...")
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(".pip.*"):  # by a process that was killed
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=".pip.", dir=folder) as scratch:
        missing = (_fetch_elsewhere if target.tags else _fetch_here)(scratch, lock, target)
        wheels = sorted(path.name for path in Path(scratch).glob("*.whl"))
        for wheel in wheels:
            os.replace(Path(scratch, wheel), folder / wheel)
    if missing:
        say(f"  NOT to be had for {target.name}: {', '.join(missing)}")
    made = {"name": target.name, "lock": sha256_file(lock), "wheels": wheels, "missing": missing}
    return {**asdict(target), **made}


def _fetch_here(scratch: str, lock: Path, target: Target) -> list[str]:
    torch = set_up.torch_arguments(Path(sys.executable), cpu=True)
    versions = Path(scratch, "constraints.txt")
    versions.write_text(set_up.without_checksums(lock), encoding="utf-8")
    for wanted in (
        ["--no-deps", "--requirement", str(lock)],
        ["--constraint", str(versions), *torch],
    ):
        if reason := _pip("wheel", scratch, "--wheel-dir", scratch, *wanted):
            raise FetchError(f"the packages for this machine cannot be had: {reason}")
    return []


def _fetch_elsewhere(scratch: str, lock: Path, target: Target) -> list[str]:
    options = ["--no-deps", "--only-binary=:all:", "--dest", scratch, "--implementation", "cp"]
    options += ["--python-version", target.python]
    options += [word for tag in target.tags for word in ("--platform", tag)]
    pins, torch = target.pins(lock), [set_up.torch_pin()]
    if target.system == "Linux":  # the plain package would bring CUDA, several gigabytes
        torch += ["--index-url", os.environ.get("GRATH_TORCH_INDEX", set_up.CPU_INDEX)]
    # All at once is faster; one by one says which it was.
    together = not _pip("download", scratch, *options, *pins)
    wanted = [torch] if together else [*([pin] for pin in pins), torch]
    return [each[0] for each in wanted if _pip("download", scratch, *options, *each)]


def _pip(command: str, scratch: str, *arguments: str) -> str:
    """Run pip, which also finds the wheels collected so far; return why it failed, or nothing."""
    links = ["--find-links", scratch, "--find-links", str(Path(scratch).parent)]
    whole = [sys.executable, *set_up.PIP, command, *links, *arguments, "--quiet"]
    done = subprocess.run(whole, capture_output=True, text=True)
    if done.returncode == 0:
        return ""
    if "no space left" in done.stderr.lower():
        raise RunError("no space left on the disk; free some and run the same command again")
    return pip_reason(done.stderr)
