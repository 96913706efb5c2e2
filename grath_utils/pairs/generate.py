"""Pair generation: the policy's own correct and incorrect answer to every source question.

Iteration 0 (:func:`generate_pairs`) writes both answers; later iterations (:func:`refine_pairs`)
write the correct answer again and keep the first incorrect one. How a pair is written is up to
the mode (:mod:`.modes`); here are the files, and what makes an interruption harmless.

A journal beside the output holds the finished chunks of questions. A run that was killed resumes
after the last of them, and because a chunk is always computed as a whole, from the same inputs,
the final files are the same byte for byte.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grath_utils.config import PairsConfig
from grath_utils.engine import processes
from grath_utils.errors import DataError, RunError
from grath_utils.files import Journal, fingerprint, read_jsonl, write_jsonl
from grath_utils.pairs.modes import find_mode, make_writer
from grath_utils.pairs.parsing import Reason
from grath_utils.pairs.questions import Question
from grath_utils.pairs.writers import Rejected, Task, Writer, WrittenPair

if TYPE_CHECKING:
    from grath_utils.engine.models import Policy

# Part of the journal's fingerprint: raise it when the same inputs would give other pairs.
VERSION = 1


@dataclass(frozen=True)
class Pair:
    """A question with a correct and an incorrect answer, both by the policy: one DPO example."""

    id: str
    """The question's id."""
    question: str
    correct: str
    incorrect: str
    iteration: int = 0
    """The iteration that wrote the correct answer (the incorrect one is always the first)."""
    contrast: float | None = None
    """How far apart the model itself places the two answers, in the modes that ask it."""

    def to_row(self) -> dict[str, Any]:
        """Return one row of ``pairs.jsonl``."""
        row = dataclasses.asdict(self)
        return {key: value for key, value in row.items() if value is not None}

    @classmethod
    def from_row(cls, row: Mapping[str, Any], *, where: str = "pair") -> Pair:
        """Read one row of ``pairs.jsonl``.

        Raises:
            DataError: a field is missing, empty or of the wrong kind; ``where`` and it are named.
        """
        values = {name: row.get(name) for name in ("id", "question", "correct", "incorrect")}
        if isinstance(values["id"], int):
            values["id"] = str(values["id"])
        for name, value in values.items():
            if not isinstance(value, str) or not value.strip():
                state = "is missing" if name not in row else f"holds {value!r}"
                raise DataError(f'{where}: "{name}" {state}; a pair needs text there')
        iteration, contrast = row.get("iteration", 0), row.get("contrast")
        if not isinstance(iteration, int) or isinstance(iteration, bool) or iteration < 0:
            raise DataError(f'{where}: "iteration" holds {iteration!r}, expected 0, 1, 2, ...')
        if contrast is not None and not isinstance(contrast, (int, float)):
            raise DataError(f'{where}: "contrast" holds {contrast!r}, expected a number')
        return cls(**values, iteration=iteration, contrast=contrast)


@dataclass(frozen=True)
class PairReport:
    """What a call of :func:`generate_pairs` or :func:`refine_pairs` did."""

    questions: int
    pairs: int
    """Pairs in the file (in refinement: new and kept)."""
    kept: int
    """Refinement: old pairs kept because the new correct answer failed."""
    rejected: Mapping[str, int]
    """Reason -> number of rejected completions."""
    completions: int
    tokens: int
    """Tokens generated."""
    seconds: float
    """Of this call, without what an interrupted one had done."""
    resumed: int
    """Questions that an interrupted call had done."""

    def __str__(self) -> str:
        kept = f" ({self.kept} kept from before)" if self.kept else ""
        reasons = ", ".join(f"{n} {reason}" for reason, n in self.rejected.items())
        return (
            f"{self.pairs} pairs{kept} from {self.questions} questions; "
            f"{self.completions} completions in {self.seconds:.0f} s, "
            f"rejected: {reasons or 'none'}"
        )


def generate_pairs(
    policy: Policy,
    questions: Sequence[Question],
    config: PairsConfig,
    *,
    seed: int,
    out: Path,
    rejects: Path,
    progress: bool = True,
    skip_long: bool = False,
) -> PairReport:
    """Let the policy write a correct and an incorrect answer to each question.

    Args:
        policy: the model that answers.
        questions: with distinct ids.
        config: mode, demonstrations, filters and the rest.
        seed: of the sampled candidates.
        out: ``pairs.jsonl``; rows of :class:`Pair`, in the order of the questions.
        rejects: ``rejects.jsonl``; every rejected completion with its :class:`Reason`.
        progress: show a bar.
        skip_long: count questions that do not fit into the context instead of stopping.

    Raises:
        ConfigError: settings that cannot go together.
        DataError: no questions, a doubled id, a question that is longer than the context, or one
            without the candidates that the mode needs.
        RunError: the files cannot be written, or no question at all got a pair.
    """
    job = _Job(policy, [Task(question) for question in questions], config, seed, out, rejects)
    return job.run(progress=progress, skip_long=skip_long)


def refine_pairs(
    policy: Policy,
    questions: Sequence[Question],
    previous: Sequence[Pair],
    config: PairsConfig,
    *,
    iteration: int,
    seed: int,
    out: Path,
    rejects: Path,
    progress: bool = True,
    skip_long: bool = False,
) -> PairReport:
    """Let the policy write the correct answers again: gradual refinement.

    The incorrect answer stays that of iteration 0. Where the new correct answer fails, the old
    pair is kept. With ``config.retry_failed``, questions that have no pair yet are tried again,
    both answers; otherwise they are left out.

    Args:
        previous: the pairs of the iteration before.
        iteration: at least 1; recorded with every new correct answer.

    The other arguments and errors are those of :func:`generate_pairs`.

    Raises:
        DataError: a previous pair belongs to no question here.
    """
    if iteration < 1:
        raise DataError(f"refinement is for iterations from 1 on, not {iteration}")
    old = {pair.id: pair for pair in previous}
    strangers = sorted(old.keys() - {question.id for question in questions})
    if strangers:
        raise DataError(f"{len(strangers)} previous pairs have no question, first: {strangers[0]}")
    tasks = [
        Task(question, old[question.id].incorrect if question.id in old else None)
        for question in questions
        if question.id in old or config.retry_failed
    ]
    job = _Job(policy, tasks, config, seed, out, rejects, iteration=iteration, old=old)
    return job.run(progress=progress, skip_long=skip_long)


def read_pairs(path: Path) -> list[Pair]:
    """Read ``pairs.jsonl``.

    Raises:
        DataError: missing or empty file, a malformed row, a pair without one of its sides, an id
            that comes twice, or equal answers; file and row are named.
    """
    rows = read_jsonl(path)
    if not rows:
        raise DataError(f"{path}: no pair in it")
    pairs: list[Pair] = []
    seen: dict[str, int] = {}
    for number, row in enumerate(rows, start=1):
        pair = Pair.from_row(row, where=f"{path}, pair {number}")
        if pair.id in seen:
            raise DataError(
                f'{path}, pair {number}: id "{pair.id}" is that of pair {seen[pair.id]}'
            )
        if pair.correct.strip() == pair.incorrect.strip():
            raise DataError(f'{path}, pair {number}: both answers are "{pair.correct}"')
        seen[pair.id] = number
        pairs.append(pair)
    return pairs


# --- the work, chunk by chunk --------------------------------------------------------------------


@dataclass(frozen=True)
class _Job:
    """All tasks of an iteration, and where their pairs go."""

    policy: Policy
    tasks: Sequence[Task]
    config: PairsConfig
    seed: int
    out: Path
    rejects: Path
    iteration: int = 0
    old: Mapping[str, Pair] = field(default_factory=dict)
    """The pairs of the iteration before, by id."""

    def run(self, *, progress: bool, skip_long: bool) -> PairReport:
        """Do all tasks, journal them, and write both files."""
        from tqdm.auto import tqdm

        started = time.perf_counter()
        self.check_tasks()
        # Iterations draw differently, or a refined answer could only ever be the first one again.
        writer = make_writer(self.policy, self.config, self.seed + 1_000_003 * self.iteration)
        order = self.fitting(writer, skip_long)
        size = writer.chunk_batches * self.config.batch_size
        chunks = [order[start : start + size] for start in range(0, len(order), size)]
        journal_of = self.out if processes.is_main() else None
        journal = Journal.beside(journal_of, self.identity(writer, size))
        done = processes.on_main(journal.read)
        resumed = sum(len(rows) for rows in done.values())
        bar = tqdm(
            total=len(order),
            initial=resumed,
            disable=not (progress and processes.is_main()),
            desc="pairs",
            unit="question",
            file=sys.stderr,
        )

        def write(number: int) -> list[dict[str, Any]]:
            written = writer.write([self.tasks[i] for i in chunks[number]])
            return [dataclasses.asdict(each) for each in written]

        todo = [number for number in range(len(chunks)) if number not in done]
        with contextlib.closing(writer), bar:
            for number, rows in processes.in_turns(todo, write):
                journal.append(number, rows)
                done[number] = rows
                bar.update(len(rows))
        rows = itertools.chain.from_iterable(done[number] for number in range(len(chunks)))
        written = dict(zip(order, map(WrittenPair.from_row, rows), strict=True))
        report = processes.on_main(lambda: self.write_files(written))
        journal.remove()
        seconds = round(time.perf_counter() - started, 2)
        return dataclasses.replace(report, seconds=seconds, resumed=resumed)

    def check_tasks(self) -> None:
        """Refuse tasks that cannot be told apart, or lack what the mode needs."""
        if not self.tasks:
            raise DataError("there are no questions to write pairs for")
        for name, count in Counter(task.question.id for task in self.tasks).items():
            if count > 1:
                raise DataError(f'{count} questions have the id "{name}"')
        if find_mode(self.config.mode).needs_candidates:
            setting = f"pairs.mode={self.config.mode}"
        elif self.config.annotated:
            setting = "pairs.annotated=true"
        else:
            return
        for question in (task.question for task in self.tasks):
            if len(question.candidates) < 2:
                raise DataError(
                    f"{question.where or question.id}: {setting} needs questions with candidates, "
                    "such as questions.source=arc_challenge, and this one has none"
                )

    def fitting(self, writer: Writer, skip_long: bool) -> list[int]:
        """Return the tasks that fit into the model's context, longest prompt first.

        Prompts of like length together: what is computed at once then has little padding.
        """
        room = self.policy.max_length - self.config.max_new_tokens
        lengths = [writer.prompt_tokens(task.question) for task in self.tasks]
        for task, length in zip(self.tasks, lengths, strict=True):
            if length > room and not skip_long:
                question = task.question
                raise DataError(
                    f'{question.where or "question"} ("{question.id}"): its prompt has {length} '
                    f"tokens and the context of {self.policy.name} leaves room for {room}; shorten "
                    "it, use fewer pairs.shots, or set questions.skip_bad=true"
                )
        found = [i for i, length in enumerate(lengths) if length <= room]
        return sorted(found, key=lambda i: (-lengths[i], i))

    def identity(self, writer: Writer, size: int) -> str:
        """Return what a journal must agree on to be continued."""
        return fingerprint(
            [
                VERSION,
                self.policy.fingerprint,
                dataclasses.asdict(self.config),
                self.iteration,
                self.seed,
                size,
                # The rendered prompts stand for instruction, demonstrations and chat template.
                [writer.prompt(self.tasks[0].question, kind) for kind in writer.kinds],
                [[task.question.to_row(), task.incorrect] for task in self.tasks],
            ]
        )

    def write_files(self, written: Mapping[int, WrittenPair]) -> PairReport:
        """Write both files, the pairs last: they are what says that the work is done."""
        too_long = WrittenPair(rejected=(Rejected("", "", Reason.TOO_LONG),))
        pairs: list[Pair] = []
        rows: list[dict[str, Any]] = []
        kept = 0
        for i, task in enumerate(self.tasks):
            question, new = task.question, written.get(i, too_long)
            asked = {"id": question.id, "question": question.text, "iteration": self.iteration}
            rows += [
                {**asked, "prompt": r.prompt, "reason": str(r.reason), "completion": r.completion}
                for r in new.rejected
            ]
            if new.correct is not None and new.incorrect is not None:
                pairs.append(
                    Pair(
                        **asked, correct=new.correct, incorrect=new.incorrect, contrast=new.contrast
                    )
                )
            elif question.id in self.old:
                pairs.append(self.old[question.id])
                kept += 1
        counts = dict(Counter(row["reason"] for row in rows).most_common())
        if not pairs:
            reasons = ", ".join(f"{n} {reason}" for reason, n in counts.items())
            raise RunError(
                f"none of {len(self.tasks)} questions got a usable pair ({reasons}): this model "
                "does not follow the prompt; try pairs.mode=default, more questions or a stronger "
                "model"
            )
        write_jsonl(self.rejects, rows)
        write_jsonl(self.out, [pair.to_row() for pair in pairs])
        return PairReport(
            questions=len(self.tasks),
            pairs=len(pairs),
            kept=kept,
            rejected=counts,
            completions=sum(each.completions for each in written.values()),
            tokens=sum(each.tokens for each in written.values()),
            seconds=0.0,
            resumed=0,
        )
