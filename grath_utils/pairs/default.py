"""Mode ``default``: several candidates for each answer; of them, the pair of clearest contrast.

It goes beyond the paper, for weak models: candidates for the true and for the false answer are
asked for separately and as a pair, and the model itself says which two stand furthest apart.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import permutations
from typing import TYPE_CHECKING

from grath_utils import engine
from grath_utils.config import PairsConfig
from grath_utils.pairs.judge import prompts_a_pair
from grath_utils.pairs.parsing import Parsed, Reason, check_answer, check_pair, first_line
from grath_utils.pairs.prompts import NEUTRAL_QUESTION, training_completion
from grath_utils.pairs.questions import Question
from grath_utils.pairs.words import length_ratio, negated, ngram_f1, same_wording
from grath_utils.pairs.writers import (
    SELF_MADE,
    Asked,
    PairMode,
    Rejected,
    Task,
    Wanted,
    Writer,
    WrittenPair,
)

if TYPE_CHECKING:
    import numpy as np

# A pair is there to differ in truth. Where the two sides also differ in length or in a negation,
# that is what DPO learns first, so only candidates that are alike in both are paired.
BALANCED_LENGTH_RATIO = 1.5


@dataclass
class Pool:
    """All that the model wrote to one question."""

    task: Task
    written: list[tuple[str, engine.Completion]] = field(default_factory=list)
    """With the kind of prompt."""
    votes: dict[str, int] = field(default_factory=dict)
    """Usable answer -> how many completions to the prompt for the *correct* answer say it."""
    rejected: list[Rejected] = field(default_factory=list)


class ContrastWriter(Writer):
    """Pairs the two candidates that stand furthest apart in the model's own judgement.

    A candidate's credit is the mean of two standardised scores:

    * agreement: mean similarity with the other completions to the prompt for the correct answer.
      What a model knows it says again and again; what it invents differs each time
      (self-consistency, arXiv 2203.11171; as a choice: minimum Bayes risk decoding).
    * gain: how much the question raises the answer's log-probability a token, against no question
      (pointwise mutual information). It keeps answers from winning by being short or common.

    The chosen pair has the largest difference in credit among those that pass the filters and are
    alike in length and negation.
    """

    kinds = ("pair", "correct", "incorrect")

    def write(self, tasks: Sequence[Task]) -> list[WrittenPair]:
        pools = [Pool(task) for task in tasks]
        # Whom to ask what; all of it goes into one queue.
        asked = [each for kind in self.kinds for each in self._wanted(kind, pools)]
        asked = [(owners, wanted) for owners, wanted in asked if owners]
        written = self.complete_together([wanted for _, wanted in asked])
        for (owners, wanted), completions in zip(asked, written, strict=True):
            for pool, completion in zip(owners, completions, strict=True):
                self._sort_in(pool, wanted.kind, completion)
        return list(map(self._choose, pools, self._credits(pools)))

    def _wanted(self, kind: str, pools: Sequence[Pool]) -> Iterator[tuple[list[Pool], Wanted]]:
        """Yield the completions of a kind: the greedy ones first, then those that are drawn."""
        pools = [pool for pool in pools if kind != "incorrect" or not pool.task.incorrect]
        yield pools, Wanted(kind, [pool.task.question for pool in pools])
        if kind != "pair":
            drawn = [(pool, n) for pool in pools for n in range(1, self.config.candidates)]
            owners = [pool for pool, _ in drawn]
            questions = [pool.task.question for pool in owners]
            keys = [f"{kind} {pool.task.question.id} {n}" for pool, n in drawn]
            yield owners, Wanted(kind, questions, self.config.temperature, keys)

    def _sort_in(self, pool: Pool, kind: str, completion: engine.Completion) -> None:
        """Add a completion's usable answers to the pool, or say why there are none."""
        pool.written.append((kind, completion))
        answers, reason = self._answers(completion, kind)
        for answer in answers:
            why = check_answer(
                pool.task.question.text,
                answer,
                cut_off=kind != "pair" and completion.finished == "length",
                filters=self.filters,
                shown_answers=self.shown_answers(kind),
            )
            if why is None:
                same = next((one for one in pool.votes if same_wording(one, answer)), answer)
                pool.votes[same] = pool.votes.get(same, 0) + (kind == "correct")
            reason = why or reason
        if reason is not None:
            pool.rejected.append(Rejected(kind, completion.text, reason))

    def _answers(self, completion: engine.Completion, kind: str) -> tuple[list[str], Reason | None]:
        """Return the answers in a completion; of a pair with equal sides the first only."""
        if kind != "pair":
            return [first_line(completion.text)], None
        parsed = self.parse(completion)
        sides = [side for side in (parsed.correct, parsed.incorrect) if side is not None]
        reason = parsed.reason or (Reason.CUT_OFF if parsed.cut_off else None)
        if reason is None and same_wording(*sides):
            return sides[:1], Reason.EQUAL
        # A side that was cut off is the last one.
        return (sides[:-1] if parsed.cut_off else sides), reason

    def _credits(self, pools: Sequence[Pool]) -> list[np.ndarray]:
        """Return the credit of each answer that a pool's task judges."""
        blank = Question("", NEUTRAL_QUESTION)
        requests = [
            engine.Request(self.prompt(asked, "correct"), completion, pool.task.question.id)
            for pool in pools
            for text in pool.task.judged(pool.votes)
            for completion in [training_completion(self.policy.tokenizer, text)]
            # Here the source's candidates are not shown.
            for asked in (replace(pool.task.question, candidates=()), blank)
        ]
        scores = engine.score_completions(self.policy, requests)
        means = iter([score.logprob / score.tokens for score in scores])
        credits = []
        for pool in pools:
            texts = pool.task.judged(pool.votes)
            gains = [next(means) - next(means) for _ in texts]
            agreements = [agreement(pool.votes, text) for text in texts]
            credits.append((standardized(gains) + standardized(agreements)) / 2)
        return credits

    def _choose(self, pool: Pool, credit: np.ndarray) -> WrittenPair:
        tokens = sum(len(completion.token_ids) for _, completion in pool.written)
        cost = {"completions": len(pool.written), "tokens": tokens}
        chosen = clearest_pair(pool.task, pool.votes, credit, filters=self.filters, alike=True)
        if isinstance(chosen, Reason):
            # No two candidates make a pair: say why for the first completion, which stands for all.
            kind, completion = pool.written[0]
            if (kind, completion.text) not in {(r.prompt, r.completion) for r in pool.rejected}:
                pool.rejected.append(Rejected(kind, completion.text, chosen))
            chosen = WrittenPair()
        return replace(chosen, rejected=tuple(pool.rejected), **cost)


def clearest_pair(
    task: Task,
    answers: Iterable[str],
    credit: Sequence[float],
    *,
    filters: Collection[str],
    alike: bool,
) -> WrittenPair | Reason:
    """Return the pair with the largest difference in credit, or why there is none.

    ``credit`` says how credible each answer is, and last the one that stays in refinement. With
    ``alike``, only answers that are alike in length and negation are paired.
    """
    texts = task.judged(answers)
    options = list(permutations(range(len(texts)), 2))
    if task.incorrect is not None:
        options = [(right, wrong) for right, wrong in options if wrong == len(texts) - 1]
    reason: Reason | None = None
    # Best first; a tie goes to the candidate that was written first.
    for right, wrong in sorted(options, key=lambda pair: (credit[pair[1]] - credit[pair[0]], pair)):
        contrast = float(credit[right] - credit[wrong])
        if contrast <= 0:
            return reason or Reason.SELF_CHECK
        parsed = Parsed(texts[right], texts[wrong])
        why = check_pair(task.question.text, parsed, filters=filters)
        if why is None and alike and not balanced(texts[right], texts[wrong]):
            why = Reason.LENGTH_RATIO
        if why is None:
            return WrittenPair(texts[right], texts[wrong], contrast=round(contrast, 4))
        reason = reason or why
    return reason or Reason.EQUAL


def balanced(a: str, b: str) -> bool:
    """Return True if two answers are of like length, and both or neither hold a negation."""
    return length_ratio(a, b) <= BALANCED_LENGTH_RATIO and negated(a) == negated(b)


def agreement(votes: Mapping[str, int], answer: str) -> float:
    """Return an answer's mean similarity with those that were to be correct, weighted by votes.

    A completion does not vouch for itself: of those that say just the same, one is left out.
    """
    total = count = 0.0
    for other, weight in votes.items():
        weight -= other == answer and weight > 0
        if weight:
            total += weight * ngram_f1(answer, other)
            count += weight
    return total / count if count else 0.0


def standardized(values: Sequence[float]) -> np.ndarray:
    """Return values with mean 0 and standard deviation 1 (all 0 where they do not differ)."""
    import numpy as np

    array = np.asarray(values, dtype=np.float64)
    return (array - array.mean()) / (array.std() or 1.0) if array.size else array


def _asked(config: PairsConfig, iteration: int) -> Asked:
    answers = config.candidates * (1 if iteration else 2)  # later rounds write one answer again
    return Asked(pairs=1, answers=answers, scored=1 + answers + prompts_a_pair(config))


MODE = PairMode(
    name="default",
    summary="several candidates for each answer, and of them the pair with the clearest contrast",
    writer=ContrastWriter,
    asked=_asked,
    origin="written by the model",
    card=SELF_MADE,
    options=("annotated", "self_check", "judge"),
)
