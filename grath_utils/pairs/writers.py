"""Two ways in which the policy writes a pair, one completion for both answers or many for each.

:class:`SingleCompletionWriter` is the paper's: one greedy completion holds both answers.
:class:`ContrastWriter` goes beyond it, for weak models: candidates for the true and for the false
answer are asked for separately and as a pair, and the model itself says which two stand furthest
apart. Neither sees a gold answer (but for the *GT* ablation, which shows the candidates).

Controls stand beside them, for sources with options: :class:`PickingWriter` has the model judge and
not write; :class:`GoldWriter` and :class:`RandomWriter` ask the model nothing and take what the
source knows, an upper bound for what better pairs could do, or draw lots, a placebo.

All take tasks chunk by chunk and are deterministic: the same chunk gives the same outcomes.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import permutations
from typing import TYPE_CHECKING

import numpy as np

from grath_utils.config import PROMPT_FORMATS, UNASKED_MODES, PairsConfig
from grath_utils.engine.encoding import Request
from grath_utils.engine.generation import Completion, Prefix, Stop, generate, shared_beginning
from grath_utils.engine.scoring import score_completions
from grath_utils.errors import ConfigError, DataError, did_you_mean
from grath_utils.pairs.parsing import (
    FILTERS,
    Parsed,
    Reason,
    check_answer,
    check_pair,
    clean,
    pair_is_complete,
    parse_legacy,
    parse_pair,
)
from grath_utils.pairs.prompts import (
    NEUTRAL_QUESTION,
    Message,
    answer_messages,
    demonstrations,
    pair_messages,
    render_chat,
    restated,
    token_ids,
    training_completion,
    training_prompt,
)
from grath_utils.pairs.questions import Question
from grath_utils.pairs.words import length_ratio, negated, ngram_f1, split_words

if TYPE_CHECKING:
    from grath_utils.engine.models import Policy

KINDS = ("pair", "correct", "incorrect")

ANSWER_TOKENS = 48
"""Longest single answer; one that has not ended by then is no short sentence."""

TOP_P = 0.95  # of sampled candidates

# A pair is there to differ in truth. Where the two sides also differ in length or in a negation,
# that is what DPO learns first, so `default` mode pairs only candidates that are alike in both.
BALANCED_LENGTH_RATIO = 1.5


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
    """Which prompt it answers: ``pair``, ``correct``, ``incorrect``; without one: ``options``,
    ``gold``, ``random``."""
    completion: str
    reason: Reason


@dataclass(frozen=True)
class Outcome:
    """What became of a task: a pair, or none."""

    correct: str | None
    incorrect: str | None
    rejected: tuple[Rejected, ...] = ()
    contrast: float | None = None
    """How far apart the model itself places the two answers (mode ``default``)."""
    completions: int = 0
    tokens: int = 0
    """Tokens generated."""


def _active_filters(config: PairsConfig) -> frozenset[str]:
    return frozenset(config.filters) if config.filters != ("none",) else frozenset()


class _Writer:
    """What both ways share: prompts, their common beginning, and the length check."""

    kinds: tuple[str, ...] = ("pair",)

    def __init__(self, policy: Policy, config: PairsConfig, seed: int):
        self.policy = policy
        self.config = config
        self.seed = seed
        self.filters = _active_filters(config)
        self.prefixes: dict[str, Prefix] = {}
        single = "pair" if config.mode == "paper" else "single"
        self.shots = {
            kind: demonstrations(config.mode, "pair" if kind == "pair" else single, config.shots)
            for kind in self.kinds
        }

    def close(self) -> None:
        """Free what the writing alone needed."""
        self.prefixes.clear()

    def messages(self, question: Question, kind: str) -> list[Message]:
        """Return the chat of one question for one kind of prompt."""
        if self.config.annotated and not question.candidates:
            raise DataError(
                f"{question.where or question.id}: pairs.annotated=true needs questions with "
                "candidates, and this one has none"
            )
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
        return max(len(token_ids(self.policy.tokenizer, prompt)) for prompt in prompts)

    def prefix(self, kind: str) -> Prefix:
        """Return the beginning that all prompts of a kind share, computed on first use."""
        if kind not in self.prefixes:
            # Questions without a common first letter show where the questions begin.
            probes = [Question("probe", text, ("x", "y")) for text in ("Why so?", "How?", "a", "1")]
            prompts = [self.prompt(probe, kind) for probe in probes]
            self.prefixes[kind] = shared_beginning(self.policy, prompts)
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
        pair = kind == "pair"
        stop = Stop(pair_is_complete, "\n") if pair else Stop.at("\n")
        limit = self.config.max_new_tokens
        prompts = [token_ids(self.policy.tokenizer, self.prompt(q, kind)) for q in questions]
        prefix = self.prefix(kind)
        # A tokenizer may merge a question's odd first letter into what stands before it.
        count = len(prefix.token_ids)
        fits = all(tuple(ids[:count]) == prefix.token_ids and len(ids) > count for ids in prompts)
        return generate(
            self.policy,
            prompts,
            prefix=prefix if fits else None,
            batch_size=self.config.batch_size,
            # As a rule a completion begins by restating the question, as in the demonstrations.
            drafts=[restated(question.text) for question in questions] if pair else None,
            max_new_tokens=limit if pair else min(ANSWER_TOKENS, limit),
            stop=None if self.config.legacy else stop,
            do_sample=temperature > 0,
            temperature=temperature or 1.0,
            top_p=TOP_P,
            seed=self.seed,
            keys=keys,
        )

    def shown_answers(self, kind: str) -> list[str]:
        return [a for shot in self.shots[kind] for a in (shot.correct, shot.incorrect)]

    def parse(self, completion: Completion) -> Parsed:
        """Read both fields of a completion."""
        if self.config.legacy:
            return parse_legacy(completion.text)
        parsed = parse_pair(completion.text)
        open_end = completion.finished == "length" and not pair_is_complete(completion.text)
        return Parsed(parsed.correct, parsed.incorrect, parsed.question, open_end)


class SingleCompletionWriter(_Writer):
    """One greedy completion for both answers."""

    def write(self, tasks: Sequence[Task]) -> list[Outcome]:
        """Return the outcome of each task."""
        completions = self.complete("pair", [task.question for task in tasks])
        parsed = [self.parse(completion) for completion in completions]
        reasons = [self._check(task, p) for task, p in zip(tasks, parsed, strict=True)]
        if self.config.self_check and not self.config.legacy:
            self._check_self(tasks, parsed, reasons)
        return [
            self._outcome(*row) for row in zip(tasks, completions, parsed, reasons, strict=True)
        ]

    def _check(self, task: Task, parsed: Parsed) -> Reason | None:
        if self.config.legacy:
            return parsed.reason
        if task.incorrect is not None and parsed.correct is not None:
            # Only the correct answer is taken, so the new incorrect one may be what it likes.
            cut = parsed.cut_off and parsed.incorrect is None
            parsed = Parsed(parsed.correct, task.incorrect, parsed.question, cut)
        shown = self.shown_answers("pair")
        return check_pair(task.question.text, parsed, filters=self.filters, shown_answers=shown)

    def _check_self(
        self, tasks: Sequence[Task], parsed: Sequence[Parsed], reasons: list[Reason | None]
    ) -> None:
        """Reject the pairs whose incorrect answer the model itself finds more probable."""
        passed = [i for i, reason in enumerate(reasons) if reason is None]
        tokenizer = self.policy.tokenizer
        requests = [
            Request(
                training_prompt(tokenizer, tasks[i].question),
                training_completion(tokenizer, side or ""),
                tasks[i].question.id,
            )
            for i in passed
            for side in (parsed[i].correct, tasks[i].incorrect or parsed[i].incorrect)
        ]
        scores = iter(score_completions(self.policy, requests) if requests else ())
        for i in passed:
            right, wrong = next(scores), next(scores)
            # By the token, as the two differ in length.
            if right.logprob / right.tokens <= wrong.logprob / wrong.tokens:
                reasons[i] = Reason.SELF_CHECK

    def _outcome(
        self, task: Task, completion: Completion, parsed: Parsed, reason: Reason | None
    ) -> Outcome:
        cost = {"completions": 1, "tokens": len(completion.token_ids)}
        if reason is not None:
            return Outcome(None, None, (Rejected("pair", completion.text, reason),), **cost)
        return Outcome(parsed.correct, task.incorrect or parsed.incorrect, **cost)


# --- many candidates, and the clearest contrast --------------------------------------------------


@dataclass(frozen=True)
class Candidate:
    """An answer that the model wrote to a question, under whichever prompt."""

    text: str
    references: int
    """How many of the completions to the prompt for the *correct* answer say the same."""


class ContrastWriter(_Writer):
    """Several candidates for each answer; of them, the pair with the clearest contrast.

    A candidate's credit is the mean of two standardised scores, both the model's own:

    * agreement: mean similarity with the other completions to the prompt for the correct answer.
      What a model knows it says again and again; what it invents differs each time
      (self-consistency, arXiv 2203.11171; as a choice: minimum Bayes risk decoding).
    * gain: how much the question raises the answer's log-probability a token, against no question
      (pointwise mutual information). It keeps answers from winning by being short or common.

    The chosen pair has the largest difference in credit among those that pass the filters and are
    alike in length and negation.
    """

    kinds = KINDS
    balances = True
    """Pair only answers that are alike in length and negation."""

    def write(self, tasks: Sequence[Task]) -> list[Outcome]:
        """Return the outcome of each task."""
        found: list[list[tuple[str, Completion]]] = [[] for _ in tasks]
        for kind in KINDS:
            wanted = [
                i for i, task in enumerate(tasks) if kind != "incorrect" or not task.incorrect
            ]
            for i, completion in self._candidates(kind, tasks, wanted):
                found[i].append((kind, completion))
        pools, rejected = [], []
        for task, written in zip(tasks, found, strict=True):
            pool, rejects = self._pool(task, written)
            pools.append(pool)
            rejected.append(rejects)
        credits = self._credits(tasks, pools)
        outcomes = []
        for task, written, pool, rejects, credit in zip(
            tasks, found, pools, rejected, credits, strict=True
        ):
            outcomes.append(self._choose(task, written, pool, rejects, credit))
        return outcomes

    def _candidates(
        self, kind: str, tasks: Sequence[Task], wanted: Sequence[int]
    ) -> Iterable[tuple[int, Completion]]:
        """Yield (task number, completion): greedy first, then the sampled ones."""
        questions = [tasks[i].question for i in wanted]
        yield from zip(wanted, self.complete(kind, questions), strict=True)
        if kind == "pair":
            return
        draws = range(1, self.config.candidates)
        again = [i for i in wanted for _ in draws]
        keys = [f"{kind} {tasks[i].question.id} {draw}" for i in wanted for draw in draws]
        yield from zip(
            again,
            self.complete(
                kind,
                [tasks[i].question for i in again],
                keys=keys,
                temperature=self.config.temperature,
            ),
            strict=True,
        )

    def _pool(
        self, task: Task, written: Sequence[tuple[str, Completion]]
    ) -> tuple[list[Candidate], list[Rejected]]:
        """Return the distinct usable candidates, and the completions that are of no use."""
        texts: dict[str, str] = {}
        references: dict[str, int] = {}
        rejected = []
        for kind, completion in written:
            answers, reason = self._answers(completion, kind)
            for answer in answers:
                why = self._check_one(task.question, answer, kind, completion)
                if why is not None:
                    reason = why
                    continue
                key = " ".join(split_words(answer))
                texts.setdefault(key, answer)
                references[key] = references.get(key, 0) + (kind == "correct")
            if reason is not None:
                rejected.append(Rejected(kind, completion.text, reason))
        pool = [Candidate(text, references[key]) for key, text in texts.items()]
        return pool, rejected

    def _answers(self, completion: Completion, kind: str) -> tuple[list[str], Reason | None]:
        """Return the answers in a completion; of a pair with equal sides the first only."""
        if kind != "pair":
            lines = [line for line in completion.text.split("\n") if line.strip()]
            return [clean(lines[0]) if lines else ""], None
        parsed = self.parse(completion)
        sides = [side for side in (parsed.correct, parsed.incorrect) if side is not None]
        reason = parsed.reason or (Reason.CUT_OFF if parsed.cut_off else None)
        if reason is None and split_words(sides[0]) == split_words(sides[1]):
            return sides[:1], Reason.EQUAL
        # A side that was cut off is the last one.
        return (sides[:-1] if parsed.cut_off else sides), reason

    def _check_one(
        self, question: Question, answer: str, kind: str, completion: Completion
    ) -> Reason | None:
        cut = kind != "pair" and completion.finished == "length"
        return check_answer(
            question.text,
            answer,
            cut_off=cut,
            filters=self.filters,
            shown_answers=self.shown_answers(kind),
        )

    def _credits(
        self, tasks: Sequence[Task], pools: Sequence[Sequence[Candidate]]
    ) -> list[np.ndarray]:
        """Return the credit of each candidate; in refinement the last is the incorrect answer's."""
        neutral = self._render_correct(NEUTRAL_QUESTION)
        texts = _judged(tasks, pools)
        end = self.policy.tokenizer.eos_token or ""
        requests = [
            Request(prompt, answer + end, task.question.id)
            for task, answers in zip(tasks, texts, strict=True)
            for answer in answers
            for prompt in (self._render_correct(task.question.text), neutral)
        ]
        scores = iter(score_completions(self.policy, requests))
        credits = []
        for pool, answers in zip(pools, texts, strict=True):
            gains = []
            for _ in answers:
                asked, unasked = next(scores), next(scores)
                gains.append(asked.logprob / asked.tokens - unasked.logprob / unasked.tokens)
            credits.append(_standardized(gains) + _standardized(agreement(pool, answers)))
        return [credit / 2 for credit in credits]

    def _render_correct(self, question: str) -> str:
        messages = answer_messages(question, self.shots["correct"], "correct")
        return render_chat(self.policy.tokenizer, messages)

    def _choose(
        self,
        task: Task,
        written: Sequence[tuple[str, Completion]],
        pool: Sequence[Candidate],
        rejected: list[Rejected],
        credit: np.ndarray,
    ) -> Outcome:
        cost = {
            "completions": len(written),
            "tokens": sum(len(completion.token_ids) for _, completion in written),
        }
        texts = [candidate.text for candidate in pool]
        if task.incorrect is None:
            options = list(permutations(range(len(texts)), 2))
        else:
            texts.append(task.incorrect)
            options = [(i, len(texts) - 1) for i in range(len(pool))]
        # Best first; a tie goes to the candidate that was written first.
        options.sort(key=lambda pair: (credit[pair[1]] - credit[pair[0]], pair))
        reason: Reason | None = None
        for right, wrong in options:
            contrast = float(credit[right] - credit[wrong])
            if contrast <= 0:
                reason = reason or Reason.SELF_CHECK
                break
            parsed = Parsed(texts[right], texts[wrong])
            why = check_pair(task.question.text, parsed, filters=self.filters)
            if why is None and self.balances and not balanced(texts[right], texts[wrong]):
                why = Reason.LENGTH_RATIO
            if why is None:
                return Outcome(
                    texts[right], texts[wrong], tuple(rejected), round(contrast, 4), **cost
                )
            reason = reason or why
        # No two candidates make a pair: say why for the first completion, which stands for all.
        kind, completion = written[0]
        known = {(reject.prompt, reject.completion) for reject in rejected}
        if (kind, completion.text) not in known:
            rejected.append(Rejected(kind, completion.text, reason or Reason.EQUAL))
        return Outcome(None, None, tuple(rejected), **cost)


def _judged(tasks: Sequence[Task], pools: Sequence[Sequence[Candidate]]) -> list[list[str]]:
    """Return the answers that get a credit; in refinement the incorrect one stays, and is last."""
    return [
        [candidate.text for candidate in pool] + ([task.incorrect] if task.incorrect else [])
        for task, pool in zip(tasks, pools, strict=True)
    ]


def balanced(a: str, b: str) -> bool:
    """Tell whether two answers are of like length, and both or neither hold a negation."""
    return length_ratio(a, b) <= BALANCED_LENGTH_RATIO and negated(a) == negated(b)


def agreement(pool: Sequence[Candidate], answers: Sequence[str]) -> list[float]:
    """Return each answer's mean similarity with the completions that meant to be correct.

    A completion does not vouch for itself: of those that say just the same, one is left out.
    """
    result = []
    for answer in answers:
        total = count = 0.0
        for other in pool:
            weight = other.references - (other.text == answer and other.references > 0)
            if weight:
                total += weight * ngram_f1(answer, other.text)
                count += weight
        result.append(total / count if count else 0.0)
    return result


def _standardized(values: Sequence[float]) -> np.ndarray:
    """Return values with mean 0 and standard deviation 1 (all 0 where they do not differ)."""
    array = np.asarray(values, dtype=np.float64)
    if not array.size:
        return array
    return (array - array.mean()) / (array.std() or 1.0)


# --- between the two: the model judges, and the source has written -------------------------------


class PickingWriter(ContrastWriter):
    """The model picks both answers from the source's options, without being told which is right.

    It separates *judging* from *writing*: a model too weak to write a true answer may still find
    one. An option's credit is how much the question raises its log-probability (PMI, see
    :class:`ContrastWriter`), summed, as training and tests sum, and standardised over the options;
    the mean over the two forms in which training prompts come. Nothing is shown beside the
    question. Later rounds pick the correct answer anew, by the trained model's judgement.
    """

    kinds = ()
    balances = False  # options are few, and people have made them alike

    def prompt_tokens(self, question: Question) -> int:
        """Return the length of the longest prompt of a question, in tokens."""
        tokenizer = self.policy.tokenizer
        prompts = (training_prompt(tokenizer, question, form) for form in PROMPT_FORMATS)
        return max(len(token_ids(tokenizer, prompt)) for prompt in prompts)

    def write(self, tasks: Sequence[Task]) -> list[Outcome]:
        """Return the outcome of each task.

        Raises:
            DataError: a question without candidates.
        """
        options = [_options(task.question, "pick") for task in tasks]
        # The first round's incorrect answer is one of the options: it is judged only once.
        pools = [
            [Candidate(text, 0) for text in texts if text != task.incorrect]
            for texts, task in zip(options, tasks, strict=True)
        ]
        credits = self._credits(tasks, pools)
        return [self._pick(*row) for row in zip(tasks, pools, credits, strict=True)]

    def _credits(
        self, tasks: Sequence[Task], pools: Sequence[Sequence[Candidate]]
    ) -> list[np.ndarray]:
        tokenizer = self.policy.tokenizer
        texts = _judged(tasks, pools)
        neutral = {
            form: training_prompt(tokenizer, NEUTRAL_QUESTION, form) for form in PROMPT_FORMATS
        }
        requests = []
        for task, answers in zip(tasks, texts, strict=True):
            for form in PROMPT_FORMATS:
                prompts = (training_prompt(tokenizer, task.question, form), neutral[form])
                requests += [
                    Request(prompt, training_completion(tokenizer, answer, form), task.question.id)
                    for answer in answers
                    for prompt in prompts
                ]
        scores = iter(score_completions(self.policy, requests))

        def gains(answers: Sequence[str]) -> np.ndarray:
            return _standardized([next(scores).logprob - next(scores).logprob for _ in answers])

        return [sum(gains(answers) for _ in PROMPT_FORMATS) / 2 for answers in texts]

    def _pick(self, task: Task, pool: list[Candidate], credit: np.ndarray) -> Outcome:
        offered = Completion("\n".join(c.text for c in pool), (), "stop")
        outcome = self._choose(task, [("options", offered)], pool, [], credit)
        return replace(outcome, completions=0, tokens=0)


def _options(question: Question, mode: str) -> tuple[str, ...]:
    """Return a question's candidates.

    Raises:
        DataError: it has none to choose from.
    """
    if len(question.candidates) < 2:
        raise DataError(
            f"{question.where or question.id}: pairs.mode={mode} needs questions with candidates, "
            "such as questions.source=arc_challenge, and this one has none"
        )
    return question.candidates


def _others(options: Sequence[str], taken: str | None) -> list[str]:
    """Return the options that are not ``taken``; where all are the same, all (a filter says so)."""
    return [option for option in options if option != taken] or list(options)


# --- controls: pairs that owe nothing to the model ------------------------------------------------


class _OptionsWriter:
    """What both controls share: the source's options, no question to the model, the same filters.

    Training is the same too, so what differs in the result is which answers it was given.
    """

    kinds: tuple[str, ...] = ()
    mode: str

    def __init__(self, config: PairsConfig, seed: int):
        self.seed = seed
        self.filters = _active_filters(config)

    def close(self) -> None:
        """There is nothing to free."""

    def prompt_tokens(self, question: Question) -> int:
        """Return 0: nothing is asked."""
        return 0

    def write(self, tasks: Sequence[Task]) -> list[Outcome]:
        """Return the outcome of each task.

        Raises:
            DataError: a question without candidates; for ``gold``, one whose right answer is not
                known.
        """
        return [self._write(task) for task in tasks]

    def _write(self, task: Task) -> Outcome:
        question = task.question
        draw = random.Random(f"{self.seed} {question.id}")
        options = _options(question, self.mode)
        right = self._right(question, _others(options, task.incorrect), draw)
        wrong = task.incorrect or draw.choice(_others(options, right))
        reason = check_pair(question.text, Parsed(right, wrong), filters=self.filters)
        if reason is not None:
            return Outcome(None, None, (Rejected(self.mode, f"{right}\n{wrong}", reason),))
        return Outcome(right, wrong)

    def _right(self, question: Question, options: Sequence[str], draw: random.Random) -> str:
        """Return the answer to prefer."""
        raise NotImplementedError


class GoldWriter(_OptionsWriter):
    """The annotated answer against one of the wrong options: no GRATH, but its upper bound.

    Later rounds keep the pairs.
    """

    mode = "gold"

    def _right(self, question: Question, options: Sequence[str], draw: random.Random) -> str:
        if question.gold is None:
            raise DataError(
                f"{question.where or question.id}: pairs.mode=gold needs to know which candidate "
                "is right, and the source does not say"
            )
        return question.candidates[question.gold]


class RandomWriter(_OptionsWriter):
    """Two options by lot, a placebo: what it changes, steps change without any signal.

    Later rounds draw the correct answer anew.
    """

    mode = "random"

    def _right(self, question: Question, options: Sequence[str], draw: random.Random) -> str:
        return draw.choice(options)


_CONTROLS = {writer.mode: writer for writer in (GoldWriter, RandomWriter)}


def make_writer(
    policy: Policy, config: PairsConfig, seed: int
) -> SingleCompletionWriter | ContrastWriter | GoldWriter | RandomWriter:
    """Return the writer of a mode.

    Raises:
        ConfigError: an unknown filter, or an option that belongs to another mode.
    """
    valid = [*FILTERS, "none"]
    for name in config.filters:
        if name not in valid or (name == "none" and len(config.filters) > 1):
            raise ConfigError(f'"pairs.filters" cannot hold "{name}"{did_you_mean(name, valid)}')
    if config.legacy and config.mode != "paper":
        raise ConfigError('"pairs.legacy" belongs to pairs.mode=paper')
    if config.mode in ("pick", *UNASKED_MODES) and (config.annotated or config.self_check):
        key = "annotated" if config.annotated else "self_check"
        raise ConfigError(
            f'"pairs.{key}" is about answers that the model writes, and with pairs.mode='
            f"{config.mode} it writes none"
        )
    if config.mode in UNASKED_MODES:
        return _CONTROLS[config.mode](config, seed)
    if config.mode == "pick":
        return PickingWriter(policy, config, seed)
    kind = SingleCompletionWriter if config.mode == "paper" else ContrastWriter
    return kind(policy, config, seed)
