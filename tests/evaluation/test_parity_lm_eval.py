"""Our numbers are lm-evaluation-harness's numbers: every item's log-probability, every metric.

lm-eval runs its own task files on the same local rows, with the same model object, in float32 and
in this process. A few items of each benchmark are enough to catch one wrong space, shot or mask;
`make bench` compares whole benchmarks.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lm_eval_tasks as harness
import numpy as np
import pytest

from grath_utils.engine.models import Policy
from grath_utils.errors import ScoringError
from grath_utils.evaluation.benchmarks import mmlu
from grath_utils.evaluation.benchmarks.base import Benchmark, Item
from grath_utils.evaluation.benchmarks.truthfulqa import truthfulqa_item
from grath_utils.evaluation.measure import evaluate
from grath_utils.evaluation.metrics import truthfulqa_metrics
from grath_utils.files import mirror_dir, write_jsonl

pytest.importorskip("lm_eval", reason="lm-eval is a development extra")

TOLERANCE = 1e-3  # nats, on the sum over a whole answer
SUBJECTS = ("anatomy", "marketing")
SIZES = {
    "truthful_qa/multiple_choice/validation.jsonl": 3,
    "ai2_arc/ARC-Challenge/test.jsonl": 2,
    "ai2_arc/ARC-Challenge/train.jsonl": 200,
    "hellaswag/validation.jsonl": 2,
    "hellaswag/train.jsonl": 60,
    **{f"mmlu/{subject}/dev.jsonl": None for subject in SUBJECTS},
    **{f"mmlu/{subject}/test.jsonl": 3 for subject in SUBJECTS},
}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few items of each benchmark; of our own sets in their schemas where there is no mirror."""
    folder = tmp_path_factory.mktemp("mirror")
    mirror = mirror_dir()
    if mirror is None:
        return harness.own_mirror(folder, SUBJECTS)
    return harness.small_mirror(mirror, folder, SIZES)


@pytest.fixture
def use_small(small: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GRATH_MIRROR", str(small))
    return small


def assert_same(ours: dict[str, Any], samples: list[dict[str, Any]]) -> None:
    """Compare log-probabilities choice by choice, and each metric of each item."""
    assert len(samples) == ours["n"]
    for sample, item in zip(sorted(samples, key=lambda s: s["doc_id"]), ours["items"], strict=True):
        theirs = harness.logprobs(sample)
        assert len(theirs) == len(item["scores"])
        assert np.abs(np.subtract(theirs, item["scores"])).max() < TOLERANCE, item["id"]
        for name in ("acc", "acc_norm"):
            if name in sample and name in item["metrics"]:
                assert item["metrics"][name] == sample[name], item["id"]


@pytest.mark.model
def test_truthfulqa(default_policy: Policy, use_small: Path) -> None:
    names = ("truthfulqa_mc1", "truthfulqa_mc2")
    theirs = harness.run(default_policy, [harness.task(use_small, n) for n in names], 0)
    ours = evaluate(default_policy, "truthfulqa_mc", progress=False)
    assert_same(ours, theirs["samples"]["truthfulqa_mc2"])
    for metric, task in zip(("mc1", "mc2"), names, strict=True):
        assert ours["metrics"][metric]["value"] == pytest.approx(
            theirs["results"][task]["acc,none"], abs=1e-5
        )


@pytest.mark.model
@pytest.mark.parametrize(("name", "shots"), [("arc_challenge", 25), ("hellaswag", 10)])
def test_few_shot(default_policy: Policy, use_small: Path, name: str, shots: int) -> None:
    theirs = harness.run(default_policy, [harness.task(use_small, name)], shots)
    ours = evaluate(default_policy, name, progress=False)
    assert_same(ours, theirs["samples"][name])
    for metric in ("acc", "acc_norm"):
        assert ours["metrics"][metric]["value"] == theirs["results"][name][f"{metric},none"]


@pytest.mark.model
def test_mmlu(default_policy: Policy, use_small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mmlu, "SUBJECTS", SUBJECTS)
    tasks = [harness.task(use_small, f"mmlu_{subject}") for subject in SUBJECTS]
    theirs = harness.run(default_policy, tasks, 5)
    ours = evaluate(default_policy, "mmlu", progress=False)
    for subject in SUBJECTS:
        items = [item for item in ours["items"] if item["category"] == subject]
        assert_same({"n": len(items), "items": items}, theirs["samples"][f"mmlu_{subject}"])
        value = ours["per_category"][subject]["acc"]["value"]
        assert value == theirs["results"][f"mmlu_{subject}"]["acc,none"]


# --- where we differ on purpose ------------------------------------------------------------------


def row_of(choices: list[str], labels: list[int]) -> dict[str, Any]:
    targets = {"choices": choices, "labels": labels}
    return {"question": "Is it so?", "mc1_targets": targets, "mc2_targets": targets}


ROW = row_of(["Yes.", "No.", "Perhaps."], [1, 0, 0])
TURNED = row_of(["No.", "Yes.", "Perhaps."], [0, 1, 0])


@pytest.fixture(scope="module")
def their_task(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """lm-eval's own MC1 task, to be asked what it makes of given scores."""
    from lm_eval.api.task import ConfigurableTask

    folder = tmp_path_factory.mktemp("rows")
    write_jsonl(folder / "truthful_qa/multiple_choice/validation.jsonl", [ROW, TURNED])
    return ConfigurableTask(config=harness.task(folder, "truthfulqa_mc1"))


@pytest.mark.parametrize(
    ("row", "scores", "theirs", "ours"),
    [
        (ROW, [-1.0, -2.0, -3.0], 1.0, 1.0),  # a clear answer is judged alike
        (ROW, [-2.0, -1.0, -3.0], 0.0, 0.0),
        (ROW, [-2.0, -2.0, -2.0], 1.0, 0.0),  # a tie is wrong here and right there
        (TURNED, [-2.0, -1.0, -3.0], 0.0, 1.0),  # labels are read here, and positions there
        (ROW, [float("nan")] * 3, 1.0, "not finite"),  # an error here, and right there
    ],
)
def test_mc1_here_and_there(
    their_task: Any, row: dict[str, Any], scores: list[float], theirs: float, ours: float | str
) -> None:
    found = their_task.process_results(row, [(score, False) for score in scores])
    assert found["acc"] == theirs
    if isinstance(ours, str):
        with pytest.raises(ScoringError, match=ours):
            truthfulqa_metrics(truthfulqa_item(row), scores)
    else:
        assert truthfulqa_metrics(truthfulqa_item(row), scores)["mc1"] == ours


def test_mc2_of_very_long_answers_is_a_number_here_and_nan_there() -> None:
    from lm_eval.tasks.truthfulqa.utils import process_results_mc2

    scores = [-900.0, -901.0, -905.0]
    with np.errstate(invalid="ignore"):
        assert np.isnan(process_results_mc2(ROW, [(x, False) for x in scores])["acc"])
    value = truthfulqa_metrics(truthfulqa_item(ROW), scores)["mc2"]
    assert value == pytest.approx(1 / (1 + np.exp(-1) + np.exp(-5)))


def test_a_prompt_beyond_the_context_is_an_error_here_and_cut_there(tiny_policy: Policy) -> None:
    from lm_eval.models.huggingface import HFLM

    item = Item("long", "x" * 3000, ("a", "b"), (1, 0), None, (0, 1), (0, 1), 0)
    benchmark = Benchmark("retention", "test", (item,), {}, 1, None, "-")
    with pytest.raises(
        ScoringError, match=r"item long: .*3\d\d\d tokens, and the model takes 2048"
    ):
        evaluate(tiny_policy, benchmark, progress=False)
    model = HFLM(pretrained=tiny_policy.model, tokenizer=tiny_policy.tokenizer, batch_size=1)
    ids = model.tok_encode("x" * 3000)
    ((logprob, _),) = model._loglikelihood_tokens([(("", ""), ids, ids[:2])], disable_tqdm=True)
    assert np.isfinite(logprob)
