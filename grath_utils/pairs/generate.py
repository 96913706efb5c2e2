"""Pair generation: the policy's own correct and incorrect answer to every source question.

How a pair is written is up to the mode (:mod:`.modes`); here are the files, and what makes an
interruption harmless: a journal beside the output holds the finished chunks of questions. A run
that was killed resumes after the last of them, and because a chunk is always computed as a whole,
from the same inputs, the final files are the same byte for byte.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from grath_utils import engine
from grath_utils.config import PairsConfig, own_settings
from grath_utils.engine import processes
from grath_utils.errors import DataError, RunError, brief
from grath_utils.files import (
    Journal,
    check_form,
    check_output,
    fingerprint,
    is_text,
    parse_json,
    read_jsonl,
    read_text,
    write_jsonl,
)
from grath_utils.pairs.judge import find_judge, judged
from grath_utils.pairs.labels import as_written, relabelled
from grath_utils.pairs.modes import check_pairs_config
from grath_utils.pairs.parsing import Reason, unusable
from grath_utils.pairs.preferences import MARKS, OPINIONS, Pair, is_preference, own_row
from grath_utils.pairs.questions import Question
from grath_utils.pairs.words import is_blank
from grath_utils.pairs.writers import PairMode, Rejected, Task, Writer, WrittenPair

# Part of the journal's fingerprint: raise it when the same inputs would give other pairs.
VERSION = 2
WRITTEN = {  # what became of a question, in the journal: a WrittenPair
    "correct": (str, None),
    "incorrect": (str, None),
    "rejected": [{"prompt": str, "completion": str, "reason": str, "truth": (float, None)}],
    **OPINIONS,
    "completions": int,
    "tokens": int,
}


def read_pairs(path: Path) -> list[Pair]:
    """Read ``pairs.jsonl``, or a file of ``prompt``, ``chosen`` and ``rejected`` by another tool.

    Such a file (:mod:`.preferences`) may also be a JSON array, and needs no ids.

    Raises:
        DataError: missing or empty file, a field that is missing, empty or of the wrong kind, an id
            that comes twice, or equal answers; file and row are named.
    """
    pairs: dict[str, Pair] = {}
    if Path(path).suffix == ".json":
        rows = parse_json(read_text(path), str(path))
        check_form(rows, [dict], str(path), " with a prompt, a chosen and a rejected answer each")
    else:
        rows = read_jsonl(path)
    for number, row in enumerate(rows, start=1):
        where = f"{path}, pair {number}"
        if is_preference(row):
            row = {"id": f"p-{number:05}", **own_row(row, where)}
        texts = {name: row.get(name) for name in ("id", "question", "correct", "incorrect")}
        if type(texts["id"]) is int:  # true and false are of that kind, too
            texts["id"] = str(texts["id"])
        for name, text in texts.items():
            if not isinstance(text, str) or is_blank(text) or not is_text(text):
                raise DataError(f'{where}: "{name}" is missing or no text; found {brief(text)}')
        check_form({"iteration": 0, **row}, MARKS, where)
        marks = {name: row[name] for name in MARKS if row.get(name) is not None}
        pair = Pair(**texts, **marks)
        if pair.iteration < 0:
            raise DataError(f'{where}: "iteration" is {pair.iteration}; expected 0, 1, 2, ...')
        if pair.id in pairs:
            first = [*pairs].index(pair.id) + 1
            raise DataError(f'{where}: id "{pair.id}" is that of pair {first}')
        if unusable(pair.correct, pair.incorrect) is Reason.EQUAL:
            raise DataError(f'{where}: both answers are "{pair.correct}"')
        pairs[pair.id] = pair
    if not pairs:
        raise DataError(f"{path}: no pair in it")
    return list(pairs.values())


@dataclass(frozen=True)
class PairReport:
    """What a call of :func:`generate_pairs` did."""

    questions: int
    pairs: int  # pairs in the file, new and kept
    kept: int  # pairs of the iteration before, kept because the new correct answer failed
    swapped: int  # new pairs whose two answers the judge has exchanged
    rejected: Mapping[str, int]  # reason -> number of rejected completions
    completions: int
    seconds: float  # of this call, without what an interrupted one had done
    resumed: int  # questions that an interrupted call had done

    def __str__(self) -> str:
        notes = {"kept from before": self.kept, "exchanged by the judge": self.swapped}
        noted = ", ".join(f"{count} {what}" for what, count in notes.items() if count)
        return (
            f"{self.pairs} pairs{noted and f' ({noted})'} from {self.questions} questions; "
            f"{self.completions} completions in {self.seconds:.0f} s, "
            f"rejected: {_listed(self.rejected) or 'none'}"
        )


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{n} {reason}" for reason, n in counts.items())


def check_outputs(out: Path, rejects: Path, inputs: Iterable[Path] = ()) -> None:
    """Check that :func:`generate_pairs` may write its files, see :func:`.files.check_output`."""
    asked = {"id", "question", "iteration"}
    known = {field.name for field in fields(Pair)}
    check_output(out, read_jsonl, asked | {"correct", "incorrect"}, inputs, allowed=known)
    check_output(rejects, read_jsonl, asked | {"prompt", "reason", "completion"}, inputs)


def generate_pairs(
    policy: engine.Policy,
    questions: Sequence[Question],
    config: PairsConfig,
    *,
    seed: int,
    out: Path,
    rejects: Path,
    iteration: int = 0,
    previous: Sequence[Pair] = (),
    progress: bool = True,
    skip_long: bool = False,
) -> PairReport:
    """Let the policy write a correct and an incorrect answer to each question.

    Given the pairs of the iteration before, it writes the correct answers again (gradual
    refinement): the incorrect answers stay, and where a new correct answer fails, so does the old
    pair. Questions without a pair are tried again if ``config.retry_failed``, both answers.

    A judge (:mod:`.judge`) has its say on what was written, and last of all come the labels
    (:mod:`.labels`): the file holds what is trained on.

    Args:
        questions: what is answered; their ids are distinct.
        out: ``pairs.jsonl``; rows of :class:`Pair`, in the order of the questions.
        rejects: ``rejects.jsonl``; every rejected completion with its :class:`Reason`.
        previous: the pairs of the iteration before, with their labels.
        skip_long: count questions that do not fit into the context instead of stopping.

    Raises:
        ConfigError: settings that cannot go together.
        DataError: questions that cannot be told apart, answered or matched with the pairs before.
        RunError: the files cannot be written, or no question at all got a pair.
        UsageError: a file is there that is not an earlier output, see :func:`check_outputs`.
    """
    from tqdm.auto import tqdm

    started = time.perf_counter()
    processes.on_main(lambda: check_outputs(out, rejects))
    texts = {question.id: question.text for question in questions}
    previous = as_written(previous, config.labels, config.flipped, seed, texts)
    old = {pair.id: pair for pair in previous}
    if old and iteration < 1:
        raise DataError(
            "`previous` is for later rounds (iteration 1, 2, ...): refine in one of them"
        )
    tasks = [
        Task(question, old[question.id].incorrect if question.id in old else None)
        for question in questions
        if question.id in old or not iteration or config.retry_failed
    ]
    mode = check_pairs_config(config)
    # Iterations draw differently, or a refined answer could only ever be the first one again.
    writer = mode.writer(policy, config, seed + 1_000_003 * iteration)
    _check_questions([task.question for task in tasks], old, config, mode)
    order = _fitting(tasks, writer, skip_long)
    size = writer.chunk_batches * config.batch_size
    chunks = [order[i : i + size] for i in range(0, len(order), size)]
    # What a journal must agree on to be continued. The rendered prompts stand for instruction,
    # demonstrations and chat template.
    prompts = [writer.prompt(tasks[0].question, kind) for kind in writer.kinds]
    if judge := find_judge(config):
        prompts += [ask("Which?", ("This.", "That.")) for ask in judge.asks]
    asked = [[task.question.to_row(), task.incorrect] for task in tasks]
    # Another address is the same server.
    settings = [own_settings(replace(config, server_url=None)), iteration, seed, size]
    identity = fingerprint([VERSION, policy.fingerprint, *settings, prompts, asked])
    journal = Journal.beside(out if processes.is_main() else None, identity)
    done = processes.on_main(lambda: journal.read([len(chunk) for chunk in chunks], WRITTEN))
    resumed = sum(map(len, done.values()))
    todo = [number for number in range(len(chunks)) if number not in done]

    def write(number: int) -> list[dict[str, Any]]:
        chunk = [tasks[i] for i in chunks[number]]
        found = writer.write(chunk)
        if judge and writer.kinds:  # a mode that has nothing written asks the judge itself
            found = judged(judge, writer, chunk, found)
        return list(map(asdict, found))

    hidden = not (progress and processes.is_main())
    bar = tqdm(total=len(order), initial=resumed, desc="pairs", unit="question", disable=hidden)
    with bar:
        for number, rows in processes.in_turns(todo, write):
            journal.append(number, rows)
            done[number] = rows
            bar.update(len(rows))

    written = [WrittenPair(rejected=(Rejected("", "", Reason.TOO_LONG),))] * len(tasks)
    for number, chunk in enumerate(chunks):
        for i, row in zip(chunk, done[number], strict=True):
            written[i] = WrittenPair.from_row(row)
    pairs, rejected = [], []
    for task, new in zip(tasks, written, strict=True):
        name, text = task.question.id, task.question.text
        rejected += [_rejects_row(task.question, iteration, each) for each in new.rejected]
        if new.correct is not None:
            opinions = {key: getattr(new, key) for key in OPINIONS}
            pairs.append(Pair(name, text, new.correct, new.incorrect, iteration, **opinions))
        elif name in old:
            pairs.append(old[name])
    kept = sum(pair is old.get(pair.id) for pair in pairs)
    swapped = sum(pair.iteration == iteration and bool(pair.swapped) for pair in pairs)
    own, pairs = pairs, relabelled(pairs, config.labels, config.flipped, seed)
    labelled = {pair.id for pair in pairs}
    for pair in own:
        if pair.id not in labelled:
            dropped = f"{pair.correct}\n{pair.incorrect}"
            lost = Rejected("labels", dropped, Reason.NO_SEALED_ANSWER)
            rejected.append(_rejects_row(pair, iteration, lost))
    counts = dict(Counter(row["reason"] for row in rejected).most_common())
    if not pairs:
        advice = "this model does not follow the prompt; try more questions or a stronger model"
        if Reason.NO_SEALED_ANSWER in counts:
            advice = "pairs.labels=annotated is for questions.source=own"
        elif not writer.kinds:
            advice = "look at the options that the source gives"
        elif Reason.TOO_LONG in list(counts)[:1]:  # of all reasons the most frequent
            advice = "their prompts do not fit into the model's context; shorten the questions, "
            advice += "use fewer pairs.shots, or a model with a longer context"
        elif Reason.UNDECIDED in list(counts)[:1]:
            advice = "the judge can hardly tell them apart; try a stronger model or no pairs.judge"
        elif config.mode != "default":
            advice = advice.replace("try", "try pairs.mode=default,")
        raise RunError(
            f"none of {len(tasks)} questions got a usable pair ({_listed(counts)}): {advice}"
        )
    processes.on_main(lambda: write_jsonl(rejects, rejected))
    # The pairs last: they are what says that the work is done.
    processes.on_main(lambda: write_jsonl(out, [pair.to_row() for pair in pairs]))
    journal.remove()
    return PairReport(
        questions=len(tasks),
        pairs=len(pairs),
        kept=kept,
        swapped=swapped,
        rejected=counts,
        completions=sum(each.completions for each in written),
        seconds=round(time.perf_counter() - started, 2),
        resumed=resumed,
    )


def _rejects_row(asked: Question | Pair, iteration: int, rejected: Rejected) -> dict[str, Any]:
    row = {"id": asked.id, "question": asked.text, "iteration": iteration}
    row |= {"prompt": rejected.prompt, "reason": str(rejected.reason)}
    said = {} if rejected.truth is None else {"truth": rejected.truth}
    return {**row, "completion": rejected.completion, **said}


def _check_questions(
    questions: Sequence[Question], old: Mapping[str, Pair], config: PairsConfig, mode: PairMode
) -> None:
    """Refuse questions that cannot be told apart, or lack what is asked of them."""
    if not questions:
        raise DataError("there are no questions to write pairs for")
    counts = Counter(question.id for question in questions)
    name, count = counts.most_common(1)[0]
    if count > 1:
        raise DataError(f'{count} questions have the id "{name}"')
    if strangers := sorted(old.keys() - counts):
        raise DataError(f"{len(strangers)} previous pairs have no question, first: {strangers[0]}")
    need = config.annotated and "annotated=true"
    if config.ground_truth:
        need = "ground_truth=true"
    if mode.needs_candidates:
        need = f"mode={config.mode}"
    for question in questions:
        lacks = ""
        if need and len(question.candidates) < 2:
            lacks = "questions with candidates, such as questions.source=arc_challenge, and this "
            lacks += f"one has {len(question.candidates) or 'none'}"
        elif (config.ground_truth or mode.needs_gold) and question.gold is None:
            lacks = "to know which candidate is right, and the source does not say"
        elif config.ground_truth and not question.wrong_candidates:
            lacks = f'a wrong answer to show, and all candidates are "{question.candidates[0]}"'
        if lacks:
            raise DataError(f"{question.where or question.id}: pairs.{need} needs {lacks}")


def _fitting(tasks: Sequence[Task], writer: Writer, skip_long: bool) -> list[int]:
    """Return the tasks that fit into the model's context, longest prompt first.

    Prompts of like length together: what is computed at once then has little padding.
    """
    room = writer.policy.max_length - writer.config.max_new_tokens
    lengths = [writer.prompt_tokens(task.question) for task in tasks]
    for task, length in zip(tasks, lengths, strict=True):
        if length > room and not skip_long:
            raise DataError(
                f'{task.question.where or "question"} ("{task.question.id}"): its prompt has '
                f"{length} tokens and the context of {writer.policy.name} leaves room for {room}; "
                "shorten it, use fewer pairs.shots, or set questions.skip_bad=true"
            )
    fitting = [i for i, length in enumerate(lengths) if length <= room]
    return sorted(fitting, key=lambda i: (-lengths[i], i))
