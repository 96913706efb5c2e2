"""The classroom folder: packed, checked, and installed with no network, by real pip, from toys."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from grath_utils.config import load_config
from grath_utils.errors import FetchError, UsageError
from grath_utils.files import read_json, sha256_file, write_json
from grath_utils.loop.run_dir import Run
from grath_utils.loop.stages import start_run
from grath_utils.workshop import checkpoints, classroom, classroom_install, set_up
from grath_utils.workshop.classroom import collect_wheels, find_target, make_classroom

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]


def make_wheel(folder: Path, name: str, version: str, requires: tuple[str, ...] = ()) -> Path:
    """Write a tiny wheel that runs anywhere."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{version}-py3-none-any.whl"
    info = f"{name}-{version}.dist-info"
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    lines += [f"Requires-Dist: {line}" for line in requires]
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{name}.py", f"version = {version!r}\n")
        archive.writestr(f"{info}/METADATA", "\n".join(lines) + "\n")
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    return path


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package index of toys, the only one that pip may ask."""
    folder = tmp_path / "index"
    make_wheel(folder, "torch", "0.1")
    windows = ('toy_console>=1; sys_platform == "win32"', 'toy_never; extra == "never"')
    make_wheel(folder, "toy_lab", "1.0", (*windows, 'toy_cuda; sys_platform != "win32"'))
    make_wheel(folder, "toy_cuda", "2.0")
    make_wheel(folder, "toy_console", "1.2")
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.delenv("GRATH_TORCH_INDEX", raising=False)
    return folder


LOCK = """\
# What `make lock` would write
toy-lab==1.0
toy-console==1.2 ; sys_platform == "win32"
toy-cuda==2.0 ; sys_platform != "win32"
"""

# An in-tree build backend, so that nothing has to be there to install the toy course.
BACKEND = """\
import zipfile


def build_editable(folder, config_settings=None, metadata_directory=None):
    name = "toy_course-1.0-py3-none-any.whl"
    with zipfile.ZipFile(f"{folder}/{name}", "w") as archive:
        info = "toy_course-1.0.dist-info"
        metadata = "Metadata-Version: 2.1\\nName: toy_course\\nVersion: 1.0\\n"
        archive.writestr(f"{info}/METADATA", metadata)
        wheel = "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n"
        archive.writestr(f"{info}/WHEEL", wheel)
        archive.writestr(f"{info}/RECORD", "")
    return name
"""


@pytest.fixture
def course(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A toy checkout with the real set-up program."""
    root = tmp_path / "checkout"
    for name in ("grath_utils", "notebooks", "runs"):
        (root / name).mkdir(parents=True)
    (root / "requirements.txt").write_text("torch==0.1\ntoy_lab==1.0  # a comment\n")
    (root / "requirements.lock").write_text(LOCK)
    workshop = Path("grath_utils", "workshop")
    (root / workshop).mkdir()
    shutil.copy(ROOT / workshop / "set_up.py", root / workshop)
    (root / "notebooks" / "00_start_here.ipynb").write_text("{}")
    (root / "runs" / "private.txt").write_text("not to be packed")
    (root / "backend.py").write_text(BACKEND)
    (root / "pyproject.toml").write_text(
        '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
    )
    monkeypatch.setattr(set_up, "ROOT", root)
    monkeypatch.setattr(classroom, "notebooks_dir", lambda: root / "notebooks")
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    monkeypatch.setattr(classroom, "course_model_dir", lambda name: model)
    return root


@pytest.fixture
def run(tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A run that counts as finished, and whose model counts as the default one."""
    settings = {"model.name": str(tiny_llama), "model.dtype": "float32", "model.device": "cpu"}
    monkeypatch.setattr(classroom, "COURSE_MODELS", {str(tiny_llama): None})
    monkeypatch.setattr(classroom, "run_stages", lambda run, say: None)
    run = start_run(tmp_path / "run", load_config("smoke", settings))
    run.iteration(0).mkdir()
    run.pairs(0).write_text("{}\n")
    return run


def quiet(line: str) -> None:
    pass


# --- machines ------------------------------------------------------------------------------------


def test_platform_tags() -> None:
    windows = find_target("win_amd64", "3.12")
    assert (windows.system, windows.machine, windows.tags) == ("Windows", "AMD64", ("win_amd64",))
    mac = find_target("macosx_14_0_arm64", "3.13")
    assert (mac.system, mac.machine, mac.python) == ("Darwin", "arm64", "3.13")
    linux = find_target("manylinux_2_28_x86_64", "3.11")
    assert linux.machine == "x86_64"
    assert (linux.tags[0], linux.name) == ("manylinux_2_28_x86_64", "linux-x86_64-3.11")
    assert {"manylinux_2_17_x86_64", "manylinux2014_x86_64"} <= {*linux.tags}
    for tag, python in (("windows", "3.12"), ("win_amd64", "312"), ("macosx_arm64", "3.12")):
        with pytest.raises(UsageError):
            find_target(tag, python)


# --- wheels --------------------------------------------------------------------------------------


def test_wheels_for_another_machine_bring_what_only_it_needs(
    tmp_path: Path, index: Path, course: Path
) -> None:
    # Not to be had, and not needed there: as torch's CUDA packages are for Windows.
    (index / "toy_cuda-2.0-py3-none-any.whl").unlink()
    windows, lines = find_target("win_amd64", "3.12"), []
    lock = course / "requirements.lock"
    entry = collect_wheels(tmp_path / "wheels", lock, windows, say=lines.append)
    assert [name.split("-")[0] for name in entry["wheels"]] == ["torch", "toy_console", "toy_lab"]
    assert entry["missing"] == []
    mac = find_target("macosx_14_0_arm64", "3.12")
    entry = collect_wheels(tmp_path / "wheels", lock, mac, say=lines.append)
    assert entry["missing"] == ["toy-cuda==2.0"]
    assert "NOT to be had for darwin-arm64-3.12: toy-cuda==2.0" in lines[-1]
    assert [name.split("-")[0] for name in entry["wheels"]] == ["torch", "toy_lab"]
    page = classroom.start_page([entry])
    assert "Python 3.12 on Darwin arm64 (**without** toy-cuda==2.0)" in page
    if classroom.this_machine().system != "Windows":
        with pytest.raises(FetchError, match=r"packages for this machine cannot be had.*toy.cuda"):
            collect_wheels(tmp_path / "wheels", lock, classroom.this_machine(), say=quiet)
    assert not [p for p in (tmp_path / "wheels").iterdir() if p.name.startswith(".pip")]


def pinned(target: classroom.Target) -> dict[str, str]:
    """Return the locked version of each package on a kind of machine, torch's build apart."""
    pins = [pin.split("==") for pin in target.pins(ROOT / "requirements.lock")]
    versions = {canonicalize_name(name): version for name, version in pins}
    assert len(versions) == len(pins) > 100, "one version of each package"
    return versions


@cache
def requires(name: str) -> list[Requirement]:
    """Return what an installed package requires; nothing for one that is not installed."""
    try:
        return [*map(Requirement, distribution(name).requires or [])]
    except PackageNotFoundError:
        return []


def needed(environment: dict[str, str]) -> dict[str, list[Requirement]]:
    """Return what the course needs on a kind of machine, as far as the packages here tell.

    What is not installed here, such as Windows' own packages, is named but not followed.
    """
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    todo = [Requirement(line.partition("#")[0]) for line in lines if line[:1] not in ("", "#")]
    found: dict[str, list[Requirement]] = {}
    followed = set()
    while todo:
        wanted = todo.pop()
        name = canonicalize_name(wanted.name)
        found.setdefault(name, []).append(wanted)
        for extra in {"", *wanted.extras} - {extra for other, extra in followed if other == name}:
            followed.add((name, extra))
            values = {**environment, "extra": extra}
            todo += [r for r in requires(name) if not r.marker or r.marker.evaluate(values)]
    return found


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13", "3.14"])
@pytest.mark.parametrize("tag", ["win_amd64", "macosx_14_0_arm64", "manylinux_2_28_x86_64"])
def test_the_lock_has_what_each_machine_needs(tag: str, python: str) -> None:
    target = find_target(tag, python)
    versions = pinned(target)
    without = {
        "torch",
        *tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["uv"]["exclude-dependencies"],
    }
    for name, wanted in needed(target.environment).items():
        if name not in without:
            assert all(each.specifier.contains(versions[name]) for each in wanted), wanted
    assert not [name for name in versions if name.startswith(("nvidia", "cuda", "triton"))]
    assert ("pywinpty" in versions) == (target.system == "Windows")
    assert ("aiohttp" in versions) == (python == "3.12"), "papermill needs it on this one alone"


def test_what_is_installed_here_is_what_is_locked() -> None:
    here = classroom.this_machine()
    versions = pinned(here)
    for name in needed(here.environment):
        if name in versions:
            assert version(name) == versions[name], f"{name}: `make setup` is due"


def test_the_lock_is_that_of_the_requirements_for_every_patch_release() -> None:
    text = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    wanted = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    pins = {line.split()[0] for line in wanted if line[:1] not in ("", "#")} - {set_up.torch_pin()}
    assert pins <= set(re.findall(r"^[^\s#]+", text, re.MULTILINE))
    assert set_up.torch_pin() not in text, "its checksum depends on the build"
    assert not re.search(r"python_full_version [<>=!]+ '\d+\.\d+\.\d", text)


def test_every_pin_has_its_checksums() -> None:
    lock = ROOT / "requirements.lock"
    text = lock.read_text(encoding="utf-8").replace("\\\n", "")
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    assert len(lines) > 100
    assert all("--hash=sha256:" in line for line in lines)
    versions = set_up.without_checksums(lock).splitlines()
    assert [line.split("--hash")[0].strip() for line in lines] == [
        line for line in versions if not line.startswith("#")
    ]


def test_a_package_with_another_checksum_is_not_installed(
    tmp_path: Path, index: Path, course: Path, monkeypatch: pytest.MonkeyPatch, capfd
) -> None:
    monkeypatch.setattr(set_up, "VENV", course / ".venv")
    monkeypatch.setattr(set_up, "torch_arguments", lambda python: [set_up.torch_pin()])
    lock, digests = course / "requirements.lock", {p.stem: sha256_file(p) for p in index.iterdir()}
    lines = {
        f"{name}=={version}": f"{name}=={version} \\\n    --hash=sha256:{digests[stem]}"
        for stem in digests
        for name, version in [stem.split("-")[:2]]
        if name in ("toy_lab", "toy_cuda")
    }
    wrong = lines["toy_lab==1.0"].replace(digests["toy_lab-1.0-py3-none-any"], "0" * 64)
    lock.write_text("\n".join([wrong, lines["toy_cuda==2.0"]]) + "\n")
    with pytest.raises(SystemExit, match="installing failed"):
        set_up.install(dev=False)
    said = capfd.readouterr().err
    assert "toy_lab" in said.replace("-", "_")
    assert "THESE PACKAGES DO NOT MATCH THE HASHES" in said
    assert not [*(course / ".venv").rglob("toy_*")]
    lock.write_text("\n".join(lines.values()) + "\n")
    set_up.install(dev=False)
    assert [p.name for p in (course / ".venv").rglob("toy_lab.py")] == ["toy_lab.py"]


# --- the folder ----------------------------------------------------------------------------------


def test_packed_without_network_installed_without_network(
    tmp_path: Path, index: Path, course: Path, run: Run
) -> None:
    mirror = tmp_path / "mirror"
    (mirror / "mmlu").mkdir(parents=True)
    (mirror / "mmlu" / "dev.jsonl").write_text("{}\n")
    options = {"targets": [classroom.this_machine()], "mirror": mirror, "say": quiet}
    folder = make_classroom(tmp_path / "room", run, **options)
    assert {p.name for p in folder.iterdir()} == {
        "START.md", "install.py", "manifest.json",
        "course", "model", "wheels", "checkpoints", "mirror",
    }  # fmt: skip
    assert not (folder / "course" / "runs").exists()
    manifest = read_json(folder / "manifest.json")
    assert manifest["finished"] is True
    there = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert there - manifest["files"].keys() == {"manifest.json"}
    assert checkpoints.find_checkpoint(folder).pairs(0).read_text() == "{}\n"

    # A second call copies nothing, and one after a change what changed.
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("course/**/*") if p.is_file()}
    (course / "notebooks" / "00_start_here.ipynb").write_text('{"cells": []}')
    (course / "backend.py").rename(course / "backend2.py")
    make_classroom(folder, run, **options)
    assert not (folder / "course" / "backend.py").exists()
    changed = [p.name for p, time in before.items() if p.exists() and p.stat().st_mtime_ns != time]
    assert changed == ["00_start_here.ipynb"]
    (course / "backend2.py").rename(course / "backend.py")
    make_classroom(folder, run, **options)

    # No package index, no proxy that works: the folder alone.
    offline = {k: v for k, v in os.environ.items() if not k.startswith(("PIP_", "GRATH_", "HF_"))}
    offline |= {"PIP_CONFIG_FILE": os.devnull, "HTTPS_PROXY": "http://127.0.0.1:9"}
    install = [sys.executable, str(folder / "install.py")]
    done = subprocess.run(install, capture_output=True, text=True, env=offline)
    assert done.returncode == 0, done.stderr
    assert "-m jupyterlab" in done.stdout
    python = set_up.python_of(folder / "course" / ".venv")
    code = "import os, json, torch, toy_lab; print(json.dumps([torch.version, dict(os.environ)]))"
    said = subprocess.run([python, "-c", code], capture_output=True, text=True, env=offline)
    version, environment = json.loads(said.stdout)
    assert version == "0.1"
    assert environment["GRATH_CACHE"] == str(folder / "model")
    assert environment["GRATH_MIRROR"] == str(folder / "mirror")
    assert environment["HF_HUB_OFFLINE"] == "1"
    own = {**offline, "GRATH_CACHE": "elsewhere"}
    said = subprocess.run([python, "-c", code], capture_output=True, text=True, env=own)
    assert json.loads(said.stdout)[1]["GRATH_CACHE"] == "elsewhere"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder that install.py can judge."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    digest = classroom.sha256_file(tmp_path / "model" / "config.json")
    here = classroom.this_machine()
    targets = [{"system": here.system, "machine": here.machine, "python": here.python}]
    write_json(
        tmp_path / "manifest.json",
        {"finished": True, "targets": targets, "files": {"model/config.json": digest}},
    )
    return tmp_path


def test_a_damaged_or_unfinished_folder_is_refused(folder: Path) -> None:
    classroom_install.check(folder)
    for content in ("{x", "{ }"):
        (folder / "model" / "config.json").write_text(content)
        with pytest.raises(SystemExit, match=r"(?s)1 files .*config.json"):
            classroom_install.check(folder)
    write_json(folder / "manifest.json", {"finished": False})
    with pytest.raises(SystemExit, match="not packed to the end"):
        classroom_install.check(folder)
    for damaged in ("{", "[]", "3", "{}", '{"finished": true, "targets": [{}]}'):
        (folder / "manifest.json").write_text(damaged)
        with pytest.raises(SystemExit, match="no readable manifest"):
            classroom_install.check(folder)


def test_another_machine_is_told_what_there_is(folder: Path, monkeypatch) -> None:
    monkeypatch.setattr(classroom_install.platform, "machine", lambda: "riscv64")
    with pytest.raises(SystemExit, match=r"(?s)riscv64.*packages for: Python"):
        classroom_install.check(folder)
    write_json(folder / "manifest.json", {"finished": True, "targets": [], "files": {}})
    with pytest.raises(SystemExit, match="packed without packages"):
        classroom_install.check(folder)


def test_what_cannot_be_taken_elsewhere_is_refused(
    tmp_path: Path, course: Path, run: Run, tiny_llama: Path
) -> None:
    settings = {"model.name": str(tiny_llama), "questions.source": "arc_challenge"}
    with pytest.raises(UsageError, match='takes its questions from "arc_challenge"'):
        make_classroom(
            tmp_path / "room", Run(tmp_path / "r", load_config("smoke", settings)), say=quiet
        )
    settings = {"model.name": str(tiny_llama), "pairs.prompt_file": "mine.yaml"}
    with pytest.raises(UsageError, match="takes its prompt from mine.yaml"):
        classroom.check_possible(tmp_path / "room", load_config("smoke", settings), None)
    with pytest.raises(UsageError, match='uses the model "tiny"'):
        make_classroom(tmp_path / "room", Run(tmp_path / "r", load_config("smoke")), say=quiet)
    full = tmp_path / "full"
    full.mkdir()
    (full / "holiday.jpg").write_text("x")
    with pytest.raises(UsageError, match="is neither empty nor a classroom folder"):
        make_classroom(full, run, say=quiet)
    with pytest.raises(UsageError, match="holds this checkout"):
        make_classroom(course, run, say=quiet)
    with pytest.raises(UsageError, match="holds no benchmark"):
        make_classroom(tmp_path / "room", run, mirror=full, say=quiet)
    assert not (tmp_path / "room").exists()


def test_a_packing_that_was_stopped_is_resumed(
    tmp_path: Path, course: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*arguments: object, **more: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as stopped, pytest.raises(KeyboardInterrupt):
        stopped.setattr(classroom, "start_page", killed)
        make_classroom(tmp_path / "room", run, say=quiet)
    with pytest.raises(SystemExit, match="not packed to the end"):
        classroom_install.check(tmp_path / "room")
    there = {p: p.stat().st_mtime_ns for p in (tmp_path / "room" / "course").rglob("*.py")}
    old, own = tmp_path / "room" / "course" / "old.py", tmp_path / "room" / "wheels" / "own.whl"
    own.parent.mkdir()
    for path in (old, own, tmp_path / "notes.txt"):
        path.write_text("x")
    record = read_json(tmp_path / "room" / "manifest.json")
    record["files"] |= {"course/old.py": None, "../notes.txt": None, "wheels": None}
    write_json(tmp_path / "room" / "manifest.json", record)
    folder = make_classroom(tmp_path / "room", run, say=quiet)
    assert {p: p.stat().st_mtime_ns for p in there} == there
    assert not old.exists()  # packed by an earlier call, and no longer part of the course
    assert own.exists()
    assert (tmp_path / "notes.txt").exists()
    with pytest.raises(SystemExit, match="packed without packages"):
        classroom_install.check(folder)
    assert "START.md" in read_json(folder / "manifest.json")["files"]
