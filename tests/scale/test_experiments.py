"""Experiments beside a run: what they are cut to, that they share and resume, and how they read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import yaml

from grath_utils.config import OWN_QUESTIONS, load_config
from grath_utils.errors import GrathError, UsageError
from grath_utils.evaluation import paired_difference
from grath_utils.files import read_json
from grath_utils.loop.run_dir import Run, open_run
from grath_utils.scale.experiments import (
    SIZES,
    changes,
    contrasts,
    cut_grid,
    folder_of,
    run_experiment,
    size_of,
    verdicts,
    why_not,
)
from grath_utils.scale.grids import expand, read_grid


@pytest.fixture(scope="module")
def tiny_run(tiny_settings: dict[str, object], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run whose experiments are as little as they can be."""
    kept = ("dpo.warmup_steps", "loop.iterations")  # the experiments' size says these
    settings = {key: value for key, value in tiny_settings.items() if key not in kept}
    return open_run(tmp_path_factory.mktemp("experiments") / "run", load_config("smoke", settings))


def test_the_sizes_are_settings_of_their_profiles() -> None:
    for profile, size in SIZES.items():
        config = load_config(profile, size)
        assert {key: config.flat()[key] for key in size} == size
        assert config.pairs.mode == "default"  # the experiments are about answers that are written
        assert config.questions.source in OWN_QUESTIONS


def test_a_cut_grid_is_small_and_keeps_what_the_user_and_the_experiment_set(tmp_path: Path) -> None:
    run = open_run(tmp_path / "run", load_config("cpu", {"dpo.steps": 20, "dpo.beta": 0.2}, seed=4))
    assert size_of(run) == {**SIZES["cpu"], "dpo.steps": 20, "dpo.beta": 0.2}
    path = cut_grid("what_matters_chain", run, {"dpo.chain": ["continue", "fresh"]})
    assert path.is_relative_to(folder_of(run))
    points = expand(read_grid(str(path)))
    assert [point.config.dpo.chain for point in points] == ["continue", "fresh"]
    for point in points:
        assert point.config.seed == 4
        assert point.config.dpo.steps == 20  # the user's
        assert point.config.dpo.beta == 0.2
        assert point.config.questions.limit == SIZES["cpu"]["questions.limit"]
        assert point.config.loop.iterations == 3  # the shipped grid's, for the small one has one
    common = {"dpo.beta": 1, "loop.iterations": 2}
    again = cut_grid("what_matters_chain", run, {"dpo.chain": ["fresh"]}, common=common)
    tree = yaml.safe_load(again.read_text(encoding="utf-8"))
    assert tree["set"]["dpo.beta"] == 1  # else the experiment would ask something else
    assert tree["set"]["loop.iterations"] == 2


def test_an_axis_is_one_of_the_grid_s_and_goes_before_size_and_user(tmp_path: Path) -> None:
    run = open_run(tmp_path / "run", load_config("smoke", {"questions.limit": 30}))
    axes = {"questions.limit": [4, 8], "seed": [1, 2]}
    points = expand(read_grid(str(cut_grid("what_matters_pairs", run, axes))))
    found = [(point.config.questions.limit, point.config.seed) for point in points]
    assert found == [(4, 1), (4, 2), (8, 1), (8, 2)]
    with pytest.raises(UsageError, match=r'does not vary "dpo.chian"; did you mean "dpo.chain"'):
        cut_grid("what_matters_chain", run, {"dpo.chian": ["fresh"]})


def test_an_experiment_runs_shares_and_reads(tiny_run: Run) -> None:
    said: list[str] = []
    grid = cut_grid("what_matters_iterations", tiny_run, {"loop.iterations": [1, 2]})
    trials, failed = run_experiment(grid, say=said.append)
    assert failed == []
    assert [trial.name for trial in trials] == ["iterations=1", "iterations=2"]
    assert [line.split()[0] for line in said] == ["done", "done"]
    one, two = trials
    assert one.result("probe", base=True)["items"] == two.result("probe", base=True)["items"]

    moved = dict(changes(trials))
    assert list(moved) == ["iterations=1: probe mc2", "iterations=2: probe mc2"]
    ((name, found),) = contrasts(trials)
    assert name == "iterations=2 against iterations=1: probe mc2"
    means = [
        np.mean([item["metrics"]["mc2"] for item in trial.result("probe")["items"]])
        for trial in trials
    ]
    assert found["value"] == pytest.approx(means[1] - means[0])
    first, second = (change["value"] for change in moved.values())
    assert found["value"] == pytest.approx(second - first)

    # Another experiment has the first point as well: it is not run again.
    runs = folder_of(tiny_run) / "sweep" / "runs"
    before = sorted(path.name for path in runs.iterdir())
    common = {"loop.iterations": 1}
    grid = cut_grid("what_matters_shots", tiny_run, {"pairs.shots": [0]}, common=common)
    (same,), _ = run_experiment(grid, say=str)
    assert same.run.path == one.run.path
    assert sorted(path.name for path in runs.iterdir()) == before


def test_verdicts() -> None:
    found = {"value": 0.02, "n": 6, "gained": 1, "lost": 1, "smallest_detectable": 0.031}
    cases = {
        "higher": {"ci95": [0.01, 0.03]},
        "cannot tell": {"ci95": [-0.01, 0.05]},
        "LOWER": {"ci95": [-0.03, -0.01]},
        "no item moved": paired_difference([0, 1] * 3, [0, 1] * 3, 9, 0),
    }
    rows = verdicts([(name, found | case) for name, case in cases.items()])
    assert [row[4] for row in rows] == list(cases)
    assert rows[0] == ("higher", 6, "+2.0 [+1.0, +3.0]", "3.1", "higher")
    # 6 items: z^2 / (n + z^2) = 3.8415 / 9.8415 = 39.0 %
    assert rows[3] == ("no item moved", 6, "+0.0 [-39.0, +39.0]", "unknown", "no item moved")
    (row,) = verdicts([("one item", paired_difference([0], [1], 9, 0, single=True))])
    assert row == ("one item", 1, "+100.0 [–]", "unknown", "cannot tell")


def test_failed_points_are_returned_and_without_any_other_it_stops(tiny_run: Run) -> None:
    # The course's tiny questions have no candidates to choose from.
    common = {"questions.source": tiny_run.config.questions.source}
    axes = {"pairs.annotated": [False, True]}
    grid = cut_grid("what_matters_answers", tiny_run, axes, common=common)
    (trial,), (failed,) = run_experiment(grid, say=str)
    assert trial.name == "annotated=false"
    assert "needs questions with candidates" in failed.error
    axes = {"pairs.annotated": [True]}
    with pytest.raises(GrathError, match="no point of what_matters_answers.yaml ended well"):
        run_experiment(cut_grid("what_matters_answers", tiny_run, axes, common=common), say=str)


def test_runs_of_several_seeds_are_named_by_them(tiny_run: Run) -> None:
    grid = cut_grid("what_matters_seed", tiny_run, {"seed": [0, 1]})
    trials, _ = run_experiment(grid, say=str)
    assert [trial.name for trial in trials] == ["seed=0", "seed=1"]
    rows = read_json(folder_of(tiny_run) / "sweep" / "points.json")
    assert len(rows["points"]) == 2
    with pytest.raises(UsageError, match="cannot be compared"):  # a limit draws items by the seed
        contrasts(trials)


def test_a_source_that_is_not_there_says_why(tiny_run: Run, tmp_path: Path, monkeypatch) -> None:
    assert why_not(tiny_run, "own") is None
    monkeypatch.setenv("GRATH_MIRROR", str(tmp_path))
    assert "has no ai2_arc/ARC-Challenge/train.jsonl" in str(why_not(tiny_run, "arc_challenge"))
