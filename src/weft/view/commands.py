"""What ``weft inspect`` and ``weft diff`` do: measure, then hand back text and write a page if one is asked for."""

from __future__ import annotations

import dataclasses
import json as json_module
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from weft.engine.progress import Progress
from weft.errors import RecipeError, did_you_mean
from weft.measure.difference import model_difference
from weft.measure.inspection import model_statistics
from weft.view import comparison, inspection
from weft.view.page import diff_page, inspect_page
from weft.view.tables import terminal_width
from weft.view.write import write_page

SHOWN = 40  # tensors in a text table unless asked otherwise
T = TypeVar("T")


def inspect_command(
    model: Any,
    *,
    tensors: str | None = None,
    sort: str = "model",
    limit: int | None = None,
    spectrum: bool = False,
    json: bool = False,
    plot: str | os.PathLike[str] | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
    width: int | None = None,
) -> str:
    """Describe a model's weights.

    Args:
        model: anything that ``weft.open`` takes.
        tensors: only names that match this glob.
        sort: order of the tensors, a key of ``weft.view.inspection.ORDERS``.
        limit: how many tensors to show, 0 for all; default: 40 as text, all as JSON.
        spectrum: also spectral norm and stable rank of matrices.
        json: one JSON object instead of tables.
        plot: write a page to this ``.html`` file, replacing what is there.
        threads: worker threads; default: the cores, at most 8.
        progress: where to report.
        width: characters in a line; default: the terminal's, unlimited where there is none.

    Returns:
        Text for ``print``.

    Raises:
        RecipeError: an unknown order, a negative limit, a pattern without a match, a page that is not ``.html``.
        CheckpointError: the model cannot be read. OutputError: the page cannot be written.

    >>> import numpy as np
    >>> print(inspect_command({"w": np.float32([[1, 0], [0, -1]])}, width=60))
    state dict: 4 parameters in 1 tensor, 16 B (F32 16 B)
    <BLANKLINE>
    tensor  type  shape    rms  zeros  >6σ  peak/σ  kurtosis
    w       F32     2×2  0.707  50.0%   0%    1.41      2.00
    """
    _check(sort, inspection.ORDERS, limit, plot)
    report = model_statistics(model, tensors=tensors, spectrum=spectrum, threads=threads, progress=progress)
    rows = inspection.ordered(report, sort)
    saved = _write_page(plot, lambda: inspect_page(report))
    if json:
        return _json(dataclasses.replace(report, tensors=tuple(_first(rows, limit or 0))).to_dict())
    return inspection.render(report, _first(rows, SHOWN if limit is None else limit), width or terminal_width()) + saved


def diff_command(
    a: Any,
    b: Any,
    *,
    tensors: str | None = None,
    sort: str = "change",
    limit: int | None = None,
    json: bool = False,
    plot: str | os.PathLike[str] | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
    width: int | None = None,
) -> str:
    """Compare two models; see :func:`inspect_command` for the parameters.

    Raises:
        RecipeError: also where the models have no tensor name in common.

    >>> import numpy as np
    >>> a, b = {"w": np.float32([3, 4])}, {"w": np.float32([3, -5])}
    >>> print(diff_command(a, b).splitlines()[1])
    compared 1 tensor, 2 parameters, relative change 180%, cosine -0.377297, equal 50.0%, signs changed 50.0%
    """
    _check(sort, comparison.ORDERS, limit, plot)
    report = model_difference(a, b, tensors=tensors, threads=threads, progress=progress)
    rows = comparison.ordered(report, sort)
    saved = _write_page(plot, lambda: diff_page(report))
    if json:
        return _json(dataclasses.replace(report, tensors=tuple(_first(rows, limit or 0))).to_dict())
    return comparison.render(report, _first(rows, SHOWN if limit is None else limit), width or terminal_width()) + saved


def _check(sort: str, orders: Iterable[str], limit: int | None, plot: str | os.PathLike[str] | None) -> None:
    """Refuse what cannot work before any weight is read."""
    if sort not in set(orders):
        raise RecipeError(f"Tensors cannot be sorted by {sort!r}.{did_you_mean(sort, orders)}")
    if limit is not None and limit < 0:
        raise RecipeError(f"The limit must be 0 (all tensors) or more, got {limit}.")
    if plot is not None and Path(plot).suffix.lower() not in (".html", ".htm"):
        raise RecipeError(f"{plot}: a page is an .html file; give the plot a name that ends in .html.")


def _write_page(plot: str | os.PathLike[str] | None, build: Callable[[], str]) -> str:
    """The line that says where the page is, once it is written."""
    return "" if plot is None else f"\n\nPage written to {write_page(plot, build())}"


def _first(rows: list[T], limit: int) -> list[T]:
    return rows[:limit] if limit else rows


def _json(value: dict[str, Any]) -> str:
    return json_module.dumps(value, indent=1, allow_nan=False, ensure_ascii=False)
