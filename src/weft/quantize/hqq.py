"""Fit each group's zero point without data, so that most weights are met closely and a few outliers are let go.

Half-Quadratic Quantization of Large Machine Learning Models, Badri and Shaji (Mobius Labs, 2023); a report on the web,
without an arXiv id.

    minimise over z:  Σ |W − Ŵ|ᵖ, p < 1        q = clamp(round(W / s + z), 0, 2ᵇ − 1),   Ŵ = (q − z) · s

    s = (max W − min W) / (2ᵇ − 1),   z = −min W / s at the start, then in each step
    E ← shrink(W − Ŵ, β)       shrink(x, β) = sign(x) · max(|x| − |x|ᵖ⁻¹ / β, 0)
    z ← mean(q − (W − E) / s)  over the group
    β ← κ β

W is (out, in); groups of ``group_size`` consecutive inputs of a row share a scale s and a zero point z, both (out, groups).
z is a real number, so zero itself need not be on the grid; ``round_zero`` makes it whole.

Differences from the authors' code: every group keeps the zero point of its lowest Σ|W − Ŵ|ᵖ, the start among them, so no
group ends worse than it began; there one mean over the tensor stops all groups together, and the default solver keeps the
zero point after the worse step and never changes β. A group of one value is met exactly whatever its size; there a span
below 1e-4 counts as none, which loses small weights. Groups lie along the inputs only (their axis 1). All is computed in
float32 (float64 for float64), and scales and zero points are rounded to their type before the codes are made.
Complexity: O(steps · out · in).
Re-implemented from the equations (official code: Apache-2.0).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from weft.calibrate import Change, Statistics
from weft.errors import RecipeError
from weft.function.quantizer import QuantizeMethod
from weft.method import parameter
from weft.packed import Affine
from weft.quantize.grid import Grid, fit_grid

SCALES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class HQQ(Change):
    """A grid with real zero points, and how they are sought.

    >>> HQQ(bits=2, group_size=16).codes
    (0, 3)
    """

    bits: int = parameter(4, "bits of a code", minimum=1, maximum=8)
    group_size: int = parameter(64, "inputs that share a scale; 0 for whole rows", minimum=0)
    scale_dtype: str = parameter("float32", "what scales and zero points are stored in", choices=tuple(SCALES))
    p: float = parameter(0.7, "power of the error: the lower, the less outliers count", minimum=0.1, maximum=1)
    beta: float = parameter(10.0, "β at the start", minimum=1e-6)
    kappa: float = parameter(1.01, "κ, by which β grows in each step", minimum=1)
    steps: int = parameter(20, "how many zero points are tried", minimum=0)
    round_zero: bool = parameter(False, "make zero points whole, as formats with integer zero points need")

    def __post_init__(self) -> None:
        Grid(self.bits, self.group_size, "asymmetric", self.scale_dtype)
        if not (0 < self.p <= 1 and self.beta > 0 and self.kappa >= 1 and self.steps >= 0):
            raise RecipeError(
                f"HQQ needs 0 < p ≤ 1, beta > 0, kappa ≥ 1 and steps ≥ 0, got p={self.p!r}, beta={self.beta!r}, "
                f"kappa={self.kappa!r} and steps={self.steps!r}."
            )

    @property
    def codes(self) -> tuple[int, int]:
        """The lowest and the highest code."""
        return 0, (1 << self.bits) - 1

    def fit(self, name: str, weight: Tensor, statistics: Statistics) -> Affine:
        """A layer's codes; see :class:`weft.calibrate.Change`."""
        return hqq_codes(weight, self)


def hqq_codes(weight: Tensor, config: HQQ | None = None) -> Affine:
    """Codes, scales and real zero points of a matrix.

    Args:
        weight: (out, in).
        config: bits, groups and the search; the defaults if None.

    Returns:
        Their ``dequantize()`` gives the weights.

    Raises:
        RecipeError: it is no matrix, its rows do not divide into groups, or its values are not finite or too large (or too
            far from zero for their span) for the scales' type.

    Source: the report's equations for the two half-quadratic steps.

    >>> codes = hqq_codes(torch.tensor([[1.0, 1.5, 2.0, 2.5]]), HQQ(bits=2, group_size=0))
    >>> codes.codes.tolist(), codes.zero.tolist(), codes.dequantize().tolist()
    ([[0, 1, 2, 3]], [[-2.0]], [[1.0, 1.5, 2.0, 2.5]])
    """
    config = config or HQQ()
    fit_grid(weight, Grid(config.bits, config.group_size, "asymmetric", config.scale_dtype))  # checks the weight
    w = weight.detach().to(torch.float64 if weight.dtype == torch.float64 else torch.float32)
    # contiguous: the order in which means are taken must not depend on how the weight lies
    w = w.contiguous().unflatten(1, (-1, config.group_size or w.shape[1]))  # (out, groups, group_size)
    dtype = SCALES[config.scale_dtype]
    smallest = w.amin(-1, keepdim=True)
    span = w.amax(-1, keepdim=True) - smallest
    # of one value: (0 − z) · 1 is that value
    stored = torch.where(span > 0, (span / config.codes[1]).clamp(min=torch.finfo(dtype).tiny), 1).to(dtype)
    scale = stored.to(w.dtype)
    zero = -smallest / scale
    best = _stored(zero, config, dtype)
    loss = _loss(w, scale, best.to(w.dtype), config)
    beta = config.beta
    for _ in range(config.steps):
        codes = (w / scale + zero).round().clamp(*config.codes)
        error = _shrink(w - (codes - zero) * scale, beta, config.p)
        zero = (codes - (w - error) / scale).mean(-1, keepdim=True)
        beta *= config.kappa
        tried = _stored(zero, config, dtype)
        new = _loss(w, scale, tried.to(w.dtype), config)
        best = torch.where(new < loss, tried, best)
        loss = torch.minimum(loss, new)
    if not best.isfinite().all():
        raise RecipeError(
            f"Weights far from zero beside their span need zero points that {config.scale_dtype} cannot hold; store scales "
            "in float32."
        )
    codes = (w / scale + best.to(w.dtype)).round().clamp(*config.codes)
    return Affine(codes.to(torch.int16).flatten(1), stored[..., 0], best[..., 0], config.bits, 0)


def _stored(zero: Tensor, config: HQQ, dtype: torch.dtype) -> Tensor:
    return (zero.round() if config.round_zero else zero).to(dtype)


def _loss(w: Tensor, scale: Tensor, zero: Tensor, config: HQQ) -> Tensor:
    """Σ |W − Ŵ|ᵖ of each group: (out, groups, 1)."""
    codes = (w / scale + zero).round().clamp(*config.codes)
    return (w - (codes - zero) * scale).abs().pow(config.p).sum(-1, keepdim=True)


def _shrink(x: Tensor, beta: float, p: float) -> Tensor:
    sizes = x.abs()
    # 0ᵖ⁻¹ is infinite: what is zero stays zero
    return x.sign() * (sizes - sizes.clamp(min=torch.finfo(x.dtype).tiny).pow(p - 1) / beta).clamp(min=0)


METHODS = (
    QuantizeMethod(
        name="hqq",
        family="quantize",
        config=HQQ,
        summary="Fit zero points without data so that most weights are met closely and outliers count less.",
        goal="shrink",
        origin="Badri and Shaji 2023 (Mobius Labs)",
        checked_by=("brute force", "float64 equations"),
        codes=lambda config: config.codes,
        error=0.09,
        finer={"bits": (2, 3, 4, 8)},
        refits="zero points are sought anew, and the lowest or the highest code may be unused",
    ),
)
