"""HellaSwag (Zellers et al. 2019, arXiv 1905.07830): how an everyday scene continues."""

from __future__ import annotations

import re
from functools import partial

from grath_utils.evaluation.benchmarks import base
from grath_utils.evaluation.benchmarks.hub_files import is_available
from grath_utils.evaluation.metrics import accuracy_metrics

_file = partial(base.HubFile, "Rowan/hellaswag", "218ec52e09a7e7462a5400043bb9a69a41d06b76", None)
VALIDATION, TRAIN = _file("validation"), _file("train")


def _clean(text: str) -> str:
    """Return the text without WikiHow's markup.

    As ``hellaswag/utils.py`` of lm-evaluation-harness (MIT): same rules, same order.
    """
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def _parse(row: base.Row) -> base.Item:
    # The activity is part of the text that is continued.
    text = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    endings = [_clean(ending) for ending in row["endings"]]
    id_, gold, category = f"hellaswag-{row['ind']}", int(row["label"]), row["activity_label"]
    return base.choice_item(id_, _clean(text), endings, gold, category)


def _load() -> base.Loaded:
    items = base.read_items(VALIDATION, _parse)
    if is_available(TRAIN):
        return base.Loaded(items, {"": base.read_items(TRAIN, _parse)})
    note = "few-shot examples come from the validation split itself (the mirror has no train)"
    return base.Loaded(items, {"": items}, (note,))


HELLASWAG = base.BenchmarkSpec(
    name="hellaswag",
    about="how an everyday scene continues, 10 shots",
    load=_load,
    # lm-eval draws one more here: it takes the split of the shots for the one that is tested.
    protocols=base.few_shot(lambda item: item.question, 10, spare=1),
    metrics=("acc", "acc_norm"),
    score=accuracy_metrics,
    size=base.BenchmarkSize(items=10042, tokens=569, predicted=59, context=1024),
    files=(VALIDATION, TRAIN),
)
