"""Sweeps: shared stages, isolated failures, SIGKILL and resume; and the table that they end in."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import matplotlib.image
import pytest
import torch
from helpers import rows_in, table_of, write_grid

from grath_utils.cli import main
from grath_utils.config import load_config
from grath_utils.course.notebooks import open_notebook_run, run_parameters
from grath_utils.errors import RunError
from grath_utils.files import read_json, write_json
from grath_utils.loop.run_dir import load_run
from grath_utils.loop.stages import (
    evaluate_model,
    make_pairs,
    plan_stages,
    run_stages,
    start_run,
)
from grath_utils.scale.grids import planned_config
from grath_utils.scale.sweep_jobs import row_of, take_base, take_pairs
from grath_utils.scale.sweep_results import (
    PointOutcome,
    collect,
    last_word,
    panels,
    summarize_cells,
)
from grath_utils.scale.sweeps import lock_sweep, plan_sweep, run_here, snakemake_command

LIMIT = 900  # seconds
FULL = {"dpo.beta": [0.05], "lora.targets": [["q_proj"], ["q_proj", "v_proj"]], "seed": [0, 1]}
# Only the model itself can tell that it has no such layer.
ONE_FAILS = {"dpo.beta": [0.05], "lora.targets": [["absent_proj"], ["q_proj"]], "seed": [0]}


def needs_processes(test: Callable) -> Callable:
    """Mark a test of Snakemake's own jobs: slow, and only where there is bash."""
    return pytest.mark.slow(pytest.mark.skipif(os.name == "nt", reason="needs bash")(test))


def command(grid: Path, out: Path) -> list[str]:
    # Two jobs of one thread each, whatever the machine has.
    start = [sys.executable, "-m", "grath_utils", "sweep", str(grid), "--out", str(out)]
    return [*start, "--", "--cores", "2"]


def run_sweep(grid: Path, out: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(grid, out), capture_output=True, text=True, timeout=LIMIT)


@pytest.fixture(scope="module")
def story(tiny_settings, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """One folder: a grid with a failing point; the full grid, killed; the full grid, twice."""
    folder = tmp_path_factory.mktemp("sweep")
    out = folder / "sweep"
    small = write_grid(folder / "small.yaml", tiny_settings, ONE_FAILS)
    full = write_grid(folder / "full.yaml", tiny_settings, FULL)
    seen = SimpleNamespace(out=out, failing=run_sweep(small, out), failing_table=table_of(out))
    seen.failing_report = (out / "report.md").read_text(encoding="utf-8")
    before = rows_in(out)
    seen.stages = {path: path.stat().st_mtime_ns for path in (out / "shared").glob("*.done")}

    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command(full, out), start_new_session=True, **quiet)
    deadline = time.monotonic() + LIMIT
    while rows_in(out) == before and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    seen.done_when_killed = rows_in(out)

    seen.resumed, seen.again = run_sweep(full, out), run_sweep(full, out)
    seen.plan = read_json(out / "points.json")
    return seen


@pytest.fixture(scope="module")
def undisturbed(story, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same points as plain runs, one after the other in this process, sharing nothing."""
    out = tmp_path_factory.mktemp("undisturbed")
    write_json(out / "points.json", story.plan)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for name in (point["name"] for point in story.plan["points"]):
            run = start_run(out / "runs" / name, planned_config(story.plan, name))
            run_stages(run, progress=False, say=lambda line: None)
            write_json(out / "rows" / f"{name}.json", row_of(run))
    finally:
        torch.set_num_threads(threads)
    collect(out)
    return out


@needs_processes
def test_a_failing_point_is_named_and_does_not_stop_the_rest(story) -> None:
    assert story.failing.returncode == 1
    bad, good = story.failing_table
    assert (bad["lora.targets"], bad["status"]) == ("absent_proj", "failed")
    assert (good["lora.targets"], good["status"]) == ("q_proj", "done")
    assert bad["probe.mc1.change"] == ""
    assert good["probe.mc1.change"] != ""
    (named,) = (line for line in story.failing_report.splitlines() if bad["point"] in line)
    assert "absent_proj" in named.replace(bad["point"], "")  # the error itself
    assert f"logs/{bad['point']}.log" in named
    assert (story.out / "logs" / f"{bad['point']}.log").is_file()
    assert "1 of 2 points done, 1 failed" in story.failing_report
    *_, first, where = story.failing.stderr.splitlines()
    assert bad["point"] in first
    assert "report.md" in where


@needs_processes
def test_killed_in_the_middle_it_ends_in_the_same_table(story, undisturbed: Path) -> None:
    assert 2 <= len(story.done_when_killed) < 4
    assert story.resumed.returncode == 0, story.resumed.stderr
    assert len(rows_in(story.out)) == 4
    for name in ("table.csv", "summary.csv", "report.md"):
        assert (story.out / name).read_bytes() == (undisturbed / name).read_bytes(), name
    changes = {row["probe.mc2.change"] for row in table_of(story.out)}
    assert len(changes) > 1, "every point came out the same: the comparison shows nothing"
    # Once more, and nothing is left to do.
    assert story.again.returncode == 0
    assert "Nothing to be done" in story.again.stderr
    assert "4 of 4 points done" in story.again.stdout
    height, width = matplotlib.image.imread(story.out / "figure.png").shape[:2]
    assert 1000 < width < 2500
    assert 200 < height < 2500  # two cells


def comparable(path: Path) -> object:
    """Return what two makings of a file must have in common: all of it but measured costs.

    peft writes the set of adapted layers in an order that differs between processes, and an
    evaluation of a trained model holds a fingerprint of that file.
    """
    if path.name == "adapter_config.json":
        settings = read_json(path)
        return {**settings, "target_modules": sorted(settings["target_modules"])}
    if path.parts[-3] == "evaluation":
        result = read_json(path)
        del result["cost"]
        if path.parts[-2] != "base":
            del result["model"]["fingerprint"]
        return result
    if path.name == "manifest.json":  # in the order of the making; evaluations hold their cost
        return {k: "" if k.startswith("evaluation/") else v for k, v in read_json(path).items()}
    return path.read_bytes()


@needs_processes
def test_shared_runs_are_byte_for_byte_those_that_share_nothing(story, undisturbed) -> None:
    for point in story.plan["points"]:
        ours = load_run(story.out / "runs" / point["name"])
        theirs = load_run(undisturbed / "runs" / point["name"])
        assert ours.config == theirs.config
        made, expected = (
            {p.relative_to(run.path) for p in run.path.rglob("*") if p.is_file()}
            for run in (ours, theirs)
        )
        assert made == expected
        for name in expected - {Path("run.json")}:  # that one holds the time
            assert comparable(ours.path / name) == comparable(theirs.path / name), name


@needs_processes
def test_shared_stages_are_made_once(story) -> None:
    shared = story.plan["shared"]
    assert sorted(stage["kind"] for stage in shared.values()) == ["base", "base", "pairs", "pairs"]
    assert {path.stem for path in (story.out / "shared").glob("*.done")} == set(shared)
    # Those of the first grid were used again by the grid that had grown.
    assert len(story.stages) == 2
    assert all(path.stat().st_mtime_ns == made for path, made in story.stages.items())
    # A point's own log tells what it did itself.
    for point in story.plan["points"]:
        log = (story.out / "logs" / f"{point['name']}.log").read_text(encoding="utf-8")
        assert "write pairs, round 1" not in log
        assert "evaluate base" not in log


@needs_processes
def test_every_point_is_an_ordinary_run(story, capsys) -> None:
    run = load_run(story.out / "runs" / story.plan["points"][-1]["name"])
    assert all(stage.done for stage in plan_stages(run))
    assert main(["status", "--run-dir", str(run.path)]) == 0
    assert "6 of 6 stages done" in capsys.readouterr().out
    assert main(["report", "--run-dir", str(run.path)]) == 0
    assert run.report.is_file()
    run.report.unlink()
    given = run_parameters(run)  # what a notebook gets
    again = open_notebook_run(*(given[k] for k in ("PROFILE", "RUN_DIR", "SEED", "OVERRIDES")))
    assert again == run


@needs_processes
def test_shared_pairs_get_the_labels_that_a_run_of_its_own_gives(tiny_settings, tmp_path) -> None:
    shared = start_run(tmp_path / "shared", load_config("smoke", tiny_settings))
    make_pairs(shared, 0, progress=False)
    for more in ({"pairs.labels": "random"}, {"pairs.labels": "inverted", "pairs.flipped": 0.4}):
        config = load_config("smoke", {**tiny_settings, **more})
        alone, taker = (start_run(tmp_path / f"{name}{len(more)}", config) for name in "ab")
        make_pairs(alone, 0, progress=False)
        take_pairs(taker, shared.path)
        assert taker.pairs(0).read_text() == alone.pairs(0).read_text()
        assert taker.pairs(0).read_text() != shared.pairs(0).read_text()


def test_a_shared_stage_of_other_weights_is_not_taken(story, tmp_path: Path) -> None:
    name = next(n for n, stage in story.plan["shared"].items() if stage["kind"] == "base")
    shared = load_run(story.out / "shared" / name)
    record = {**shared.info(), "model": {"name": "x", "weights": "other"}}
    write_json(tmp_path / "shared" / "run.json", record)
    run = start_run(tmp_path / "run", shared.config)
    with pytest.raises(RunError, match="stands on model"):
        take_base(run, tmp_path / "shared")
    take_base(run, shared.path)
    assert evaluate_model(run, None)["probe"]["model"]["name"] == "run@base"


def test_without_snakemake_it_is_the_same_sweep(capsys, tiny_settings, tmp_path: Path) -> None:
    out, said = tmp_path / "sweep", []
    grid = write_grid(tmp_path / "small.yaml", tiny_settings, ONE_FAILS)
    assert main(["sweep", str(grid), "--out", str(out), "--here"]) == 1
    shown = capsys.readouterr().err
    assert "1 of 2 points done, 1 failed" in shown
    assert "absent_proj" in shown
    assert [row["status"] for row in table_of(out)] == ["failed", "done"]
    assert (out / "figure.png").is_file()

    # Again: what is done stays; the failure is tried again, and told again.
    (row,) = (out / "rows").glob("*.json")
    before = row.stat().st_mtime_ns
    bad, good = run_here(str(grid), out, say=said.append)
    assert [bad.status, good.status] == ["failed", "done"]
    assert "absent_proj" in bad.error
    assert "absent_proj" in said[0]
    assert bad.log == f"logs/{bad.name}.log"
    assert {row["metric"] for row in good.metrics} >= {"mc1", "mc2"}
    assert row.stat().st_mtime_ns == before

    # A grid with other keys, the same folder: the point that both have is not run again.
    other = {**tiny_settings, "lora.targets": ["q_proj"]}
    grid = write_grid(tmp_path / "other.yaml", other, {"dpo.beta": [0.05], "dpo.chain": ["merge"]})
    (new,) = run_here(str(grid), out, say=said.append)
    keys = {"dpo.beta": [0.05], "dpo.chain": ["continue"]}
    (twin,) = run_here(str(write_grid(tmp_path / "twin.yaml", other, keys)), out, say=said.append)
    assert new.status == twin.status == "done"
    assert twin.metrics == good.metrics
    assert read_json(out / "rows" / f"{twin.name}.json")["run"] == good.name
    assert not (out / "runs" / twin.name).exists()
    assert (out / "runs" / new.name).is_dir()


def test_a_shared_stage_that_fails_is_tried_once_and_named(tiny_settings, tmp_path: Path) -> None:
    settings = {**tiny_settings, "pairs.annotated": True}  # the questions have no candidates
    grid = write_grid(tmp_path / "grid.yaml", settings, {"dpo.beta": [0.05, 0.1]})
    outcomes = run_here(str(grid), tmp_path / "sweep", say=lambda line: None)
    assert [outcome.status for outcome in outcomes] == ["failed", "failed"]
    for outcome in outcomes:
        assert "the shared stage pairs-" in outcome.error
        assert "needs questions with candidates" in outcome.error


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ({"seed": [0, 0]}, "the same point twice"),
        ({"dpo.bata": [0.1]}, 'unknown key "dpo.bata" in "grid"; did you mean "dpo.beta"?'),
        ({"dpo.beta": [0.1, -1]}, '"dpo.beta" is -1.0; it must be above 0'),
        ({"evaluation.benchmarks": [["prob"]]}, 'did you mean "probe"'),
        ({"questions.source": ["own", "absent.jsonl"]}, "absent.jsonl: no such file"),
    ],
)
def test_a_refused_grid_begins_nothing(capsys, tmp_path: Path, grid, message: str) -> None:
    path = write_grid(tmp_path / "grid.yaml", {}, grid)
    for mode in ([], ["--plan"]):
        assert main(["sweep", str(path), "--out", str(tmp_path / "out"), *mode]) == 2
        err = capsys.readouterr().err
        assert err.startswith("error: ")
        assert message in err
    assert not (tmp_path / "out").exists()


def test_without_snakemake_it_says_how_to_install_it(capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["sweep", "smoke_2x2x2", "--out", str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err
    assert "needs Snakemake" in err
    assert "-m pip install 'snakemake" in err
    assert "--here" in err
    assert not (tmp_path / "out").exists()


def test_a_plan_can_be_looked_at_and_collected_at_any_time(capsys, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main(["sweep", "smoke_2x2x2", "--out", str(out), "--plan"]) == 0
    text = capsys.readouterr().out
    assert "8 points: 4 cells, 2 seeds" in text
    assert "2 times the pairs of round 1, 2 times the evaluation of the base model" in text
    assert "beta=0.05_reference=current_seed=0-" in text
    assert main(["sweep", "smoke_2x2x2", "--out", str(out), "--collect"]) == 0
    assert "0 of 8 points done, 8 not begun" in capsys.readouterr().out
    assert [row["status"] for row in table_of(out)] == ["not begun"] * 8


def test_a_folder_of_something_else_and_a_busy_one_are_refused(capsys, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    assert main(["sweep", "smoke_2x2x2", "--out", str(tmp_path / "mine"), "--plan"]) == 2
    assert "not empty and holds no points.json" in capsys.readouterr().err
    with lock_sweep(tmp_path / "out"):
        pass  # stopped before it had a plan
    plan_sweep("smoke_2x2x2", tmp_path / "out")
    with lock_sweep(tmp_path / "out"), pytest.raises(RunError, match="in use by another sweep"):
        plan_sweep("smoke_2x2x2", tmp_path / "out")


def test_arguments_after_two_dashes_go_to_snakemake(capsys, tmp_path: Path, monkeypatch) -> None:
    seen = {}

    def sweep(name: str, out: Path, **more: object) -> None:
        (out / "report.md").write_text("# Done")
        seen.update(more)

    monkeypatch.setattr("grath_utils.scale.sweeps.sweep", sweep)
    passed_on = ["--executor", "slurm", "--jobs", "20"]
    assert main(["sweep", "g", "--jobs", "3", "--out", str(tmp_path), "--", *passed_on]) == 0
    assert not seen.pop("here")
    assert seen == {"jobs": 3, "extra": passed_on}
    assert "# Done" in capsys.readouterr().out
    assert main(["options", "--", "--executor", "slurm"]) != 0
    assert 'only the command "sweep"' in capsys.readouterr().err


@pytest.mark.parametrize(
    ("extra", "code", "message"),
    [
        pytest.param(["--dry-run"], 0, "0 of 8 points done", marks=pytest.mark.slow),
        (["--no-such-option"], 1, "ended with exit code 2"),
    ],
)
def test_what_snakemake_itself_refuses_is_no_point_s_failure(
    capsys, tmp_path: Path, extra: list[str], code: int, message: str
) -> None:
    assert main(["sweep", "smoke_2x2x2", "--out", str(tmp_path / "out"), "--", *extra]) == code
    shown = capsys.readouterr()
    assert message in shown.out + shown.err
    assert not (tmp_path / "out" / "runs").exists()


def test_jobs_divide_the_cores_unless_snakemake_is_told_otherwise(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("grath_utils.scale.sweeps._cores", lambda: 8)

    def after(name: str, given: list[str]) -> list[str]:
        return given[given.index(name) + 1 :][:2]

    three = snakemake_command(tmp_path, jobs=3, extra=["--dry-run"])
    assert after("--cores", three)[0] == "6"
    assert after("--set-threads", three) == ["shared=2", "point=2"]
    assert three[-1] == "--dry-run"
    for extra in (["--executor", "slurm", "--jobs", "20"], ["--cores=2"], ["-j", "3"]):
        given = snakemake_command(tmp_path, jobs=3, extra=extra)
        assert "--set-threads" not in given
        assert given[-len(extra) :] == extra


def outcome(value: float, *, seed: int, metric: str = "mc1", **values: object) -> PointOutcome:
    numbers = {"value": value, "ci95": [value - 0.1, value + 0.1]}
    row = {"benchmark": "probe", "metric": metric, "n": 10}
    parts = {"base": numbers, "last": numbers, "change": {**numbers, "p_value": 0.5}}
    return PointOutcome(f"p{seed}", {**values, "seed": seed}, "done", [{**row, **parts}])


def test_intervals_are_over_the_seeds_of_a_cell() -> None:
    done = [outcome(v, seed=s, beta=0.1) for s, v in enumerate([0.1, 0.2, 0.3])]
    done.append(outcome(0.4, seed=0, beta=0.2))
    first, second = summarize_cells(done)
    change = first["metrics"]["probe.mc1.change"]
    assert first["values"] == {"beta": 0.1}
    assert first["n"] == 3
    assert change["mean"] == pytest.approx(0.2)
    # t = 4.3027 for two degrees of freedom, standard error 0.1 / sqrt(3)
    assert change["ci95"] == pytest.approx([0.2 - 0.24841, 0.2 + 0.24841], abs=1e-5)
    assert second["n"] == 1
    assert second["metrics"]["probe.mc1.change"]["ci95"] is None


def test_the_figure_shows_two_metrics_of_a_benchmark_and_every_cell() -> None:
    done = [
        outcome(0.1, seed=0, metric=metric, beta=beta)
        for beta, metric in ((0.1, "mc1"), (0.1, "mc2"), (0.1, "mc3"), (0.2, "mc1"))
    ]
    shown = panels(summarize_cells(done))
    assert [title for title, _ in shown] == ["probe, mc1", "probe, mc2"]
    assert [[len(cell["seeds"]) for cell in cells] for _, cells in shown] == [[1, 1], [1, 0]]


@pytest.mark.parametrize(
    ("log", "expected"),
    [
        ("[1/2] train\nerror: too short\n  of memory\n", ("failed", "too short of memory")),
        ("Traceback (most recent):\n  x\nValueError: bad\n", ("failed", "ValueError: bad")),
        ("[1/2] train\n", ("unfinished", "stopped without an error (killed?) after: [1/2] train")),
        ("", ("unfinished", "stopped without an error (killed?) after: (the log is empty)")),
    ],
)
def test_the_last_word_of_a_log(log: str, expected: tuple[str, str]) -> None:
    assert last_word(log) == expected
