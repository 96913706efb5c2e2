"""Do a sweep of many small runs with everything going wrong that can, and the same one in peace.

Run as a script (see :mod:`fault_injection`)::

    python tests/loop/soak.py FOLDER GRID SEED

makes FOLDER/whole and FOLDER/hurt, and prints what it did as JSON. A child does the sweep and is
killed at random moments, or finds the disk full from a random write on; once, a finished stage of a
run is cut short.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import torch
from fault_injection import fork, lines_of, no_space_after

from grath_utils.dpo import trainer  # noqa: F401  (TRL takes seconds: loaded before the first fork)
from grath_utils.scale.sweeps import sweep

TRIES = 200


def in_peace(grid: str, out: Path) -> tuple[int, float]:
    """Do the sweep in a child; return its status and how long it took, in seconds."""
    begun = time.monotonic()
    status, _ = _end(*fork(lambda: sweep(grid, out, here=True) and None))
    return status, time.monotonic() - begun


def _end(child: int, pipe: int) -> tuple[int, list[str]]:
    said = list(lines_of(pipe))
    os.close(pipe)
    return os.waitpid(child, 0)[1], said


def _short_of_space(grid: str, out: Path, left: int) -> None:
    no_space_after(left)
    sweep(grid, out, here=True)


def finished(out: Path) -> list[str]:
    return sorted(path.stem for path in (out / "rows").glob("*.json"))


def cut_short(out: Path, draw: random.Random) -> Path:
    """Cut the pairs of a finished point in two, and forget that it was finished."""
    name = draw.choice(finished(out))
    path = out / "runs" / name / "iter_0" / "pairs.jsonl"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    (out / "rows" / f"{name}.json").unlink()
    return path


def hurt(grid: str, out: Path, seconds: float, draw: random.Random) -> dict[str, object]:
    """Bring the sweep to its end through all faults; return how often each struck."""
    seen: Counter[str] = Counter()
    victim, complaint = None, ""
    for _ in range(TRIES):
        if victim is None and len(finished(out)) >= 20:
            victim = cut_short(out, draw)
        fault = draw.choice(("kill", "kill", "full"))
        if fault == "kill":
            child, pipe = fork(lambda: sweep(grid, out, here=True) and None)
            time.sleep(draw.uniform(0.02, 0.12) * seconds)
            os.kill(child, signal.SIGKILL)
            status, _ = _end(child, pipe)
            seen["killed"] += os.WIFSIGNALED(status)
        else:
            left = draw.randrange(60)
            status, said = _end(*fork(lambda left=left: _short_of_space(grid, out, left)))
            seen["full"] += status != 0
            if status and not said[-1].startswith("error: "):
                raise SystemExit(f"not an error message: {said[-1]}")
        if victim and victim.exists() and not complaint:
            # Only this point is in the way; what its log says is what a user would follow.
            status, _ = in_peace(grid, out)
            log = out / "logs" / f"{victim.parent.parent.name}.log"
            complaint = log.read_text(encoding="utf-8").splitlines()[-1]
            seen["points not hindered"] = len(finished(out))
            victim.unlink()
            break
    while in_peace(grid, out)[0]:
        seen["not at once"] += 1
        if seen["not at once"] > 3:
            raise SystemExit("the sweep does not come to its end")
    return {**seen, "complaint": complaint}


def main() -> None:
    folder, grid, seed = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    torch.set_num_threads(1)
    status, seconds = in_peace(grid, folder / "whole")
    if status:
        raise SystemExit("the undisturbed sweep failed")
    seen = hurt(grid, folder / "hurt", seconds, random.Random(seed))
    print(json.dumps({"seconds": seconds, **seen}))


if __name__ == "__main__":
    main()
