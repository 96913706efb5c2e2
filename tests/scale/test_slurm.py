"""A sweep by Snakemake's Slurm executor, on a real Slurm of one node, against the same one here."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT, rows_in, table_of, write_grid

from grath_utils.scale.sweep_results import collect
from grath_utils.scale.sweeps import run_here

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged")
PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin"])
MISSING = [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]
LIMIT = 120  # seconds

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        bool(MISSING),
        reason=f"no {', '.join(MISSING)} here (Debian: slurmctld slurmd slurm-client munge)",
    ),
    pytest.mark.skipif(
        not hasattr(os, "getuid") or os.getuid() != 0, reason="Slurm's daemon of a node wants root"
    ),
    pytest.mark.skipif(
        importlib.util.find_spec("snakemake_executor_plugin_slurm") is None,
        reason="snakemake-executor-plugin-slurm is not installed",
    ),
]


def test_the_rows_of_slurm_are_those_of_a_sweep_here(
    tmp_path: Path, tiny_settings: dict[str, object]
) -> None:
    grid = write_grid(tmp_path / "grid.yaml", tiny_settings, {"seed": [0]})
    out, node = tmp_path / "slurm", tmp_path / "node"
    sweep = [sys.executable, "-m", "grath_utils", "sweep", str(grid), "--out", str(out), "--"]
    sweep += ["--executor", "slurm", "--jobs", "2"]
    # This Slurm keeps no accounts, which the executor would ask.
    sweep += ["--slurm-status-command", "squeue"]
    sweep += ["--slurm-init-seconds-before-status-checks", "2"]
    script = str(ROOT / "tests" / "scale" / "slurm_node.sh")
    # What Slurm has done, by its own account, is in the last lines.
    shown = '"$@"; echo "exit code $?"; squeue --states=all --noheader --format="%T"'
    command = [script, str(node), "bash", "-c", shown, "_", *sweep]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT)
    said = done.stdout + done.stderr
    assert "exit code 0\n" in done.stdout, said
    states = done.stdout.partition("exit code 0\n")[2].split()
    points = rows_in(out)
    assert len(points) == 1
    assert len(states) > len(points), "the shared stages were jobs, too"
    assert set(states) == {"COMPLETED"}, said
    run_here(str(grid), tmp_path / "here", say=lambda line: None)
    collect(tmp_path / "here")
    assert table_of(out) == table_of(tmp_path / "here")
