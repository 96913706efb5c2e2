"""Our own data (data/README.md): a probe in TruthfulQA's form, and easy facts to be retained."""

from __future__ import annotations

from grath_utils.evaluation.benchmarks import base
from grath_utils.evaluation.benchmarks.truthfulqa import PRIMED, truthfulqa_item
from grath_utils.evaluation.metrics import accuracy_metrics, truthfulqa_metrics
from grath_utils.files import data_dir


def _parse_fact(row: base.Row) -> base.Item:
    choices, category = row["choices"], row.get("category")
    return base.choice_item(row["id"], row["question"], choices, row["answer"], category)


def _probe(half: str | None = None, items: int = 200) -> base.BenchmarkSpec:
    """Return the probe's row, or that of one half: choose on one, test on the other."""
    part = f", the {half} half" if half else ""
    return base.BenchmarkSpec(
        name=f"probe_{half}" if half else "probe",
        about="misconceptions of our own, on which question-blind rules score at chance" + part,
        load=lambda: base.Loaded(
            base.read_items(
                data_dir() / "probe.jsonl",
                truthfulqa_item,
                wanted=lambda row: half in (None, row.get("half")),
            )
        ),
        protocols=PRIMED,
        metrics=("mc1", "mc2", "mc3"),
        score=truthfulqa_metrics,
        size=base.BenchmarkSize(items=items, tokens=74, predicted=61),
    )


PROBE, CHOOSING, TESTING = _probe(items=400), _probe("choosing"), _probe("testing")
RETENTION = base.BenchmarkSpec(
    name="retention",
    about="easy facts of our own: what did training destroy?",
    load=lambda: base.Loaded(base.read_items(data_dir() / "retention.jsonl", _parse_fact)),
    # Zero-shot on purpose: with shots the 135M model mostly copies their form, and the question
    # of this set is what was lost by training, which needs no help from a prompt.
    protocols=(base.Protocol("zero-shot", "no shots", base.question_answer),),
    metrics=("acc", "acc_norm"),
    score=accuracy_metrics,
    size=base.BenchmarkSize(items=200, tokens=13, predicted=3),
)
