"""Several processes of one launch that work on the same run, and how they agree.

``accelerate launch`` and ``torchrun`` start the same program several times and tell each copy its
rank. Rank 0 is the *main* process, which alone writes, locks and reports. Objects travel over gloo,
whatever the tensors of training travel over: waiting an hour for a process that computes is no
error. In a single process all of this does nothing, and imports nothing heavy.
"""

from __future__ import annotations

import contextvars
import datetime
import functools
import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from grath_utils.errors import RunError, UsageError

T = TypeVar("T")
R = TypeVar("R")

PATIENCE = datetime.timedelta(days=2)  # after it, the others are taken for dead

_alone: contextvars.ContextVar[bool] = contextvars.ContextVar("alone", default=False)


def _asked_for(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in ("1", "true", "yes")


def launched() -> int:
    """Return how many processes this launch has, as the launcher says; 1 without a launcher."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR")
    return int(os.environ["WORLD_SIZE"]) if all(name in os.environ for name in names) else 1


def size() -> int:
    """Return how many processes share the present work; 1 inside work that one does by itself."""
    return 1 if _alone.get() else launched()


def rank() -> int:
    """Return this process's number in its launch, from 0."""
    return int(os.environ["RANK"]) if launched() > 1 else 0


def is_main() -> bool:
    """Return True in the process that writes, locks and reports."""
    return rank() == 0


def cpu_only() -> bool:
    """Return True if the launcher was told to leave accelerators alone (``--cpu``)."""
    return _asked_for("ACCELERATE_USE_CPU")


def sharded() -> bool:
    """Return True if training is to split the model itself over the processes (FSDP 2).

    FSDP 1, which melts adapter and base together into flat tensors, is a ``UsageError``.
    """
    asked = launched() > 1 and _asked_for("ACCELERATE_USE_FSDP")
    if asked and os.environ.get("FSDP_VERSION") != "2":
        raise UsageError("adapters train under FSDP 2 only: accelerate launch --fsdp_version 2 ...")
    return asked


@functools.cache
def join() -> Any:
    """Meet the other processes and take the GPU of the local rank; return the group for objects."""
    import torch
    from accelerate import PartialState

    PartialState(cpu=cpu_only() or not torch.cuda.is_available(), timeout=PATIENCE)
    return torch.distributed.new_group(backend="gloo", timeout=PATIENCE)


def leave() -> None:
    """Part from the other processes at the end of a program, as torch wants it."""
    if join.cache_info().currsize:
        import torch

        torch.distributed.destroy_process_group()
        join.cache_clear()


def gather(value: T) -> list[T]:
    """Return every process's value, in the order of their ranks."""
    if size() == 1:
        return [value]
    import torch.distributed as distributed

    values: list[Any] = [None] * launched()
    distributed.all_gather_object(values, value, group=join())
    return values


def barrier() -> None:
    """Wait until every process has come here."""
    gather(None)


def from_main(value: T) -> T:
    """Return the main process's value in all of them."""
    return gather(value)[0]


def on_main(work: Callable[[], R]) -> R:
    """Let the main process do ``work`` while the others wait; all return, or raise, what it did."""
    [(_, result)] = in_turns([work], lambda piece: piece())
    return result


def in_turns(pieces: Sequence[T], work: Callable[[T], R]) -> Iterator[tuple[T, R]]:
    """Do independent pieces of work, each in one process, and yield all (piece, result) in order.

    A piece is done just as one process would do it, so results do not depend on how many there
    are. What ``work`` raises in any process is raised in all, so that none waits for ever.
    """
    if (count := size()) == 1:
        yield from ((piece, work(piece)) for piece in pieces)
        return
    for start in range(0, len(pieces), count):
        turn = pieces[start : start + count]
        own = turn[rank() : rank() + 1]  # in the last turn there may be none
        outcomes = gather([_attempt(work, piece) for piece in own])
        for piece, [(value, error)] in zip(turn, filter(None, outcomes), strict=True):
            if error is not None:
                raise error
            yield piece, value


def _attempt(work: Callable[[T], R], piece: T) -> tuple[R | None, Exception | None]:
    """Return what the work returned, or what it raised, in a form that can travel."""
    token = _alone.set(True)
    try:
        return work(piece), None
    except Exception as error:
        try:
            pickle.loads(pickle.dumps(error))
            return None, error
        except Exception:  # one that cannot be sent: its words can
            return None, RunError(f"process {rank()}: {type(error).__name__}: {error}")
    finally:
        _alone.reset(token)


def own_share(pieces: Sequence[T]) -> tuple[Sequence[T], int]:
    """Return this process's run of neighbouring pieces, and the length of the longest such run."""
    each, more = divmod(len(pieces), size())
    own = rank() if size() > 1 else 0
    first = own * each + min(own, more)
    return pieces[first : first + each + (own < more)], each + bool(more)
