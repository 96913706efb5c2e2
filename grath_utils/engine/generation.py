"""Batched decoding: many completions at once, of prompts that mostly begin alike.

What prompts have in common (the demonstrations) is computed once and shared
(:mod:`.shared_prefix`). The rest runs with continuous batching: a finished sequence leaves its slot
at once and the next prompt takes it, so no step is spent on padding. Prompts of several kinds wait
in one queue: the last of one kind run together with the first of the next. Greedy decoding gives
what ``model.generate`` gives, up to floating-point ties. A model that cannot share a prefix is run
by transformers' own ``generate``: slower, the same completions; a warning says so.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, groupby, takewhile
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteriaList,
)

from grath_utils.engine.chat import end_ids
from grath_utils.engine.encoding import encode_apart, encode_texts, refuse_unknown_ids
from grath_utils.engine.models import Policy, unwrapped
from grath_utils.engine.shared_prefix import (
    Layers,
    SharedPrefixCache,
    attend_through,
    compute_prefix,
    why_not_shared,
)
from grath_utils.engine.slices import TOKENS, plain_logits, say_once, why_not
from grath_utils.errors import GrathError, UsageError
from grath_utils.files import fingerprint

PREFILL_TOKENS = 1024  # prompt tokens computed in one pass; more would only need more memory

# Rendered text, or token ids.
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
    strings: tuple[str, ...] = ()  # what it looks for, where it is no more than that

    @classmethod
    def at(cls, *strings: str) -> Stop:
        """Stop as soon as one of the strings has been written; it stays in the text."""
        trigger = "\n" if strings == ("\n",) else ""
        return cls(lambda text: any(s in text for s in strings), trigger, strings)


@dataclass(frozen=True)
class Prefix:
    """The beginning that prompts share, computed once; made by :func:`shared_beginning`."""

    token_ids: tuple[int, ...]
    layers: Layers = field(repr=False, compare=False)


@dataclass(frozen=True, kw_only=True)
class Order:
    """Prompts that begin alike, and how they are to be completed."""

    prompts: Prompts
    prefix: Prefix | None = None
    """Their computed beginning, to use in several calls; None finds it."""
    max_new_tokens: int = 100
    stop: Stop | None = None
    temperature: float = 0.0  # this and the next two as in sample_tokens: 0 is greedy
    top_p: float = 1.0
    top_k: int = 50
    seed: int = 0
    keys: Sequence[str] | None = None
    """Each sequence draws from its own stream, named by the seed and its key (its position if none
    is given): who else is in the batch does not matter."""
    drafts: Prompts | None = None
    """Greedy only: for each prompt, how its completion may well begin. A right guess is computed at
    once, like a prompt; a wrong one changes nothing but the time."""

    @property
    def sampling(self) -> tuple[float, float, int]:
        return self.temperature, self.top_p, self.top_k


def generate(
    policy: Policy,
    prompts: Prompts,
    *,
    do_sample: bool = False,
    temperature: float = 1.0,
    batch_size: int = 64,
    method: str = "auto",
    progress: bool = False,
    **options: Any,
) -> list[Completion]:
    """Return one completion for each prompt, in the order of the prompts; greedy by default.

    The other options are the fields of an :class:`Order`; see :func:`generate_together`.
    """
    order = Order(prompts=prompts, temperature=temperature if do_sample else 0.0, **options)
    (done,) = generate_together(
        policy, [order], batch_size=batch_size, method=method, progress=progress
    )
    return done


def generate_together(
    policy: Policy,
    orders: Sequence[Order],
    *,
    batch_size: int = 64,
    method: str = "auto",
    progress: bool = False,
) -> list[list[Completion]]:
    """Return for each order one completion for each prompt, in the order of the prompts.

    ``batch_size`` sequences are decoded at once, of whatever order. The method is ``shared``,
    ``plain``, or ``auto`` (shared where the model can).

    Raises:
        UsageError: an empty prompt, or one that leaves no room in the model's context.
        GrathError: the model's logits are not finite.
    """
    if method not in ("auto", "shared", "plain"):
        raise UsageError(f'unknown method "{method}"; there are auto, shared and plain')
    orders = [replace(order, prompts=_encode(policy, order.prompts)) for order in orders]
    for order in orders:
        _check(policy, order)
    lengths = [len(ids) + order.max_new_tokens for order in orders for ids in order.prompts]
    if not lengths:
        return [[] for _ in orders]
    longest = max(lengths)
    reason = "" if method == "plain" else why_not_shared(policy.model, longest)
    if reason and method == "shared":
        raise UsageError(f"{policy.name} cannot share a prefix: {reason}")
    way = plain_way(policy.model, longest) if reason or method == "plain" else ""
    if reason:
        say_once(
            policy.model,
            "prefix",
            f"{policy.name} cannot share the prompt's beginning ({reason}), so it writes "
            f"{PLAIN_WAYS[way]}: slower, and right",
        )

    ends = end_ids(policy.tokenizer, policy.model.generation_config.eos_token_id)
    bar = tqdm(total=len(lengths), disable=not progress, unit="completion", file=sys.stderr)
    job = _Job(policy, batch_size, ends, bar)
    prefixes: dict[Prefix, int] = {}  # each with its number
    sequences: list[list[_Sequence]] = []
    for order in orders:
        if not order.prompts:
            sequences.append([])
            continue
        none = Prefix((), [])
        prefix = none if way else order.prefix or shared_beginning(policy, order.prompts)
        group = prefixes.setdefault(prefix, len(prefixes))
        sequences.append(_sequences(job, order, prefix, group))
    everything = list(chain(*sequences))
    with torch.inference_mode(), bar:
        _run_plain(job, everything, way) if way else _run(job, everything, list(prefixes))
    return [
        [Completion(job.decode(s.written), tuple(s.written), s.finished) for s in each]
        for each in sequences
    ]


def _check(policy: Policy, order: Order) -> None:
    temperature, top_p, top_k = order.sampling
    if temperature < 0 or not 0 < top_p <= 1 or top_k < 0:
        raise UsageError(f"impossible sampling options: {temperature=}, {top_p=}, {top_k=}")
    if order.drafts is not None and temperature:
        raise UsageError("drafts are for greedy decoding")
    for number, ids in enumerate(order.prompts):
        if not ids:
            raise UsageError(f"prompt {number} is empty")
        if len(ids) + order.max_new_tokens > policy.max_length:
            raise UsageError(
                f"prompt {number} has {len(ids)} tokens; with {order.max_new_tokens} new ones it "
                f"would not fit into the context of {policy.max_length} tokens"
            )


def _sequences(job: _Job, order: Order, prefix: Prefix, group: int) -> list[_Sequence]:
    """Return what is to be written for an order, whose prompts are token ids."""
    shared = len(prefix.token_ids)
    for number, ids in enumerate(order.prompts):
        if len(ids) <= shared or tuple(ids[:shared]) != prefix.token_ids:
            raise UsageError(f"prompt {number} does not begin with the prefix that was given")
    guesses = [[]] * len(order.prompts)
    if order.drafts is not None:
        guesses = _encode(job.policy, order.drafts, encode_apart)
    sequences = [
        _Sequence(job, order, group, ids[shared:], guess[: order.max_new_tokens - 1])
        for ids, guess in zip(order.prompts, guesses, strict=True)
    ]
    if order.temperature:
        keys = order.keys or map(str, range(len(sequences)))
        for sequence, key in zip(sequences, keys, strict=True):
            stream = np.random.default_rng(int(fingerprint([order.seed, key]), 16))
            sequence.draws = stream.random(order.max_new_tokens + 1).tolist()
    return sequences


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


def _encode(
    policy: Policy, prompts: Prompts, encode: Callable[..., Iterable[Any]] = encode_texts
) -> list[list[int]]:
    if prompts and isinstance(prompts[0], str):
        prompts = encode(policy.tokenizer, prompts)
    ids = [list(map(int, each)) for each in prompts]
    refuse_unknown_ids(policy, ids)
    return ids


@dataclass
class _Job:
    """What all sequences of a call have in common."""

    policy: Policy
    batch_size: int
    ends: set[int]  # every token that ends a completion, by the tokenizer and the model
    bar: tqdm

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of tokens; an id without one (a padded vocabulary's) adds nothing."""
        tokenizer = self.policy.tokenizer
        if not tokenizer.is_fast:  # a fast one leaves them out itself
            ids = [i for i in ids if i < len(tokenizer)]
        return tokenizer.decode(ids, skip_special_tokens=True)

    def push_all(self, logits: torch.Tensor, sequences: Sequence[_Sequence]) -> None:
        """Give every sequence that is not finished its next token."""
        places: dict[tuple[float, float, int], list[int]] = {}
        for place, sequence in enumerate(sequences):
            places.setdefault(sequence.order.sampling, []).append(place)
        for sampling, own in places.items():
            some = [sequences[place] for place in own]
            draws = [s.draws[len(s.written)] for s in some if s.draws]
            tokens = sample_tokens(logits[own] if len(places) > 1 else logits, draws, *sampling)
            for sequence, token in zip(some, tokens, strict=True):
                if not sequence.finished:
                    sequence.push(token)


@dataclass
class _Sequence:
    """A prompt and what has been written after it so far."""

    job: _Job
    order: Order
    group: int  # the number of the prefix that it follows
    prompt: list[int]  # without what is shared; never empty
    draft: list[int]
    draws: list[float] = field(default_factory=list)  # uniform in [0, 1), one for each token
    written: list[int] = field(default_factory=list)
    finished: str = ""

    @property
    def kind(self) -> tuple[int, bool]:
        """Sequences of one kind are prefilled together."""
        return self.group, self.order.drafts is None

    @property
    def last(self) -> int:
        return (self.written or self.prompt)[-1]

    @property
    def stored(self) -> int:
        """How many own tokens have been through the model: all but the last."""
        return len(self.prompt) + len(self.written) - 1

    def push(self, token: int) -> None:
        """Take the next token."""
        if token in self.job.ends:
            self.finished = "eos"
        else:
            self.written.append(token)
            stop, decode = self.order.stop, self.job.decode
            if stop and stop.trigger in decode([token]) and stop.reached(decode(self.written)):
                self.finished = "stop"
            elif len(self.written) == self.order.max_new_tokens:
                self.finished = "length"
        if self.finished:
            self.job.bar.update()

    def accept(self, predicted: Sequence[int]) -> None:
        """Take the model's own tokens for as long as the draft had guessed the one before."""
        for position, token in enumerate(predicted):
            self.push(token)
            if self.finished or self.draft[position : position + 1] != [token]:
                return


def sample_tokens(
    logits: torch.Tensor,
    draws: Sequence[float] = (),
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
        top, ids = torch.topk(logits, count, dim=-1)  # most probable first
        probabilities = torch.softmax(top.float() / temperature, dim=-1)
        before = probabilities.cumsum(dim=-1) - probabilities
        probabilities = probabilities.masked_fill(before >= top_p, 0.0)
        bounds = probabilities.cumsum(dim=-1)
        targets = torch.tensor(draws, device=bounds.device, dtype=bounds.dtype) * bounds[:, -1]
        position = torch.searchsorted(bounds, targets[:, None], right=True)
        last = (probabilities > 0).sum(dim=-1, keepdim=True) - 1
        tokens = ids.gather(1, torch.minimum(position, last))[:, 0]
    return tokens.tolist()


def _run(job: _Job, sequences: Sequence[_Sequence], prefixes: Sequence[Prefix]) -> None:
    """Write all completions; a freed slot goes to the next prompt."""
    # Neighbours in the queue are prefilled together: of one prefix, all with drafts or none, and by
    # length, so that little is padding.
    queue = sorted(
        sequences, key=lambda s: (*s.kind, -len(s.prompt) - len(s.draft), s.prompt, s.draft)
    )
    room = max(len(s.prompt) + s.order.max_new_tokens for s in queue)
    slots = min(job.batch_size, len(queue))
    cache = SharedPrefixCache([prefix.layers for prefix in prefixes], slots, room)
    active: list[_Sequence] = []  # a sequence's place in the list is its slot
    # One pass for a few newcomers costs as much as for one, so wait until some slots are free.
    enough = max(1, slots // 8)
    with attend_through(job.policy.model, cache):
        while queue or active:
            free = slots - len(active)
            if queue and (free >= min(enough, len(queue)) or not active):
                new, queue = queue[:free], queue[free:]
                for _, alike in groupby(new, key=lambda s: s.kind):
                    some = list(alike)
                    _prefill(job, cache, some, len(active))
                    active += some
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
    cache.owners[start : start + len(new)] = [s.group for s in new]
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


# How a model that cannot share a prefix is run, the fastest first: many sequences with padding on
# the left and a cache; one after the other with its cache; one after the other, all computed again
# for each token.
PLAIN_WAYS = {
    "padded": "in padded batches",
    "alone": "one after the other",
    "uncached": "one after the other and without a cache",
}


def plain_way(model: PreTrainedModel, longest: int) -> str:
    """Return the fastest of :data:`PLAIN_WAYS` in which a model decodes what it should.

    Asked of the model itself (:mod:`.slices`): each token has to get the logits that it gets where
    the whole sequence is computed alone, without a cache.
    """
    for way in ("padded", "alone"):
        if not why_not(model, way, (longest,), lambda small, way=way: _trial(small, longest, way)):
            return way
    return "uncached"


def _trial(
    model: PreTrainedModel, longest: int, way: str
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Decode four tokens after a short and a long prompt; compute the whole sequences alone."""
    draw, steps = np.random.default_rng(0), 4
    written = draw.integers(TOKENS, size=(2, steps))
    prompts = [draw.integers(TOKENS, size=n).tolist() for n in (max(longest, 16) - steps, 8)]
    for batch in [prompts] if way == "padded" else [[prompt] for prompt in prompts]:
        seen: list[torch.Tensor] = []

        def choose(logits: torch.Tensor, seen: list[torch.Tensor] = seen) -> Sequence[int] | None:
            seen.append(logits)
            return written[: len(logits), len(seen) - 1].tolist() if len(seen) < steps else None

        _decode(model, batch, choose, way=way, limit=steps)
        for i, prompt in enumerate(batch):
            device = seen[0].device
            ids = torch.tensor([[*prompt, *written[i, : steps - 1]]], device=device)
            yield torch.stack([logits[i] for logits in seen]), plain_logits(model, ids)[0, -steps:]


def _decode(
    model: PreTrainedModel,
    prompts: Sequence[list[int]],
    choose: Callable[[torch.Tensor], Sequence[int] | None],
    *,
    way: str,
    limit: int,
) -> None:
    """Let transformers' own ``generate`` run the model; each model knows how its state is passed.

    ``choose`` gets the logits (batch, vocabulary) after the sequences so far, and returns the next
    token of each, or None to stop.
    """
    device = model.get_input_embeddings().weight.device
    chosen: list[Sequence[int] | None] = []

    def force(_: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        if not chosen or chosen[-1] is not None:
            chosen.append(choose(logits))
        tokens = torch.tensor(chosen[-1] or [0] * len(logits), device=logits.device)
        return torch.full_like(logits, -torch.inf).scatter(1, tokens[:, None], 0.0)

    def stop(ids: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return torch.full((len(ids),), chosen[-1] is None, device=ids.device)

    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
    inner = unwrapped(model)
    before, inner.generation_config = inner.generation_config, GenerationConfig()
    try:  # without what the model's own settings forbid, repeat or sample
        inner.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=limit,
            use_cache=way != "uncached",
            pad_token_id=0,
            logits_processor=LogitsProcessorList([force]),
            stopping_criteria=StoppingCriteriaList([stop]),
        )
    finally:
        inner.generation_config = before


def _run_plain(job: _Job, sequences: Sequence[_Sequence], way: str) -> None:
    """Write all completions batch by batch, each until its last is done."""
    size = job.batch_size if way == "padded" else 1
    ordered = sorted(sequences, key=lambda s: -len(s.prompt))
    for first in range(0, len(ordered), size):
        batch = ordered[first : first + size]

        def choose(logits: torch.Tensor, batch: list[_Sequence] = batch) -> Sequence[int] | None:
            job.push_all(logits, batch)
            return None if all(s.finished for s in batch) else [s.last for s in batch]

        prompts, limit = [s.prompt for s in batch], max(s.order.max_new_tokens for s in batch)
        _decode(job.policy.model, prompts, choose, way=way, limit=limit)
