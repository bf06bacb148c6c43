"""Merge fine-tunes that compete: keep what a task finds important and the others agree with, drop the rest.

PCB-Merging, Du et al., arXiv:2410.02396 (2024).

    τ̂ᵢ = sign(τᵢ) clip(|τᵢ|)                    differences from the base, magnitudes winsorised at both ends
    Nᵢ = minmax(clip(|τᵢ|)) ∈ [0, 1]            over the whole model, one range for each of n models; tᵢ = sign(τᵢ) Nᵢ
    βᵢ = exp(n Nᵢ²) · agreementᵢ                how important an entry is to its own task, times how much others agree
         pairwise  Σⱼ tanh(tᵢ tⱼ)
         sum       tanh(τᵢ Σⱼ tⱼ)
         product   tanh(τᵢ Σⱼ τⱼ)
    Sᵢ = minmax(max(βᵢ, its (1 − density)-quantile)) ∈ [0, 1]
    W  = W₀ + λ Σᵢ wᵢ Sᵢ τ̂ᵢ / Σᵢ Sᵢ

Differences from the paper and its code: the code holds three formulas for the agreement and all are here (for
``product`` it uses clip 0.0001 and density 0.1). The exponential is divided by its largest value, which S does not
see, so it cannot overflow. Exactly ``floor(clip · size)`` magnitudes are winsorised at each end and
``floor(density · size)`` entries are kept, fewer where β ties at the quantile (the code: one fewer). A difference
that is zero has S = 0, one whose magnitudes are all equal has N = 1, and where β has no entry above the quantile the
largest positive ones have S = 1; the code divides 0 by 0 in these three cases.
Complexity: two passes for the magnitudes' quantiles, two for those of β, one to merge; n(n + 1)/2 hyperbolic
tangents an element and pass with ``pairwise``. Re-implemented from the equations (official code: MIT).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from weft.engine.chunks import Chunk, Scan
from weft.engine.merging import MergeMethod, merge_tensors
from weft.engine.rank import ranked
from weft.kernels.elementary import exp_of_negative, tanh, tanh_within_one
from weft.kernels.jit import kernel
from weft.method import configure, parameter, per_model

VARIANTS = ("pairwise", "sum", "product")
_BLOCK = 1024  # elements whose running values stay in the first-level cache
_ZERO, _ONE = np.float32(0), np.float32(1)
_SMALLEST_SUM = np.float32(1e-12)


@dataclass(frozen=True)
class Pcb:
    """Configuration of :func:`pcb`."""

    weights: float | tuple[float, ...] = parameter(1.0, "scale of each model's changes", per_model="weight")
    density: float = parameter(0.05, "share of each model's changes that is kept", minimum=0, maximum=1)
    clip: float = parameter(0.01, "share of the magnitudes winsorised at each end", minimum=0, maximum=0.49)
    lambda_: float = parameter(1.2, "scale of the merged change", key="lambda")
    variant: str = parameter("pairwise", "how the agreement between models is measured", choices=VARIANTS)


@dataclass(frozen=True)
class Competition:
    """What the whole model says about each of n differences; (n,) float32 each.

    Attributes:
        low, high: bounds of the winsorised magnitudes.
        shift, span: a winsorised magnitude less ``shift``, divided by ``span``, is in [0, 1].
        threshold, excess: β less ``threshold``, divided by ``excess``, is S; at or below the threshold S is 0.
    """

    low: np.ndarray
    high: np.ndarray
    shift: np.ndarray
    span: np.ndarray
    threshold: np.ndarray
    excess: np.ndarray


def pcb(
    deltas: Sequence[Any],
    *,
    weights: float | Sequence[float] = 1.0,
    density: float = 0.05,
    clip: float = 0.01,
    lambda_: float = 1.2,
    variant: str = "pairwise",
) -> Any:
    """Balance the competition between differences from a common base, and merge them.

    Args:
        deltas: one difference (torch or numpy, any shape), or one state dict of differences, for each model.
        weights: one scale for each model, or one for all.
        density: share of the entries kept, of the whole state dict.
        clip: share of the magnitudes winsorised at each end.
        lambda_: scale of the result.
        variant: "pairwise", "sum" or "product".

    Returns:
        The merged difference; add it to the base.

    Raises:
        RecipeError: a parameter is out of bounds. ShapeError: shapes differ.

    Source: arXiv:2410.02396, section 3.

    >>> import numpy as np
    >>> from weft.merge.pcb import pcb
    >>> a, b = np.float32([4, 3, -2, 1, 0]), np.float32([4, -3, -2, 0, 1])
    >>> pcb([a, b], density=0.4, clip=0, lambda_=1)
    array([ 4.,  0., -2.,  0.,  0.], dtype=float32)
    """
    values = {"weights": weights, "density": density, "clip": clip, "lambda_": lambda_, "variant": variant}
    return merge_tensors(METHODS[0], deltas, configure(Pcb, values, "pcb"), are_deltas=True)


def _prepare(scan: Scan, config: Pcb) -> Competition | None:
    size, models = scan.size, scan.models
    if not size:
        return None
    clipped, kept = int(config.clip * size), int(config.density * size)
    bounds = ranked(scan, [(size - clipped, clipped + 1)] * models, _magnitudes)
    low, high = np.array(bounds, np.float32).T
    equal = low == high
    shift = np.where(equal, _ZERO, low)
    span = np.where(equal, np.where(high > 0, high, _ONE), high - low)
    nothing = np.full(models, np.inf, np.float32)
    state = Competition(low, high, shift, span, nothing, nothing)
    if not kept:
        return state
    limits = ranked(scan, [(1, min(kept + 1, size))] * models, lambda chunk: _balance(chunk, config, state))
    top, threshold = np.array(limits, np.float32).T
    tied = top == threshold
    threshold = np.where(tied, np.where(top > 0, np.nextafter(top, -_ONE), np.inf), threshold).astype(np.float32)
    return Competition(low, high, shift, span, threshold, top - threshold)


def _magnitudes(chunk: Chunk) -> np.ndarray:
    return np.abs(chunk.tensors, out=chunk.scratch("measured", models=len(chunk.tensors)))


def _balance(chunk: Chunk, config: Pcb, state: Competition) -> np.ndarray:
    """β of all models; (models, n)."""
    beta = chunk.scratch("measured", models=len(chunk.tensors))
    variant = VARIANTS.index(config.variant)
    balance(chunk.tensors, state.low, state.high, state.shift, state.span, variant, beta)
    return beta


def _combine(chunk: Chunk, config: Pcb, state: Competition, out: np.ndarray) -> None:
    weights = np.asarray(per_model(config.weights, len(chunk.tensors))) * config.lambda_
    beta = _balance(chunk, config, state)
    share_out(
        chunk.tensors, beta, state.low, state.high, state.threshold, state.excess, weights.astype(np.float32), out
    )


@kernel
def balance(deltas, low, high, shift, span, variant, beta):  # (models, n), (models,) … -> (models, n)
    models = deltas.shape[0]
    signed = np.empty((models, _BLOCK), np.float32)
    total = np.empty(_BLOCK, np.float32)
    for start in range(0, deltas.shape[1], _BLOCK):
        n = min(_BLOCK, deltas.shape[1] - start)
        total[:] = _ZERO
        for m in range(models):
            row, t = deltas[m, start : start + n], signed[m]
            a, b, c, d = low[m], high[m], shift[m], span[m]
            for i in range(n):
                v = (min(max(abs(row[i]), a), b) - c) / d
                t[i] = v if row[i] > _ZERO else (-v if row[i] < _ZERO else _ZERO)
            source = row if variant == 2 else t
            for i in range(n):
                total[i] += source[i]
        for m in range(models):
            out = beta[m, start : start + n]
            if variant == 0:
                out[:] = _ZERO
            else:
                row = deltas[m, start : start + n]
                for i in range(n):
                    out[i] = tanh(row[i] * total[i])
        if variant == 0:
            for m in range(models):
                out, t = beta[m, start : start + n], signed[m]
                for i in range(n):
                    out[i] += tanh_within_one(t[i] * t[i])
                for other in range(m + 1, models):
                    out2, t2 = beta[other, start : start + n], signed[other]
                    for i in range(n):
                        v = tanh_within_one(t[i] * t2[i])
                        out[i] += v
                        out2[i] += v
        for m in range(models):
            out, t = beta[m, start : start + n], signed[m]
            for i in range(n):
                v = out[i] * exp_of_negative(np.float32(models) * (t[i] * t[i] - _ONE))
                out[i] = v if v == v else _ZERO  # a NaN that was let through stays in its own element


@kernel
def share_out(deltas, beta, low, high, threshold, excess, weights, out):  # (models, n) twice, (models,) … -> (n,)
    mass = np.empty(_BLOCK, np.float32)
    for start in range(0, out.size, _BLOCK):
        n = min(_BLOCK, out.size - start)
        merged = out[start : start + n]
        merged[:] = _ZERO
        mass[:] = _ZERO
        for m in range(deltas.shape[0]):
            row, score = deltas[m, start : start + n], beta[m, start : start + n]
            a, b, c, d, w = low[m], high[m], threshold[m], excess[m], weights[m]
            for i in range(n):
                v = min(max(abs(row[i]), a), b)
                v = v if row[i] > _ZERO else (-v if row[i] < _ZERO else row[i])
                s = (score[i] - c) / d if score[i] > c else _ZERO
                merged[i] += s * (w * v)
                mass[i] += s
        for i in range(n):
            merged[i] = merged[i] / max(mass[i], _SMALLEST_SUM)


METHODS = (
    MergeMethod(
        name="pcb",
        family="merge",
        config=Pcb,
        summary="Keep the changes that matter to their own task and that the other tasks agree with; drop the rest.",
        goal="combine",
        paper="pcb-merging",
        combine=_combine,
        prepare=_prepare,
        deltas=True,
        base="required",
        model_scope=lambda config: True,
        function=pcb,
        checked_by=("brute force",),
    ),
)
