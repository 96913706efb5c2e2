"""Notebook 01: pairs read by hand, prompts without demonstrations, rules that see no question."""

from __future__ import annotations

import math
import random
from collections import Counter
from dataclasses import replace
from typing import Any

from grath_utils.course.exercises.judging import base_model, exercise, finite_numbers, hold
from grath_utils.engine.generation import Stop, generate
from grath_utils.engine.models import Policy
from grath_utils.evaluation.statistics import summarize
from grath_utils.loop.run_dir import Run
from grath_utils.loop.stages import run_pairs, run_questions
from grath_utils.pairs.parsing import check_pair, pair_is_complete, parse_pair
from grath_utils.pairs.prompts import pair_messages, render_chat
from grath_utils.pairs.words import ngram_f1


@exercise("01.easy", "a list of your verdicts, 1 or 0, in the order of the draw")
def by_hand(run: Run, answer: Any, policy: Policy | None) -> str:
    train, _ = run_pairs(run, 0)
    drawn = random.Random(run.config.seed).sample(train, min(10, len(train)))
    verdicts = finite_numbers(answer, len(drawn))
    hold(set(verdicts) <= {0.0, 1.0}, "each verdict is 1 (right on both sides) or 0.")
    for number, (verdict, pair) in enumerate(zip(verdicts, drawn, strict=True), start=1):
        hold(
            not (verdict and ngram_f1(pair.correct, pair.incorrect) > 0.95),
            f"look at pair {number} again: its two sides say the same, so one of them is wrong.",
        )
    found = summarize(verdicts, 2000, run.config.seed)
    low, high = found["ci95"]
    return (
        f"{found['value']:.0%} right on both sides, 95 % interval {low:.0%} to {high:.0%}. Nobody "
        "but you can check the verdicts; that is the point of this exercise."
    )


@exercise("01.medium", "the counts, such as Counter(verdicts)")
def zero_shot(run: Run, answer: Any, policy: Policy | None) -> str:
    found = Counter({str(reason): int(count) for reason, count in dict(answer).items()})
    model, some = base_model(run, policy), run_questions(run, "train")[:8]
    hold(
        found.total() == len(some),
        f"the counts add up to {found.total()}; there are {len(some)} questions.",
    )
    prompts = [render_chat(model.tokenizer, pair_messages(q.text, [])) for q in some]
    texts = generate(model, prompts, max_new_tokens=60, stop=Stop(pair_is_complete, "\n"))
    wanted = Counter(
        str(check_pair(q.text, parse_pair(c.text)) or "usable")
        for q, c in zip(some, texts, strict=True)
    )
    # One completion may end otherwise where batches round otherwise.
    differ = (found - wanted).total() + (wanted - found).total()
    hold(
        differ <= 2,
        f"{differ // 2} completions have another verdict here. Zero-shot means no demonstrations "
        "at all; 60 new tokens, greedy, verdicts from check_pair.",
    )
    return f"{wanted['usable']} of {len(some)} parse without demonstrations."


@exercise("01.hard", "(your function, its accuracy)")
def blind_rule(run: Run, answer: Any, policy: Policy | None) -> str:
    rule, accuracy = answer
    train, _ = run_pairs(run, 0)
    outcomes = []
    for pair in train:
        swapped = replace(pair, correct=pair.incorrect, incorrect=pair.correct)
        first, second = scores = [float(rule(pair, x)) for x in (pair.correct, pair.incorrect)]
        hold(all(map(math.isfinite, scores)), "a score is not finite.")
        hold(
            scores == [float(rule(swapped, x)) for x in (pair.correct, pair.incorrect)],
            "the rule looks at which side a text stands on. It may use the question and the text, "
            "nothing else.",
        )
        outcomes.append(0.5 if first == second else float(first > second))
    found = summarize(outcomes, 2000, run.config.seed)
    low, high = found["ci95"]
    hold(
        abs(float(accuracy) - found["value"]) < 0.005,
        "the rule is a fair one, but its accuracy on the training pairs is another (as a fraction, "
        "ties count one half).",
    )
    sees = "nothing beyond chance" if low <= 0.5 <= high else "something that DPO can find, too"
    return f"a fair rule; with an interval from {low:.0%} to {high:.0%} it sees {sees}."
