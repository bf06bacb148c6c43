"""Average a few fine-tunes and go back towards the base by as much as they disagree: no scores, no tuning.

Model Stock, Jang et al., arXiv:2403.19522 (2024).

    τᵢ = Wᵢ − W₀                                differences from the base, N ≥ 2 of them
    c  = mean of cos(τᵢ, τⱼ) over pairs i < j
    t  = N c / (1 + (N − 1) c)
    W  = W₀ + t · mean(τ)                       = t · mean(W) + (1 − t) W₀

c belongs to a whole tensor, or with ``filter_wise`` to each of its rows (runs of the last axis). Fine-tunes that agree,
c = 1, are averaged; independent ones, c = 0, give back the base; c < 0 goes beyond it.

Differences from the paper and its code: the paper takes one angle for all pairs, here it is the mean of their cosines,
as in mergekit. A tensor that a model did not change is orthogonal to all others. Where 1 + (N − 1) c = 0 there is no
estimate, and the base stays. mergekit divides by at least 10⁻⁶ in the cosine (``mergekit/model_stock``), which pulls
tensors and rows whose changes are shorter than 10⁻³ back to the base.
Complexity: one pass for inner products (none with ``filter_wise``), one to mix. Chunks hold whole rows. Re-implemented
from the equations (official code: MIT).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from weft.engine.chunks import Chunk, Scan
from weft.engine.gram import gram, row_grams, weigh_rows
from weft.engine.merging import MergeMethod, merge_tensors
from weft.merge.linear import weighted_sum
from weft.method import configure, parameter

_SINGULAR = 1e-6  # no estimate where |1 + (N − 1) c| is below this


@dataclass(frozen=True)
class ModelStock:
    """Configuration of :func:`model_stock`."""

    filter_wise: bool = parameter(False, "one angle for each row, not for the tensor")
    floor: float = parameter(0.0, "smallest product of two lengths in a cosine", minimum=0)


def model_stock(deltas: Sequence[Any], *, filter_wise: bool = False, floor: float = 0.0) -> Any:
    """Average differences from a common base and shrink them by how far they disagree.

    Args:
        deltas: one difference (torch or numpy, any shape), or one state dict of differences, for each of at least two
            models.
        filter_wise: measure and shrink each row (run of the last axis) by itself.
        floor: the product of two lengths counts as at least this much in a cosine.

    Returns:
        The merged difference; add it to the base.

    Raises:
        RecipeError: fewer than two differences. ShapeError: shapes differ.

    Source: arXiv:2403.19522, section 4.

    >>> import numpy as np
    >>> from weft.merge.model_stock import model_stock
    >>> model_stock([np.float32([1, 1]), np.float32([1, 0])]).round(4)
    array([0.8284, 0.4142], dtype=float32)
    """
    values = {"filter_wise": filter_wise, "floor": floor}
    return merge_tensors(METHODS[0], deltas, configure(ModelStock, values, "model_stock"), are_deltas=True)


def ratio(products: np.ndarray, floor: float) -> np.ndarray:
    """Share t of the average (…) from inner products of the differences (…, models, models)."""
    models = products.shape[-1]
    i, j = np.triu_indices(models, 1)
    lengths = np.sqrt(np.diagonal(products, axis1=-2, axis2=-1))
    both = np.maximum(lengths[..., i] * lengths[..., j], floor)
    cosine = np.clip(products[..., i, j] / np.where(both > 0, both, 1), -1, 1).mean(-1)
    below = 1 + (models - 1) * cosine
    singular = abs(below) < _SINGULAR
    share: np.ndarray = np.where(singular, 0, models * cosine / np.where(singular, 1, below))
    return share


def _prepare(scan: Scan, config: ModelStock) -> float | None:
    return None if config.filter_wise else float(ratio(gram(scan), config.floor))


def _combine(chunk: Chunk, config: ModelStock, state: float | None, out: np.ndarray) -> None:
    models = len(chunk.tensors)
    if state is None:
        shares = ratio(row_grams(chunk), config.floor)
        weigh_rows(chunk, np.broadcast_to(shares / models, (models, len(shares))), out)
    else:
        weighted_sum(chunk.tensors, np.full(models, state / models, np.float32), out)


METHODS = (
    MergeMethod(
        name="model_stock",
        family="merge",
        config=ModelStock,
        summary="Average fine-tunes and go back towards the base by as much as they disagree.",
        goal="combine",
        origin="Model Stock, arXiv:2403.19522",
        combine=_combine,
        prepare=_prepare,
        deltas=True,
        base="required",
        models=(2, None),
        granularity="row",
        function=model_stock,
        checked_by=("closed form", "brute force"),
    ),
    MergeMethod(
        name="mergekit/model_stock",
        family="merge",
        config=ModelStock,
        summary="Model Stock with mergekit's least product of lengths.",
        goal="combine",
        origin="mergekit model_stock",
        defaults={"floor": 1e-6},
        combine=_combine,
        prepare=_prepare,
        deltas=True,
        base="required",
        models=(2, None),
        granularity="row",
        function=model_stock,
        differs="divides by at least 1e-6 in a cosine, which undoes changes shorter than 1e-3",
        checked_by=("closed form", "brute force", "mergekit"),
    ),
)
