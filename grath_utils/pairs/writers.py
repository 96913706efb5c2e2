"""What all ways of writing pairs share: a task, what becomes of it, a writer, and a mode's row.

A way of writing is a module beside this one with a :class:`Writer` and its row, a
:class:`PairMode`; :mod:`.modes` lists the rows. Listing them loads no torch: ``engine`` loads it
with the first of its names that is used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from grath_utils import engine
from grath_utils.config import PairsConfig
from grath_utils.errors import UsageError
from grath_utils.pairs.parsing import Parsed, Reason, pair_is_complete, parse_pair
from grath_utils.pairs.prompts import (
    Demonstration,
    Message,
    answer_messages,
    own_demonstrations,
    pair_messages,
    render_chat,
    restated,
    token_ids,
)
from grath_utils.pairs.questions import Question

if TYPE_CHECKING:
    from grath_utils.engine.generation import Completion, Prefix
    from grath_utils.engine.models import Policy

MAX_ANSWER_TOKENS = 48
"""Longest single answer; one that has not ended by then is no short sentence."""

TOP_P = 0.95  # of sampled candidates

GRATH = "GRATH (gradual self-truthifying, [arXiv 2401.12292](https://arxiv.org/abs/2401.12292))"
WRITTEN = "written by the model"
SELF_MADE = (
    f"Trained by {GRATH}: the model wrote correct and incorrect answers to questions itself, and "
    "was trained by DPO to prefer the correct ones. Nobody checked these answers."
)


@dataclass(frozen=True)
class Task:
    """A question to write a pair for."""

    question: Question
    incorrect: str | None = None
    """Refinement: the incorrect answer of iteration 0, which stays."""


@dataclass(frozen=True)
class Rejected:
    """A completion that was not used, and why."""

    prompt: str
    """The kind of prompt that it answers, or ``options`` or the mode where nothing was asked."""
    completion: str
    reason: Reason


@dataclass(frozen=True)
class WrittenPair:
    """What became of a task: a pair, or none."""

    correct: str | None = None
    incorrect: str | None = None
    rejected: tuple[Rejected, ...] = ()
    contrast: float | None = None
    """How far apart the model itself places the two answers."""
    completions: int = 0
    tokens: int = 0
    """Tokens generated."""

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> WrittenPair:
        """Read what :func:`dataclasses.asdict` made of one."""
        return cls(**{**row, "rejected": tuple(Rejected(**each) for each in row["rejected"])})


class Writer:
    """Writes pairs chunk by chunk, deterministically: the same chunk gives the same pairs."""

    kinds: tuple[str, ...] = ()
    """The kinds of prompt that it asks: ``pair``, ``correct``, ``incorrect``."""
    primer: tuple[Demonstration, ...] = ()
    """Demonstrations to show in place of the project's own."""
    chunk_batches = 1
    """A chunk, in batches."""

    def __init__(self, policy: Policy, config: PairsConfig, seed: int):
        self.policy = policy
        self.config = config
        self.seed = seed
        self.filters = frozenset(config.filters) - {"none"}
        self.shots = {kind: self.demonstrations(kind, config.shots) for kind in self.kinds}
        self.prefixes: dict[str, Prefix] = {}

    def write(self, tasks: Sequence[Task]) -> list[WrittenPair]:
        """Return what becomes of each task of a chunk."""
        raise NotImplementedError

    def close(self) -> None:
        """Free what the writing alone needed."""
        self.prefixes.clear()

    @classmethod
    def demonstrations(cls, kind: str, shots: int) -> tuple[Demonstration, ...]:
        """Return the first ``shots`` demonstrations for a kind of prompt."""
        available = cls.primer or own_demonstrations("pair" if kind == "pair" else "single")
        if shots > len(available):
            raise UsageError(f"{shots} demonstrations were asked for; there are {len(available)}")
        return available[:shots]

    def shown_answers(self, kind: str) -> list[str]:
        """Return the answers of the demonstrations: a copy of one is no answer."""
        return [answer for shot in self.shots[kind] for answer in (shot.correct, shot.incorrect)]

    def messages(self, question: Question, kind: str) -> list[Message]:
        """Return the chat of one question for one kind of prompt."""
        shown = question.candidates if self.config.annotated else ()
        if kind == "pair":
            return pair_messages(question.text, self.shots[kind], candidates=shown)
        return answer_messages(question.text, self.shots[kind], kind, candidates=shown)

    def prompt(self, question: Question, kind: str) -> str:
        """Return the prompt as text."""
        return render_chat(self.policy.tokenizer, self.messages(question, kind))

    def prompt_tokens(self, question: Question) -> int:
        """Return the length of the longest prompt of a question, in tokens."""
        prompts = (self.prompt(question, kind) for kind in self.kinds)
        return max((len(token_ids(self.policy.tokenizer, text)) for text in prompts), default=0)

    def prefix(self, kind: str) -> Prefix:
        """Return the beginning that all prompts of a kind share, computed on first use."""
        if kind not in self.prefixes:
            # Questions without a common first letter show where the questions begin.
            probes = [Question("probe", text, ("x", "y")) for text in ("Why so?", "How?", "a", "1")]
            prompts = [self.prompt(probe, kind) for probe in probes]
            self.prefixes[kind] = engine.shared_beginning(self.policy, prompts)
        return self.prefixes[kind]

    def complete(
        self,
        kind: str,
        questions: Sequence[Question],
        *,
        keys: Sequence[str] | None = None,
        temperature: float = 0.0,
    ) -> list[Completion]:
        """Return one completion for each question, greedy unless there is a temperature."""
        if not questions:
            return []
        pair, limit = kind == "pair", self.config.max_new_tokens
        stop = engine.Stop(pair_is_complete, "\n") if pair else engine.Stop.at("\n")
        prompts = [token_ids(self.policy.tokenizer, self.prompt(q, kind)) for q in questions]
        prefix = self.prefix(kind)
        # A tokenizer may merge a question's odd first letter into what stands before it.
        count = len(prefix.token_ids)
        fits = all(tuple(ids[:count]) == prefix.token_ids and len(ids) > count for ids in prompts)
        return engine.generate(
            self.policy,
            prompts,
            prefix=prefix if fits else None,
            batch_size=self.config.batch_size,
            # As a rule a completion begins by restating the question, as in the demonstrations.
            drafts=[restated(question.text) for question in questions] if pair else None,
            max_new_tokens=limit if pair else min(MAX_ANSWER_TOKENS, limit),
            stop=None if self.config.legacy else stop,
            do_sample=temperature > 0,
            temperature=temperature or 1.0,
            top_p=TOP_P,
            seed=self.seed,
            keys=keys,
        )

    def parse(self, completion: Completion) -> Parsed:
        """Read both answers from a completion of the kind ``pair``."""
        open_end = completion.finished == "length" and not pair_is_complete(completion.text)
        return replace(parse_pair(completion.text), cut_off=open_end)


class Asked(NamedTuple):
    """What one question asks of the model: the cost model multiplies it."""

    pairs: int = 0
    """Completions that hold both answers."""
    answers: int = 0
    """Completions that hold one answer."""
    scored: int = 0
    """Answers whose probability is computed, with the question and without."""


@dataclass(frozen=True)
class PairMode:
    """All that the package knows about one way of writing pairs: a row of :mod:`.modes`."""

    name: str
    summary: str
    """What it does, in the list of options."""
    writer: type[Writer]
    asked: Callable[[PairsConfig, int], Asked]
    """(configuration, iteration) -> what one question asks of the model."""
    answers: str
    """Where the answers come from, on the model card: "written by the model"."""
    card: str
    """What a model trained on them is, on the model card: full sentences."""
    options: frozenset[str] = frozenset()
    """Those of ``legacy``, ``annotated`` and ``self_check`` that it heeds."""
    needs_candidates: bool = False
    """It is for sources with options only, such as ARC."""
    prompt_overlap: str = ""
    """Benchmark text inside its prompts."""
