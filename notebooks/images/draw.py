"""Draw the pictures that pages show without running anything (python notebooks/images/draw.py)."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from grath_utils.plots import draw_loop

if __name__ == "__main__":
    folder = Path(__file__).resolve().parent
    draw_loop().savefig(folder / "loop.png", dpi=120, metadata={"Software": None})
