"""Every exercise by its name, and the check that notebooks call: right or not yet."""

from __future__ import annotations

from types import EllipsisType
from typing import Any

from grath_utils.course.exercises import nb00, nb01, nb02, nb03, nb04, nb05, nb06
from grath_utils.course.exercises.judging import (
    NONE_YET,
    NOT_YET,
    RIGHT,
    Exercise,
    NotYetError,
    Verdict,
)
from grath_utils.engine.models import Policy
from grath_utils.errors import UsageError, did_you_mean
from grath_utils.loop.run_dir import Run

EXERCISES: dict[str, Exercise] = {
    found.name: found
    for notebook in (nb00, nb01, nb02, nb03, nb04, nb05, nb06)
    for found in vars(notebook).values()
    if isinstance(found, Exercise)
}


def check(run: Run, name: str, answer: Any, policy: Policy | None = None) -> Verdict:
    """Judge an answer, computed from a run, to an exercise such as ``"02.easy"``.

    The answer is ``...`` where there is none yet; ``policy`` is the run's base model, where the
    notebook has it loaded already.
    """
    if name not in EXERCISES:
        raise UsageError(f'there is no exercise "{name}"{did_you_mean(name, EXERCISES)}')
    asked = EXERCISES[name]
    if isinstance(answer, EllipsisType):
        return Verdict(NONE_YET, f"replace the dots by {asked.wanted}.")
    try:
        return Verdict(RIGHT, asked.judge(run, answer, policy))
    except NotYetError as nudge:
        return Verdict(NOT_YET, str(nudge))
    except (TypeError, ValueError, KeyError, IndexError, AttributeError, RuntimeError) as error:
        problem = f"{type(error).__name__}: {error}"
        return Verdict(
            NOT_YET, f"the answer could not be used ({problem}). Wanted: {asked.wanted}."
        )
