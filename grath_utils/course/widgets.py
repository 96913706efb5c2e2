"""Interactive touches: something to drag, to search, to ask.

Each function *shows* a picture or a table first, all that a reader without a kernel needs, and
*returns* the controls that redraw it in place, or None where ipywidgets is not installed. As the
last line of a cell, the controls appear below.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

import matplotlib.pyplot as plt
from IPython.display import Image, display

from grath_utils.course.export import ask_both
from grath_utils.course.notebooks import Table
from grath_utils.errors import GrathError
from grath_utils.figures.plots import plot_dpo_point
from grath_utils.loop.run_dir import Run
from grath_utils.pairs.generate import Pair

EXAMPLES = ("Do we use only ten percent of our brains?", "Do goldfish forget within seconds?")


def _show(shown: Any) -> tuple[Callable[[Any], None], ModuleType | None]:
    """Show something; return what shows another thing in its place, and ipywidgets if there."""
    handle = display(shown, display_id=True)
    try:
        import ipywidgets as kit
    except ImportError:
        kit = None
    return handle.update if handle is not None else lambda shown: None, kit  # None: no IPython


def explore_dpo_loss(beta: float, contrast: float) -> Any:
    """Show the DPO loss of one pair, with sliders for beta and for the pair's contrast.

    They start at the given values: beta in 0.01 to 1, the contrast in -40 to 40 nats.
    """

    def draw(beta: float, contrast: float) -> Image:
        figure, buffer = plot_dpo_point(beta, contrast), io.BytesIO()
        with plt.rc_context({"savefig.bbox": "standard"}):  # equal sizes: no jumping while dragging
            figure.savefig(buffer, format="png", dpi=figure.dpi)
        plt.close(figure)  # pyplot would keep every one of them
        return Image(buffer.getvalue(), alt="The DPO loss against the contrast of a pair")

    update, kit = _show(draw(beta, contrast))
    if kit is None:
        return None
    # A drag sends a value at its end only: each one costs a drawing.
    look = {"style": {"description_width": "9em"}, "layout": kit.Layout(width="32em"),
            "continuous_update": False}  # fmt: skip
    betas = kit.FloatLogSlider(
        value=beta, min=-2, max=0, step=0.05, description="beta", readout_format=".3g", **look
    )
    contrasts = kit.FloatSlider(
        value=contrast, min=-40, max=40, step=0.5, description="contrast (nats)",
        readout_format=".1f", **look,
    )  # fmt: skip
    for slider in (betas, contrasts):
        slider.observe(lambda _: update(draw(betas.value, contrasts.value)), "value")
    return kit.VBox([betas, contrasts])


def browse_pairs(
    pairs: Sequence[Pair], rejects: Sequence[Mapping[str, Any]], *, rows: int = 10
) -> Any:
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
    update, kit = _show(Table(usable.columns, usable.rows[:rows]))
    if kit is None:
        return None
    kind = kit.Dropdown(options=list(kinds), description="show")
    text = kit.Text(description="contains", placeholder="any", continuous_update=False)
    page = kit.BoundedIntText(value=1, min=1, description="page")
    count = kit.Label()

    def redraw(changed: Any = None) -> None:
        shown, wanted = kinds[kind.value], text.value.casefold()
        found = [row for row in shown.rows if wanted in " ".join(row).casefold()]
        if changed is None or changed.owner is not page:
            page.max = max(-(-len(found) // rows), 1)
            page.value = 1
            count.value = f"{len(found)} found, {page.max} page{'s' if page.max > 1 else ''}"
        update(Table(shown.columns, found[rows * (page.value - 1) : rows * page.value]))

    redraw()
    for control in (kind, text, page):
        control.observe(redraw, "value")
    return kit.VBox([kit.HBox([kind, text]), kit.HBox([page, count])])


def ask_side_by_side(
    run: Run, questions: Sequence[str] = EXAMPLES, *, max_new_tokens: int = 40
) -> Any:
    """Show what the base model and the trained one answer, with a box to ask them more.

    Raises:
        UsageError: no round has been trained yet.
    """
    waiting: list[str] = []
    answered: list[tuple[str, str, str]] = []
    answers = ask_both(run, iter(waiting.pop, None), max_new_tokens=max_new_tokens)

    def ask(*questions: str) -> Table:
        for question in questions:
            waiting.append(question)
            answered.insert(0, next(answers))  # the first one loads both models
        return Table(["question", "base model", "trained model"], list(answered))

    update, kit = _show(ask(*reversed(questions)))
    if kit is None:
        return None
    box = kit.Text(placeholder="Your question?", layout=kit.Layout(width="36em"))
    button = kit.Button(description="Ask both", button_style="primary")
    status = kit.Label()

    def clicked(_: Any) -> None:
        question = box.value.strip()
        if not question:
            status.value = "Write a question first."
            return
        button.disabled, status.value = True, "answering ..."
        try:
            update(ask(question))
            status.value = ""
        except (GrathError, StopIteration, RuntimeError) as error:
            status.value = f"No answer: {error or 'run this cell again'}"
        finally:
            button.disabled = False

    button.on_click(clicked)
    return kit.VBox([kit.HBox([box, button]), status])
