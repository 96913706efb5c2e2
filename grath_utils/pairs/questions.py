"""Source questions: what the policy answers to itself, read from wherever they are.

GRATH takes its questions from another domain than the test (the paper: the train split of
ARC-Challenge), and uses no annotation. Where a source carries candidates and a gold answer they
travel along, for the audit, the controls and what `pairs` shows of them only.
"""

from __future__ import annotations

import csv
import os
import random
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from unicodedata import normalize

from grath_utils.config import BUILT_IN_SOURCES, OWN_QUESTIONS, QuestionsConfig
from grath_utils.errors import DataError, UsageError, did_you_mean
from grath_utils.files import data_dir, fingerprint, mirror_dir, parse_json, read_text
from grath_utils.pairs.hub import hub_rows
from grath_utils.pairs.preferences import Pair, is_preference, own_row
from grath_utils.pairs.words import is_blank, same_text

Item = TypeVar("Item", "Question", Pair)
ARC = "allenai/ai2_arc"
ARC_SUBSETS = {"arc_challenge": "ARC-Challenge", "arc_easy": "ARC-Easy"}
TABLES = (".csv", ".tsv")
SHOWN = 5  # of the rows that were left out, in a message


@dataclass(frozen=True)
class Question:
    """One source question."""

    id: str
    text: str
    candidates: tuple[str, ...] = ()
    gold: int | None = None  # position of the right candidate, where the source knows it
    topic: str | None = None
    where: str = ""  # file and line (or data set and row) that it came from, for error messages

    @property
    def wrong_candidates(self) -> list[str]:
        """The candidates that are not the gold one, however it is written."""
        right = same_text(self.candidates[self.gold])
        return [each for each in self.candidates if same_text(each) != right]

    def to_row(self) -> dict[str, Any]:
        """Return what :meth:`from_row` reads back, without the empty fields."""
        row = {"id": self.id, "question": self.text, "candidates": list(self.candidates)}
        row |= {"gold": self.gold, "topic": self.topic}
        return {key: value for key, value in row.items() if value or value == 0}

    @classmethod
    def from_row(cls, row: Mapping[str, Any], *, where: str = "") -> Question:
        """Read one row of ``questions.jsonl``; ``where`` is for the error message."""
        text, name = row.get("question"), row.get("id")
        if not isinstance(text, str) or not isinstance(name, str):
            raise DataError(f'{where}: needs text under "id" and "question"')
        try:
            return cls(name, text, *_candidates(row), row.get("topic"), where)
        except _BadRow as bad:
            raise DataError(f"{where}: {bad.args[1]}") from None


@dataclass(frozen=True)
class QuestionSet:
    """The questions of one source, cleaned, with what was left out and why."""

    source: str  # in words, for print-outs and ``run.json``
    questions: tuple[Question, ...]
    skipped: Mapping[str, int]  # reason -> how many rows were left out

    @property
    def fingerprint(self) -> str:
        """A hash of every question with its candidates."""
        return fingerprint([q.to_row() for q in self.questions])

    def __len__(self) -> int:
        return len(self.questions)


class _BadRow(Exception):
    """A row that cannot be used: (reason in a word, sentence for the error message)."""


LocatedRow = tuple[str, Any]
"""Where a row stands and what is there, or the :class:`_BadRow` that says why it is no row."""


def load_questions(config: QuestionsConfig, seed: int) -> QuestionSet:
    """Return the source questions, checked, in the source's order; ``limit`` draws some by seed.

    The source is one of :data:`.BUILT_IN_SOURCES`, a ``.jsonl``, ``.csv`` or ``.tsv`` file, or a
    Hub data set id (``ORG/NAME`` or ``ORG/NAME:CONFIGURATION``). Two questions are the same if they
    differ in case and spaces at most; texts and ids are in Unicode's form NFC.

    Raises:
        DataError: no such source; an empty file; a malformed, doubled or empty row (file and line
            are named). With ``skip_bad`` such rows are left out, counted and named in a warning.
        FetchError: the Hub was needed and cannot be reached.
    """
    source, rows = _open_source(config)
    kept, skipped, named = [], Counter(), []
    texts, ids = {}, {}  # question -> where it was first seen
    for where, row in rows:
        try:
            question = _question(row, config, where, f"q-{len(kept) + 1:05d}")
            key = same_text(question.text)
            if key in texts:
                raise _BadRow("duplicated", f"the same question as {texts[key]}")
            if question.id in ids:
                raise _BadRow("duplicated_id", f'id "{question.id}" is that of {ids[question.id]}')
        except _BadRow as bad:
            reason, sentence = bad.args[0], _shown(bad.args[1])
            # ARC holds a few doubled questions that no user can mend: they are counted.
            doubled_in_arc = reason == "duplicated" and config.source in ARC_SUBSETS
            if not (config.skip_bad or doubled_in_arc):
                hint = "mend it, or set questions.skip_bad=true to leave such rows out"
                raise DataError(f"{where}: {sentence}; {hint}") from None
            skipped[reason] += 1
            named.append(f"{where}: {sentence}")
            continue
        texts[key] = ids[question.id] = where
        kept.append(question)
    counts = ", ".join(f"{n} {reason}" for reason, n in sorted(skipped.items()))
    if not kept:
        first = f"; the first: {named[0]}" if named else ""
        raise DataError(f"{source}: no question in it ({counts or 'nothing'} left out{first})")
    if named and config.skip_bad:
        shown = [*named[:SHOWN], *(["..."] if len(named) > SHOWN else [])]
        warnings.warn("\n  ".join([f"{source}: left out {counts}", *shown]), stacklevel=2)
    if config.limit is not None and config.limit < len(kept):
        chosen = sorted(random.Random(seed).sample(range(len(kept)), config.limit))
        kept = [kept[i] for i in chosen]
    return QuestionSet(source, tuple(kept), dict(skipped))


def _shown(sentence: str) -> str:
    """Return a sentence that can be printed, whatever the id or the names of columns in it are."""
    line = " ".join(sentence.encode("utf-8", "backslashreplace").decode().split())
    return line if len(line) <= 300 else f"{line[:200]} ... {line[-60:]}"


def names_file(source: str) -> bool:
    """Return True if a source of questions is a file, whether or not it is there."""
    path = Path(os.path.expanduser(source))
    return path.suffix.lower() in (".jsonl", *TABLES) or path.is_file()


def _open_source(config: QuestionsConfig) -> tuple[str, Iterator[LocatedRow]]:
    """Return the source in words, and its rows."""
    name, split = config.source, config.split
    if name in OWN_QUESTIONS:
        part, rows = OWN_QUESTIONS[name], _rows(data_dir() / "questions.jsonl")
        wanted = ((where, row) for where, row in rows if part is None or row["part"] == part)
        which = f", part {part}" if part else ""
        return f"the project's own questions{which} (questions.jsonl)", wanted
    if subset := ARC_SUBSETS.get(name):
        mirror, what = mirror_dir(), f"{subset}, split {split}, from the"
        if mirror is None:
            return f"{what} Hub ({ARC})", _located_hub_rows(ARC, subset, split)
        path = mirror / "ai2_arc" / subset / f"{split}.jsonl"
        if not path.is_file():
            raise DataError(
                f"the mirror that GRATH_MIRROR names has no {path.relative_to(mirror)}; add it, "
                "or unset GRATH_MIRROR to read from the Hub"
            )
        return f"{what} mirror {mirror}", _rows(path)
    path = Path(os.path.expanduser(name))
    if names_file(name):
        return f"the file {path}", _rows(path)
    if path.is_dir():
        raise DataError(f"{path} is a folder; name a .jsonl or .csv file in it")
    data_set, _, subset = name.partition(":")
    if data_set.count("/") != 1:
        raise DataError(
            f'unknown source of questions "{name}"{did_you_mean(name, BUILT_IN_SOURCES)} '
            "(or a .jsonl/.csv file, or a Hub data set ORGANISATION/NAME)"
        )
    rows = _located_hub_rows(data_set, subset or None, split)
    return f"the Hub data set {name}, split {split}", rows


def _question(row: Any, config: QuestionsConfig, where: str, default_id: str) -> Question:
    if isinstance(row, _BadRow):
        raise row
    if not isinstance(row, Mapping):
        raise _BadRow("malformed", f"expected a JSON object, found {type(row).__name__}")
    if config.column == "question" not in row and is_preference(row):  # pairs of another tool
        try:
            asked = own_row(row, "the pair")
        except DataError as error:
            raise _BadRow("malformed", str(error)) from None
        row = {**asked, "candidates": [asked["correct"], asked["incorrect"]], "gold": 0}
    # Built-in sources have their own schema; `column` is about the user's files and data sets.
    column = "question" if config.source in BUILT_IN_SOURCES else normalize("NFC", config.column)
    if column not in row:
        near = did_you_mean(column, map(str, row)) if row else ""
        raise _BadRow("missing_column", f'no column "{column}"{near} (set questions.column)')
    text, name, topic = row[column], row.get("id"), row.get("topic")
    if not isinstance(text, str):
        raise _BadRow("not_text", f'"{column}" holds {type(text).__name__}, expected text')
    text = " ".join(_readable(text).split())
    if is_blank(text):
        raise _BadRow("empty", f'"{column}" is empty')
    if type(name) not in (str, int) or is_blank(str(name)):
        name = default_id
    topic = _readable(topic) if isinstance(topic, str) else None
    candidates, gold = _candidates(row)
    return Question(
        _readable(str(name)), text, tuple(map(_readable, candidates)), gold, topic, where
    )


def _readable(text: str) -> str:
    """Return a text in form NFC; what is no text is a :class:`_BadRow`."""
    if fault := re.search("[\0\ud800-\udfff]", text):
        what = "a NUL character in it" if fault[0] == "\0" else "not UTF-8 text"
        raise _BadRow("not_utf8", f"{what}; save the file as UTF-8")
    return normalize("NFC", text)


def _candidates(row: Mapping[str, Any]) -> tuple[tuple[str, ...], int | None]:
    """Read the candidates and the gold position: ARC's columns, or ``candidates`` and ``gold``."""
    choices = row.get("choices")
    if isinstance(choices, Mapping) and "text" in choices:
        column, texts, key = "choices.text", choices["text"], "answerKey"
        labels = choices.get("label")
    else:
        column, texts, key, labels = "candidates", row.get("candidates"), "gold", None
        if texts is None or isinstance(texts, str):  # none, or a column with another meaning
            return (), None
    listed = isinstance(texts, Sequence) and not isinstance(texts, str)
    if not listed or any(type(text) not in (str, int, float) for text in texts):
        raise _BadRow("bad_candidates", f'"{column}" is no list of texts')
    labels = range(len(texts)) if labels is None else labels
    if not isinstance(labels, Sequence) or len(labels) != len(texts):
        raise _BadRow("bad_candidates", f'"choices.label" does not name the {len(texts)} choices')
    gold, names = row.get(key), list(map(str, labels))
    if gold not in (None, "") and names.count(str(gold)) != 1:
        raise _BadRow("bad_candidates", f'"{key}" is {gold!r}, not one of {", ".join(names)}')
    return tuple(map(str, texts)), None if gold in (None, "") else names.index(str(gold))


def _rows(path: Path) -> Iterator[LocatedRow]:
    """Read a file; a bad line becomes a :class:`_BadRow`, so that it spoils no other."""
    text = read_text(path, "surrogateescape")  # what is not UTF-8 is found by _readable
    if text.startswith(("\udcff\udcfe", "\udcfe\udcff")):
        raise DataError(f"{path}: UTF-16 text; save the file as UTF-8")
    # Not splitlines(): it would also split at U+2028 and other separators inside a string.
    lines = re.split("\r\n?|\n", text)
    read = _table_rows if path.suffix.lower() in TABLES else _jsonl_rows
    for number, row in read(path, lines):
        yield f"{path}, line {number}", row


def _jsonl_rows(path: Path, lines: Sequence[str]) -> Iterator[tuple[int, Any]]:
    array = None
    with suppress(DataError):
        text = "\n".join(lines).lstrip()
        array = text.startswith("[") and parse_json(text)
    if array:
        raise DataError(f"{path}: a JSON array; write each of its objects on a line of its own")
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                yield number, parse_json(_readable(line))
            except DataError as error:
                yield number, _BadRow("malformed", str(error))
            except _BadRow as bad:
                yield number, bad


def _table_rows(path: Path, lines: Sequence[str]) -> Iterator[tuple[int, Any]]:
    """Yield each row of a CSV file with the number of its first line.

    After a malformed row the line below its first one is next: an open quotation mark would
    swallow all that follows.
    """
    # Excel writes semicolons where the comma is the decimal point.
    delimiter = max(",;\t", key=next(filter(str.strip, lines), "").count)
    header: list[str] = []
    start = 0
    while start < len(lines):
        text = (f"{lines[i]}\n" for i in range(start, len(lines)))
        reader = csv.reader(text, delimiter=delimiter, strict=True)
        number = start + 1
        try:
            for row in reader:
                if row and header:
                    fits = len(row) == len(header)
                    reason = f"not valid CSV ({len(row)} fields in {len(header)} columns)"
                    fields = dict(zip(header, row, strict=False))
                    yield number, fields if fits else _BadRow("malformed", reason)
                elif row:
                    header = [normalize("NFC", name.strip()) for name in row]
                    for name, count in Counter(filter(None, header)).items():
                        if count > 1:
                            where = f"{path}, line {number}"
                            raise DataError(_shown(f'{where}: {count} columns are called "{name}"'))
                number = start + reader.line_num + 1
            return
        except csv.Error as error:
            yield number, _BadRow("malformed", f"not valid CSV ({error})")
            start = number


def _located_hub_rows(data_set: str, *place: str | None) -> Iterator[LocatedRow]:
    for number, row in enumerate(hub_rows(data_set, *place)):
        yield f"{data_set}, row {number}", row


def split_held_out(
    items: Sequence[Item], share: float, seed: int
) -> tuple[tuple[Item, ...], tuple[Item, ...]]:
    """Return (train, held out), each in the order given; at least one question in each.

    Items are questions, or pairs; all that belong to one question come to the same side. The share
    is that of the questions.

    Raises:
        DataError: fewer than two different questions cannot be split.
        UsageError: the share is not between 0 and 1.
    """
    if not 0 < share < 1:
        raise UsageError(f"the held-out share is {share}; it must be between 0 and 1")
    keys = [same_text(item.text) for item in items]
    texts = list(dict.fromkeys(keys))
    if len(texts) < 2:
        raise DataError(f"{len(texts)} question(s) cannot be split into train and held out")
    count = min(max(round(share * len(texts)), 1), len(texts) - 1)
    held = set(random.Random(f"held-out {seed}").sample(texts, count))
    keyed = list(zip(items, keys, strict=True))
    train = tuple(item for item, key in keyed if key not in held)
    return train, tuple(item for item, key in keyed if key in held)
