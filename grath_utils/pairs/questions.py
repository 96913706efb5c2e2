"""Source questions: what the policy answers to itself, read from wherever they are.

GRATH takes its questions from another domain than the test (the paper: the train split of
ARC-Challenge), and uses no annotation. Where a source carries candidates and a gold answer they
travel along, for the audit, the controls and the *GT* ablation only.
"""

from __future__ import annotations

import csv
import json
import random
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grath_utils.config import QuestionsConfig
from grath_utils.errors import DataError, UsageError, did_you_mean
from grath_utils.files import data_dir, fingerprint, mirror_dir
from grath_utils.pairs.words import normalized

ARC = "allenai/ai2_arc"
ARC_SUBSETS = {"arc_challenge": "ARC-Challenge", "arc_easy": "ARC-Easy"}
BUILT_IN = ("own", *ARC_SUBSETS)


@dataclass(frozen=True)
class Question:
    """One source question."""

    id: str
    text: str
    candidates: tuple[str, ...] = ()
    gold: int | None = None  # position of the right candidate, where the source knows it
    topic: str | None = None
    where: str = ""  # file and line (or data set and row) that it came from, for error messages

    def to_row(self) -> dict[str, Any]:
        """Return what :meth:`from_row` reads back, without the empty fields."""
        row = {"id": self.id, "question": self.text, "candidates": list(self.candidates)}
        row |= {"gold": self.gold, "topic": self.topic}
        return {key: value for key, value in row.items() if value or value == 0}

    @classmethod
    def from_row(cls, row: Mapping[str, Any], *, where: str = "") -> Question:
        """Read one row of ``questions.jsonl``; ``where`` is for the error message.

        Raises:
            DataError: there is no text for the question or its id.
        """
        text, name = row.get("question"), row.get("id")
        if not isinstance(text, str) or not isinstance(name, str):
            raise DataError(f'{where}: needs text under "id" and "question"')
        candidates = tuple(row.get("candidates", ()))
        return cls(name, text, candidates, row.get("gold"), row.get("topic"), where)


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

    The source is one of :data:`BUILT_IN`, a ``.jsonl`` or ``.csv`` file, or a Hub data set id
    (``ORG/NAME`` or ``ORG/NAME:CONFIGURATION``).

    Raises:
        DataError: no such source; an empty file; a malformed, doubled or empty row (file and line
            are named). With ``skip_bad`` such rows are left out and counted instead.
    """
    source, rows = _open_source(config)
    kept, skipped = [], Counter()
    texts, ids = {}, {}  # question -> where it was first seen
    # Data sets of others hold a few doubled questions that no user can mend: they are counted.
    lenient = config.skip_bad or config.source in ARC_SUBSETS
    for where, row in rows:
        try:
            question = _question(row, config, where, f"q-{len(kept) + 1:05d}")
            key = normalized(question.text)
            if key in texts:
                raise _BadRow("duplicated", f"the same question as {texts[key]}")
            if question.id in ids:
                raise _BadRow("duplicated_id", f'id "{question.id}" is that of {ids[question.id]}')
        except _BadRow as bad:
            reason, sentence = bad.args
            if not lenient:
                hint = "mend it, or set questions.skip_bad=true to leave such rows out"
                raise DataError(f"{where}: {sentence}; {hint}") from None
            skipped[reason] += 1
            continue
        texts[key] = ids[question.id] = where
        kept.append(question)
    if not kept:
        counts = ", ".join(f"{n} {reason}" for reason, n in sorted(skipped.items()))
        raise DataError(f"{source}: no question in it ({counts or 'nothing'} left out)")
    if config.limit is not None and config.limit < len(kept):
        chosen = sorted(random.Random(seed).sample(range(len(kept)), config.limit))
        kept = [kept[i] for i in chosen]
    return QuestionSet(source, tuple(kept), dict(skipped))


def _open_source(config: QuestionsConfig) -> tuple[str, Iterator[LocatedRow]]:
    """Return the source in words, and its rows."""
    name, split = config.source, config.split
    if name == "own":
        return "the project's own questions (questions.jsonl)", _rows(
            data_dir() / "questions.jsonl"
        )
    if subset := ARC_SUBSETS.get(name):
        mirror, what = mirror_dir(), f"{subset}, split {split}, from the"
        if mirror is None:
            return f"{what} Hub ({ARC})", _hub_rows(ARC, subset, split)
        path = mirror / "ai2_arc" / subset / f"{split}.jsonl"
        if not path.is_file():
            raise DataError(
                f"the mirror that GRATH_MIRROR names has no {path.relative_to(mirror)}; add it, "
                "or unset GRATH_MIRROR to read from the Hub"
            )
        return f"{what} mirror {mirror}", _rows(path)
    path = Path(name).expanduser()
    if path.suffix.lower() in (".jsonl", ".csv") or path.is_file():
        return f"the file {path}", _rows(path)
    if path.is_dir():
        raise DataError(f"{path} is a folder; name a .jsonl or .csv file in it")
    data_set, _, subset = name.partition(":")
    if data_set.count("/") != 1:
        raise DataError(
            f'unknown source of questions "{name}"{did_you_mean(name, BUILT_IN)} '
            "(or a .jsonl/.csv file, or a Hub data set ORGANISATION/NAME)"
        )
    return f"the Hub data set {name}, split {split}", _hub_rows(data_set, subset or None, split)


def _question(row: Any, config: QuestionsConfig, where: str, default_id: str) -> Question:
    if isinstance(row, _BadRow):
        raise row
    if not isinstance(row, Mapping):
        raise _BadRow("malformed", f"expected a JSON object, found {type(row).__name__}")
    if re.search("[\udc80-\udcff]", json.dumps(row, ensure_ascii=False, default=str)):
        raise _BadRow("not_utf8", "not UTF-8 text; save the file as UTF-8")
    # Built-in sources have their own schema; `column` is about the user's files and data sets.
    column = "question" if config.source in BUILT_IN else config.column
    if column not in row:
        near = did_you_mean(column, map(str, row)) if row else ""
        raise _BadRow("missing_column", f'no column "{column}"{near} (set questions.column)')
    text, name, topic = row[column], row.get("id"), row.get("topic")
    if not isinstance(text, str):
        raise _BadRow("not_text", f'"{column}" holds {type(text).__name__}, expected text')
    text = " ".join(text.split())
    if not text:
        raise _BadRow("empty", f'"{column}" is empty')
    if not isinstance(name, str | int) or not str(name).strip():
        name = default_id
    topic = topic if isinstance(topic, str) else None
    return Question(str(name), text, *_candidates(row), topic, where)


def _candidates(row: Mapping[str, Any]) -> tuple[tuple[str, ...], int | None]:
    """Read the candidates and the gold position: ARC's columns, or ``candidates`` and ``gold``."""
    choices, texts, gold = row.get("choices"), row.get("candidates"), row.get("gold")
    if isinstance(choices, Mapping) and "text" in choices:
        texts = choices["text"]
        labels = [str(label) for label in choices.get("label", ())]
        key = str(row.get("answerKey", ""))
        gold = labels.index(key) if key in labels else None
    elif not isinstance(texts, Sequence) or isinstance(texts, str):
        return (), None
    elif not isinstance(gold, int) or not 0 <= gold < len(texts):
        gold = None
    return tuple(map(str, texts)), gold


def _rows(path: Path) -> Iterator[LocatedRow]:
    """Read a file; a bad line becomes a :class:`_BadRow`, so that it spoils no other."""
    try:
        # What is not UTF-8 becomes surrogates, for _question.
        # Not splitlines(): it would also split at U+2028 and other separators inside a string.
        lines = path.read_bytes().decode("utf-8-sig", "surrogateescape").split("\n")
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
    parsed = _csv_rows(lines) if path.suffix.lower() == ".csv" else _jsonl_rows(lines)
    for number, row in parsed:
        yield f"{path}, line {number}", row


def _jsonl_rows(lines: Sequence[str]) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError as error:
                yield number, _BadRow("malformed", f"not valid JSON ({error.msg})")


def _csv_rows(lines: Sequence[str]) -> Iterator[tuple[int, Any]]:
    reader = csv.DictReader((line + "\n" for line in lines), strict=True)
    while True:
        try:
            row: Any = next(reader)
            if None in row:
                row = _BadRow("malformed", "not valid CSV (more fields than columns)")
        except StopIteration:
            return
        except csv.Error as error:
            row = _BadRow("malformed", f"not valid CSV ({error})")
        yield reader.line_num, row


def _hub_rows(data_set: str, subset: str | None, split: str) -> Iterator[LocatedRow]:
    from datasets import load_dataset

    try:
        rows = load_dataset(data_set, subset, split=split)
    except Exception as error:  # datasets raises its own, requests', huggingface_hub's and OSError
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise DataError(
            f'cannot read the Hub data set "{data_set}", split "{split}": {lines[0]} (without a '
            "network, set GRATH_MIRROR to a benchmark mirror, or use questions.source=own)"
        ) from error
    for number, row in enumerate(rows):
        yield f"{data_set}, row {number}", row


def split_held_out(
    questions: Sequence[Question], share: float, seed: int
) -> tuple[tuple[Question, ...], tuple[Question, ...]]:
    """Return (train, held out), each in the order given; at least one question in each.

    Raises:
        DataError: fewer than two questions cannot be split.
        UsageError: the share is not between 0 and 1.
    """
    if not 0 < share < 1:
        raise UsageError(f"the held-out share is {share}; it must be between 0 and 1")
    if len(questions) < 2:
        raise DataError(f"{len(questions)} question(s) cannot be split into train and held out")
    count = min(max(round(share * len(questions)), 1), len(questions) - 1)
    held = set(random.Random(f"held-out {seed}").sample(range(len(questions)), count))
    train = tuple(q for i, q in enumerate(questions) if i not in held)
    return train, tuple(q for i, q in enumerate(questions) if i in held)
