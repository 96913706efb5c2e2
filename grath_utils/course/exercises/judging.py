"""What the checks of the exercises have in common: a verdict, and the tools to reach it.

No check compares with an answer that is written down: each computes from the run what a right
answer must be, or tries what was handed in (a function, say) on cases that tell. The last word on
what is *true* stays with the reader: no check can know that.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from grath_utils.course.progress import note_verdict
from grath_utils.engine.encoding import Request
from grath_utils.engine.models import Policy
from grath_utils.engine.scoring import score_completions
from grath_utils.errors import UsageError, did_you_mean
from grath_utils.loop.run_dir import Run
from grath_utils.loop.stages import load_model
from grath_utils.pairs.prompts import question_messages, render_chat

NONE_YET, RIGHT, NOT_YET = "no answer yet", "right", "not yet"
MARKS = {NONE_YET: "…", RIGHT: "✓", NOT_YET: "✗"}
VERDICT_COLOURS = {NONE_YET: "#666666", RIGHT: "#009E73", NOT_YET: "#D55E00"}

ROUNDING = 0.5  # nats: what bfloat16 leaves unsure in an answer's sum


@dataclass(frozen=True)
class Verdict:
    """What a check found: one of the three states, and a sentence for the reader."""

    state: str
    text: str

    def __repr__(self) -> str:
        return f"{MARKS[self.state]} {self.state}: {self.text}"

    def _repr_html_(self) -> str:
        colour = VERDICT_COLOURS[self.state]
        return (
            f"<div style='border-left:4px solid {colour};padding:2px 10px'>"
            f"<b style='color:{colour}'>{MARKS[self.state]} {self.state}:</b> "
            f"{html.escape(self.text)}</div>"
        )


class NotYetError(Exception):
    """An answer is not right yet; the message is a nudge for the reader."""


@dataclass(frozen=True)
class Answer:
    """What was handed in, the run that it is from, and its base model where that is loaded."""

    value: Any
    run: Run
    policy: Policy | None

    def function(self) -> Callable[..., Any]:
        """Return what was handed in, if it can be called."""
        hold(callable(self.value), "hand in the function itself, without calling it.")
        return self.value

    def base_model(self) -> Policy:
        return self.policy if self.policy is not None else load_model(self.run, None)


Judge = Callable[[Answer], str]
"""``judge(answer)`` returns a sentence if the answer is right, and raises otherwise."""
EXERCISES: dict[str, tuple[str, Judge]] = {}
"""Name (notebook and level) -> the form of an answer, and what judges it."""


def exercise(name: str, wanted: str) -> Callable[[Judge], Judge]:
    """Make an exercise of the function that judges it."""
    return lambda judge: EXERCISES.setdefault(name, (wanted, judge))[1]


def check(run: Run, name: str, answer: Any, policy: Policy | None = None) -> Verdict:
    """Judge an answer, computed from a run, to an exercise such as ``"02.easy"``.

    The run directory keeps the verdict, and ``grath status`` counts them.
    The answer is ``...`` where there is none yet; ``policy`` is the run's base model, where the
    notebook has it loaded already.
    """
    if name not in EXERCISES:
        raise UsageError(f'there is no exercise "{name}"{did_you_mean(name, EXERCISES)}')
    wanted, judge = EXERCISES[name]
    if answer is ...:
        return Verdict(NONE_YET, f"replace the dots by {wanted}.")
    try:
        verdict = Verdict(RIGHT, judge(Answer(answer, run, policy)))
    except NotYetError as nudge:
        verdict = Verdict(NOT_YET, str(nudge))
    except Exception as error:  # whatever the learner's function raises
        problem = f"{type(error).__name__}: {error}"
        verdict = Verdict(NOT_YET, f"the answer could not be used ({problem}). Wanted: {wanted}.")
    note_verdict(run, name, verdict.state == RIGHT, EXERCISES)
    return verdict


def hold(condition: bool, nudge: str) -> None:
    """Raise NotYetError with a nudge for the reader unless ``condition`` holds."""
    if not condition:
        raise NotYetError(nudge)


def finite_numbers(answer: Any, count: int) -> list[float]:
    """Return an answer as ``count`` finite numbers."""
    values = [float(value) for value in answer]
    hold(len(values) == count, f"{count} numbers are wanted, not {len(values)}.")
    hold(all(map(math.isfinite, values)), "every number has to be finite.")
    return values


def near(found: ArrayLike, wanted: ArrayLike, slack: float, relative: float = 0.0) -> bool:
    return np.allclose(found, wanted, rtol=relative, atol=slack)


def hold_wanted(
    found: ArrayLike,
    wanted: ArrayLike,
    slack: float,
    *slips: tuple[ArrayLike, str],
    relative: float = 0.0,
    otherwise: str,
) -> None:
    """Refuse other numbers than the wanted ones, with the nudge for the slip that leads to them.

    A slip is what it leads to, and its nudge; ``otherwise`` is said where none of them fits.
    """
    if near(found, wanted, slack, relative):
        return
    for slip, nudge in slips:
        hold(not near(found, slip, slack, relative), nudge)
    raise NotYetError(otherwise)


def score_answers(policy: Policy, question: str, answers: Sequence[str]) -> list[Any]:
    prompt = render_chat(policy.tokenizer, question_messages(question))
    return score_completions(policy, [Request(prompt, a, "exercise") for a in answers])
