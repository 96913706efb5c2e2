"""Do a small run again and again in forked children that are killed, or find the disk full.

Run as a script, because a process that forks must not have used torch's threads before::

    python tests/loop/fault_injection.py FOLDER MODEL QUESTIONS KILLS SEED

makes FOLDER/whole without disturbance, FOLDER/killed/N and FOLDER/full/N with faults, and prints
what it did as JSON.
Loading the libraries takes seconds and a stage of the tiny model a fraction of one, so they are
loaded once, and each try is a fork.
"""

from __future__ import annotations

import errno
import itertools
import json
import os
import random
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from grath_utils.config import Config, load_config
from grath_utils.dpo import trainer  # noqa: F401  (TRL takes seconds: loaded before the first fork)
from grath_utils.errors import GrathError
from grath_utils.files import read_json
from grath_utils.loop.stages import run_stages, start_run

LIMIT = 120  # seconds for one try
IGNORED = (".lock",)
VOLATILE = {"seconds", "resumed", "peak_memory_mib", "created", "finished", "started"}


def config_for(model: str, questions: str) -> Config:
    return load_config(
        "smoke",
        {
            "model.name": model,
            "model.dtype": "float32",
            "model.device": "cpu",
            "questions.source": questions,
            "questions.limit": None,
            "pairs.filters": ["none"],
            "pairs.batch_size": 2,
            "pairs.max_new_tokens": 16,
            "dpo.steps": 4,
            "dpo.save_every": 1,
            "evaluation.limit": 4,
            "evaluation.batch_tokens": 64,
        },
    )


def contents(run: Path) -> dict[str, object]:
    """Every file of a run, without what tells when and how fast it was made."""
    found: dict[str, object] = {}
    for path in sorted(p for p in run.rglob("*") if p.is_file() and p.name not in IGNORED):
        name = path.relative_to(run).as_posix()
        if name == "manifest.json":  # hashes of files with times in them
            found[name] = sorted(read_json(path))
        elif path.suffix == ".json":
            found[name] = _without_times(read_json(path), run.name)
        else:
            found[name] = path.read_bytes()
    return found


def _without_times(value: object, run_name: str) -> object:
    if isinstance(value, dict):
        kept = {k: v for k, v in value.items() if k not in VOLATILE and not k.endswith("seconds")}
        return {k: _without_times(v, run_name) for k, v in kept.items()}
    if isinstance(value, list):
        return [_without_times(item, run_name) for item in value]
    return value.replace(run_name, "RUN") if isinstance(value, str) else value


def check_same(run: Path, whole: Path) -> None:
    expected, found = contents(whole), contents(run)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == value, f"{run.name}/{name} differs from the undisturbed run"
    assert [p for p in run.rglob(".*") if p.name not in IGNORED] == []


def fork(work: Callable[[], None]) -> tuple[int, int]:
    """Start ``work`` in a child; return its process id and a pipe with the lines that it says."""
    reading, writing = os.pipe()
    child = os.fork()
    if child:
        os.close(writing)
        return child, reading
    os.close(reading)
    os.dup2(writing, 1)
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 2)
    try:
        work()
        os._exit(0)
    except GrathError as error:
        print(f"error: {error}", flush=True)
        os._exit(error.exit_code)
    except BaseException as error:
        print(f"traceback: {error!r}", flush=True)
        os._exit(70)


def lines_of(pipe: int) -> Iterator[str]:
    """Yield the lines of a pipe as they come, until the other end is closed."""
    rest = b""
    while select.select([pipe], [], [], LIMIT)[0]:
        chunk = os.read(pipe, 1 << 16)
        if not chunk:
            return
        *whole, rest = (rest + chunk).split(b"\n")
        yield from (line.decode() for line in whole)
    raise TimeoutError(f"the child said nothing for {LIMIT} s")


def do_run(folder: Path, config: Config) -> None:
    run_stages(start_run(folder, config), progress=False, say=lambda line: print(line, flush=True))


def stage_of(line: str) -> str | None:
    """Return ``train, iteration 0`` for ``[3/13] train, iteration 0``."""
    return line.partition("] ")[2] if line.startswith("[") else None


def undisturbed(folder: Path, config: Config) -> dict[str, float]:
    """Do the run once; return how long each stage took, in seconds."""
    child, pipe = fork(lambda: do_run(folder, config))
    begun = [(stage_of(line) or line, time.monotonic()) for line in lines_of(pipe)]
    os.close(pipe)
    _, status = os.waitpid(child, 0)
    if status:
        raise SystemExit(f"the undisturbed run failed: {begun[-1:]}")
    ends = [when for _, when in begun[1:]] + [time.monotonic()]
    return {name: end - when for (name, when), end in zip(begun, ends, strict=True)}


def killed_again_and_again(
    folder: Path, config: Config, durations: dict[str, float], each: int, draw: random.Random
) -> dict[str, int]:
    """Kill runs ``each`` times in each of their stages, at random moments; return the counts.

    A kill that comes too late finds the stage done, and a run has each stage once: so there may be
    several runs, each brought to its end.
    """
    kills = dict.fromkeys(durations, 0)
    for number in range(8):
        while not _one_try(folder / f"killed-{number}", config, durations, each, kills, draw):
            pass
        if min(kills.values()) >= each:
            break
    return kills


def _one_try(
    folder: Path,
    config: Config,
    durations: dict[str, float],
    each: int,
    kills: dict[str, int],
    draw: random.Random,
) -> bool:
    """Go on with a run, and kill it in the next stage that needs it; tell whether it is whole."""
    child, pipe = fork(lambda: do_run(folder, config))
    hit = None
    for line in lines_of(pipe):
        stage = stage_of(line)
        if stage and kills[stage] < each:
            # A stage that resumes from a journal has less left to do than it had.
            time.sleep(draw.uniform(0, durations[stage]) * draw.choice((0.8, 0.4, 0.1)))
            os.kill(child, signal.SIGKILL)
            hit = stage
            break
    os.close(pipe)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status) and hit:
        # The kill counts only for the stage that it stopped.
        kills[hit] += 1
    elif status:
        raise SystemExit(f"a child failed in {hit}: status {status}")
    return status == 0


def with_a_full_disk(
    folder: Path, config: Config, draw: random.Random, tries: int
) -> dict[str, list[str]]:
    """Let the disk be full from a random write on; return what the runs said, and what else."""
    said: dict[str, list[str]] = {"errors": [], "other": []}
    for number in range(tries):
        left = draw.randrange(40)
        last, failed = _to_the_end(
            lambda n=number, w=left: _short_of_space(folder / f"full-{n}", config, w)
        )
        said["errors" if failed and last.startswith("error: ") else "other"].append(last)
        last, failed = _to_the_end(lambda n=number: do_run(folder / f"full-{n}", config))
        if failed:
            said["other"].append(f"not resumed after {left} writes: {last}")
    return said


def _to_the_end(work: Callable[[], None]) -> tuple[str, bool]:
    """Return the last line that a child said, and whether it failed."""
    child, pipe = fork(work)
    last = list(lines_of(pipe))[-1]
    os.close(pipe)
    return last, os.waitpid(child, 0)[1] != 0


def _short_of_space(folder: Path, config: Config, left: int) -> None:
    no_space_after(left)
    do_run(folder, config)


def no_space_after(left: int) -> None:
    """From now on in this process, let the disk take ``left`` more files and then be full."""
    real, count = os.fsync, itertools.count()

    def fsync(handle: int) -> None:
        if next(count) >= left:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    os.fsync = fsync


def main() -> None:
    folder, model, questions, each, seed = sys.argv[1:]
    torch.set_num_threads(1)
    draw = random.Random(int(seed))
    config = config_for(model, questions)
    durations = undisturbed(Path(folder) / "whole", config)
    kills = killed_again_and_again(Path(folder) / "killed", config, durations, int(each), draw)
    said = with_a_full_disk(Path(folder) / "full", config, draw, 4)
    print(json.dumps({"durations": durations, "kills": kills, "full": said}))


if __name__ == "__main__":
    main()
