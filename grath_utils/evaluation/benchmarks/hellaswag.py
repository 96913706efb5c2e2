"""HellaSwag (Zellers et al. 2019, arXiv 1905.07830): how an everyday scene continues."""

from __future__ import annotations

import re
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
    read_items,
)
from grath_utils.evaluation.benchmarks.hub_files import HubFile, is_available
from grath_utils.evaluation.metrics import accuracy_metrics

_file = partial(HubFile, "Rowan/hellaswag", "218ec52e09a7e7462a5400043bb9a69a41d06b76", None)
VALIDATION = _file("validation", "hellaswag/validation.jsonl")
TRAIN = _file("train", "hellaswag/train.jsonl")


def _clean(text: str) -> str:
    """Return the text without WikiHow's markup.

    As ``hellaswag/utils.py`` of lm-evaluation-harness (MIT): same rules, same order.
    """
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def _parse(row: Row) -> Item:
    # The activity is part of the text that is continued.
    text = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    endings = [_clean(ending) for ending in row["endings"]]
    labels = gold_labels(int(row["label"]), len(endings))
    category = row["activity_label"]
    return make_item(f"hellaswag-{row['ind']}", _clean(text), endings, labels, category=category)


def _load() -> Loaded:
    items = read_items(VALIDATION, _parse)
    if is_available(TRAIN):
        return Loaded(items, {"": read_items(TRAIN, _parse)})
    note = "few-shot examples come from the validation split itself (the mirror has no train)"
    return Loaded(items, {"": items}, (note,))


HELLASWAG = BenchmarkSpec(
    name="hellaswag",
    about="how an everyday scene continues, 10 shots",
    load=_load,
    # lm-eval draws one more here: it takes the split of the shots for the one that is tested.
    protocols=few_shot(lambda item: item.question, 10, spare=1),
    metrics=("acc", "acc_norm"),
    score=accuracy_metrics,
    size=BenchmarkSize(items=10042, tokens=569, predicted=59, context=1024),
    files=(VALIDATION, TRAIN),
)
