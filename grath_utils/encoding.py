"""Prompt and completion to token ids, exactly as lm-evaluation-harness splits them.

The rule (``TemplateLM._encode_pair`` in lm_eval/api/model.py): trailing spaces of the prompt move
to the completion; prompt + completion is encoded as one text, and what lies beyond the length of
the encoded prompt is the completion. Where a token spans the boundary the prompt's own encoding is
kept, as there, and the request is marked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from grath_utils.errors import ScoringError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Request:
    """One completion to be scored after one prompt."""

    prompt: str
    completion: str
    item: str
    """Id of the item that it belongs to, for messages."""


@dataclass(frozen=True)
class Encoded:
    """Token ids of a request."""

    prompt: tuple[int, ...]
    completion: tuple[int, ...]
    straddles: bool
    """A token of the joint text spans the boundary, so the split is a convention."""

    @property
    def inputs(self) -> tuple[int, ...]:
        """What the model reads: all but the last token, which is only predicted."""
        return (self.prompt + self.completion)[:-1]


def encode_requests(
    tokenizer: PreTrainedTokenizerBase, requests: Sequence[Request], max_length: int
) -> list[Encoded]:
    """Encode requests; each distinct text is tokenized once.

    Args:
        tokenizer: a fast tokenizer, with its own rule on adding a BOS token.
        requests: what to encode.
        max_length: the longest input that the model takes, in tokens.

    Raises:
        ScoringError: names the item, where a request is empty or too long, or where the tokenizer
            is a slow one, without the character offsets that tell where a prompt ends.
    """
    if not requests:
        return []
    if not getattr(tokenizer, "is_fast", False):
        raise ScoringError(
            f"item {requests[0].item}: the tokenizer gives no character offsets, so where the "
            "prompt ends cannot be told; use a model with a fast tokenizer (tokenizer.json)"
        )
    pairs = [_move_spaces(request) for request in requests]
    start = _start_token(tokenizer)
    texts = dict.fromkeys(prompt for prompt, _ in pairs if prompt)
    texts |= dict.fromkeys(prompt + completion for prompt, completion in pairs)
    ids = dict(zip(texts, encode_texts(tokenizer, list(texts)), strict=True))

    encoded = []
    for request, (prompt, completion) in zip(requests, pairs, strict=True):
        whole = ids[prompt + completion]
        if prompt:
            head = ids[prompt]
            tail = whole[len(head) :]
        else:  # nothing to condition on but the start of a text
            head = (start,)
            tail = whole[1:] if whole[:1] == head else whole
        if not tail:
            raise ScoringError(
                f"item {request.item}: the completion {request.completion!r} holds no token of "
                "its own, so it has no probability"
            )
        if len(head) + len(tail) - 1 > max_length:
            raise ScoringError(
                f"item {request.item}: prompt and completion are {len(head) + len(tail) - 1} "
                f"tokens, and the model takes {max_length}; fewer shots, or a model with a longer "
                "context, are needed (nothing is cut off silently)"
            )
        encoded.append(Encoded(head, tail, straddles=bool(prompt) and whole[: len(head)] != head))
    return encoded


def _move_spaces(request: Request) -> tuple[str, str]:
    if not request.completion:
        raise ScoringError(f"item {request.item}: an empty completion cannot be scored")
    prompt = request.prompt.rstrip()
    return prompt, request.prompt[len(prompt) :] + request.completion


def _start_token(tokenizer: PreTrainedTokenizerBase) -> int:
    start = tokenizer.bos_token_id
    return tokenizer.eos_token_id if start is None else start


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[tuple[int, ...]]:
    """Encode texts; one that already begins with the BOS text gets no second BOS."""
    start_text = tokenizer.decode([_start_token(tokenizer)])
    ids: dict[str, tuple[int, ...]] = {}
    for given in (True, False):
        group = [text for text in texts if text.startswith(start_text) == given]
        if group:
            encodings = tokenizer(
                group, add_special_tokens=not given, return_attention_mask=False, verbose=False
            )["input_ids"]
            ids |= {text: tuple(e) for text, e in zip(group, encodings, strict=True)}
    return [ids[text] for text in texts]
