"""Pages without a script: what is drawn stays in the picture, and texts stay texts."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ElementTree

import pytest

from weft.view.static import Mark, card, document, facts, paragraphs, plot, table
from weft.view.tables import Column

EVIL = "<script>\"'&\x1b[2J"


@pytest.mark.parametrize("log_y", [False, True])
@pytest.mark.parametrize(
    "values",
    [[(1.0, 2.0)], [(0, 1e-9), (1, 3e4)], [(5, 7), (5, 7)], [(-3, 0.25), (1e9, 0.5)], [(1, 1e-300), (2, 1e300)]],
)
def test_everything_is_in_the_picture(values: list[tuple[float, float]], log_y: bool) -> None:
    marks = [Mark(x, y, title=EVIL, label=EVIL, front=True) for x, y in values]
    svg = plot(marks, EVIL, "y", log_y=log_y, ticks=[(values[0][0], EVIL), (1e12, "outside")])
    root = ElementTree.fromstring(svg)
    _, _, width, height = map(float, root.attrib["viewBox"].split())
    circles = [e for e in root if e.tag == "circle"]
    assert len(circles) == len(values)
    for circle in circles:
        assert 0 < float(circle.attrib["cx"]) < width
        assert 0 < float(circle.attrib["cy"]) < height
        title = circle.find("title")
        assert title is not None
        assert title.text == "<script>\"'&\\x1b[2J"
    for line in (e for e in root if e.tag == "line"):
        assert 0 <= float(line.attrib["y1"]) <= height
    texts = [e.text for e in root if e.tag == "text"]
    assert "outside" not in texts
    assert sum(t == "<script>\"'&\\x1b[2J" for t in texts) == len(values) + 2
    assert len([e for e in root if e.tag == "polyline"]) == (len(values) > 1)


def test_order_is_that_of_the_values() -> None:
    marks = [Mark(x, y) for x, y in ((1, 10.0), (2, 100.0), (3, 1.0))]
    for log_y in (False, True):
        root = ElementTree.fromstring(plot(marks, "x", "y", log_y=log_y))
        xs, ys = ([float(e.attrib[k]) for e in root if e.tag == "circle"] for k in ("cx", "cy"))
        assert xs == sorted(xs)
        assert ys[1] < ys[0] < ys[2]  # up is less


def test_what_is_no_number_is_left_out() -> None:
    marks = [Mark(1, math.nan), Mark(math.inf, 1), Mark(1, 0), Mark(1, -2), Mark(1, 5)]
    assert plot(marks, "x", "y", log_y=True).count("<circle") == 1
    assert plot(marks, "x", "y").count("<circle") == 3
    assert "nothing to draw" in plot(marks[:2], "x", "y")


def test_texts_stay_texts() -> None:
    columns = [Column(EVIL, lambda row: row, right=False), Column("n", lambda row: EVIL)]
    page = document(EVIL, [facts({EVIL: EVIL}), paragraphs([EVIL]), card(EVIL, [table(columns, [EVIL])], EVIL)])
    assert "<script" not in page
    assert "\x1b" not in page
    assert page.count("&lt;script&gt;&quot;&#x27;&amp;\\x1b[2J") == 10
    assert not re.search(r"https?://", page)
