"""Errors written for people: what was wrong, where, and what to do about it.

Every error that this package raises on purpose is a :class:`GrathError`. The command line prints
its message without a traceback and ends with its ``exit_code``; notebooks show it as it is.
"""

from __future__ import annotations

import reprlib
import textwrap
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import Any


class GrathError(Exception):
    """Something failed while the work was being done (exit code 1)."""

    exit_code = 1


class UsageError(GrathError):
    """What was asked for cannot be done as asked: a wrong name, option or input (exit code 2)."""

    exit_code = 2


class ConfigError(UsageError):
    """A profile, an override or a run's configuration is wrong; the message names the key."""


class DataError(UsageError):
    """An input file is malformed, empty or of the wrong kind; the message names file and line."""


class StatisticsError(UsageError):
    """Values have no mean, interval or test: not finite, too few, or not of the same items."""


class ModelError(UsageError):
    """A model or adapter cannot be found, does not fit, or is not what it is said to be."""


class FetchError(GrathError):
    """Something had to be downloaded and could not be, or arrived with the wrong checksum."""


class RunError(GrathError):
    """A run directory is incomplete, damaged, or in use by another process."""


class ScoringError(GrathError):
    """A score is not finite, or an item cannot be scored; the message names the item."""


class TrainingError(GrathError):
    """Training cannot start or has gone wrong (no trainable parameter, a non-finite loss, ...)."""


class CollapseError(TrainingError):
    """A round was stopped because the model was losing the answers that it was trained on."""


KIND_NAMES = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    list: "a list",
    dict: "an object",
    Path: "a path",
}


def reason_of(error: BaseException) -> str:
    """Return how an error's message begins, as part of a sentence; its kind if it has none."""
    text = f"no {error}" if isinstance(error, KeyError) else str(error)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    told = 2 if lines and lines[0].endswith(":") else 1
    return " ".join(lines[:told]).rstrip(".:,") or type(error).__name__


def brief(value: Any) -> str:
    """Return a user's value for a message, though it be endless."""
    return textwrap.shorten(reprlib.repr(value), 100, placeholder="...")


def did_you_mean(name: str, valid: Iterable[str]) -> str:
    """Return ``'; did you mean "x"?'`` for the nearest valid name, else the list of all of them."""
    valid = sorted(valid)
    near = get_close_matches(name, valid, n=1, cutoff=0.6)
    if near:
        return f'; did you mean "{near[0]}"?'
    return f"; valid ones are: {', '.join(valid)}"
