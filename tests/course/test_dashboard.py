"""The dashboard's tables say so where a run's parts do not belong together."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from grath_utils.course import dashboard_panels, sample_rows
from grath_utils.errors import DataError
from grath_utils.files import read_json, write_json
from grath_utils.loop.run_dir import Run


def test_answers_to_questions_of_another_run_are_named(tmp_path: Path, small_run: Run) -> None:
    columns, rows = sample_rows(small_run, 1)
    assert [len(row) for row in rows] == [len(columns)]
    run = Run(shutil.copytree(small_run.path, tmp_path / "run"), small_run.config)
    signals = read_json(run.signals("base"))
    write_json(run.signals("base"), {**signals, "questions": ["q99"]})
    with pytest.raises(DataError, match="base.json has answers to q99, .* measured again"):
        sample_rows(run, 1)


def test_the_dashboard_has_four_panels_and_the_last_one_its_chance(small_run: Run) -> None:
    *judged, reached = dashboard_panels(small_run)
    assert [panel.title.split(":")[0] for panel in judged] == [
        "held-out margin",
        "gain of the chosen answers",
        "drift",
    ]
    for panel in judged:
        assert panel.points[0][:2] == ("base", 0.0) == (panel.named, panel.level)
    benchmark = small_run.config.evaluation.benchmarks[0]
    result = read_json(small_run.evaluation("base", benchmark))
    assert reached.title == f"{benchmark}: {next(iter(result['metrics']))}"
    assert (reached.level, reached.named) == (100 * result["controls"]["chance"], "chance")
    assert reached.points[0][1] == 100 * result["metrics"]["mc1"]["value"]
