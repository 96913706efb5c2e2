"""Do a sweep of many small runs with everything going wrong that can, and the same one in peace.

Run as a script (see :mod:`fault_injection`)::

    python tests/loop/soak.py FOLDER SEED

does the sweep of FOLDER/grid.yaml into FOLDER/whole and FOLDER/hurt, and prints what it did as
JSON. A child does the sweep and is killed at random moments, or finds the disk full from a random
write on; once, a finished stage of a run is cut short.
"""

from __future__ import annotations

import json
import random
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import torch
from fault_injection import Say, fork, lines_of, no_space_after, to_the_end

from grath_utils.dpo import trainer  # noqa: F401  (TRL takes seconds: loaded before the first fork)
from grath_utils.files import read_json
from grath_utils.scale.sweeps import sweep


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

    def in_peace(say: Say) -> None:
        sweep(grid, out, here=True)

    def short_of_space(left: int) -> None:
        no_space_after(left)
        sweep(grid, out, here=True)

    def go_wrong() -> None:
        if draw.choice(("kill", "kill", "full")) == "kill":
            process, pipe = fork(in_peace)
            time.sleep(draw.uniform(0.02, 0.12) * seconds)
            process.kill()
            list(lines_of(pipe))
            process.join()
            seen["killed"] += process.exitcode == -signal.SIGKILL
            return
        left = draw.randrange(60)
        code, said = to_the_end(lambda say: short_of_space(left))
        seen["full"] += code != 0
        if code and not said[-1].startswith("error: "):
            raise SystemExit(f"not an error message: {said[-1]}")

    seen: Counter[str] = Counter()
    points = len(read_json(out.parent / "whole" / "points.json")["points"])
    while len(finished(out)) < 0.6 * points:
        go_wrong()
    victim = cut_short(out, draw)
    go_wrong()
    # Only this point is in the way; what its log says is what a user would follow.
    to_the_end(in_peace)
    log = out / "logs" / f"{victim.parent.parent.name}.log"
    complaint = log.read_text(encoding="utf-8").splitlines()[-1]
    seen["points hindered"] = points - len(finished(out))
    victim.unlink()
    code, said = to_the_end(in_peace)
    if code:
        raise SystemExit(f"the sweep does not come to its end: {said}")
    return {**seen, "complaint": complaint}


def main() -> None:
    folder, seed = Path(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    grid, begun = str(folder / "grid.yaml"), time.monotonic()
    code, said = to_the_end(lambda say: sweep(grid, folder / "whole", here=True))
    if code:
        raise SystemExit(f"the undisturbed sweep failed: {said}")
    seconds = time.monotonic() - begun
    print(json.dumps(hurt(grid, folder / "hurt", seconds, random.Random(seed))))


if __name__ == "__main__":
    main()
