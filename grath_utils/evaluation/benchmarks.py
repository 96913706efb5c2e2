"""Benchmarks: where their rows come from, and the items that are scored.

Three sources, and always exactly one of them, printed and recorded: our own data (``probe``,
``retention``), a *mirror* when ``GRATH_MIRROR`` names one, and the Hub otherwise
(:mod:`.hub_files`).
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from grath_utils.errors import DataError, UsageError, did_you_mean
from grath_utils.evaluation.hub_files import (
    ARC_TEST,
    ARC_TRAIN,
    GENERATION,
    HELLASWAG,
    HELLASWAG_TRAIN,
    MMLU,
    MULTIPLE_CHOICE,
    in_mirror,
    read_rows,
    source_of,
)
from grath_utils.files import data_dir, fingerprint, read_jsonl

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Item:
    """One question with the answers that are scored."""

    id: str
    question: str
    choices: tuple[str, ...]
    labels: tuple[int, ...]
    """1 for a true choice, 0 for a false one; shape (choices,)."""
    category: str | None
    mc1: tuple[int, ...]
    """Which choices make up the form with one true answer (MC1, accuracy)."""
    mc2: tuple[int, ...]
    """Which choices make up the form with several true answers (MC2, MC3)."""
    position: int
    """Place in the whole benchmark, whatever part of it was asked for."""

    @property
    def gold(self) -> int:
        """Index (into ``choices``) of the one true answer of the MC1 form."""
        return next(i for i in self.mc1 if self.labels[i])


@dataclass(frozen=True)
class Benchmark:
    """A benchmark, or a part of it drawn by the seed."""

    name: str
    source: str
    """``own data``, ``mirror FOLDER`` or ``Hub ID@REVISION``."""
    items: tuple[Item, ...]
    shots: Mapping[str, tuple[Item, ...]]
    """Solved examples to choose few-shot prompts from, by category (``""`` for all)."""
    total: int
    """Items in the whole benchmark."""
    limit: int | None
    seed: int
    fingerprint: str
    """Changes whenever an item, its order or a solved example does."""
    notes: tuple[str, ...] = ()


# --- rows to items -------------------------------------------------------------------------------


def load_benchmark(name: str, *, limit: int | None = None, seed: int = 0) -> Benchmark:
    """Load a benchmark by name.

    Args:
        name: one of ``BENCHMARKS``.
        limit: use this many items, drawn by the seed; a smaller draw is part of a larger one.
        seed: of the draw.

    Raises:
        UsageError: unknown name, or a limit below 1.
        DataError: a file is missing or a row is malformed; file and row are named.
        FetchError: the Hub was needed and cannot be reached.
    """
    if name not in BENCHMARKS:
        raise UsageError(f'unknown benchmark "{name}"{did_you_mean(name, BENCHMARKS)}')
    if limit is not None and limit < 1:
        raise UsageError(f"the limit is {limit}; at least 1 item is needed")
    source, items, shots, notes = _LOADERS[name]()
    if not items:
        raise DataError(f"{name} ({source}) holds no item")
    chosen = items
    if limit is not None and limit < len(items):
        order = list(range(len(items)))
        random.Random(seed).shuffle(order)
        chosen = tuple(items[i] for i in sorted(order[:limit]))
    content = [[(i.question, i.choices, i.labels, i.mc1, i.mc2) for i in chosen]]
    content += [[(key, i.question, i.choices, i.labels) for i in shots[key]] for key in shots]
    return Benchmark(
        name=name,
        source=source,
        items=chosen,
        shots=shots,
        total=len(items),
        limit=limit,
        seed=seed,
        fingerprint=fingerprint(content),
        notes=notes,
    )


Loaded = tuple[str, tuple[Item, ...], dict[str, tuple[Item, ...]], tuple[str, ...]]


def _parse(rows: Sequence[Row], where: str, parse: Callable[[Row, int], Item]) -> tuple[Item, ...]:
    """Turn rows into items with unique ids; a malformed row is named."""
    items, seen = [], {}
    for position, row in enumerate(rows):
        try:
            item = parse(row, position)
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            what = f"no {error}" if isinstance(error, KeyError) else str(error)
            raise DataError(f"{where}, row {position + 1}: {what}") from error
        count = seen[item.id] = seen.get(item.id, 0) + 1
        if count > 1:  # the same question twice: both count, so both need a name
            item = _rename(item, f"{item.id}-{count}")
        items.append(item)
    return tuple(items)


def _rename(item: Item, name: str) -> Item:
    return Item(**{**item.__dict__, "id": name})


def _item(
    id_: str,
    question: str,
    choices: Sequence[str],
    labels: Sequence[int],
    position: int,
    category: str | None = None,
    mc1: Sequence[int] | None = None,
    mc2: Sequence[int] | None = None,
) -> Item:
    """Check what every benchmark needs and build the item."""
    if not isinstance(question, str) or not question.strip():
        raise ValueError("the question is empty")
    if not choices:
        raise ValueError("the list of choices is empty")
    if len(choices) != len(labels):
        raise ValueError(f"{len(choices)} choices, but {len(labels)} labels")
    for choice in choices:
        if not isinstance(choice, str) or not choice.strip():
            raise ValueError("a choice is empty")
    if not set(labels) <= {0, 1}:
        raise ValueError(f"labels are {sorted(set(labels))}; expected 0 and 1")
    everything = tuple(range(len(choices)))
    one = everything if mc1 is None else tuple(mc1)
    several = everything if mc2 is None else tuple(mc2)
    for form, indices in (("one", one), ("several", several)):
        true = sum(labels[i] for i in indices)
        if true == 0:
            raise ValueError("no choice is true")
        if true == len(indices):
            raise ValueError("no choice is false")
        if form == "one" and true != 1 and mc1 is not None:
            raise ValueError(f"MC1 needs one true choice, found {true}")
    return Item(
        id_, question, tuple(choices), tuple(map(int, labels)), category, one, several, position
    )


def _short_id(*parts: Any) -> str:
    """Name an item by its content, so that a half and the whole of a benchmark agree."""
    return fingerprint(parts)[:10]


def _gold_labels(gold: int, count: int) -> list[int]:
    if not isinstance(gold, int) or not 0 <= gold < count:
        raise ValueError(f"the answer is {gold!r}; expected 0 to {count - 1}")
    return [int(i == gold) for i in range(count)]


def truthfulqa_item(row: Row, position: int, categories: Mapping[str, str] | None = None) -> Item:
    """Parse a row with ``mc1_targets`` and ``mc2_targets`` (the schema of the probe, too).

    MC1's choices are a subset of MC2's in all 817 questions, so they are scored once.
    """
    question = row["question"]
    mc1, mc2 = row["mc1_targets"], row["mc2_targets"]
    for name, form in (("mc1_targets", mc1), ("mc2_targets", mc2)):
        if not form["choices"]:
            raise ValueError(f"{name}: the list of choices is empty")
        if len(form["choices"]) != len(form["labels"]):
            raise ValueError(f"{name}: choices and labels differ in number")
    choices, labels = list(mc2["choices"]), list(mc2["labels"])
    one = []
    for choice, label in zip(mc1["choices"], mc1["labels"], strict=True):
        if choice not in choices:
            choices.append(choice)
            labels.append(label)
        place = choices.index(choice)
        if labels[place] != label:
            raise ValueError(f"MC1 and MC2 disagree on whether {choice!r} is true")
        one.append(place)
    several = range(len(mc2["choices"]))
    category = row.get("category") or (categories or {}).get(question)
    id_ = str(row.get("id") or _short_id(question))
    return _item(id_, question, choices, labels, position, category, one, several)


def _truthfulqa_mc() -> Loaded:
    rows = read_rows(MULTIPLE_CHOICE)
    categories = _truthfulqa_categories()
    items = _parse(rows, MULTIPLE_CHOICE.path, lambda row, i: truthfulqa_item(row, i, categories))
    return source_of(MULTIPLE_CHOICE), items, {}, ()


def _truthfulqa_categories() -> dict[str, str]:
    """Return each question's category, which only the generation rows have."""
    if not in_mirror(GENERATION, default=True):
        return {}
    return {row["question"]: row["category"] for row in read_rows(GENERATION)}


def _truthfulqa_binary() -> Loaded:
    """Best answer against one false answer: the row's own choice of it, else the first listed."""
    source, items, shots, _ = _truthfulqa_mc()
    pairs = []
    for item in items:
        false = next(i for i in item.mc1 if not item.labels[i])
        pairs.append(
            _item(
                item.id,
                item.question,
                [item.choices[item.gold], item.choices[false]],
                [1, 0],
                item.position,
                item.category,
            )
        )
    return source, tuple(pairs), shots, ("the false answer is MC1's first listed one",)


def _truthfulqa_gen() -> Loaded:
    def parse(row: Row, position: int) -> Item:
        correct, incorrect = row["correct_answers"], row["incorrect_answers"]
        return _item(
            _short_id(row["question"]),
            row["question"],
            [*correct, *incorrect],
            [1] * len(correct) + [0] * len(incorrect),
            position,
            row["category"],
        )

    return source_of(GENERATION), _parse(read_rows(GENERATION), GENERATION.path, parse), {}, ()


def _arc_item(row: Row, position: int) -> Item:
    texts, names = row["choices"]["text"], list(row["choices"]["label"])
    if row["answerKey"] not in names:
        raise ValueError(f"the answer {row['answerKey']!r} is not among the labels {names}")
    labels = _gold_labels(names.index(row["answerKey"]), len(texts))
    return _item(str(row["id"]), row["question"], texts, labels, position)


def _arc_challenge() -> Loaded:
    items = _parse(read_rows(ARC_TEST), ARC_TEST.path, _arc_item)
    shots = _parse(read_rows(ARC_TRAIN), ARC_TRAIN.path, _arc_item)
    return source_of(ARC_TEST), items, {"": shots}, ()


def hellaswag_text(text: str) -> str:
    """Clean WikiHow's markup from a HellaSwag text, as lm-eval's task does.

    ``hellaswag/utils.py`` of lm-evaluation-harness (MIT): same rules, same order.
    """
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def _hellaswag_item(row: Row, position: int) -> Item:
    # The activity is part of the text that is continued.
    context = row["ctx_a"] + " " + row["ctx_b"].capitalize()
    endings = [hellaswag_text(ending) for ending in row["endings"]]
    return _item(
        f"hellaswag-{row['ind']}",
        hellaswag_text(row["activity_label"] + ": " + context),
        endings,
        _gold_labels(int(row["label"]), len(endings)),
        position,
        row["activity_label"],
    )


def _hellaswag() -> Loaded:
    items = _parse(read_rows(HELLASWAG), HELLASWAG.path, _hellaswag_item)
    if not in_mirror(HELLASWAG_TRAIN, default=True):
        note = "few-shot examples come from the validation split itself (the mirror has no train)"
        return source_of(HELLASWAG), items, {"": items}, (note,)
    shots = _parse(read_rows(HELLASWAG_TRAIN), HELLASWAG_TRAIN.path, _hellaswag_item)
    return source_of(HELLASWAG), items, {"": shots}, ()


def _mmlu() -> Loaded:
    items: list[Item] = []
    shots = {}
    for subject, (dev, test) in MMLU.items():

        def parse(row: Row, position: int, subject: str = subject) -> Item:
            labels = _gold_labels(row["answer"], len(row["choices"]))
            id_ = f"{subject}-{_short_id(row['question'], row['choices'])}"
            return _item(id_, row["question"], row["choices"], labels, position, subject)

        shots[subject] = _parse(read_rows(dev), dev.path, parse)
        offset = len(items)
        items += _parse(read_rows(test), test.path, lambda row, i, p=parse, o=offset: p(row, o + i))
    return source_of(MMLU["anatomy"][1]), tuple(items), shots, ()


def _probe() -> Loaded:
    path = data_dir() / "probe.jsonl"
    return "own data", _parse(read_jsonl(path), path.name, truthfulqa_item), {}, ()


def _retention() -> Loaded:
    def parse(row: Row, position: int) -> Item:
        labels = _gold_labels(row["answer"], len(row["choices"]))
        category = row.get("category")
        return _item(row["id"], row["question"], row["choices"], labels, position, category)

    path = data_dir() / "retention.jsonl"
    return "own data", _parse(read_jsonl(path), path.name, parse), {}, ()


_LOADERS: dict[str, Callable[[], Loaded]] = {
    "truthfulqa_mc": _truthfulqa_mc,
    "truthfulqa_binary": _truthfulqa_binary,
    "truthfulqa_gen": _truthfulqa_gen,
    "arc_challenge": _arc_challenge,
    "hellaswag": _hellaswag,
    "mmlu": _mmlu,
    "probe": _probe,
    "retention": _retention,
}

BENCHMARKS: tuple[str, ...] = tuple(_LOADERS)
