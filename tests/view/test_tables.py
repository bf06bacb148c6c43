"""Tables that fit, and numbers that read the same everywhere."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from weft.view.tables import Column, number, plural, printable, quantity, share, shorten, text_table

COLUMNS = [
    Column("name", lambda r: r[0], right=False),
    Column("first", lambda r: r[1]),
    Column("second", lambda r: r[1] * 2, optional=1),
    Column("third", lambda r: r[1] * 3, optional=2),
]
ROWS = [("model.layers.10.mlp.up_proj.weight", "123"), ("model.layers.9.self_attn.a_long_name_of_a_projection", "4")]


@pytest.mark.parametrize("width", [30, 40, 55, 60, 70, 80, 200])
def test_no_line_is_wider_than_asked(width: int) -> None:
    lines = text_table(COLUMNS, ROWS, width).splitlines()
    assert len(lines) == 3
    assert max(map(len, lines)) <= width


def test_the_least_useful_column_goes_first_and_the_name_shrinks_last() -> None:
    assert "third" in text_table(COLUMNS, ROWS, None)
    narrow = text_table(COLUMNS, ROWS, 57)
    assert "third" not in narrow
    assert "second" in narrow
    narrower = text_table(COLUMNS, ROWS, 40)
    assert "second" not in narrower
    assert "first" in narrower
    assert "…" in narrower


def test_no_rows_leave_the_headings() -> None:
    assert text_table(COLUMNS, [], 80) == "name  first  second  third"


def test_control_characters_of_a_name_do_not_reach_the_terminal() -> None:
    table = text_table(COLUMNS, [("a\x1b[2J\r\nb\u202e", "1")], 80)
    assert table.count("\n") == 1
    assert table.replace("\n", "").isprintable()
    assert printable("größe.weight") == "größe.weight"


@given(st.text(max_size=60), st.integers(3, 40))
def test_shorten_fits(text: str, width: int) -> None:
    short = shorten(text, width)
    assert len(short) == min(len(text), width)
    assert short == text or "…" in short


@given(st.floats(-1e300, 1e300) | st.sampled_from([np.nan, np.inf, -np.inf]))
def test_numbers_keep_three_digits(value: float) -> None:
    text = number(value)
    if text == "–":
        assert not np.isfinite(value)
    else:
        assert float(text) == pytest.approx(value, rel=0.0051)  # half a unit in the third digit


@given(st.floats(0, 1))
def test_shares_are_0_or_100_only_where_exact(value: float) -> None:
    assert (share(value) == "0%") == (value == 0)
    assert (share(value) == "100%") == (value == 1)


def test_quantities() -> None:
    assert [quantity(n) for n in (0, 999, 1000, 999_499, 999_500, 10**13)] == [
        "0",
        "999",
        "1 k",
        "999 k",
        "1 M",
        "10 T",
    ]
    assert (plural(0, "name"), plural(1, "name")) == ("0 names", "1 name")
