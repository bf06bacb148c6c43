"""The difference of two models as text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from weft.measure.difference import Mismatch, ModelDifference, TensorDifference
from weft.view.inspection import left_out
from weft.view.tables import Column, number, plural, printable, quantity, shape, share, text_table

_LISTED = 5  # names of a list that is only worth an example

ORDERS: dict[str, Callable[[TensorDifference], Any] | None] = {
    "change": lambda row: (-(row.relative_change is None and bool(row.difference_norm)), -(row.relative_change or 0.0)),
    "model": None,
    "name": lambda row: row.name,
    "size": lambda row: -row.parameters,
    "cosine": lambda row: 1.0 if row.cosine is None else row.cosine,
    "largest": lambda row: -(row.largest or 0.0),
    "signs": lambda row: -(row.sign_change_share or 0.0),
    "equal": lambda row: 1.0 if row.equal_share is None else row.equal_share,
}

_NUMBERS = [
    Column("change", lambda r: share_of_change(r.relative_change)),
    Column("‖b-a‖", lambda r: number(r.difference_norm), optional=3),
    Column("cosine", lambda r: cosine(r.cosine)),
    Column("max |b-a|", lambda r: number(r.largest), optional=2),
    Column("equal", lambda r: share(r.equal_share)),
    Column("signs", lambda r: share(r.sign_change_share), optional=1),
]
_BAD = Column("NaN/inf", lambda r: f"{r.non_finite:,}")
_TENSOR = [Column("tensor", lambda r: r.name, right=False), Column("shape", lambda r: shape(r.shape), optional=4)]
_GROUP = [
    Column("tensors", lambda g: str(g.tensors), optional=5),
    Column("parameters", lambda g: quantity(g.parameters), optional=4),
]


def share_of_change(value: float | None) -> str:
    """A relative change: a percentage, a factor from ten times on.

    >>> share_of_change(0.0123), share_of_change(0.0), share_of_change(25.0), share_of_change(2e-5)
    ('1.23%', '0%', '25.0×', '0.00200%')
    """
    if value is None:
        return "–"
    return f"{number(value)}×" if value >= 10 else f"{number(100 * value)}%"


def cosine(value: float | None) -> str:
    """Six decimals: what matters of it is how far it is from one."""
    return "–" if value is None else f"{value:.6f}"


def ordered(report: ModelDifference, order: str) -> list[TensorDifference]:
    """Tensors in one of ``ORDERS``; equals stay in the model's order."""
    key = ORDERS[order]
    return sorted(report.tensors, key=key) if key else list(report.tensors)


def facts(report: ModelDifference) -> dict[str, str]:
    """Totals by label."""
    total = report.total
    return {
        "compared": f"{plural(total.tensors, 'tensor')}, {quantity(total.parameters)} parameters",
        "relative change": share_of_change(total.relative_change),
        "cosine": cosine(total.cosine),
        "equal": share(total.equal_share),
        "signs changed": share(total.sign_change_share),
    }


def remarks(report: ModelDifference) -> list[str]:
    """What does not match, and what is the same."""
    lines = []
    for name, names in zip(report.names, (report.only_a, report.only_b)):
        if names:
            lines.append(f"Only in {name}: {_some(names)}.")
    if report.shapes:
        lines.append(f"Not comparable, and left out: {_some([_mismatch(m) for m in report.shapes])}.")
    if report.dtypes:
        types = sorted({f"{m.a} against {m.b}" for m in report.dtypes})
        lines.append(
            f"{plural(len(report.dtypes), 'tensor')} stored in other types ({', '.join(types)}), compared by value."
        )
    from_zero = [row.name for row in report.tensors if row.relative_change is None and row.difference_norm]
    if from_zero:
        lines.append(f"All zero in {report.names[0]}, so without a relative change: {_some(from_zero)}.")
    same = sum(row.equal_share == 1 for row in report.tensors)
    if report.tensors and same == len(report.tensors):
        lines.append("All compared tensors are identical.")
    elif same:
        lines.append(f"{same} of {len(report.tensors)} compared tensors are identical.")
    if report.total.non_finite:
        lines.append(f"{plural(report.total.non_finite, 'element')} NaN or infinite, left out of all sums.")
    return [printable(line) for line in lines]


def render(report: ModelDifference, rows: list[TensorDifference], width: int | None) -> str:
    """The report as text, with ``rows`` of its tensors."""
    head = f"{printable(report.names[0])} (a) against {printable(report.names[1])} (b)"
    totals = ", ".join(f"{label} {value}" for label, value in facts(report).items())
    parts = ["\n".join([head, totals, *remarks(report)])]
    bad = [_BAD] if report.total.non_finite else []
    for title, groups in (("kind", report.kinds), ("layer", report.layers)):
        if len(groups) > 1:
            label = Column(title, lambda g: g.label, right=False)
            parts.append(text_table([label, *_GROUP, *_NUMBERS, *bad], groups, width))
    if report.tensors:
        table = text_table([*_TENSOR, *_NUMBERS, *bad], rows, width)
        parts.append(table + left_out(len(rows), len(report.tensors)))
    return "\n\n".join(parts)


def _mismatch(mismatch: Mismatch) -> str:
    return f"{mismatch.name} ({mismatch.a} against {mismatch.b})"


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more
