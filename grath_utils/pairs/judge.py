"""Judges: the model says which of several answers is true; a row each in :data:`JUDGES`.

What a model writes as the correct answer is often no truer than what it writes as the incorrect
one, and it may tell them apart all the same: a pair is then kept, turned round or dropped.
CONTRIBUTING.md shows how to add a judge.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from string import ascii_uppercase
from typing import TYPE_CHECKING, NamedTuple

from grath_utils import engine
from grath_utils.config import PairsConfig
from grath_utils.errors import ConfigError, DataError, did_you_mean
from grath_utils.pairs.parsing import Reason
from grath_utils.pairs.prompts import bare_answer, training_prompt
from grath_utils.pairs.writers import Rejected, Task, Writer, WrittenPair, exchanged

if TYPE_CHECKING:
    import numpy as np


class Case(NamedTuple):
    """A question with the answers to judge."""

    item: str  # id of the question, for messages
    question: str
    options: Sequence[str]


Ask = Callable[[str, Sequence[str]], str]
"""From a question and its options, in the order in which they are shown, to the user's turn."""


def letters_question(question: str, options: Sequence[str]) -> str:
    """Return what the judge ``letters`` is asked."""
    *names, last = ascii_uppercase[: len(options)]
    listed = "\n".join(map("{}: {}".format, ascii_uppercase, options))
    which = f"{', '.join(names)} or {last}"
    return f"Question: {question}\n{listed}\nWhich answer is true? Reply with {which} only."


def exam_question(question: str, options: Sequence[str]) -> str:
    """Return what the judge ``exam`` is asked: a multiple-choice test, without an instruction."""
    listed = "\n".join(map("{}. {}".format, ascii_uppercase, options))
    return f"{question}\n\n{listed}\n\nAnswer:"


def sceptic_question(question: str, options: Sequence[str]) -> str:
    """Return what the judge ``sceptic`` is asked: popular errors are named as what they are."""
    count = "two" if len(options) == 2 else len(options)
    warning = (
        f"One of the {count} answers is a common misconception or a mistake. Which answer would an "
        "expert who has checked the facts give?"
    )
    listed, _, how = letters_question(question, options).rpartition("Which answer is true?")
    return f"{listed}{warning}{how}"


def by_letters(ask: Ask, policy: engine.Policy, cases: Sequence[Case]) -> list[np.ndarray]:
    """Return the probability of each case's options, by the letter that the model would reply.

    Models prefer a letter whatever stands behind it. So the options are shown in every rotation
    (two of them: in both orders), and the probability of an option is the mean over these of that
    of its letter, among the letters that are shown: (options,) for each case, with the sum 1.

    Raises:
        DataError: a case has more options than there are letters.
    """
    import numpy as np

    tokenizer, requests = policy.tokenizer, []
    for item, question, options in cases:
        if len(options) > len(ascii_uppercase):
            raise DataError(f"{item}: {len(options)} answers are more than there are letters")
        for shift in range(len(options)):
            shown = [*options[shift:], *options[:shift]]
            prompt = training_prompt(tokenizer, ask(question, shown))
            requests += [
                engine.Request(prompt, bare_answer(tokenizer, letter), item)
                for letter in ascii_uppercase[: len(options)]
            ]
    scores = iter(engine.score_completions(policy, requests))
    found = []
    for case in cases:
        n = len(case.options)
        logprobs = np.array([[next(scores).logprob for _ in range(n)] for _ in range(n)])
        found.append(mean_of_orders(logprobs))
    return found


def mean_of_orders(logprobs: np.ndarray) -> np.ndarray:
    """Return the probability of each option, from log-probabilities of (rotations, letters)."""
    import numpy as np

    shares = np.exp(logprobs - logprobs.max(axis=1, keepdims=True))
    shares /= shares.sum(axis=1, keepdims=True)
    # The letter in place p of rotation r stands for option p + r.
    return np.mean([np.roll(row, shift) for shift, row in enumerate(shares)], axis=0)


@dataclass(frozen=True, kw_only=True)
class Judge:
    """All that the package knows about one way of judging: a row of :data:`JUDGES`."""

    name: str
    summary: str  # what it does, in the list of options
    asks: tuple[Ask, ...]  # what it is asked, in one form or several
    by: Callable[[Ask, engine.Policy, Sequence[Case]], list[np.ndarray]] = by_letters

    @property
    def scored(self) -> int:
        """Prompts that are scored for one pair, see :class:`.Asked`."""
        return 2 * len(self.asks)

    def weigh(self, policy: engine.Policy, cases: Sequence[Case]) -> list[np.ndarray]:
        """Return the probability of each option that it is the true one: the mean of the forms."""
        forms = [self.by(ask, policy, cases) for ask in self.asks]
        return [sum(shares) / len(forms) for shares in zip(*forms, strict=True)]


_ROWS = (
    Judge(
        name="letters",
        summary="the model replies with the letter of the true one; every order, averaged",
        asks=(letters_question,),
    ),
    Judge(name="exam", summary="the same, put as a multiple-choice test", asks=(exam_question,)),
    Judge(
        name="both",
        summary="the mean of `letters` and `exam`, which err in different places",
        asks=(letters_question, exam_question),
    ),
    Judge(
        name="sceptic",
        summary="as `letters`, told that a popular belief is among the answers",
        asks=(sceptic_question,),
    ),
)
JUDGES: dict[str, Judge] = {judge.name: judge for judge in _ROWS}


def find_judge(config: PairsConfig) -> Judge | None:
    """Return the row of the configured judge, None if there is to be none.

    Raises:
        ConfigError: an unknown name, or thresholds that exclude each other.
    """
    if config.judge == "none":
        return None
    if config.judge not in JUDGES:
        near = did_you_mean(config.judge, ["none", *JUDGES])
        raise ConfigError(f'"pairs.judge" cannot be "{config.judge}"{near}')
    if config.judge_swap > config.judge_keep:
        raise ConfigError(
            f'"pairs.judge_swap" ({config.judge_swap}) is above "pairs.judge_keep" '
            f"({config.judge_keep}): a pair cannot be both kept and exchanged"
        )
    return JUDGES[config.judge]


def prompts_a_pair(config: PairsConfig) -> int:
    """Return how many prompts the configured judge scores for one pair."""
    judge = find_judge(config)
    return judge.scored if judge else 0


def judged(
    judge: Judge, writer: Writer, tasks: Sequence[Task], written: Sequence[WrittenPair]
) -> list[WrittenPair]:
    """Return what a judge leaves of the pairs that were written to some tasks."""
    cases = [
        Case(task.question.id, task.question.text, (pair.correct, pair.incorrect))
        for task, pair in zip(tasks, written, strict=True)
        if pair.correct is not None
    ]
    truths = iter(judge.weigh(writer.policy, cases))
    return [
        pair if pair.correct is None else verdict(task, pair, float(next(truths)[0]), writer.config)
        for task, pair in zip(tasks, written, strict=True)
    ]


def verdict(task: Task, pair: WrittenPair, truth: float, config: PairsConfig) -> WrittenPair:
    """Return a pair as it was written, the other way round, or as rejected.

    ``truth`` is the probability that its correct answer is the true one of the two. In refinement
    the incorrect answer stays what it is, so that nothing can be exchanged.
    """
    if truth >= config.judge_keep:
        return replace(pair, truth=round(truth, 4), swapped=False)
    if truth > config.judge_swap:
        reason = Reason.UNDECIDED
    elif task.incorrect is not None:
        reason = Reason.JUDGED_FALSE
    else:
        return replace(exchanged(replace(pair, truth=round(truth, 4))), swapped=True)
    both = f"{pair.correct}\n{pair.incorrect}"
    dropped = Rejected("judge", both, reason, round(truth, 4))
    nothing = {"correct": None, "incorrect": None, "contrast": None}
    return replace(pair, **nothing, rejected=(*pair.rejected, dropped))
