"""The methods of the registry by goal, with their grades; rows of mergekit's are folded under weft's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from weft.method import GOALS
from weft.papers.status import Study, grade, studies
from weft.papers.text import goal_title, table
from weft.registry import index as registry_index


@dataclass(frozen=True)
class MethodRow:
    """One method as a list shows it.

    Attributes:
        name, family, goal, summary, paper, needs: as in the registry.
        grade: computed, see :mod:`weft.papers.status`.
        variants: ids of its rows with another library's defaults (``mergekit/ties``).
    """

    name: str
    family: str
    goal: str
    grade: str
    summary: str
    paper: str
    needs: str
    variants: tuple[str, ...]


def methods_by_goal(
    index: Sequence[Mapping[str, Any]] | None = None, results: Sequence[Study] | None = None
) -> dict[str, list[MethodRow]]:
    """Methods by goal, in the order of ``weft.method.GOALS``; goals without a method are left out.

    Args:
        index: entries of the registry, those of ``weft.registry.index()`` if None.
        results: committed studies, the packaged ones if None.

    >>> [row.variants for row in methods_by_goal()["combine"] if row.name == "ties"]
    [('mergekit/ties',)]
    """
    entries = registry_index() if index is None else index
    studied = {s.paper for s in (studies() if results is None else results)}
    names = {entry["name"] for entry in entries}
    variants: dict[str, list[str]] = {}
    for name in sorted(names):
        _, slash, native = name.partition("/")
        if slash and native in names:
            variants.setdefault(native, []).append(name)
    folded = {name for group in variants.values() for name in group}
    result: dict[str, list[MethodRow]] = {goal: [] for goal in GOALS}
    for entry in sorted(entries, key=lambda e: e["name"]):
        name, paper = entry["name"], entry.get("paper", "")
        if name not in folded:
            row = MethodRow(
                name=name,
                family=entry["family"],
                goal=entry["goal"],
                grade=grade(entry.get("checked_by", ()), not studied.isdisjoint({name, paper})),
                summary=entry["summary"],
                paper=paper,
                needs=entry.get("needs", "nothing"),
                variants=tuple(variants.get(name, ())),
            )
            result[row.goal].append(row)
    return {goal: rows for goal, rows in result.items() if rows}


def methods_text(by_goal: Mapping[str, Sequence[MethodRow]], width: int = 100) -> str:
    """The methods as plain text, a table for each goal."""
    names = max((len(row.name) for rows in by_goal.values() for row in rows), default=0)
    blocks = []
    for goal, rows in by_goal.items():
        cells = []
        for row in rows:
            needs = f" Needs {row.needs}." if row.needs != "nothing" else ""
            also = f" Also: {', '.join(row.variants)}." if row.variants else ""
            cells.append((f"  {row.name:{names}}", row.grade, row.summary + needs + also))
        blocks.append(f"{goal_title(goal)}\n{table(cells, width)}")
    return "\n\n".join(blocks)
