"""The loop's bookkeeping on a tiny model: one configuration, one model, one set of questions."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from grath_utils.artifacts import read_jsonl
from grath_utils.config import Config, load_config
from grath_utils.errors import ConfigError, RunError
from grath_utils.loop import (
    check_ready,
    evaluate_model,
    evaluated_iterations,
    load_model,
    run_pairs,
    run_questions,
    stages,
    start_run,
    train_iteration,
)


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    path = tmp_path / "questions.jsonl"
    rows = [{"id": f"q{i}", "question": f"What is thing number {i}?"} for i in range(8)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def config_for(model: Path, questions: Path, **more: object) -> Config:
    settings = {
        "model.name": str(model),
        "model.dtype": "float32",
        "model.device": "cpu",
        "questions.source": str(questions),
        "questions.limit": None,
        "evaluation.limit": 4,
        **more,
    }
    return load_config("smoke", settings)


def write_pairs(run, t: int) -> None:
    rows = [
        {"id": q.id, "question": q.text, "correct": f"It is {q.id}.", "incorrect": "It is lost.",
         "iteration": t}
        for q in run_questions(run)
    ]  # fmt: skip
    run.iteration(t).mkdir(exist_ok=True)
    run.pairs(t).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def test_questions_are_split_once_and_kept(tmp_path: Path, tiny_llama, questions) -> None:
    config = config_for(tiny_llama, questions)
    run = start_run(tmp_path / "run", config)
    rows = read_jsonl(run.questions)
    assert sorted(row["id"] for row in rows) == [f"q{i}" for i in range(8)]
    assert sum(row["split"] == "held_out" for row in rows) == 2
    before = run.questions.read_bytes()
    assert start_run(tmp_path / "run", config).questions.read_bytes() == before
    other_seed = load_config("smoke", {**_overrides(config)}, seed=1)
    other = start_run(tmp_path / "other", other_seed)
    assert {q.id for q in run_questions(other, "held_out")} | {
        q.id for q in run_questions(run, "held_out")
    } != {q.id for q in run_questions(run, "held_out")}


def _overrides(config: Config) -> dict[str, object]:
    plain = load_config(config.profile).flat()
    return {k: v for k, v in config.flat().items() if v != plain[k] and k != "profile"}


def test_changed_questions_are_noticed(tmp_path: Path, tiny_llama, questions) -> None:
    config = config_for(tiny_llama, questions)
    start_run(tmp_path / "run", config)
    with open(questions, "a", encoding="utf-8") as file:
        file.write('{"id": "q9", "question": "And this one?"}\n')
    with pytest.raises(ConfigError, match="the questions have changed since"):
        start_run(tmp_path / "run", config)


def test_changed_weights_are_noticed(tmp_path: Path, tiny_llama, questions) -> None:
    from conftest import make_tiny_llama

    model = tmp_path / "model"
    shutil.copytree(tiny_llama, model)
    config = config_for(model, questions)
    start_run(tmp_path / "run", config)
    shutil.rmtree(model)
    make_tiny_llama(model, seed=3)
    with pytest.raises(ConfigError, match="the base model's weights have changed since"):
        start_run(tmp_path / "run", config)


def test_an_unknown_benchmark_is_named_before_anything_is_made(
    tmp_path: Path, tiny_llama, questions
) -> None:
    config = config_for(tiny_llama, questions, **{"evaluation.benchmarks": ["probe", "retension"]})
    with pytest.raises(ConfigError, match='names "retension"; did you mean "retention"'):
        start_run(tmp_path / "run", config)
    assert not (tmp_path / "run").exists()


def test_the_plan_in_order(tmp_path: Path, tiny_llama, questions) -> None:
    run = start_run(tmp_path / "run", config_for(tiny_llama, questions))
    assert [stage.name for stage in stages(run)] == [
        "write pairs, iteration 0",
        "train, iteration 0",
        "write pairs, iteration 1",
        "train, iteration 1",
        "evaluate base on probe",
        "evaluate base on retention",
        "evaluate iter_0 on probe",
        "evaluate iter_0 on retention",
        "evaluate iter_1 on probe",
        "evaluate iter_1 on retention",
    ]
    assert not any(stage.done for stage in stages(run))
    config = load_config("smoke", "loop.iterations=4 evaluation.every_iteration=false")
    assert evaluated_iterations(config) == [None, 3]
    assert evaluated_iterations(load_config("smoke", "loop.iterations=1")) == [None, 0]


def test_training_sees_no_held_out_question(tmp_path: Path, tiny_llama, questions) -> None:
    run = start_run(tmp_path / "run", config_for(tiny_llama, questions))
    write_pairs(run, 0)
    train, held_out = run_pairs(run, 0)
    assert {p.id for p in held_out} == {q.id for q in run_questions(run, "held_out")}
    assert {p.id for p in train} == {q.id for q in run_questions(run, "train")}
    assert len(train) == 6


def test_two_rounds_and_their_evaluation(tmp_path: Path, tiny_llama, questions) -> None:
    run = start_run(tmp_path / "run", config_for(tiny_llama, questions))
    with pytest.raises(RunError, match="round 0 has not been trained"):
        load_model(run, 0)
    fingerprints = [load_model(run, None).fingerprint]
    for t in range(2):
        write_pairs(run, t)
        train_iteration(run, t, progress=False)
        fingerprints.append(load_model(run, t).fingerprint)
    assert len(set(fingerprints)) == 3
    result = evaluate_model(run, 1, "probe", progress=False)
    assert result["model"]["fingerprint"] == fingerprints[2]
    assert result["model"]["name"] == "run@1"
    assert run.evaluation("iter_1", "probe").exists()
    # What is done is read, not done again.
    run.evaluation("iter_1", "probe").write_text('{"read": true}')
    assert evaluate_model(run, 1, "probe", progress=False) == {"read": True}
    adapter = run.adapter(0) / "adapter_model.safetensors"
    before = adapter.stat().st_mtime_ns
    train_iteration(run, 0, progress=False)
    assert adapter.stat().st_mtime_ns == before


def test_what_is_missing_is_said_with_the_way_to_make_it(
    tmp_path: Path, tiny_llama, questions
) -> None:
    run = start_run(tmp_path / "run", config_for(tiny_llama, questions))
    with pytest.raises(RunError) as caught:
        check_ready(run, [run.questions, run.pairs(0)], "01_pair_generation")
    message = str(caught.value)
    assert "lacks iter_0/pairs.jsonl" in message
    assert "01_pair_generation" in message
    assert "python -m grath_utils run --profile smoke" in message
    write_pairs(run, 0)
    check_ready(run, [run.questions, run.pairs(0)], "01_pair_generation")
