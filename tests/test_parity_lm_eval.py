"""Our numbers are lm-evaluation-harness's numbers: every item's log-probability, every metric.

lm-eval runs its own task files on the same local rows, with the same model object, in float32 and
in this process. It needs the mirror (``GRATH_MIRROR``); for the default model a small sample of
each benchmark is compared, which is enough to catch one wrong space.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from grath_utils.artifacts import write_jsonl
from grath_utils.benchmarks import load_benchmark
from grath_utils.evaluation import evaluate

lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is a development extra")

TOLERANCE = 1e-3  # nats, on the sum over a whole answer
TASKS = Path(lm_eval.__file__).parent / "tasks"

pytestmark = pytest.mark.model


def sample_mirror(mirror: Path, folder: Path, names: dict[str, int]) -> Path:
    """Write a mirror with a sample of each named file; what is not named is left out."""
    for name, count in names.items():
        rows = [json.loads(line) for line in (mirror / name).read_text("utf-8").splitlines()]
        picked = rows if count >= len(rows) else random.Random(7).sample(rows, count)
        write_jsonl(folder / name, picked)
    return folder


def run_lm_eval(policy: Any, config: dict[str, Any], shots: int) -> dict[str, Any]:
    """Run one lm-eval task given as a dictionary; return its results and logged samples."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    model = HFLM(pretrained=policy.model, tokenizer=policy.tokenizer, batch_size=4)
    return simple_evaluate(
        model=model,
        tasks=[config],
        num_fewshot=shots,
        task_manager=TaskManager(include_defaults=False),
        log_samples=True,
        bootstrap_iters=0,
        verbosity="ERROR",
    )


def task_config(path: Path, data: dict[str, Path], **changes: Any) -> dict[str, Any]:
    """Read a task file of lm-eval and point it to local files."""
    from lm_eval.utils import load_yaml_config

    config = load_yaml_config(str(path))
    for key in ("tag", "group", "task_alias"):
        config.pop(key, None)
    config["dataset_path"] = "json"
    config["dataset_name"] = None
    config["dataset_kwargs"] = {"data_files": {k: str(v) for k, v in data.items()}}
    return {**config, **changes}
