"""What one of several processes does in `test_processes.py`: small agreements, then a whole run.

usage: accelerate launch ... two_processes.py RESULTS.json ARGUMENTS OF grath_utils ...
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch

from grath_utils.cli import main
from grath_utils.config import Config
from grath_utils.dpo.adapters import full_adapter
from grath_utils.engine import processes
from grath_utils.errors import DataError
from grath_utils.loop.run_dir import Run, lock_run


def fail_in(rank: int) -> int:
    if processes.rank() == rank:
        raise DataError(f"found by process {rank}")
    return processes.rank()


def caught(work) -> str:
    try:
        work()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def sharded_adapter_is_whole_again() -> bool:
    """Split a module as FSDP 2 does, and put its trained weights together."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(5, 3), torch.nn.Linear(3, 2))
    module[0].requires_grad_(False)
    before = {name: p.detach().clone() for name, p in module[1].named_parameters(prefix="1")}
    fully_shard(module, mesh=init_device_mesh("cpu", (2,)))
    assert module[1].weight.to_local().shape == (1, 3), "half of it in each process"
    module(torch.ones(1, 5)).sum().backward()
    after = full_adapter(module)
    return after.keys() == before.keys() and all(torch.equal(after[n], before[n]) for n in after)


def agreements(folder: Path) -> dict[str, object]:
    """Return what this process saw; the test says what it should have been."""
    rank = processes.rank()
    seen: dict[str, object] = {
        "gathered": processes.gather(rank),
        "from main": processes.from_main(rank),
        "on main": processes.on_main(lambda: (rank, processes.size())),
        "in turns": list(
            processes.in_turns("abc", lambda c: f"{c} by {rank} of {processes.size()}")
        ),
        "share": processes.own_share([*range(5)]),
        "error on main": caught(lambda: processes.on_main(lambda: fail_in(0))),
        "error elsewhere": caught(lambda: list(processes.in_turns("ab", lambda _: fail_in(1)))),
    }
    seen["whole again"] = sharded_adapter_is_whole_again()
    run = Run(folder / "locked", Config())
    with lock_run(run), lock_run(run):
        processes.barrier()
        seen["locked"] = (run.path / ".lock").exists()
        # Another launch does not know who holds the lock.
        held = os.environ.pop("GRATH_RUN_LOCK")
        seen["stranger"] = caught(lambda: lock_run(run).__enter__())
        os.environ["GRATH_RUN_LOCK"] = held
    return seen


if __name__ == "__main__":
    results, *arguments = sys.argv[1:]
    everyone = processes.gather(agreements(Path(results).parent))
    if processes.is_main():
        Path(results).write_text(json.dumps(everyone), encoding="utf-8")
    sys.exit(main(arguments))
