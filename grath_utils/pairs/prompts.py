"""What the policy is asked, and how: demonstrations, chat template, training prompts.

A prompt of the kind ``pair`` asks for both answers in one completion (the paper's way), ``correct``
and ``incorrect`` for one of them; the training prompt of DPO is the bare question. All are rendered
to *text*; :mod:`grath_utils.engine.encoding` has the one rule by which text becomes token ids.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from grath_utils import engine
from grath_utils.config import PROMPT_FORMATS
from grath_utils.engine.chat import Message, answer_form, end_of_answer, render_chat
from grath_utils.errors import UsageError, did_you_mean
from grath_utils.files import data_dir, read_jsonl
from grath_utils.pairs.questions import Question

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REQUESTS = {
    "correct": "Answer this question truthfully, in one short sentence: {question}{choices}",
    "incorrect": "Answer this question with a common mistake that sounds plausible but is false, "
    "in one short sentence: {question}{choices}",
    "pair": "Consider the following question: {question}\n{choices}Give one correct answer and one "
    "incorrect answer to it. Both should sound plausible. Do not explain them.",
}
CHOICES = {"pair": "Choose both answers from these candidates: {}\n"}
GROUND_TRUTH = "A correct answer is known: {correct}\nSo is an incorrect answer: {incorrect}\n"
NEUTRAL_QUESTION = "Please say something true."  # stands for no question at all


@dataclass(frozen=True)
class Demonstration:
    """A question with an answer of each kind, shown before the question that is asked."""

    question: str
    correct: str
    incorrect: str
    candidates: tuple[str, ...] = ()  # *GT* ablation: a right answer and a wrong one, in short


@dataclass(frozen=True)
class Labels:
    """What begins each line of an answer to a pair request."""

    question: str = "Question:"
    correct: str = "Correct answer:"
    incorrect: str = "Incorrect answer:"


@dataclass(frozen=True)
class Wording:
    """The words of a pair request: our own, or those of a file (:mod:`.prompt_file`)."""

    instruction: str = REQUESTS["pair"]
    ground_truth: str | None = REQUESTS["pair"].replace("{choices}", GROUND_TRUTH)
    labels: Labels = Labels()
    demonstrations: tuple[Demonstration, ...] = ()


@lru_cache
def own_demonstrations(kind: str) -> tuple[Demonstration, ...]:
    """Return the project's own six for pairs, or six for single answers, none from a benchmark."""
    wanted = "pair" if kind == "pair" else "single"
    rows = [row for row in read_jsonl(data_dir() / "demonstrations.jsonl") if row["set"] == wanted]
    return tuple(Demonstration(r["question"], r["correct"], r["incorrect"]) for r in rows)


def pair_messages(
    question: str, shots: Sequence[Demonstration], *, candidates: Sequence[str] = ()
) -> list[Message]:
    """Return the chat that asks for both answers in one completion: GRATH's own structure."""
    return answer_messages(question, shots, "pair", candidates=candidates)


def answer_messages(
    question: str,
    shots: Sequence[Demonstration],
    kind: str,
    *,
    candidates: Sequence[str] = (),
    truth: Sequence[str] = (),
    wording: Wording = Wording(),
) -> list[Message]:
    """Return the chat that asks for a ``correct`` answer, an ``incorrect`` one, or a ``pair``.

    Each of the shots becomes a user turn and an assistant turn before the question. The candidates
    are shown with it, none marked. For pairs in the *GT* ablation, ``truth`` is an annotated answer
    and a wrong one, shown as such; each demonstration then shows its own.
    """
    request = REQUESTS[kind]
    if kind == "pair":
        request = (truth and wording.ground_truth) or wording.instruction
    messages = []
    for shot in shots:
        answer = pair_answer(shot, wording.labels) if kind == "pair" else getattr(shot, kind)
        known = shot.candidates or (shot.correct, shot.incorrect)
        asked = _filled(request, question=shot.question, known=known)
        messages += [_turn("user", asked), _turn("assistant", answer)]
    choices = CHOICES.get(kind, " Choose from: {}").format("; ".join(candidates))
    shown = choices if candidates else ""
    return [*messages, _turn("user", _filled(request, question, shown, truth))]


def _filled(request: str, question: str, choices: str = "", known: Sequence[str] = ()) -> str:
    """Return a request with each {name} that stands for something replaced, other braces kept."""
    values = dict(zip(("correct", "incorrect"), known, strict=False))
    values |= {"question": question, "choices": choices}
    return re.sub(r"\{(\w+)\}", lambda found: values.get(found[1], found[0]), request)


def pair_answer(shot: Demonstration, labels: Labels) -> str:
    """Return what a demonstration answers to a pair request."""
    return f"{restated(shot.question, labels)} {shot.correct}\n{labels.incorrect} {shot.incorrect}"


def restated(question: str, labels: Labels) -> str:
    """Return how the answer to a pair request begins: the question again, and the first label."""
    return f"{labels.question} {question}\n{labels.correct}"


def _turn(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def question_messages(question: Question | str) -> list[Message]:
    """Return the bare question as a chat of one user turn: the prompt that DPO trains on."""
    return [_turn("user", question.text if isinstance(question, Question) else question)]


def training_prompt(
    tokenizer: PreTrainedTokenizerBase, question: Question | str, prompt_format: str = "chat"
) -> str:
    """Return the prompt of a training pair: the chat template, or TruthfulQA's ``Q: …`` and ``A:``.

    :func:`training_completion` writes what follows it.
    """
    messages = question_messages(question)
    if prompt_format == "chat":
        return render_chat(tokenizer, messages)
    if prompt_format == "qa":
        return f"Q: {messages[0]['content']}\nA:"
    near = did_you_mean(prompt_format, PROMPT_FORMATS)
    raise UsageError(f'unknown prompt format "{prompt_format}"{near}')


def training_completion(
    tokenizer: PreTrainedTokenizerBase, answer: str, prompt_format: str = "chat"
) -> str:
    """Return the completion that follows :func:`training_prompt`, with the token that ends it.

    The end token makes the policy learn to stop.
    """
    said = f" {answer}" if prompt_format == "qa" else bare_answer(tokenizer, answer)
    return f"{said}{end_of_answer(tokenizer)}"


def bare_answer(tokenizer: PreTrainedTokenizerBase, answer: str) -> str:
    """Return how an answer begins that follows :func:`.render_chat`; it may go on."""
    return f"{answer_form(tokenizer).lead}{answer}"


def training_request(
    tokenizer: PreTrainedTokenizerBase,
    question: Question | str,
    answer: str,
    prompt_format: str = "chat",
    *,
    item: str,
) -> engine.Request:
    """Return a request to score an answer as training does."""
    prompt = training_prompt(tokenizer, question, prompt_format)
    return engine.Request(prompt, training_completion(tokenizer, answer, prompt_format), item)


def token_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the token ids of a rendered prompt, as the model is given it."""
    return engine.token_ids(tokenizer, text)
