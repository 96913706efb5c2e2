"""What TensorBoard reads is what the run directory says; trackers change no result."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest
from accelerate import tracking
from accelerate.tracking import GeneralTracker
from helpers import config_for
from tiny_rounds import one_round, scalars

from grath_utils.config import Config, ModelConfig
from grath_utils.dpo.tracking import check_trackers, write_scalars
from grath_utils.errors import ConfigError
from grath_utils.files import read_jsonl
from grath_utils.loop.run_dir import open_run
from grath_utils.loop.stages import evaluate_model, start_run


@pytest.fixture(scope="module")
def rounds(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same round without a tracker and with one."""
    base = ModelConfig(name=str(tiny_llama), dtype="float32", device="cpu")
    folders = {}
    for name in ("none", "tensorboard"):
        folders[name] = tmp_path_factory.mktemp(name)
        one_round(base, folders[name], report_to=(name,))
    return folders


def test_the_event_file_holds_the_training_log(rounds: dict[str, Path]) -> None:
    folder = rounds["tensorboard"]
    shown = scalars(folder / "tensorboard")
    rows = read_jsonl(folder / "training_log.jsonl")
    for split, prefix in (("train", "train"), ("held_out", "eval")):
        own = [row for row in rows if row["split"] == split]
        assert own
        for tag, key in (("loss", "loss"), ("rewards/margins", "margin")):
            steps, values = zip(*shown[f"{prefix}/{tag}"], strict=True)
            assert list(steps) == [row["step"] for row in own]
            assert list(values) == pytest.approx([row[key] for row in own], rel=1e-6)


def test_a_tracker_changes_no_result(rounds: dict[str, Path]) -> None:
    for name in ("training_log.jsonl", "adapter/adapter_model.safetensors"):
        plain, tracked = (rounds[kind] / name for kind in ("none", "tensorboard"))
        assert plain.read_bytes() == tracked.read_bytes()
    assert not (rounds["none"] / "tensorboard").exists()


def test_evaluations_are_scalars_too_and_a_tracker_may_join_later(
    tiny_llama: Path, tmp_path: Path, questions: Path
) -> None:
    config = config_for(tiny_llama, questions)
    start_run(tmp_path / "run", config)
    run = start_run(
        tmp_path / "run", replace(config, dpo=replace(config.dpo, report_to=("tensorboard",)))
    )
    results = evaluate_model(run, None, progress=False)
    shown = scalars(run.path / "evaluation" / "tensorboard")
    wanted = {f"{b}/{name}": m for b, r in results.items() for name, m in r["metrics"].items()}
    assert shown.keys() == wanted.keys()
    for name, metric in wanted.items():
        assert shown[name] == [(0, pytest.approx(metric["value"], rel=1e-6))]


def test_other_settings_still_belong_to_the_run(tmp_path: Path) -> None:
    config = Config()
    open_run(tmp_path / "run", config)
    open_run(tmp_path / "run", replace(config, dpo=replace(config.dpo, report_to=("tensorboard",))))
    with pytest.raises(ConfigError, match=r"dpo\.beta"):
        open_run(tmp_path / "run", replace(config, dpo=replace(config.dpo, beta=0.2)))


def test_trackers_that_cannot_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    check_trackers(["none"])
    check_trackers(["tensorboard"])
    with pytest.raises(ConfigError, match='"tensorbord"; did you mean "tensorboard"'):
        check_trackers(["tensorbord"])
    with pytest.raises(ConfigError, match="none beside others"):
        check_trackers(["tensorboard", "none"])
    monkeypatch.setattr("accelerate.tracking._available_trackers", [])
    with pytest.raises(ConfigError, match="not installed here: install tensorboard with pip"):
        check_trackers(["tensorboard"])


def test_a_tracker_of_another_kind_gets_the_same(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Notes(GeneralTracker):
        name, requires_logging_directory, tracker = "wandb", False, None
        seen: ClassVar[list] = []

        def __init__(self, project: str) -> None:
            super().__init__()
            self.seen.append(project)

        def log(self, values: dict, step: int | None = None, **options: object) -> None:
            self.seen.append((values, step))

        def finish(self) -> None:
            self.seen.append("finished")

    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "wandb", Notes)
    monkeypatch.setattr(tracking, "_available_trackers", ["wandb"])
    write_scalars(["wandb"], tmp_path, {"probe/mc1": 0.5}, step=2)
    assert Notes.seen == ["grath", ({"probe/mc1": 0.5}, 2), "finished"]
