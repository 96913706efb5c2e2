"""ARC-Challenge (Clark et al. 2018, arXiv 1803.05457): science questions from school exams."""

from __future__ import annotations

from grath_utils.evaluation.benchmarks import base
from grath_utils.evaluation.metrics import accuracy_metrics

_REVISION = "210d026faf9955653af8916fad021475a3f00453"
TRAIN, TEST = (
    base.HubFile("allenai/ai2_arc", _REVISION, "ARC-Challenge", s) for s in ("train", "test")
)


def _parse(row: base.Row) -> base.Item:
    texts, names = row["choices"]["text"], list(row["choices"]["label"])
    if row["answerKey"] not in names:
        raise ValueError(f"the answer {row['answerKey']!r} is not among the labels {names}")
    return base.choice_item(str(row["id"]), row["question"], texts, names.index(row["answerKey"]))


CHALLENGE = base.BenchmarkSpec(
    name="arc_challenge",
    about="science questions from school exams, 25 shots",
    load=lambda: base.Loaded(base.read_items(TEST, _parse), {"": base.read_items(TRAIN, _parse)}),
    protocols=base.few_shot(base.question_answer, 25),
    metrics=("acc", "acc_norm"),
    score=accuracy_metrics,
    size=base.BenchmarkSize(items=1172, tokens=990, predicted=18, context=1024),
    files=(TRAIN, TEST),
)
