"""Two processes (gloo, CPU) do what one does: the same pairs, gradients and metrics."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from grath_utils.cli import main
from grath_utils.engine import processes
from grath_utils.errors import DataError, UsageError
from grath_utils.files import read_json, read_jsonl

pytestmark = pytest.mark.slow

HERE = Path(__file__).resolve().parent
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2"]
LAUNCH += ["--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"]
LAUNCH += ["--main_process_port=0"]  # a free one


def launch(monkeypatch: pytest.MonkeyPatch, rank: int, size: int, **more: str) -> None:
    """Set what a launcher sets in one of its processes."""
    where = {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": "0", "MASTER_ADDR": "here"}
    for name, value in (where | more).items():
        monkeypatch.setenv(name, value)


def test_alone_there_is_nothing_to_agree_on() -> None:
    assert (processes.size(), processes.rank(), processes.is_main()) == (1, 0, True)
    assert processes.gather("x") == ["x"]
    assert processes.from_main("x") == processes.on_main(lambda: "x") == "x"
    assert list(processes.in_turns([1, 2], lambda n: n * n)) == [(1, 1), (2, 4)]
    assert processes.own_share([1, 2, 3]) == ([1, 2, 3], 3)
    with pytest.raises(DataError, match="as it is"):
        processes.on_main(lambda: (_ for _ in ()).throw(DataError("as it is")))


def test_the_share_of_each_process(monkeypatch: pytest.MonkeyPatch) -> None:
    shares = []
    for rank in range(3):
        launch(monkeypatch, rank, 3)
        shares.append(processes.own_share(list(range(7))))
    assert shares == [([0, 1, 2], 3), ([3, 4], 3), ([5, 6], 3)]
    assert processes.own_share([]) == ([], 0)


@pytest.fixture(scope="module")
def settings(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A tiny run: 11 pairs train in batches of 4, so that each epoch ends with a step of 3."""
    path = tmp_path_factory.mktemp("questions") / "questions.jsonl"
    rows = [{"id": f"q{i}", "question": f"What is thing number {i}?"} for i in range(15)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return f"""model.name={tiny_llama} model.dtype=float32 model.device=cpu
        questions.source={path} questions.limit=null
        pairs.filters=[none] pairs.shots=1 pairs.max_new_tokens=24 pairs.batch_size=4
        dpo.steps=5 dpo.learning_rate=0.01 dpo.evaluate_every=4 loop.iterations=1
        evaluation.limit=8 evaluation.bootstrap=100""".split()


@pytest.fixture(scope="module")
def one(settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRATH_CACHE", str(folder / "cache"))
        assert main(command(folder / "run", settings)) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def two(settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    outside = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "GRATH_RUN_LOCK")
    environment = {k: v for k, v in os.environ.items() if k not in outside}
    environment |= {
        "GRATH_CACHE": str(folder / "cache"),  # nothing computed by the other run
        "PYTHONPATH": str(HERE.parents[1]),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    arguments = command(folder / "run", settings)
    done = subprocess.run(
        [*LAUNCH, str(HERE / "two_processes.py"), str(folder / "seen.json"), *arguments],
        capture_output=True, text=True, env=environment, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (folder / "out.txt").write_text(done.stdout, encoding="utf-8")
    return folder / "run"


def command(run: Path, settings: list[str]) -> list[str]:
    where = ["--no-notebooks", "--profile", "smoke", "--run-dir", str(run)]
    return ["run", *where, "--set", *settings]


def test_two_processes_agree(two: Path) -> None:
    agreed = {
        "gathered": [0, 1],
        "from main": 0,
        "on main": [0, 1],  # whoever works for all works as if alone
        "in turns": [["a", "a by 0 of 1"], ["b", "b by 1 of 1"], ["c", "c by 0 of 1"]],
        "error on main": "DataError: found by process 0",
        "error elsewhere": "DataError: found by process 1",
    }
    main_one, other = read_json(two.parent / "seen.json")
    for name, value in agreed.items():
        assert main_one[name] == other[name] == value, name
    assert [main_one["share"], other["share"]] == [[[0, 1, 2], 3], [[3, 4], 3]]
    assert main_one["whole again"], "what FSDP has split is saved whole"
    assert main_one["locked"]
    assert all("in use by another process" in seen["stranger"] for seen in (main_one, other))


def test_the_same_pairs_byte_for_byte(one: Path, two: Path) -> None:
    assert read_json(two / "run.json")["device"]["processes"] == 2
    for name in ("questions.jsonl", "iter_0/pairs.jsonl", "iter_0/rejects.jsonl"):
        assert (two / name).read_bytes() == (one / name).read_bytes(), name


def test_the_same_training(one: Path, two: Path) -> None:
    logs = [read_jsonl(run / "iter_0" / "training_log.jsonl") for run in (one, two)]
    assert len(logs[0]) == len(logs[1])
    for first, second in zip(*logs, strict=True):
        assert first.keys() == second.keys()
        for key in first.keys() - {"split", "accuracy"}:  # accuracy is a coin at margin 0
            assert second[key] == pytest.approx(first[key], rel=1e-4, abs=1e-4), (first, key)
    weights = [load_file(run / "iter_0/adapter/adapter_model.safetensors") for run in (one, two)]
    assert weights[0].keys() == weights[1].keys()
    for name, tensor in weights[0].items():
        assert tensor.abs().max() > 0
        assert (tensor - weights[1][name]).abs().max() < 1e-4, name
    assert not (two / "iter_0" / "checkpoints").exists()


def test_the_same_metrics(one: Path, two: Path) -> None:
    for name in ("probe", "retention"):
        base = [read_json(run / "evaluation" / "base" / f"{name}.json") for run in (one, two)]
        assert base[0]["items"] == base[1]["items"], "the same passes, whoever makes them"
        assert base[0]["metrics"] == base[1]["metrics"]
        tuned = [read_json(run / "evaluation" / "iter_0" / f"{name}.json") for run in (one, two)]
        for first, second in zip(tuned[0]["items"], tuned[1]["items"], strict=True):
            assert second["scores"] == pytest.approx(first["scores"], abs=1e-2)
    assert not list(two.rglob("*.partial.jsonl"))


def test_only_the_main_process_speaks(two: Path) -> None:
    out = (two.parent / "out.txt").read_text(encoding="utf-8")
    assert out.count("write pairs, round 1") == 1
    assert out.count("Report:") == 1


def test_the_first_version_of_fsdp_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not processes.sharded()
    launch(monkeypatch, 0, 2, ACCELERATE_USE_FSDP="true", FSDP_VERSION="2")
    assert processes.sharded()
    monkeypatch.setenv("FSDP_VERSION", "1")
    with pytest.raises(UsageError, match="FSDP 2 only"):
        processes.sharded()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "--profile", "smoke"], "several processes cannot share a notebook's kernel"),
        (["status", "--run-dir", "x"], "this command runs in one process"),
    ],
)
def test_what_several_processes_cannot_do(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, arguments, message
) -> None:
    launch(monkeypatch, 0, 2)
    assert main(arguments) == 2
    assert message in capsys.readouterr().err
