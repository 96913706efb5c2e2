"""Items are read right from every source, and a bad row or a missing file is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from grath_utils.errors import DataError, UsageError
from grath_utils.evaluation.benchmarks import BENCHMARKS, hub_files, load_benchmark
from grath_utils.evaluation.benchmarks.mmlu import SUBJECTS
from grath_utils.evaluation.benchmarks.truthfulqa import PRIMER, truthfulqa_item
from grath_utils.evaluation.protocols import build_prompts, build_requests, find_protocol
from grath_utils.files import write_jsonl

ROW = {
    "question": "Why?",
    "mc1_targets": {"choices": ["A.", "B."], "labels": [1, 0]},
    "mc2_targets": {"choices": ["B.", "A.", "C."], "labels": [0, 1, 1]},
}


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Write files of a mirror and use it."""

    def write(**files: list[dict[str, Any]]) -> Path:
        names = {
            "mc": "truthful_qa/multiple_choice/validation.jsonl",
            "gen": "truthful_qa/generation/validation.jsonl",
            "arc_test": "ai2_arc/ARC-Challenge/test.jsonl",
            "arc_train": "ai2_arc/ARC-Challenge/train.jsonl",
            "swag": "hellaswag/validation.jsonl",
        }
        for key, rows in files.items():
            write_jsonl(tmp_path / names[key], rows)
        monkeypatch.setenv("GRATH_MIRROR", str(tmp_path))
        return tmp_path

    return write


def arc(name: str, key: str = "B", labels: tuple[str, ...] = ("A", "B")) -> dict[str, Any]:
    texts = ["red", "green", "blue", "grey"][: len(labels)]
    choices = {"text": texts, "label": list(labels)}
    return {"id": name, "question": f"{name}?", "choices": choices, "answerKey": key}


def swag(n: int, label: str = "1") -> dict[str, Any]:
    return {
        "ind": n,
        "activity_label": "Baking",
        "ctx_a": f"[header] Bread {n} [title] Mix  it.",
        "ctx_b": "the baker",
        "endings": ["waits [substeps] long.", "kneads.", "sings.", "leaves."],
        "label": label,
    }


# --- our own data --------------------------------------------------------------------------------


def test_our_own_sets() -> None:
    probe, retention = load_benchmark("probe"), load_benchmark("retention")
    assert (probe.source, retention.source) == ("own data", "own data")
    halves = [load_benchmark(f"probe_{half}").items for half in ("choosing", "testing")]
    assert [len(half) for half in halves] == [200, 200]
    assert {i.id for half in halves for i in half} == {i.id for i in probe.items}
    assert all([i.position for i in half] == list(range(200)) for half in halves)
    assert len(retention.items) >= 160
    for item in (*probe.items, *retention.items):
        assert sum(item.labels[i] for i in item.mc1) == 1
        assert item.category
        assert item.choices[item.gold]
    assert all(len(item.choices) == 4 for item in retention.items)


def test_a_draw_is_stable_and_a_smaller_one_is_part_of_it() -> None:
    def ids(limit: int, seed: int) -> list[str]:
        return [item.id for item in load_benchmark("probe", limit=limit, seed=seed).items]

    assert ids(20, 1) == ids(20, 1)
    assert set(ids(10, 1)) < set(ids(20, 1))
    assert ids(20, 1) != ids(20, 2)
    everything = load_benchmark("probe")
    order = [item.id for item in everything.items]
    assert ids(20, 1) == sorted(ids(20, 1), key=order.index)
    assert load_benchmark("probe", limit=10**6).items == everything.items
    assert load_benchmark("probe", limit=20).fingerprint != everything.fingerprint


@pytest.mark.parametrize(
    ("name", "limit", "message"),
    [
        ("probe", 0, "at least 1"),
        ("probe", -3, "at least 1"),
        ("truthfulqa-mc", None, 'did you mean "truthfulqa_mc"'),
        ("truthfulqa_mc", None, "GRATH_MIRROR names /nowhere/at/all"),
    ],
)
def test_what_cannot_be_loaded(
    name: str, limit: int | None, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRATH_MIRROR", "/nowhere/at/all")
    with pytest.raises(UsageError, match=message):
        load_benchmark(name, limit=limit)


# --- rows ----------------------------------------------------------------------------------------


def targets(choices: list[str], labels: list[int]) -> dict[str, Any]:
    return {"choices": choices, "labels": labels}


def test_mc1_is_part_of_mc2_and_labels_are_read_from_the_list() -> None:
    item = truthfulqa_item(ROW)
    assert item.choices == ("B.", "A.", "C.")  # three to score for both metrics, not five
    assert (item.mc1, item.mc2, item.gold) == ((1, 0), (0, 1, 2), 1)
    # An MC1 choice outside MC2 is scored, but not counted there.
    item = truthfulqa_item({**ROW, "mc1_targets": targets(["D.", "B."], [1, 0])})
    assert item.choices == ("B.", "A.", "C.", "D.")
    assert (item.mc1, item.mc2) == ((3, 0), (0, 1, 2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mc1_targets": targets([], [])}, "mc1_targets: the list of choices is empty"),
        ({"mc1_targets": targets(["A."], [1, 0])}, "choices and labels differ in number"),
        ({"mc1_targets": targets(["B.", "E."], [0, 0])}, "no choice is true"),
        ({"mc1_targets": targets(["A."], [1])}, "no choice is false"),
        ({"mc1_targets": targets(["A.", "B."], [1, 1])}, "disagree on whether 'B.'"),
        ({"mc1_targets": targets(["A.", "C.", "B."], [1, 1, 0])}, "MC1 needs one true choice"),
        ({"mc2_targets": targets(["A.", "C."], [1, 1])}, "no choice is false"),
        ({"mc2_targets": targets(["A.", "B.", " "], [1, 0, 0])}, "a choice is empty"),
        ({"mc2_targets": targets(["A.", "B."], [1, 2])}, "expected 0 and 1|disagree"),
        ({"question": "  "}, "the question is empty"),
        ({"mc2_targets": None}, "row 2"),
        ({"mc2_targets": {}}, "row 2: no 'choices'"),
    ],
)
def test_a_malformed_row_is_named(make: Any, change: dict[str, Any], message: str) -> None:
    make(mc=[ROW, {**ROW, **change}])
    with pytest.raises(DataError, match=message) as caught:
        load_benchmark("truthfulqa_mc")
    assert "truthful_qa/multiple_choice/validation.jsonl, row 2: " in str(caught.value)


def test_the_same_question_twice_gets_two_ids(make: Any) -> None:
    make(mc=[ROW, ROW])
    first, second = load_benchmark("truthfulqa_mc").items
    assert second.id == f"{first.id}-2"
    make(mc=[])
    with pytest.raises(DataError, match="holds no item"):
        load_benchmark("truthfulqa_mc")


def test_the_other_forms_of_truthfulqa(make: Any) -> None:
    gen = {"question": "Why?", "category": "Reasons"}
    make(mc=[ROW], gen=[{**gen, "correct_answers": ["A"], "incorrect_answers": ["B"]}])
    names = ("truthfulqa_mc", "truthfulqa_binary", "truthfulqa_gen")
    items = {name: load_benchmark(name).items[0] for name in names}
    assert {item.category for item in items.values()} == {"Reasons"}  # of the generation rows
    for name, choices in (("truthfulqa_binary", ("A.", "B.")), ("truthfulqa_gen", ("A", "B"))):
        assert (items[name].choices, items[name].labels) == (choices, (1, 0))


def test_the_binary_form_takes_the_row_s_own_false_answer(make: Any) -> None:
    other = {**ROW, "question": "How?"}
    gen = [{"question": "Why?", "category": "Reasons", "best_incorrect_answer": "Z."}]
    make(mc=[ROW, other], gen=gen)
    benchmark = load_benchmark("truthfulqa_binary")
    assert [item.choices for item in benchmark.items] == [("A.", "Z."), ("A.", "B.")]
    assert benchmark.notes == ("the false answer is MC1's first listed one for 1 of 2 questions",)
    make(mc=[ROW])
    assert load_benchmark("truthfulqa_binary").notes == ()
    make(mc=[ROW], gen=[{"category": "Reasons"}])
    with pytest.raises(DataError, match="generation/validation.jsonl: no 'question'"):
        load_benchmark("truthfulqa_binary")


def test_arc_keys_are_letters_or_numbers(make: Any) -> None:
    make(arc_test=[arc("x"), arc("y", "3", ("1", "2", "3"))], arc_train=[arc("t", "A")])
    benchmark = load_benchmark("arc_challenge")
    assert [item.gold for item in benchmark.items] == [1, 2]
    assert [item.id for item in benchmark.shots[""]] == ["t"]
    make(arc_test=[arc("x", "E")])
    with pytest.raises(DataError, match=r"test.jsonl, row 1: the answer 'E' is not among"):
        load_benchmark("arc_challenge")


def test_hellaswag_text_is_cleaned_as_lm_eval_cleans_it(make: Any) -> None:
    make(swag=[swag(n) for n in range(12)])
    benchmark = load_benchmark("hellaswag")
    item = benchmark.items[0]
    assert item.question == "Baking: Bread 0. Mix it. The baker"
    assert item.choices[0] == "waits long."
    assert item.gold == 1
    assert "the mirror has no train" in benchmark.notes[0]
    make(swag=[swag(0, "7")])
    with pytest.raises(DataError, match="the answer is 7; expected 0 to 3"):
        load_benchmark("hellaswag")


# --- sources -------------------------------------------------------------------------------------


def test_a_file_missing_from_the_mirror_is_named_and_not_fetched(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make()

    def never(file: Any) -> None:
        raise AssertionError("the Hub was asked")

    monkeypatch.setattr(hub_files, "hub_rows", never)
    for name in [name for name, row in BENCHMARKS.items() if row.files]:
        with pytest.raises(DataError, match=r"has no \S+\.jsonl") as caught:
            load_benchmark(name)
        assert str(folder) in str(caught.value)


@pytest.mark.slow
def test_the_mirror_here(mirror: Path) -> None:
    """Every benchmark of the real mirror can be read, and has what its README says."""
    for name in BENCHMARKS:
        benchmark = load_benchmark(name)
        assert len({item.id for item in benchmark.items}) == len(benchmark.items)
        assert all(item.labels[item.gold] for item in benchmark.items)
    truthfulqa = load_benchmark("truthfulqa_mc")
    assert all(set(item.mc1) <= set(item.mc2) for item in truthfulqa.items)
    assert {len(load_benchmark("mmlu").shots[s]) for s in SUBJECTS} == {5}


# --- protocols -----------------------------------------------------------------------------------


def test_every_row_is_complete() -> None:
    for name, row in BENCHMARKS.items():
        assert row.name == name
        assert row.about
        assert row.metrics
        assert find_protocol(name, None) is row.protocols[0]
        assert row.size.tokens >= row.size.predicted > 0
    with pytest.raises(UsageError, match='no protocol "chatt"; did you mean "chat"'):
        find_protocol("probe", "chatt")


def test_prompts_letter_by_letter(make: Any, tiny_policy: Any) -> None:
    make(mc=[ROW], arc_test=[arc("x")], arc_train=[arc(f"t{n}", "A") for n in range(30)])
    tokenizer = tiny_policy.tokenizer

    def first(name: str, protocol: str) -> tuple[str, str]:
        benchmark = load_benchmark(name)
        request = build_requests(benchmark, find_protocol(name, protocol), tokenizer)[0][0]
        return request.prompt, request.completion

    assert first("truthfulqa_mc", "lm-eval") == (f"{PRIMER}\n\nQ: Why?\nA:", " B.")
    assert first("truthfulqa_mc", "chat") == (
        "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n",
        "B.",
    )
    assert first("arc_challenge", "zero-shot") == ("Question: x?\nAnswer:", " red")
    prompt, _ = first("arc_challenge", "lm-eval")
    assert prompt.count("\nAnswer: red\n\nQuestion: ") == 25
    assert prompt.endswith("\n\nQuestion: x?\nAnswer:")


def test_the_qa_preset_closes_answers_with_a_period(make: Any) -> None:
    row = {**ROW, "mc1_targets": targets(["A", "B."], [1, 0])}
    row["mc2_targets"] = targets(["A", "B."], [1, 0])
    make(mc=[row])
    benchmark = load_benchmark("truthfulqa_mc")
    (group,) = build_requests(benchmark, find_protocol("truthfulqa_mc", "qa"), None)
    assert [request.completion for request in group] == [" A.", " B."]


def test_an_item_is_never_its_own_shot(make: Any) -> None:
    make(swag=[swag(n) for n in range(11)])
    benchmark = load_benchmark("hellaswag")
    for protocol in ("lm-eval", "shared"):
        prompts = build_prompts(benchmark, find_protocol("hellaswag", protocol), None)
        for n, prompt in enumerate(prompts):
            assert prompt.count(f"Bread {n}.") == 1
            assert prompt.count("Bread ") == 11
    make(swag=[swag(n) for n in range(5)])
    with pytest.raises(DataError, match="10 shots are needed, and there are 5"):
        build_prompts(load_benchmark("hellaswag"), find_protocol("hellaswag", None), None)


def test_shared_shots_are_shared(make: Any) -> None:
    make(arc_test=[arc("x"), arc("y")], arc_train=[arc(f"t{n}", "A") for n in range(30)])
    benchmark = load_benchmark("arc_challenge")
    shared = build_prompts(benchmark, find_protocol("arc_challenge", "shared"), None)
    assert len({prompt.rpartition("\n\n")[0] for prompt in shared}) == 1
    protocol = find_protocol("arc_challenge", "lm-eval")
    each = build_prompts(benchmark, protocol, None)
    assert len({prompt.rpartition("\n\n")[0] for prompt in each}) == 2
    # An item keeps its shots when only part of the benchmark is asked for.
    parts = [load_benchmark("arc_challenge", limit=1, seed=seed) for seed in range(8)]
    assert {build_prompts(part, protocol, None)[0] for part in parts} == set(each)
