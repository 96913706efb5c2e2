"""Set-up: which torch is asked for on which machine, and how failures are said."""

from __future__ import annotations

import json
import subprocess
import tomllib
from pathlib import Path

import pytest

from grath_utils.workshop import set_up


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch):
    """Return a function that pretends to be a machine and returns what pip would be asked for."""
    monkeypatch.delenv("GRATH_TORCH_INDEX", raising=False)

    def pretend(system: str, *, gpu: bool = False, plan: list[str] | None = None) -> list[str]:
        monkeypatch.setattr(set_up.platform, "system", lambda: system)
        monkeypatch.setattr(set_up, "has_nvidia_gpu", lambda: gpu)

        def run(command, **kwargs):
            assert "--dry-run" in command
            if plan is None:
                return subprocess.CompletedProcess(command, 1, stdout="", stderr="no")
            report = {"install": [{"metadata": {"name": name}} for name in plan]}
            return subprocess.CompletedProcess(command, 0, stdout=json.dumps(report), stderr="")

        monkeypatch.setattr(set_up.subprocess, "run", run)
        return set_up.torch_arguments(Path("python"))

    return pretend


def test_plain_torch_where_plain_is_right(machine) -> None:
    plain = [set_up.torch_pin()]
    assert machine("Darwin") == plain
    assert machine("Windows") == plain
    assert machine("Linux", gpu=True, plan=["torch", "nvidia-cublas"]) == plain
    assert machine("Linux", plan=["filelock", "torch"]) == plain


@pytest.mark.parametrize("extra", ["nvidia-cudnn-cu13", "triton", "cuda-bindings", None])
def test_the_cpu_build_where_plain_would_bring_cuda(machine, extra: str | None) -> None:
    asked = machine("Linux", plan=["torch", extra] if extra else None)  # None: no plan was made
    assert asked == [set_up.torch_pin(), "--index-url", "https://download.pytorch.org/whl/cpu"]


def test_the_user_decides(machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine("Linux", plan=["torch", "triton"])
    monkeypatch.setenv("GRATH_TORCH_INDEX", "https://example.org/whl")
    assert set_up.torch_arguments(Path("python"))[1:] == ["--index-url", "https://example.org/whl"]


@pytest.mark.parametrize("version", [(3, 10, 4), (3, 15, 0)])
def test_another_python_is_told(monkeypatch: pytest.MonkeyPatch, version: tuple[int, ...]) -> None:
    monkeypatch.setattr(set_up.sys, "version_info", version)
    with pytest.raises(SystemExit, match="Python 3.11, 3.12, 3.13 or 3.14 is needed"):
        set_up.main([])


def test_the_pythons_are_those_of_the_package() -> None:
    project = tomllib.loads((set_up.ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    oldest, below = (f"{major}.{minor}" for major, minor in set_up.PYTHONS)
    assert project["requires-python"] == f">={oldest},<{below}"


@pytest.mark.parametrize(
    ("machine", "macos", "said"),
    [
        ("x86_64", "14.5", "no packages for Macs with an Intel processor"),
        ("arm64", "13.6", "needs macOS 14 or newer, this is 13.6"),
    ],
)
def test_a_mac_without_torch_is_told(monkeypatch, machine: str, macos: str, said: str) -> None:
    monkeypatch.setattr(set_up.platform, "system", lambda: "Darwin")
    monkeypatch.setattr(set_up.platform, "machine", lambda: machine)
    monkeypatch.setattr(set_up.platform, "mac_ver", lambda: (macos, ("", "", ""), machine))
    with pytest.raises(SystemExit, match=said):
        set_up.main([])
    monkeypatch.setattr(set_up.platform, "machine", lambda: "arm64")
    monkeypatch.setattr(set_up.platform, "mac_ver", lambda: ("26.1", ("", "", ""), "arm64"))
    assert set_up.unsuitable() is None


def test_uv_installs_where_it_is_and_pip_has_no_settings(monkeypatch) -> None:
    ran: list[list[str]] = []
    told = {"pip": ""}

    def run(command, **options):
        ran.append(command)
        return subprocess.CompletedProcess(command, 0, stdout=told["pip"])

    monkeypatch.setattr(set_up.subprocess, "run", run)
    for uv, told["pip"], program in (
        ("uv", "", "uv"),
        (None, "", str(set_up.python_of(set_up.VENV))),
        ("uv", "global.index-url='https://example.org'", str(set_up.python_of(set_up.VENV))),
    ):
        monkeypatch.setattr(set_up.shutil, "which", lambda name, uv=uv: uv)
        set_up.pip_install("--requirement", "requirements.txt")
        assert ran[-1][0] == program
        assert "--requirement" in ran[-1]


def test_a_python_without_venv_is_told(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(set_up, "VENV", tmp_path / ".venv")

    failed = subprocess.CompletedProcess([], 1, stdout="ensurepip is not available", stderr="")
    monkeypatch.setattr(set_up.subprocess, "run", lambda command, **options: failed)
    with pytest.raises(SystemExit, match="(?s)sudo apt install python3.*ensurepip is not availa"):
        set_up.main([])
    assert not (tmp_path / ".venv").exists()


def test_a_folder_of_something_else_stays(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(set_up, "VENV", tmp_path / ".venv")
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / "notes.txt").write_text("precious")
    with pytest.raises(SystemExit, match="is no virtual environment, so it stays"):
        set_up.main([])
    assert (tmp_path / ".venv" / "notes.txt").read_text() == "precious"


def test_a_failing_pip_is_told_and_leaves_no_stamp(tmp_path, monkeypatch) -> None:
    venv = tmp_path / ".venv"
    monkeypatch.setattr(set_up, "VENV", venv)
    monkeypatch.setattr(set_up, "make_venv", lambda: venv.mkdir(exist_ok=True))
    monkeypatch.setattr(set_up, "torch_arguments", lambda python: ["torch"])

    failed = subprocess.CompletedProcess([], 1)
    monkeypatch.setattr(set_up.shutil, "which", lambda name: None)
    monkeypatch.setattr(set_up.subprocess, "run", lambda command: failed)
    with pytest.raises(SystemExit, match="installing failed"):
        set_up.main([])
    assert list(venv.iterdir()) == []


def test_a_second_call_installs_nothing(tmp_path, monkeypatch) -> None:
    venv = tmp_path / ".venv"
    calls: list[tuple[str, ...]] = []
    monkeypatch.setattr(set_up, "VENV", venv)
    monkeypatch.setattr(set_up, "make_venv", lambda: venv.mkdir(exist_ok=True))
    monkeypatch.setattr(set_up, "torch_arguments", lambda python: ["torch==1"])
    monkeypatch.setattr(set_up, "pip_install", lambda *arguments: calls.append(arguments))
    set_up.main(["--dev"])
    asked = [" ".join(Path(part).name for part in call) for call in calls]
    assert asked == [
        "--no-deps --require-hashes --requirement requirements.lock",
        "torch==1",
        f"--no-deps --no-build-isolation --editable {set_up.ROOT.name}",
        "--requirement requirements-book.txt --constraint constraints.txt",
        "--requirement requirements-dev.txt --constraint constraints.txt",
    ]
    assert "--hash" not in (venv / "constraints.txt").read_text()
    calls.clear()
    set_up.main(["--dev"])
    set_up.main([])
    set_up.main(["--book"])
    assert calls == []
    for name in ("requirements.txt", "requirements.lock"):
        (tmp_path / name).write_bytes((set_up.ROOT / name).read_bytes())
    (tmp_path / "requirements.lock").open("a").write("# changed\n")
    monkeypatch.setattr(set_up, "ROOT", tmp_path)
    set_up.main([])
    assert len(calls) == 3
