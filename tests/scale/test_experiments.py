"""Rounds beside a run: found again where nothing changed, and never taken for another."""

from __future__ import annotations

from pathlib import Path

import pytest

from grath_utils.config import DPOConfig, LoraConfig, ModelConfig, load_config
from grath_utils.loop.run_dir import open_run
from grath_utils.pairs import Pair, relabelled
from grath_utils.scale import experiments


def test_a_round_is_trained_once_for_each_set_of_labels(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = open_run(tmp_path / "run", load_config("smoke"))
    pairs = [Pair(f"q{i}", f"What is {i}?", f"It is {i}.", f"It is {i + 1}.") for i in range(4)]
    how = {
        "model": ModelConfig(name=str(tiny_llama), dtype="float32", device="cpu"),
        "dpo": DPOConfig(steps=1, warmup_steps=0, batch_size=4, learning_rate=0.05),
        "lora": LoraConfig(r=2),
        "seed": 0,
    }
    first = experiments.trained_beside(run, pairs, **how)
    turned = experiments.trained_beside(run, relabelled(pairs, "own", 1.0, 0), **how)
    assert not first.is_base
    assert first.fingerprint != turned.fingerprint
    assert len(list((run.path / "what_matters").iterdir())) == 2

    def refuse(*args: object, **options: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(experiments, "train_round", refuse)
    assert experiments.trained_beside(run, pairs, **how).fingerprint == first.fingerprint
    with pytest.raises(AssertionError, match="trained again"):  # another seed is another round
        experiments.trained_beside(run, pairs, **{**how, "seed": 1})
