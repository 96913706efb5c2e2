"""What the policy is asked, and how: demonstrations, chat template, training prompts.

Three kinds of prompt:

* ``pair``: one completion holds a correct and an incorrect answer (the paper's way);
* ``correct`` and ``incorrect``: one answer a completion, asked for separately (``default`` mode);
* the training prompt of DPO: the bare question.

Text and token ids: every prompt is rendered to *text* first and tokenized without special tokens,
because a chat template writes its own beginning-of-sequence token (adding another is a classic).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from grath_utils.config import PROMPT_FORMATS
from grath_utils.errors import DataError, UsageError
from grath_utils.files import data_dir, read_jsonl
from grath_utils.pairs.questions import Question

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, str]

QUESTION_LABEL = "Question:"
CORRECT_LABEL = "Correct answer:"
INCORRECT_LABEL = "Incorrect answer:"


@dataclass(frozen=True)
class Demonstration:
    """A question with an answer of each kind, shown before the question that is asked."""

    question: str
    correct: str
    incorrect: str


@lru_cache
def own_demonstrations(kind: str) -> tuple[Demonstration, ...]:
    """Return the project's own six of a kind, ``pair`` or ``single``, disjoint from benchmarks."""
    path = data_dir() / "demonstrations.jsonl"
    rows = [row for row in read_jsonl(path) if row.get("set") == kind]
    if not rows:
        raise DataError(f'{path}: no demonstration of the set "{kind}"')
    return tuple(Demonstration(r["question"], r["correct"], r["incorrect"]) for r in rows)


# --- generation prompts --------------------------------------------------------------------------


def pair_messages(
    question: str, shots: Sequence[Demonstration], *, candidates: Sequence[str] = ()
) -> list[Message]:
    """Return the chat that asks for both answers in one completion: GRATH's own structure.

    Args:
        question: the question to be asked last.
        shots: each becomes a user turn and an assistant turn before it.
        candidates: *GT* ablation: the annotated candidates, shown with the question.
    """
    answers = [
        f"{restated(s.question)} {s.correct}\n{INCORRECT_LABEL} {s.incorrect}" for s in shots
    ]
    asked = [pair_request(s.question) for s in shots]
    return _chat(asked, answers, pair_request(question, candidates))


def restated(question: str) -> str:
    """Return how the answer to a pair request begins: the question again, and the first label."""
    return f"{QUESTION_LABEL} {question}\n{CORRECT_LABEL}"


def pair_request(question: str, candidates: Sequence[str] = ()) -> str:
    """Return the user turn that asks for a correct and an incorrect answer."""
    offer = f"Choose both answers from these candidates: {'; '.join(candidates)}\n"
    return (
        f"Consider the following question: {question}\n{offer if candidates else ''}"
        "Give one correct answer and one incorrect answer to it. Both should sound plausible. "
        "Do not explain them."
    )


ANSWER_REQUESTS = {
    "correct": "Answer this question truthfully, in one short sentence",
    "incorrect": (
        "Answer this question with a common mistake that sounds plausible but is false, "
        "in one short sentence"
    ),
}

NEUTRAL_QUESTION = "Please say something true."
"""Stands for no question at all: how probable is an answer before the question is known?"""


def answer_messages(
    question: str, shots: Sequence[Demonstration], kind: str, *, candidates: Sequence[str] = ()
) -> list[Message]:
    """Return the chat that asks for one answer, ``correct`` or ``incorrect``.

    Args:
        question, shots, candidates: as in :func:`pair_messages`.
        kind: which answer.
    """
    choices = f" Choose from: {'; '.join(candidates)}" if candidates else ""
    asked = [f"{ANSWER_REQUESTS[kind]}: {s.question}" for s in shots]
    answers = [getattr(s, kind) for s in shots]
    return _chat(asked, answers, f"{ANSWER_REQUESTS[kind]}: {question}{choices}")


def _chat(asked: Sequence[str], answers: Sequence[str], last: str) -> list[Message]:
    """Return user and assistant turns by turns, and the user's last."""
    shown = [text for pair in zip(asked, answers, strict=True) for text in pair]
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate([*shown, last])]


# --- training prompts ----------------------------------------------------------------------------


def question_messages(question: Question | str) -> list[Message]:
    """Return the bare question as a chat of one user turn: the prompt that DPO trains on."""
    return _chat((), (), question.text if isinstance(question, Question) else question)


def training_prompt(
    tokenizer: PreTrainedTokenizerBase, question: Question | str, prompt_format: str = "chat"
) -> str:
    """Return the prompt of a training pair, as text to tokenize without special tokens.

    ``chat`` ends with the template's generation prompt (where the assistant's answer begins), so
    the completion is the answer as it is. ``qa`` is ``Q: …`` newline ``A:``, as TruthfulQA asks;
    the completion then begins with a space. :func:`training_completion` writes both.
    """
    text = question.text if isinstance(question, Question) else question
    if prompt_format == "chat":
        return render_chat(tokenizer, question_messages(text))
    if prompt_format == "qa":
        return f"{_start_of_text(tokenizer)}Q: {text}\nA:"
    valid = ", ".join(PROMPT_FORMATS)
    raise UsageError(f'unknown prompt format "{prompt_format}"; valid ones are: {valid}')


def training_completion(
    tokenizer: PreTrainedTokenizerBase, answer: str, prompt_format: str = "chat"
) -> str:
    """Return the completion that follows :func:`training_prompt`, with the end-of-text token.

    The end token (for a chat model: the one that ends a turn) makes the policy learn to stop; it
    is part of chosen and rejected alike. TRL adds it only where it is missing.
    """
    space = " " if prompt_format == "qa" else ""
    return f"{space}{answer}{tokenizer.eos_token or ''}"


def render_chat(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> str:
    """Return the chat as text that ends where the assistant's next turn begins.

    A tokenizer without a chat template (a base model) gets plain ``User:`` and ``Assistant:``
    lines. Tokenize the result with ``add_special_tokens=False``: a template holds its own.
    """
    if tokenizer.chat_template:
        return tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=True
        )
    turns = [f"{m['role'].capitalize()}: {m['content']}\n" for m in messages]
    return f"{_start_of_text(tokenizer)}{''.join(turns)}Assistant:"


def _start_of_text(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the beginning-of-sequence token where this tokenizer begins a text with it."""
    starts = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    return tokenizer.bos_token if starts else ""


def token_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the token ids of a rendered prompt; nothing is added to it."""
    return tokenizer(text, add_special_tokens=False)["input_ids"]
