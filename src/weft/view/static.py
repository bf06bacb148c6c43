"""Pages without a script: facts, tables and plots as HTML and SVG, in one file that asks no other host for anything.

    text = document("A title", [facts({"size": "1 GB"}), table([...], rows), plot(marks, "bits", "error")])

Every text is escaped, and control characters in it are made visible: names come from files.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from weft.view.tables import Column, number, printable

_WIDTH, _HEIGHT = 860, 340
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 20, 14, 46

_STYLE = """
:root { color-scheme: light dark; --paper: #fbfbfa; --card: #ffffff; --ink: #1c232d; --soft: #5a6573; --line: #dfe3e8;
  --bar: #3b6bb5; --bad: #c2261c; }
@media (prefers-color-scheme: dark) { :root { --paper: #12161c; --card: #1a2028; --ink: #e3e9f0; --soft: #9aa7b6;
  --line: #323b47; --bar: #76a8ea; --bad: #ff7a6e; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1240px; padding: 24px 20px 60px; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 14px; overflow-wrap: anywhere; }
h2 { font-size: 1.05rem; margin: 0 0 4px; overflow-wrap: anywhere; }
p { margin: 4px 0; overflow-wrap: anywhere; }
.soft { color: var(--soft); }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 16px; margin: 16px 0; }
.facts { display: flex; flex-wrap: wrap; gap: 8px 32px; margin: 0; }
.facts dt { color: var(--soft); font-size: .8rem; }
.facts dd { margin: 0; font-size: 1.05rem; font-variant-numeric: tabular-nums; }
.scroll { overflow: auto; }
.tall { max-height: 75vh; }
svg { display: block; max-width: 100%; height: auto; font: 12px system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
svg text { fill: var(--ink); }
svg .axis { fill: var(--soft); }
svg .rule { stroke: var(--line); }
svg .mark { fill: var(--bar); }
svg .mark.strong { fill: var(--bad); }
svg .front { fill: none; stroke: var(--bar); stroke-width: 1.5; }
table { border-collapse: collapse; width: 100%; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 3px 10px; white-space: nowrap; border-bottom: 1px solid var(--line); }
th.left, td.left { text-align: left; white-space: normal; overflow-wrap: anywhere; }
thead th { position: sticky; top: 0; background: var(--card); }
"""


@dataclass(frozen=True)
class Mark:
    """A point of a plot.

    Attributes:
        x, y: where it is; left out if one is not finite, or not positive on a logarithmic axis.
        title: shown when it is pointed at.
        label: written beside it.
        strong: in another colour.
        front: on the line through the best points.
    """

    x: float
    y: float
    title: str = ""
    label: str = ""
    strong: bool = False
    front: bool = False


def escape(text: Any) -> str:
    """Any text for use between tags and in quoted attributes.

    >>> escape('<b a="1">\\x1b')
    '&lt;b a=&quot;1&quot;&gt;\\\\x1b'
    """
    return html.escape(printable(str(text)), quote=True)


def document(title: str, parts: Iterable[str]) -> str:
    """A whole page of parts that the functions here made."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<h1>{escape(title)}</h1>\n"
        + "\n".join(parts)
        + "\n</body>\n</html>\n"
    )


def facts(values: Mapping[str, str]) -> str:
    """Labels with short values, side by side."""
    inner = "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in values.items())
    return f'<dl class="facts">{inner}</dl>'


def card(title: str, inner: Iterable[str], about: str = "") -> str:
    """A framed part of a page."""
    soft = f'<p class="soft">{escape(about)}</p>' if about else ""
    return f'<section class="card"><h2>{escape(title)}</h2>{soft}{"".join(inner)}</section>'


def paragraphs(lines: Iterable[str]) -> str:
    """Sentences, each a paragraph."""
    return "".join(f"<p>{escape(line)}</p>" for line in lines)


def table(columns: Sequence[Column], rows: Sequence[Any], *, tall: bool = False) -> str:
    """Rows under headings; columns as of :func:`weft.view.tables.text_table`."""

    def cell(tag: str, column: Column, text: str) -> str:
        start = tag if column.right else f'{tag} class="left"'
        return f"<{start}>{escape(text)}</{tag}>"

    head = "".join(cell("th", c, c.title) for c in columns)
    body = "".join(f"<tr>{''.join(cell('td', c, c.text(row)) for c in columns)}</tr>" for row in rows)
    classes = "scroll tall" if tall else "scroll"
    return f'<div class="{classes}"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def plot(
    marks: Sequence[Mark],
    x_title: str,
    y_title: str,
    *,
    log_y: bool = False,
    ticks: Sequence[tuple[float, str]] | None = None,
) -> str:
    """Points as SVG, those of the front joined by a line.

    Args:
        marks: the points.
        x_title, y_title: of the axes.
        log_y: the vertical axis is logarithmic.
        ticks: places and texts along the horizontal axis, instead of round numbers.

    >>> plot([], "bits", "error")
    '<p class="soft">There is nothing to draw.</p>'
    """
    shown = [m for m in marks if math.isfinite(m.x) and math.isfinite(m.y) and (m.y > 0 or not log_y)]
    if not shown:
        return '<p class="soft">There is nothing to draw.</p>'
    heights = [math.log10(m.y) if log_y else m.y for m in shown]
    x0, x1 = _range([m.x for m in shown])
    y0, y1 = _range(heights)

    def across(x: float) -> float:
        return _LEFT + (x - x0) / (x1 - x0) * (_WIDTH - _LEFT - _RIGHT)

    def up(y: float) -> float:
        return _HEIGHT - _BOTTOM - (y - y0) / (y1 - y0) * (_HEIGHT - _TOP - _BOTTOM)

    made = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(f"{y_title} by {x_title}")}">']
    for y in _steps(y0, y1, log_y):
        text = number(10**y) if log_y else number(y)
        made.append(f'<line class="rule" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{up(y):.1f}" y2="{up(y):.1f}"/>')
        made.append(f'<text class="axis" x="{_LEFT - 6}" y="{up(y) + 4:.1f}" text-anchor="end">{escape(text)}</text>')
    for x, text in ticks if ticks is not None else [(x, number(x)) for x in _steps(x0, x1, False)]:
        if x0 <= x <= x1:
            y = _HEIGHT - _BOTTOM + 16
            made.append(f'<text class="axis" x="{across(x):.1f}" y="{y}" text-anchor="middle">{escape(text)}</text>')
    made.append(f'<text class="axis" x="{_WIDTH / 2}" y="{_HEIGHT - 8}" text-anchor="middle">{escape(x_title)}</text>')
    made.append(
        f'<text class="axis" transform="translate(14 {_HEIGHT / 2}) rotate(-90)" text-anchor="middle">{escape(y_title)}</text>'
    )
    front = sorted((across(m.x), up(h)) for m, h in zip(shown, heights) if m.front)
    if len(front) > 1:
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in front)
        made.append(f'<polyline class="front" points="{points}"/>')
    for mark, height in zip(shown, heights):
        x, y = across(mark.x), up(height)
        title = f"<title>{escape(mark.title)}</title>" if mark.title else ""
        kind = "mark strong" if mark.strong else "mark"
        made.append(f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="4">{title}</circle>')
        if mark.label:
            end = x > _WIDTH - 120  # a text to the right would leave the picture
            anchor = ' text-anchor="end"' if end else ""
            made.append(f'<text x="{x + (-7 if end else 7):.1f}" y="{y - 6:.1f}"{anchor}>{escape(mark.label)}</text>')
    return "".join([*made, "</svg>"])


def _range(values: Sequence[float]) -> tuple[float, float]:
    """Ends of an axis, with some room."""
    low, high = min(values), max(values)
    room = 0.05 * (high - low) or 0.05 * abs(high) or 0.5
    return low - room, high + room


def _steps(low: float, high: float, log: bool) -> list[float]:
    """Round numbers between the ends; of a logarithmic axis exponents."""
    span = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(span))
    step = next(power * f for f in (1, 2, 5, 10) if power * f >= span)
    first = math.ceil(low / step)
    return [i * step for i in range(first, first + 50) if i * step <= high]
