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

TEXTS_AT_ONCE = 512  # lists of Python integers take ten times the memory of arrays


@dataclass(frozen=True)
class Request:
    """One completion to be scored after one prompt."""

    prompt: str
    completion: str
    item: str  # id of the item that it belongs to, for messages


@dataclass(frozen=True, eq=False)
class Encoded:
    """Token ids of a request."""

    prompt: np.ndarray  # (tokens,) int32; requests with the same prompt hold the same array
    completion: tuple[int, ...]
    straddles: bool  # a token of the joint text spans the boundary: the split is a convention

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

    Raises:
        ScoringError: a request is empty or longer than ``max_length`` tokens, or the tokenizer is a
            slow one; the item is named.
    """
    if requests and not getattr(tokenizer, "is_fast", False):
        raise ScoringError(
            f"item {requests[0].item}: the tokenizer gives no character offsets, so where the "
            "prompt ends cannot be told; use a model with a fast tokenizer (tokenizer.json)"
        )
    texts: list[tuple[str, str]] = []
    first: dict[tuple[str, str], Request] = {}  # of each distinct text, the first request
    for request in requests:
        if not request.completion:
            raise ScoringError(f"item {request.item}: an empty completion cannot be scored")
        prompt = request.prompt.rstrip()
        texts.append((prompt, request.prompt[len(prompt) :] + request.completion))
        first.setdefault(texts[-1], request)
    prompts = list(dict.fromkeys(prompt for prompt, _ in first if prompt))
    heads = dict(zip(prompts, encode_texts(tokenizer, prompts), strict=True))
    start = _start_token(tokenizer)
    if start is not None:  # what an empty prompt is conditioned on: the start of a text
        heads[""] = np.array([start], dtype=np.int32)

    encoded: dict[tuple[str, str], Encoded] = {}
    for text, whole in zip(first, encode_texts(tokenizer, map("".join, first)), strict=True):
        prompt, item = text[0], f"item {first[text].item}"
        if prompt not in heads:
            raise ScoringError(
                f"{item}: the prompt is empty, and the tokenizer has no token for the start of a "
                "text to put in its place"
            )
        head = heads[prompt]
        same = np.array_equal(whole[: len(head)], head)
        tail = whole[len(head) :] if prompt or same else whole
        this = Encoded(head, tuple(tail.tolist()), straddles=bool(prompt) and not same)
        encoded[text] = this
        if not this.completion:
            raise ScoringError(
                f"{item}: the completion {first[text].completion!r} holds no token of its own, "
                "so it has no probability"
            )
        if this.length > max_length:
            raise ScoringError(
                f"{item}: prompt and completion are {this.length} tokens, and the model takes "
                f"{max_length}; fewer shots, or a model with a longer context, are needed "
                "(nothing is cut off silently)"
            )
    return [encoded[text] for text in texts]


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> Iterator[np.ndarray]:
    """Yield each text's token ids (int32); one that begins with the BOS text gets no second BOS."""
    start = _start_token(tokenizer)
    bos = None if start is None else tokenizer.decode([start])
    rest = iter(texts)
    while batch := list(islice(rest, TEXTS_AT_ONCE)):
        ids: dict[str, np.ndarray] = {}
        for given in (True, False):
            group = [text for text in batch if (bos is not None and text.startswith(bos)) == given]
            if group:
                options = {"return_attention_mask": False, "verbose": False}
                found = tokenizer(group, add_special_tokens=not given, **options)["input_ids"]
                ids |= {t: np.array(i, dtype=np.int32) for t, i in zip(group, found, strict=True)}
        yield from (ids[text] for text in batch)


def _start_token(tokenizer: PreTrainedTokenizerBase) -> int | None:
    return tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
