"""The picture: how much of the test each model gets right, coloured by whose packages they are."""

from __future__ import annotations

from html import escape
from typing import Any

from data import PACKAGES, TEAMS

LEFT, WIDTH, ROW = 150, 520, 26  # where bars begin, pixels for 100%, pixels from bar to bar
NOTES = {
    "start": "chance",
    **{team: f"knows only {', '.join(packages)}" for team, packages in TEAMS.items()},
    "model stock": "back at the start: it is made for runs of one task",
    "ensemble": "all three models asked",
    "joint training": "all data in one place",
}

STYLE = """
  .card { fill: #ffffff; stroke: #d7dce2 } text { fill: #1d2733; font: 13px system-ui, sans-serif }
  .title { font-size: 18px; font-weight: 600 } .quiet { fill: #5b6775 } .head { font-weight: 600 }
  .right { text-anchor: end } .middle { text-anchor: middle }
  .grid { stroke: #e6eaee } .whisker { stroke: #1d2733; stroke-width: 1.5 }
  .t0 { fill: #2f6fb3 } .t1 { fill: #e0912f } .t2 { fill: #3a9d7c }
  .chance { fill: #aab4be }
  @media (prefers-color-scheme: dark) {
    .card { fill: #14191f; stroke: #2d3742 } text { fill: #e8edf2 } .quiet { fill: #9aa7b4 }
    .grid { stroke: #28313b } .whisker { stroke: #e8edf2 }
    .t0 { fill: #5b9be0 } .t1 { fill: #f0ab55 } .t2 { fill: #57bd9a }
    .chance { fill: #5d6975 }
  }
"""


def draw(summary: dict[str, Any]) -> str:
    """An SVG that follows the reader's light or dark theme."""
    models = summary["models"]
    alone = ["start", *TEAMS]
    references = ["ensemble", "joint training"]
    merged = [name for name in models if name not in (*alone, *references)]
    groups = [("Fine-tuned", alone), ("Merged into one model", merged), ("For comparison", references)]

    parts, y = [], 118
    for heading, names in groups:
        parts.append(text(24, y, heading, "head"))
        y += 12
        for name in names:
            parts.append(bar(name, models[name], y))
            y += ROW
        y += 24
    bottom = y - 24
    grid = [
        f'<line class="grid" x1="{x(share)}" x2="{x(share)}" y1="102" y2="{bottom}"/>'
        + text(x(share), bottom + 18, f"{100 * share:.0f}%", "quiet middle")
        for share in (0, 0.25, 0.5, 0.75, 1)
    ]
    seeds = len(summary["seeds"])
    head = [
        text(24, 36, "Three specialists, one merged model", "title"),
        text(24, 58, summary["task"], "quiet"),
        text(24, 76, f"Held-out functions placed right, mean of {seeds} seeds; lines are 95% intervals.", "quiet"),
    ]
    height = bottom + 36
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 760 {height}" width="760" height="{height}" role="img">',
            f"<title>Accuracy of three specialists and their merges</title><style>{STYLE}</style>",
            f'<rect class="card" x="0.5" y="0.5" width="759" height="{height - 1}" rx="10"/>',
            *head,
            *grid,
            *parts,
            "</svg>\n",
        ]
    )


def x(share: float) -> float:
    """Where a share of the test lies."""
    return round(LEFT + WIDTH * share, 1)


def text(left: float, base: float, words: str, kind: str = "") -> str:
    """A piece of text."""
    return f'<text x="{left}" y="{base}" class="{kind}">{escape(words)}</text>'


def bar(name: str, row: dict[str, Any], y: float) -> str:
    """One model: a segment for each team's packages, the interval, the number."""
    parts, done = [text(LEFT - 10, y + 14, name, "right")], 0.0
    by_chance = row["accuracy"]["mean"] < 1.01 / len(PACKAGES)
    for number, share in enumerate(row["by_team"]):
        kind = "chance" if by_chance else f"t{number}"
        parts.append(f'<rect class="{kind}" x="{x(done)}" y="{y}" width="{round(WIDTH * share, 1)}" height="18"/>')
        done += share
    half = row["accuracy"]["half"] or 0.0
    parts.append(f'<line class="whisker" x1="{x(done - half)}" x2="{x(done + half)}" y1="{y + 9}" y2="{y + 9}"/>')
    parts.append(text(x(done + half) + 8, y + 14, f"{100 * done:.1f}"))
    if name in NOTES:
        parts.append(text(x(done + half) + 44, y + 14, NOTES[name], "quiet"))
    return "".join(parts)
