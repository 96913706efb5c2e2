"""Source questions: what the policy answers to itself, read from wherever they are.

GRATH takes its questions from another domain than the test (the paper: the train split of
ARC-Challenge), and uses no annotation. Where a source carries candidates and a gold answer they
travel along, for the audit of the pairs and for the *GT* ablation only.
"""

from __future__ import annotations

import csv
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grath_utils.config import QuestionsConfig
from grath_utils.errors import DataError, UsageError, did_you_mean
from grath_utils.files import data_dir, fingerprint, mirror_dir, read_jsonl

# Built-in sources that live on the Hub: name -> (data set, configuration).
HUB_SOURCES = {
    "arc_challenge": ("allenai/ai2_arc", "ARC-Challenge"),
    "arc_easy": ("allenai/ai2_arc", "ARC-Easy"),
}
BUILT_IN = ("own", *HUB_SOURCES)
FILE_SUFFIXES = (".jsonl", ".csv")


@dataclass(frozen=True)
class Question:
    """One source question. ``candidates`` and ``gold`` are for audit and GT mode, not training."""

    id: str
    text: str
    candidates: tuple[str, ...] = ()
    gold: int | None = None
    """Position of the right answer in ``candidates``, where the source knows it."""
    topic: str | None = None
    where: str = ""
    """File and line (or data set and row) that it came from, for error messages."""

    def to_row(self) -> dict[str, Any]:
        """Return what :meth:`from_row` reads back, without the empty fields."""
        row: dict[str, Any] = {"id": self.id, "question": self.text}
        if self.candidates:
            row["candidates"] = list(self.candidates)
        if self.gold is not None:
            row["gold"] = self.gold
        if self.topic:
            row["topic"] = self.topic
        return row

    @classmethod
    def from_row(cls, row: Mapping[str, Any], *, where: str = "") -> Question:
        """Read one row of ``questions.jsonl``.

        Raises:
            DataError: a field is missing or of the wrong kind; the message says ``where``.
        """
        text, name = row.get("question"), row.get("id")
        if not isinstance(text, str) or not isinstance(name, str):
            raise DataError(f'{where}: needs text under "id" and "question"')
        candidates = tuple(row.get("candidates", ()))
        return cls(name, text, candidates, row.get("gold"), row.get("topic"), where)


@dataclass(frozen=True)
class QuestionSet:
    """The questions of one source, cleaned, with what was left out and why."""

    source: str
    """In words, for print-outs and ``run.json``."""
    questions: tuple[Question, ...]
    skipped: Mapping[str, int]
    """Reason -> how many rows were left out."""

    @property
    def fingerprint(self) -> str:
        """A hash of every question with its candidates."""
        return fingerprint([q.to_row() for q in self.questions])

    def __len__(self) -> int:
        return len(self.questions)


class _BadRow(Exception):
    """A row that cannot be used: (reason in a word, sentence for the error message)."""


# --- loading -------------------------------------------------------------------------------------


def load_questions(config: QuestionsConfig, seed: int) -> QuestionSet:
    """Return the source questions, checked; with ``limit``, a sample drawn by the seed.

    Args:
        config: ``source`` is ``own``, ``arc_challenge``, ``arc_easy``, a ``.jsonl`` or ``.csv``
            file, or a Hub data set id (``ORG/NAME`` or ``ORG/NAME:CONFIGURATION``).
        seed: decides which questions ``limit`` keeps; their order stays the source's.

    Raises:
        DataError: no such source; an empty file; a malformed, doubled or empty row (file and line
            are named). With ``skip_bad`` such rows are left out and counted instead.
    """
    source, rows = _open_source(config)
    kept: list[Question] = []
    skipped: Counter[str] = Counter()
    first_seen: dict[str, str] = {}
    ids: dict[str, str] = {}
    # Data sets of others hold a few doubled questions that no user can mend: count, go on.
    lenient = config.skip_bad or config.source in HUB_SOURCES
    for where, row in rows:
        try:
            question = _question(row, config, where, number=len(ids) + 1)
            key = normalized(question.text)
            if key in first_seen:
                raise _BadRow("duplicated", f"the same question as {first_seen[key]}")
            if question.id in ids:
                raise _BadRow("duplicated_id", f'id "{question.id}" is that of {ids[question.id]}')
        except _BadRow as bad:
            reason, sentence = bad.args
            if not lenient:
                hint = "mend it, or set questions.skip_bad=true to leave such rows out"
                raise DataError(f"{where}: {sentence}; {hint}") from None
            skipped[reason] += 1
            continue
        first_seen[key] = ids[question.id] = where
        kept.append(question)
    if not kept:
        left_out = f" ({_counts(skipped)} left out)" if skipped else ""
        raise DataError(f"{source}: no question in it{left_out}")
    if config.limit is not None and config.limit < len(kept):
        chosen = sorted(random.Random(seed).sample(range(len(kept)), config.limit))
        kept = [kept[i] for i in chosen]
    return QuestionSet(source, tuple(kept), dict(skipped))


def _counts(skipped: Mapping[str, int]) -> str:
    return ", ".join(f"{n} {reason}" for reason, n in sorted(skipped.items()))


def _open_source(config: QuestionsConfig) -> tuple[str, Iterator[tuple[str, Any]]]:
    """Return the source in words, and an iterator over (where, row or _BadRow)."""
    name = config.source
    if name == "own":
        path = data_dir() / "questions.jsonl"
        return f"the project's own questions ({path.name})", _jsonl_rows(path)
    if name in HUB_SOURCES:
        return _arc_rows(name, config.split)
    path = Path(name).expanduser()
    if path.suffix.lower() in FILE_SUFFIXES or path.is_file():
        reader = _csv_rows if path.suffix.lower() == ".csv" else _jsonl_rows
        return f"the file {path}", reader(path)
    if path.is_dir():
        raise DataError(f"{path} is a folder; name a .jsonl or .csv file in it")
    data_set, _, configuration = name.partition(":")
    if len(data_set.split("/")) != 2:
        raise DataError(
            f'unknown source of questions "{name}"{did_you_mean(name, BUILT_IN)} '
            "(or a .jsonl/.csv file, or a Hub data set ORGANISATION/NAME)"
        )
    rows = _hub_rows(data_set, configuration or None, config.split)
    return f"the Hub data set {name}, split {config.split}", rows


def _question(row: Any, config: QuestionsConfig, where: str, number: int) -> Question:
    """Turn one row into a question, or raise :class:`_BadRow`."""
    if isinstance(row, _BadRow):
        raise row
    # Built-in sources have their own schema; `column` is about the user's files and data sets.
    column = "question" if config.source in BUILT_IN else config.column
    if column not in row:
        names = [str(key) for key in row]
        near = did_you_mean(column, names) if names else ""
        raise _BadRow("missing_column", f'no column "{column}"{near} (set questions.column)')
    text = row[column]
    if not isinstance(text, str):
        raise _BadRow("not_text", f'"{column}" holds {type(text).__name__}, expected text')
    text = " ".join(text.split())
    if not text:
        raise _BadRow("empty", f'"{column}" is empty')
    name = row.get("id")
    name = str(name) if isinstance(name, (str, int)) and str(name).strip() else f"q-{number:05d}"
    topic = row.get("topic") if isinstance(row.get("topic"), str) else None
    candidates, gold = _candidates(row)
    return Question(name, text, candidates, gold, topic, where)


def _candidates(row: Mapping[str, Any]) -> tuple[tuple[str, ...], int | None]:
    """Read the candidates and the gold position: ARC's columns, or ``candidates`` and ``gold``."""
    choices = row.get("choices")
    if isinstance(choices, Mapping) and "text" in choices:
        texts = tuple(str(text) for text in choices["text"])
        labels = [str(label) for label in choices.get("label", ())]
        key = str(row.get("answerKey", ""))
        return texts, labels.index(key) if key in labels else None
    texts = row.get("candidates")
    if isinstance(texts, Sequence) and not isinstance(texts, str):
        gold = row.get("gold")
        known = isinstance(gold, int) and 0 <= gold < len(texts)
        return tuple(str(text) for text in texts), gold if known else None
    return (), None


# --- readers: each yields (where, row), and a bad line as a _BadRow in its row's place ------------


def _lines(path: Path) -> Iterator[tuple[int, str | _BadRow]]:
    """Yield (line number, text), decoding line by line so that one bad line is only one."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
    for number, raw in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        try:
            yield number, raw.decode("utf-8").rstrip("\r")
        except UnicodeDecodeError:
            yield number, _BadRow("not_utf8", "not UTF-8 text; save the file as UTF-8")


def _jsonl_rows(path: Path) -> Iterator[tuple[str, Any]]:
    import json

    for number, line in _lines(path):
        where = f"{path}, line {number}"
        if isinstance(line, _BadRow):
            yield where, line
            continue
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            yield where, _BadRow("malformed", f"not valid JSON ({error.msg})")
            continue
        if not isinstance(row, dict):
            row = _BadRow("malformed", f"expected a JSON object, found {type(row).__name__}")
        yield where, row


def _csv_rows(path: Path) -> Iterator[tuple[str, Any]]:
    bad: list[tuple[str, _BadRow]] = []

    def text_lines() -> Iterator[str]:
        for number, line in _lines(path):
            if isinstance(line, _BadRow):
                bad.append((f"{path}, line {number}", line))
            else:
                yield line + "\n"

    reader = csv.DictReader(text_lines(), strict=True)
    while True:
        try:
            row = next(reader, None)
        except csv.Error as error:
            row = {None: error}
        yield from bad
        bad.clear()
        if row is None:
            return
        where = f"{path}, line {reader.line_num}"
        if None in row:
            reason = row[None] if isinstance(row[None], csv.Error) else "more fields than columns"
            yield where, _BadRow("malformed", f"not valid CSV ({reason})")
        else:
            yield where, row


def _arc_rows(name: str, split: str) -> tuple[str, Iterator[tuple[str, Any]]]:
    """Read ARC from the mirror where GRATH_MIRROR names one, else from the Hub; never silently."""
    data_set, configuration = HUB_SOURCES[name]
    mirror = mirror_dir()
    if mirror is None:
        return (
            f"{configuration}, split {split}, from the Hub ({data_set})",
            _hub_rows(data_set, configuration, split),
        )
    path = mirror / "ai2_arc" / configuration / f"{split}.jsonl"
    if not path.is_file():
        raise DataError(
            f"the mirror that GRATH_MIRROR names has no {path.relative_to(mirror)}; add it, or "
            "unset GRATH_MIRROR to read from the Hub"
        )
    return f"{configuration}, split {split}, from the mirror {mirror}", _jsonl_rows(path)


def _hub_rows(data_set: str, configuration: str | None, split: str) -> Iterator[tuple[str, Any]]:
    from datasets import load_dataset

    try:
        rows = load_dataset(data_set, configuration, split=split)
    except Exception as error:  # datasets raises its own, requests', huggingface_hub's and OSError
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise DataError(
            f'cannot read the Hub data set "{data_set}", split "{split}": {lines[0]} (without a '
            "network, set GRATH_MIRROR to a benchmark mirror, or use questions.source=own)"
        ) from error
    for number, row in enumerate(rows):
        yield f"{data_set}, row {number}", row


def read_questions(path: Path) -> tuple[Question, ...]:
    """Read a ``questions.jsonl`` as a run directory holds it (rows of :meth:`Question.to_row`)."""
    rows = read_jsonl(path)
    if not rows:
        raise DataError(f"{path}: no question in it")
    return tuple(
        Question.from_row(row, where=f"{path}, row {number}")
        for number, row in enumerate(rows, start=1)
    )


# --- splitting -----------------------------------------------------------------------------------


def split_held_out(
    questions: Sequence[Question], share: float, seed: int
) -> tuple[tuple[Question, ...], tuple[Question, ...]]:
    """Return (train, held out), each in the order given; at least one question in each.

    The split is by question, so a held-out question's pairs of every iteration stay unseen.

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


# --- overlap with the benchmarks -----------------------------------------------------------------

# A run of eight words alone would flag stock phrases ("Which of the following statements best
# explains why ..."), so half of all the words of the two questions must be common as well.
NGRAM = 8
COMMON_WORDS = 0.5


@dataclass(frozen=True)
class Overlap:
    """A source question that a benchmark holds too, whole or in part."""

    question_id: str
    question: str
    benchmark: str
    text: str
    kind: str
    """``same`` (but for case and punctuation) or ``near`` (eight words in a row, half of all)."""


def overlap_with_benchmarks(
    questions: Iterable[Question], references: Mapping[str, Iterable[str]] | None = None
) -> list[Overlap]:
    """Return the questions that appear in a benchmark that the model is to be measured on.

    Args:
        questions: the source questions.
        references: benchmark name -> its questions; None takes those at hand
            (:func:`reference_questions`).
    """
    references = reference_questions() if references is None else references
    grams: dict[str, list[tuple[str, str]]] = {}
    same: dict[str, tuple[str, str]] = {}
    for benchmark, texts in references.items():
        for text in texts:
            same.setdefault(normalized(text), (benchmark, text))
            for gram in _ngrams(text):
                grams.setdefault(gram, []).append((benchmark, text))
    found = []
    for question in questions:
        hit = same.get(normalized(question.text))
        kind = "same"
        if hit is None:
            kind = "near"
            sharing = (other for g in _ngrams(question.text) for other in grams.get(g, ()))
            hit = next((o for o in sharing if _common(question.text, o[1]) >= COMMON_WORDS), None)
        if hit is not None:
            found.append(Overlap(question.id, question.text, *hit, kind))
    return found


def reference_questions() -> dict[str, list[str]]:
    """Return the test questions of every benchmark at hand: our own probe, and the mirror's."""
    references = {}
    for name in ("probe", "retention"):
        path = data_dir() / f"{name}.jsonl"
        if path.is_file():
            references[name] = [str(row["question"]) for row in read_jsonl(path)]
    mirror = mirror_dir()
    if mirror is not None:
        files = {
            "truthful_qa": [*mirror.glob("truthful_qa/*/validation.jsonl")],
            "arc_challenge": [*mirror.glob("ai2_arc/ARC-Challenge/test.jsonl")],
            "hellaswag": [*mirror.glob("hellaswag/validation.jsonl")],
            "mmlu": [*mirror.glob("mmlu/*/test.jsonl")],
        }
        for name, paths in files.items():
            key = "ctx" if name == "hellaswag" else "question"
            texts = [str(row[key]) for path in sorted(paths) for row in read_jsonl(path)]
            if texts:
                references[name] = list(dict.fromkeys(texts))
    return references


def normalized(text: str) -> str:
    """Return the words of ``text`` in lower case, without punctuation, one space between."""
    return " ".join(re.findall(r"\w+", text.casefold()))


def _common(a: str, b: str) -> float:
    """Return shared over all distinct words of two texts, in [0, 1]."""
    left, right = set(normalized(a).split()), set(normalized(b).split())
    return len(left & right) / len(left | right)


def _ngrams(text: str) -> Iterator[str]:
    words = normalized(text).split()
    for start in range(len(words) - NGRAM + 1):
        yield " ".join(words[start : start + NGRAM])
