"""Sixteen small runs with kills, a full disk and a damaged file end as in peace."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from fault_injection import check_same, run_script
from helpers import write_questions

from grath_utils.files import read_json

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="kill -9 and fork are POSIX"),
]

GRID = """
profile: smoke
set:
  model.name: {model}
  model.dtype: float32
  model.device: cpu
  questions.source: {questions}
  questions.limit: null
  pairs.filters: [none]
  pairs.shots: 0
  pairs.candidates: 6
  pairs.max_new_tokens: 8
  dpo.steps: 1
  loop.iterations: 1
  loop.signals: false
  evaluation.benchmarks: [probe]
  evaluation.limit: 4
  evaluation.bootstrap: 100
grid:
  seed: [0, 1]
  dpo.beta: [0.05, 0.2]
  dpo.reference: [current, base]
  lora.r: [2, 4]
"""


@pytest.fixture(scope="module")
def soaked(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("soak")
    grid = GRID.format(model=tiny_llama, questions=write_questions(folder / "questions.jsonl", 6))
    (folder / "grid.yaml").write_text(grid, encoding="utf-8")
    return folder, run_script("soak.py", folder, 3)


def test_everything_went_wrong_and_was_named(soaked) -> None:
    _, seen = soaked
    assert seen["killed"] >= 3
    assert seen["full"] >= 1
    assert "pairs.jsonl is not as it was made" in seen["complaint"]
    assert "delete it, and the same command makes it again" in seen["complaint"]
    assert seen["points hindered"] == 1


def test_the_table_is_that_of_an_undisturbed_sweep(soaked) -> None:
    folder, _ = soaked
    for name in ("table.csv", "summary.csv"):
        assert (folder / "hurt" / name).read_bytes() == (folder / "whole" / name).read_bytes()
    rows = sorted(path.name for path in (folder / "whole" / "rows").iterdir())
    assert len(rows) == 16
    for name in rows:
        ours, theirs = (read_json(folder / which / "rows" / name) for which in ("hurt", "whole"))
        assert ours == theirs
        check_same(*(folder / which / "runs" / name[:-5] for which in ("hurt", "whole")))
