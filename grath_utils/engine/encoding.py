"""Text to token ids: one rule for generation, training, reference and scoring.

A text begins as the tokenizer begins every text, as a rule with BOS or with nothing, and exactly
once: where a chat template has written that beginning, it is not written again. Where a template
leaves it out (Zephyr), it is added all the same: lm-evaluation-harness (``HFLM.tok_encode``) and
llama.cpp do so, and so Zephyr was trained (alignment-handbook, src/alignment/data.py: rendered as
text, tokenized as any text). ``apply_chat_template(tokenize=True)``, TRL's chats and vLLM do not.
Nothing is ever appended to a text.

Prompt and completion are encoded as *one* text; what lies beyond the length of the encoded prompt
is the completion (``TemplateLM._encode_pair`` in lm_eval/api/model.py). Where a token spans the
boundary, the prompt's own encoding is kept. To score (:func:`encode_requests`), trailing spaces of
the prompt move to the completion first, and a spanning token's request is marked, both as there. To
train (:func:`encode_answers`) the prompt stays what the model sees when it generates, and after a
spanning token the completion is encoded apart, so that nothing of it is lost.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from grath_utils.errors import ModelError, ScoringError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from grath_utils.engine.models import Policy

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
        ScoringError: a request is empty or longer than ``max_length`` tokens; the item is named.
    """
    texts: list[tuple[str, str]] = []
    first: dict[tuple[str, str], Request] = {}  # of each distinct text, the first request
    for request in requests:
        if not request.completion:
            raise ScoringError(f"item {request.item}: an empty completion cannot be scored")
        prompt = request.prompt.rstrip()
        texts.append((prompt, request.prompt[len(prompt) :] + request.completion))
        first.setdefault(texts[-1], request)
    prompts = list(dict.fromkeys(prompt for prompt, _ in first))
    heads = dict(zip(prompts, encode_texts(tokenizer, prompts), strict=True))
    # What stands in the place of an empty prompt, where the tokenizer writes no start itself.
    start = [i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id) if i is not None][:1]

    encoded: dict[tuple[str, str], Encoded] = {}
    for text, whole in zip(first, encode_texts(tokenizer, map("".join, first)), strict=True):
        prompt, item = text[0], f"item {first[text].item}"
        given = len(heads[prompt]) > 0
        head = heads[prompt] if given else np.array(start, dtype=np.int32)
        if not len(head):
            raise ScoringError(
                f"{item}: the prompt is empty, and the tokenizer has no token for the start of a "
                "text to put in its place"
            )
        same = np.array_equal(whole[: len(head)], head)
        tail = whole[len(head) :] if given or same else whole
        this = Encoded(head, tuple(tail.tolist()), straddles=given and not same)
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


def encode_answers(
    tokenizer: PreTrainedTokenizerBase, prompt: str, answers: Sequence[str]
) -> tuple[tuple[int, ...], list[tuple[int, ...]]]:
    """Return the ids of a prompt, and those of each answer that goes on after it."""
    texts = [prompt, *(prompt + answer for answer in answers)]
    head, *joint = (tuple(ids.tolist()) for ids in encode_texts(tokenizer, texts))
    return head, [
        whole[len(head) :] if whole[: len(head)] == head else encode_apart(tokenizer, [answer])[0]
        for whole, answer in zip(joint, answers, strict=True)
    ]


def encode_apart(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[tuple[int, ...]]:
    """Return the ids of texts in the middle of others, whatever stands before each."""
    # After a newline, as SentencePiece puts a space before the first word of a text.
    line, *found = _encode_bare(tokenizer, ["\n", *(f"\n{text}" for text in texts), *texts])
    return [
        tuple(joint[len(line) :] if line and joint[: len(line)] == line else alone)
        for joint, alone in zip(found[: len(texts)], found[len(texts) :], strict=True)
    ]


def token_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the token ids of one text, as the model is given it."""
    return next(encode_texts(tokenizer, [text])).tolist()


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> Iterator[np.ndarray]:
    """Yield each text's token ids (int32), with the beginning that the tokenizer gives a text."""
    start = start_ids(tokenizer)
    rest = iter(texts)
    while batch := list(islice(rest, TEXTS_AT_ONCE)):
        for ids in _encode_bare(tokenizer, batch):
            place = ids.index(start[0]) if start and start[0] in ids else 0
            begun = ids[place : place + len(start)] == start
            # A template may begin with white space of its own ("▁" to SentencePiece).
            begun &= not tokenizer.decode(ids[:place]).strip(" \n\t▁")
            yield np.array(ids if begun else [*start, *ids], dtype=np.int32)


def _encode_bare(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Return the ids of texts to which nothing is added, the special tokens in them read as such.

    Some configurations say otherwise; then a chat template's tokens would be so many letters.
    """
    options = {"add_special_tokens": False, "split_special_tokens": False}
    return tokenizer(texts, **options, return_attention_mask=False, verbose=False)["input_ids"]


def start_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return what the tokenizer puts before every text: BOS, some other tokens, or nothing."""
    [plain], whole = _encode_bare(tokenizer, ["a"]), tokenizer("a")["input_ids"]
    for place in range(len(whole) if plain else 0):
        if whole[place : place + len(plain)] == plain:
            return whole[:place]
    # A vocabulary in which the letter is nothing at all: only special tokens are there.
    bos = tokenizer.bos_token_id
    return whole[: whole.index(bos) + 1] if bos in whole else []


def refuse_unknown_ids(policy: Policy, sequences: Iterable[Sequence[int] | np.ndarray]) -> None:
    """Raise a ModelError if the model's embedding has no row for one of the ids."""
    rows = policy.model.get_input_embeddings().num_embeddings
    largest = max((int(np.max(ids)) for ids in sequences if len(ids)), default=0)
    if largest >= rows:
        raise ModelError(
            f"the tokenizer of {policy.name} gives token {largest} "
            f"({policy.tokenizer.convert_ids_to_tokens(largest)!r}), and the model has embeddings "
            f"for {rows} only: the tokenizer belongs to another model, or tokens were "
            "added to it without resize_token_embeddings"
        )
