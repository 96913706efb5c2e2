"""Set-up: which torch is asked for on which machine, and how failures are said."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from grath_utils.workshop import set_up as bootstrap


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch):
    """Return a function that pretends to be a machine and returns what pip would be asked for."""
    monkeypatch.delenv("GRATH_TORCH_INDEX", raising=False)

    def pretend(system: str, *, gpu: bool = False, plan: list[str] | None = None) -> list[str]:
        monkeypatch.setattr(bootstrap.platform, "system", lambda: system)
        monkeypatch.setattr(bootstrap, "has_nvidia_gpu", lambda: gpu)

        def run(command, **kwargs):
            assert "--dry-run" in command
            if plan is None:
                return subprocess.CompletedProcess(command, 1, stdout="", stderr="no")
            report = {"install": [{"metadata": {"name": name}} for name in plan]}
            return subprocess.CompletedProcess(command, 0, stdout=json.dumps(report), stderr="")

        monkeypatch.setattr(bootstrap.subprocess, "run", run)
        return bootstrap.torch_arguments()

    return pretend


def test_plain_torch_where_plain_is_right(machine) -> None:
    plain = [bootstrap.torch_pin()]
    assert machine("Darwin") == plain
    assert machine("Windows") == plain
    assert machine("Linux", gpu=True, plan=["torch", "nvidia-cublas"]) == plain
    assert machine("Linux", plan=["filelock", "torch"]) == plain


@pytest.mark.parametrize("extra", ["nvidia-cudnn-cu13", "triton", "cuda-bindings"])
def test_the_cpu_build_where_plain_would_bring_cuda(machine, extra: str) -> None:
    asked = machine("Linux", plan=["torch", extra])
    assert asked == [bootstrap.torch_pin(), "--index-url", bootstrap.CPU_INDEX]
    assert bootstrap.CPU_INDEX.endswith("/whl/cpu")


def test_the_cpu_build_where_the_plan_cannot_be_made(machine) -> None:
    assert bootstrap.CPU_INDEX in machine("Linux", plan=None)


def test_the_user_decides(machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine("Linux", plan=["torch", "triton"])
    monkeypatch.setenv("GRATH_TORCH_INDEX", "https://example.org/whl")
    assert bootstrap.torch_arguments()[1:] == ["--index-url", "https://example.org/whl"]


def test_an_old_python_is_told(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(bootstrap.sys, "version_info", (3, 10, 4))
    assert bootstrap.main([]) == 1
    assert "Python 3.11 or newer is needed" in capsys.readouterr().err


def test_a_python_without_venv_is_told(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(bootstrap, "VENV", tmp_path / ".venv")

    def run(command, **kwargs):
        return subprocess.CompletedProcess(
            command, 1, stdout="ensurepip is not available", stderr=""
        )

    monkeypatch.setattr(bootstrap.subprocess, "run", run)
    assert bootstrap.main([]) == 1
    message = capsys.readouterr().err
    assert "sudo apt install python3" in message
    assert "ensurepip is not available" in message
    assert not (tmp_path / ".venv").exists()


def test_a_failing_pip_is_told_and_leaves_no_stamp(tmp_path, monkeypatch, capsys) -> None:
    venv = tmp_path / ".venv"
    monkeypatch.setattr(bootstrap, "VENV", venv)
    monkeypatch.setattr(bootstrap, "make_venv", lambda: venv.mkdir(exist_ok=True))
    monkeypatch.setattr(bootstrap, "torch_arguments", lambda: ["torch"])

    def run(command, **kwargs):
        raise subprocess.CalledProcessError(1, command)

    monkeypatch.setattr(bootstrap.subprocess, "run", run)
    assert bootstrap.main([]) == 1
    assert "installing failed" in capsys.readouterr().err
    assert list(venv.iterdir()) == []


def test_a_second_call_installs_nothing(tmp_path, monkeypatch) -> None:
    venv = tmp_path / ".venv"
    calls: list[tuple[str, ...]] = []
    monkeypatch.setattr(bootstrap, "VENV", venv)
    monkeypatch.setattr(bootstrap, "make_venv", lambda: venv.mkdir(exist_ok=True))
    monkeypatch.setattr(bootstrap, "torch_arguments", lambda: ["torch==1"])
    monkeypatch.setattr(bootstrap, "pip", lambda *arguments: calls.append(arguments))
    assert bootstrap.main(["--dev"]) == 0
    asked = [" ".join(Path(part).name for part in call) for call in calls]
    assert asked == [
        "install torch==1",
        "install --requirement requirements.txt",
        f"install --no-deps --no-build-isolation --editable {bootstrap.ROOT.name}",
        "install --requirement requirements-dev.txt",
    ]
    calls.clear()
    assert bootstrap.main(["--dev"]) == 0
    assert bootstrap.main([]) == 0
    assert calls == []
    monkeypatch.setattr(bootstrap, "fingerprint", lambda name: "the list has changed")
    assert bootstrap.main([]) == 0
    assert len(calls) == 3
