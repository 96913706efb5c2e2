"""A conversation as text, by the model's own chat template, and how an answer stands in it.

Nothing is known here of any family of models: a probe conversation, rendered once, shows how the
template opens the assistant's turn and how it closes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING

from grath_utils.errors import ModelError, reason_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, str]

# Some templates write today's date into the prompt: on another day, the same seed would give other
# answers. They are given this day, which is the one that Llama 3's template takes without a clock.
DAY = datetime(2024, 7, 26)
QUESTION, ANSWER = "probe-question", "probe-answer"


@dataclass(frozen=True)
class AnswerForm:
    """What a model's answer stands between."""

    header: str  # ends a prompt: what stands between the template's generation prompt and an answer
    lead: str  # the spaces after that: they belong to the answer's first word
    end: str  # the token after the answer, see :func:`end_of_answer`


def render_chat(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> str:
    """Return the chat as text that ends where the assistant's next answer begins.

    That is the template's generation prompt and what, in its own conversations, it writes between
    that and an answer: mostly nothing; for some the whole opening of the turn, a line break, an
    empty thought, the name of a channel. The model need not write it, and training has it too.

    A tokenizer without a chat template (a base model) gets ``User:`` and ``Assistant:`` lines.

    Raises:
        ModelError: the template refuses the conversation, or leaves out what is said in it.
    """
    if tokenizer.chat_template:
        return _render(tokenizer, messages, prompt=True) + answer_form(tokenizer).header
    turns = [f"{m['role'].capitalize()}: {m['content']}\n" for m in messages]
    return f"{''.join(turns)}Assistant:"


def answer_form(tokenizer: PreTrainedTokenizerBase) -> AnswerForm:
    """Return what an answer stands between; raises what :func:`render_chat` raises."""
    return _answer_form(tokenizer, str(tokenizer.chat_template or ""), tokenizer.eos_token or "")


@lru_cache(maxsize=4)
def _answer_form(tokenizer: PreTrainedTokenizerBase, template: str, eos: str) -> AnswerForm:
    if not template:
        return AnswerForm("", " ", eos)
    asked = [{"role": "user", "content": QUESTION}]
    answered = [*asked, {"role": "assistant", "content": ANSWER}]
    prompt = _render(tokenizer, asked, prompt=True)
    before, found, after = _render(tokenizer, answered, prompt=False).rpartition(ANSWER)
    if not found or QUESTION not in prompt:
        lost = "assistant" if QUESTION in prompt else "user"
        raise ModelError(
            f"the model's chat template leaves out what the {lost} says; use a model whose "
            "template takes plain text, not text in parts as beside images"
        )
    between = before.removeprefix(prompt) if before.startswith(prompt) else ""
    header, after = between.rstrip(" "), after.lstrip()
    ends = [token for token in (eos, *tokenizer.get_added_vocab()) if after.startswith(token)]
    end = max(filter(None, ends), key=len, default=eos)
    return AnswerForm(header, between[len(header) :], end)


def end_of_answer(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the token that ends an answer, or "" if there is none.

    It is the template's end of turn, which follows the assistant's words in a rendered conversation
    (``<end_of_turn>`` of Gemma, ``<|end|>`` of Phi, where ``eos_token`` is another one); without a
    template, or if no token follows there, it is ``eos_token``.
    """
    try:
        return answer_form(tokenizer).end
    except ModelError:  # a template that cannot be used; not every text is a chat
        return tokenizer.eos_token or ""


def end_ids(tokenizer: PreTrainedTokenizerBase, listed: int | Sequence[int] | None) -> set[int]:
    """Return every token that ends a completion.

    These are the model's own (``listed``: its ``generation_config.eos_token_id``), the tokenizer's
    and the template's.
    """
    ends = {*listed} if isinstance(listed, Sequence) else {listed}
    if end := end_of_answer(tokenizer):
        ends.add(tokenizer.convert_tokens_to_ids(end))
    return {*ends, tokenizer.eos_token_id} - {None}


def _render(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, prompt: bool
) -> str:
    # A model that can think before it answers is asked not to: answers are short here.
    options = {"tokenize": False, "add_generation_prompt": prompt, "enable_thinking": False}
    try:
        template = _without_clock(tokenizer.get_chat_template())
        return tokenizer.apply_chat_template(list(messages), chat_template=template, **options)
    except Exception as error:  # a template is a program: it may fail in any way
        raise ModelError(
            "the model's chat template cannot write a conversation in which user and assistant "
            f"take turns: {reason_of(error)}"
        ) from error


def _without_clock(template: str) -> str:
    """Return the template with a ``strftime_now`` of its own, which always says the same day."""
    if "strftime_now" not in template:
        return template
    filters = "".join(f"|replace('%{c}','{DAY.strftime(f'%{c}')}')" for c in "aAbBdHIjmMpSyY")
    macro = f"{{% macro strftime_now(form) %}}{{{{ form|replace('%-','%'){filters} }}}}"
    return f"{macro}{{% endmacro %}}\n{template}"  # the template's own first line stays one
