"""What all ways of writing pairs share: a task, what becomes of it, a writer, and a mode's row.

A way of writing is a module beside this one with a :class:`Writer` and its row, a
:class:`PairMode`; :mod:`.modes` lists the rows. Listing them loads no torch: ``engine`` loads it
with the first of its names that is used.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

from grath_utils import engine
from grath_utils.config import PairsConfig
from grath_utils.errors import UsageError
from grath_utils.pairs import prompts
from grath_utils.pairs.parsing import Parsed, Reason, pair_is_complete, parse_pair
from grath_utils.pairs.preferences import Pair
from grath_utils.pairs.prompt_file import read_wording
from grath_utils.pairs.questions import Question

Either = TypeVar("Either", "WrittenPair", Pair)
MAX_ANSWER_TOKENS = 48  # longest single answer; one that has not ended by then is no short sentence
TOP_P = 0.95  # of sampled candidates

GRATH = "GRATH (gradual self-truthifying, [arXiv 2401.12292](https://arxiv.org/abs/2401.12292))"
SELF_MADE = (
    f"Trained by {GRATH}: the model wrote correct and incorrect answers to questions itself, and "
    "was trained by DPO to prefer the correct ones. Nobody checked these answers."
)


@dataclass(frozen=True)
class Task:
    """A question to write a pair for."""

    question: Question
    incorrect: str | None = None  # refinement: the incorrect answer of iteration 0, which stays

    def judged(self, answers: Iterable[str]) -> list[str]:
        """Return the answers to judge: the given ones, and last the one that stays."""
        return [*answers, *([self.incorrect] if self.incorrect else [])]


@dataclass(frozen=True)
class Rejected:
    """A completion that was not used, and why."""

    prompt: str  # the kind that it answers; `judge`, or `options` or the mode if none was asked
    completion: str
    reason: Reason
    truth: float | None = None  # the judge's, as of a :class:`.Pair`


@dataclass(frozen=True)
class WrittenPair:
    """What became of a task: a pair, or none."""

    correct: str | None = None
    incorrect: str | None = None
    rejected: tuple[Rejected, ...] = ()
    contrast: float | None = None  # how far apart the model itself places the two answers
    truth: float | None = None  # see :class:`.Pair`
    swapped: bool | None = None  # see :class:`.Pair`
    completions: int = 0
    tokens: int = 0  # tokens generated

    @classmethod
    def checked(
        cls, sides: Parsed, reason: Reason | None, prompt: str, completion: str, **cost: int
    ) -> WrittenPair:
        """Return both sides, or if there is a reason against them, what was rejected."""
        if reason is None:
            return cls(sides.correct, sides.incorrect, **cost)
        return cls(rejected=(Rejected(prompt, completion, reason),), **cost)

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> WrittenPair:
        """Read what :func:`dataclasses.asdict` made of one."""
        return cls(**{**row, "rejected": tuple(Rejected(**each) for each in row["rejected"])})


def exchanged(pair: Either) -> Either:
    """Return a pair the other way round, and so what the model thinks of it."""
    return replace(
        pair,
        correct=pair.incorrect,
        incorrect=pair.correct,
        contrast=None if pair.contrast is None else -pair.contrast,
        truth=None if pair.truth is None else round(1 - pair.truth, 4),
    )


@dataclass(frozen=True)
class Wanted:
    """Completions of prompts of one kind."""

    kind: str
    questions: Sequence[Question]
    temperature: float = 0.0  # 0: greedy
    keys: Sequence[str] | None = None  # for each question, what names its stream of random numbers


class Writer:
    """Writes pairs chunk by chunk, deterministically: the same chunk gives the same pairs."""

    kinds: tuple[str, ...] = ()  # of prompt that it asks: `pair`, `correct`, `incorrect`
    primer: tuple[prompts.Demonstration, ...] = ()  # to show in place of the project's own
    chunk_batches = 1  # batches in a chunk

    def __init__(self, policy: engine.Policy, config: PairsConfig, seed: int):
        self.policy, self.config, self.seed = policy, config, seed
        self.filters = frozenset(config.filters) - {"none"}
        self.wording = read_wording(config)
        given = self.wording.demonstrations[: config.shots]
        self.shots = {k: given or self.demonstrations(k, config.shots) for k in self.kinds}
        self.prefixes: dict[str, engine.generation.Prefix] = {}

    def write(self, tasks: Sequence[Task]) -> list[WrittenPair]:
        """Return what becomes of each task of a chunk."""
        raise NotImplementedError

    @classmethod
    def demonstrations(cls, kind: str, shots: int) -> tuple[prompts.Demonstration, ...]:
        """Return the first ``shots`` demonstrations for a kind of prompt."""
        available = cls.primer or prompts.own_demonstrations(kind)
        if shots > len(available):
            raise UsageError(f"{shots} demonstrations were asked for; there are {len(available)}")
        return available[:shots]

    def shown_answers(self, kind: str) -> list[str]:
        """Return the answers of the demonstrations: a copy of one is no answer."""
        return [answer for shot in self.shots[kind] for answer in (shot.correct, shot.incorrect)]

    def prompt(self, question: Question, kind: str) -> str:
        """Return the prompt of one question and kind as text."""
        messages = prompts.answer_messages(
            question.text,
            self.shots[kind],
            kind,
            candidates=question.candidates if self.config.annotated else (),
            truth=self.ground_truth(question) if self.config.ground_truth else (),
            wording=self.wording,
        )
        return prompts.render_chat(self.policy.tokenizer, messages)

    def ground_truth(self, question: Question) -> tuple[str, str]:
        """Return the annotated answer, and a wrong one that the seed draws."""
        right = question.candidates[question.gold]
        wrong = random.Random(f"{self.seed} {question.id}").choice(question.wrong_candidates)
        return right, wrong

    def token_ids(self, question: Question, kind: str) -> list[int]:
        """Return the prompt of one question and kind as token ids."""
        return prompts.token_ids(self.policy.tokenizer, self.prompt(question, kind))

    def prompt_tokens(self, question: Question) -> int:
        """Return the length of the longest prompt of a question, in tokens."""
        return max((len(self.token_ids(question, kind)) for kind in self.kinds), default=0)

    def prefix(self, kind: str) -> engine.generation.Prefix:
        """Return the beginning that all prompts of a kind share, computed on first use."""
        if kind not in self.prefixes:
            # Questions without a common first letter show where the questions begin.
            probes = [
                Question("probe", text, ("x", "y"), 0) for text in ("Why so?", "How?", "a", "1")
            ]
            texts = [self.prompt(probe, kind) for probe in probes]
            self.prefixes[kind] = engine.shared_beginning(self.policy, texts)
        return self.prefixes[kind]

    @cached_property
    def server(self) -> engine.Server | None:
        """The server that writes in the policy's place, if there is one."""
        if self.config.backend != "server":
            return None
        url, model = self.config.server_url, self.config.server_model
        return engine.connect(self.policy, url, model, in_flight=self.config.batch_size)

    @cached_property
    def int8_layers(self) -> Mapping[Any, Any]:
        """What multiplies in 8 bits while something is written."""
        return engine.int8_layers(self.policy) if self.config.backend == "int8" else {}

    def complete(self, kind: str, questions: Sequence[Question]) -> list[engine.Completion]:
        """Return one greedy completion for each question."""
        return self.complete_together([Wanted(kind, questions)])[0]

    def complete_together(self, wanted: Sequence[Wanted]) -> list[list[engine.Completion]]:
        """Return one completion for each question of what is wanted, all from one queue."""
        if self.server:
            served = []
            for each in wanted:
                texts = [self.prompt(question, each.kind) for question in each.questions]
                served.append(self.server.complete(texts, **self._options(each)))
            return served
        orders = list(map(self._order, wanted))
        with engine.multiplied_by(self.int8_layers):
            return engine.generate_together(self.policy, orders, batch_size=self.config.batch_size)

    def _options(self, wanted: Wanted) -> dict[str, Any]:
        """Return how to complete prompts, here or on a server."""
        pair, limit = wanted.kind == "pair", self.config.max_new_tokens
        stop = engine.Stop(pair_is_complete, "\n") if pair else engine.Stop.at("\n")
        return {
            "max_new_tokens": limit if pair else min(MAX_ANSWER_TOKENS, limit),
            "stop": None if self.config.legacy else stop,
            "temperature": wanted.temperature,
            "top_p": TOP_P,
            "seed": self.seed,
            "keys": wanted.keys,
        }

    def _order(self, wanted: Wanted) -> engine.Order:
        """Return what our own engine is given."""
        kind, questions = wanted.kind, wanted.questions
        encoded = {question: self.token_ids(question, kind) for question in set(questions)}
        prefix = self.prefix(kind)
        # A tokenizer may merge a question's odd first letter into what stands before it.
        count = len(prefix.token_ids)
        fits = all(
            tuple(ids[:count]) == prefix.token_ids and len(ids) > count for ids in encoded.values()
        )
        lead = prompts.answer_form(self.policy.tokenizer).lead
        return engine.Order(
            prompts=[encoded[question] for question in questions],
            prefix=prefix if fits else None,
            # As a rule a completion begins by restating the question, as in the demonstrations.
            drafts=[lead + prompts.restated(q.text, self.wording.labels) for q in questions]
            if kind == "pair"
            else None,
            **self._options(wanted),
        )

    def parse(self, completion: engine.Completion) -> Parsed:
        """Read both answers from a completion of the kind ``pair``."""
        open_end = completion.finished == "length" and not pair_is_complete(completion.text)
        return replace(parse_pair(completion.text), cut_off=open_end)


class Asked(NamedTuple):
    """What one question asks of the model: the cost model multiplies it."""

    pairs: int = 0  # completions that hold both answers
    answers: int = 0  # completions that hold one answer
    scored: int = 0
    """Answers whose probability is computed, with the question and without; a judge's prompts."""


@dataclass(frozen=True, kw_only=True)
class PairMode:
    """All that the package knows about one way of writing pairs: a row of :mod:`.modes`."""

    name: str
    summary: str  # what it does, in the list of options
    writer: type[Writer]
    asked: Callable[[PairsConfig, int], Asked] = lambda config, iteration: Asked()
    origin: str  # where the answers come from, on the model card
    card: str  # what a model that is trained on them is: full sentences
    options: tuple[str, ...] = ()  # of modes.SWITCHES those it heeds
    needs_candidates: bool = False  # it is for sources with options only, such as ARC
    needs_gold: bool = False  # and for those that say which of them is right
    prompt_overlap: str = ""  # benchmark text inside its prompts
