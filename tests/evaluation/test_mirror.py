"""A mirror is what the benchmarks read, and appears file by file, whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
from lm_eval_tasks import own_mirror

from grath_utils.errors import FetchError, UsageError
from grath_utils.evaluation.benchmarks import BENCHMARKS, load_benchmark
from grath_utils.evaluation.benchmarks.hub_files import HubFile
from grath_utils.evaluation.benchmarks.mmlu import SUBJECTS
from grath_utils.evaluation.mirror import make_mirror
from grath_utils.files import read_json, read_jsonl

FILES = {file for row in BENCHMARKS.values() for file in row.files}
LAYOUT = {
    "truthful_qa/multiple_choice/validation.jsonl",
    "truthful_qa/generation/validation.jsonl",
    "ai2_arc/ARC-Challenge/train.jsonl",
    "ai2_arc/ARC-Challenge/test.jsonl",
    "hellaswag/validation.jsonl",
    "hellaswag/train.jsonl",
    *(f"mmlu/{s}/{split}.jsonl" for s in SUBJECTS for split in ("dev", "test")),
}


@pytest.fixture
def fake_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[HubFile]:
    """Replace the Hub by our own rows in its schemas; return what is asked for."""
    hub, asked = own_mirror(tmp_path / "hub", SUBJECTS), []

    def load_dataset(path: str, name: str | None, *, split: str, revision: str) -> Any:
        assert len(revision) == 40  # pinned, not a branch
        asked.append(HubFile(path, revision, name, split))
        return datasets.Dataset.from_list(read_jsonl(hub / asked[-1].path))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


def test_the_mirror_holds_what_the_benchmarks_read(
    fake_hub: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [name for name, row in BENCHMARKS.items() if row.files]
    monkeypatch.delenv("GRATH_MIRROR", raising=False)
    from_hub = {name: load_benchmark(name) for name in names}
    assert from_hub["arc_challenge"].source == "Hub allenai/ai2_arc@210d026f"

    folder = make_mirror(tmp_path / "new" / "mirror", progress=False)
    written = {p.relative_to(folder).as_posix() for p in folder.rglob("*.jsonl")}
    assert written == {file.path for file in FILES} == LAYOUT
    assert len(SUBJECTS) == 57
    assert set(read_json(folder / "mirror.json")["files"]) == LAYOUT
    for path in LAYOUT:
        assert read_jsonl(folder / path) == read_jsonl(tmp_path / "hub" / path)

    monkeypatch.setenv("GRATH_MIRROR", str(folder))
    fake_hub.clear()
    for name in names:
        mirrored = load_benchmark(name)
        assert mirrored.source == "mirror mirror"
        assert mirrored.items == from_hub[name].items
        assert mirrored.fingerprint == from_hub[name].fingerprint
    assert fake_hub == []  # with a mirror, the Hub is never asked


def test_it_resumes_where_it_stopped(
    fake_hub: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, folder = datasets.load_dataset, tmp_path / "mirror"

    def fails_later(*args: Any, **options: Any) -> datasets.Dataset:
        if len(fake_hub) == 5:
            raise ConnectionError("the cable was pulled")
        return real(*args, **options)

    monkeypatch.setattr(datasets, "load_dataset", fails_later)
    with pytest.raises(FetchError, match=r"cable was pulled.*GRATH_MIRROR.*probe"):
        make_mirror(folder, progress=False)
    assert len(list(folder.rglob("*.jsonl"))) == 5
    assert not (folder / "mirror.json").exists()

    monkeypatch.setattr(datasets, "load_dataset", real)
    make_mirror(folder, progress=False)
    assert len(fake_hub) == len(set(fake_hub)) == len(FILES)


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
    with pytest.raises(UsageError, match="is a folder that is not empty"):
        make_mirror(tmp_path, progress=False)
    (tmp_path / "mirror.json").write_text('{"mine": 1}')
    with pytest.raises(UsageError, match=r"mirror\.json exists and was not written"):
        make_mirror(tmp_path, progress=False)
