"""Interpolate two models, or two models' changes to a base, along the arc between them; also row by row.

NuSLERP of mergekit (2024); no paper. Same arc as :mod:`weft.merge.slerp`, with weights instead of a position.

    t = w₂ / (w₁ + w₂)                                          ½ where the weights sum to 0
    W = sin((1 − t) θ) / sin θ · v₁ + sin(t θ) / sin θ · v₂     θ the angle between v₁ and v₂
    W = (1 − t) v₁ + t v₂                                       where sin² θ ≤ 2⁻²⁴

vᵢ is Wᵢ, or with a base Wᵢ − W₀, and W₀ is added in the end. ``flatten`` takes a tensor as one long vector.
Without it every row (run of the last axis) has its own arc, and with ``row_wise`` besides, every run of the first axis
(each column of a matrix): the word is mergekit's.

Differences from mergekit: the angle is computed in float64, and the line is taken where mergekit's float32 cannot tell
the vectors' directions apart.
Complexity: one pass for inner products (none for rows), one to mix. Chunks hold whole rows. Re-implemented from the
equations.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from weft.engine.chunks import Chunk, Scan
from weft.engine.gram import gram, row_grams, weigh_rows
from weft.engine.merging import MergeMethod, merge_tensors
from weft.kernels.jit import kernel
from weft.merge.linear import weighted_sum
from weft.merge.slerp import arc_weights
from weft.method import configure, parameter, per_model

_STRAIGHT = 2.0**-24  # sin² θ up to which cos² θ is 1 in float32
_SHORTEST = 1e-7  # shorter vectors are not scaled to 1, and so count as nearly orthogonal to everything


@dataclass(frozen=True)
class Nuslerp:
    """Configuration of :func:`nuslerp`."""

    weights: float | tuple[float, ...] = parameter(1.0, "weight of each model", per_model="weight")
    flatten: bool = parameter(True, "one arc for a tensor, not one for each row", key="nuslerp_flatten")
    row_wise: bool = parameter(False, "without flatten: along the first axis, not the last", key="nuslerp_row_wise")


def nuslerp(
    tensors: Sequence[Any],
    *,
    weights: float | Sequence[float] = 1.0,
    base: Any = None,
    flatten: bool = True,
    row_wise: bool = False,
) -> Any:
    """Interpolate two tensors on the arc between them.

    Args:
        tensors: two tensors (torch or numpy, any shape) or two state dicts.
        weights: one number for each; only their ratio counts.
        base: where the arc's circle has its centre, in the same form; without it, 0.
        flatten: one arc for a whole tensor, not one for each row.
        row_wise: without ``flatten``, one arc for each run of the first axis, not of the last.

    Returns:
        The point on the arc, in the form and dtype of the first tensor.

    Raises:
        RecipeError: not two tensors, or the wrong number of weights. ShapeError: shapes differ.

    Source: mergekit's nuslerp.

    >>> import numpy as np
    >>> from weft.merge.nuslerp import nuslerp
    >>> nuslerp([np.float32([1, 0]), np.float32([0, 1])], weights=[2, 1]).round(4)
    array([0.866, 0.5  ], dtype=float32)
    """
    values = {"weights": weights, "flatten": flatten, "row_wise": row_wise}
    return merge_tensors(METHODS[0], tensors, configure(Nuslerp, values, "nuslerp"), base=base)


def _prepare(scan: Scan, config: Nuslerp) -> np.ndarray | None:
    """Weights of a whole tensor (2,) or of its columns (2, columns); None for rows, which chunks weigh themselves."""
    if config.flatten:
        return _weights(gram(scan), config)
    shape = scan.inputs[0].shape
    if not config.row_wise or len(shape) < 2:
        return None
    columns = math.prod(shape[1:])

    def add(chunk: Chunk, total: np.ndarray) -> None:
        add_column_products(chunk.tensors[0], chunk.tensors[1], chunk.start % columns, total)

    products = scan.fold(add, lambda: np.zeros((3, columns)))
    return _weights(products[[[0, 1], [1, 2]]].transpose(2, 0, 1), config)


def _weights(products: np.ndarray, config: Nuslerp) -> np.ndarray:
    """Weights (2, …) from inner products (…, 2, 2)."""
    first, second = per_model(config.weights, 2)
    t = second / (first + second) if abs(first + second) >= 1e-6 else 0.5
    a, b = (np.maximum(np.sqrt(products[..., i, i]), _SHORTEST) for i in (0, 1))
    cosines = np.clip(products[..., 0, 1] / (a * b), -1, 1)
    return arc_weights(cosines, t, 1 - cosines**2 <= _STRAIGHT)


def _combine(chunk: Chunk, config: Nuslerp, state: np.ndarray | None, out: np.ndarray) -> None:
    if state is None:
        weigh_rows(chunk, _weights(row_grams(chunk), config), out)
    elif state.ndim == 1:
        weighted_sum(chunk.tensors, state.astype(np.float32), out)
    else:
        weigh_columns(chunk.tensors, chunk.start % state.shape[1], state.astype(np.float32), out)


@kernel
def add_column_products(a, b, first, totals):  # (n,), (n,) -> (3, columns), from column ``first`` on
    start, column = 0, first
    while start < a.size:
        n = min(totals.shape[1] - column, a.size - start)
        x, y = a[start : start + n], b[start : start + n]
        xx, xy, yy = totals[0, column : column + n], totals[1, column : column + n], totals[2, column : column + n]
        for i in range(n):
            xx[i] += np.float64(x[i]) * np.float64(x[i])
            xy[i] += np.float64(x[i]) * np.float64(y[i])
            yy[i] += np.float64(y[i]) * np.float64(y[i])
        start += n
        column = 0


@kernel
def weigh_columns(tensors, first, weights, out):  # (2, n), (2, columns) -> (n,), from column ``first`` on
    start, column = 0, first
    while start < out.size:
        n = min(weights.shape[1] - column, out.size - start)
        a, b, target = tensors[0, start : start + n], tensors[1, start : start + n], out[start : start + n]
        weight_a, weight_b = weights[0, column : column + n], weights[1, column : column + n]
        for i in range(n):
            target[i] = a[i] * weight_a[i] + b[i] * weight_b[i]
        start += n
        column = 0


METHODS = (
    MergeMethod(
        name="nuslerp",
        family="merge",
        config=Nuslerp,
        summary="Interpolate two models, or their changes to a base, along the arc between them.",
        goal="combine",
        origin="mergekit nuslerp",
        combine=_combine,
        prepare=_prepare,
        deltas=True,
        base="optional",
        models=(2, 2),
        granularity="row",
        function=nuslerp,
        checked_by=("closed form", "brute force", "mergekit"),
    ),
)
