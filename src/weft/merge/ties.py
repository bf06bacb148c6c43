"""Merge fine-tunes that interfere: trim small changes, elect a sign for each weight, average those that agree.

TIES-Merging, Yadav et al., arXiv:2306.01708 (2023).

    τᵢ = Wᵢ − W₀                                   differences from the base, trimmed to the largest
    τ̂ᵢ = top(τᵢ, density)                          ``density`` of |τᵢ|, over the whole model
    s  = sign(Σᵢ wᵢ τ̂ᵢ)                            elected sign of each element, 0 counts as +
    W  = W₀ + λ Σᵢ wᵢ mᵢ τ̂ᵢ / Σᵢ wᵢ mᵢ             mᵢ = [sign(wᵢ τ̂ᵢ) = s]; the division with ``normalize``

Differences from the paper and its code: exactly ``floor(density · n)`` elements are kept; of equal magnitudes the
lowest index wins (the code keeps whatever its sort puts first). mergekit trims each tensor by itself
(``scope="tensor"``) and keeps at least one element of it, the paper trims the whole model.
Complexity: two or three passes to find the thresholds, one to merge. Re-implemented from the equations
(official code: MIT).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from weft.engine.chunks import Chunk, Scan
from weft.engine.merging import MergeMethod, merge_tensors
from weft.engine.select import Threshold, keep, largest
from weft.kernels.jit import kernel
from weft.merge.norms import norm_ratios
from weft.method import configure, parameter, per_model

_BLOCK = 1024  # elements whose running sums stay in the first-level cache


@dataclass(frozen=True)
class Ties:
    """Configuration of :func:`ties`."""

    weights: float | tuple[float, ...] = parameter(1.0, "weight of each model's changes", per_model="weight")
    density: float | tuple[float, ...] = parameter(
        0.2, "share of each model's changes that is kept", minimum=0, maximum=1, per_model="density"
    )
    normalize: bool = parameter(True, "divide by the weights of the models that agree")
    rescale: bool = parameter(False, "enlarge what is kept to the L1 norm before trimming")
    lambda_: float = parameter(1.0, "scale of the merged change", key="lambda")
    scope: str = parameter("model", "where the share is counted", choices=("model", "tensor"))


def ties(
    deltas: Sequence[Any],
    *,
    weights: float | Sequence[float] = 1.0,
    density: float | Sequence[float] = 0.2,
    normalize: bool = True,
    rescale: bool = False,
    lambda_: float = 1.0,
    scope: str = "model",
) -> Any:
    """Trim, elect signs and merge differences from a common base.

    Args:
        deltas: one difference (torch or numpy, any shape), or one state dict of differences, for each model.
        weights: one number for each model, or one for all.
        density: share of the elements kept, of each state dict as a whole or of each tensor (``scope``).
        normalize: divide by the weights of the models that agree with the elected sign.
        rescale: enlarge what is kept of each model until its L1 norm is what it was before trimming.
        lambda_: scale of the result.
        scope: "model" as in the paper, "tensor" as in mergekit.

    Returns:
        The merged difference; add it to the base.

    Raises:
        RecipeError: a parameter is out of bounds. ShapeError: shapes differ.

    Source: arXiv:2306.01708, algorithm 1.

    >>> import numpy as np, weft
    >>> a, b = np.float32([3, 1, -2, 0]), np.float32([1, -2, -4, 0.5])
    >>> weft.merge.ties([a, b], density=0.5)
    array([ 3., -2., -3.,  0.], dtype=float32)
    """
    values = {
        "weights": weights,
        "density": density,
        "normalize": normalize,
        "rescale": rescale,
        "lambda_": lambda_,
        "scope": scope,
    }
    return merge_tensors(METHODS[0], deltas, configure(Ties, values, "ties"), are_deltas=True)


@dataclass(frozen=True)
class _Trim:
    """What trims each model, and the factor that makes up for it."""

    thresholds: list[Threshold]
    scales: list[float]


def _prepare(scan: Scan, config: Ties) -> _Trim:
    fewest = 1 if config.scope == "tensor" else 0  # so that tensors of a few elements change at all
    densities = per_model(config.density, scan.models, "density")
    found = largest(scan, [max(int(d * scan.size), fewest if d > 0 else 0) for d in densities])
    if not config.rescale:
        return _Trim(found, [1.0] * scan.models)
    return _Trim(found, norm_ratios(scan, lambda chunk, model: _trim(chunk, model, found[model])))


def _combine(chunk: Chunk, config: Ties, state: _Trim, out: np.ndarray) -> None:
    for model, threshold in enumerate(state.thresholds):
        _trim(chunk, model, threshold)
        if state.scales[model] != 1:
            chunk.tensors[model] *= np.float32(state.scales[model])
    weights = np.asarray(per_model(config.weights, len(chunk.tensors)), np.float32)
    elect_and_average(chunk.tensors, weights, config.normalize, np.float32(config.lambda_), out)


def _trim(chunk: Chunk, model: int, threshold: Threshold) -> None:
    delta = chunk.tensors[model]
    keep(delta, delta, threshold, chunk.key)


@kernel
def elect_and_average(deltas, weights, normalize, scale, out):  # (models, n), (models,) -> (n,)
    zero, one = np.float32(0), np.float32(1)
    agreed, mass = np.empty(_BLOCK, np.float32), np.empty(_BLOCK, np.float32)
    for start in range(0, out.size, _BLOCK):
        n = min(_BLOCK, out.size - start)
        total = out[start : start + n]
        total[:] = zero
        agreed[:] = zero
        mass[:] = zero
        for m in range(deltas.shape[0]):
            w = weights[m]
            row = deltas[m, start : start + n]
            for i in range(n):
                total[i] += w * row[i]
        for m in range(deltas.shape[0]):
            w = weights[m]
            row = deltas[m, start : start + n]
            for i in range(n):
                sign = one if total[i] >= zero else -one
                share = w if w * row[i] * sign > zero else zero
                agreed[i] += share * row[i]
                mass[i] += share
        for i in range(n):
            if normalize:
                agreed[i] = agreed[i] / (mass[i] if abs(mass[i]) >= np.float32(1e-8) else one)
            total[i] = scale * agreed[i]


METHODS = (
    MergeMethod(
        name="ties",
        family="merge",
        config=Ties,
        summary="Trim small changes, elect a sign for each weight, average the models that agree.",
        goal="combine",
        origin="TIES-Merging, arXiv:2306.01708",
        combine=_combine,
        prepare=_prepare,
        deltas=True,
        base="required",
        model_scope=lambda config: config.scope == "model" and ("density", config.density),
        function=ties,
        checked_by=("brute force", "mergekit"),
    ),
    MergeMethod(
        name="mergekit/ties",
        family="merge",
        config=Ties,
        summary="TIES with mergekit's defaults: each tensor trimmed by itself.",
        goal="combine",
        origin="mergekit ties",
        defaults={"density": 1.0, "scope": "tensor"},
        combine=_combine,
        prepare=_prepare,
        deltas=True,
        base="required",
        model_scope=lambda config: config.scope == "model" and ("density", config.density),
        function=ties,
        differs="trims each tensor by itself and keeps everything by default; the paper trims the whole model to 20%",
        checked_by=("brute force", "mergekit"),
    ),
)
