"""Checks for the exercises: right or not yet, without giving the answer away."""

from grath_utils.course.exercises import (  # noqa: F401
    nb00,
    nb00b,
    nb01,
    nb02,
    nb03,
    nb04,
    nb05,
    nb06,
)
from grath_utils.course.exercises.judging import EXERCISES, check

__all__ = ["EXERCISES", "check"]
