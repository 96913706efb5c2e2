"""What TensorBoard reads is what the run directory says; trackers change no result."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import DPO, LORA, PAIRS

from grath_utils.config import Config, ModelConfig, load_config
from grath_utils.dpo import tracking
from grath_utils.dpo.round import train_round
from grath_utils.errors import ConfigError
from grath_utils.files import read_jsonl
from grath_utils.loop.run_dir import open_run
from grath_utils.loop.stages import evaluate_model, start_run


def scalars(folder: Path) -> dict[str, dict[int, float]]:
    """Return ``{tag: {step: value}}`` of the event files in a folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {
        tag: {event.step: event.value for event in events.Scalars(tag)}
        for tag in events.Tags()["scalars"]
    }


@pytest.fixture(scope="module")
def rounds(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same round without a tracker and with one."""
    base = ModelConfig(name=str(tiny_llama), dtype="float32", device="cpu")
    folders = {}
    for name in ("none", "tensorboard"):
        folders[name] = tmp_path_factory.mktemp(name)
        train_round(
            base,
            PAIRS[:4],
            PAIRS[4:],
            folders[name],
            dpo=replace(DPO, report_to=(name,)),
            lora=LORA,
            seed=0,
            progress=False,
        )
    return folders


def test_the_event_file_holds_the_training_log(rounds: dict[str, Path]) -> None:
    folder = rounds["tensorboard"]
    shown = scalars(folder / "tensorboard")
    rows = read_jsonl(folder / "training_log.jsonl")
    for split, prefix in (("train", "train"), ("held_out", "eval")):
        own = [row for row in rows if row["split"] == split]
        assert own
        for tag, key in (("loss", "loss"), ("rewards/margins", "margin")):
            expected = {row["step"]: row[key] for row in own}
            found = shown[f"{prefix}/{tag}"]
            assert found.keys() == expected.keys()
            assert list(found.values()) == pytest.approx(list(expected.values()), rel=1e-6)


def test_a_tracker_changes_no_result(rounds: dict[str, Path]) -> None:
    for name in ("training_log.jsonl", "adapter/adapter_model.safetensors"):
        plain, tracked = (rounds[kind] / name for kind in ("none", "tensorboard"))
        assert plain.read_bytes() == tracked.read_bytes()
    assert not (rounds["none"] / "tensorboard").exists()


def test_evaluations_are_scalars_too_and_a_tracker_may_join_later(
    tiny_llama: Path, tmp_path: Path
) -> None:
    questions = tmp_path / "questions.jsonl"
    rows = [{"id": f"q{i}", "question": f"What is thing number {i}?"} for i in range(8)]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    settings = {
        "model.name": str(tiny_llama),
        "model.dtype": "float32",
        "model.device": "cpu",
        "questions.source": str(questions),
        "questions.limit": None,
        "evaluation.limit": 4,
    }
    start_run(tmp_path / "run", load_config("smoke", settings))
    tracked = load_config("smoke", {**settings, "dpo.report_to": ["tensorboard"]})
    run = start_run(tmp_path / "run", tracked)
    result = evaluate_model(run, None, "probe", progress=False)
    shown = scalars(run.path / "evaluation" / "tensorboard")
    assert shown.keys() == {f"probe/{name}" for name in result["metrics"]}
    for name, metric in result["metrics"].items():
        assert shown[f"probe/{name}"] == {0: pytest.approx(metric["value"], rel=1e-6)}


def test_other_settings_still_belong_to_the_run(tmp_path: Path) -> None:
    config = Config()
    open_run(tmp_path / "run", config)
    open_run(tmp_path / "run", replace(config, dpo=replace(config.dpo, report_to=("tensorboard",))))
    with pytest.raises(ConfigError, match=r"dpo\.beta"):
        open_run(tmp_path / "run", replace(config, dpo=replace(config.dpo, beta=0.2)))


def test_trackers_that_cannot_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    tracking.check_trackers(["none"])
    tracking.check_trackers(["tensorboard"])
    with pytest.raises(ConfigError, match='"tensorbord"; did you mean "tensorboard"'):
        tracking.check_trackers(["tensorbord"])
    with pytest.raises(ConfigError, match="none beside others"):
        tracking.check_trackers(["tensorboard", "none"])
    monkeypatch.setattr(
        "transformers.integrations.integration_utils.is_tensorboard_available", lambda: False
    )
    with pytest.raises(ConfigError, match="not installed here: install tensorboard with pip"):
        tracking.check_trackers(["tensorboard"])
    assert tracking.trl_trackers(["tensorboard", "wandb"]) == ["wandb"]
    assert tracking.trl_trackers(["none"]) == "none"
