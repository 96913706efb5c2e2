"""The exercises' checks: right answers pass, wrong ones do not, and the solutions pass them all."""

from __future__ import annotations

import itertools
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest
import torch

from grath_utils.config import load_config
from grath_utils.course.execute import execute_notebook
from grath_utils.course.exercises import EXERCISES, check, nb00, nb04, nb06
from grath_utils.course.exercises.judging import NONE_YET, NOT_YET, RIGHT, score_answers
from grath_utils.course.notebooks import numbered_notebooks
from grath_utils.dpo.loss import dpo_loss
from grath_utils.engine.models import Policy
from grath_utils.errors import UsageError
from grath_utils.files import read_jsonl
from grath_utils.loop.run_dir import Run, load_run
from grath_utils.loop.stages import run_pairs
from grath_utils.loop.state import run_state
from grath_utils.scale import costs
from grath_utils.scale.experiments import Trial

ROOT = Path(__file__).resolve().parents[2]
SOLUTIONS = sorted((ROOT / "notebooks" / "solutions").glob("*.ipynb"))
CALL = re.compile(r'check\(run, "(\d\d\w?\.\w+)", answer')


def calls(path: Path) -> list[str]:
    """Return the names of the checks that a notebook calls, in order."""
    cells = nbformat.read(path, as_version=4).cells
    return [name for cell in cells for name in CALL.findall(cell.source)]


@pytest.mark.parametrize("path", SOLUTIONS, ids=lambda path: path.stem)
def test_every_exercise_has_an_answer_cell_and_every_solution_hands_in(path: Path) -> None:
    number = path.stem.partition("_")[0]
    names = [name for name in EXERCISES if name.startswith(f"{number}.")]
    assert len(names) == 3
    assert calls(ROOT / "notebooks" / path.name) == names
    assert calls(path) == names


def test_no_check_is_left_over() -> None:
    used = {name for path in numbered_notebooks() for name in calls(path)}
    assert used == EXERCISES.keys()


@pytest.mark.model
@pytest.mark.notebook
@pytest.mark.parametrize("path", SOLUTIONS, ids=lambda path: path.stem)
def test_the_solutions_run_and_pass_their_own_checks(
    smoke: tuple[Run, str], path: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(smoke[0].path, folder)  # nothing a solution does may touch the shared run
    executed = tmp_path / path.name
    execute_notebook(path, executed, {"PROFILE": "smoke", "RUN_DIR": str(folder)})
    verdicts = [
        out.data["text/plain"]
        for cell in nbformat.read(executed, as_version=4).cells
        if CALL.search(cell.source)
        for out in cell.outputs
        if out.output_type == "execute_result"
    ]
    assert len(verdicts) == 3
    assert all(f" {RIGHT}: " in verdict for verdict in verdicts)


@pytest.mark.model
@pytest.mark.notebook
def test_unanswered_exercises_do_not_fail(smoke: tuple[Run, str]) -> None:
    for path in numbered_notebooks():
        executed = smoke[0].executed_notebooks / path.name
        if executed.is_file() and calls(path):
            text = executed.read_text(encoding="utf-8")
            assert text.count(f" {NONE_YET}: ") == 3, path.name


def test_an_unknown_exercise_is_named() -> None:
    with pytest.raises(UsageError, match='no exercise "02.eazy"; did you mean "02.easy"'):
        check(None, "02.eazy", 1)


@pytest.mark.parametrize("name", EXERCISES)
def test_no_answer_is_no_failure_and_needs_nothing(name: str) -> None:
    verdict = check(None, name, ...)
    assert verdict.state == NONE_YET
    assert EXERCISES[name][0] in verdict.text
    assert NONE_YET in verdict._repr_html_()


def test_an_answer_of_the_wrong_kind_is_told_what_is_wanted() -> None:
    verdict = check(None, "02.easy", "many")
    assert verdict.state == NOT_YET
    assert "three rises" in verdict.text


def test_the_rise_of_the_easy_beta_exercise() -> None:
    right = [-np.log(np.expm1(0.1)) / beta for beta in (0.01, 0.1, 1.0)]
    assert check(None, "02.easy", right).state == RIGHT
    assert "still" in check(None, "02.easy", [30, *right[1:]]).text
    assert "earlier" in check(None, "02.easy", [*right[:2], 30]).text
    assert check(None, "02.easy", right[::-1]).state == NOT_YET
    assert check(None, "02.easy", right[:2]).state == NOT_YET


def positive(
    pc: torch.Tensor, pr: torch.Tensor, rc: torch.Tensor, rr: torch.Tensor, beta: float, weight=5.0
) -> torch.Tensor:
    margin = beta * ((pc - rc) - (pr - rr) - weight * torch.clamp(rc - pc, min=0))
    return -torch.nn.functional.logsigmoid(margin)


@pytest.mark.parametrize(
    ("answer", "state", "says"),
    [
        (positive, RIGHT, "no longer won"),
        (lambda *a: dpo_loss(*a)[0], NOT_YET, "costs nothing extra"),
        (lambda *a: positive(*a, weight=0.5), NOT_YET, "weigh the new term more"),
        (lambda *a: positive(*a) + 1, NOT_YET, "DPO's own"),
        (lambda *a: positive(*(v if v == a[-1] else v.detach() for v in a)), NOT_YET, "used"),
        (3.0, NOT_YET, "the function itself"),
    ],
)
def test_dpo_positive_is_tried_on_cases(answer: Any, state: str, says: str) -> None:
    verdict = check(None, "02.hard", answer)
    assert verdict.state == state
    assert says in verdict.text


def test_a_design_changes_one_thing_only() -> None:
    run = Run(Path("nowhere"), load_config("smoke"))
    long = {"loop.iterations": 1, "dpo.steps": 20}
    two = {"loop.iterations": 2, "dpo.steps": 10}
    assert check(run, "05.hard", (long, two)).state == RIGHT
    assert "20 steps" in check(run, "05.hard", (long, two | {"dpo.steps": 20})).text
    assert "dpo.beta" in check(run, "05.hard", (long, two | {"dpo.beta": 1.0})).text
    assert check(run, "05.hard", (long, long)).state == NOT_YET


def test_the_record_is_asked_for_an_interaction() -> None:
    for answer in ((0.0, 0.0), (1.0,), (100.0, -100.0)):
        assert check(None, "05.medium", answer).state == NOT_YET


def test_the_micro_batch_that_still_fits_is_the_only_right_one() -> None:
    sizes = (1, 2, 4, 8, 16)
    verdicts = {pair: check(None, "06.easy", pair) for pair in itertools.product(sizes, sizes)}
    ((without, kept),) = [pair for pair, verdict in verdicts.items() if verdict.state == RIGHT]
    assert without < kept
    assert "other order" in verdicts[kept, without].text
    assert "pairs need" in verdicts[2 * without, kept].text
    assert "with checkpointing there is room" in verdicts[without, kept // 2].text
    assert "divide" in check(None, "06.easy", (without, 3)).text
    assert check(None, "06.easy", (without, 0.5)).state == NOT_YET


def test_eight_gpus_are_judged_by_the_total_and_by_the_stage() -> None:
    config = load_config("paper-llama2")
    one, eight = (costs.estimate(config, costs.DEVICES[name]) for name in ("H100", "8xH100"))
    ratio = costs.total(one).seconds / costs.total(eight).seconds
    gains = {a.title: a.seconds / b.seconds for a, b in zip(one, eight, strict=True)}
    least = min(gains, key=gains.get)
    assert 1 < ratio < 8
    assert check(None, "06.medium", (ratio, least)).state == RIGHT
    assert "upside down" in check(None, "06.medium", (1 / ratio, least)).text
    assert "mean" in check(None, "06.medium", (np.mean(list(gains.values())), least)).text
    assert "another speed-up" in check(None, "06.medium", (8, least)).text
    assert "gains less" in check(None, "06.medium", (ratio, max(gains, key=gains.get))).text
    assert "no stage is called" in check(None, "06.medium", (ratio, "training")).text


def test_the_operations_of_both_passes_are_counted() -> None:
    run = Run(Path("nowhere"), load_config("smoke"))
    adapter, everything = (
        nb06.backward_over_forward(run.config, everything=every) for every in (False, True)
    )
    assert adapter == pytest.approx(1, abs=0.05), "the gradient of inputs alone"
    assert everything == pytest.approx(2, abs=0.05), "and that of the weights"
    for answer, says in (
        ((everything, adapter), "other order"),
        ((adapter + 1, everything + 1), "one forward pass too many"),
        ((1 / adapter, 1 / everything), "upside down"),
        ((everything, everything), "Freeze it"),
        ((adapter, adapter), "every weight require"),
        ((adapter, 5.0), "rows of"),
    ):
        verdict = check(run, "06.hard", answer)
        assert verdict.state == NOT_YET
        assert says in verdict.text
    assert check(run, "06.hard", (adapter, everything)).state == RIGHT


@pytest.fixture(scope="module")
def run(smoke: tuple[Run, str]) -> Run:
    return load_run(smoke[0].path)


@pytest.mark.model
def test_checks_of_notebook_0(run: Run, default_policy: Policy) -> None:
    def judge(level: str, answer: object) -> str:
        return check(run, f"00.{level}", answer, default_policy).state

    planet = "Which planet is the hottest?"
    venus, mercury = "The hottest planet is Venus.", "The hottest planet is Mercury."
    one_way, other = (judge("easy", (planet, *two)) for two in ((venus, mercury), (mercury, venus)))
    assert {one_way, other} == {RIGHT, NOT_YET}
    assert judge("easy", (planet, venus, venus)) == NOT_YET
    assert judge("easy", (planet, venus, "No.")) == NOT_YET
    scores = score_answers(default_policy, nb00.ANT_QUESTION, nb00.ANT_ANSWERS)
    means = [s.logprob / s.tokens for s in scores]
    differences = [means[a] - means[b] for a, b in nb00.ANT_PAIRS]
    assert judge("medium", differences) == RIGHT
    assert judge("medium", [-d for d in differences]) == NOT_YET
    assert judge("medium", [s.logprob for s in scores[:3]]) == NOT_YET
    blank = score_answers(default_policy, "Say something.", nb00.ANT_ANSWERS)
    gains = [a.logprob - b.logprob for a, b in zip(scores, blank, strict=True)]
    assert judge("hard", gains) == RIGHT
    assert judge("hard", [-gain for gain in gains]) == NOT_YET
    assert judge("hard", [s.logprob for s in scores]) == NOT_YET


@pytest.mark.model
def test_checks_of_notebook_1(run: Run, default_policy: Policy) -> None:
    train, _ = run_pairs(run, 0)
    n = min(10, len(train))
    assert check(run, "01.easy", [0] * n).state == RIGHT
    assert check(run, "01.easy", [0] * (n - 1)).state == NOT_YET
    assert check(run, "01.easy", [0.5] * n).state == NOT_YET
    assert check(run, "01.medium", Counter(nonsense=8), default_policy).state == NOT_YET
    assert check(run, "01.medium", Counter(usable=3), default_policy).state == NOT_YET
    longer = np.sign([len(p.correct) - len(p.incorrect) for p in train])
    accuracy = (longer.mean() + 1) / 2
    assert check(run, "01.hard", (lambda pair, side: len(side), accuracy)).state == RIGHT
    assert check(run, "01.hard", (lambda pair, side: len(side), accuracy - 0.1)).state == NOT_YET
    cheat = check(run, "01.hard", (lambda pair, side: side == pair.correct, 1.0))
    assert cheat.state == NOT_YET
    assert "which side" in cheat.text


@pytest.mark.model
def test_wrong_answers_in_notebooks_2_to_4(run: Run, default_policy: Policy) -> None:
    for name, answer in (
        ("02.medium", (0.1, 0.1)),
        ("02.medium", (11.4, 13.0)),
        ("02.medium", (0.5,)),
        ("03.easy", [0.0, 0.0, 0.0]),
        ("03.medium", (1.5, 0.5)),
        ("04.easy", ([0, 0, 1], [2, 3, 4])),
        ("04.medium", (0.123, 0.123)),
        ("04.hard", {10: 0.1, 20: 0.2}),
        ("04.hard", {10: 0.1, 20: 0.2, 30: 0.9}),
    ):
        assert check(run, name, answer, default_policy).state == NOT_YET, (name, answer)
    own = read_jsonl(run.training_log(run_state(run).planned[-1]))
    assert "the run itself" in check(run, "03.hard", own).text


@pytest.mark.model
def test_without_a_changed_item_nobody_can_say_how_many_are_needed(run: Run) -> None:
    twice = [Trial("the same", {}, run)] * 2
    assert check(run, "05.easy", (*twice, None, None)).state == RIGHT
    assert check(run, "05.easy", (*twice, 100, 100)).state == NOT_YET
    assert check(run, "05.easy", twice).state == NOT_YET


@pytest.mark.model
def test_movers_are_judged_by_value(run: Run) -> None:
    items, before, after = nb04._measured(run)[0]
    moved = [b["metrics"]["mc2"] - a["metrics"]["mc2"] for a, b in zip(before, after, strict=True)]
    order = sorted(range(len(items)), key=moved.__getitem__)
    assert check(run, "04.easy", (order[-3:], order[:3])).state == RIGHT
    assert check(run, "04.easy", (order[:3], order[-3:])).state == NOT_YET
