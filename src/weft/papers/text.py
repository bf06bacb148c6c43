"""Cards and lists as plain text for a terminal of any width, and as data for ``--json``."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from weft.papers.catalogue import Paper
from weft.papers.search import Hit
from weft.papers.status import Status

LABEL = 14  # width of the column of labels on a card
NARROW = 60  # below this many columns text goes under its label instead of beside it
_GOAL_HELP = {
    "combine": "several models, or what they say, in one",
    "shrink": "fewer bits, fewer weights, less memory",
    "adapt": "a trained model for a new task",
    "train": "a better training run",
    "edit": "change a trained model by hand",
    "measure": "find out how things are",
    "predict": "estimate, choose, generate",
}


def goal_title(goal: str) -> str:
    """A goal with what it means, as a heading."""
    return f"{goal}: {_GOAL_HELP[goal]}"


def wrap(text: str, width: int, indent: int = 0, lines: int | None = None) -> list[str]:
    """Lines of a text, the second and later ones indented; past ``lines`` lines it ends in an ellipsis.

    >>> wrap("one two three four", 9, lines=2)
    ['one two', 'three …']
    """
    return textwrap.wrap(
        text,
        max(width, 20) if indent else width,
        subsequent_indent=" " * indent,
        max_lines=lines,
        placeholder=" …",
        break_on_hyphens=False,
    )


def table(rows: Iterable[Sequence[str]], width: int, lines: int | None = None) -> str:
    """Rows of cells in columns; the last column takes what is left and is wrapped, or goes below in a narrow terminal.

    >>> print(table([("linear", "lab", "Weighted average of the models."), ("ties", "lab", "Trim.")], 40))
    linear  lab  Weighted average of the
                 models.
    ties    lab  Trim.
    """
    cells = [[*row] for row in rows]
    if not cells:
        return ""
    columns = [max(len(row[i]) for row in cells) for i in range(len(cells[0]) - 1)]
    indent = sum(columns) + 2 * len(columns)
    result: list[str] = []
    for row in cells:
        head = "  ".join(cell.ljust(size) for cell, size in zip(row, columns))
        if width - indent < NARROW // 3 or width < NARROW // 2:
            result += [head.rstrip(), *(f"  {line}" for line in wrap(row[-1], max(width - 2, 18), lines=lines))]
        else:
            body = wrap(row[-1], width - indent, lines=lines) or [""]
            result += [f"{head}  {body[0]}".rstrip(), *(" " * indent + line for line in body[1:])]
    return "\n".join(result)


def run_lines(entry: Mapping[str, Any]) -> list[str]:
    """How to run a method: the line for the shell, where there is one, and the call in Python.

    >>> run_lines({"shell": "weft merge A B --method linear -o OUT", "call": "weft.merge.linear(tensors)"})
    ['weft merge A B --method linear -o OUT', 'weft.merge.linear(tensors)']
    """
    return [entry[key] for key in ("shell", "call") if entry.get(key)]


def run_here(card: Paper, entries: Iterable[Mapping[str, Any]]) -> list[str]:
    """How to run a paper's methods, or where they will be."""
    lines = [line for entry in entries if entry.get("paper") == card.key for line in run_lines(entry)]
    return lines or [f"planned: {card.path}"]


def card_text(card: Paper, status: Status, entries: Sequence[Mapping[str, Any]], width: int = 100) -> str:
    """One card."""
    planned = status.grade == "planned"
    parts = {
        "What it does": [card.summary],
        "Use it when": [card.use_when],
        "Not when": [card.not_when],
        "You have": ["; ".join(card.have)],
        "You want": ["; ".join(card.want)],
        "Needs": [f"{name}: {value}" for name, value in asdict(card.needs).items()],
        "Run it here": run_here(card, entries),
        "As planned" if planned else "Differences": [card.differences],
        "Compare with": ["; ".join(card.compare)],
        "Status": [status.text, *(f"{s.verdict}: {s.claim} ({s.commit})" for s in status.studies)],
    }
    if status.checked_by:
        parts["Checked by"] = [", ".join(status.checked_by)]
    lines = wrap(f"{card.key} · {card.family} · {status.grade}", width)
    lines += wrap(f"{card.title} ({card.year})", width)
    lines += [card.url] if card.url else []
    lines.append("")
    for label, paragraphs in parts.items():
        if width < NARROW:
            lines += [label, *(f"  {line}" for p in paragraphs for line in wrap(p, max(width - 2, 18)))]
            continue
        body = [line for p in paragraphs for line in wrap(p, width - LABEL, indent=2 if len(paragraphs) > 1 else 0)]
        lines += [f"{label if i == 0 else '':{LABEL}}{line}" for i, line in enumerate(body)]
    return "\n".join(lines)


def card_dict(card: Paper, status: Status, entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One card as data: its fields, its link and module, how to run it, its status."""
    return {
        **asdict(card),
        "goal": card.goal,
        "path": card.path,
        "url": card.url,
        "run": run_here(card, entries),
        "status": {**asdict(status), "text": status.text},
    }


def hits_text(hits: Sequence[Hit], status: Mapping[str, Status], width: int = 100, lines: int | None = 2) -> str:
    """A list of cards, one row each: key, family, grade, what it does."""
    rows = [(h.paper.key, h.paper.family, status[h.paper.key].grade, h.paper.summary) for h in hits]
    return table(rows, width, lines)


def hit_dict(hit: Hit, status: Mapping[str, Status]) -> dict[str, Any]:
    """One row of a list as data."""
    card, state = hit.paper, status[hit.paper.key]
    return {
        "key": card.key,
        "title": card.title,
        "year": card.year,
        "url": card.url,
        "family": card.family,
        "goal": card.goal,
        "summary": card.summary,
        "grade": state.grade,
        "status": state.text,
        "methods": list(state.methods),
        "score": round(hit.score, 3),
        "nearest": hit.nearest,
    }
