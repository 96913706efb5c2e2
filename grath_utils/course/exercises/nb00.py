"""Notebook 00: one question, two answers, and what their scores compare."""

from __future__ import annotations

import numpy as np

from grath_utils.course.exercises.judging import (
    ROUNDING,
    Answer,
    exercise,
    finite_numbers,
    hold,
    hold_wanted,
    score_answers,
)
from grath_utils.pairs.parsing import split_words

ANT_QUESTION = "How many legs does an ant have?"  # notebook 0, section 3
ANT_ANSWERS = ("An ant has six legs.", "An ant has four legs.", "Six legs.", "Four legs.")
ANT_PAIRS = ((0, 1), (2, 3), (2, 1))
BLANK_QUESTION = "Say something."


@exercise("00.easy", "(question, true answer, false answer), three texts")
def own_question(answer: Answer) -> str:
    question, true, false = (str(part).strip() for part in answer.value)
    hold(all((question, true, false)), "one of the three texts is empty.")
    hold(true != false, "the two answers are the same text.")
    first, second = split_words(true), split_words(false)
    shared = len(set(first) & set(second)) / max(len({*first, *second}), 1)
    hold(
        abs(len(first) - len(second)) <= 1 and shared >= 0.4,
        "the answers differ in more than the fact: use the same wording and the same length, or "
        "the score compares styles.",
    )
    right, wrong = (s.logprob for s in score_answers(answer.base_model(), question, [true, false]))
    hold(wrong > right, f"the model gets this one right, by {right - wrong:.2f} nats. Try another.")
    return (
        f"the model prefers the answer that you call false, by {wrong - right:.2f} nats. Whether "
        "it is false, only you can look up."
    )


@exercise("00.medium", "three differences, one for each comparison of section 3")
def ant_mean(answer: Answer) -> str:
    found = finite_numbers(answer.value, len(ANT_PAIRS))
    scores = score_answers(answer.base_model(), ANT_QUESTION, ANT_ANSWERS)
    logprobs = np.array([s.logprob for s in scores])
    sums, means = (
        np.array([of[a] - of[b] for a, b in ANT_PAIRS])
        for of in (logprobs, logprobs / [s.tokens for s in scores])
    )
    hold_wanted(
        found,
        means,
        ROUNDING / 4,
        (-means, "the signs are turned: true minus false."),
        (sums,
         "these look like differences of sums; divide each sum by its number of tokens first."),
        otherwise="at least one of the three differences is another one.",
    )  # fmt: skip
    turned = np.count_nonzero((sums > 0) != (means > 0))
    return f"and {turned} of the three MC1 values differ between sum and mean for this model."


@exercise("00.hard", "four gains in nats, in the order of the four answers")
def ant_information(answer: Answer) -> str:
    found = finite_numbers(answer.value, len(ANT_ANSWERS))
    model = answer.base_model()
    asked, blank = (
        np.array([s.logprob for s in score_answers(model, q, ANT_ANSWERS)])
        for q in (ANT_QUESTION, BLANK_QUESTION)
    )
    hold_wanted(
        found,
        asked - blank,
        ROUNDING,
        (asked, "these are the scores themselves, not yet a difference."),
        (blank - asked, "the sign is turned: what does the real question add?"),
        otherwise=f'at least one gain is another one. Is the second prompt "{BLANK_QUESTION}", in '
        "the same chat form?",
    )
    return "and what is left when the wording cancels is what the question adds."
