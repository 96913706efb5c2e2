"""llama.cpp's side of the benchmark, in whatever Python has llama-cpp-python (GRATH_LLAMA_CPP).

Its own batches and its own cache, used as well as they can be: what sequences share is computed
once and shared by ``seq_cp``, many sequences decode side by side, logits are asked for only where
they are read. It gets token ids, so that both sides compute the same.

    PYTHON tests/benchmarks/llama.py ARM JOB.json MODEL.gguf THREADS
    PYTHON tests/benchmarks/llama.py quantize FROM.gguf TO.gguf F32|BF16|Q4_K_M
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import llama_cpp.llama_cpp as lib
import numpy as np

SLOTS = 64
ROWS = 512  # tokens in one pass

Token = tuple[int, int, int, bool]  # id, position, sequence, are its logits wanted


def quantize(source: str, target: str, kind: str) -> None:
    """Write a model with its weights in another format."""
    params = lib.llama_model_quantize_default_params()
    family = "ALL" if kind == "F32" else "MOSTLY"
    params.ftype, params.allow_requantize = getattr(lib, f"LLAMA_FTYPE_{family}_{kind}"), True
    if lib.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(params)):
        sys.exit(f"llama.cpp could not write {target}")


class Model:
    """A model with room for many sequences."""

    def __init__(self, file: str, threads: int, sequences: int, room: int):
        self.model = lib.llama_model_load_from_file(file.encode(), lib.llama_model_default_params())
        params = lib.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = room, ROWS, ROWS
        params.n_seq_max, params.kv_unified = sequences, True
        params.n_threads = params.n_threads_batch = threads
        self.ctx = lib.llama_init_from_model(self.model, params)
        if not self.ctx:
            sys.exit(f"llama.cpp could not load {file} with {room} tokens of context")
        self.memory = lib.llama_get_memory(self.ctx)
        self.batch = lib.llama_batch_init(ROWS, 0, 1)
        self.size = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self.model))
        self.fed = 0

    def decode(self, tokens: Sequence[Token]) -> list[np.ndarray]:
        """Return the logits (vocabulary,) of each token that wants them."""
        found = []
        for first in range(0, len(tokens), ROWS):
            batch, now = self.batch, tokens[first : first + ROWS]
            batch.n_tokens = len(now)
            for i, (token, position, sequence, wanted) in enumerate(now):
                batch.token[i], batch.pos[i], batch.logits[i] = token, position, wanted
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
            if lib.llama_decode(self.ctx, batch):
                sys.exit("llama.cpp could not decode a batch")
            self.fed += len(now)
            for i, token in enumerate(now):
                if token[3]:
                    row = lib.llama_get_logits_ith(self.ctx, i)
                    found.append(np.ctypeslib.as_array(row, (self.size,)).copy())
        return found

    def share(self, source: int, targets: Sequence[int]) -> None:
        for target in targets:
            lib.llama_memory_seq_cp(self.memory, source, target, -1, -1)

    def clear(self, sequences: Sequence[int]) -> None:
        for sequence in sequences:
            lib.llama_memory_seq_rm(self.memory, sequence, -1, -1)


def shared(sequences: Sequence[Sequence[int]]) -> int:
    """Return how many tokens begin all sequences, each keeping one of its own."""
    low, high = min(sequences), max(sequences)
    length = min(map(len, sequences)) - 1
    return next((i for i in range(length) if low[i] != high[i]), length)


def scoring(job: dict, file: str, threads: int) -> dict:
    """Score every answer: the primer once, each question once, its answers side by side."""
    items = job["requests"]  # of each question: [prompt, completion] of each answer
    prompts = [item[0][0] for item in items]
    longest = max(len(p) + len(c) for item in items for p, c in item)
    most = max(map(len, items))
    primer = shared(prompts)
    model = Model(file, threads, most + 2, primer + longest * (most + 1))
    started = time.perf_counter()
    model.decode([(t, i, 0, False) for i, t in enumerate(prompts[0][:primer])])
    values = []
    for item in items:
        # A token may span the boundary of a prompt, so the texts are compared as a whole.
        whole = [p + c for p, c in item]
        same = min(shared(whole), min(len(p) for p, _ in item) - 1)
        model.share(0, [1])
        model.decode([(t, i, 1, False) for i, t in enumerate(whole[0][:same]) if i >= primer])
        own = range(2, 2 + len(item))
        model.share(1, own)
        rows = [
            (ids[i], i, sequence, i >= len(prompt) - 1)
            for sequence, ids, (prompt, _) in zip(own, whole, item, strict=True)
            for i in range(same, len(ids) - 1)
        ]
        logits = iter(model.decode(rows))
        values.append([])
        for _, completion in item:
            total = 0.0
            for token in completion:
                row = next(logits).astype(np.float64)
                total += row[token] - row.max() - np.log(np.exp(row - row.max()).sum())
            values[-1].append(total)
        model.clear([1, *own])
    return {"seconds": time.perf_counter() - started, "tokens": model.fed, "values": values}


def pairs(job: dict, file: str, threads: int) -> dict:
    """Write a completion for each prompt: what all share once, a freed slot to the next prompt."""
    prompts, limit, ends = job["prompts"], job["max_new_tokens"], set(job["ends"])
    common = shared(prompts)
    longest = max(map(len, prompts)) + limit
    model = Model(file, threads, SLOTS + 1, common + SLOTS * (longest - common))
    started = time.perf_counter()
    model.decode([(t, i, 0, False) for i, t in enumerate(prompts[0][:common])])
    written: list[list[int]] = [[] for _ in prompts]
    waiting = sorted(range(len(prompts)), key=lambda n: len(prompts[n]))
    active: dict[int, int] = {}  # slot -> number of its prompt
    while waiting or active:
        rows: list[Token] = []
        for slot, n in active.items():
            rows.append((written[n][-1], len(prompts[n]) + len(written[n]) - 1, slot, True))
        for slot in range(1, SLOTS + 1):
            if waiting and slot not in active:
                active[slot] = n = waiting.pop()
                model.share(0, [slot])
                ids, last = prompts[n], len(prompts[n]) - 1
                rows += [(ids[i], i, slot, i == last) for i in range(common, len(ids))]
        asked = [row[2] for row in rows if row[3]]
        for slot, logits in zip(asked, model.decode(rows), strict=True):
            n, token = active[slot], int(logits.argmax())
            if token not in ends:
                written[n].append(token)
            if token in ends or len(written[n]) == limit:
                model.clear([slot])
                del active[slot]
    return {"seconds": time.perf_counter() - started, "tokens": model.fed, "ids": written}


@lib.llama_log_callback
def silent(*_: object) -> None:
    """Take a line of llama.cpp's log."""


def main() -> None:
    lib.llama_log_set(silent, None)
    if sys.argv[1] == "quantize":
        quantize(*sys.argv[2:])
        return
    arm, job, file, threads = sys.argv[1:]
    os.sched_setaffinity(0, range(int(threads)))
    done = {"scoring": scoring, "pairs": pairs}[arm](
        json.loads(Path(job).read_text()), file, int(threads)
    )
    done["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print("RESULT " + json.dumps(done), flush=True)


if __name__ == "__main__":
    main()
