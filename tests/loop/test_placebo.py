"""The placebo beside a run: the same pairs with random labels, trained and measured alike."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from helpers import SMALL, config_for, write_pairs, write_questions

from grath_utils import loop
from grath_utils.cli import main
from grath_utils.config import config_from_dict
from grath_utils.course import summary_table, write_report
from grath_utils.errors import ConfigError
from grath_utils.evaluation import compare
from grath_utils.files import read_json, read_jsonl
from grath_utils.loop.plan import plan_stages
from grath_utils.loop.run_dir import Run, load_run
from grath_utils.loop.stages import run_stages, start_run
from grath_utils.pairs.generate import read_pairs


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Run:
    """A finished run with its placebo, to read only."""
    folder = tmp_path_factory.mktemp("placebo")
    questions = write_questions(folder / "questions.jsonl", 16)
    both = {"loop.placebo": True, "loop.placebo_labels": ["random", "mismatched"]}
    config = config_for(
        tiny_llama, questions, **{**SMALL, **both, "dpo.steps": 2, "loop.later_steps": 1}
    )
    run = start_run(folder / "run", config)
    for t in range(config.loop.iterations):
        write_pairs(run, t)
    run_stages(run, progress=False, say=lambda line: None)
    return run


def test_the_placebo_differs_in_its_labels_alone(run: Run) -> None:
    final = loop.run_state(run).final
    arm = load_run(run.path / "arms" / "random")
    assert arm.config == run.placebos(final)["random"].config
    changed = {key for key, value in run.config.flat().items() if arm.config.flat()[key] != value}
    assert changed - {"loop.iterations", "loop.keep", "loop.early_stop", "loop.signals"} == {
        "pairs.labels", "loop.placebo", "loop.placebo_labels", "evaluation.every_iteration"
    }  # fmt: skip
    assert arm.questions.read_bytes() == run.questions.read_bytes()
    assert arm.info()["model"] == run.info()["model"]
    turned = []
    for t in range(final + 1):
        for own, random in zip(read_pairs(run.pairs(t)), read_pairs(arm.pairs(t)), strict=True):
            sides = (random.correct, random.incorrect)
            assert (own.id, {*sides}) == (random.id, {own.correct, own.incorrect})
            turned.append(sides != (own.correct, own.incorrect))
        steps = [[row["step"] for row in read_jsonl(each.training_log(t))] for each in (run, arm)]
        assert steps[0] == steps[1]
    assert 0 < sum(turned) < len(turned)
    base, adapters = loop.resolve_name(f"{run.path}/arms/random@0")
    assert (base, adapters) == (run.base_model(), [arm.adapter(0)])
    assert all(stage.done for stage in plan_stages(arm))


def test_the_second_placebo_has_the_answers_of_other_questions(run: Run) -> None:
    arm = run.placebos(loop.run_state(run).final)["mismatched"]
    for own, other in zip(read_pairs(run.pairs(0)), read_pairs(arm.pairs(0)), strict=True):
        assert (own.id, own.correct, own.incorrect) == (other.id, other.correct, other.incorrect)
        assert own.question != other.question
    assert "under other questions), in points: probe mc1 " in loop.gain_line(run).splitlines()[1]
    assert any("the placebo of other questions" in sentence for sentence in loop.what_happened(run))
    assert all(stage.done for stage in plan_stages(arm))


def test_a_later_round_has_the_steps_of_later_rounds(run: Run) -> None:
    rows = [read_jsonl(run.training_log(t)) for t in (0, 1)]
    assert [row[-1]["step"] for row in rows] == [run.config.dpo.steps, 1]
    assert rows[1][-1]["split"] == "held_out"  # at its end at least


def test_the_gain_is_the_first_thing_that_is_said(run: Run, capsys) -> None:
    label = f"iter_{loop.run_state(run).final}"
    arm = load_run(run.path / "arms" / "random")
    results = [read_json(each.evaluation(label, "probe")) for each in (arm, run)]
    how = {"seed": run.config.seed, "bootstrap": run.config.evaluation.bootstrap}
    gain = compare(*results, **how)["metrics"]["mc2"]
    line = loop.gain_line(run)
    assert line.startswith("Gain over the placebo (the same pairs with random labels), in points: ")
    line = line.splitlines()[0]
    assert f"mc2 {100 * gain['value']:+.1f} [" in line
    assert summary_table(run).startswith(f"{line}\n")
    page = write_report(run).read_text(encoding="utf-8")
    assert page.index(loop.verdict(run).partition(" (")[0]) < page.index("Before and after")
    assert line.removesuffix(".") in page
    assert main(["status", "--run-dir", str(run.path)]) == 0
    said = capsys.readouterr().out
    assert line in said
    assert "done    placebo: relabel pairs, round 1" in said
    assert said.index(line) < said.index("chosen without a look at any benchmark")


def test_what_is_missing_of_the_placebo_is_made_again_and_nothing_else(
    run: Run, tmp_path: Path
) -> None:
    copy = Run(shutil.copytree(run.path, tmp_path / "run"), run.config)
    said: list[str] = []
    run_stages(copy, progress=False, say=said.append)
    assert said == []
    final = loop.run_state(copy).final
    arm = load_run(copy.path / "arms" / "random")
    arm.evaluation(f"iter_{final}", "probe").unlink()
    told = " ".join(line for line in loop.what_happened(copy) if line.startswith("On retention"))
    assert "acc " in told  # both, or one would be picked by its outcome
    assert "acc_norm " in told
    assert "not measured yet" not in loop.gain_line(copy)  # the other benchmark still is
    run_stages(copy, progress=False, say=said.append)
    assert [line.partition("] ")[2] for line in said] == [
        f"placebo: evaluate after round {final + 1} on probe"
    ]
    shutil.rmtree(arm.path)
    assert loop.gain_line(copy).splitlines()[0].endswith("random labels): not measured yet")
    assert not any(s.done for s in plan_stages(copy) if s.id.endswith("@random"))


def test_without_the_setting_nothing_is_different(small_run: Run) -> None:
    assert loop.gain_line(small_run) == ""
    assert not any("@" in stage.id for stage in plan_stages(small_run))
    assert small_run.main is None


def test_the_plan_of_a_run_that_has_not_begun_is_that_of_the_finished_one(
    run: Run, tmp_path: Path
) -> None:
    planned = [stage.id for stage in plan_stages(Run(tmp_path / "none", run.config))]
    assert planned == [stage.id for stage in plan_stages(run)]


def test_a_placebo_of_other_labels_is_refused() -> None:
    with pytest.raises(ConfigError, match='"pairs.labels" is inverted; leave one of them out'):
        config_from_dict({"pairs": {"labels": "inverted"}, "loop": {"placebo": True}})
