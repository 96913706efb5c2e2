"""What the tests of pairs share: questions, a script in the model's place, an interruption."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path

import pytest

from grath_utils import engine
from grath_utils.config import PairsConfig
from grath_utils.engine.generation import Completion
from grath_utils.pairs import generate as pairs_module
from grath_utils.pairs.generate import generate_pairs
from grath_utils.pairs.questions import Question

QUESTIONS = [Question(f"q{i}", f"Why does thing number {i} fall down?") for i in range(10)]
PAPER = PairsConfig(mode="paper", shots=1, batch_size=1)  # chunks of four questions
DEFAULT = PairsConfig(shots=1, batch_size=4, candidates=2, max_new_tokens=16)
ANNOTATED = [
    Question("a", "What falls?", ("a stone", "a hill", "a lake"), 0),
    Question("b", "What burns?", ("water", "dry wood", "a pebble"), 1),
]


def completion(text: str, finished: str = "eos") -> Completion:
    return Completion(text, tuple(range(len(text.split()))), finished)


class Scripted:
    """Stands for `generate`: answers by what the prompt asks, and counts its prompts."""

    def __init__(self, answer=None):
        self.answer = answer or self.default
        self.asked: list[str] = []

    @staticmethod
    def default(number: int) -> Completion:
        if number == 3:
            return completion("I would rather not.")
        if number == 5:
            return completion("Correct answer: Wind.\nIncorrect answer: wind\n")
        return completion(f"Correct answer: Force {number}.\nIncorrect answer: Magic {number}.\n")

    def __call__(self, policy, prompts, **_):
        texts = [policy.tokenizer.decode(ids) for ids in prompts]
        self.asked += texts
        return [self.answer(int(text.rsplit("number ", 1)[1].split()[0])) for text in texts]


def answering(monkeypatch, script) -> None:
    """Let a script stand for the model."""

    def together(policy, orders, **_):
        return [script(policy, order.prompts, keys=order.keys) for order in orders]

    monkeypatch.setattr(engine, "generate_together", together)


def make(policy, folder: Path, config=PAPER, questions=QUESTIONS, **options):
    return generate_pairs(
        policy,
        questions,
        config,
        out=folder / "pairs.jsonl",
        rejects=folder / "rejects.jsonl",
        **{"seed": 0, "progress": False, **options},
    )


def refine(policy, folder: Path, previous, config=PAPER, iteration=1, questions=QUESTIONS):
    return make(policy, folder, config, questions, previous=previous, iteration=iteration)


class Killed(BaseException):
    """As if the process had been killed: nothing catches it."""


@contextmanager
def killed_after(chunks: int):
    real, finished = pairs_module.Journal.append, []

    def append(self, number, rows):
        if len(finished) == chunks:
            raise Killed
        real(self, number, rows)
        finished.append(number)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(pairs_module.Journal, "append", append)
        yield


def read_all(folder: Path) -> list[bytes]:
    return [(folder / name).read_bytes() for name in ("pairs.jsonl", "rejects.jsonl")]
