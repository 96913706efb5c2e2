"""Pair generation: the policy's own correct and incorrect answer to every source question.

Iteration 0 (:func:`generate_pairs`) writes both answers; later iterations (:func:`refine_pairs`)
write the correct answer anew and keep the first incorrect one. How a pair is written is in
:mod:`.writers`; here are the files, and what makes an interruption harmless.

A journal beside the output holds the finished chunks of questions. A run that was killed goes on
after the last of them, and because a chunk is always computed as a whole, from the same inputs,
the final files are the same byte for byte.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grath_utils.config import PairsConfig
from grath_utils.engine import processes
from grath_utils.errors import DataError, RunError
from grath_utils.files import Journal, fingerprint, read_jsonl, write_jsonl
from grath_utils.pairs.parsing import Reason
from grath_utils.pairs.questions import Question
from grath_utils.pairs.writers import Outcome, Rejected, Task, make_writer

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
    """How far apart the model itself places the two answers; mode ``default`` only."""

    def to_row(self) -> dict[str, Any]:
        """Return one row of ``pairs.jsonl``."""
        row = dataclasses.asdict(self)
        if self.contrast is None:
            del row["contrast"]
        return row

    @classmethod
    def from_row(cls, row: Mapping[str, Any], *, where: str = "pair") -> Pair:
        """Read one row of ``pairs.jsonl``.

        Raises:
            DataError: a field is missing, empty or of the wrong kind; ``where`` and it are named.
        """
        values: dict[str, Any] = {}
        for name in ("id", "question", "correct", "incorrect"):
            value = row.get(name)
            if isinstance(value, int) and name == "id":
                value = str(value)
            if not isinstance(value, str) or not value.strip():
                state = "is missing" if name not in row else f"holds {value!r}"
                raise DataError(f'{where}: "{name}" {state}; a pair needs text there')
            values[name] = value
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
    """Of this call; without what an earlier, interrupted call had done."""
    resumed: int
    """Questions whose outcome came from the journal of an interrupted call."""

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

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
        DataError: no questions, a doubled id, or a question longer than the context.
        RunError: the files cannot be written, or no question at all got a pair.
    """
    tasks = [Task(question) for question in questions]
    return _make(policy, tasks, {}, config, 0, seed, out, rejects, progress, skip_long)


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
    """Let the policy write the correct answers anew: gradual refinement.

    The incorrect answer stays that of iteration 0. Where the new correct answer fails, the old
    pair is kept. With ``config.retry_failed``, questions that have no pair yet are tried again,
    both answers; otherwise they are left out.

    Args:
        previous: the pairs of the iteration before.
        iteration: at least 1; recorded with every new correct answer.

    Raises:
        DataError: as :func:`generate_pairs`, or a previous pair belongs to no question here.
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
    return _make(policy, tasks, old, config, iteration, seed, out, rejects, progress, skip_long)


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


def _make(
    policy: Policy,
    tasks: Sequence[Task],
    old: Mapping[str, Pair],
    config: PairsConfig,
    iteration: int,
    seed: int,
    out: Path,
    rejects: Path,
    progress: bool,
    skip_long: bool,
) -> PairReport:
    """Do all tasks, journal them, and write both files."""
    from tqdm.auto import tqdm

    started = time.perf_counter()
    _check_ids(tasks)
    # Iterations draw differently, or a refined answer could only ever be the first one again.
    writer = make_writer(policy, config, seed + 1_000_003 * iteration)
    lengths = [writer.prompt_tokens(task.question) for task in tasks]
    fitting = _fitting(policy, tasks, lengths, config, skip_long)
    # Prompts of like length together: what is computed at once then has little padding.
    order = sorted(fitting, key=lambda i: (-lengths[i], i))
    size = 4 * config.batch_size if config.mode == "paper" else config.batch_size
    chunks = [order[start : start + size] for start in range(0, len(order), size)]
    identity = _identity(policy, tasks, config, iteration, seed, size, writer)
    journal = Journal.beside(out if processes.is_main() else None, identity)
    done = processes.on_main(journal.read)
    resumed = sum(len(done[n]) for n in range(len(chunks)) if n in done)
    todo = [n for n in range(len(chunks)) if n not in done]
    bar = tqdm(
        total=len(order),
        initial=resumed,
        disable=not (progress and processes.is_main()),
        desc="pairs",
        unit="question",
        file=sys.stderr,
    )

    def write(number: int) -> list[dict[str, Any]]:
        return [_outcome_row(o) for o in writer.write([tasks[i] for i in chunks[number]])]

    with contextlib.closing(writer), bar:
        for number, rows in processes.in_turns(todo, write):
            journal.append(number, rows)
            done[number] = rows
            bar.update(len(rows))
    outcomes = {
        i: _read_outcome(row)
        for number, chunk in enumerate(chunks)
        for i, row in zip(chunk, done[number], strict=True)
    }
    report = processes.on_main(lambda: _finish(tasks, outcomes, old, iteration, out, rejects))
    journal.remove()
    return dataclasses.replace(
        report, seconds=round(time.perf_counter() - started, 2), resumed=resumed
    )


def _finish(
    tasks: Sequence[Task],
    outcomes: Mapping[int, Outcome],
    old: Mapping[str, Pair],
    iteration: int,
    out: Path,
    rejects: Path,
) -> PairReport:
    """Write both files, the pairs last: they are what says that the work is done."""
    too_long = Outcome(None, None, (Rejected("", "", Reason.TOO_LONG),))
    pairs: list[Pair] = []
    rows = []
    kept = 0
    for i, task in enumerate(tasks):
        question, outcome = task.question, outcomes.get(i, too_long)
        rows += [
            {
                "id": question.id,
                "question": question.text,
                "iteration": iteration,
                "prompt": rejected.prompt,
                "reason": str(rejected.reason),
                "completion": rejected.completion,
            }
            for rejected in outcome.rejected
        ]
        if outcome.correct is not None and outcome.incorrect is not None:
            sides = (outcome.correct, outcome.incorrect)
            pairs.append(Pair(question.id, question.text, *sides, iteration, outcome.contrast))
        elif question.id in old:
            pairs.append(old[question.id])
            kept += 1
    counts = Counter(row["reason"] for row in rows)
    if not pairs:
        reasons = ", ".join(f"{n} {reason}" for reason, n in counts.most_common())
        raise RunError(
            f"none of {len(tasks)} questions got a usable pair ({reasons}): this model does not "
            "follow the prompt; try pairs.mode=default, more questions or a stronger model"
        )
    write_jsonl(rejects, rows)
    write_jsonl(out, [pair.to_row() for pair in pairs])
    return PairReport(
        questions=len(tasks),
        pairs=len(pairs),
        kept=kept,
        rejected=dict(counts.most_common()),
        completions=sum(outcome.completions for outcome in outcomes.values()),
        tokens=sum(outcome.tokens for outcome in outcomes.values()),
        seconds=0.0,
        resumed=0,
    )


def _check_ids(tasks: Sequence[Task]) -> None:
    if not tasks:
        raise DataError("there are no questions to write pairs for")
    for name, count in Counter(task.question.id for task in tasks).items():
        if count > 1:
            raise DataError(f'{count} questions have the id "{name}"')


def _fitting(
    policy: Policy,
    tasks: Sequence[Task],
    lengths: Sequence[int],
    config: PairsConfig,
    skip_long: bool,
) -> list[int]:
    """Return the tasks whose prompt and completion fit into the model's context."""
    room = policy.max_length - config.max_new_tokens
    for task, length in zip(tasks, lengths, strict=True):
        if length > room and not skip_long:
            question = task.question
            raise DataError(
                f'{question.where or "question"} ("{question.id}"): its prompt has {length} tokens '
                f"and the context of {policy.name} leaves room for {room}; shorten it, use fewer "
                "pairs.shots, or set questions.skip_bad=true"
            )
    return [i for i, length in enumerate(lengths) if length <= room]


def _identity(
    policy: Policy,
    tasks: Sequence[Task],
    config: PairsConfig,
    iteration: int,
    seed: int,
    size: int,
    writer: Any,
) -> str:
    """Return what a journal must agree on to be continued."""
    return fingerprint(
        [
            VERSION,
            policy.fingerprint,
            dataclasses.asdict(config),
            iteration,
            seed,
            size,
            # The rendered prompts stand for instruction, demonstrations and chat template.
            [writer.prompt(tasks[0].question, kind) for kind in writer.kinds],
            [[task.question.to_row(), task.incorrect] for task in tasks],
        ]
    )


def _outcome_row(outcome: Outcome) -> dict[str, Any]:
    return dataclasses.asdict(outcome)


def _read_outcome(row: Mapping[str, Any]) -> Outcome:
    rejected = tuple(
        Rejected(r["prompt"], r["completion"], Reason(r["reason"])) for r in row["rejected"]
    )
    return Outcome(**{**row, "rejected": rejected})
