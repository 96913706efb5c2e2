"""The exercises' checks: right answers pass, wrong ones do not, and the solutions pass them all."""

from __future__ import annotations

import itertools
import math
import re
import shutil
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest
import torch

from grath_utils.cli import main
from grath_utils.config import load_config
from grath_utils.course.execute import execute_notebook
from grath_utils.course.exercises import EXERCISES, check, nb00, nb06
from grath_utils.course.exercises.judging import NONE_YET, NOT_YET, RIGHT, score_answers
from grath_utils.course.notebooks import numbered_notebooks
from grath_utils.course.progress import exercises_line, read_progress
from grath_utils.dpo.loss import dpo_loss
from grath_utils.engine.models import Policy
from grath_utils.errors import UsageError
from grath_utils.files import read_jsonl
from grath_utils.loop.run_dir import Run, load_run, open_run
from grath_utils.loop.state import run_state
from grath_utils.scale import costs

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


def test_the_run_directory_keeps_which_exercises_are_passed(tmp_path, capsys) -> None:
    run = open_run(tmp_path / "run", load_config("smoke"))
    name = "01.easy"
    check(run, name, ...)
    assert exercises_line(run) == ""
    assert check(run, name, lambda *four: "lost").state == NOT_YET
    assert read_progress(run)[name]["passed"] is False

    def fate(first: float, second: float, keep: float, turn: float) -> str:
        mean = (first + second) / 2
        return "kept" if mean >= keep else "turned round" if mean <= turn else "dropped"

    assert check(run, name, fate).state == RIGHT
    when = read_progress(run)[name]["when"]
    assert check(run, name, lambda *four: "lost").state == NOT_YET
    assert read_progress(run)[name] == {"passed": True, "when": when}  # it stays passed
    assert read_progress(run).keys() == EXERCISES.keys()
    line = exercises_line(run)
    assert line.startswith(f"exercises: 1 of {len(EXERCISES)} passed (")
    assert "01: 1 of 3" in line
    assert main(["status", str(run.path)]) == 0
    assert line in capsys.readouterr().out
    nowhere = Run(tmp_path / "nothing", run.config)
    assert check(nowhere, name, fate).state == RIGHT
    assert not nowhere.path.exists()


def test_an_answer_of_the_wrong_kind_is_told_what_is_wanted() -> None:
    verdict = check(None, "00b.hard", lambda *five: "many")
    assert verdict.state == NOT_YET
    assert "four log-probabilities" in verdict.text


def own_dpo(
    pc: torch.Tensor, pr: torch.Tensor, rc: torch.Tensor, rr: torch.Tensor, beta: float
) -> torch.Tensor:
    return -torch.nn.functional.logsigmoid(beta * ((pc - rc) - (pr - rr)))


@pytest.mark.parametrize(
    ("answer", "state", "says"),
    [
        (own_dpo, RIGHT, "the losses that train"),
        (lambda *a: own_dpo(*a).mean(), NOT_YET, "6 numbers are wanted"),
        (lambda pc, pr, rc, rr, beta: own_dpo(pr, pc, rr, rc, beta), NOT_YET, "the rejected"),
        (lambda *a: own_dpo(*a[:4], 1.0), NOT_YET, "beta is missing"),
        (lambda *a: own_dpo(*a[:4], 0.1), NOT_YET, "other losses"),
        (lambda pc, pr, rc, rr, beta: own_dpo(pc, pr, 0, 0, beta), NOT_YET, "reference is missing"),
        (lambda *a: -own_dpo(*a), NOT_YET, "never negative"),
        (lambda *a: -torch.exp(-own_dpo(*a)).log(), NOT_YET, "not finite"),
        (lambda *a: 0.693, NOT_YET, "a tensor is wanted"),
        (0.693, NOT_YET, "the function itself"),
    ],
)
def test_an_own_dpo_loss_is_tried(answer: Any, state: str, says: str) -> None:
    verdict = check(None, "02.easy", answer)
    assert verdict.state == state
    assert says in verdict.text


def own_sums(logits: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    log_p = logits[:, :-1].log_softmax(-1)
    return (log_p.gather(2, ids[:, 1:, None]).squeeze(2) * mask[:, 1:]).sum(1)


@pytest.mark.parametrize(
    ("answer", "state", "says"),
    [
        (own_sums, RIGHT, "the library's"),
        (lambda logits, ids, mask: own_sums(logits, ids, mask) / mask.sum(1), NOT_YET, "the mean"),
        (lambda logits, ids, mask: own_sums(logits, ids, mask * 0 + 1), NOT_YET, "outside"),
        (lambda logits, ids, mask: own_sums(logits, ids, mask.roll(1, 1)), NOT_YET, "off by one"),
        (lambda logits, ids, mask: own_sums(logits.roll(1, 1), ids, mask), NOT_YET, "other sums"),
        (
            lambda logits, ids, mask: (
                logits.log_softmax(-1).gather(2, ids[:, :, None])[:, :, 0] * mask
            ).sum(1),
            NOT_YET,
            "*next* token",
        ),
        (
            lambda logits, ids, mask: (
                logits[:, :-1].gather(2, ids[:, 1:, None])[:, :, 0] * mask[:, 1:]
            ).sum(1),
            NOT_YET,
            "no log-probabilities yet",
        ),
    ],
)
def test_sums_of_log_probabilities_are_tried(answer: Any, state: str, says: str) -> None:
    verdict = check(None, "02.medium", answer)
    assert verdict.state == state
    assert says in verdict.text


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
    assert check(run, "05.hard", (long, two | {"loop.later_steps": 10})).state == RIGHT
    assert "15" in check(run, "05.hard", (long, two | {"loop.later_steps": 5})).text
    assert check(run, "05.hard", (long, long)).state == NOT_YET


def test_an_interval_tells_how_many_items_are_needed() -> None:
    def items_for(effect: float, ci95: list[float], n: int, width: float = 2 * 1.96) -> float:
        return n * (2.8016 * (ci95[1] - ci95[0]) / width / effect) ** 2

    assert check(None, "05.easy", items_for).state == RIGHT
    whole = check(None, "05.easy", lambda *case: items_for(*case, width=1.96))
    assert "four times too many" in whole.text
    assert "another number" in check(None, "05.easy", lambda effect, ci95, n: n).text
    assert "the function itself" in check(None, "05.easy", 200).text


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


def own_fate(first: float, second: float, keep: float, turn: float) -> str:
    mean = (first + second) / 2
    return "kept" if mean >= keep else "turned round" if mean <= turn else "dropped"


@pytest.mark.parametrize(
    ("answer", "state", "says"),
    [
        (own_fate, RIGHT, "the same fate"),
        (lambda first, second, *edges: own_fate(first, first, *edges), NOT_YET, "is not"),
        (lambda first, second, keep, turn: own_fate(first, second, turn, keep), NOT_YET, "is not"),
        (lambda *a: own_fate(*a[:2], a[2] + 1e-9, a[3] - 1e-9), NOT_YET, "on a threshold"),
        (lambda *a: own_fate(*a) == "kept", NOT_YET, "none of kept, turned round, dropped"),
        ("kept", NOT_YET, "the function itself"),
    ],
)
def test_an_own_verdict_is_tried_on_both_sides_of_the_thresholds(
    answer: Any, state: str, says: str
) -> None:
    verdict = check(None, "01.easy", answer)
    assert verdict.state == state
    assert says in verdict.text


def own_parser(
    text: str, labels=("Correct answer:", "Incorrect answer:"), *, last=False, glue=False
) -> tuple[str, str] | str:
    found = {}
    for line in text.splitlines():
        for label in labels:
            if line.startswith(label) and (last or label not in found):
                found[label] = line.removeprefix(label).strip()
        if glue and line.startswith("Reason:") and found:
            found[list(found)[-1]] += f" {line}"
    if missing := [label for label in labels if label not in found]:
        return f"no_{missing[0].split()[0].lower()}"
    correct, incorrect = (found[label] for label in labels)
    return "equal" if correct.lower()[:-1] == incorrect.lower()[:-1] else (correct, incorrect)


@pytest.mark.parametrize(
    ("answer", "state", "says"),
    [
        (own_parser, RIGHT, "are pairs"),
        (lambda text: own_parser(text, last=True), NOT_YET, "another text"),
        (lambda text: own_parser(text, glue=True), NOT_YET, "another text"),
        (lambda text: "equal", NOT_YET, "holds a pair"),
        (lambda text: own_parser(text) if "no_" not in own_parser(text) else None, NOT_YET,
         "nothing is returned"),
        (lambda text: ("", ""), NOT_YET, "another text"),
        (lambda text: own_parser(text)[::-1], NOT_YET, "the other order"),
        (lambda text: "no_correct" if own_parser(text) == "equal" else own_parser(text), NOT_YET,
         "another reason"),
    ],
)  # fmt: skip
def test_an_own_parser_is_tried_on_what_models_write(answer: Any, state: str, says: str) -> None:
    verdict = check(None, "01.medium", answer)
    assert verdict.state == state
    assert says in verdict.text


@pytest.mark.model
def test_an_own_judge_is_tried_on_sealed_answers(run: Run, default_policy: Policy) -> None:
    def words(policy: Policy, question: str, first: str, second: str) -> float:
        return 1 / (1 + math.exp(len(second) - len(first)))

    fair = check(run, "01.hard", words, default_policy)
    assert fair.state == RIGHT
    assert "of 12 right" in fair.text
    for answer, says in (
        (lambda *a: 0.5, "the same of every pair"),
        (lambda *a: 0.7, "sum to 1"),
        (lambda *a: 50 * words(*a), "not a probability"),
        (lambda policy, question: 0.5, "could not be used"),
        (0.5, "the function itself"),
    ):
        verdict = check(run, "01.hard", answer, default_policy)
        assert verdict.state == NOT_YET
        assert says in verdict.text


@pytest.mark.model
def test_wrong_answers_in_notebooks_3_and_4(run: Run, default_policy: Policy) -> None:
    for name, answer in (
        ("03.easy", [0.0, 0.0, 0.0]),
        ("03.medium", (1.5, 0.5)),
        ("04.easy", 0.75),
        ("04.medium", (0.123, 0.123)),
        ("04.hard", {10: 0.1, 20: 0.2}),
        ("04.hard", {10: 0.1, 20: 0.2, 30: 0.9}),
    ):
        assert check(run, name, answer, default_policy).state == NOT_YET, (name, answer)
    own = read_jsonl(run.training_log(run_state(run).planned[-1]))
    assert "the run itself" in check(run, "03.hard", own).text


def preferred(signals: dict) -> np.ndarray:
    return np.subtract(signals["chosen"], signals["rejected"])


@pytest.mark.parametrize(
    ("answer", "state", "says"),
    [
        (lambda base, after: preferred(after) - preferred(base), RIGHT, "mean"),
        (lambda base, after: (preferred(after) - preferred(base)).mean(), NOT_YET, "each pair"),
        (lambda base, after: preferred(base) - preferred(after), NOT_YET, "sign"),
        (lambda base, after: preferred(after), NOT_YET, "before"),
        (lambda base, after: np.subtract(after["chosen"], base["chosen"]), NOT_YET, "alone"),
    ],
)
def test_the_margin_over_the_base(answer: Any, state: str, says: str) -> None:
    verdict = check(None, "03.easy", answer)
    assert verdict.state == state
    assert says in verdict.text


def error(values: np.ndarray) -> float:
    return values.std(ddof=1) / len(values) ** 0.5


def kept(gains: list, alarms: list, *, within=True, above=True, heed=True) -> int | None:
    """The rule of notebook 3; each of its three parts can be left out."""
    fit = [t for t, alarm in enumerate(alarms) if not (alarm and heed)]
    fit = [t for t in fit if gains[t].mean() > above * error(gains[t])]
    if not fit:
        return None
    best = max(fit, key=lambda t: gains[t].mean())
    behind = (gains[best] - gains[t] for t in fit)
    near = [t for t, b in zip(fit, behind, strict=True) if b.mean() <= within * error(b)]
    return near[0]


@pytest.mark.parametrize(
    ("answer", "state", "says"),
    [
        (kept, RIGHT, "same rule"),
        (lambda *a: kept(*a, within=False), NOT_YET, "an earlier round"),
        (lambda *a: kept(*a, above=False), NOT_YET, "far enough above 0"),
        (lambda *a: kept(*a, heed=False), NOT_YET, "with an alarm was kept"),
        (lambda gains, alarms: None, NOT_YET, "a round is fit"),
        (lambda gains, alarms: 7, NOT_YET, "index"),
    ],
)
def test_the_choice_rule_is_tried_on_cases(answer: Any, state: str, says: str) -> None:
    verdict = check(None, "03.medium", answer)
    assert verdict.state == state
    assert says in verdict.text


def share(scores: np.ndarray, true: np.ndarray) -> float:
    weights = np.exp(scores - scores.max())
    return weights[true].sum() / weights.sum()


@pytest.mark.parametrize(
    ("answer", "state", "says"),
    [
        (lambda scores, labels: share(scores, labels == 1), RIGHT, "long answers"),
        (lambda scores, labels: share(scores, labels == 0), NOT_YET, "false"),
        (lambda scores, labels: (labels == 1).mean(), NOT_YET, "another share"),
        (lambda scores, labels: share(scores, np.arange(4) < 2), NOT_YET, "not the places"),
        (
            lambda scores, labels: np.exp(scores)[labels == 1].sum() / np.exp(scores).sum(),
            NOT_YET,
            "largest score first",
        ),
        (
            lambda scores, labels: math.exp(scores[labels == 1][0]) / sum(map(math.exp, scores)),
            NOT_YET,
            "another share",
        ),
    ],
)
def test_mc2_is_tried_on_cases(answer: Any, state: str, says: str) -> None:
    verdict = check(None, "04.easy", answer)
    assert verdict.state == state
    assert says in verdict.text


def test_mc2_in_plain_python_that_divides_by_zero_is_told_why() -> None:
    def plain(scores: np.ndarray, labels: np.ndarray) -> float:
        weights = [math.exp(score) for score in scores]
        return sum(w for w, true in zip(weights, labels, strict=True) if true) / sum(weights)

    verdict = check(None, "04.easy", plain)
    assert verdict.state == NOT_YET
    assert "largest score first" in verdict.text


def resampled(before: np.ndarray, after: np.ndarray, *, paired=True, n=None) -> tuple:
    rng, size = np.random.default_rng(1), (2000, n or len(before))
    drawn = rng.integers(len(before), size=size)
    others = drawn if paired else rng.integers(len(before), size=size)
    return tuple(np.quantile(after[drawn].mean(1) - before[others].mean(1), [0.025, 0.975]))


@pytest.mark.parametrize(
    ("answer", "state", "says"),
    [
        (resampled, RIGHT, "the table"),
        (lambda b, a: resampled(b, a, paired=False), NOT_YET, "too wide"),
        (lambda b, a: resampled(b, a, n=1500), NOT_YET, "too narrow"),
        (lambda b, a: resampled(a, b), NOT_YET, "sign"),
        (lambda b, a: resampled(b, a)[::-1], NOT_YET, "lower end"),
        (lambda b, a: [end + 0.02 for end in resampled(b, a)], NOT_YET, "elsewhere"),
    ],
)
def test_the_paired_interval(answer: Any, state: str, says: str) -> None:
    verdict = check(None, "04.medium", answer)
    assert verdict.state == state
    assert says in verdict.text
