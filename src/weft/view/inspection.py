"""A model's statistics as text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from weft.measure.inspection import ModelStatistics
from weft.measure.statistics import TensorStatistics
from weft.view.tables import Column, number, plural, printable, quantity, shape, share, text_table

_Key = Callable[[TensorStatistics], Any]


def _descending(field: str) -> _Key:
    return lambda row: -_or(getattr(row, field), float("-inf"))


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


ORDERS: dict[str, _Key | None] = {
    "model": None,
    "worst": lambda row: (-row.non_finite, -constant(row), -_or(row.peak, 0.0)),
    "name": lambda row: row.name,
    "size": lambda row: -row.parameters,
    "rms": _descending("rms"),
    "norm": _descending("norm"),
    "zeros": _descending("zero_share"),
    "outliers": _descending("outlier_share"),
    "peak": _descending("peak"),
    "kurtosis": _descending("kurtosis"),
}

_COLUMNS = [
    Column("tensor", lambda r: r.name, right=False),
    Column("type", lambda r: r.dtype, right=False, optional=4),
    Column("shape", lambda r: shape(r.shape), optional=2),
    Column("mean", lambda r: number(r.mean), optional=5),
    Column("std", lambda r: number(r.standard_deviation), optional=6),
    Column("rms", lambda r: number(r.rms)),
    Column("min", lambda r: number(r.minimum), optional=8),
    Column("max", lambda r: number(r.maximum), optional=7),
    Column("zeros", lambda r: share(r.zero_share), optional=1),
    Column(">6σ", lambda r: share(r.outlier_share), optional=3),
    Column("peak/σ", lambda r: number(r.peak)),
    Column("kurtosis", lambda r: number(r.kurtosis), optional=3),
]
_SPECTRUM = [
    Column("spectral", lambda r: number(r.spectrum.spectral_norm if r.spectrum else None)),
    Column("stable rank", lambda r: number(r.spectrum.stable_rank if r.spectrum else None), optional=1),
]
_BAD = Column("NaN/inf", lambda r: f"{r.non_finite:,}")
_GROUP = [
    Column("tensors", lambda g: str(g.tensors), optional=5),
    Column("parameters", lambda g: quantity(g.parameters), optional=1),
    Column("bytes", lambda g: quantity(g.nbytes, "B"), optional=2),
    Column("rms", lambda g: number(g.rms)),
    Column("zeros", lambda g: share(g.zero_share)),
    Column(">6σ", lambda g: share(g.outlier_share), optional=3),
    Column("peak/σ", lambda g: number(g.peak)),
    Column("kurtosis", lambda g: number(g.kurtosis), optional=4),
]


def ordered(report: ModelStatistics, order: str) -> list[TensorStatistics]:
    """Tensors in one of ``ORDERS``; equals stay in the model's order."""
    key = ORDERS[order]
    return sorted(report.tensors, key=key) if key else list(report.tensors)


def constant(row: TensorStatistics) -> bool:
    """A matrix whose elements are all equal: never trained, or pruned away."""
    return len(row.shape) > 1 and row.parameters > 1 and row.minimum is not None and row.minimum == row.maximum


def facts(report: ModelStatistics) -> dict[str, str]:
    """Totals by label."""
    found = {
        "parameters": f"{report.parameters:,}",
        "tensors": f"{len(report.tensors):,}",
        "bytes": quantity(report.nbytes, "B"),
        "types": ", ".join(f"{name} {quantity(d['nbytes'], 'B')}" for name, d in report.dtypes.items()),
    }
    if report.tied:
        found["tied"] = plural(len(report.tied), "name")
    return found


def remarks(report: ModelStatistics) -> list[str]:
    """What is worth a second look, worst first."""
    lines = []
    broken = [row for row in report.tensors if row.non_finite]
    if broken:
        row = max(broken, key=lambda r: r.non_finite)
        lines.append(
            f"NaN or infinity in {len(broken)} of {len(report.tensors)} tensors, most in {row.name}: "
            f"{row.nan or 0:,} NaN, {row.infinite or 0:,} infinite. They are left out of all other numbers."
        )
    same = [row for row in report.tensors if constant(row)]
    if same:
        lines.append(f"All elements are equal in {_names([row.name for row in same])}.")
    lines += [f"The same bytes are stored under {_names(list(names))}." for names in report.copies]
    lines += [f"{name} is tied to {target}." for name, target in list(report.tied.items())[:5]]
    lines += report.notes
    return [printable(line) for line in lines]


def render(report: ModelStatistics, rows: list[TensorStatistics], width: int | None) -> str:
    """The report as text, with ``rows`` of its tensors."""
    totals = facts(report)
    head = (
        f"{printable(report.name)}: {totals['parameters']} parameters in {plural(len(report.tensors), 'tensor')}, "
        f"{totals['bytes']} ({totals['types']})"
    )
    bad = [_BAD] if any(row.non_finite for row in report.tensors) else []
    parts = ["\n".join([head, *remarks(report)])]
    for title, groups in (("kind", report.kinds), ("layer", report.layers)):
        if len(groups) > 1:
            parts.append(text_table([_label(title), *_GROUP, *bad], groups, width))
    spectral = _SPECTRUM if any(row.spectrum for row in rows) else []
    parts.append(text_table([*_COLUMNS, *spectral, *bad], rows, width) + left_out(len(rows), len(report.tensors)))
    return "\n\n".join(parts)


def left_out(shown: int, total: int) -> str:
    """A last line that tells how much of a table is missing."""
    return f"\n… {total - shown:,} more; --limit 0 shows all" if shown < total else ""


def _label(title: str) -> Column:
    return Column(title, lambda g: g.label, right=False)


def _names(names: list[str]) -> str:
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(names[:4]) + more
