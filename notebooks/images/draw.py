"""Draw the pictures that pages and slides show without running anything.

``python notebooks/images/draw.py`` writes them all; a test tells when one is not what its code
draws any more.
"""

import io
from collections.abc import Callable
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from grath_utils.figures import drawings, plots
from grath_utils.files import atomic_path, read_jsonl
from grath_utils.workshop.render import smaller_png

# What a polar bear's skin looks like, scored by no model: the toy item of notebook 4.
ANSWERS = ("Mostly black.", "Black under the fur.", "Dark, not white.", "White.", "Pink.", "Gray.")
SCORES = (-7.0, -9.0, -12.0, -8.0, -11.0, -13.0)
TRUE = (1, 1, 1, 0, 0, 0)
RECORDS = Path(__file__).resolve().parent.parent / "appendix"

PICTURES: dict[str, Callable[[], Figure]] = {
    "loop": drawings.draw_loop,
    "rounds": drawings.draw_rounds,
    "dpo_step": drawings.draw_dpo_step,
    "qlora": drawings.draw_qlora,
    "pair": lambda: drawings.draw_pair(
        "Why does ice float on water?".split(),
        "Ice is less dense than liquid water.".split(),
        "Ice is less warm than liquid water.".split(),
    ),
    "mc_scoring": lambda: drawings.draw_mc_scoring(ANSWERS, SCORES, TRUE),
    "arms": lambda: plots.plot_arms(
        [r for r in read_jsonl(RECORDS / "recipe_arms.jsonl") if r["metric"] in ("mc1", "acc")]
    ),
    "dose": lambda: plots.plot_dose(
        [r for r in read_jsonl(RECORDS / "recipe_dose.jsonl") if r["metric"] in ("mc1", "acc")]
    ),
}


def picture(name: str) -> bytes:
    """Return a picture as a PNG: 120 dots an inch, few colours, no date."""
    out = io.BytesIO()
    figure = PICTURES[name]()
    figure.savefig(out, format="png", dpi=120, bbox_inches="tight", metadata={"Software": None})
    matplotlib.pyplot.close(figure)
    return smaller_png(out.getvalue())


if __name__ == "__main__":
    matplotlib.use("Agg")
    for name in PICTURES:
        with atomic_path(Path(__file__).resolve().parent / f"{name}.png") as partial:
            partial.write_bytes(picture(name))
