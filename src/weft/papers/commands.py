"""What ``weft papers`` and ``weft methods`` print."""

from __future__ import annotations

import json as jsonlib
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from weft.errors import RecipeError, did_you_mean
from weft.method import GOALS
from weft.papers.catalogue import Paper, load
from weft.papers.methods import methods_by_goal, methods_text
from weft.papers.search import Facet, search
from weft.papers.status import statuses
from weft.papers.text import card_dict, card_text, hit_dict, hits_text, wrap
from weft.registry import index as registry_index

WIDEST = 110  # longer lines are hard to read


def papers_command(
    query: str | None = "",
    have: Facet = None,
    want: Facet = None,
    family: Facet = None,
    grade: Facet = None,
    limit: int | None = None,
    json: bool = False,
    width: int | None = None,
) -> str:
    """The card that ``query`` names, else the papers that answer it, else (without a query) all that pass the facets.

    Args:
        query: a key, an arXiv number or link, the id of a method, or problem words.
        have, want, family, grade: see :func:`weft.papers.search.search`.
        limit: rows at most; if None 10 for problem words, all without a query.
        json: give JSON instead of text.
        width: columns of the terminal, asked for if None.

    Raises:
        RecipeError: a facet has a value that does not exist.

    >>> print(papers_command("fine-tunes interfere", limit=1, width=80).splitlines()[0])
    Papers for "fine-tunes interfere", the best first; `weft papers KEY` shows one
    """
    query = " ".join((query or "").split())
    width = width or _terminal()
    entries = registry_index()
    status = statuses(entries)
    card = None if have or want or family or grade else _named(query, entries)
    if card:
        if json:
            return _dump(card_dict(card, status[card.key], entries))
        return card_text(card, status[card.key], entries, width)
    found = search(query, have, want, family, grade, None, status=status)
    hits = found[: limit if limit is not None else 10 if query else None]
    nearest = any(hit.nearest for hit in hits)
    if json:
        return _dump({"query": query, "nearest": nearest, "papers": [hit_dict(hit, status) for hit in hits]})
    shown = query if len(query) <= 60 else f"{query[:59]}…"
    asked = f' "{shown}"' if query else ""
    if nearest:
        head = f"No paper fits{asked}; the nearest:"
    elif query:
        head = f'Papers for "{shown}", the best first; `weft papers KEY` shows one'
    else:
        head = f"{len(hits)} of {len(found)} papers; `weft papers KEY` shows one"
    return "\n".join([*wrap(head, width), "", hits_text(hits, status, width, lines=2 if query else 1)])


def methods_command(goal: str | None = "", json: bool = False, width: int | None = None) -> str:
    """The methods, of one goal or of all.

    Raises:
        RecipeError: there is no such goal.
    """
    if goal and goal not in GOALS:
        raise RecipeError(f"There is no goal {goal!r}.{did_you_mean(goal, GOALS)}")
    by_goal = {g: rows for g, rows in methods_by_goal().items() if not goal or g == goal}
    if json:
        return _dump({g: [asdict(row) for row in rows] for g, rows in by_goal.items()})
    if not by_goal:
        return f"No method for the goal {goal} yet; `weft papers --want {goal}` lists what is planned."
    return methods_text(by_goal, width or _terminal())


def _named(query: str, entries: Sequence[Mapping[str, Any]]) -> Paper | None:
    """The card that a query names: by key, arXiv number or link, or as a method's."""
    name = query.lower()
    number = re.fullmatch(r"(?:arxiv:|https?://arxiv\.org/(?:abs|pdf)/)?(\d{4}\.\d{4,5})(?:v\d+)?(?:\.pdf)?", name)
    for card in load().values():
        if name == card.key or (number and number[1] == card.arxiv):
            return card
    keys = [entry.get("paper") for entry in entries if entry["name"] == name]
    return load()[keys[0]] if keys and keys[0] else None


def _terminal() -> int:
    return min(shutil.get_terminal_size((100, 24)).columns, WIDEST)


def _dump(value: Any) -> str:
    return jsonlib.dumps(value, indent=2, ensure_ascii=False)
