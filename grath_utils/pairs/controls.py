"""Modes ``gold`` and ``random``: the source's own options as pairs; the model is asked nothing.

Filters and training are the same, so what differs in the result is which answers it was given: an
upper bound, and a placebo.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from grath_utils.pairs.parsing import Parsed, check_pair
from grath_utils.pairs.questions import Question
from grath_utils.pairs.writers import GRATH, PairMode, Task, Writer, WrittenPair


class RandomWriter(Writer):
    """Two options at random. Later rounds draw the correct answer again."""

    def write(self, tasks: Sequence[Task]) -> list[WrittenPair]:
        written = []
        for task in tasks:
            question = task.question
            draw = random.Random(f"{self.seed} {question.id}")
            right = self.preferred(question, _others(question, task.incorrect), draw)
            wrong = task.incorrect or draw.choice(_others(question, right))
            sides, shown = Parsed(right, wrong), f"{right}\n{wrong}"
            reason = check_pair(question.text, sides, filters=self.filters)
            written.append(WrittenPair.checked(sides, reason, self.config.mode, shown))
        return written

    def preferred(self, question: Question, options: Sequence[str], draw: random.Random) -> str:
        """Return the answer to prefer."""
        return draw.choice(options)


def _others(question: Question, taken: str | None) -> Sequence[str]:
    """Return the options that are not ``taken``; if all are the same, all (a filter says so)."""
    return [c for c in question.candidates if c != taken] or question.candidates


class GoldWriter(RandomWriter):
    """The annotated answer against one of the wrong options. Later rounds keep the pairs."""

    def preferred(self, question: Question, options: Sequence[str], draw: random.Random) -> str:
        """Return the annotated answer."""
        return question.candidates[question.gold]


GOLD = PairMode(
    name="gold",
    summary="no GRATH but its upper bound, the source's own right answer against a wrong one",
    writer=GoldWriter,
    origin="annotated",
    card=f"Trained by DPO on *annotated* answers, right against wrong: a control for {GRATH}, "
    "whose models write both themselves.",
    needs_candidates=True,
    needs_gold=True,
)
RANDOM = PairMode(
    name="random",
    summary="a placebo, two of the source's options at random",
    writer=RandomWriter,
    origin="drawn at random from the source's options",
    card=f"Trained by DPO on answers *drawn at random* from given options: a placebo for {GRATH}, "
    "whose models write both themselves.",
    needs_candidates=True,
)
