"""A mirror is what the benchmarks read, and appears file by file, whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest

from grath_utils.errors import FetchError, UsageError
from grath_utils.evaluation.benchmarks import BENCHMARKS, load_benchmark
from grath_utils.evaluation.benchmarks.mmlu import SUBJECTS
from grath_utils.evaluation.mirror import make_mirror
from grath_utils.files import read_json, read_jsonl

FILES = {file for row in BENCHMARKS.values() for file in row.files}
TRUTHFULQA = {
    "multiple_choice": {
        "question": "What is it?",
        "mc1_targets": {"choices": ["This.", "That."], "labels": [1, 0]},
        "mc2_targets": {"choices": ["This.", "These.", "That."], "labels": [1, 1, 0]},
    },
    "generation": {
        "type": "Adversarial",
        "category": "Things",
        "question": "What is it?",
        "best_answer": "This.",
        "correct_answers": ["This.", "These."],
        "incorrect_answers": ["That."],
        "source": "none",
    },
}


def hub_row(dataset: str, config: str | None, split: str, n: int) -> dict[str, Any]:
    """Return a row in the schema of one of the Hub's data sets."""
    if dataset == "truthfulqa/truthful_qa":
        row = TRUTHFULQA[config or ""]
        return {**row, "question": f"{row['question'][:-1]} {n}?"}
    if dataset == "allenai/ai2_arc":
        choices = {"text": ["red", "green", "blue"], "label": ["1", "2", "3"]}
        return {
            "id": f"{split}-{n}",
            "question": f"{split} {n}?",
            "choices": choices,
            "answerKey": "2",
        }
    if dataset == "Rowan/hellaswag":
        return {
            "ind": n,
            "activity_label": "Cooking",
            "ctx_a": f"[header] {split} {n} [title] He stirs.",
            "ctx_b": "she",
            "ctx": "",
            "endings": ["eats.", "sings [step] well.", "flies.", "sleeps."],
            "source_id": "x",
            "split": split,
            "split_type": "indomain",
            "label": "1",
        }
    assert dataset == "cais/mmlu"
    return {"question": f"{n}?", "subject": config, "choices": list("wxyz"), "answer": 3}


@pytest.fixture
def fake_hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Replace the Hub by three to thirty made-up rows for each split; return the calls."""
    calls: list[tuple[Any, ...]] = []

    def load_dataset(path: str, name: str | None = None, **options: Any) -> datasets.Dataset:
        assert len(options["revision"]) == 40  # pinned, not a branch
        calls.append((path, name, options["split"]))
        count = 30 if options["split"] in ("train", "dev") else 3
        rows = [hub_row(path, name, options["split"], n) for n in range(count)]
        return datasets.Dataset.from_list(rows)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


def test_the_mirror_holds_what_the_benchmarks_read(
    fake_hub: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [name for name, row in BENCHMARKS.items() if row.files]
    monkeypatch.delenv("GRATH_MIRROR", raising=False)
    from_hub = {name: load_benchmark(name) for name in names}
    assert from_hub["arc_challenge"].source == "Hub allenai/ai2_arc@210d026f"

    folder = make_mirror(tmp_path / "mirror", progress=False)
    monkeypatch.setenv("GRATH_MIRROR", str(folder))
    fake_hub.clear()
    for name in names:
        mirrored = load_benchmark(name)
        assert mirrored.source == "mirror mirror"
        assert mirrored.items == from_hub[name].items
        assert mirrored.fingerprint == from_hub[name].fingerprint
    assert fake_hub == []  # with a mirror, the Hub is never asked


def test_the_layout(fake_hub: list, tmp_path: Path) -> None:
    folder = make_mirror(tmp_path / "new" / "mirror", progress=False)
    written = {str(p.relative_to(folder).as_posix()) for p in folder.rglob("*.jsonl")}
    assert written == {
        "truthful_qa/multiple_choice/validation.jsonl",
        "truthful_qa/generation/validation.jsonl",
        "ai2_arc/ARC-Challenge/train.jsonl",
        "ai2_arc/ARC-Challenge/test.jsonl",
        "hellaswag/validation.jsonl",
        "hellaswag/train.jsonl",
        *(f"mmlu/{s}/{split}.jsonl" for s in SUBJECTS for split in ("dev", "test")),
    }
    assert len(SUBJECTS) == 57
    row = read_jsonl(folder / "truthful_qa/multiple_choice/validation.jsonl")[1]
    assert row == {**TRUTHFULQA["multiple_choice"], "question": "What is it 1?"}
    assert set(read_json(folder / "mirror.json")["files"]) == {f.path for f in FILES}


def test_it_resumes_where_it_stopped(
    fake_hub: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = datasets.load_dataset
    left = 5

    def fails_later(*args: Any, **options: Any) -> datasets.Dataset:
        nonlocal left
        left -= 1
        if left < 0:
            raise ConnectionError("the cable was pulled")
        return real(*args, **options)

    monkeypatch.setattr(datasets, "load_dataset", fails_later)
    with pytest.raises(FetchError, match=r"cable was pulled.*GRATH_MIRROR.*probe"):
        make_mirror(tmp_path, progress=False)
    assert len(list(tmp_path.rglob("*.jsonl"))) == 5
    assert not (tmp_path / "mirror.json").exists()

    monkeypatch.setattr(datasets, "load_dataset", real)
    fake_hub.clear()
    make_mirror(tmp_path, progress=False)
    assert len(fake_hub) == len(FILES) - 5


def test_no_network_names_the_two_ways_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GRATH_MIRROR", raising=False)

    def offline(*args: Any, **options: Any) -> None:
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(FetchError, match=r"(?s)reach the Hub.*GRATH_MIRROR.*--benchmark probe"):
        load_benchmark("truthfulqa_mc")


def test_a_file_is_no_place_for_a_mirror(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("x")
    with pytest.raises(UsageError, match="is a file"):
        make_mirror(tmp_path / "taken", progress=False)
