"""Average any number of models by direction and by length apart: the spherical counterpart of a weighted mean.

Multi-SLERP, Goddard, goddard.blog/posts/multislerp-wow-what-a-cool-idea (2025); mergekit's ``multislerp``. No paper.

    uᵢ = vᵢ / (|vᵢ| + ε)                vᵢ the tensor Wᵢ as a long vector, or with a base Wᵢ − W₀
    m  = Σᵢ wᵢ uᵢ                       wᵢ divided by Σ w with ``normalize_weights``
    W  = (Σᵢ wᵢ |vᵢ|) · m / |m|         and W₀ is added

Differences from the original: it goes on from m / |m| along the mean of the uᵢ in the tangent space there. That mean
is zero, Σ wᵢ (uᵢ − ⟨uᵢ, m̂⟩ m̂) = m − ⟨m, m̂⟩ m̂ = 0, so the step is left out; for the barycentre on the sphere see
:mod:`weft.merge.karcher`. Tensors that are 0 in every model give 0 (mergekit stops with an error for three or more).
Two that cancel are averaged; more that cancel are an error.
Complexity: one pass for inner products, one to mix. Re-implemented from the equations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from weft.engine.chunks import Chunk, Scan
from weft.engine.gram import gram
from weft.engine.merging import MergeMethod, merge_tensors
from weft.errors import RecipeError
from weft.merge.linear import weighted_sum
from weft.method import configure, parameter, per_model


@dataclass(frozen=True)
class Multislerp:
    """Configuration of :func:`multislerp`."""

    weights: float | tuple[float, ...] = parameter(1.0, "weight of each model", per_model="weight")
    normalize_weights: bool = parameter(True, "divide the weights by their sum")
    # up to 1e-4 the original's cos ε, which is left out, is 1 in float32
    eps: float = parameter(1e-8, "added to lengths; a mean direction this short is none", minimum=0, maximum=1e-4)


def multislerp(
    tensors: Sequence[Any],
    *,
    weights: float | Sequence[float] = 1.0,
    base: Any = None,
    normalize_weights: bool = True,
    eps: float = 1e-8,
) -> Any:
    """Weighted mean of directions, with the weighted mean of lengths.

    Args:
        tensors: one tensor (torch or numpy, any shape) or one state dict for each model.
        weights: one number for each model, or one for all.
        base: the centre of the sphere, in the same form; without it, 0.
        normalize_weights: divide the weights by their sum.
        eps: added to lengths; a mean direction shorter than this counts as none.

    Returns:
        The mean, in the form and dtype of the first tensor.

    Raises:
        RecipeError: the weights sum to zero under ``normalize_weights``, or three or more models cancel.
        ShapeError: shapes differ.

    Source: goddard.blog/posts/multislerp-wow-what-a-cool-idea.

    >>> import numpy as np
    >>> from weft.merge.multislerp import multislerp
    >>> multislerp([np.float32([2, 0]), np.float32([0, 4])]).round(4)
    array([2.1213, 2.1213], dtype=float32)
    """
    values = {"weights": weights, "normalize_weights": normalize_weights, "eps": eps}
    return merge_tensors(METHODS[0], tensors, configure(Multislerp, values, "multislerp"), base=base)


def _prepare(scan: Scan, config: Multislerp) -> np.ndarray:
    """Weights of the models: the merge lies in their span."""
    if scan.models == 1:
        return np.ones(1)
    weights = np.asarray(per_model(config.weights, scan.models))
    if config.normalize_weights:
        if abs(weights.sum()) < 1e-8:
            raise RecipeError(
                "multislerp: the weights sum to zero, so they cannot be normalised; set normalize_weights: false."
            )
        weights = weights / weights.sum()
    products = gram(scan)
    lengths = np.sqrt(np.diag(products))
    if not lengths.any():
        return weights
    directions = weights / np.where(lengths > 0, lengths + config.eps, 1)
    length = np.sqrt(max(directions @ products @ directions, 0.0))
    if length < config.eps or length == 0:
        if scan.models == 2:
            return weights
        raise RecipeError(
            f"multislerp: the weighted directions of the {scan.models} models cancel in {scan.inputs[0].name!r}, so "
            "they have no mean. Models or weights are mirror images of each other; change the weights or use linear."
        )
    mean: np.ndarray = directions * (weights @ lengths / length)
    return mean


def _combine(chunk: Chunk, config: Multislerp, state: np.ndarray, out: np.ndarray) -> None:
    weighted_sum(chunk.tensors, state.astype(np.float32), out)


METHODS = (
    MergeMethod(
        name="multislerp",
        family="merge",
        config=Multislerp,
        summary="Average directions and lengths apart, of any number of models or of their changes to a base.",
        goal="combine",
        origin="Multi-SLERP (Goddard 2025); mergekit multislerp",
        combine=_combine,
        prepare=_prepare,
        deltas=True,
        base="optional",
        function=multislerp,
        checked_by=("closed form", "brute force", "mergekit"),
    ),
)
