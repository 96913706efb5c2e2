"""Prompt and completion to token ids, exactly as lm-evaluation-harness splits them.

The rule (``TemplateLM._encode_pair`` in lm_eval/api/model.py): trailing spaces of the prompt move
to the completion; prompt + completion is encoded as one text, and what lies beyond the length of
the encoded prompt is the completion. Where a token spans the boundary the prompt's own encoding is
kept, as there, and the request is marked.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from grath_utils.errors import ScoringError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEXTS_AT_ONCE = 512


@dataclass(frozen=True)
class Request:
    """One completion to be scored after one prompt."""

    prompt: str
    completion: str
    item: str
    """Id of the item that it belongs to, for messages."""


@dataclass(frozen=True, eq=False)
class Encoded:
    """Token ids of a request."""

    prompt: np.ndarray
    """(tokens,) int32; requests with the same prompt hold the same array."""
    completion: tuple[int, ...]
    straddles: bool
    """A token of the joint text spans the boundary, so the split is a convention."""

    @property
    def length(self) -> int:
        """Number of tokens that the model reads: all but the last, which is only predicted."""
        return len(self.prompt) + len(self.completion) - 1

    @property
    def inputs(self) -> np.ndarray:
        """(length,) int32: what the model reads."""
        return np.concatenate([self.prompt, np.array(self.completion[:-1], dtype=np.int32)])


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
    if requests and not getattr(tokenizer, "is_fast", False):
        raise ScoringError(
            f"item {requests[0].item}: the tokenizer gives no character offsets, so where the "
            "prompt ends cannot be told; use a model with a fast tokenizer (tokenizer.json)"
        )
    texts = []
    for request in requests:
        if not request.completion:
            raise ScoringError(f"item {request.item}: an empty completion cannot be scored")
        prompt = request.prompt.rstrip()
        texts.append((prompt, request.prompt[len(prompt) :] + request.completion))

    prompts = list(dict.fromkeys(prompt for prompt, _ in texts if prompt))
    heads = dict(zip(prompts, encode_texts(tokenizer, prompts), strict=True))
    start = _start_token(tokenizer)
    if start is not None:  # what an empty prompt is conditioned on: the start of a text
        heads[""] = np.array([start], dtype=np.int32)
    for request, (prompt, _) in zip(requests, texts, strict=True):
        if prompt not in heads:
            raise ScoringError(
                f"item {request.item}: the prompt is empty, and the tokenizer has no token for the "
                "start of a text to put in its place"
            )

    distinct = list(dict.fromkeys(texts))
    encoded: dict[tuple[str, str], Encoded] = {}
    wholes = encode_texts(tokenizer, (prompt + completion for prompt, completion in distinct))
    for (prompt, completion), whole in zip(distinct, wholes, strict=True):
        head = heads[prompt]
        same = np.array_equal(whole[: len(head)], head)
        tail = whole[len(head) :] if prompt or same else whole
        encoded[prompt, completion] = Encoded(
            head, tuple(tail.tolist()), straddles=bool(prompt) and not same
        )
    for request, text in zip(requests, texts, strict=True):
        if not encoded[text].completion:
            raise ScoringError(
                f"item {request.item}: the completion {request.completion!r} holds no token of its "
                "own, so it has no probability"
            )
        if encoded[text].length > max_length:
            raise ScoringError(
                f"item {request.item}: prompt and completion are {encoded[text].length} tokens, "
                f"and the model takes {max_length}; fewer shots, or a model with a longer context, "
                "are needed (nothing is cut off silently)"
            )
    return [encoded[text] for text in texts]


def _start_token(tokenizer: PreTrainedTokenizerBase) -> int | None:
    start = tokenizer.bos_token_id
    return tokenizer.eos_token_id if start is None else start


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> Iterator[np.ndarray]:
    """Yield each text's token ids (int32); one that begins with the BOS text gets no second BOS.

    A few texts are encoded at a time: lists of Python integers take ten times the memory.
    """
    start = _start_token(tokenizer)
    bos = None if start is None else tokenizer.decode([start])
    rest = iter(texts)
    while batch := list(islice(rest, TEXTS_AT_ONCE)):
        ids: dict[str, np.ndarray] = {}
        for given in (True, False):
            group = [text for text in batch if (bos is not None and text.startswith(bos)) == given]
            if group:
                encodings = tokenizer(
                    group, add_special_tokens=not given, return_attention_mask=False, verbose=False
                )["input_ids"]
                ids |= {
                    text: np.array(found, dtype=np.int32)
                    for text, found in zip(group, encodings, strict=True)
                }
        yield from (ids[text] for text in batch)
