"""Notebook 01: a pair's fate, a parser that gives reasons, and a judge by the reader's own hand."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import replace

from grath_utils.config import PairsConfig
from grath_utils.course.exercises.judging import Answer, exercise, finite_numbers, hold
from grath_utils.course.exercises.nb00b import CASES, WORDS, hold_sides
from grath_utils.pairs.audit import wilson
from grath_utils.pairs.judge import JUDGES, Case, verdict
from grath_utils.pairs.labels import read_sealed
from grath_utils.pairs.parsing import Reason, check_pair, parse_pair
from grath_utils.pairs.questions import Question
from grath_utils.pairs.writers import Task, WrittenPair

FATES = {False: "kept", True: "turned round", None: "dropped"}  # by `swapped`
ASKED = "Why does warm air rise?"
TRIED = 12  # sealed answers that a judge is tried on
FAIR = 0.02  # by how much the probabilities of the two orders may miss the sum 1: rounding


def fate_of(mean: float, keep: float, turn: float) -> str:
    """Return what the package's judge makes of a pair."""
    config = replace(PairsConfig(), judge_keep=keep, judge_swap=turn)
    pair = verdict(Task(Question("x", ASKED)), WrittenPair("yes", "no"), mean, config)
    return FATES[pair.swapped]


@exercise("01.easy", "your function, called with two probabilities and the two thresholds")
def own_fate(answer: Answer) -> str:
    function, draw = answer.function(), random.Random(0)
    for case in range(CASES):
        turn, keep = (draw.choice((0.25, 0.375, 0.5)), draw.choice((0.5, 0.625, 0.75)))
        first, second = draw.random(), draw.random()
        if case % 4 == 3:  # a mean that lies on a threshold
            edge = draw.choice((turn, keep))
            first, second = edge + 0.125, edge - 0.125
        wanted = fate_of((first + second) / 2, keep, turn)
        mine = function(first, second, keep, turn)
        where = f"shown first {first:.3f}, shown second {second:.3f}, from {keep} and up to {turn}"
        hold(mine in FATES.values(), f"{mine!r} is none of {', '.join(FATES.values())}.")
        hold(
            mine == wanted or case % 4 != 3,
            f"{where}: the mean lies on a threshold, and what lies on it counts as beyond it.",
        )
        hold(mine == wanted, f"{where}: the pair is not {mine}.")
    return "the same fate as in the package, for every pair and on the thresholds too."


def messy_completions() -> Iterator[str]:
    """Yield completions with a preamble, explanations, a label too many or one too few."""
    draw = random.Random(1)
    for case in range(CASES):
        sides = [" ".join(draw.sample(WORDS, n)).capitalize() + "." for n in (5, 6)]
        if case % 5 == 1:
            sides[1] = sides[0].lower().replace(".", "!")
        lines = [f"{kind} answer: {side}" for kind, side in zip(("Correct", "Incorrect"), sides,
                                                                strict=True)]  # fmt: skip
        draw.shuffle(lines)
        if case % 5 == 2:
            lines.pop(draw.randrange(2))
        if case % 5 == 3:
            lines += [f"{line} It is a second try." for line in lines]
        if draw.random() < 0.5:
            lines.insert(1, "Reason: the cold water below is heavier.")
        yield "\n".join([f"Sure! Here they are.\nQuestion: {ASKED}", *lines])


@exercise("01.medium", "your function, called with a completion")
def own_parser_with_reasons(answer: Answer) -> str:
    function, pairs = answer.function(), 0
    for text in messy_completions():
        parsed = parse_pair(text)
        reason = check_pair(ASKED, parsed, filters=[Reason.EQUAL])
        mine = function(text)
        hold(mine is not None, f"nothing is returned, neither a pair nor a reason, for {text!r}")
        if reason is not None:
            hold(
                mine == str(reason),
                f"{mine!r}, but this completion is no pair, or for another reason: {text!r}",
            )
            continue
        hold(not isinstance(mine, str), f"{mine!r} for a completion that holds a pair: {text!r}")
        hold_sides(mine, parsed.sides, f"first bare answers, from {text!r}")
        pairs += 1
    return f"{pairs} of {CASES} completions are pairs, and each of the others has its one reason."


@exercise("01.hard", "your function, called with the policy, a question and two answers")
def own_judge(answer: Answer) -> str:
    function, model = answer.function(), answer.base_model()
    plain = [Case(i, s.question, s[1:3]) for i, s in read_sealed().items() if s.kind == "plain"]
    cases, right = random.Random(answer.run.config.seed).sample(plain, TRIED), 0
    values = []
    for _, question, (true, false) in cases:
        value, other = finite_numbers(
            [function(model, question, *two) for two in ((true, false), (false, true))], 2
        )
        hold(0 <= value <= 1, f"{value:.3f} is not a probability.")
        hold(
            math.isclose(value + other, 1, abs_tol=FAIR),
            f"its two words on {question!r} are {value:.3f} and {other:.3f}: they must sum to 1, "
            "or the order has a say. Ask in both orders and average.",
        )
        right += value > 0.5
        values.append(value)
    hold(len(set(values)) > 1, "it says the same of every pair.")
    theirs = sum(float(shares[0]) > 0.5 for shares in JUDGES["exam"].weigh(model, cases))
    low, high = wilson(right, TRIED)
    return (
        f"a fair judge, whose word does not depend on the order: {right} of {TRIED} right, 95 % "
        f"interval {low:.0%} to {high:.0%}. The judge `exam` has {theirs} of the same right."
    )
