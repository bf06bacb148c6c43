"""Self-contained pages: one file with its data, its styles and its script, and no other host.

The data is JSON inside the page; ``page.html`` draws it. Names from a checkpoint reach the page as JSON strings with
every ``<`` escaped, and the script only ever sets them as text.
"""

from __future__ import annotations

import html
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

from weft.measure import difference, statistics
from weft.measure.difference import ModelDifference, TensorDifference
from weft.measure.inspection import ModelStatistics
from weft.measure.moments import BINS_PER_OCTAVE
from weft.measure.places import group, stacks_of
from weft.measure.report import plain
from weft.measure.statistics import TensorStatistics
from weft.view import comparison, inspection
from weft.view.tables import shape

Row = TensorStatistics | TensorDifference


@dataclass(frozen=True)
class Metric:
    """A number that the page can colour and list.

    Attributes:
        key: attribute of a tensor's and a group's report.
        label: for people.
        form: "number", "share", "change", "cosine" or "count".
        log: colour by the logarithm.
        reverse: low values are the striking ones.
        map: offered for the map of layers and kinds, not only in the table.
        about: one sentence.
    """

    key: str
    label: str
    form: str = "number"
    log: bool = False
    reverse: bool = False
    map: bool = True
    about: str = ""


_INSPECT = (
    Metric("rms", "RMS", log=True, about="Root of the mean square: the size of a typical weight."),
    Metric("peak", "peak / σ", log=True, about="Largest distance from the mean, in standard deviations."),
    Metric("outlier_share", "beyond 6 σ", "share", about="Share of elements more than 6 standard deviations away."),
    Metric("zero_share", "zeros", "share", about="Share of elements that are exactly zero."),
    Metric("kurtosis", "kurtosis", log=True, about="Weight of the tails; 3 for a normal law."),
    Metric("non_finite", "NaN / inf", "count", about="Elements that are NaN or infinite."),
)
_INSPECT_TABLE = (
    Metric("mean", "mean", map=False),
    Metric("standard_deviation", "σ", map=False),
    Metric("minimum", "min", map=False),
    Metric("maximum", "max", map=False),
    Metric("norm", "L2 norm", map=False),
)
_SPECTRUM = (
    Metric("spectral_norm", "spectral norm", log=True, about="Largest singular value."),
    Metric("stable_rank", "stable rank", log=True, about="Squared Frobenius norm over squared spectral norm."),
)
_DIFF = (
    Metric("relative_change", "relative change", "change", log=True, about="‖b − a‖ / ‖a‖."),
    Metric("difference_norm", "‖b − a‖", log=True, about="L2 norm of the difference."),
    Metric("cosine", "cosine", "cosine", reverse=True, about="Of the angle between a and b."),
    Metric("largest", "max |b − a|", log=True, about="Largest change of one element."),
    Metric("equal_share", "equal", "share", reverse=True, about="Share of elements that are equal."),
    Metric("sign_change_share", "signs changed", "share", about="Share of elements whose sign changed."),
    Metric("non_finite", "NaN / inf", "count", about="Elements that are NaN or infinite in either model."),
)


def inspect_page(report: ModelStatistics) -> str:
    """A model as a page: totals, a map of layers and kinds, each tensor's magnitudes, a table."""
    spectral = any(row.spectrum for row in report.tensors)
    metrics = [*_INSPECT, *(_SPECTRUM if spectral else ()), *_INSPECT_TABLE]
    return _page(
        f"Weights of {report.name}",
        metrics,
        report.tensors,
        statistics.combine,
        facts=inspection.facts(report),
        remarks=inspection.remarks(report),
        extra={
            "scale": "kind",
            "bins_per_octave": BINS_PER_OCTAVE,
            "histograms": [
                [row.histogram.first, *row.histogram.counts] if row.histogram else None for row in report.tensors
            ],
            "percentiles": [row.percentiles for row in report.tensors],
            "types": [row.dtype for row in report.tensors],
        },
    )


def diff_page(report: ModelDifference) -> str:
    """A difference as a page: totals, a map of layers and kinds, the most changed tensors, a table."""
    most = [row for row in comparison.ordered(report, "change") if row.relative_change][:20]
    position = {row.name: i for i, row in enumerate(report.tensors)}
    return _page(
        f"{report.names[0]} (a) against {report.names[1]} (b)",
        _DIFF,
        report.tensors,
        difference.combine,
        facts=comparison.facts(report),
        remarks=comparison.remarks(report),
        extra={
            "scale": "all",
            "most": [position[row.name] for row in most],
            "types": [" → ".join(dict.fromkeys(row.dtypes)) for row in report.tensors],
        },
    )


def _page(
    title: str,
    metrics: Sequence[Metric],
    rows: Sequence[Row],
    combine: Callable[[str, list[Any]], Any],
    *,
    facts: Mapping[str, str],
    remarks: Sequence[str],
    extra: Mapping[str, Any],
) -> str:
    keys = [metric.key for metric in metrics]
    data = {
        "title": title,
        "facts": list(facts.items()),
        "remarks": list(remarks),
        "metrics": [plain(metric) for metric in metrics],
        "names": [row.name for row in rows],
        "shapes": [shape(row.shape) for row in rows],
        "sizes": [row.parameters for row in rows],
        "values": [[_value(row, key) for key in keys] for row in rows],
        "maps": _maps(rows, keys, combine),
        **extra,
    }
    text = json.dumps(plain(data), separators=(",", ":"), allow_nan=False, ensure_ascii=False)
    template = resources.files("weft.view").joinpath("page.html").read_text(encoding="utf-8")
    before, after = template.split("{{data}}")
    return before.replace("{{title}}", html.escape(title)) + text.replace("<", "\\u003c") + after


def _maps(rows: Sequence[Row], keys: Sequence[str], combine: Callable[[str, list[Any]], Any]) -> list[dict[str, Any]]:
    """For each stack of layers, and for what stands outside them: which tensors meet at (kind, layer), and their numbers."""
    maps = []
    for stack in [*stacks_of(row.place for row in rows), None]:
        inside = [
            (i, row)
            for i, row in enumerate(rows)
            if (
                row.place.stack == stack and row.place.layer is not None
                if stack is not None
                else row.place.layer is None
            )
        ]
        if not inside:
            continue
        layers = sorted({row.place.layer for _, row in inside if row.place.layer is not None})
        kinds = list(dict.fromkeys(row.place.kind for _, row in inside))
        cells = []
        for members in group(inside, lambda pair: f"{pair[1].place.layer} {pair[1].place.kind}").values():
            some = [row for _, row in members]
            whole = some[0] if len(some) == 1 else combine("", some)
            cells.append(
                {
                    "kind": kinds.index(some[0].place.kind),
                    "layer": layers.index(some[0].place.layer) if some[0].place.layer is not None else 0,
                    "tensors": [i for i, _ in members],
                    "values": [_value(whole, key) for key in keys],
                }
            )
        maps.append({"stack": stack, "layers": layers, "kinds": kinds, "cells": cells})
    return maps


def _value(row: Any, key: str) -> float | int | None:
    """A number to seven digits, which is more than a page shows."""
    value = getattr(row, key, None)
    if value is None and getattr(row, "spectrum", None) is not None:
        value = getattr(row.spectrum, key, None)
    return float(f"{value:.7g}") if isinstance(value, float) else value
