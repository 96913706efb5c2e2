"""Checks for the exercises: right or not yet, without giving the answer away.

Nothing is compared with an answer that is written down here. Each check computes from the run what
a right answer must be, or tries what was handed in (a function, say) on cases that tell. The last
word on what is *true* stays with the reader: no check can know that.
"""

from __future__ import annotations

import html
import math
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import EllipsisType
from typing import Any

import numpy as np
import torch

from grath_utils.config import load_config
from grath_utils.dpo.data import tokenize_pairs
from grath_utils.dpo.round import preference_loss, reference_log_probs
from grath_utils.engine.encoding import Request
from grath_utils.engine.generation import Stop, generate
from grath_utils.engine.models import Policy, quiet_transformers
from grath_utils.engine.scoring import score_completions
from grath_utils.errors import UsageError, did_you_mean
from grath_utils.evaluation.benchmarks import Item, load_benchmark
from grath_utils.evaluation.metrics import mc1
from grath_utils.evaluation.statistics import bootstrap_means, interval, items_needed, summarize
from grath_utils.files import notebooks_dir, read_json, read_jsonl
from grath_utils.loop.run_dir import Run
from grath_utils.loop.stages import (
    final_iteration,
    load_model,
    model_label,
    planned_iterations,
    run_pairs,
    run_questions,
)
from grath_utils.pairs.audit import ngram_f1
from grath_utils.pairs.parsing import check_pair, pair_is_complete, parse_pair, split_words
from grath_utils.pairs.prompts import pair_messages, question_messages, render_chat
from grath_utils.scale import costs
from grath_utils.scale.shapes import shape_of

NONE_YET, RIGHT, NOT_YET = "no answer yet", "right", "not yet"
MARKS = {NONE_YET: "…", RIGHT: "✓", NOT_YET: "✗"}
COLOURS = {NONE_YET: "#666666", RIGHT: "#009E73", NOT_YET: "#D55E00"}

ANT_QUESTION = "How many legs does an ant have?"  # notebook 0, section 3
ANT_ANSWERS = ("An ant has six legs.", "An ant has four legs.", "Six legs.", "Four legs.")
ANT_PAIRS = ((0, 1), (2, 3), (2, 1))
BLANK_QUESTION = "Say something."
ROUNDING = 0.5  # nats: what bfloat16 leaves unsure in an answer's sum
LONG_PAIR = 1024  # tokens; notebook 6
COUNTED = (2, 32)  # rows and tokens a row of the batch whose operations are counted; notebook 6


@dataclass(frozen=True)
class Verdict:
    """What a check found: one of the three states, and a sentence for the reader."""

    state: str
    text: str

    def __repr__(self) -> str:
        return f"{MARKS[self.state]} {self.state}: {self.text}"

    def _repr_html_(self) -> str:
        colour = COLOURS[self.state]
        return (
            f"<div style='border-left:4px solid {colour};padding:2px 10px'>"
            f"<b style='color:{colour}'>{MARKS[self.state]} {self.state}:</b> "
            f"{html.escape(self.text)}</div>"
        )


class _NotYetError(Exception):
    """An answer is not right yet; the message is a nudge for the reader."""


@dataclass(frozen=True)
class Exercise:
    """One exercise: the form of an answer, and what judges it.

    ``judge(run, answer, policy)`` returns a sentence where the answer is right, and raises
    otherwise. ``policy`` is the run's base model, or None: then it is loaded where it is needed.
    """

    wanted: str
    judge: Callable[[Run, Any, Policy | None], str]


def check(run: Run, name: str, answer: Any, policy: Policy | None = None) -> Verdict:
    """Judge an answer to an exercise.

    Args:
        run: the run that the answer was computed from.
        name: such as ``"02.easy"``: notebook and level.
        answer: ``...`` where there is none yet; else of the form that the exercise asks for.
        policy: the run's base model, where the notebook has it loaded already.

    Raises:
        UsageError: there is no exercise of that name.
    """
    if name not in EXERCISES:
        raise UsageError(f'there is no exercise "{name}"{did_you_mean(name, EXERCISES)}')
    exercise = EXERCISES[name]
    if isinstance(answer, EllipsisType):
        return Verdict(NONE_YET, f"replace the dots by {exercise.wanted}.")
    try:
        return Verdict(RIGHT, exercise.judge(run, answer, policy))
    except _NotYetError as nudge:
        return Verdict(NOT_YET, str(nudge))
    except (TypeError, ValueError, KeyError, IndexError, AttributeError, RuntimeError) as error:
        problem = f"{type(error).__name__}: {error}"
        return Verdict(
            NOT_YET, f"the answer could not be used ({problem}). Wanted: {exercise.wanted}."
        )


# --- common to several ---------------------------------------------------------------------------


def _hold(condition: bool, nudge: str) -> None:
    if not condition:
        raise _NotYetError(nudge)


def _numbers(answer: Any, count: int) -> list[float]:
    """Return an answer as finite numbers, so many."""
    values = [float(value) for value in answer]
    _hold(len(values) == count, f"{count} numbers are wanted, not {len(values)}.")
    _hold(all(map(math.isfinite, values)), "every number has to be finite.")
    return values


def _near(found: Sequence[float], wanted: Sequence[float], slack: float) -> bool:
    return bool(np.allclose(found, wanted, rtol=0, atol=slack))


def _base(run: Run, policy: Policy | None) -> Policy:
    return policy if policy is not None else load_model(run, None)


def _score(policy: Policy, question: str, answers: Sequence[str]) -> list[Any]:
    prompt = render_chat(policy.tokenizer, question_messages(question))
    return score_completions(policy, [Request(prompt, a, "exercise") for a in answers])


# --- 00 ------------------------------------------------------------------------------------------


def _own_question(run: Run, answer: Any, policy: Policy | None) -> str:
    question, true, false = (str(part).strip() for part in answer)
    _hold(all((question, true, false)), "one of the three texts is empty.")
    _hold(true != false, "the two answers are the same text.")
    first, second = split_words(true), split_words(false)
    shared = len(set(first) & set(second)) / max(len({*first, *second}), 1)
    _hold(
        abs(len(first) - len(second)) <= 1 and shared >= 0.4,
        "the answers differ in more than the fact: use the same wording and the same length, or "
        "the score compares styles.",
    )
    right, wrong = (s.logprob for s in _score(_base(run, policy), question, [true, false]))
    _hold(
        wrong > right, f"the model gets this one right, by {right - wrong:.2f} nats. Try another."
    )
    return (
        f"the model prefers the answer that you call false, by {wrong - right:.2f} nats. Whether "
        "it is false, only you can look up."
    )


def _ant_mean(run: Run, answer: Any, policy: Policy | None) -> str:
    found = _numbers(answer, len(ANT_PAIRS))
    scores = _score(_base(run, policy), ANT_QUESTION, ANT_ANSWERS)
    sums = [scores[a].logprob - scores[b].logprob for a, b in ANT_PAIRS]
    means = [
        scores[a].logprob / scores[a].tokens - scores[b].logprob / scores[b].tokens
        for a, b in ANT_PAIRS
    ]
    slack = ROUNDING / 4
    _hold(not _near(found, [-m for m in means], slack), "the signs are turned: true minus false.")
    _hold(
        not _near(found[-1:], sums[-1:], slack) or _near(sums[-1:], means[-1:], slack),
        "these look like differences of sums; divide each sum by its number of tokens first.",
    )
    _hold(_near(found, means, slack), "at least one of the three differences is another one.")
    turned = sum((a > 0) != (b > 0) for a, b in zip(sums, means, strict=True))
    return f"and {turned} of the three MC1 values differ between sum and mean for this model."


def _ant_information(run: Run, answer: Any, policy: Policy | None) -> str:
    found = _numbers(answer, len(ANT_ANSWERS))
    model = _base(run, policy)
    asked, blank = (
        [s.logprob for s in _score(model, q, ANT_ANSWERS)] for q in (ANT_QUESTION, BLANK_QUESTION)
    )
    gains = [a - b for a, b in zip(asked, blank, strict=True)]
    _hold(
        not _near(found, asked, ROUNDING), "these are the scores themselves, not yet a difference."
    )
    _hold(
        not _near(found, [-gain for gain in gains], ROUNDING),
        "the sign is turned: what does the real question add?",
    )
    _hold(
        _near(found, gains, ROUNDING),
        f'at least one gain is another one. Is the second prompt "{BLANK_QUESTION}", in the same '
        "chat form?",
    )
    return "and what is left when the wording cancels is what the question adds."


# --- 01 ------------------------------------------------------------------------------------------


def _by_hand(run: Run, answer: Any, policy: Policy | None) -> str:
    train, _ = run_pairs(run, 0)
    drawn = random.Random(run.config.seed).sample(train, min(10, len(train)))
    verdicts = _numbers(answer, len(drawn))
    _hold(set(verdicts) <= {0.0, 1.0}, "each verdict is 1 (right on both sides) or 0.")
    for number, (verdict, pair) in enumerate(zip(verdicts, drawn, strict=True), start=1):
        _hold(
            not (verdict and ngram_f1(pair.correct, pair.incorrect) > 0.95),
            f"look at pair {number} again: its two sides say the same, so one of them is wrong.",
        )
    found = summarize(verdicts, 2000, run.config.seed)
    low, high = found["ci95"]
    return (
        f"{found['value']:.0%} right on both sides, 95 % interval {low:.0%} to {high:.0%}. Nobody "
        "but you can check the verdicts; that is the point of this exercise."
    )


def _zero_shot(run: Run, answer: Any, policy: Policy | None) -> str:
    found = Counter({str(reason): int(count) for reason, count in dict(answer).items()})
    model, some = _base(run, policy), run_questions(run, "train")[:8]
    _hold(
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
    _hold(
        differ <= 2,
        f"{differ // 2} completions have another verdict here. Zero-shot means no demonstrations "
        "at all; 60 new tokens, greedy, verdicts from check_pair.",
    )
    return f"{wanted['usable']} of {len(some)} parse without demonstrations."


def _blind_rule(run: Run, answer: Any, policy: Policy | None) -> str:
    rule, accuracy = answer
    train, _ = run_pairs(run, 0)
    outcomes = []
    for pair in train:
        swapped = replace(pair, correct=pair.incorrect, incorrect=pair.correct)
        first, second = float(rule(pair, pair.correct)), float(rule(pair, pair.incorrect))
        _hold(math.isfinite(first) and math.isfinite(second), "a score is not finite.")
        _hold(
            (first, second)
            == (float(rule(swapped, pair.correct)), float(rule(swapped, pair.incorrect))),
            "the rule looks at which side a text stands on. It may use the question and the text, "
            "nothing else.",
        )
        outcomes.append(0.5 if first == second else float(first > second))
    found = summarize(outcomes, 2000, run.config.seed)
    low, high = found["ci95"]
    _hold(
        abs(float(accuracy) - found["value"]) < 0.005,
        "the rule is a fair one, but its accuracy on the training pairs is another (as a fraction, "
        "ties count one half).",
    )
    sees = "nothing beyond chance" if low <= 0.5 <= high else "something that DPO can find, too"
    return f"a fair rule; with an interval from {low:.0%} to {high:.0%} it sees {sees}."


# --- 02 ------------------------------------------------------------------------------------------


def _beta_rises(run: Run, answer: Any, policy: Policy | None) -> str:
    betas, goal = (0.01, 0.1, 1.0), 0.1
    found = _numbers(answer, len(betas))
    _hold(all(value > 0 for value in found), "the chosen log-probability has to rise.")
    zero = torch.zeros(1, dtype=torch.float64)
    for beta, rise in zip(betas, found, strict=True):
        loss = preference_loss(zero + rise, zero, zero, zero, beta)[0].item()
        _hold(
            loss < goal * 1.1,
            f"for beta {beta:g} the loss is still {loss:.3f} after that rise. Is the range that "
            "you look at long enough?",
        )
        _hold(
            loss > goal * 0.9, f"for beta {beta:g} the loss is below {goal} earlier than you say."
        )
    return "now read the three as one rule: how does the rise depend on beta?"


def _level_errors(run: Run, answer: Any, policy: Policy | None) -> str:
    from bitsandbytes.functional import get_4bit_type

    found = _numbers(answer, 2)
    weight = _base(run, policy).model.get_input_embeddings().weight.detach().float().cpu()
    blocks = weight[:64].reshape(-1, 64)
    scales = blocks.abs().max(dim=1, keepdim=True).values
    whole, by_block = [], []
    for levels in (get_4bit_type("nf4", device="cpu"), torch.linspace(-1, 1, 16)):
        codes = ((blocks / scales).unsqueeze(2) - levels).abs().argmin(dim=2)
        off = levels[codes] * scales - blocks
        whole.append((off.norm() / blocks.norm()).item())
        by_block.append((off.norm(dim=1) / blocks.norm(dim=1)).mean().item())
    _hold(max(found) < 1, "give fractions, not percent.")
    _hold(
        not any(_near(found[::-1], w, 0.003) for w in (whole, by_block)),
        "these are the two numbers, in the other order: NF4 first.",
    )
    _hold(
        any(_near(found, w, 0.003) for w in (whole, by_block)),
        "at least one error is another one. Same blocks, same scales (the largest absolute value "
        "of each block), the nearest level; error relative to the weights' norm.",
    )
    return f"NF4's error is {1 - found[0] / found[1]:.0%} smaller on these weights."


def _positive_loss(run: Run, answer: Any, policy: Policy | None) -> str:
    _hold(callable(answer), "hand in the function itself, without calling it.")
    beta = 0.1
    chosen, rejected = torch.tensor([-20.0]), torch.tensor([-24.0])

    def both(up: float, down: float) -> tuple[float, float]:
        four = (chosen + up, rejected + down, chosen, rejected)
        return float(answer(*four, beta)), preference_loss(*four, beta)[0].item()

    for up, down in ((0.0, 0.0), (5.0, 0.0), (0.0, -5.0), (0.0, 3.0)):
        ours, plain = both(up, down)
        _hold(
            abs(ours - plain) < 1e-4,
            "where the chosen answer has not fallen, the loss must be DPO's own.",
        )
    (fell, plain), (fell_more, _) = both(-1.0, -5.0), both(-2.0, -6.0)
    _hold(fell > plain + 1e-4, "a fallen chosen answer costs nothing extra yet.")
    _hold(fell_more > fell + 1e-4, "falling further has to cost more.")
    moves = [both(*move)[0] for move in ((5.0, 0.0), (0.0, -5.0), (-5.0, -15.0))]
    _hold(
        moves[2] == max(moves),
        "pushing both down is still not the worst of the three moves: weigh the new term more.",
    )
    moving = (chosen - 3.0).requires_grad_()
    slope = torch.autograd.grad(answer(moving, rejected, chosen, rejected, beta).sum(), moving)[0]
    _hold(slope.item() < 0, "the gradient does not pull a fallen chosen answer up again.")
    return "it is DPO where nothing is lost, and no longer won by pushing both answers down."


# --- 03 ------------------------------------------------------------------------------------------


def _last_round(run: Run) -> int:
    return planned_iterations(run)[-1]


def _changed_similarity(run: Run, answer: Any, policy: Policy | None) -> str:
    before = {p.id: p.correct for p in run_pairs(run, 0)[0]}
    later = run_pairs(run, _last_round(run))[0]
    changed = sorted(
        ngram_f1(before[p.id], p.correct)
        for p in later
        if p.id in before and p.correct != before[p.id]
    )
    wanted = changed[:3]
    found = _numbers(answer, len(wanted))
    _hold(
        not _near(sorted(found), changed[::-1][: len(wanted)][::-1], 0.005) or changed[3:] == [],
        "these changed least. A similarity of 1 means equal.",
    )
    _hold(
        _near(sorted(found), wanted, 0.005),
        "these are not the lowest similarities. Compare round 1 with the last round, training "
        "pairs only, and only answers that differ.",
    )
    return f"{len(changed)} of {len(later)} correct answers changed."


def _held_out_scores(
    run: Run, iteration: int | None, round_of_pairs: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the log-probabilities of a round's held-out pairs under one of the models."""
    policy, settings = load_model(run, iteration), run.config.dpo
    data = tokenize_pairs(
        policy.tokenizer,
        run_pairs(run, round_of_pairs)[1],
        prompt_format=settings.prompt_format,
        max_prompt_length=settings.max_prompt_length,
        max_length=settings.max_length,
    )
    chosen, rejected = reference_log_probs(policy, data.examples, progress=False)
    return np.array(chosen), np.array(rejected)


def _consistency(run: Run, answer: Any, policy: Policy | None) -> str:
    found = _numbers(answer, 2)
    _hold(all(0 <= value <= 1 for value in found), "give two shares between 0 and 1.")
    wanted, unsure = [], []
    for t in (None, _last_round(run)):
        chosen, rejected = _held_out_scores(run, t, 0)
        wanted.append(float((chosen > rejected).mean()))
        # Pairs that rounding could tip either way.
        unsure.append(float((np.abs(chosen - rejected) < ROUNDING).mean()))
    slack = [part + 0.005 for part in unsure]
    near = [abs(f - w) <= s for f, w, s in zip(found, wanted, slack, strict=True)]
    turned = [abs(f - w) <= s for f, w, s in zip(found[::-1], wanted, slack, strict=True)]
    _hold(all(near) or not all(turned), "in the other order: base first.")
    _hold(
        all(near),
        "at least one share is another one. The held-out pairs of round 1, summed "
        "log-probabilities, base and the last round.",
    )
    return "whether that is more than luck, only the paired interval tells."


def _base_reference(run: Run, answer: Any, policy: Policy | None) -> str:
    log = [dict(row) for row in answer]
    held = [row for row in log if row["split"] == "held_out"]
    _hold(len(held) >= 2, "the log needs held-out rows, first and last: hand in `report.log`.")
    last = _last_round(run)
    _hold(last > 0, "this run has one round only; the exercise is about a later one.")
    own = [row for row in read_jsonl(run.training_log(last)) if row["split"] == "held_out"]
    slack = run.config.dpo.beta * ROUNDING
    _hold(held != own, "this is the log of the run itself; train the round a second time.")
    _hold(
        abs(held[0]["logp_chosen"] - own[0]["logp_chosen"]) < 2 * ROUNDING,
        "the policy starts from somewhere else than the run's own round did: pass the previous "
        "round's adapter, and that round's pairs.",
    )
    # Before the first step, policy and reference differ by what the earlier rounds did.
    first = held[0]["margin"]
    contrasts = [_held_out_scores(run, t, last) for t in (None, last - 1)]
    before, reached = (run.config.dpo.beta * float((c - r).mean()) for c, r in contrasts)
    _hold(
        abs(first - (reached - before)) < 2 * slack,
        "the first margin does not fit a reference that is the base model.",
    )
    return f"the round starts at a margin of {first:+.3f}: what the rounds before it had won."


# --- 04 ------------------------------------------------------------------------------------------


def _measured(run: Run) -> list[tuple[tuple[Item, ...], list[Any], list[Any]]]:
    """Return (items, base, kept round) of each measured benchmark for truthfulness."""
    labels = (model_label(None), model_label(final_iteration(run)))
    settings, found = run.config.evaluation, []
    for name in ("truthfulqa_mc", "probe"):
        files = [run.evaluation(label, name) for label in labels]
        if all(path.exists() for path in files):
            test = load_benchmark(name, limit=settings.limit, seed=run.config.seed)
            found.append((tuple(test.items), *(read_json(path)["items"] for path in files)))
    _hold(bool(found), "the run has no evaluation of base and kept round yet: run section 3.")
    return found


def _movers(run: Run, answer: Any, policy: Policy | None) -> str:
    rose, fell = (sorted(int(index) for index in part) for part in answer)
    _hold(len(set(rose)) == len(set(fell)) == 3, "three different items on each side.")
    for items, before, after in _measured(run):
        moved = np.array(
            [b["metrics"]["mc2"] - a["metrics"]["mc2"] for a, b in zip(before, after, strict=True)]
        )
        if max(rose + fell) >= len(items) or min(rose + fell) < 0:
            continue
        order = np.sort(moved)
        # By value, not by item: equally large changes are equally right.
        if _near(np.sort(moved[fell]), order[:3], 1e-9) and _near(
            np.sort(moved[rose]), order[-3:], 1e-9
        ):
            return "these moved most. A story about them needs other items to be tested on."
        if _near(np.sort(moved[rose]), order[:3], 1e-9):
            raise _NotYetError("rose and fell are exchanged.")
    raise _NotYetError(
        "other items moved further. Positions in `test.items`, counted from 0; MC2 after minus "
        "before."
    )


def _mean_mc1(run: Run, answer: Any, policy: Policy | None) -> str:
    found = _numbers(answer, 2)
    _hold(all(0 <= value <= 1 for value in found), "give two fractions between 0 and 1.")
    for items, before, after in _measured(run):
        wanted, by_sum = [], []
        for rows in (before, after):
            means, sums = [], []
            for item, row in zip(items, rows, strict=True):
                gold = item.mc1.index(item.gold)
                means.append(mc1([row["scores"][i] / row["tokens"][i] for i in item.mc1], gold))
                sums.append(mc1([row["scores"][i] for i in item.mc1], gold))
            wanted.append(float(np.mean(means)))
            by_sum.append(float(np.mean(sums)))
        if _near(found, wanted, 0.001):
            return "does the paired interval tell the same story as by the sum?"
        _hold(not _near(found, by_sum, 0.001), "this is MC1 by the sum, as it was.")
    raise _NotYetError(
        "at least one is another one. Only the choices in `item.mc1`, each score divided by its "
        "own number of tokens."
    )


def _power_curve(run: Run, answer: Any, policy: Policy | None) -> str:
    curve = {int(n): float(share) for n, share in dict(answer).items()}
    _hold(len(curve) >= 3, "at least three numbers of items are wanted.")
    _hold(all(0 <= share <= 1 for share in curve.values()), "each share lies between 0 and 1.")
    _hold(max(curve.values()) >= 0.7, "the curve ends too early: it never comes near 80 %.")
    sizes = sorted(curve)
    sizes = sorted({sizes[0], sizes[len(sizes) // 2], sizes[-1]})
    for _, before, after in _measured(run):
        moved = np.array([b["metrics"]["mc2"] for b in after]) - np.array(
            [a["metrics"]["mc2"] for a in before]
        )
        shifted = moved - moved.mean() + 0.02
        simulated = [_power(shifted, n, run.config.seed) for n in sizes]
        # Two simulations of some two hundred tests each differ by chance.
        if _near([curve[n] for n in sizes], simulated, 0.15):
            return "the simulation here finds the same shares, up to chance."
    raise _NotYetError(
        "the simulation here finds other shares. Are the differences shifted so that their true "
        "mean is 0.02, and drawn with repetition?"
    )


def _power(shifted: np.ndarray, n: int, seed: int, simulations: int = 200) -> float:
    """Return the share of simulated tests of ``n`` items whose interval does not hold 0."""
    rng, found = np.random.default_rng([seed, n]), 0
    for _ in range(simulations):
        means = bootstrap_means(rng.choice(shifted, n), 200, int(rng.integers(2**31)))
        low, high = interval(means)
        found += low > 0 or high < 0
    return found / simulations


# --- 05 ------------------------------------------------------------------------------------------


def _metric_items(run: Run, answer: Any, policy: Policy | None) -> str:
    first, second, *found = answer
    _hold(len(found) == 2, "two trials and two numbers of items are wanted.")
    name, wanted = run.config.evaluation.benchmarks[0], []
    for metric in ("mc1", "mc2"):
        values = [
            [float(item["metrics"][metric]) for item in trial.result(name)["items"]]
            for trial in (first, second)
        ]
        spread = float(np.std(np.subtract(values[1], values[0]), ddof=1))
        wanted.append(items_needed(0.02, spread) if spread else None)
    for value, right, metric in zip(found, wanted, ("MC1", "MC2"), strict=True):
        _hold(
            (value is None) == (right is None),
            f"by {metric}: None where no item changed (there is no spread then), else a number.",
        )
        _hold(
            right is None or abs(float(value) - right) <= 1 + 0.02 * right,
            f"another number of items by {metric}. The spread is the standard deviation of the "
            "paired differences, second minus first; the effect is 0.02.",
        )
    if None in wanted:
        return "and where no item changed, this test cannot say how many it would take."
    return f"MC{1 if wanted[0] < wanted[1] else 2} needs fewer. Why?"


def _interaction(run: Run, answer: Any, policy: Policy | None) -> str:
    folder = notebooks_dir()
    _hold(folder is not None, "the record lies beside the notebooks, and they are not here.")
    record = list(read_jsonl(folder / "appendix" / "recipe_search.jsonl"))[1:]
    same = ("pairs", "prompt_format", "targets", "beta", "loss", "label_smoothing")
    gains: dict[bool, list[float]] = {True: [], False: []}
    for a in record:
        for b in record:
            rates = (a["learning_rate"], b["learning_rate"])
            if rates == (2e-4, 1e-3) and all(a[key] == b[key] for key in same):
                annotated = a["pairs"].startswith("annotated")
                gains[annotated].append(b["arc_dev_acc"] - a["arc_dev_acc"])
    wanted = [float(np.mean(gains[kind])) for kind in (True, False)]
    found = _numbers(answer, 2)
    _hold(not _near(found[::-1], wanted, 0.05), "in the other order: annotated first.")
    _hold(
        _near(found, wanted, 0.05),
        "at least one mean is another one. ARC in points, 1e-3 minus 2e-4, rounds that differ in "
        "the learning rate only.",
    )
    return f"{len(gains[True])} and {len(gains[False])} matched pairs: few, so mind the intervals."


def _equal_steps(run: Run, answer: Any, policy: Policy | None) -> str:
    plain = {"loop.iterations": run.config.loop.iterations, "dpo.steps": run.config.dpo.steps}
    first, second = ({**plain, **dict(design)} for design in answer)
    steps = [int(d["loop.iterations"]) * int(d["dpo.steps"]) for d in (first, second)]
    _hold(
        first["loop.iterations"] != second["loop.iterations"],
        "both have the same number of rounds, so both see the same kind of pairs.",
    )
    _hold(
        steps[0] == steps[1],
        f"one trains {steps[0]} steps in all, the other {steps[1]}: that stays confounded.",
    )
    others = {key for d in (first, second) for key in d if first.get(key) != second.get(key)}
    others -= plain.keys()
    _hold(not others, f"they also differ in {', '.join(sorted(others))}: one change at a time.")
    return "equal steps, different pairs. What is still confounded is yours to say."


# --- 06 ------------------------------------------------------------------------------------------


def _micro_batch(run: Run, answer: Any, policy: Policy | None) -> str:
    found = _numbers(answer, 2)
    config, device = load_config("paper-llama2"), costs.DEVICES["T4"]
    batch = config.dpo.batch_size
    _hold(
        all(n >= 1 and batch % n == 0 for n in found),
        f"give two whole numbers that divide dpo.batch_size={batch}; other settings are refused.",
    )

    def needed(pairs: float, checkpointing: bool) -> float:
        dpo = replace(config.dpo, micro_batch_size=int(pairs), gradient_checkpointing=checkpointing)
        parts = costs.training_memory(
            shape_of(config.model),
            config.lora,
            dpo,
            device,
            dtype=device.dtype,
            quantization=costs.stored_quantization(config, device),
            pair_tokens=LONG_PAIR,
        )
        return sum(parts.values())

    sizes = [n for n in range(1, batch + 1) if batch % n == 0]
    wanted = [
        max((n for n in sizes if needed(n, kept) <= device.memory), default=0)
        for kept in (False, True)
    ]
    _hold(
        found != wanted[::-1] or wanted[0] == wanted[1],
        "in the other order: without checkpointing first.",
    )
    for value, right, kept in zip(found, wanted, (False, True), strict=True):
        which = "with" if kept else "without"
        _hold(
            value <= right,
            f"{which} checkpointing, {value:.0f} pairs need {needed(value, kept) / 1e9:.1f} GB. A "
            f"T4 has {device.memory / 1e9:.0f} GB (of 1e9 bytes), and computes in float16.",
        )
        _hold(value >= right, f"{which} checkpointing there is room for more pairs.")
    first, second = needed(wanted[0], False) / 1e9, needed(wanted[1], True) / 1e9
    return f"predicted to take {first:.1f} and {second:.1f} GB."


def _eight_gpus(run: Run, answer: Any, policy: Policy | None) -> str:
    speed_up, stage = answer
    config, found = load_config("paper-llama2"), float(speed_up)
    one, eight = (costs.estimate(config, costs.DEVICES[name]) for name in ("H100", "8xH100"))
    wanted = costs.total(one).seconds / costs.total(eight).seconds
    gains = {a.name: a.seconds / b.seconds for a, b in zip(one, eight, strict=True)}
    mean = float(np.mean(list(gains.values())))
    _hold(abs(found * wanted - 1) > 0.02, "upside down: the time of one GPU over that of eight.")
    _hold(
        abs(found / mean - 1) > 0.02 or abs(mean / wanted - 1) < 0.02,
        "this is the mean of the stages' own speed-ups. Long stages count for more: add up the "
        "times first.",
    )
    _hold(
        abs(found / wanted - 1) < 0.02,
        "another speed-up. The seconds of all stages of paper-llama2, on H100 and on 8xH100.",
    )
    _hold(stage in gains, f'no stage is called "{stage}"{did_you_mean(str(stage), gains)}.')
    _hold(
        gains[stage] < 1.01 * min(gains.values()),
        f'"{stage}" becomes {gains[stage]:.1f} times as fast; another stage gains less.',
    )
    return f"the stage becomes {gains[stage]:.2f} times as fast: it mostly loads the model."


def _backward_share(run: Run, answer: Any, policy: Policy | None) -> str:
    found = _numbers(answer, 2)
    wanted = [_backward_over_forward(run, everything=every) for every in (False, True)]
    slack = 0.08  # kernels differ in what is counted of attention
    _hold(not _near(found[::-1], wanted, slack), "in the other order: the adapter first.")
    _hold(
        not _near(found, [1 / ratio for ratio in wanted], slack),
        "upside down: backward over forward.",
    )
    _hold(
        not _near(found, [ratio + 1 for ratio in wanted], slack),
        "there is one forward pass too many in the backward's count. Is gradient checkpointing on, "
        "or the whole step in one counter?",
    )
    _hold(
        abs(found[0] - wanted[1]) > slack,
        "the first is the ratio of a base that is trained too. Freeze it: only the adapter may "
        "require a gradient.",
    )
    _hold(
        abs(found[1] - wanted[0]) > slack,
        "the second is the ratio of a frozen base. Let every weight require a gradient before the "
        "forward pass.",
    )
    rows, tokens = COUNTED
    _hold(
        _near(found, wanted, slack),
        f"at least one is another one. Take {rows} rows of {tokens} tokens, and a loss that every "
        "place of the output enters.",
    )
    return f"freezing the base saves {1 - (1 + wanted[0]) / (1 + wanted[1]):.0%} of a step."


def _backward_over_forward(run: Run, *, everything: bool) -> float:
    """Count both passes of a model of the run's shape; no weight is stored, nothing computed."""
    from peft import LoraConfig as PeftLora
    from peft import get_peft_model
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = shape_of(run.config.model)
    sizes = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        vocab_size=shape.vocabulary,
        tie_word_embeddings=shape.tied,
        attn_implementation="eager",  # of plain products, which are all counted
    )
    with torch.device("meta"):
        model: torch.nn.Module = LlamaForCausalLM(sizes)
        if not everything:
            targets = shape.lora_targets(run.config.lora)
            settings = PeftLora(r=run.config.lora.r, target_modules=targets)
            with quiet_transformers():
                model = get_peft_model(model, settings)
        rows, tokens = COUNTED
        ids = torch.zeros(rows, tokens, dtype=torch.long)
        mask = torch.zeros(rows, 1, tokens, tokens)  # given, or it would be looked for in the ids
        with FlopCounterMode(display=False) as forward:
            loss = model(input_ids=ids, attention_mask=mask, use_cache=False).logits.sum()
        with FlopCounterMode(display=False) as backward:
            loss.backward()
    return backward.get_total_flops() / forward.get_total_flops()


EXERCISES: Mapping[str, Exercise] = {
    "00.easy": Exercise("(question, true answer, false answer), three texts", _own_question),
    "00.medium": Exercise("three differences, one for each comparison of section 3", _ant_mean),
    "00.hard": Exercise("four gains in nats, in the order of the four answers", _ant_information),
    "01.easy": Exercise("a list of your verdicts, 1 or 0, in the order of the draw", _by_hand),
    "01.medium": Exercise("the counts, such as Counter(verdicts)", _zero_shot),
    "01.hard": Exercise("(your function, its accuracy)", _blind_rule),
    "02.easy": Exercise("three rises in nats, for beta 0.01, 0.1 and 1", _beta_rises),
    "02.medium": Exercise("(error of NF4, error of even levels), as fractions", _level_errors),
    "02.hard": Exercise("your function, called as preference_loss is", _positive_loss),
    "03.easy": Exercise("the three lowest similarities", _changed_similarity),
    "03.medium": Exercise("(share for the base model, share for the last round)", _consistency),
    "03.hard": Exercise("the log of your second round, `report.log`", _base_reference),
    "04.easy": Exercise("(three positions that rose most, three that fell most)", _movers),
    "04.medium": Exercise("(MC1 by the mean before, after), as fractions", _mean_mc1),
    "04.hard": Exercise("{number of items: share that finds the effect}", _power_curve),
    "05.easy": Exercise(
        "(trial, other trial, items needed by MC1, by MC2), None where it cannot be said",
        _metric_items,
    ),
    "05.medium": Exercise("(mean gain with annotated pairs, with self-made ones)", _interaction),
    "05.hard": Exercise("two designs, as settings: ({...}, {...})", _equal_steps),
    "06.easy": Exercise("(pairs without checkpointing, pairs with it)", _micro_batch),
    "06.medium": Exercise("(speed-up of the whole run, name of a stage)", _eight_gpus),
    "06.hard": Exercise(
        "(backward over forward with an adapter, the same with all weights trained)",
        _backward_share,
    ),
}
