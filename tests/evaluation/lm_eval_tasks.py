"""lm-evaluation-harness's own task files, run on local rows in this process, without a network."""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from grath_utils.evaluation.benchmarks import arc, hellaswag, mmlu
from grath_utils.evaluation.benchmarks.truthfulqa import GENERATION, MULTIPLE_CHOICE
from grath_utils.files import data_dir, read_jsonl, write_jsonl


def sample_rows(mirror: Path, name: str, count: int | None, seed: int = 7) -> list[dict[str, Any]]:
    """Return ``count`` rows of a mirror's file, in their order; all for None."""
    rows = read_jsonl(mirror / name)
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


def own_mirror(folder: Path, subjects: Sequence[str]) -> Path:
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
    written = [
        {
            "question": row["question"],
            "category": row["category"],
            "correct_answers": row["mc2_targets"]["choices"][:1],
            "incorrect_answers": row["mc1_targets"]["choices"][1:],
        }
        for row in probe
    ]
    files = {
        MULTIPLE_CHOICE: probe[:3],
        GENERATION: written[:3],
        arc.TEST: science[:3],
        arc.TRAIN: science[3:120],
        hellaswag.VALIDATION: swag[:3],
        hellaswag.TRAIN: swag[3:120],
    }
    for n, subject in enumerate(subjects):
        rows = facts[8 * n % 192 :][:8]
        files |= {mmlu.DEV[subject]: rows[:5], mmlu.TEST[subject]: rows[5:]}
    for file, rows in files.items():
        write_jsonl(folder / file.path, rows)
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

    family, _, rest = name.partition("_")
    place, files = {
        "truthfulqa": ("truthfulqa", [GENERATION if rest == "gen" else MULTIPLE_CHOICE]),
        "arc": ("arc", [arc.TRAIN, arc.TEST]),
        "hellaswag": ("hellaswag", [hellaswag.TRAIN, hellaswag.VALIDATION]),
        "mmlu": ("mmlu/default", [mmlu.DEV.get(rest), mmlu.TEST.get(rest)]),
    }[family]
    config = dict(load_yaml(Path(lm_eval.tasks.__file__).parent / place / f"{name}.yaml"))
    for key in ("tag", "task_alias", "group"):
        config.pop(key, None)
    if name == "arc_challenge":
        config["validation_split"] = None
    config |= {
        "task": name,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {f.split: str(folder / f.path) for f in files}},
    }
    return config


def run(
    policy: Any, tasks: list[dict[str, Any]], shots: int, batch_size: int = 4, *, limit: Any = None
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
