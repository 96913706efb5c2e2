"""Our own data (data/README.md): a probe in TruthfulQA's form, and easy facts to be retained."""

from __future__ import annotations

from grath_utils.evaluation.benchmarks.base import (
    BenchmarkSize,
    BenchmarkSpec,
    Item,
    Loaded,
    Protocol,
    Row,
    gold_labels,
    make_item,
    question_answer,
    read_items,
)
from grath_utils.evaluation.benchmarks.truthfulqa import PRIMED, truthfulqa_item
from grath_utils.evaluation.metrics import accuracy_metrics, truthfulqa_metrics
from grath_utils.files import data_dir


def _parse_fact(row: Row) -> Item:
    labels = gold_labels(row["answer"], len(row["choices"]))
    category = row.get("category")
    return make_item(row["id"], row["question"], row["choices"], labels, category=category)


PROBE = BenchmarkSpec(
    name="probe",
    about="misconceptions of our own, on which question-blind rules score at chance",
    load=lambda: Loaded(read_items(data_dir() / "probe.jsonl", truthfulqa_item)),
    protocols=PRIMED,
    metrics=("mc1", "mc2", "mc3"),
    score=truthfulqa_metrics,
    size=BenchmarkSize(items=199, tokens=74, predicted=61),
)
RETENTION = BenchmarkSpec(
    name="retention",
    about="easy facts of our own: what did training destroy?",
    load=lambda: Loaded(read_items(data_dir() / "retention.jsonl", _parse_fact)),
    # Zero-shot on purpose: with shots the 135M model mostly copies their form, and the question
    # of this set is what was lost by training, which needs no help from a prompt.
    protocols=(Protocol("zero-shot", "`Question: ... Answer:`, no shots", question_answer),),
    metrics=("acc", "acc_norm"),
    score=accuracy_metrics,
    size=BenchmarkSize(items=200, tokens=13, predicted=3),
)
