"""The plots of records: every row is drawn where it belongs, with its interval, once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb

from grath_utils.figures import plots
from grath_utils.files import read_jsonl

matplotlib.use("Agg")

APPENDIX = Path(__file__).resolve().parents[2] / "notebooks" / "appendix"


@pytest.fixture(autouse=True)
def _close_figures() -> Iterator[None]:
    yield
    matplotlib.pyplot.close("all")


def intervals(axes: Axes) -> list[tuple[float, float, float, bool]]:
    """Return (value, low, high, is it filled?) of all error bars, in the order of drawing."""
    found = []
    for point, _, (bars,) in axes.containers:
        low, high = bars.get_segments()[0][:, 0]
        is_filled = point.get_markerfacecolor() != "white"
        found.append((point.get_xdata()[0], low, high, is_filled))
    return found


def test_arms_stand_with_their_change_and_with_their_gain_over_the_placebo() -> None:
    rows = read_jsonl(APPENDIX / "recipe_arms.jsonl")
    figure = plots.plot_arms(rows)
    over = [row["over_random"] for row in rows if "over_random" in row]
    for axes, gains in zip(figure.axes, (rows, over), strict=True):
        wanted = [(g["change"], *g["ci95"], g["ci95"][0] * g["ci95"][1] > 0) for g in gains]
        np.testing.assert_allclose(intervals(axes), wanted)
        places = [point.get_ydata()[0] for point, *_ in axes.containers]
        assert len(set(places)) == len(gains), "no arm hides another one"
    names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert names[0] == "truthfulqa_mc\nMC1, n = 419"
    named = [text.get_text() for text in figure.legends[0].get_texts()]
    assert named[:2] == ["the model judges", "labels by a coin (placebo)"]


def dose(arm: str, steps: int, metric: str, change: float) -> dict:
    ends = {"change": change, "ci95": [change - 1, change + 2]}
    row = {"arm": arm, "steps": steps, "benchmark": "probe", "metric": metric, "value": 30 + change}
    return {**row, **ends, "nats_true": -steps / 2, "nats_false": -float(steps)}


def test_the_dose_begins_at_no_change_and_shows_the_nats_once() -> None:
    rows = [
        dose(arm, steps, metric, gain * steps)
        for arm, gain in (("random", 0.1), ("own", 0.5))
        for metric in ("mc1", "mc2")
        for steps in (8, 4)  # in any order
    ]
    mc1, mc2, nats = plots.plot_dose(rows).axes
    for axes in (mc1, mc2):
        random, own, *_ = axes.lines
        np.testing.assert_allclose(own.get_xydata(), [(0, 0), (4, 2), (8, 4)])
        np.testing.assert_allclose(random.get_xydata(), [(0, 0), (4, 0.4), (8, 0.8)])
        assert own.get_color() == plots.ARMS["own"][1]
        assert len(axes.collections) == 2, "a band for each arm"
        heights = axes.collections[1].get_paths()[0].vertices[:, 1]
        assert (heights.min(), heights.max()) == (0, 6)
    assert len(nats.lines) == 2 * 2 + 1
    np.testing.assert_allclose(nats.lines[0].get_ydata(), [0, -2, -4])
    np.testing.assert_allclose(nats.lines[1].get_ydata(), [0, -4, -8])
    assert nats.lines[1].get_linestyle() == "--"


def test_judges_are_shown_by_what_they_keep_and_by_what_of_it_is_right() -> None:
    rows = read_jsonl(APPENDIX / "recipe_sealed.jsonl")
    kept, right = plots.plot_judge(rows).axes
    assert [p[0] for p in intervals(kept)] == [100 * r["kept"] / r["pairs"] for r in rows]
    assert [p[0] for p in intervals(right)] == [100 * r["kept_right"] / r["kept"] for r in rows]
    for axes in (kept, right):
        assert all(low < value <= high for value, low, high, _ in intervals(axes))
        assert axes.get_xlim() == (0, 100)
    assert [line.get_xdata()[0] for line in right.lines if line.get_linestyle() == "--"] == [50]
    assert {label.get_text() for label in kept.get_yticklabels()} == {r["judge"] for r in rows}


# How linear RGB looks to people without one kind of cone: Machado, Oliveira and Fernandes (2009).
CONES = {
    "all": np.eye(3),
    "no long": [[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]],
    "no middle": [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]],
    "no short": [[1.256, -0.077, -0.179], [-0.078, 0.931, 0.148], [0.005, 0.691, 0.304]],
}


def seen(colour: str, cones: str) -> np.ndarray:
    """A colour in CIELAB, where a distance of 10 is plain to see."""
    rgb = np.array(to_rgb(colour))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    to_xyz = [[0.434, 0.376, 0.190], [0.213, 0.715, 0.072], [0.018, 0.109, 0.873]]
    x, y, z = np.cbrt(to_xyz @ np.clip(CONES[cones] @ linear, 0, 1))
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("cones", CONES)
@pytest.mark.parametrize(
    "colours",
    [[plots.BLUE, plots.VERMILION], plots.MODEL_COLOURS, [c for _, c, _ in plots.ARMS.values()]],
)
def test_what_stands_side_by_side_differs_for_colour_blind_readers(cones, colours) -> None:
    places = [seen(colour, cones) for colour in colours]
    for i, place in enumerate(places):
        assert all(np.linalg.norm(place - other) > 12 for other in places[:i]), colours[i]


def test_in_a_grey_print_marks_tell_apart() -> None:
    for marks in ([m for *_, m in plots.ARMS.values()], [x["fmt"] for x in plots.MODEL_LOOKS]):
        assert len(set(marks)) == len(marks)
