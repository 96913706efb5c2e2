"""Interactive touches: something to drag, to search, to ask.

Each function *shows* a picture or a table first, which is all that a reader of an executed
notebook, a print or an HTML page needs, and *returns* the controls that change it, or None where
ipywidgets is not installed. As the last line of a cell, the controls appear below. A change redraws
what is shown already; nothing is kept in the notebook but the first state.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any

import matplotlib.pyplot as plt
from IPython.display import Image, display
from matplotlib.figure import Figure

from grath_utils.course.export import ask_both
from grath_utils.course.notebooks import Table
from grath_utils.errors import GrathError
from grath_utils.figures import plots
from grath_utils.loop.run_dir import Run
from grath_utils.pairs.generate import Pair

EXAMPLES = ("Do we use only ten percent of our brains?", "Do goldfish forget within seconds?")
USABLE = "usable pairs"


def explore_dpo_loss(beta: float = 0.1, contrast: float = 5.0) -> Any:
    """Show the DPO loss of one pair, with sliders for beta and for the pair's contrast.

    Args:
        beta: to start with, 0.01 to 1.
        contrast: to start with, in nats, -40 to 40.

    Returns:
        The sliders, or None without ipywidgets.
    """

    def draw() -> Image:
        return _picture(plots.plot_dpo_point(state["beta"], state["contrast"]))

    state = {"beta": beta, "contrast": contrast}
    redraw = _show(draw)
    kit = _ipywidgets()
    if kit is None:
        return None
    # A drag sends a value at its end only: each one costs a drawing.
    layout = {"style": {"description_width": "9em"}, "layout": kit.Layout(width="32em")}
    sliders = {
        "beta": kit.FloatLogSlider(
            value=beta, min=-2, max=0, step=0.05, description="beta",
            readout_format=".3g", continuous_update=False, **layout,
        ),
        "contrast": kit.FloatSlider(
            value=contrast, min=-40, max=40, step=0.5, description="contrast (nats)",
            readout_format=".1f", continuous_update=False, **layout,
        ),
    }  # fmt: skip
    for name, slider in sliders.items():
        slider.observe(lambda change, name=name: _change(state, name, change, redraw), "value")
    return kit.VBox(list(sliders.values()))


def browse_pairs(
    pairs: Sequence[Pair], rejects: Sequence[Mapping[str, Any]] = (), *, rows: int = 10
) -> Any:
    """Show pairs as a table, with a choice of what to see, a search and pages.

    Args:
        pairs: the usable ones.
        rejects: rows of ``rejects.jsonl`` (``question``, ``completion``, ``reason``).
        rows: of the table at a time.

    Returns:
        The controls, or None without ipywidgets.
    """
    reasons = Counter(str(row["reason"]) for row in rejects)
    kinds = {f"{USABLE} ({len(pairs)})": USABLE}
    kinds |= {f"rejected, {r} ({n})": r for r, n in reasons.most_common()}
    state = {"kind": USABLE, "text": "", "page": 1}

    def found() -> tuple[list[str], list[tuple[str, ...]]]:
        if state["kind"] == USABLE:
            head = ["question", "correct (chosen)", "incorrect (rejected)"]
            every = [(p.question, p.correct, p.incorrect) for p in pairs]
        else:
            head = ["question", "completion"]
            chosen = [row for row in rejects if row["reason"] == state["kind"]]
            every = [(str(row["question"]), str(row["completion"])) for row in chosen]
        wanted = state["text"].casefold()
        return head, [row for row in every if wanted in " ".join(row).casefold()]

    def draw() -> Table:
        head, every = found()
        start = rows * (state["page"] - 1)
        return Table(head, every[start : start + rows])

    redraw = _show(draw)
    kit = _ipywidgets()
    if kit is None:
        return None
    kind = kit.Dropdown(options=list(kinds.items()), value=USABLE, description="show")
    text = kit.Text(description="contains", placeholder="any", continuous_update=False)
    page = kit.BoundedIntText(value=1, min=1, description="page")
    count = kit.Label()

    def narrow(change: Mapping[str, Any] | None = None) -> None:
        state.update(kind=kind.value, text=text.value, page=1)
        n = len(found()[1])
        page.max = max(-(-n // rows), 1)
        page.value = 1
        count.value = f"{n} found, {page.max} page{'s' if page.max > 1 else ''}"
        if change is not None:
            redraw()

    narrow()
    kind.observe(narrow, "value")
    text.observe(narrow, "value")
    page.observe(lambda change: _change(state, "page", change, redraw), "value")
    return kit.VBox([kit.HBox([kind, text]), kit.HBox([page, count])])


def ask_side_by_side(
    run: Run, questions: Sequence[str] = EXAMPLES, *, max_new_tokens: int = 40
) -> Any:
    """Show what the base model and the trained one answer, with a box to ask them more.

    Args:
        run: a run with at least one trained round.
        questions: asked at once, as examples.
        max_new_tokens: longest answer.

    Returns:
        A text box and a button, or None without ipywidgets.

    Raises:
        UsageError: no round has been trained yet.
    """
    waiting: list[str] = []

    def asked() -> Iterator[str]:
        while True:
            yield waiting.pop()

    answers = iter(ask_both(run, asked(), max_new_tokens=max_new_tokens))  # loads both models once
    answered: list[tuple[str, str, str]] = []

    def ask(question: str) -> None:
        waiting.append(question)
        answered.insert(0, next(answers))

    for question in reversed(questions):
        ask(question)
    redraw = _show(lambda: Table(["question", "base model", "trained model"], list(answered)))
    kit = _ipywidgets()
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
            ask(question)
            redraw()
            status.value = ""
        except (GrathError, StopIteration, RuntimeError) as error:
            status.value = f"No answer: {error or 'run this cell again'}"
        finally:
            button.disabled = False

    button.on_click(clicked)
    return kit.VBox([kit.HBox([box, button]), status])


# --- common --------------------------------------------------------------------------------------


def _ipywidgets() -> ModuleType | None:
    try:
        import ipywidgets
    except ImportError:
        return None
    return ipywidgets


def _show(draw: Callable[[], Any]) -> Callable[[], None]:
    """Show what ``draw`` makes; return what draws it anew in the same place."""
    handle = display(draw(), display_id=True)

    def redraw() -> None:
        if handle is not None:  # None outside IPython
            handle.update(draw())

    return redraw


def _change(
    state: dict[str, Any], name: str, change: Mapping[str, Any], redraw: Callable[[], None]
) -> None:
    state[name] = change["new"]
    redraw()


def _picture(figure: Figure) -> Image:
    """Return a figure as a picture, and let go of it: pyplot would keep every one of them."""
    buffer = io.BytesIO()
    with plt.rc_context({"savefig.bbox": "standard"}):  # equal sizes: no jumping while dragging
        figure.savefig(buffer, format="png", dpi=figure.dpi)
    plt.close(figure)
    return Image(buffer.getvalue(), alt="The DPO loss against the contrast of a pair")
