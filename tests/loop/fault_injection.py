"""Do a small run again and again in forked children that are killed, or find the disk full.

Run as a script, because a process that forks must not have used torch's threads before::

    python tests/loop/fault_injection.py FOLDER KILLS SEED

does the run of FOLDER/config.json: FOLDER/whole without disturbance, FOLDER/killed/N and
FOLDER/full/N with faults, and prints what it did as JSON. Loading the libraries takes seconds and a
stage of the tiny model a fraction of one, so they are loaded once, and each try is a fork.
"""

from __future__ import annotations

import errno
import itertools
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

from grath_utils.config import Config, config_from_dict
from grath_utils.dpo import trainer  # noqa: F401  (TRL takes seconds: loaded before the first fork)
from grath_utils.errors import GrathError
from grath_utils.files import read_json
from grath_utils.loop.stages import run_stages, start_run

LIMIT = 120  # seconds for one try
VOLATILE = {"seconds", "resumed", "peak_memory_mib", "created", "finished", "started"}
Say = Callable[[str], None]


# --- for the tests -------------------------------------------------------------------------------


def run_script(name: str, *arguments: object) -> dict:
    """Run a script of this folder in a process that has one thread; return what it printed."""
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name(name), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=1500,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
    )
    assert done.returncode == 0, done.stderr + done.stdout
    return json.loads(done.stdout.splitlines()[-1])


def contents(run: Path) -> dict[str, object]:
    """Every file of a run, without what tells when and how fast it was made."""
    found: dict[str, object] = {}
    for path in sorted(p for p in run.rglob("*") if p.is_file() and p.name != ".lock"):
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
    assert [p for p in run.rglob(".*") if p.name != ".lock"] == []


# --- children ------------------------------------------------------------------------------------


def fork(work: Callable[[Say], object]) -> tuple[BaseProcess, Connection]:
    """Start ``work(say)`` in a forked child; return it, and the pipe with what it says."""
    context = multiprocessing.get_context("fork")
    reading, writing = context.Pipe(duplex=False)

    def child() -> None:
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        try:
            work(writing.send)
        except GrathError as error:
            writing.send(f"error: {error}")
            os._exit(error.exit_code)
        except BaseException as error:
            writing.send(f"traceback: {error!r}")
            os._exit(70)

    process = context.Process(target=child)
    process.start()
    writing.close()
    return process, reading


def lines_of(pipe: Connection) -> Iterator[str]:
    """Yield what a child says as it comes, until it ends."""
    while pipe.poll(LIMIT):
        try:
            yield pipe.recv()
        except EOFError:
            return
    raise TimeoutError(f"the child said nothing for {LIMIT} s")


def to_the_end(work: Callable[[Say], object]) -> tuple[int, list[str]]:
    """Let a child do ``work``; return its exit code and what it said."""
    process, pipe = fork(work)
    said = list(lines_of(pipe))
    process.join()
    return process.exitcode, said


def no_space_after(left: int) -> None:
    """From now on in this process, let the disk take ``left`` more files and then be full."""
    real, count = os.fsync, itertools.count()

    def fsync(handle: int) -> None:
        if next(count) >= left:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    os.fsync = fsync


# --- one run with faults -------------------------------------------------------------------------


def do_run(folder: Path, config: Config, say: Say, *, left: int | None = None) -> None:
    if left is not None:
        no_space_after(left)
    run_stages(start_run(folder, config), progress=False, say=lambda line: say(line.split("] ")[1]))


def undisturbed(folder: Path, config: Config) -> dict[str, float]:
    """Do the run once; return how long each stage took, in seconds."""
    process, pipe = fork(lambda say: do_run(folder, config, say))
    begun = [(stage, time.monotonic()) for stage in lines_of(pipe)]
    process.join()
    if process.exitcode:
        raise SystemExit(f"the undisturbed run failed: {begun[-1:]}")
    ends = [when for _, when in begun[1:]] + [time.monotonic()]
    return {stage: end - when for (stage, when), end in zip(begun, ends, strict=True)}


def killed_again_and_again(
    folder: Path, config: Config, durations: dict[str, float], each: int, draw: random.Random
) -> dict[str, int]:
    """Kill runs ``each`` times in each of their stages, at random moments; return the counts.

    A kill that comes too late finds the stage done, and a run has each stage once: so there may be
    several runs, each brought to its end.
    """
    kills, number = dict.fromkeys(durations, 0), 0
    while min(kills.values()) < each and number < 8:
        process, pipe = fork(lambda say, n=number: do_run(folder / f"killed-{n}", config, say))
        hit = next((stage for stage in lines_of(pipe) if kills.get(stage, each) < each), None)
        if hit:
            # A stage that resumes from a journal has less left to do than it had.
            time.sleep(draw.uniform(0, durations[hit]) * draw.choice((0.8, 0.4, 0.1)))
            process.kill()
        process.join()
        if process.exitcode == 0:
            number += 1
        elif process.exitcode == -signal.SIGKILL:
            kills[hit] += 1
        else:
            raise SystemExit(f"a child failed in {hit}: {process.exitcode}")
    to_the_end(lambda say: do_run(folder / f"killed-{number}", config, say))
    return kills


def with_a_full_disk(
    folder: Path, config: Config, draw: random.Random, tries: int
) -> dict[str, list[str]]:
    """Let the disk be full from a random write on; return what the runs said, and what else."""
    said: dict[str, list[str]] = {"errors": [], "other": []}
    for number in range(tries):
        left, run = draw.randrange(40), folder / f"full-{number}"
        code, [*_, last] = to_the_end(
            lambda say, run=run, left=left: do_run(run, config, say, left=left)
        )
        said["errors" if code and last.startswith("error: ") else "other"].append(last)
        code, [*_, last] = to_the_end(lambda say, run=run: do_run(run, config, say))
        if code:
            said["other"].append(f"not resumed after {left} writes: {last}")
    return said


def main() -> None:
    folder, each, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    draw = random.Random(seed)
    config = config_from_dict(read_json(folder / "config.json"))
    durations = undisturbed(folder / "whole", config)
    kills = killed_again_and_again(folder / "killed", config, durations, each, draw)
    said = with_a_full_disk(folder / "full", config, draw, 4)
    print(json.dumps({"kills": kills, "full": said}))


if __name__ == "__main__":
    main()
