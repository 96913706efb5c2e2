"""Notebook 00b: the core of the method by the reader's own hand, held to the package's."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from grath_utils.course.exercises.judging import (
    Answer,
    exercise,
    finite_numbers,
    hold,
    hold_wanted,
    near,
)
from grath_utils.dpo.loss import dpo_loss
from grath_utils.pairs.judge import mean_of_orders
from grath_utils.pairs.parsing import parse_pair

CASES = 40  # random ones, the same for everybody
WORDS = "warm air rises because it is lighter than the cold water below and carries heat".split()
WRAPS = ("{}: ", "**{}:** ", "**{}**: ", "- {}: ", "* {}: ", "- **{}:** ")


def decorated_completions() -> Iterator[str]:
    """Yield completions as models decorate them; from some, a label is missing."""
    draw = random.Random(0)
    for case in range(CASES):
        style = draw.choice((str, str.lower, str.upper, str.title))
        wrap, lines = draw.choice(WRAPS), []
        for label in draw.sample(("Correct answer", "Incorrect answer"), 2):
            sentence = " ".join(draw.sample(WORDS, draw.randint(3, 8))).capitalize()
            lines.append(f"{wrap.format(style(label))}{sentence}.")
        if case % 4 == 3:
            lines.pop(draw.randrange(2))
        yield "\n".join(["Question: Why does warm air rise?", *lines])


def hold_sides(mine: Any, sides: tuple[str, str], which: str) -> None:
    """Refuse other answers than a completion's two sides."""
    hold(
        tuple(mine) != sides[::-1],
        "the two answers are in the other order: correct first, whichever is written first.",
    )
    hold(tuple(mine) == sides, f"another text than the {which}")


@exercise("00b.easy", "your function, called with a completion")
def own_parser(answer: Answer) -> str:
    function, found = answer.function(), 0
    for text in decorated_completions():
        parsed, mine = parse_pair(text), function(text)
        if parsed.reason:
            hold(
                mine is None,
                f"one of the two answers is missing here, and yet there is a result: {text!r}",
            )
            continue
        hold(mine is not None, f"None for a completion that holds both answers: {text!r}")
        hold_sides(mine, parsed.sides, f"bare answers, from {text!r}")
        found += 1
    return f"{found} of {CASES} completions are pairs, the same ones as for the package's parser."


@exercise("00b.medium", "your function, called with (log p(A), log p(B)) of the first order and "
          "of the second")  # fmt: skip
def own_average(answer: Answer) -> str:
    function, draw = answer.function(), np.random.default_rng(0)
    for case in range(CASES):
        first, second = draw.normal(-3, 2, (2, 2)) - (2000 if case % 4 == 3 else 0)
        wanted = float(mean_of_orders(np.stack([first, second]))[0])
        where = f"for {first.round(1)} and {second.round(1)}"
        try:
            (mine,) = finite_numbers([function(tuple(first), tuple(second))], 1)
        except (ZeroDivisionError, OverflowError) as error:
            hold(False, f"{where}: {error}. See the hint.")
        straight = float(mean_of_orders(np.stack([first, second[::-1]]))[0])
        hold_wanted(
            mine,
            wanted,
            1e-6,
            (straight, "in the second order the correct answer is B, not A."),
            otherwise=f"{where}, {mine:.4f} is another probability.",
        )
    return "a judge that always says A is worth exactly one half, and drops the pair."


@exercise("00b.hard", "your function, called with four log-probabilities and beta")
def own_loss(answer: Answer) -> str:
    function, draw = answer.function(), np.random.default_rng(0)
    for case in range(CASES):
        four = draw.normal(-40, 5, 4) * (100 if case % 4 == 3 else 1)
        beta = float(draw.uniform(0.05, 1))
        chosen, *others = torch.tensor(four, dtype=torch.float64)
        loss = dpo_loss(chosen.requires_grad_(), *others, beta)[0]
        loss.backward()
        where = f"for {four.round(1)} and beta {beta:.2f}"
        try:
            mine, slope = finite_numbers(function(*four.tolist(), beta), 2)
        except (ZeroDivisionError, OverflowError) as error:
            hold(False, f"{where}: {error}. See the hint.")
        hold(near(mine, loss.item(), 1e-9, 1e-6), f"{where}, {mine:.4f} is another loss.")
        hold(
            near(slope, chosen.grad.item(), 1e-9, 1e-6),
            f"{where} the loss is right, and {slope:.4f} is another slope.",
        )
    return "that is the loss that trains, and all that a pair does to its chosen answer."
