"""What ``weft inspect --symmetry`` prints: groups of axes that permute together, and why the others do not."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from weft.errors import RecipeError
from weft.view.tables import Column, terminal_width, text_table

if TYPE_CHECKING:
    from weft.symmetry import Group, Symmetry

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)")


@dataclass(frozen=True)
class Row:
    """Groups, or frozen axes, that differ in the numbers of their layers only."""

    name: str
    kind: str
    size: str
    details: str
    count: int = 1


def symmetry_command(model: Any, *, json: bool = False, limit: int | None = None, width: int | None = None) -> str:
    """Find a model's symmetry and describe it.

    Args:
        model: the folder of a transformers model, or a live model that needs no example inputs.
        json: the whole symmetry as one JSON object, as :meth:`weft.symmetry.Symmetry.from_json` reads it.
        limit: how many rows to show in each table; default and 0: all.
        width: characters in a line; default: the terminal's.

    Raises:
        RecipeError: the model cannot be traced, or a negative limit. CheckpointError: no configuration.
    """
    if limit is not None and limit < 0:
        raise RecipeError(f"The limit must be 0 (all rows) or more, got {limit}.")
    _quieten()
    from weft.symmetry import find_symmetry

    symmetry = find_symmetry(model)
    return symmetry.to_json() if json else render(symmetry, limit or None, width or terminal_width())


def _quieten() -> None:
    try:
        from transformers.utils import logging
    except ImportError:
        return
    logging.set_verbosity_error()


def render(symmetry: Symmetry, limit: int | None = None, width: int | None = None) -> str:
    """Two tables: what permutes, and what is frozen with the reasons; layers that are alike share a row.

    >>> from weft.symmetry import Frozen, Group, Member, Symmetry
    >>> groups = tuple(Group(f"{i}.mlp", "intermediate", 8, (Member(f"{i}.up", 0, 0, 1),)) for i in range(3))
    >>> print(render(Symmetry(groups, (Frozen("0.up", 1, 4, "an input of the model"),), (), {"0.up": (8, 4)}, {})))
    3 groups of axes permute without a change of the function
    <BLANKLINE>
    group  kind          size  times  tensors
    *.mlp  intermediate     8      3  up
    <BLANKLINE>
    frozen  axis  factors  times  because
    *.up       1        4      1  an input of the model
    """
    groups = _gather(
        Row(group.name, group.kind, _size(symmetry, group), ", ".join(_short(group)), 1) for group in symmetry.groups
    )
    factors: dict[tuple[str, int, str], list[int]] = {}
    for f in symmetry.frozen:
        factors.setdefault((f.tensor, f.axis, f.reason), []).append(f.size)
    frozen = _gather(
        Row(tensor, str(axis), ", ".join(map(str, sizes)), reason) for (tensor, axis, reason), sizes in factors.items()
    )
    number = len(symmetry.groups)
    said = "1 group of axes permutes" if number == 1 else f"{number} groups of axes permute"
    parts = [f"{said} without a change of the function"]
    if groups:
        parts.append(_table(("group", "kind", "size", "tensors"), groups, limit, width))
    if frozen:
        parts.append(_table(("frozen", "axis", "factors", "because"), frozen, limit, width))
    if symmetry.unknown:
        named = ", ".join(f"{name} ({n}×)" for name, n in symmetry.unknown)
        parts.append(f"Operations without a rule freeze what they touch: {named}")
    return "\n\n".join(parts)


def _table(titles: tuple[str, str, str, str], rows: list[Row], limit: int | None, width: int | None) -> str:
    columns = [
        Column(titles[0], lambda r: r.name, right=False),
        Column(titles[1], lambda r: r.kind, right=titles[1] == "axis"),
        Column(titles[2], lambda r: r.size),
        Column("times", lambda r: str(r.count), optional=2),
        Column(titles[3], lambda r: r.details, right=False, optional=0 if titles[3] == "because" else 3),
    ]
    more = f"\n… and {len(rows) - limit} more rows" if limit and len(rows) > limit else ""
    return text_table(columns, rows[:limit], width) + more


def _size(symmetry: Symmetry, group: Group) -> str:
    shape = symmetry.shape(group)
    return f"{shape[-1]} in each of {'×'.join(map(str, shape[:-1]))}" if len(shape) > 1 else str(shape[-1])


def _short(group: Group) -> list[str]:
    """Tensors without the path that they share with the group, at most four."""
    path = group.name.rpartition(".")[0]
    names = list(dict.fromkeys(_NUMBER.sub("*", t.removeprefix(f"{path}.")) for t in group.tensors))
    return names if len(names) <= 4 else [*names[:4], f"… {len(group.tensors)} tensors"]


def _gather(rows: Iterable[Row]) -> list[Row]:
    """One row for those that are alike but for numbers in names."""
    found: dict[tuple[str, str, str, str], Row] = {}
    for row in rows:
        name, details = _NUMBER.sub("*", row.name), re.sub(r"\b\d+\b(?=[.)])", "*", row.details)
        key = (name, row.kind, row.size, details)
        old = found.get(key)
        found[key] = replace(old, count=old.count + 1) if old else Row(*key)
    return list(found.values())
