"""Batched decoding: many completions at once, of prompts that mostly begin alike.

What the prompts have in common (the demonstrations) is computed once and shared
(:mod:`.shared_prefix`). The rest runs with continuous batching: a finished sequence leaves its slot
at once and the next prompt takes it, so no step is spent on padding. Greedy decoding gives what
``model.generate`` gives, up to floating-point ties. A model whose attention cannot share a prefix
is run in plain padded batches: slower, the same completions; a warning says so.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import groupby, takewhile
from typing import TYPE_CHECKING

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers.cache_utils import DynamicCache

from grath_utils.engine.shared_prefix import (
    Layers,
    SharedPrefixCache,
    attend_through,
    compute_prefix,
    why_not_shared,
)
from grath_utils.errors import GrathError, UsageError
from grath_utils.files import fingerprint

if TYPE_CHECKING:
    from grath_utils.engine.models import Policy

PREFILL_TOKENS = 1024  # prompt tokens computed in one pass; more would only need more memory

# Rendered text (tokenized without special tokens), or token ids.
Prompts = Sequence[str] | Sequence[Sequence[int]]


@dataclass(frozen=True)
class Completion:
    """What the policy wrote after a prompt."""

    text: str  # without the end-of-sequence token
    token_ids: tuple[int, ...]
    finished: str  # `eos`, `stop` (the condition held) or `length` (the token limit was reached)


@dataclass(frozen=True)
class Stop:
    """A condition on the text so far that ends a completion."""

    reached: Callable[[str], bool]
    trigger: str = ""  # ask only after a token that contains this: asking each time costs

    @classmethod
    def at(cls, *strings: str) -> Stop:
        """Stop as soon as one of the strings has been written; it stays in the text."""
        trigger = "\n" if strings == ("\n",) else ""
        return cls(lambda text: any(s in text for s in strings), trigger)


@dataclass(frozen=True)
class Prefix:
    """The beginning that prompts share, computed once; made by :func:`shared_beginning`."""

    token_ids: tuple[int, ...]
    layers: Layers = field(repr=False)


def generate(
    policy: Policy,
    prompts: Prompts,
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
    drafts: Prompts | None = None,
    method: str = "auto",
    progress: bool = False,
) -> list[Completion]:
    """Return one completion for each prompt, in the order of the prompts.

    Args:
        prefix: the computed beginning of all prompts, to use in several calls; None finds it.
        do_sample, temperature, top_p, top_k: as in :func:`sample_tokens`; greedy by default.
        seed, keys: each sequence draws from its own stream, named by the seed and its key (its
            position if none is given): who else is in the batch does not matter.
        drafts: greedy only: for each prompt, how its completion may well begin. A right guess is
            computed at once, like a prompt; a wrong one changes nothing but the time.
        method: ``shared``, ``plain``, or ``auto`` (shared where the model can).

    Raises:
        UsageError: an empty prompt, or one that leaves no room in the model's context.
        GrathError: the model's logits are not finite.
    """
    if method not in ("auto", "shared", "plain"):
        raise UsageError(f'unknown method "{method}"; there are auto, shared and plain')
    if drafts is not None and do_sample:
        raise UsageError("drafts are for greedy decoding")
    if temperature < 0 or not 0 < top_p <= 1 or top_k < 0:
        raise UsageError(f"impossible sampling options: {temperature=}, {top_p=}, {top_k=}")
    encoded = _encode(policy, prompts)
    for number, ids in enumerate(encoded):
        if not ids:
            raise UsageError(f"prompt {number} is empty")
        if len(ids) + max_new_tokens > policy.max_length:
            raise UsageError(
                f"prompt {number} has {len(ids)} tokens; with {max_new_tokens} new ones it would "
                f"not fit into the context of {policy.max_length} tokens"
            )
    if not encoded:
        return []
    longest = max(map(len, encoded)) + max_new_tokens
    reason = "" if method == "plain" else why_not_shared(policy.model, longest)
    if reason and method == "shared":
        raise UsageError(f"{policy.name} cannot share a prefix: {reason}")
    if reason:
        warnings.warn(
            f"{policy.name} cannot share the prompt's beginning ({reason}): generating in "
            "plain batches, which is slower",
            stacklevel=2,
        )
    plain = method == "plain" or bool(reason)
    prefix = Prefix((), []) if plain else prefix or shared_beginning(policy, encoded)
    shared = len(prefix.token_ids)
    for number, ids in enumerate(encoded):
        if len(ids) <= shared or tuple(ids[:shared]) != prefix.token_ids:
            raise UsageError(f"prompt {number} does not begin with the prefix that was given")

    sampling = {"temperature": temperature, "top_p": top_p, "top_k": top_k} if do_sample else {}
    listed = policy.model.generation_config.eos_token_id
    ends = {*(listed if isinstance(listed, list) else [listed]), policy.tokenizer.eos_token_id}
    bar = tqdm(total=len(encoded), disable=not progress, unit="completion", file=sys.stderr)
    job = _Job(policy, max_new_tokens, stop, sampling, batch_size, ends, bar)
    guesses = _encode(policy, drafts) if drafts is not None else [[]] * len(encoded)
    sequences = [
        _Sequence(job, ids[shared:], guess[: max_new_tokens - 1])
        for ids, guess in zip(encoded, guesses, strict=True)
    ]
    if do_sample:
        for sequence, key in zip(sequences, keys or map(str, range(len(sequences))), strict=True):
            stream = np.random.default_rng(int(fingerprint([seed, key]), 16))
            sequence.draws = stream.random(max_new_tokens + 1).tolist()
    with torch.inference_mode(), bar:
        _run_plain(job, sequences) if plain else _run(job, sequences, prefix)
    return [Completion(job.decode(s.written), tuple(s.written), s.finished) for s in sequences]


def shared_beginning(policy: Policy, prompts: Prompts) -> Prefix:
    """Compute the longest beginning that all prompts share (each keeps a token of its own)."""
    encoded = _encode(policy, prompts)
    ids = common_prefix(encoded)
    # Even an empty prefix needs its tensors, with no token in them.
    layers = compute_prefix(policy.model, ids or encoded[0][:1])
    return Prefix(tuple(ids), [(k[:, :, : len(ids)], v[:, :, : len(ids)]) for k, v in layers])


def common_prefix(sequences: Sequence[Sequence[int]]) -> list[int]:
    """Return the longest list that begins all sequences and is shorter than each of them."""
    low, high = min(sequences), max(sequences)  # the two that differ earliest
    same = takewhile(lambda pair: pair[0] == pair[1], zip(low, high, strict=False))
    return [a for a, _ in same][: min(map(len, sequences)) - 1]


def _encode(policy: Policy, prompts: Prompts) -> list[list[int]]:
    return [
        policy.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        if isinstance(prompt, str)
        else list(prompt)
        for prompt in prompts
    ]


@dataclass
class _Job:
    """What all sequences of a call have in common."""

    policy: Policy
    max_new_tokens: int
    stop: Stop | None
    sampling: dict[str, float]  # of sample_tokens; empty where decoding is greedy
    batch_size: int
    ends: set[int]  # every token that ends a completion, by the tokenizer and the model
    bar: tqdm

    def decode(self, ids: Sequence[int]) -> str:
        return self.policy.tokenizer.decode(ids, skip_special_tokens=True)

    def stops(self, written: Sequence[int]) -> bool:
        """Return True if the stop condition holds after the last token."""
        if self.stop is None or self.stop.trigger not in self.decode(written[-1:]):
            return False
        return self.stop.reached(self.decode(written))

    def push_all(self, logits: torch.Tensor, sequences: Sequence[_Sequence]) -> None:
        """Give every sequence that is not finished its next token."""
        draws = [s.draws[len(s.written)] for s in sequences] if self.sampling else []
        tokens = sample_tokens(logits, draws, **self.sampling)
        for sequence, token in zip(sequences, tokens, strict=True):
            if not sequence.finished:
                sequence.push(token)


@dataclass
class _Sequence:
    """A prompt and what has been written after it so far."""

    job: _Job
    prompt: list[int]  # without what is shared; never empty
    draft: list[int]
    draws: list[float] = field(default_factory=list)  # uniform in [0, 1), one for each token
    written: list[int] = field(default_factory=list)
    finished: str = ""

    @property
    def last(self) -> int:
        return (self.written or self.prompt)[-1]

    @property
    def stored(self) -> int:
        """How many own tokens have been through the model: all but the last."""
        return len(self.prompt) + len(self.written) - 1

    def push(self, token: int) -> None:
        """Take the next token."""
        job = self.job
        if token in job.ends:
            self.finished = "eos"
        else:
            self.written.append(token)
            if job.stops(self.written):
                self.finished = "stop"
            elif len(self.written) == job.max_new_tokens:
                self.finished = "length"
        if self.finished:
            job.bar.update()

    def accept(self, predicted: Sequence[int]) -> None:
        """Take the model's own tokens for as long as the draft had guessed the one before."""
        for position, token in enumerate(predicted):
            self.push(token)
            if self.finished or self.draft[position : position + 1] != [token]:
                return


def sample_tokens(
    logits: torch.Tensor,
    draws: Sequence[float] = (),
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 50,
) -> list[int]:
    """Return the next token of each row of logits (batch, vocabulary); greedy at temperature 0.

    Otherwise each row has a uniform draw in [0, 1), and its token comes from the smallest set that
    holds ``top_p`` of the probability of the ``top_k`` most probable ones (0 = of all: slower).

    Raises:
        GrathError: a row has no finite maximum (the weights have diverged).
    """
    best, tokens = logits.max(dim=-1)
    if not torch.isfinite(best).all():
        raise GrathError("the model's logits are not finite: its weights have diverged")
    if temperature > 0:
        count = min(top_k or logits.shape[-1], logits.shape[-1])
        top, ids = torch.topk(logits.float(), count, dim=-1)  # most probable first
        probabilities = torch.softmax(top / temperature, dim=-1)
        before = probabilities.cumsum(dim=-1) - probabilities
        probabilities = probabilities.masked_fill(before >= top_p, 0.0)
        bounds = probabilities.cumsum(dim=-1)
        targets = torch.tensor(draws, device=bounds.device, dtype=bounds.dtype) * bounds[:, -1]
        position = torch.searchsorted(bounds, targets[:, None], right=True)
        last = (probabilities > 0).sum(dim=-1, keepdim=True) - 1
        tokens = ids.gather(1, torch.minimum(position, last))[:, 0]
    return tokens.tolist()


def _run(job: _Job, sequences: Sequence[_Sequence], prefix: Prefix) -> None:
    """Write all completions; a freed slot goes to the next prompt."""
    # Neighbours in the queue are prefilled together: by length, so that little is padding.
    queue = sorted(sequences, key=lambda s: (-len(s.prompt) - len(s.draft), s.prompt))
    room = max(len(s.prompt) for s in queue) + job.max_new_tokens
    slots = min(job.batch_size, len(queue))
    cache = SharedPrefixCache(prefix.layers, slots, room)
    active: list[_Sequence] = []  # a sequence's place in the list is its slot
    # One pass for a few newcomers costs as much as for one, so wait until some slots are free.
    enough = max(1, slots // 8)
    with attend_through(job.policy.model, cache):
        while queue or active:
            free = slots - len(active)
            if queue and (free >= min(enough, len(queue)) or not active):
                new, queue = queue[:free], queue[free:]
                _prefill(job, cache, new, len(active))
                active += new
                _retire(cache, active)  # a draft can hold the whole answer
                if not active:
                    continue
            ids = torch.tensor([[s.last] for s in active], device=cache.device)
            logits = cache.forward(job.policy.model, ids, reach=1 + max(s.stored for s in active))
            cache.advance(1)
            job.push_all(logits[:, -1], active)
            _retire(cache, active)


def _retire(cache: SharedPrefixCache, active: list[_Sequence]) -> None:
    """Remove the finished sequences; the last active one moves into a freed slot."""
    for slot in reversed(range(len(active))):
        if active[slot].finished:
            moved = active.pop()
            if slot < len(active):
                cache.move(len(active), slot, moved.stored)
                active[slot] = moved


def _prefill(job: _Job, cache: SharedPrefixCache, new: Sequence[_Sequence], start: int) -> None:
    """Store the prompts of ``new`` in the slots from ``start`` on, in passes of a bounded size.

    Without drafts all prompt tokens but the last are stored: that one is the input of the first
    decoding step. With drafts the whole prompt and its draft are fed; the draft's tokens stay as
    long as each is what the model itself would have written (speculative decoding with a given
    draft, arXiv 2211.17192, in the greedy case: the completion is the same).
    """
    cache.lengths[start : start + len(new)] = 0
    # One row serves all copies of a prompt with the same draft.
    copies = [list(group) for _, group in groupby(new, key=lambda s: (s.prompt, s.draft))]
    while copies:
        longest = copies[0][0]  # the queue is sorted
        count = max(1, PREFILL_TOKENS // (len(longest.prompt) + len(longest.draft)))
        now, copies = copies[:count], copies[count:]
        firsts = [same[0] for same in now]
        guessing = any(s.draft for s in firsts)
        rows = [s.prompt + s.draft if guessing else s.prompt[:-1] for s in firsts]
        if width := len(rows[0]):
            padded = [ids + [0] * (width - len(ids)) for ids in rows]
            inputs = torch.tensor(padded, device=cache.device)
            # Logits are wanted from the earliest last prompt token on.
            earliest = min(len(s.prompt) for s in firsts) - 1
            keep = width - earliest if guessing else 1
            logits = cache.forward(job.policy.model, inputs, start=start, reach=width, keep=keep)
            if guessing:
                predicted = sample_tokens(logits.flatten(0, 1))
                for row, same in enumerate(now):
                    first = row * keep + len(same[0].prompt) - 1 - earliest
                    for sequence in same:
                        sequence.accept(predicted[first : first + len(sequence.draft) + 1])
            cache.advance(torch.tensor([s.stored for s in firsts], device=cache.device))
            # From the back: a row never lies behind its sequence, so none is overwritten too early.
            slots = [row for row, same in enumerate(now) for _ in same]
            for offset, row in reversed(list(enumerate(slots))):
                if offset != row:
                    cache.move(start + row, start + offset, firsts[row].stored)
        start += sum(map(len, now))


def _run_plain(job: _Job, sequences: Sequence[_Sequence]) -> None:
    """Write all completions batch by batch, padded on the left, each until its last is done."""
    model, device = job.policy.model, job.policy.device
    pad = job.policy.tokenizer.pad_token_id or 0
    ordered = sorted(sequences, key=lambda s: -len(s.prompt))
    for first in range(0, len(ordered), job.batch_size):
        batch = ordered[first : first + job.batch_size]
        gaps = [len(batch[0].prompt) - len(s.prompt) for s in batch]
        padded = [[pad] * gap + s.prompt for gap, s in zip(gaps, batch, strict=True)]
        inputs = torch.tensor(padded, device=device)
        places = torch.arange(inputs.shape[1], device=device)
        mask = (places >= torch.tensor(gaps, device=device)[:, None]).long()
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
            job.push_all(logits[:, -1], batch)
            inputs = torch.tensor([[s.last] for s in batch], device=device)
            mask = torch.cat([mask, mask.new_ones(len(batch), 1)], dim=1)
            positions = positions[:, -1:] + 1
