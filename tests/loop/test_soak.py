"""Thirty-two small runs with kills, a full disk and a damaged file end as in peace."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from fault_injection import check_same

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
  seed: [0, 1, 2, 3]
  dpo.beta: [0.05, 0.2]
  dpo.reference: [current, base]
  lora.r: [2, 4]
"""


@pytest.fixture(scope="module")
def soaked(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("soak")
    questions = folder / "questions.jsonl"
    rows = [{"id": f"q{i}", "question": f"What is thing number {i}?"} for i in range(6)]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    grid = folder / "grid.yaml"
    grid.write_text(GRID.format(model=tiny_llama, questions=questions), encoding="utf-8")
    script = Path(__file__).with_name("soak.py")
    done = subprocess.run(
        [sys.executable, script, folder, grid, "3"],
        capture_output=True,
        text=True,
        timeout=1500,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
    )
    assert done.returncode == 0, done.stderr + done.stdout
    return folder, json.loads(done.stdout.splitlines()[-1])


def test_everything_went_wrong_and_was_named(soaked) -> None:
    _, seen = soaked
    assert seen["killed"] >= 5
    assert seen["full"] >= 1
    assert "pairs.jsonl is not as it was made" in seen["complaint"]
    assert "delete it, and the same command makes it again" in seen["complaint"]
    assert seen["points not hindered"] == 31


def test_the_table_is_that_of_an_undisturbed_sweep(soaked) -> None:
    folder, _ = soaked
    for name in ("table.csv", "summary.csv"):
        assert (folder / "hurt" / name).read_bytes() == (folder / "whole" / name).read_bytes()
    rows = sorted(path.name for path in (folder / "whole" / "rows").iterdir())
    assert len(rows) == 32
    for name in rows:
        ours, theirs = (read_json(folder / which / "rows" / name) for which in ("hurt", "whole"))
        assert ours == theirs
        check_same(*(folder / which / "runs" / name[:-5] for which in ("hurt", "whole")))
