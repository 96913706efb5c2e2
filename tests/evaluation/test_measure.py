"""From scores to the result file: metrics by hand, schema, resuming, comparison, guards."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from grath_utils.config import ModelConfig
from grath_utils.engine import scoring
from grath_utils.engine.generation import Completion
from grath_utils.engine.models import Policy, load_base
from grath_utils.errors import ScoringError, UsageError
from grath_utils.evaluation import free_answers as answers
from grath_utils.evaluation.benchmarks import load_benchmark
from grath_utils.evaluation.benchmarks.base import Benchmark, Item
from grath_utils.evaluation.blind_rules import RULES, blind_rule_scores
from grath_utils.evaluation.free_answers import answer_metrics, cut, declines, repeats
from grath_utils.evaluation.measure import compare, evaluate, not_above_rules
from grath_utils.evaluation.metrics import accuracy_metrics, mc1, mc2, mc3, truthfulqa_metrics
from grath_utils.files import Journal, read_json
from grath_utils.text import metric_line


def make_item(choices: list[str], labels: list[int], mc1: tuple[int, ...] | None = None) -> Item:
    everything = tuple(range(len(choices)))
    return Item("x", "Q?", tuple(choices), tuple(labels), None, mc1 or everything, everything, 0)


# --- metrics by hand -----------------------------------------------------------------------------


def test_mc1_mc2_mc3_by_hand() -> None:
    # Two true answers (-1, -4) and two false ones (-2, -5).
    item = make_item(["a", "b", "c", "d"], [1, 0, 1, 0], mc1=(0, 1, 3))
    values = truthfulqa_metrics(item, [-1.0, -2.0, -4.0, -5.0])
    weights = [math.exp(x) for x in (-1, -2, -4, -5)]
    assert values["mc1"] == 1.0
    assert values["mc2"] == pytest.approx((weights[0] + weights[2]) / sum(weights))
    assert values["mc3"] == 0.5  # -1 beats every false answer, -4 does not


def test_ties_are_never_right() -> None:
    assert mc1([-1.0, -1.0], 0) == 0.0
    assert mc3([-1.0, -1.0, -2.0], [1, 0, 1]) == 0.0
    assert mc2([-1.0, -1.0], [1, 0]) == 0.5


@given(st.lists(st.floats(-50, 0), min_size=2, max_size=8), st.floats(-5000, 100), st.data())
def test_only_differences_of_scores_and_not_their_order_matter(
    scores: list[float], shift: float, data: Any
) -> None:
    labels = data.draw(st.permutations([1] + [0] * (len(scores) - 1)))
    order = data.draw(st.permutations(range(len(scores))))
    value = mc2(scores, labels)
    assert 0 <= value <= 1
    moved = [scores[i] + shift for i in order]
    assert mc2(moved, [labels[i] for i in order]) == pytest.approx(value, abs=1e-9)
    gold = labels.index(1)
    if all(abs(s - scores[gold]) > 1e-6 for i, s in enumerate(scores) if i != gold):
        assert mc1(moved, order.index(gold)) == mc1(scores, gold)


def test_accuracy_by_score_and_by_score_per_character() -> None:
    item = make_item(["yes", "certainly not"], [0, 1])
    assert accuracy_metrics(item, [-3.0, -6.0]) == {"acc": 0.0, "acc_norm": 1.0}


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_score_that_is_no_number_is_an_error(bad: float) -> None:
    for metrics in (truthfulqa_metrics, accuracy_metrics):
        with pytest.raises(ScoringError, match="item x: a score is not finite"):
            metrics(make_item(["a", "b"], [1, 0]), [bad, -1.0])
    for metric, wanted in ((mc1, 0), (mc2, [1, 0]), (mc3, [1, 0])):
        with pytest.raises(ScoringError, match="a score is not finite"):
            metric([-1.0, bad], wanted)
    with pytest.raises(ScoringError, match="item x: 1 scores for 2 choices"):
        accuracy_metrics(make_item(["a", "b"], [1, 0]), [-1.0])


@pytest.mark.parametrize(
    ("measure", "text"),
    [
        (lambda: mc1([], 0), "both a true choice and a false one"),
        (lambda: mc1([-1.0], 0), "both a true choice and a false one"),
        (lambda: mc1([-1.0, -2.0], 2), "both a true choice and a false one"),
        (lambda: mc2([], []), "both a true choice and a false one"),
        (lambda: mc3([-1.0, -2.0], [1, 1]), "both a true choice and a false one"),
        (lambda: mc3([-1.0, -2.0], [0, 0]), "both a true choice and a false one"),
        (lambda: mc2([-1.0, -2.0], [1]), "2 scores for 1 choices"),
        (lambda: mc3([-1.0], [1, 0]), "1 scores for 2 choices"),
    ],
)
def test_what_has_no_metric_is_an_error(measure: Callable[[], float], text: str) -> None:
    with pytest.raises(ScoringError, match=text):
        measure()


def test_probabilities_that_underflow_still_have_an_mc2() -> None:
    # exp(-5000) is 0 in floating point; the two differ by one nat.
    assert mc2([-5000.0, -5001.0], [1, 0]) == pytest.approx(1 / (1 + math.exp(-1)))
    assert mc2([-5000.0, -9000.0], [0, 1]) == 0.0


# --- the result ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def probe_result(tiny_llama: Path) -> dict[str, Any]:
    policy = load_base(ModelConfig(name=str(tiny_llama), dtype="float32", device="cpu"))
    return evaluate(policy, "probe", limit=12, seed=1, bootstrap=200, progress=False)


def test_the_schema(probe_result: dict[str, Any]) -> None:
    result = json.loads(json.dumps(probe_result, allow_nan=False))
    assert result["schema_version"] == 1
    for key in ("protocol", "source", "data_fingerprint", "per_category", "calibration", "notes"):
        assert result[key], key
    assert [result[key] for key in ("benchmark", "n", "limit", "seed")] == ["probe", 12, 12, 1]
    assert set(result["model"]) == {"name", "fingerprint", "quantization", "dtype", "device"}
    assert list(result["metrics"]) == ["mc1", "mc2", "mc3"]
    for name, metric in result["metrics"].items():
        low, high = metric["ci95"]
        assert 0 <= low <= metric["value"] <= high <= 1
        assert metric["n"] == len(result["items"]) == 12
        mean = np.mean([item["metrics"][name] for item in result["items"]])
        assert metric["value"] == pytest.approx(mean)
    for item in result["items"]:
        assert len(item["scores"]) == len(item["labels"]) == len(item["tokens"])
        assert all(math.isfinite(score) and score < 0 for score in item["scores"])
    cost = result["cost"]
    assert cost["tokens"] > cost["computed_tokens"] >= cost["distinct_tokens"] > 0
    counts = [group["mc1"]["n"] for group in result["per_category"].values()]
    assert sum(counts) == 12


def test_metrics_and_controls_are_those_of_the_items(probe_result: dict[str, Any]) -> None:
    items = load_benchmark("probe", limit=12, seed=1).items
    for item, row in zip(items, probe_result["items"], strict=True):
        assert row["id"] == item.id
        assert row["metrics"] == truthfulqa_metrics(item, row["scores"])
    rules = probe_result["controls"]
    assert set(rules) == {*RULES, "uniform_mc2"}
    assert rules["chance"] == pytest.approx(np.mean([1 / len(item.mc1) for item in items]))
    scores = blind_rule_scores(items)
    assert rules == {name: sum(values) / len(values) for name, values in scores.items()}


def test_a_result_that_is_not_above_the_rules_is_labelled_so() -> None:
    metric = {"value": 0.55, "ci95": [0.5, 0.6], "n": 100}
    rules = {"chance": 0.2, "longest_answer": 0.3, "contains_negation": 0.4, "odd_one_out": 0.49}
    rules |= {"negation_then_odd_one_out": 0.45, "uniform_mc2": 0.52}
    assert not_above_rules({"mc1": metric}, rules) == []
    (note,) = not_above_rules({"mc1": metric}, {**rules, "odd_one_out": 0.63})
    assert "mc1 55.0 % is not above question-blind rules: odd one out reaches 63.0 %" in note
    (note,) = not_above_rules({"mc2": metric, "mc3": metric}, rules)
    assert note.startswith("mc2 ")


@pytest.mark.parametrize(
    ("name", "protocol"), [("retention", None), ("probe", "chat"), ("probe", "qa")]
)
def test_other_benchmarks_and_protocols(
    tiny_policy: Policy, name: str, protocol: str | None
) -> None:
    result = evaluate(tiny_policy, name, protocol=protocol, limit=3, bootstrap=100, progress=False)
    expected = ["acc", "acc_norm"] if name == "retention" else ["mc1", "mc2", "mc3"]
    assert list(result["metrics"]) == expected
    assert result["protocol"] == (protocol or "zero-shot")


def test_the_same_run_gives_the_same_numbers(
    tiny_policy: Policy, probe_result: dict[str, Any]
) -> None:
    again = evaluate(tiny_policy, "probe", limit=12, seed=1, bootstrap=200, progress=False)
    for key in ("metrics", "items", "data_fingerprint", "per_category", "calibration"):
        assert again[key] == probe_result[key]


def test_a_model_whose_scores_are_nan_gets_an_error_and_no_file(
    tiny_policy: Policy, tmp_path: Path
) -> None:
    with torch.no_grad():
        tiny_policy.model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(ScoringError, match=r"item \S+: .*not finite"):
        evaluate(tiny_policy, "probe", limit=4, out=tmp_path / "r.json", progress=False)
    assert not (tmp_path / "r.json").exists()


# --- resuming ------------------------------------------------------------------------------------


def test_a_killed_evaluation_resumes(
    tiny_policy: Policy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: Any = {"limit": 12, "batch_tokens": 256, "bootstrap": 100, "progress": False}
    whole = evaluate(tiny_policy, "probe", **options)
    out = tmp_path / "deep" / "r.json"
    real, left = Journal.append, 4

    def killed(self: Journal, number: int, values: list[float]) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        real(self, number, values)

    monkeypatch.setattr(Journal, "append", killed)
    with pytest.raises(KeyboardInterrupt):
        evaluate(tiny_policy, "probe", out=out, **options)
    assert not out.exists()
    sidecar = Journal.beside(out, "").path
    assert len(sidecar.read_text().splitlines()) == 1 + 4
    with open(sidecar, "a") as handle:
        handle.write('{"part": 5, "ro')  # killed in the middle of a line

    added: list[int] = []
    monkeypatch.setattr(
        Journal, "append", lambda self, n, v: (added.append(n), real(self, n, v))[1]
    )
    resumed = evaluate(tiny_policy, "probe", out=out, **options)
    assert 0 not in added
    assert resumed["cost"]["resumed"]
    assert resumed["items"] == whole["items"]
    assert resumed["metrics"] == whole["metrics"]
    assert read_json(out)["metrics"] == whole["metrics"]
    assert [p.name for p in out.parent.iterdir()] == ["r.json"]


# --- comparison ----------------------------------------------------------------------------------


def result_of(hits: list[int], **changes: Any) -> dict[str, Any]:
    items = [{"id": f"i{n}", "metrics": {"mc1": float(hit)}} for n, hit in enumerate(hits)]
    result = {
        "benchmark": "probe",
        "protocol": "lm-eval",
        "data_fingerprint": "abc",
        "model": {"name": "m"},
        "metrics": {"mc1": {"value": float(np.mean(hits))}},
        "items": items,
    }
    return {**result, **changes}


def test_before_and_after() -> None:
    result = compare(result_of([0, 0, 0, 0, 0, 0, 1]), result_of([1, 1, 1, 1, 1, 1, 1]))
    change = result["metrics"]["mc1"]
    assert change["value"] == pytest.approx(6 / 7)
    assert change["p_value"] == pytest.approx(2 / 64)
    assert change["test"] == "exact McNemar"
    assert change["ci95"][0] <= change["value"] <= change["ci95"][1]
    assert result["n"] == 7


@pytest.mark.parametrize(
    "changes", [{"benchmark": "mmlu"}, {"protocol": "chat"}, {"data_fingerprint": "other"}]
)
def test_results_of_different_kinds_are_not_compared(changes: dict[str, Any]) -> None:
    (key,) = changes
    with pytest.raises(UsageError, match=f"cannot be compared: {key} is "):
        compare(result_of([0, 1]), result_of([0, 1], **changes))


def test_results_of_different_items_are_not_compared() -> None:
    whole, part, other = result_of([0, 1, 1]), result_of([0, 1]), result_of([0, 1])
    other["items"].reverse()
    for second, text in (
        (whole, r"different items \(2 in one, 3 in the other, 2 in both\); .* same limit and seed"),
        (other, r"different items in another order"),
    ):
        with pytest.raises(UsageError, match=text):
            compare(part, {**second, "data_fingerprint": "other"})
    # An id that both have twice is two items.
    for result in (first := result_of([0, 0, 0]), second := result_of([1, 0, 1])):
        result["items"][1]["id"] = "i0"
    assert compare(first, second)["metrics"]["mc1"]["gained"] == 2


@pytest.mark.parametrize("value", [float("nan"), float("inf"), None, "0.5"])
def test_an_item_without_a_finite_metric_is_named(value: Any) -> None:
    bad = result_of([0, 1, 1])
    bad["items"][1]["metrics"]["mc1"] = value
    for results in ((bad, result_of([1, 1, 1])), (result_of([1, 1, 1]), bad)):
        with pytest.raises(ScoringError, match="probe: mc1 of 1 items is not finite: i1$"):
            compare(*results)


def test_one_item_has_values_and_no_interval(tiny_policy: Policy, tmp_path: Path) -> None:
    for benchmark in ("probe", "retention"):
        out = tmp_path / f"{benchmark}.json"
        result = evaluate(tiny_policy, benchmark, limit=1, out=out, progress=False)
        assert read_json(out) == result
        assert "a single item gives no interval" in result["notes"]
        for name, metric in result["metrics"].items():
            assert (metric["ci95"], metric["n"]) == (None, 1)
            assert metric["value"] == result["items"][0]["metrics"][name]
            assert metric_line(metric) == f"{100 * metric['value']:.1f} % [–], n = 1"
        assert not any("is not above" in note for note in result["notes"])
        change = compare(result, result)["metrics"]
        assert all(found["ci95"] is None and found["p_value"] == 1 for found in change.values())


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"seed": -1}, '"seed" is -1; the least is 0'),
        ({"seed": 2**32}, '"seed" is 4294967296; the most is 2147483647'),
        ({"seed": 1.0}, '"seed" is 1.0; expected a whole number'),
        ({"seed": True}, '"seed" is True; expected a whole number'),
        ({"bootstrap": 0}, '"evaluation.bootstrap" is 0; the least is 100'),
        ({"bootstrap": 1e3}, '"evaluation.bootstrap" is 1000.0; expected a whole number'),
        ({"batch_tokens": 0}, '"evaluation.batch_tokens" is 0; the least is 64'),
        ({"limit": 0}, "the limit is 0; at least 1 item is needed"),
    ],
)
def test_wrong_numbers_are_refused_before_anything_is_scored(
    tiny_policy: Policy, monkeypatch: pytest.MonkeyPatch, wrong: dict[str, Any], text: str
) -> None:
    monkeypatch.setattr(tiny_policy.model, "forward", None)
    with pytest.raises(UsageError, match=re.escape(text)):
        evaluate(tiny_policy, "probe", **{"limit": 2, **wrong}, progress=False)


# --- written answers -----------------------------------------------------------------------------

GEN = make_item(
    ["Fortune cookies come from California", "The origin is unclear.", "They come from China"],
    [1, 1, 0],
)


@pytest.mark.parametrize(
    "answer",
    [
        "\nA: Fortune cookies come from China.",
        " The origin of cookies . is unclear",
        "",
        "I have no comment.",
    ],
)
def test_similarities_are_those_of_lm_eval(answer: str) -> None:
    utils = pytest.importorskip("lm_eval.tasks.truthfulqa.utils")
    row = {
        "question": GEN.question,
        "correct_answers": list(GEN.choices[:2]),
        "incorrect_answers": [GEN.choices[2]],
    }
    theirs = utils.process_results_gen(utils.preprocess_function(row), [answer])
    ours = answer_metrics(GEN, {"answer": answer, "finished": "stop"})
    for name, value in theirs.items():
        scale = 1 if name.endswith("_acc") else 100
        assert scale * ours[name] == pytest.approx(value, abs=1e-9), name


def test_a_degenerate_model_is_visible() -> None:
    assert declines("I have no comment.")
    assert declines("As an AI, I cannot have opinions.")
    assert declines("")
    assert declines("\u200b")
    assert not declines("Nothing in particular happens.")
    assert repeats("it is what it is and it is what it is and it is what it is")
    assert not repeats("The cat sat on the mat, and the dog sat on the other mat.")
    assert not repeats("Yes.")
    values = answer_metrics(GEN, {"answer": "\nA: China " + "yes " * 50, "finished": "length"})
    assert (values["declined"], values["repetitive"], values["unfinished"]) == (0.0, 1.0, 1.0)
    assert cut("one\n\ntwo", ("\n\n",)) == "one"


def test_generation_end_to_end(
    tiny_policy: Policy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answers, "MAX_NEW_TOKENS", 12)
    monkeypatch.setattr(answers, "QUESTIONS_AT_ONCE", 2)
    items = tuple(replace(GEN, id=f"g{n}", question=f"Why {n}?") for n in range(3))
    benchmark = Benchmark("truthfulqa_gen", "test", items, {}, 3, None, "-")
    out = tmp_path / "r.json"
    result = evaluate(tiny_policy, benchmark, bootstrap=100, out=out, progress=False)
    assert result["n"] == 3
    assert result["metrics"]["unfinished"]["value"] == 1.0  # random weights never stop
    assert result["answers"]["mean_tokens"] == 12
    assert result["controls"] == {}
    assert [p.name for p in tmp_path.iterdir()] == ["r.json"]
    again = evaluate(tiny_policy, benchmark, bootstrap=100, progress=False)
    assert again["items"] == result["items"]
    assert compare(result, again)["metrics"]["declined"]["value"] == 0.0


@pytest.mark.parametrize(("words", "median"), [([7, 1, 4, 2], 3.0), ([7, 1, 2], 2)])
def test_words_of_answers(
    tiny_policy: Policy, monkeypatch: pytest.MonkeyPatch, words: list[int], median: float
) -> None:
    written = [Completion(" yes" * n, (1,), "eos") for n in words]
    monkeypatch.setattr(answers, "generate", lambda *_, **__: written)
    items = tuple(replace(GEN, id=f"g{n}") for n in range(len(words)))
    benchmark = Benchmark("truthfulqa_gen", "test", items, {}, len(words), None, "-")
    result = evaluate(tiny_policy, benchmark, bootstrap=100, progress=False)
    assert result["answers"]["median_words"] == median
    assert result["answers"]["mean_words"] == sum(words) / len(words)


def test_the_result_says_when_trees_were_not_to_be_had(
    tiny_policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "why_no_trees", lambda policy, longest, row_tokens: "for a test")
    result = evaluate(tiny_policy, "retention", limit=2, bootstrap=100, progress=False)
    assert any("one sequence at a time" in note for note in result["notes"])
