"""Plain text tables that fit a terminal, and how numbers are written in them."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

_GAP = "  "
_GOOD_NAME, _LEAST_NAME = 40, 16  # characters of a first column that columns are dropped for, and that it may shrink to


@dataclass(frozen=True)
class Column:
    """One column.

    Attributes:
        title: heading.
        text: what a row shows here.
        right: numbers stand to the right.
        optional: left out when the table is too wide; the highest number goes first, 0 never.
    """

    title: str
    text: Callable[[Any], str]
    right: bool = True
    optional: int = 0


def text_table(columns: Sequence[Column], rows: Sequence[Any], width: int | None = None) -> str:
    """Rows under headings, at most ``width`` characters wide (None: as wide as it comes).

    Optional columns are dropped first; then the first column's texts lose their middle.

    >>> print(text_table([Column("name", str, right=False), Column("half", lambda n: str(n / 2))], [1, 10]))
    name  half
    1      0.5
    10     5.0
    """
    shown = list(columns)
    cells = [[printable(column.text(row)) for column in shown] for row in rows]
    while True:
        widths = [max(len(c.title), *(len(r[i]) for r in cells), 0) for i, c in enumerate(shown)]
        excess = sum(widths) + len(_GAP) * (len(widths) - 1) - width if width is not None else 0
        room = widths[0] - max(_GOOD_NAME, len(shown[0].title))
        least_useful = max(range(len(shown)), key=lambda i: (shown[i].optional, i))
        if excess <= max(room, 0) or not shown[least_useful].optional:
            break
        del shown[least_useful]
        cells = [r[:least_useful] + r[least_useful + 1 :] for r in cells]
    if excess > 0:
        widths[0] = max(widths[0] - excess, min(widths[0], _LEAST_NAME))
        cells = [[shorten(r[0], widths[0]), *r[1:]] for r in cells]

    def line(texts: Sequence[str]) -> str:
        padded = (t.rjust(w) if c.right else t.ljust(w) for t, w, c in zip(texts, widths, shown))
        return _GAP.join(padded).rstrip()

    return "\n".join([line([c.title for c in shown]), *map(line, cells)])


def terminal_width() -> int | None:
    """Characters in a line of the terminal; None where the output is a file or a pipe."""
    try:
        return os.get_terminal_size(sys.stdout.fileno()).columns
    except (OSError, ValueError, AttributeError):
        return None


def printable(text: str) -> str:
    """``text`` with control characters made visible: names come from files, and a terminal would obey them.

    >>> printable("a\\x1b[2Jb")
    'a\\\\x1b[2Jb'
    """
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def shorten(text: str, width: int) -> str:
    """``text`` in at most ``width`` characters, its middle left out.

    >>> shorten("model.layers.10.mlp.up_proj.weight", 20)
    'model.…p_proj.weight'
    """
    if len(text) <= width:
        return text
    head = (width - 1) // 3  # names differ at their ends
    return text[:head] + "…" + text[len(text) - (width - 1 - head) :]


def number(value: float | None) -> str:
    """Three significant digits, or a dash.

    >>> number(0.0199973), number(1234567.0), number(2.5e-9), number(None), number(0.0), number(37.26), number(512.0)
    ('0.0200', '1.23e+06', '2.50e-09', '–', '0', '37.3', '512')
    """
    if value is None or not math.isfinite(value):
        return "–"
    if value == 0:
        return "0"
    return f"{value:#.3g}" if not 99.95 <= abs(value) < 10_000 else f"{value:.0f}"


def share(value: float | None) -> str:
    """A percentage; 0% and 100% only where they are exact.

    >>> share(0.0), share(1.0), share(0.9999999), share(1e-9), share(0.12345), share(None)
    ('0%', '100%', '>99.99%', '<0.01%', '12.3%', '–')
    """
    if value is None:
        return "–"
    if value in (0, 1):
        return f"{value:.0%}"
    percent = 100 * value
    return (
        "<0.01%"
        if percent < 0.01
        else ">99.99%"
        if percent > 99.99
        else f"{percent:#.3g}%"
        if percent < 99
        else f"{percent:.2f}%"
    )


def quantity(value: int, unit: str = "") -> str:
    """A count with a thousands prefix.

    >>> quantity(478_465_280), quantity(957_000_000, "B"), quantity(1280), quantity(12)
    ('478 M', '957 MB', '1.28 k', '12')
    """
    scaled = float(value)
    for prefix in ("", "k", "M", "G", "T"):
        if scaled < 999.5 or prefix == "T":
            break
        scaled /= 1000
    text = str(value) if not prefix else f"{scaled:.3g}"
    return f"{text} {prefix}{unit}".rstrip()


def plural(count: int, noun: str) -> str:
    """A count with its noun.

    >>> plural(1, "tensor"), plural(1200, "tensor")
    ('1 tensor', '1,200 tensors')
    """
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def shape(sizes: Sequence[int]) -> str:
    """Sizes of the axes.

    >>> shape((32000, 1280)), shape(())
    ('32000×1280', 'scalar')
    """
    return "×".join(map(str, sizes)) or "scalar"
