"""The drawings: the committed pictures are what the code draws, and each says what it should."""

from __future__ import annotations

import importlib.util
import io
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.patches import Rectangle
from PIL import Image

from grath_utils.evaluation import paired_difference, t_interval
from grath_utils.figures import drawings, plots

matplotlib.use("Agg")

IMAGES = Path(__file__).resolve().parents[2] / "notebooks" / "images"
_spec = importlib.util.spec_from_file_location("draw", IMAGES / "draw.py")
draw = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(draw)


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    matplotlib.pyplot.close("all")


def grey(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture.convert("L"), dtype=float)


def test_there_is_a_picture_for_each_drawing_and_no_other() -> None:
    assert {path.stem for path in IMAGES.glob("*.png")} == draw.PICTURES.keys()


@pytest.mark.parametrize("name", draw.PICTURES)
def test_committed_pictures_are_what_the_code_draws(name: str) -> None:
    committed = Image.open(IMAGES / f"{name}.png")
    drawn = Image.open(io.BytesIO(draw.picture(name)))
    # Platforms round text a little differently; another text or box is far beyond this.
    assert abs(np.subtract(committed.size, drawn.size)).max() <= 3
    before, after = grey(committed), grey(drawn.resize(committed.size))
    assert abs(before - after).mean() < 1.0, f"run `python notebooks/images/draw.py` ({name})"
    assert (IMAGES / f"{name}.png").stat().st_size < 60_000


def coloured(figure, colour: str) -> int:
    """Count the boxes of one colour in a drawing of tokens."""
    boxes = [p for p in figure.axes[0].patches if isinstance(p, Rectangle) and p.get_fill()]
    return sum(np.allclose(box.get_facecolor()[:3], to_rgb(colour)) for box in boxes)


def test_the_anatomy_of_a_pair_colours_what_differs_and_nothing_else() -> None:
    shared = "ice is dense than water".split()
    correct, incorrect = (
        [*shared[:2], "less", *shared[2:]],
        [*shared[:2], "far", "more", *shared[2:]],
    )
    figure = drawings.draw_pair(["why"], correct, incorrect)
    assert coloured(figure, plots.BLUE) == 1
    assert coloured(figure, plots.VERMILION) == 2
    hatched = [p for p in figure.axes[0].patches if p.get_hatch()]
    assert len(hatched) == 2, "a grey print shows the difference, too"
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert [t for t in texts if t in {*correct, *incorrect}] == correct + incorrect


def test_long_texts_continue_in_the_next_line() -> None:
    words = ["word"] * 60
    figure = drawings.draw_pair(words, words, words)
    left, right = figure.axes[0].get_xlim()
    boxes = [p for p in figure.axes[0].patches if isinstance(p, Rectangle)]
    assert len(boxes) == 180
    assert all(left <= p.get_x() and p.get_x() + p.get_width() <= right for p in boxes)
    assert len({p.get_y() for p in boxes}) >= 9


def test_a_token_is_coloured_by_its_log_ratio_and_says_it() -> None:
    tokens, ratios = ["The", " moon", " shines", "<end>"], [0.0, 0.5, -4.0, -0.02]
    figure = drawings.draw_log_ratios([("before", tokens, [0.0] * 4), ("after", tokens, ratios)])
    boxes = [p for p in figure.axes[0].patches if isinstance(p, Rectangle)]
    assert len(boxes) == 8
    red, _, blue = np.array([box.get_facecolor()[:3] for box in boxes]).T
    assert np.ptp(red[:4]) == 0, "before training nothing has moved"
    assert blue[5] > red[5], "purple: more probable"
    assert blue[6] < red[6] - 0.5, "orange: less probable"
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert texts[9:] == ["after\n-3.5 nats", "The", "+0.0", "\u00b7moon", "+0.5",
                         "\u00b7shines", "-4.0", "<end>", "+0.0"]  # fmt: skip


@pytest.mark.parametrize(
    ("scores", "mc1", "mc3"), [((-1.0, -3.0, -2.0), 1, "1 of 2"), ((-3.0, -1.0, -2.0), 0, "1 of 2")]
)
def test_mc_scoring_shows_the_metrics_of_the_library(scores, mc1: int, mc3: str) -> None:
    from grath_utils.evaluation import metrics

    labels = [1, 1, 0]
    figure = drawings.draw_mc_scoring(["a", "b", "c"], scores, labels)
    left, right = figure.axes
    assert f"line?  {mc1}" in left.get_title(loc="left")
    assert mc1 == metrics.mc1([scores[0], scores[2]], gold=0)
    assert mc3 in left.get_title(loc="left")
    shown = [text.get_text() for text in right.texts]
    assert f"{metrics.mc2(np.array(scores), np.array(labels)):.3f}" in shown
    assert sum(bar.get_width() for bar in right.patches) == pytest.approx(1)


def test_a_value_without_an_interval_is_shown_and_says_why() -> None:
    one = {"metrics": {"mc1": {"value": 1.0, "ci95": None, "n": 1}}}
    two = {"metrics": {"mc1": {"value": 0.5, "ci95": [0.2, 0.8], "n": 9}}}
    for results, missing in (([one, two], True), ([two, two], False)):
        named = dict(zip(("base", "iter_0"), results, strict=True))
        (axes,) = plots.plot_metrics({"probe": named}).axes
        assert ("a single item has none" in axes.get_ylabel()) == missing
        assert [text.get_text() for text in axes.texts][1] == "50.0"
    rows = [
        ("one", paired_difference([0], [1], 9, 0, single=True)),
        ("unmoved", paired_difference([0, 1], [0, 1], 9, 0)),
    ]
    (axes,) = plots.plot_differences(rows).axes
    assert "a single item has none" in axes.get_xlabel()
    markers = [container.lines[0] for container in axes.containers if hasattr(container, "lines")]
    assert [line.get_markerfacecolor() for line in markers] == ["white", plots.GREY]


def levels(axes) -> list[float]:
    """Where dashed lines lie: what chance reaches."""
    return [x.get_ydata()[0] for x in axes.lines if x.get_linestyle() == "--"]


def test_accuracies_have_their_chance_line_and_a_cut_axis_its_mark() -> None:
    values = {"mc1": 0.4, "mc2": 0.6, "mc3": 0.3}
    metrics = {m: {"value": v, "ci95": [v - 0.05, v + 0.05], "n": 9} for m, v in values.items()}
    result = {"metrics": metrics, "controls": {"chance": 0.25, "uniform_mc2": 0.5}}
    figure = plots.plot_metrics({"probe": {"base": result, "iter_0": result}})
    assert [levels(axes) for axes in figure.axes] == [[25], [50], [25]]
    for axes in figure.axes:
        assert axes.get_ylim()[0] > 0
        strokes = [x for x in axes.lines if x.get_transform() == axes.transAxes]
        assert len(strokes) == 1
    free = {"metrics": {"mc1": {"value": 0.5, "ci95": [0.0, 0.9], "n": 9}}, "controls": {}}
    (axes,) = plots.plot_metrics({"answers": {"base": free}}).axes
    assert levels(axes) == [], "free answers have no chance level"


@pytest.mark.parametrize("scores", [[-7.0, -12.0, -8.0], [0.7, 0.1, 0.2], [-3.0, -3.0, -3.0]])
def test_the_more_probable_the_longer_the_bar(scores: list[float]) -> None:
    (axes,) = plots.plot_choices(["a", "b", "c"], scores, [1, 0, 0]).axes
    widths = [bar.get_width() for bar in axes.patches]
    assert min(widths) > 0
    np.testing.assert_allclose(np.subtract(widths, widths[0]), np.subtract(scores, scores[0]))
    assert bool(axes.lines) == (axes.get_xlim()[0] != 0), "a cut axis has its mark"
    assert [bar.get_hatch() for bar in axes.patches] == ["", "///", "///"]


def training_log(begin: float, steps: int) -> list[dict]:
    held = [
        {"step": s, "split": "held_out", "loss": 0.7, "margin": 0.1 * s, "logp_chosen": begin - s,
         "logp_rejected": begin - 3 * s} for s in range(steps + 1)
    ]  # fmt: skip
    return [*held, {"step": 1, "split": "train", "loss": 0.7, "margin": 0.0, "grad_norm": 1.0}]


def test_answers_are_shown_as_their_change_since_step_0_of_each_round() -> None:
    logs = [training_log(-20.0, 4), training_log(-31.0, 3)]
    answers = plots.plot_training(logs[0]).axes[2]
    assert [list(x.get_ydata()) for x in answers.lines[:2]] == [
        [0, -1, -2, -3, -4],
        [0, -3, -6, -9, -12],
    ]
    answers = plots.plot_rounds(logs).axes[0]
    curves = [line for line in answers.lines if line.get_color() == plots.BLUE]
    assert [list(x.get_xydata().ravel()) for x in curves] == [
        [0, 0, 1, -1, 2, -2, 3, -3, 4, -4],
        [4, 0, 5, -1, 6, -2, 7, -3],
    ]


def test_a_sweep_s_equal_seeds_have_no_interval() -> None:
    seeds = {"one": [0.1], "equal": [0.1, 0.1, 0.1], "apart": [0.1, 0.11, 0.12]}
    cells = [
        {"name": n, "seeds": v, "mean": np.mean(v), "ci95": t_interval(v)} for n, v in seeds.items()
    ]
    figure = plots.plot_sweep([("probe, mc1", cells)])
    looks = [container.lines[0].get_marker() for container in figure.axes[0].containers]
    faces = [container.lines[0].get_markerfacecolor() for container in figure.axes[0].containers]
    assert looks == ["o", "o", "D"]
    assert faces[:2] == ["white", "white"]
