"""Batched decoding: many completions at once, of prompts that mostly begin alike.

What the prompts have in common (the demonstrations) is computed once and shared
(:mod:`.shared_prefix`). The rest runs with continuous batching: a finished sequence
leaves its slot at once and the next prompt takes it, so no step is spent on padding. Greedy
decoding gives what ``model.generate`` gives, up to floating-point ties.

A model whose attention cannot share a prefix is run in plain padded batches: slower, the same
completions; a warning says so.
"""

from __future__ import annotations

import sys
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from grath_utils.engine.shared_prefix import (
    SharedPrefixCache,
    compute_prefix,
    shared_prefix,
    why_not_shared,
)
from grath_utils.errors import GrathError, UsageError
from grath_utils.files import fingerprint

if TYPE_CHECKING:
    from grath_utils.engine.models import Policy

PREFILL_TOKENS = 1024
"""Prompt tokens computed in one pass; more would only need more memory."""

METHODS = ("auto", "shared", "plain")


@dataclass(frozen=True)
class Completion:
    """What the policy wrote after a prompt."""

    text: str
    """Without the end-of-sequence token."""
    token_ids: tuple[int, ...]
    finished: str
    """``eos``, ``stop`` (the stop condition held) or ``length`` (the token limit was reached)."""


@dataclass(frozen=True)
class Stop:
    """A condition on the text so far that ends a completion."""

    reached: Callable[[str], bool]
    trigger: str = ""
    """Ask only after a token that contains this (such as a newline): asking each time costs."""
    strings: tuple[str, ...] = ()
    """The strings that end it, where that is the whole condition: other engines know no other."""

    @classmethod
    def at(cls, *strings: str) -> Stop:
        """Stop as soon as one of the strings has been written; it stays in the text."""
        trigger = "\n" if strings == ("\n",) else ""
        return cls(lambda text: any(s in text for s in strings), trigger, strings)


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn; ``temperature`` 0 is greedy."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 50
    """Only the most probable tokens are drawn from; 0 = all of them (slower)."""

    def __post_init__(self) -> None:
        if self.temperature < 0 or not 0 < self.top_p <= 1 or self.top_k < 0:
            raise UsageError(f"impossible sampling options: {self}")


@dataclass(frozen=True)
class Prefix:
    """The beginning that prompts share, computed once; made by :func:`shared_beginning`."""

    token_ids: tuple[int, ...]
    layers: list[tuple[torch.Tensor, torch.Tensor]] = field(repr=False)


def generate(
    policy: Policy,
    prompts: Sequence[str] | Sequence[Sequence[int]],
    *,
    prefix: Prefix | None = None,
    max_new_tokens: int = 100,
    stop: Stop | None = None,
    batch_size: int = 64,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 50,
    seed: int = 0,
    keys: Sequence[str] | None = None,
    drafts: Sequence[str] | Sequence[Sequence[int]] | None = None,
    method: str = "auto",
    progress: bool = False,
) -> list[Completion]:
    """Return one completion for each prompt, in the order of the prompts.

    Args:
        policy: any causal language model.
        prompts: rendered text (tokenized without special tokens), or token ids.
        prefix: the computed beginning of all prompts, to use in several calls; None finds it.
        max_new_tokens: longest completion.
        stop: ends a completion early.
        batch_size: sequences decoded together.
        do_sample, temperature, top_p, top_k: greedy unless ``do_sample``.
        seed, keys: each sequence draws from its own stream, named by the seed and its key (its
            position if none is given): who else is in the batch does not matter.
        drafts: greedy only: for each prompt, how its completion may well begin. A right guess is
            computed at once, like a prompt; a wrong one changes nothing but the time.
        method: ``shared``, ``plain``, or ``auto`` (shared where the model can).
        progress: show a bar.

    Raises:
        UsageError: an empty prompt, or one that leaves no room in the model's context.
        GrathError: the model's logits are not finite.
    """
    if method not in METHODS:
        raise UsageError(f'unknown method "{method}"; valid ones are: {", ".join(METHODS)}')
    sampling = Sampling(temperature if do_sample else 0.0, top_p, top_k)
    encoded = encode_prompts(policy, prompts, max_new_tokens)
    if not encoded:
        return []
    keys = [str(i) for i in range(len(encoded))] if keys is None else keys
    if drafts is not None and do_sample:
        raise UsageError("drafts are for greedy decoding")
    guesses = [[]] * len(encoded) if drafts is None else [_encode(policy, d) for d in drafts]
    ends = end_token_ids(policy)
    options = _Options(policy, max_new_tokens, stop, sampling, ends, batch_size)
    sequences = [
        _Sequence(
            i,
            ids,
            options,
            _stream(seed, key, max_new_tokens) if do_sample else None,
            guess[: max_new_tokens - 1],
        )
        for i, (ids, key, guess) in enumerate(zip(encoded, keys, guesses, strict=True))
    ]
    if method != "plain":
        longest = max(map(len, encoded)) + max_new_tokens
        reason = why_not_shared(policy.model, longest)
        if reason and method == "shared":
            raise UsageError(f"{policy.name} cannot share a prefix: {reason}")
        if reason:
            warnings.warn(
                f"{policy.name} cannot share the prompt's beginning ({reason}): generating in "
                "plain batches, which is slower",
                stacklevel=2,
            )
            method = "plain"
    bar = _bar(len(sequences), progress)
    with torch.inference_mode(), bar:
        if method == "plain":
            done = _run_plain(sequences, options)
        else:
            shared = prefix if prefix is not None else shared_beginning(policy, encoded)
            _check_prefix(shared, encoded)
            done = _run_shared(sequences, options, shared)
        for _ in done:
            bar.update()
    return [sequence.completion() for sequence in sequences]


def shared_beginning(policy: Policy, prompts: Sequence[str] | Sequence[Sequence[int]]) -> Prefix:
    """Compute the longest beginning that all prompts share (each keeps a token of its own)."""
    encoded = [_encode(policy, prompt) for prompt in prompts]
    ids = tuple(common_prefix(encoded))
    # Even an empty prefix needs its tensors, with no token in them.
    layers = compute_prefix(policy.model, ids or encoded[0][:1])
    return Prefix(ids, [(k[:, :, : len(ids)], v[:, :, : len(ids)]) for k, v in layers])


def common_prefix(sequences: Sequence[Sequence[int]]) -> list[int]:
    """Return the longest list that begins all sequences and is shorter than each of them."""
    low, high = min(sequences), max(sequences)  # the two that differ earliest
    most = min(map(len, sequences)) - 1
    pairs = zip(low[:most], high[:most], strict=True)
    same = next((i for i, (a, b) in enumerate(pairs) if a != b), most)
    return list(low[:same])


def end_token_ids(policy: Policy) -> frozenset[int]:
    """Return every token id that ends a completion, by the tokenizer and the model."""
    listed = policy.model.generation_config.eos_token_id
    ids = listed if isinstance(listed, (list, tuple)) else [listed]
    return frozenset(i for i in [*ids, policy.tokenizer.eos_token_id] if i is not None)


def sequence_seed(seed: int, key: str) -> int:
    """Return the 64-bit number that one sequence draws by, made of the seed and its key alone."""
    return int(fingerprint([seed, key]), 16)


def encode_prompts(
    policy: Policy,
    prompts: Sequence[str] | Sequence[Sequence[int]],
    max_new_tokens: int,
    context: int | None = None,
) -> list[list[int]]:
    """Return prompts as token ids (text without special tokens), each with room for its completion.

    Args:
        context: longest sequence, where that is not what the model was made for.

    Raises:
        UsageError: an empty prompt, or one that leaves no room.
    """
    encoded = [_encode(policy, prompt) for prompt in prompts]
    _check_room(encoded, max_new_tokens, policy.max_length if context is None else context)
    return encoded


def replay(
    policy: Policy,
    written: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop: Stop | None = None,
) -> list[Completion]:
    """Return what tokens that another engine wrote come to, cut where :func:`generate` would end.

    ``finished`` is empty where :func:`generate` would have gone on.
    """
    ends = end_token_ids(policy)
    options = _Options(policy, max_new_tokens, stop, Sampling(), ends, len(written))
    done = []
    for i, tokens in enumerate(written):
        sequence = _Sequence(i, [], options, None, [])
        any(sequence.push(token) for token in tokens)  # up to the one that finishes it
        done.append(sequence.completion())
    return done


def _encode(policy: Policy, prompt: str | Sequence[int]) -> list[int]:
    if isinstance(prompt, str):
        return policy.tokenizer(prompt, add_special_tokens=False)["input_ids"]
    return list(prompt)


def _check_room(encoded: Sequence[Sequence[int]], max_new_tokens: int, context: int) -> None:
    for number, ids in enumerate(encoded):
        if not ids:
            raise UsageError(f"prompt {number} is empty")
        if len(ids) + max_new_tokens > context:
            raise UsageError(
                f"prompt {number} has {len(ids)} tokens; with {max_new_tokens} new ones it would "
                f"not fit into the context of {context} tokens"
            )


def _check_prefix(prefix: Prefix, encoded: Sequence[Sequence[int]]) -> None:
    length = len(prefix.token_ids)
    for number, ids in enumerate(encoded):
        if len(ids) <= length or tuple(ids[:length]) != prefix.token_ids:
            raise UsageError(f"prompt {number} does not go on from the prefix that was given")


def _stream(seed: int, key: str, count: int) -> np.ndarray:
    """Return the uniform numbers in [0, 1) that one sequence draws its tokens with."""
    return np.random.default_rng(sequence_seed(seed, key)).random(count)


def _bar(total: int, progress: bool) -> Any:
    from tqdm.auto import tqdm

    return tqdm(total=total, disable=not progress, unit="completion", file=sys.stderr)


# --- one sequence, and the choice of its next token ----------------------------------------------


@dataclass(frozen=True)
class _Options:
    """What all sequences of a call have in common."""

    policy: Policy
    max_new_tokens: int
    stop: Stop | None
    sampling: Sampling
    ends: frozenset[int]
    batch_size: int
    pieces: dict[int, bool] = field(default_factory=dict)
    """Token id -> whether its text contains the stop's trigger."""

    def decode(self, ids: Sequence[int]) -> str:
        return self.policy.tokenizer.decode(ids, skip_special_tokens=True)

    def triggers(self, token: int) -> bool:
        if self.stop is None:
            return False
        if token not in self.pieces:
            self.pieces[token] = self.stop.trigger in self.decode([token])
        return self.pieces[token]


class _Sequence:
    """A prompt and what has been written after it so far."""

    def __init__(
        self, index: int, prompt: list[int], options: _Options, stream: Any, draft: list[int]
    ):
        self.index = index
        self.prompt = prompt
        self.draft = draft
        self.options = options
        self.stream = stream
        self.written: list[int] = []
        self.finished = ""

    @property
    def last(self) -> int:
        return self.written[-1] if self.written else self.prompt[-1]

    @property
    def draw(self) -> float:
        return float(self.stream[len(self.written)])

    def begins_as(self, other: _Sequence) -> bool:
        """Tell whether both have the same prompt and draft, so that one pass serves both."""
        return self.prompt == other.prompt and self.draft == other.draft

    def push(self, token: int) -> bool:
        """Take the next token; return whether the sequence is finished."""
        options = self.options
        if token in options.ends:
            self.finished = "eos"
            return True
        self.written.append(token)
        if options.triggers(token) and options.stop.reached(options.decode(self.written)):
            self.finished = "stop"
        elif len(self.written) == options.max_new_tokens:
            self.finished = "length"
        return bool(self.finished)

    def accept(self, predicted: Sequence[int]) -> None:
        """Take the model's own tokens for as long as the draft had guessed the one before."""
        for position, token in enumerate(predicted):
            if self.push(token) or self.draft[position : position + 1] != [token]:
                return

    def completion(self) -> Completion:
        return Completion(self.options.decode(self.written), tuple(self.written), self.finished)


def choose(logits: torch.Tensor, sampling: Sampling, draws: Sequence[float]) -> list[int]:
    """Return the next token of each row.

    Args:
        logits: (batch, vocabulary).
        sampling: greedy, or temperature with top-k and top-p.
        draws: one uniform number in [0, 1) for each row; unused when greedy.

    Raises:
        GrathError: a row has no finite maximum (the weights have diverged).
    """
    best, tokens = logits.max(dim=-1)
    if not torch.isfinite(best).all():
        raise GrathError("the model's logits are not finite: its weights have diverged")
    if sampling.temperature > 0:
        count = min(sampling.top_k or logits.shape[-1], logits.shape[-1])
        top, ids = torch.topk(logits.float(), count, dim=-1)  # most probable first
        probabilities = torch.softmax(top / sampling.temperature, dim=-1)
        before = probabilities.cumsum(dim=-1) - probabilities
        # Keep the smallest set that holds top_p: whatever has less than top_p before it.
        probabilities = probabilities.masked_fill(before >= sampling.top_p, 0.0)
        bounds = probabilities.cumsum(dim=-1)
        targets = torch.tensor(draws, device=bounds.device, dtype=bounds.dtype) * bounds[:, -1]
        position = torch.searchsorted(bounds, targets[:, None], right=True)
        last = (probabilities > 0).sum(dim=-1, keepdim=True) - 1
        tokens = ids.gather(1, torch.minimum(position, last))[:, 0]
    return tokens.tolist()


def _push_all(logits: torch.Tensor, sequences: Sequence[_Sequence]) -> list[bool]:
    """Give every sequence that is not finished its next token; return which are finished."""
    sampling = sequences[0].options.sampling
    draws = [0.0 if sampling.temperature == 0 or s.finished else s.draw for s in sequences]
    tokens = choose(logits, sampling, draws)
    return [bool(s.finished) or s.push(t) for s, t in zip(sequences, tokens, strict=True)]


# --- continuous batching over a shared prefix ----------------------------------------------------


def _run_shared(
    sequences: Sequence[_Sequence], options: _Options, prefix: Prefix
) -> Iterator[_Sequence]:
    """Yield the sequences as they finish."""
    shared = len(prefix.token_ids)
    # Neighbours in the queue are prefilled together: by length, so that little is padding.
    queue = deque(
        sorted(sequences, key=lambda s: (-len(s.prompt) - len(s.draft), s.prompt, s.index))
    )
    room = max(len(s.prompt) for s in queue) - shared + options.max_new_tokens
    slots = min(options.batch_size, len(queue))
    cache = SharedPrefixCache(prefix.layers, slots, room)
    active: list[_Sequence] = []  # a sequence's place in the list is its slot
    # One pass for a few newcomers costs as much as for one, so wait until some slots are free.
    enough = max(1, slots // 8)
    with shared_prefix(options.policy.model, cache):
        while queue or active:
            free = slots - len(active)
            if queue and (free >= min(enough, len(queue)) or not active):
                new = [queue.popleft() for _ in range(min(free, len(queue)))]
                _prefill(options, cache, new, len(active), shared)
                active += new
                yield from _retire(cache, active, shared)  # a draft can hold the whole answer
                if not active:
                    continue
            reach = max(len(s.prompt) - shared + len(s.written) for s in active)
            cache.select(0, len(active), 1, reach)
            logits = _forward(options, cache, [[s.last] for s in active])
            cache.advance(1)
            _push_all(logits[:, -1], active)
            yield from _retire(cache, active, shared)


def _retire(cache: SharedPrefixCache, active: list[_Sequence], shared: int) -> Iterator[_Sequence]:
    """Yield and remove the finished sequences; the last active one moves into a freed slot."""
    for slot in reversed(range(len(active))):
        if active[slot].finished:
            yield active[slot]
            moved = active.pop()
            if slot < len(active):
                length = len(moved.prompt) - shared + len(moved.written) - 1
                cache.move(len(active), slot, length)
                active[slot] = moved


def _prefill(
    options: _Options, cache: SharedPrefixCache, new: Sequence[_Sequence], start: int, shared: int
) -> None:
    """Store the prompts of ``new`` in the slots from ``start`` on, in groups of a bounded size."""
    cache.lengths[start : start + len(new)] = 0
    position = 0
    while position < len(new):
        # The first is the longest of those that follow.
        width = len(new[position].prompt) + len(new[position].draft) - shared
        end = position
        different = 0
        while end < len(new):
            different += end == position or not new[end].begins_as(new[end - 1])
            if different * width > max(PREFILL_TOKENS, width):
                break
            end += 1
        _prefill_group(options, cache, new[position:end], start + position, shared)
        position = end


def _prefill_group(
    options: _Options, cache: SharedPrefixCache, group: Sequence[_Sequence], start: int, shared: int
) -> None:
    """Prefill slots ``start …``: the different prompts in one pass, then the copies.

    Without drafts all prompt tokens but the last are stored: that one is the input of the first
    decoding step. With drafts the whole prompt and its draft are fed; the draft's tokens stay as
    long as each is what the model itself would have written (speculative decoding with a given
    draft, arXiv 2211.17192, in the greedy case: the completion is the same).
    """
    guessing = any(sequence.draft for sequence in group)
    rows: list[list[int]] = []
    which: list[int] = []  # for each sequence, the row that is its own
    for i, sequence in enumerate(group):
        if i == 0 or not sequence.begins_as(group[i - 1]):
            ids = sequence.prompt[shared:]
            rows.append(ids + sequence.draft if guessing else ids[:-1])
        which.append(len(rows) - 1)
    width = len(rows[0])
    if width == 0:
        return
    cache.select(start, len(rows), width, width)
    padded = [ids + [0] * (width - len(ids)) for ids in rows]
    # Logits are wanted from the earliest last prompt token on.
    earliest = min(len(s.prompt) for s in group) - shared - 1
    logits = _forward(options, cache, padded, width - earliest if guessing else 1)
    stored = [len(ids) for ids in rows]
    if guessing:
        predicted = choose(logits.flatten(0, 1), Sampling(), ())
        span = width - earliest
        for sequence, row in zip(group, which, strict=True):
            first = row * span + len(sequence.prompt) - shared - 1 - earliest
            sequence.accept(predicted[first : first + len(sequence.draft) + 1])
            # The last token pushed has not been through the model yet.
            stored[row] = len(sequence.prompt) - shared + len(sequence.written) - 1
    cache.advance(torch.tensor(stored, device=cache.device))
    # From the back: a row never lies behind its sequence, so nothing is overwritten too early.
    for offset in reversed(range(len(group))):
        if which[offset] != offset:
            cache.move(start + which[offset], start + offset, stored[which[offset]])


def _forward(
    options: _Options, cache: SharedPrefixCache, ids: Sequence[Sequence[int]], keep: int = 1
) -> torch.Tensor:
    """Return the logits after the last ``keep`` input tokens, (batch, keep, vocabulary)."""
    return options.policy.model(
        input_ids=torch.tensor(ids, device=cache.device),
        position_ids=cache.position_ids,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=keep,
    ).logits


# --- plain batches: for models that cannot share a prefix -----------------------------------------


def _run_plain(sequences: Sequence[_Sequence], options: _Options) -> Iterator[_Sequence]:
    """Yield the sequences batch by batch, padded on the left, each batch until its last is done."""
    from transformers.cache_utils import DynamicCache

    model, device = options.policy.model, options.policy.device
    pad = options.policy.tokenizer.pad_token_id or 0
    ordered = sorted(sequences, key=lambda s: (-len(s.prompt), s.index))
    for first in range(0, len(ordered), options.batch_size):
        batch = ordered[first : first + options.batch_size]
        width = len(batch[0].prompt)
        inputs = torch.tensor(
            [[pad] * (width - len(s.prompt)) + s.prompt for s in batch], device=device
        )
        mask = torch.tensor(
            [[0] * (width - len(s.prompt)) + [1] * len(s.prompt) for s in batch], device=device
        )
        positions = (mask.cumsum(dim=-1) - 1).clamp(min=0)
        cache = DynamicCache(config=model.config)
        while not all(s.finished for s in batch):
            logits = model(
                input_ids=inputs,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits
            _push_all(logits[:, -1], batch)
            inputs = torch.tensor([[s.last] for s in batch], device=device)
            mask = torch.cat([mask, mask.new_ones(len(batch), 1)], dim=1)
            positions = positions[:, -1:] + 1
        yield from batch
