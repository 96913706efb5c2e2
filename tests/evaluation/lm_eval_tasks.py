"""lm-evaluation-harness's own task files, run on local rows in this process, without a network."""

from __future__ import annotations

import json
import logging
import random
from pathlib import Path
from typing import Any

from grath_utils.evaluation.benchmarks import arc, hellaswag
from grath_utils.evaluation.benchmarks.truthfulqa import GENERATION, MULTIPLE_CHOICE
from grath_utils.files import data_dir, read_jsonl, write_jsonl


def sample_rows(mirror: Path, name: str, count: int | None, seed: int = 7) -> list[dict[str, Any]]:
    """Return ``count`` rows of a mirror's file, in their order; all for None."""
    rows = [json.loads(x) for x in (mirror / name).read_text("utf-8").split("\n") if x]
    if count is None or count >= len(rows):
        return rows
    keep = sorted(random.Random(seed).sample(range(len(rows)), count))
    return [rows[i] for i in keep]


def small_mirror(mirror: Path, folder: Path, sizes: dict[str, int | None]) -> Path:
    """Write a mirror that holds a sample of each named file and nothing else.

    The mirror has no HellaSwag training rows; where some are asked for, validation rows that are
    not in the sample stand in, since both sides draw their shots from that file.
    """
    for name, count in sizes.items():
        if name == hellaswag.TRAIN.path:
            tested = {row["ind"] for row in sample_rows(folder, hellaswag.VALIDATION.path, None)}
            rows = sample_rows(mirror, hellaswag.VALIDATION.path, None)
            rows = [row for row in rows if row["ind"] not in tested][:count]
        else:
            rows = sample_rows(mirror, name, count)
        write_jsonl(folder / name, rows)
    return folder


def own_mirror(folder: Path, subjects: tuple[str, ...]) -> Path:
    """Write a mirror whose rows are our own probe and retention items in the benchmarks' schemas.

    With it the comparison needs no benchmark at all: formats, shots and scores are the same code.
    """
    probe = read_jsonl(data_dir() / "probe.jsonl")
    facts = read_jsonl(data_dir() / "retention.jsonl")
    science = [
        {
            "id": row["id"],
            "question": row["question"],
            "choices": {"text": row["choices"], "label": list("ABCD")},
            "answerKey": "ABCD"[row["answer"]],
        }
        for row in facts
    ]
    swag = [
        {
            "ind": n,
            "activity_label": row["category"],
            "ctx_a": f"[header] {row['question']} [title] Someone answers.",
            "ctx_b": "they say",
            "endings": [f"{choice} [substeps] and leave." for choice in row["choices"]],
            "label": str(row["answer"]),
        }
        for n, row in enumerate(facts)
    ]
    files = {
        MULTIPLE_CHOICE.path: probe[:3],
        arc.TEST.path: science[:3],
        arc.TRAIN.path: science[3:120],
        hellaswag.VALIDATION.path: swag[:3],
        hellaswag.TRAIN.path: swag[3:120],
    }
    for n, subject in enumerate(subjects):
        rows = facts[20 * n : 20 * n + 8]
        files |= {f"mmlu/{subject}/dev.jsonl": rows[:5], f"mmlu/{subject}/test.jsonl": rows[5:]}
    for name, rows in files.items():
        write_jsonl(folder / name, rows)
    return folder


def task(folder: Path, name: str) -> dict[str, Any]:
    """Return an lm-eval task of the installed package, its data replaced by a mirror's files.

    Args:
        folder: the mirror.
        name: ``truthfulqa_mc1``, ``truthfulqa_mc2``, ``truthfulqa_gen``, ``arc_challenge``,
            ``hellaswag`` or ``mmlu_SUBJECT``.
    """
    import lm_eval.tasks
    from lm_eval.tasks._yaml_loader import load_yaml

    subject = name.removeprefix("mmlu_")
    files, path = {
        "truthfulqa_mc1": ({"validation": MULTIPLE_CHOICE.path}, "truthfulqa/truthfulqa_mc1.yaml"),
        "truthfulqa_mc2": ({"validation": MULTIPLE_CHOICE.path}, "truthfulqa/truthfulqa_mc2.yaml"),
        "truthfulqa_gen": (
            {"validation": GENERATION.path},
            "truthfulqa/truthfulqa_gen.yaml",
        ),
        "arc_challenge": (
            {"train": arc.TRAIN.path, "test": arc.TEST.path},
            "arc/arc_challenge.yaml",
        ),
        "hellaswag": (
            {"train": hellaswag.TRAIN.path, "validation": hellaswag.VALIDATION.path},
            "hellaswag/hellaswag.yaml",
        ),
    }.get(
        name,
        (
            {s: f"mmlu/{subject}/{s}.jsonl" for s in ("dev", "test")},
            f"mmlu/default/{name}.yaml",
        ),
    )
    config = dict(load_yaml(Path(lm_eval.tasks.__file__).parent / path))
    for key in ("tag", "task_alias", "group"):
        config.pop(key, None)
    if name == "arc_challenge":
        config["validation_split"] = None
    config |= {
        "task": name,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {k: str(folder / v) for k, v in files.items()}},
    }
    return config


def run(
    policy: Any,
    tasks: list[dict[str, Any]],
    shots: int,
    batch_size: int = 4,
    limit: int | None = None,
) -> dict[str, Any]:
    """Run lm-eval on a loaded policy; return its ``results`` and ``samples``."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    model = HFLM(pretrained=policy.model, tokenizer=policy.tokenizer, batch_size=batch_size)
    return simple_evaluate(
        model=model,
        tasks=tasks,
        num_fewshot=shots,
        task_manager=TaskManager(include_defaults=False),
        log_samples=True,
        bootstrap_iters=0,
        limit=limit,
    )


def logprobs(sample: dict[str, Any]) -> list[float]:
    """Return the choices' log-probabilities of a logged sample, in their order."""
    return [float(response[0][0]) for response in sample["resps"]]
