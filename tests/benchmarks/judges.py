"""How well each judge tells the project's sealed answers apart, kind by kind.

The record ``notebooks/appendix/recipe_sealed.jsonl`` is what ``--model small --every 2 --out FILE``
writes for the package's judges. Beside them stand four that cost more, or have more to go by. They
are on trial (``recipe_sealed_trials.jsonl``), and become a row of the package if they earn it:

- ``shown``: ``exam`` after eight solved questions (of those that are not tried), half of each kind;
- ``agreed``: ``exam`` after the eight questions that the model itself was surest of, each with the
  answer that the model gave: labels that predict each other, a single step of arXiv 2506.10139;
- ``reasons``: the model writes two sentences first, in both orders, and then the letter;
- ``unanimous``: the least sure of ``letters``, ``exam`` and ``sceptic`` has the say.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

from grath_utils import engine
from grath_utils.config import ModelConfig, PairsConfig
from grath_utils.engine import Policy, load_base
from grath_utils.files import read_jsonl, write_jsonl
from grath_utils.pairs import JUDGES, read_sealed
from grath_utils.pairs.judge import (
    Ask,
    Case,
    Judge,
    exam_question,
    letters_question,
    mean_of_orders,
)
from grath_utils.pairs.labels import Sealed
from grath_utils.pairs.prompts import bare_answer, training_prompt

SHOWN = 8  # solved questions before the one that is asked
REASON_TOKENS = 60


class Trial(NamedTuple):
    """How a judge did on pairs of which it is known which answer is true."""

    pairs: int
    right: int  # of all of them: the true answer was given more than a half
    kept: int  # enough for :func:`.verdict` to keep the pair as it was, or turned round
    kept_right: int


def try_judge(
    policy: Policy, config: PairsConfig, judge: Judge, answers: dict[str, Sealed]
) -> Trial:
    """Ask a judge about answers that it has not written, and count its hits."""
    cases = [Case(name, known.question, known[1:3]) for name, known in answers.items()]
    truths = [float(shares[0]) for shares in judge.weigh(policy, cases)]
    kept = [p for p in truths if p >= config.judge_keep or p <= config.judge_swap]
    right = [sum(p > 0.5 for p in each) for each in (truths, kept)]
    return Trial(len(truths), right[0], len(kept), right[1])


def solved(case: Case, right: int, place: int) -> str:
    """Return a question as in a test, with its solution: the right answer in a place."""
    options = case.options if right == place else case.options[::-1]
    return f"{exam_question(case.question, options)} {'AB'[place]}"


def after(solutions: list[str]) -> Ask:
    """Return ``exam`` with some solved questions before it."""
    return lambda question, options: "\n\n".join([*solutions, exam_question(question, options)])


def shown(untried: dict[str, Sealed]) -> Judge:
    """Return the judge that has seen solved questions, of those that are not tried."""
    kinds = [[c for c in untried.items() if c[1].kind == k] for k in ("plain", "misconception")]
    chosen = [kind[i * len(kind) // SHOWN] for i in range(SHOWN // 2) for kind in kinds]
    solutions = [
        solved(Case(name, known.question, known[1:3]), 0, i // 2 % 2)
        for i, (name, known) in enumerate(chosen)
    ]
    return Judge(name="shown", summary="", asks=(after(solutions),))


def agreed(policy: Policy, untried: dict[str, Sealed]) -> Judge:
    """Return the judge that has seen what it was surest of itself."""
    cases = [Case(name, known.question, known[1:3]) for name, known in untried.items()]
    shares = JUDGES["exam"].weigh(policy, cases)
    surest = sorted(range(len(cases)), key=lambda i: -max(shares[i]))[:SHOWN]
    solutions = [
        solved(cases[i], int(np.argmax(shares[i])), place % 2) for place, i in enumerate(surest)
    ]
    return Judge(name="agreed", summary="", asks=(after(solutions),))


def by_reasons(ask: Ask, policy: Policy, cases: list[Case]) -> list[np.ndarray]:
    """Return the probability of both options: by their letters, after reasons that it writes."""
    tokenizer, prompts = policy.tokenizer, []
    for case in cases:
        for shown in (case.options, case.options[::-1]):
            asked = ask(case.question, shown).rpartition("\n")[0]
            prompts.append(
                f"{asked}\nWhich answer is true? Give your reasons in one or two sentences first, "
                "then reply with A or B."
            )
    rendered = [training_prompt(tokenizer, prompt) for prompt in prompts]
    stop = engine.Stop.at("\n")
    said = engine.generate(policy, rendered, max_new_tokens=REASON_TOKENS, stop=stop)
    begun = [
        f"{prompt}{bare_answer(tokenizer, reason.text.strip())}\nSo the true answer is"
        for prompt, reason in zip(rendered, said, strict=True)
    ]
    requests = [
        engine.Request(prompt, f" {letter}", f"prompt {number}")
        for number, prompt in enumerate(begun)
        for letter in "AB"
    ]
    scores = [score.logprob for score in engine.score_completions(policy, requests)]
    return [mean_of_orders(orders) for orders in np.reshape(scores, (-1, 2, 2))]


class Unanimous(Judge):
    """Three prompts, of which the least sure has the say; a half where they differ."""

    def weigh(self, policy: Policy, cases: list[Case]) -> list[np.ndarray]:
        """Return the probability of both options of each case."""
        asked = [JUDGES[name].weigh(policy, cases) for name in ("letters", "exam", "sceptic")]
        found = []
        for shares in zip(*asked, strict=True):
            first = [float(share[0]) for share in shares]
            agree = min(first) > 0.5 or max(first) < 0.5
            least = min(shares, key=lambda share: abs(share[0] - 0.5))
            found.append(least if agree else np.full(2, 0.5))
        return found


def main() -> None:
    """Print a line for each judge and kind, and write them."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="small")
    parser.add_argument("--judges", nargs="+", default=[*JUDGES, *OTHERS])
    parser.add_argument("--every", type=int, default=1, help="try each N-th question only")
    parser.add_argument("--out", type=Path, help="rows of other judges in it stay")
    given = parser.parse_args()
    if given.every < 2 and {"shown", "agreed"} & set(given.judges):
        parser.error("judges that are shown questions need some that are not tried: --every 2")
    policy = load_base(ModelConfig(name=given.model, dtype="bfloat16"))
    known = read_sealed()
    tried = dict(list(known.items())[:: given.every])
    untried = {name: sealed for name, sealed in known.items() if name not in tried}
    for name in given.judges:
        judge = JUDGES[name] if name in JUDGES else OTHERS[name](policy, untried)
        for kind in ("plain", "misconception"):
            some = {k: sealed for k, sealed in tried.items() if sealed.kind == kind}
            begun = time.perf_counter()
            config = PairsConfig(judge="letters")  # for its thresholds
            trial = try_judge(policy, config, judge, some)
            row = {
                "judge": name,
                "kind": kind,
                **trial._asdict(),
                "keep": config.judge_keep,
                "swap": config.judge_swap,
                "prompts_a_pair": judge.scored,
            }
            took = (time.perf_counter() - begun) / trial.pairs
            print(row, f"{took:.2f} s a pair", flush=True)
            if given.out:
                rows = read_jsonl(given.out) if given.out.exists() else []
                others = [r for r in rows if (r["judge"], r["kind"]) != (name, kind)]
                write_jsonl(given.out, [*others, row])


OTHERS = {
    "shown": lambda policy, untried: shown(untried),
    "agreed": agreed,
    "reasons": lambda policy, untried: Judge(
        name="reasons", summary="", asks=(letters_question,), by=by_reasons
    ),
    "unanimous": lambda policy, untried: Unanimous(
        name="unanimous", summary="", asks=(letters_question,) * 3
    ),
}


if __name__ == "__main__":
    main()
