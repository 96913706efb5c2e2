"""What CONTRIBUTING.md says about adding a benchmark is enough: one file, one line."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import follow_contributing

from grath_utils.files import write_jsonl

FOLLOW = """
import sys

from grath_utils.cli import main
from grath_utils.config import ModelConfig
from grath_utils.engine.models import load_base
from grath_utils.evaluation import compare, evaluate

try:
    main(["evaluate", "--help"])
except SystemExit:
    pass
settings = [f"model.name={sys.argv[1]}", "evaluation.benchmarks=[openbookqa]"]
assert not main(["run", "--dry-run", "--profile", "smoke", "--set", *settings])
policy = load_base(ModelConfig(name=sys.argv[1], dtype="float32", device="cpu"))
result = evaluate(policy, "openbookqa", bootstrap=100, progress=False)
print(result["source"], result["protocol"], result["n"], *result["metrics"], *result["controls"])
print(*compare(result, result)["metrics"])
"""


@pytest.mark.slow
def test_the_page_on_adding_a_benchmark(tiny_llama: Path, tmp_path: Path) -> None:
    follow_contributing(
        "Add a benchmark", "evaluation/benchmarks", '    "own:RETENTION",\n', tmp_path
    )
    choices = {"text": ["rain", "coal", "a stone", "sand"], "label": list("ABCD")}
    row = {"question_stem": "Clouds bring", "choices": choices, "answerKey": "A"}
    mirror = tmp_path / "mirror"
    write_jsonl(mirror / "openbookqa/main/test.jsonl", [{"id": f"q{n}", **row} for n in range(3)])

    run = subprocess.run(
        [sys.executable, "-c", FOLLOW, str(tiny_llama)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path), "GRATH_MIRROR": str(mirror)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    said = " ".join(run.stdout.split())
    assert "openbookqa: a fact of science and some common sense" in said
    assert re.search(r"evaluate after round \d on openbookqa", said)
    assert "mirror mirror zero-shot 3 acc_norm acc chance" in said
    assert said.endswith("acc_norm acc")
