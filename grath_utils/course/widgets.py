"""Interactive touches: something to drag, to search, to ask.

Each function *shows* a picture or a table first, all that a reader without a kernel needs, and
*returns* the controls that redraw it in place. As the last line of a cell, they appear below.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import ipywidgets as kit
import matplotlib.pyplot as plt
from IPython.display import DisplayHandle, Image

from grath_utils.course.export import ask_both
from grath_utils.course.notebooks import Table
from grath_utils.errors import GrathError
from grath_utils.figures.plots import plot_dpo_point
from grath_utils.loop.run_dir import Run
from grath_utils.pairs.generate import Pair

EXAMPLES = ("Do we use only ten percent of our brains?", "Do goldfish forget within seconds?")


def explore_dpo_loss(beta: float, contrast: float) -> kit.Box:
    """Show the DPO loss of one pair, with sliders for beta and for the pair's contrast.

    They start at the given values: beta in 0.01 to 1, the contrast in -40 to 40 nats.
    """

    def draw(beta: float, contrast: float) -> Image:
        figure, buffer = plot_dpo_point(beta, contrast), io.BytesIO()
        with plt.rc_context({"savefig.bbox": "standard"}):  # equal sizes: no jumping while dragging
            figure.savefig(buffer, format="png", dpi=figure.dpi)
        plt.close(figure)  # pyplot would keep every one of them
        alt = {"alt": "The DPO loss against the contrast of a pair"}
        return Image(buffer.getvalue(), metadata=alt)  # Image(alt=) came with IPython 8

    shown = DisplayHandle()
    shown.display(draw(beta, contrast))
    # A drag sends a value at its end only: each one costs a drawing.
    look = {"layout": {"width": "32em"}, "style": {"description_width": "9em"}}
    look |= {"continuous_update": False, "readout_format": ".3g"}
    betas = kit.FloatLogSlider(beta, min=-2, max=0, step=0.05, description="beta", **look)
    range_ = {"min": -40, "max": 40, "step": 0.5}
    contrasts = kit.FloatSlider(contrast, description="contrast (nats)", **range_, **look)
    for slider in (betas, contrasts):
        slider.observe(lambda _: shown.update(draw(betas.value, contrasts.value)), "value")
    return kit.VBox([betas, contrasts])


def browse_pairs(
    pairs: Sequence[Pair], rejects: Sequence[Mapping[str, Any]], *, rows: int = 10
) -> kit.Box:
    """Show usable pairs, so many rows a page, with a choice of what to see and a search.

    ``rejects`` are the rows of ``rejects.jsonl``.
    """
    usable = Table(
        ["question", "correct (chosen)", "incorrect (rejected)"],
        [(pair.question, pair.correct, pair.incorrect) for pair in pairs],
    )
    kinds = {f"usable pairs ({len(pairs)})": usable}
    for reason, n in Counter(row["reason"] for row in rejects).most_common():
        kinds[f"rejected, {reason} ({n})"] = Table(
            ["question", "completion"],
            [(row["question"], row["completion"]) for row in rejects if row["reason"] == reason],
        )
    shown = DisplayHandle()
    shown.display(Table(usable.columns, usable.rows[:rows]))
    kind = kit.Dropdown(options=list(kinds), description="show")
    text = kit.Text(description="contains", placeholder="any", continuous_update=False)
    page = kit.BoundedIntText(value=1, min=1, description="page")
    count = kit.Label()

    def redraw(changed: Any = None) -> None:
        table, wanted = kinds[kind.value], text.value.casefold()
        found = [row for row in table.rows if wanted in " ".join(row).casefold()]
        if changed is None or changed.owner is not page:
            page.max = max(-(-len(found) // rows), 1)
            page.value = 1
            count.value = f"{len(found)} found, {page.max} page{'s' if page.max > 1 else ''}"
        shown.update(Table(table.columns, found[rows * (page.value - 1) : rows * page.value]))

    redraw()
    for control in (kind, text, page):
        control.observe(redraw, "value")
    return kit.VBox([kit.HBox([kind, text]), kit.HBox([page, count])])


def ask_side_by_side(
    run: Run, questions: Sequence[str] = EXAMPLES, *, max_new_tokens: int = 40
) -> kit.Box:
    """Show what the base model and the trained one answer, with a box to ask them more.

    Raises:
        UsageError: no round has been trained yet.
    """
    answered: list[tuple[str, str, str]] = []
    answer = ask_both(run, max_new_tokens=max_new_tokens)

    def ask(*questions: str) -> Table:
        for question in questions:
            answered.insert(0, (question, *answer(question)))
        return Table(["question", "base model", "trained model"], list(answered))

    shown = DisplayHandle()
    shown.display(ask(*reversed(questions)))
    box = kit.Text(placeholder="Your question?", layout={"width": "36em"})
    button = kit.Button(description="Ask both", button_style="primary")
    status = kit.Label()

    def clicked(_: Any) -> None:
        question = box.value.strip()
        if not question:
            status.value = "Write a question first."
            return
        button.disabled, status.value = True, "answering ..."
        try:
            shown.update(ask(question))
            status.value = ""
        except (GrathError, RuntimeError) as error:
            status.value = f"No answer: {error}"
        finally:
            button.disabled = False

    button.on_click(clicked)
    return kit.VBox([kit.HBox([box, button]), status])
