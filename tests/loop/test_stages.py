"""The loop's bookkeeping on a tiny model: one configuration, one model, one set of questions."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import config_for, make_tiny_llama, write_pairs

from grath_utils.config import PairsConfig
from grath_utils.course import choice_line
from grath_utils.dpo.data import tokenize_pairs
from grath_utils.dpo.drift import kl_per_token
from grath_utils.errors import CollapseError, ConfigError, DataError, RunError
from grath_utils.files import read_json, read_jsonl, write_json, write_jsonl
from grath_utils.loop import stages
from grath_utils.loop.run_dir import Run, load_run, model_label
from grath_utils.loop.stages import (
    check_ready,
    evaluate_model,
    load_model,
    plan_stages,
    run_pairs,
    run_questions,
    run_stages,
    start_run,
    train_iteration,
)
from grath_utils.loop.state import run_state
from grath_utils.pairs import read_pairs


@pytest.fixture
def run(tmp_path: Path, tiny_llama: Path, questions: Path) -> Run:
    """A run of two rounds that was started and no more."""
    return start_run(tmp_path / "run", config_for(tiny_llama, questions))


@pytest.fixture
def long_run(tmp_path: Path, tiny_llama: Path, questions: Path) -> Run:
    """One of four rounds that is to keep the best, and whose base model was measured."""
    settings = {"loop.iterations": 4, "loop.keep": "best", "loop.early_stop": True}
    run = start_run(tmp_path / "long", config_for(tiny_llama, questions, **settings))
    write_signals(run, None, 0.0)
    return run


def with_loop(run: Run, **settings: object) -> Run:
    """Return the same run directory as one of another configuration would be."""
    return replace(run, config=replace(run.config, loop=replace(run.config.loop, **settings)))


def write_signals(run: Run, t: int | None, gain: float, **health: float) -> None:
    """Leave the signals of a round that gained ``gain`` nats on each held-out pair."""
    ids = [q.id for q in run_questions(run, "held_out")]
    fine = {"words": 12.0, "distinct": 0.8, "repetition": 0.0, "non_answers": 0.0}
    signals = {
        "pairs": ids,
        "chosen": [-9.0 + gain] * len(ids),
        "rejected": [-9.0] * len(ids),
        "kl": [0.1] * len(ids),
        "health": {**fine, **health},
    }
    write_json(run.signals(model_label(t)), signals)


def test_questions_are_split_once_and_kept(run: Run, tmp_path: Path) -> None:
    rows = read_jsonl(run.questions)
    assert sorted(row["id"] for row in rows) == [f"q{i}" for i in range(8)]
    assert sum(row["split"] == "held_out" for row in rows) == 2
    before = run.questions.read_bytes()
    assert start_run(run.path, run.config).questions.read_bytes() == before
    other = start_run(tmp_path / "other", replace(run.config, seed=1))
    assert run_questions(other, "held_out") != run_questions(run, "held_out")


def test_changed_questions_are_noticed(run: Run, questions: Path) -> None:
    with open(questions, "a", encoding="utf-8") as file:
        file.write('{"id": "q9", "question": "And this one?"}\n')
    with pytest.raises(ConfigError, match="the questions have changed since"):
        start_run(run.path, run.config)


def test_a_changed_prompt_is_noticed(tmp_path: Path, tiny_llama, questions) -> None:
    prompt = tmp_path / "prompt.yaml"
    prompt.write_text("instruction: About {question}", encoding="utf-8")
    paper = {"pairs.mode": "paper", "pairs.shots": 0, "pairs.prompt_file": str(prompt)}
    config = config_for(tiny_llama, questions, **paper)
    for _ in range(2):
        start_run(tmp_path / "run", config)
    prompt.write_text("instruction: On {question}", encoding="utf-8")
    with pytest.raises(ConfigError, match="the file of pairs.prompt_file has changed since"):
        start_run(tmp_path / "run", config)


@pytest.mark.parametrize(("fallback", "given"), [("newest", 1), ("first", 0)])
def test_where_refinement_fails_the_newest_or_the_first_answer_stays(
    run: Run, monkeypatch: pytest.MonkeyPatch, fallback: str, given: int
) -> None:
    run = replace(run, config=replace(run.config, pairs=PairsConfig(fallback=fallback)))
    for t in (0, 1):
        write_pairs(run, t)
    seen: list[object] = []
    monkeypatch.setattr(stages, "load_model", lambda *_: None)
    monkeypatch.setattr(stages, "generate_pairs", lambda *_, previous, **__: seen.append(previous))
    monkeypatch.setattr(stages, "_record", lambda *_: None)
    stages.make_pairs(run, 2)
    assert seen == [read_pairs(run.pairs(given))]


def test_changed_weights_are_noticed(tmp_path: Path, tiny_llama, questions) -> None:
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
    with pytest.raises(ConfigError, match='benchmark "retension"; did you mean "retention"'):
        start_run(tmp_path / "run", config)
    assert not (tmp_path / "run").exists()


def test_how_much_is_quantized_is_recorded_and_said(
    tmp_path: Path, tiny_llama: Path, questions: Path
) -> None:
    config = config_for(tiny_llama, questions, **{"model.quantization": "nf4"})
    run = start_run(tmp_path / "run", config)
    # In each of two layers q and o of 64 x 64, k and v of 32 x 64, and three of 128 x 64.
    counts = {"matrices": 14, "of_matrices": 14, "weights": 73728, "of_weights": 73728}
    assert run.info()["quantized"] == counts
    assert run.quantization() == "nf4 (14 of 14 matrices, 100.0 % of their weights)"
    assert evaluate_model(run, None, progress=False)["probe"]["model"]["quantized"] == counts
    older = {key: value for key, value in run.info().items() if key != "quantized"}
    write_json(run.path / "run.json", older)
    assert start_run(run.path, config).quantization() == "nf4"


def test_the_plan_in_order(run: Run) -> None:
    assert [(stage.id, stage.title) for stage in plan_stages(run)] == [
        ("pairs_0", "write pairs, round 1"),
        ("measure_base", "measure base on held-out pairs"),
        ("train_0", "train, round 1"),
        ("measure_iter_0", "measure on held-out pairs after round 1"),
        ("pairs_1", "write pairs, round 2"),
        ("train_1", "train, round 2"),
        ("measure_iter_1", "measure on held-out pairs after round 2"),
        ("evaluate_base_probe", "evaluate base on probe"),
        ("evaluate_base_retention", "evaluate base on retention"),
        ("evaluate_iter_0_probe", "evaluate after round 1 on probe"),
        ("evaluate_iter_0_retention", "evaluate after round 1 on retention"),
        ("evaluate_iter_1_probe", "evaluate after round 2 on probe"),
        ("evaluate_iter_1_retention", "evaluate after round 2 on retention"),
    ]
    assert not any(stage.done for stage in plan_stages(run))
    assert run_state(with_loop(run, iterations=1)).evaluated == (None, 0)


def test_a_round_without_gain_ends_the_loop_and_the_best_is_kept(long_run: Run) -> None:
    assert run_state(long_run).choice is None
    for t, gain in enumerate([1.0, 3.0]):
        write_signals(long_run, t, gain)
        assert run_state(long_run).planned == range(4)
    write_signals(long_run, 2, 2.0)
    state = run_state(long_run)
    assert state.planned == range(3)
    assert state.final == 1
    assert state.evaluated == (None, 0, 1, 2)
    assert not any("3" in stage.id for stage in plan_stages(long_run))
    assert "did not raise" in state.choice.stop
    settings = replace(long_run.config.evaluation, every_iteration=False)
    fewer = replace(long_run, config=replace(long_run.config, evaluation=settings))
    assert run_state(fewer).evaluated == (None, 1, 2)


def test_a_first_round_below_the_base_ends_the_loop(long_run: Run) -> None:
    write_signals(long_run, 0, -0.2)
    state = run_state(long_run)
    assert (state.planned, state.choice.iteration) == (range(1), None)
    line = choice_line(long_run)
    assert "so the base model is kept; stopped early, round 1 did not raise" in line
    assert "stopped early" not in choice_line(with_loop(long_run, iterations=1))


def test_the_paper_s_rule_keeps_the_last_and_never_stops(long_run: Run) -> None:
    run = with_loop(long_run, keep="last", early_stop=False)
    for t, gain in enumerate([3.0, 2.0, 1.0]):
        write_signals(run, t, gain)
    assert run_state(run).planned == range(4)
    assert run_state(run).final == 3
    write_signals(run, 3, 0.5, non_answers=0.9)
    state = run_state(run)
    assert state.final == 3
    assert state.choice.alarms[3]
    assert state.choice.stop is None


def test_without_signals_nothing_is_measured_and_the_last_round_stands(run: Run) -> None:
    without = with_loop(run, keep="last", early_stop=False, signals=False)
    stages = [stage.id for stage in plan_stages(without)]
    assert stages == [s.id for s in plan_stages(run) if not s.id.startswith("measure")]
    assert len(stages) == len(plan_stages(run)) - 3  # the base and two rounds
    assert run_state(without).choice is None
    assert run_state(without).final == 1


def test_a_later_round_that_collapses_ends_the_loop_before_it(
    long_run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    for t in range(3):
        write_pairs(long_run, t)

    def collapses(*given: object, **named: object) -> None:
        raise CollapseError("at step 7 the chosen answers have lost 400 nats")

    monkeypatch.setattr("grath_utils.loop.stages.train_round", collapses)
    with pytest.raises(CollapseError):
        train_iteration(long_run, 0, progress=False)  # nothing to fall back on
    assert not long_run.collapsed(0).exists()
    write_signals(long_run, 0, 1.0)
    for _ in range(2):  # the second time it is left alone
        train_iteration(long_run, 1, progress=False)
    assert not long_run.adapter(1).exists()
    state = run_state(long_run)
    assert state.planned == range(1)
    assert state.final == 0
    assert state.choice.stop.startswith("round 2 collapsed: at step 7")
    with pytest.raises(CollapseError):
        train_iteration(with_loop(long_run, early_stop=False), 2, progress=False)


def test_edited_signals_are_named(long_run: Run) -> None:
    write_json(long_run.signals("iter_0"), {"pairs": []})
    with pytest.raises(DataError, match=r'iter_0.json: "chosen" is None; expected a list.*delete'):
        plan_stages(long_run)


# --- touched by hand -----------------------------------------------------------------------------


def test_what_was_changed_by_hand_is_noticed(run: Run) -> None:
    write_pairs(run, 0)
    train_iteration(run, 0, progress=False)
    for path, change in (
        (run.training_log(0), lambda p: p.write_text(p.read_text()[:-9])),
        (run.adapter(0) / "adapter_model.safetensors", lambda p: p.write_bytes(b"")),
        (run.adapter(0) / "grath.json", lambda p: p.unlink()),
    ):
        kept = path.read_bytes()
        change(path)
        for opened in (lambda: start_run(run.path, run.config), lambda: load_run(run.path)):
            with pytest.raises(RunError, match="is not as it was made: .* Restore it, or delete"):
                opened()
        path.write_bytes(kept)
        assert load_run(run.path) == run
    run.manifest.write_text('{"iter_0/adapter": 3}')
    with pytest.raises(RunError, match="manifest.json is damaged. Delete it"):
        load_run(run.path)
    run.manifest.unlink()
    assert start_run(run.path, run.config) == run


@pytest.mark.slow
def test_what_was_deleted_is_made_again_the_same(run: Run) -> None:
    write_pairs(run, 0)
    train_iteration(run, 0, progress=False)
    made = run.manifest.read_bytes()
    shutil.rmtree(run.adapter(0))
    train_iteration(start_run(run.path, run.config), 0, progress=False)
    assert run.manifest.read_bytes() == made


@pytest.mark.slow
def test_what_a_killed_process_had_made_and_not_noted_is_noted(run: Run) -> None:
    short = with_loop(run, iterations=1)
    write_pairs(short, 0)
    run.manifest.unlink()  # as if killed right after each file
    run_stages(short, progress=False, say=lambda line: None)
    noted = read_json(run.manifest)
    assert {"questions.jsonl", "iter_0/pairs.jsonl", "iter_0/adapter"} <= noted.keys()


def test_what_no_longer_fits_is_named(run: Run) -> None:
    write_pairs(run, 0)
    train_iteration(run, 0, progress=False)
    write_pairs(run, 1)
    shutil.rmtree(run.adapter(0))
    # As if another machine, with other rounding, had made it again.
    rows = read_jsonl(run.pairs(0))
    write_jsonl(run.pairs(0), [{**row, "correct": "It is another."} for row in rows])
    with pytest.raises(RunError, match="was made again and is not the same.* Delete iter_1/pairs"):
        train_iteration(run, 0, progress=False)


def test_training_sees_no_held_out_question(run: Run) -> None:
    write_pairs(run, 0)
    train, held_out = run_pairs(run, 0)
    assert {p.id for p in held_out} == {q.id for q in run_questions(run, "held_out")}
    assert {p.id for p in train} == {q.id for q in run_questions(run, "train")}
    assert len(train) == 6


@pytest.mark.parametrize(
    ("chain", "loaded"), [("continue", [None, 0, 1]), ("merge", [None, 0, 1, None])]
)
def test_a_round_is_measured_with_one_model_unless_its_base_is_gone(
    tmp_path: Path,
    tiny_llama: Path,
    questions: Path,
    monkeypatch: pytest.MonkeyPatch,
    chain: str,
    loaded: list[int | None],
) -> None:
    run = start_run(tmp_path / "run", config_for(tiny_llama, questions, **{"dpo.chain": chain}))
    for t in range(2):
        write_pairs(run, t)
        train_iteration(run, t, progress=False)
    base, seen = load_model(run, None), []
    with monkeypatch.context() as patch:
        patch.setattr(stages, "load_model", lambda run, t: seen.append(t) or load_model(run, t))
        found = [stages.measure(run, t, progress=False)["kl"] for t in (None, 0, 1)]
    assert seen == loaded
    dpo = run.config.dpo
    examples = tokenize_pairs(
        base.tokenizer,
        run_pairs(run, 0)[1],
        prompt_format=dpo.prompt_format,
        max_prompt_length=dpo.max_prompt_length,
        max_length=min(dpo.max_length, base.max_length),
    ).examples
    wanted = [kl_per_token(load_model(run, t), examples, base) for t in range(2)]
    assert found == [[0.0] * len(examples), *wanted]
    assert min(min(values) for values in wanted) > 0


def test_two_rounds_and_their_evaluation(run: Run) -> None:
    with pytest.raises(RunError, match="round 1 has not been trained"):
        load_model(run, 0)
    fingerprints = [load_model(run, None).fingerprint]
    for t in range(2):
        write_pairs(run, t)
        train_iteration(run, t, progress=False)
        fingerprints.append(load_model(run, t).fingerprint)
    assert len(set(fingerprints)) == 3
    result = evaluate_model(run, 1, progress=False)["probe"]
    assert result["model"]["fingerprint"] == fingerprints[2]
    assert result["model"]["name"] == "run@1"
    assert run.evaluation("iter_1", "probe").exists()
    # What is done is read, not done again.
    write_json(run.evaluation("iter_1", "probe"), {**result, "read": True})
    assert evaluate_model(run, 1, progress=False)["probe"]["read"]
    adapter = run.adapter(0) / "adapter_model.safetensors"
    before = adapter.stat().st_mtime_ns
    train_iteration(run, 0, progress=False)
    assert adapter.stat().st_mtime_ns == before


def test_what_is_missing_is_said_with_the_way_to_make_it(run: Run) -> None:
    with pytest.raises(RunError) as caught:
        check_ready(run, [run.questions, run.pairs(0)], "01_pair_generation")
    message = str(caught.value)
    assert "lacks iter_0/pairs.jsonl" in message
    assert "01_pair_generation" in message
    assert "grath run --profile smoke" in message
    assert "grath checkpoint --at 02 --profile smoke" in message
    write_pairs(run, 0)
    check_ready(run, [run.questions, run.pairs(0)], "01_pair_generation")
