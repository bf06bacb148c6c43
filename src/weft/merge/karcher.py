"""Average any number of models at the point of the sphere that is nearest to all of them along arcs.

Riemannian barycentre, Karcher, "Riemannian center of mass and mollifier smoothing", CPAM 30 (1977); used for weights by
mergekit's ``karcher``.

    uᵢ = Wᵢ / |Wᵢ|                                          the tensors as long vectors; Wᵢ = 0 is left out
    m  = argmin Σᵢ wᵢ θ(m, uᵢ)²  over |m| = 1               θ the angle, wᵢ ≥ 0 divided by their sum
    W  = (Σᵢ wᵢ |Wᵢ|) · m

m is the fixed point of m ← exp(Σᵢ wᵢ log uᵢ), exp and log at m, from the normalised weighted mean on. It stays in the
span of the uᵢ, so one pass finds their inner products and the iteration moves k numbers. It converges where the models
lie within a quarter turn of one point, as fine-tunes of one model do. Directions that cancel start at the first model; a model
opposite to m has no logarithm and does not pull.

Differences from mergekit: weights for each model; inner products in float64; iterated to convergence (mergekit stops
after ten steps, or at one of 10⁻⁵: ``mergekit/karcher``); only a length of exactly 0 leaves a model out (there: 10⁻⁵).
Complexity: one pass for inner products, one to mix; O(models²) a step. Re-implemented from the equations.
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

_OPPOSITE = 1e-9  # sine of the angle to the point opposite, below which its direction is rounding error


@dataclass(frozen=True)
class Karcher:
    """Configuration of :func:`karcher`."""

    weights: float | tuple[float, ...] = parameter(1.0, "weight of each model", minimum=0, per_model="weight")
    max_iter: int = parameter(1000, "most steps", minimum=0)
    tol: float = parameter(1e-12, "a step shorter than this angle is not taken", minimum=0)


def karcher(
    tensors: Sequence[Any], *, weights: float | Sequence[float] = 1.0, max_iter: int = 1000, tol: float = 1e-12
) -> Any:
    """Riemannian barycentre of directions, with the weighted mean of lengths.

    Args:
        tensors: one tensor (torch or numpy, any shape) or one state dict for each model.
        weights: one number of at least 0 for each model, or one for all; only their ratios count.
        max_iter: most steps of the iteration.
        tol: the angle in radians at which it stops.

    Returns:
        The barycentre, in the form and dtype of the first tensor.

    Raises:
        RecipeError: a weight is negative, or all are zero. ShapeError: shapes differ.

    Source: Karcher 1977, section 1.

    >>> import numpy as np
    >>> from weft.merge.karcher import karcher
    >>> karcher([np.float32([1, 0]), np.float32([0, 1])], weights=[2, 1]).round(4)
    array([0.866, 0.5  ], dtype=float32)
    """
    values = {"weights": weights, "max_iter": max_iter, "tol": tol}
    return merge_tensors(METHODS[0], tensors, configure(Karcher, values, "karcher"))


def barycentre(points: np.ndarray, weights: np.ndarray, max_iter: int, tol: float) -> np.ndarray:
    """Numbers c (k,) with c @ points the barycentre of ``points`` (k, d), unit vectors, under ``weights`` (k,)."""
    coefficients = weights
    length = float(np.linalg.norm(coefficients @ points))
    if length < tol or length == 0:
        coefficients, length = np.eye(len(points))[0], 1.0
    coefficients = coefficients / length
    for _ in range(max_iter):
        mean = coefficients @ points
        cosines = points @ mean
        across = points - cosines[:, None] * mean  # (k, d), tangent at the mean
        sines = np.linalg.norm(across, axis=1)
        near = sines < _OPPOSITE
        pull = weights * np.where(near, cosines > 0, np.arctan2(sines, cosines) / np.where(near, 1, sines))
        step = pull @ across
        length = float(np.linalg.norm(step))
        if length < tol or length == 0:
            break
        move = pull - (pull @ cosines) * coefficients  # the step in terms of the points
        coefficients = np.cos(length) * coefficients + np.sin(length) / length * move
        coefficients = coefficients / np.linalg.norm(coefficients @ points)
    return coefficients


def _prepare(scan: Scan, config: Karcher) -> np.ndarray:
    """Weights of the models: the barycentre lies in their span."""
    weights = np.asarray(per_model(config.weights, scan.models))
    if not weights.any():
        raise RecipeError("karcher: all weights are zero; give at least one model a positive weight.")
    weights = weights / weights.sum()
    products = gram(scan)
    lengths = np.sqrt(np.diag(products))
    used = np.flatnonzero((lengths > 0) & (weights > 0))
    result = np.zeros(scan.models)
    if used.size:
        cosines = products[np.ix_(used, used)] / np.outer(lengths[used], lengths[used])
        values, vectors = np.linalg.eigh(cosines)
        points = vectors * np.sqrt(np.maximum(values, 0))
        points /= np.linalg.norm(points, axis=1, keepdims=True)
        mean = barycentre(points, weights[used] / weights[used].sum(), config.max_iter, config.tol)
        result[used] = (weights @ lengths) * mean / lengths[used]
    return result


def _combine(chunk: Chunk, config: Karcher, state: np.ndarray, out: np.ndarray) -> None:
    weighted_sum(chunk.tensors, state.astype(np.float32), out)


METHODS = (
    MergeMethod(
        name="karcher",
        family="merge",
        config=Karcher,
        summary="Average directions at the point of the sphere nearest to all models, and lengths apart.",
        goal="combine",
        origin="Karcher 1977; mergekit karcher",
        combine=_combine,
        prepare=_prepare,
        function=karcher,
        checked_by=("closed form", "brute force"),
    ),
    MergeMethod(
        name="mergekit/karcher",
        family="merge",
        config=Karcher,
        summary="Riemannian barycentre with mergekit's stopping rule.",
        goal="combine",
        origin="mergekit karcher",
        defaults={"max_iter": 10, "tol": 1e-5},
        combine=_combine,
        prepare=_prepare,
        function=karcher,
        differs="stops after ten steps, or at a step of 1e-5; weft's row goes on to convergence",
        checked_by=("closed form", "brute force", "mergekit"),
    ),
)
