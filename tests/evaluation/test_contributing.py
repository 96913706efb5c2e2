"""What CONTRIBUTING.md says about adding a benchmark is enough: one file, one line."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from grath_utils.files import write_jsonl

ROOT = Path(__file__).resolve().parents[2]
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


def test_the_page_on_adding_a_benchmark(tiny_llama: Path, tmp_path: Path) -> None:
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    section = page.partition("## Add a benchmark")[2].partition("\n## ")[0]
    code, line = re.findall(r"```(?:python|text)\n(.*?)```", section, re.DOTALL)
    new, registry = re.findall(r"`(grath_utils/evaluation/benchmarks/\w+\.py)`", section)
    for name in ("grath_utils", "data"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / new).write_text(code, encoding="utf-8")
    rows = (tmp_path / registry).read_text(encoding="utf-8")
    last = '    "own:RETENTION",\n'
    assert last in rows
    (tmp_path / registry).write_text(rows.replace(last, last + line), encoding="utf-8")
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
    assert re.search(r"evaluate iter_\d on openbookqa", said)
    assert "mirror mirror zero-shot 3 acc_norm acc chance" in said
    assert said.endswith("acc_norm acc")
