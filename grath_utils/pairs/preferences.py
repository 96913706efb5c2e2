"""A pair, and its form in other tools: ``prompt``, ``chosen`` and ``rejected``.

*Conversational*, each is a list of messages, to which TRL applies the chat template; *plain*, each
is a text, around which LLaMA-Factory and axolotl put theirs. axolotl (``chat_template.default``
with ``field_messages: prompt``) takes either.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from grath_utils.errors import DataError, brief

FORMS = ("conversational", "plain")
# Where other tools keep what stands before a question, or belongs to it.
ELSEWHERE = ("system", "history", "tools", "images", "input")
ONE_TURN = "a question has one, without a system prompt or earlier turns: leave such rows out"
OPINIONS = {  # what is known of a pair beside its texts, as a form for files.check_form
    "contrast": (float, None),
    "truth": (float, None),
    "swapped": (bool, None),
}
MARKS = {"iteration": int, **OPINIONS}


@dataclass(frozen=True)
class Pair:
    """A question with a correct and an incorrect answer, both by the policy: one DPO example."""

    id: str  # the question's id
    question: str
    correct: str
    incorrect: str
    iteration: int = 0  # that wrote the correct answer; the incorrect one is always the first
    contrast: float | None = None
    """How far apart the model itself places the two answers, in the modes that ask it."""
    truth: float | None = None
    """The judge's probability that the correct answer is the true one of those it was shown."""
    swapped: bool | None = None
    """The judge has exchanged the two answers; None where there is no judge."""

    @property
    def text(self) -> str:
        """The question, by the name that it has in a :class:`.Question`."""
        return self.question

    def to_row(self) -> dict[str, Any]:
        """Return one row of ``pairs.jsonl``."""
        return {key: value for key, value in vars(self).items() if value is not None}


def preference_row(pair: Pair, form: str) -> dict[str, Any]:
    """Return a pair in one of :data:`FORMS`, followed by what else is known of it."""
    sides = {"prompt": pair.question, "chosen": pair.correct, "rejected": pair.incorrect}
    if form == "conversational":
        sides = {
            key: [{"role": "user" if key == "prompt" else "assistant", "content": text}]
            for key, text in sides.items()
        }
    texts = ("question", "correct", "incorrect")
    return sides | {k: v for k, v in sorted(pair.to_row().items()) if k not in texts}


def is_preference(row: Mapping[str, Any]) -> bool:
    """Return True for a row of other tools, which has two answers by other names than ours."""
    return {"chosen", "rejected"} <= row.keys() and "correct" not in row


def own_row(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return a row of other tools with our names: ``question``, ``correct``, ``incorrect``.

    The prompt may also begin both conversations, as in UltraFeedback and Argilla's data sets.

    Raises:
        DataError: it has no prompt or more than one turn; what and where is said.
    """
    prompt = row.get("prompt", row.get("question"))
    for key in ELSEWHERE:
        if row.get(key) not in (None, "", "[]", [], {}):
            raise DataError(f'{where}: "{key}" stands beside the prompt; {ONE_TURN}')
    sides = {key: row[key] for key in ("chosen", "rejected")}
    for key, side in sides.items():
        if isinstance(side, list) and len(side) > 1:  # the conversation from its beginning
            *asked, answer = side
            if isinstance(prompt, list) and prompt != asked:
                raise DataError(f'{where}: "chosen" and "rejected" do not answer the same')
            words = _text(asked, "user", f'{where}: "{key}"')
            if isinstance(prompt, str) and prompt.strip() != words:
                raise DataError(f'{where}: "prompt" is not what "{key}" answers')
            prompt, sides[key] = asked, [answer]
    question = _text(prompt, "user", f'{where}: "prompt"')
    correct, incorrect = (_text(sides[k], "assistant", f'{where}: "{k}"') for k in sides)
    own = {key: value for key, value in row.items() if key not in ("prompt", *sides)}
    return {**own, "question": question, "correct": correct, "incorrect": incorrect}


def _text(value: Any, role: str, where: str) -> str:
    """Return a text, or that of a conversation's only message, without space around it."""
    if isinstance(value, list) and len(value) > 1:
        raise DataError(f"{where} has {len(value)} messages; {ONE_TURN}")
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], Mapping):
        if value[0].get("role") != role:
            raise DataError(f'{where} is not by the {role} but by "{value[0].get("role")}"')
        if more := [k for k, v in value[0].items() if v and k not in ("role", "content")]:
            raise DataError(f'{where} has "{more[0]}" beside its content; leave such rows out')
        value = value[0].get("content")
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{where} is missing or no text; found {brief(value)}")
    return value.strip()
