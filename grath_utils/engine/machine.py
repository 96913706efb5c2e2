"""What this machine can do, and how its memory and the libraries' messages are set."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import torch

INFERENCE_BLOCK = 64 << 20
TRAINING_BLOCK = 1 << 30
CONTAINER_LIMIT = Path("/sys/fs/cgroup/memory.max")  # of Linux's control groups, version 2


def has_fast_bfloat16(device: str) -> bool:
    """Return True if the hardware multiplies bfloat16 itself (elsewhere float32 is faster)."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return device == "cpu" and native


def total_memory() -> int:
    """Return the bytes of memory that this machine has, or the container that this runs in."""
    total = psutil.virtual_memory().total
    try:
        return min(total, int(CONTAINER_LIMIT.read_text()))
    except (OSError, ValueError):  # no container, or "max"
        return total


def free_memory() -> int:
    """Return the bytes of memory that can be taken without swapping, at most."""
    return min(psutil.virtual_memory().available, total_memory())


def keep_freed_memory(device: str, largest: int = INFERENCE_BLOCK) -> bool:
    """Ask glibc to keep freed blocks up to ``largest`` bytes; return True if that took effect.

    On a CPU every training step frees and takes again the same hundreds of megabytes; giving them
    back each time costs page faults for more than half of a step. Decoding, where sizes change from
    step to step, would only fill the memory with pieces: it keeps smaller blocks. A user who has
    set the variables ``MALLOC_..._THRESHOLD_`` has decided.
    """
    decided = {"MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"} & os.environ.keys()
    if device != "cpu" or decided or not sys.platform.startswith("linux"):
        return False
    trim_threshold, mmap_threshold = -1, -3
    try:
        libc = ctypes.CDLL("libc.so.6")
        done = libc.mallopt(mmap_threshold, largest)
        done = done and libc.mallopt(trim_threshold, min(4 * largest, 2**31 - 1))
        return_freed_memory()
        return bool(done)
    except (OSError, AttributeError):  # another C library, such as musl
        return False


def return_freed_memory() -> None:
    """Give the system what this process has freed: glibc keeps gigabytes after large work."""
    with contextlib.suppress(OSError, AttributeError):  # another C library, such as musl
        ctypes.CDLL("libc.so.6").malloc_trim(0)


@contextlib.contextmanager
def quiet(logging: Any) -> Iterator[None]:
    """Silence the notices of a library of Hugging Face's, by its ``utils.logging``."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence the libraries' own bars and notices while a model is loaded, wrapped or saved."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:  # FutureWarning: of the libraries about each other
        with quiet(logging), warnings.catch_warnings(action="ignore", category=FutureWarning):
            yield
    finally:
        logging.enable_progress_bar()
