"""Tables as they are shown: in text, Markdown and HTML."""

from __future__ import annotations

from grath_utils.text import duration, table, with_interval

ROWS = [("a <b>", 1.23456, 3), ("c", 12345.0, 12)]


def test_numbers_stand_to_the_right_and_floats_have_three_decimals() -> None:
    assert table(["name", "value", "n"], ROWS).splitlines() == [
        "name         value    n",
        "a <b>        1.235    3",
        "c       12,345.000   12",
    ]
    assert table(["name", "value", "n"], ROWS, "github").splitlines()[0].startswith("| name")
    assert table(["name"], []) == "name"
    assert table([], [("x", "y")]) == "x  y"
    text = table(["name", "percent"], [("x", "1.0"), ("y", "10.0")], numbers_from=1)
    assert text.splitlines()[1].endswith("   1.0")


def test_html_is_escaped_and_says_where_each_cell_stands() -> None:
    page = table(["name", "value", "n"], ROWS, "html")
    assert '<th scope="col" style="vertical-align: top; text-align: left;">name</th>' in page
    assert '<td style="vertical-align: top; text-align: left;">a &lt;b&gt;</td>' in page
    assert '<td style="vertical-align: top; text-align: right;">1.235</td>' in page
    assert page.count("<tr>") == 3


def test_times_and_intervals() -> None:
    assert [duration(s) for s in (5, 125, 5000, 20_000, 500_000)] == [
        "5 s", "2.1 min", "83 min", "5.6 h", "6 days",
    ]  # fmt: skip
    assert with_interval(25.12, (21, 29.1)) == "25.1 [21.0, 29.1]"
    assert with_interval(0.5, (-0.25, 1), "+.2f") == "+0.50 [-0.25, +1.00]"
    assert with_interval(0.5, (0.25, 1), scale=100) == "50.0 [25.0, 100.0]"
    assert with_interval(0.5, None) == "0.5 [–]"
