"""Weighted average of models: one model's cost, often an ensemble's accuracy.

Model soups, Wortsman et al., arXiv:2203.05482 (2022); mergekit's ``linear``.

    W = Σᵢ wᵢ Wᵢ / Σᵢ wᵢ        Wᵢ (any shape), weights wᵢ; the division only with ``normalize``

Differences from the paper and its code: sums are taken in float32 and cast once.
Complexity: one pass, O(models x elements). Re-implemented from the equation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from weft.engine.chunks import Chunk
from weft.engine.merging import MergeMethod, merge_tensors
from weft.errors import RecipeError
from weft.kernels.jit import kernel
from weft.method import configure, parameter, per_model


@dataclass(frozen=True)
class Linear:
    """Configuration of :func:`linear`."""

    weights: float | tuple[float, ...] = parameter(1.0, "weight of each model", per_model="weight")
    normalize: bool = parameter(True, "divide the weights by their sum")


def linear(tensors: Sequence[Any], *, weights: float | Sequence[float] = 1.0, normalize: bool = True) -> Any:
    """Weighted average of tensors of one shape.

    Args:
        tensors: one tensor (torch or numpy, any shape) or one state dict for each model.
        weights: one number for each model, or one for all.
        normalize: divide by the sum of the weights.

    Returns:
        The average, in the form and dtype of the first tensor.

    Raises:
        RecipeError: the number of weights is wrong, or they sum to zero under ``normalize``.
        ShapeError: shapes differ.

    Source: arXiv:2203.05482, section 2.

    >>> import numpy as np, weft
    >>> weft.merge.linear([np.zeros(2, np.float32), np.ones(2, np.float32)], weights=[1, 3])
    array([0.75, 0.75], dtype=float32)
    """
    return merge_tensors(METHODS[0], tensors, configure(Linear, {"weights": weights, "normalize": normalize}, "linear"))


def _combine(chunk: Chunk, config: Linear, state: None, out: np.ndarray) -> None:
    weights = np.asarray(per_model(config.weights, len(chunk.tensors)))
    if config.normalize:
        total = weights.sum()
        if abs(total) < 1e-8:
            raise RecipeError("linear: the weights sum to zero, so they cannot be normalised; set normalize: false.")
        weights = weights / total
    weighted_sum(chunk.tensors, weights.astype(np.float32), out)


@kernel
def weighted_sum(tensors, weights, out):  # (models, n), (models,) -> (n,)
    for i in range(out.size):
        out[i] = tensors[0, i] * weights[0]
    for m in range(1, tensors.shape[0]):
        w = weights[m]
        for i in range(out.size):
            out[i] += tensors[m, i] * w


METHODS = (
    MergeMethod(
        name="linear",
        family="merge",
        config=Linear,
        summary="Weighted average of the models.",
        goal="combine",
        origin="model soups (uniform); mergekit linear",
        combine=_combine,
        models=(1, None),
        function=linear,
        checked_by=("closed form", "mergekit"),
    ),
)
