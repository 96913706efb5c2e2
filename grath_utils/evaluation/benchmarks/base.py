"""What every benchmark is made of: items, ways of asking them, and a row with all its facts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from grath_utils.errors import DataError, reason_of
from grath_utils.evaluation.benchmarks.hub_files import HubFile, read_rows
from grath_utils.files import fingerprint, read_jsonl

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Item:
    """One question with the answers that are scored."""

    id: str
    question: str
    choices: tuple[str, ...]
    labels: tuple[int, ...]  # (choices,): 1 for a true choice, 0 for a false one
    category: str | None
    mc1: tuple[int, ...]  # the choices of the form with one true answer (MC1, accuracy)
    mc2: tuple[int, ...]  # the choices of the form with several true answers (MC2, MC3)
    position: int = 0  # in the whole benchmark, whatever part of it was asked for

    @property
    def gold(self) -> int:
        """Index (into ``choices``) of the one true answer of the MC1 form."""
        return next(i for i in self.mc1 if self.labels[i])


@dataclass(frozen=True)
class Benchmark:
    """A benchmark, or a part of it drawn by a seed."""

    name: str
    source: str  # "own data", "mirror FOLDER" or "Hub ID@REVISION"
    items: tuple[Item, ...]
    shots: Mapping[str, tuple[Item, ...]]  # solved examples by category, "" for all
    total: int  # items in the whole benchmark
    limit: int | None
    fingerprint: str  # changes whenever an item, its order or a solved example does
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Protocol:
    """One way of asking a benchmark's questions."""

    name: str
    about: str
    question: Callable[[Item], str]  # the item's text up to where the answer begins
    # What is scored for a choice:
    answer: Callable[[Item, int], str] = lambda item, choice: " " + item.choices[choice]
    before: Callable[[Item], str] = lambda item: ""  # text before the shots
    shots: int = 0
    draw: str = "item"
    """``item`` (new shots for each item, as lm-eval draws them), ``once`` (the same shots for all:
    one shared prefix, many times faster) or ``first`` (the first ones of the item's category)."""
    spare: int = 0  # examples drawn beyond ``shots``, so that the item itself can be left out
    chat: bool = False  # the question is a user turn of the chat template
    stop: tuple[str, ...] = ()  # a free answer ends before the first of these


@dataclass(frozen=True)
class Loaded:
    """What a benchmark's loader returns; see :class:`Benchmark`."""

    items: tuple[Item, ...]
    shots: Mapping[str, tuple[Item, ...]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class BenchmarkSize:
    """What the cost model needs, in SmolLM2's tokens and with the default protocol."""

    items: int
    tokens: int  # distinct ones that an item adds to what all share: mean
    predicted: int  # places that predict a token of an item's answers, free or not: mean
    context: int = 256  # tokens before the question: a primer, or demonstrations


@dataclass(frozen=True)
class BenchmarkSpec:
    """All that the package knows about one benchmark: a row of ``BENCHMARKS``."""

    name: str
    about: str  # what it asks, for `evaluate --help`
    load: Callable[[], Loaded]
    protocols: tuple[Protocol, ...]  # the default first
    metrics: tuple[str, ...]  # the headline first
    # (item, summed log-probabilities of its choices) -> metrics; None: free answers
    score: Callable[[Item, Sequence[float]], dict[str, float]] | None
    size: BenchmarkSize
    files: tuple[HubFile, ...] = ()  # read from a mirror or the Hub; none for our own data


def read_items(
    file: HubFile | Path, parse: Callable[[Row], Item], wanted: Callable[[Row], bool] | None = None
) -> tuple[Item, ...]:
    """Return the ``wanted`` items of a file (all), with unique ids.

    A malformed row, wanted or not, is a DataError that names it.
    """
    if isinstance(file, HubFile):
        rows, where = read_rows(file), file.path
    else:
        rows, where = read_jsonl(file), file.name
    items, seen = [], Counter()
    for number, row in enumerate(rows, start=1):
        with naming(f"{where}, row {number}"):
            item = parse(row)
        seen[item.id] += 1
        if seen[item.id] > 1:  # the same question twice: both count, so both need a name
            item = replace(item, id=f"{item.id}-{seen[item.id]}")
        if wanted is None or wanted(row):
            items.append(replace(item, position=len(items)))
    return tuple(items)


@contextmanager
def naming(place: str) -> Iterator[None]:
    """Raise DataError with the place of a malformed row for whatever its parser raises."""
    try:
        yield
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise DataError(f"{place}: {reason_of(error)}") from error


def make_item(
    id_: str,
    question: str,
    choices: Sequence[str],
    labels: Sequence[int],
    *,
    category: str | None = None,
    mc1: Sequence[int] | None = None,
    mc2: Sequence[int] | None = None,
) -> Item:
    """Return an item; without ``mc1`` and ``mc2``, all choices are in either form.

    ValueError: an empty text, wrong labels, or a form without a true or a false choice.
    """
    if not isinstance(question, str) or not question.strip():
        raise ValueError("the question is empty")
    if isinstance(choices, str):
        raise ValueError(f"choices must be a list of texts, not {choices!r}")
    if not choices:
        raise ValueError("the list of choices is empty")
    if len(choices) != len(labels):
        raise ValueError(f"{len(choices)} choices, but {len(labels)} labels")
    if any(not isinstance(choice, str) or not choice.strip() for choice in choices):
        raise ValueError("a choice is empty")
    if not set(labels) <= {0, 1}:
        raise ValueError(f"labels are {sorted(set(labels))}; expected 0 and 1")
    one, several = (tuple(range(len(choices)) if form is None else form) for form in (mc1, mc2))
    for form in (one, several):
        true = sum(labels[i] for i in form)
        if true in (0, len(form)):
            raise ValueError(f"no choice is {'false' if true else 'true'}")
    if mc1 is not None and (true := sum(labels[i] for i in one)) != 1:
        raise ValueError(f"MC1 needs one true choice, found {true}")
    return Item(id_, question, tuple(choices), tuple(map(int, labels)), category, one, several)


def choice_item(
    id_: str, question: str, choices: Sequence[str], gold: int, category: str | None = None
) -> Item:
    """Return an item of which the choice at ``gold`` is true, see :func:`make_item`."""
    if not isinstance(gold, int) or not 0 <= gold < len(choices):
        raise ValueError(f"the answer is {gold!r}; expected 0 to {len(choices) - 1}")
    labels = [int(i == gold) for i in range(len(choices))]
    return make_item(id_, question, choices, labels, category=category)


def short_id(*parts: Any) -> str:
    """Name an item by its content, so that a half and the whole of a benchmark agree."""
    return fingerprint(parts)[:10]


def question_answer(item: Item) -> str:
    """Return ``Question: ...``, and ``Answer:`` on a line of its own."""
    return f"Question: {item.question}\nAnswer:"


def few_shot(question: Callable[[Item], str], shots: int, spare: int = 0) -> tuple[Protocol, ...]:
    """Return lm-eval's few-shot protocol, one with the same shots for all items, and zero-shot."""
    about = f"{shots} shots, drawn for each item"
    each = Protocol("lm-eval", about, question, shots=shots, spare=spare)
    about = f"{shots} shots, the same for all items: much faster"
    shared = replace(each, name="shared", about=about, draw="once")
    return each, shared, Protocol("zero-shot", "no shots", question)
