"""ARC-Challenge (Clark et al. 2018, arXiv 1803.05457): science questions of schools."""

from __future__ import annotations

from functools import partial

from grath_utils.evaluation.benchmarks.base import (
    BenchmarkSize,
    BenchmarkSpec,
    Item,
    Loaded,
    Row,
    few_shot,
    gold_labels,
    make_item,
    question_answer,
    read_items,
)
from grath_utils.evaluation.benchmarks.hub_files import HubFile
from grath_utils.evaluation.metrics import accuracy_metrics

_file = partial(
    HubFile, "allenai/ai2_arc", "210d026faf9955653af8916fad021475a3f00453", "ARC-Challenge"
)
TRAIN = _file("train", "ai2_arc/ARC-Challenge/train.jsonl")
TEST = _file("test", "ai2_arc/ARC-Challenge/test.jsonl")


def _parse(row: Row) -> Item:
    texts, names = row["choices"]["text"], list(row["choices"]["label"])
    if row["answerKey"] not in names:
        raise ValueError(f"the answer {row['answerKey']!r} is not among the labels {names}")
    labels = gold_labels(names.index(row["answerKey"]), len(texts))
    return make_item(str(row["id"]), row["question"], texts, labels)


CHALLENGE = BenchmarkSpec(
    name="arc_challenge",
    about="science questions of schools, 25 shots",
    load=lambda: Loaded(read_items(TEST, _parse), {"": read_items(TRAIN, _parse)}),
    protocols=few_shot(question_answer, 25),
    metrics=("acc", "acc_norm"),
    score=accuracy_metrics,
    size=BenchmarkSize(items=1172, tokens=990, predicted=18, context=1024),
    files=(TRAIN, TEST),
)
