"""The interactive touches: a static state first, controls that change it, and no need for them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from helpers import PAIRS
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import CapturedIO, capture_output

from grath_utils.course.widgets import ask_side_by_side, browse_pairs, explore_dpo_loss
from grath_utils.loop.run_dir import Run

REJECTS = [
    {"question": "What is tin?", "completion": "Tin. Tin.", "reason": "equal"},
    {"question": "What is lead?", "completion": "Lead. Lead.", "reason": "equal"},
    {"question": "What is zinc?", "completion": "I cannot say.", "reason": "non_answer"},
]


@pytest.fixture
def shown() -> Iterator[CapturedIO]:
    """What a front end would be sent."""
    InteractiveShell.instance()
    with capture_output() as captured:
        yield captured
    InteractiveShell.clear_instance()


def last(shown: CapturedIO, kind: str = "text/html") -> str:
    return shown.outputs[-1].data[kind]


def test_outside_ipython_nothing_fails(capsys: pytest.CaptureFixture[str]) -> None:
    InteractiveShell.clear_instance()
    box = browse_pairs(PAIRS, REJECTS)
    assert PAIRS[0].question in capsys.readouterr().out
    box.children[0].children[1].value = "moon"  # nowhere to redraw


def test_dragging_a_slider_redraws_the_loss(shown: CapturedIO) -> None:
    beta, contrast = explore_dpo_loss(0.1, 5.0).children
    first = last(shown, "image/png")
    contrast.value = -20.0
    second = last(shown, "image/png")
    beta.value = 1.0
    third = last(shown, "image/png")
    assert len({first, second, third}) == 3
    assert min(map(len, (first, second, third))) > 10_000
    assert len(shown.outputs) == 3
    # Drawn in the place of the first one, not below it.
    assert [bool(out.update) for out in shown.outputs] == [False, True, True]
    assert len({out.transient["display_id"] for out in shown.outputs}) == 1


def test_browsing_filters_by_reason_text_and_page(shown: CapturedIO) -> None:
    box = browse_pairs(PAIRS, REJECTS, rows=4)
    (kind, text), (page, count) = (row.children for row in box.children)
    assert last(shown).count("<tr>") == 1 + 4
    assert count.value == "6 found, 2 pages"
    page.value = 2
    assert last(shown).count("<tr>") == 1 + 2
    text.value = "MOON"
    assert page.value == 1
    assert last(shown).count("<tr>") == 1 + 1
    assert "satellite" in last(shown)
    text.value = ""
    options = ("usable pairs (6)", "rejected, equal (2)", "rejected, non_answer (1)")
    assert kind.options == options
    kind.value = options[1]
    assert last(shown).count("<tr>") == 1 + 2
    assert "Lead. Lead." in last(shown)
    text.value = "zinc"
    assert count.value == "0 found, 1 page"


@pytest.mark.model
@pytest.mark.notebook
def test_asking_both_models(smoke: tuple[Run, str], shown: CapturedIO) -> None:
    box = ask_side_by_side(smoke[0], ["Is ice cold?"], max_new_tokens=5)
    assert last(shown).count("<tr>") == 1 + 1
    (text, button), status = box.children[0].children, box.children[1]
    button.click()
    assert status.value == "Write a question first."
    text.value = "What is the Sun?"
    button.click()
    assert status.value == ""
    assert not button.disabled
    table = last(shown)
    assert table.index("What is the Sun?") < table.index("Is ice cold?")
    assert table.count("<tr>") == 1 + 2
