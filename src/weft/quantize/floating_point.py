"""Store weights as tiny floating-point numbers times the scale of their group, which may be a power of two: no data.

FP8 Formats for Deep Learning, Micikevicius et al., arXiv:2209.05433 (2022); the constraints are those of ZeroQuant-FP, Wu et
al., arXiv:2307.09782 (2023).

    Ŵ = S_g · nearest(W / S_g)          S_g = max|W_g| / F          W (out, in) in groups g of a row's inputs

``nearest`` is to the values of e2m1 (0, ½, 1, 1½, 2, 3, 4, 6; F = 6), e3m0 (0, ¼, ½ … 16) or e4m3 (F = 448), to the even
bit pattern of two as near. Scales may be constrained, before anything is rounded:

=======  =================================================================================================
free     S_g
m1       2^⌈log₂ S_g⌉: every scale is a power of two
m2       S_max / 2^⌊log₂(S_max / S_g)⌋ with S_max the row's largest: ratios within a row are powers of two
m2-ceil  the same with ⌈·⌉, as printed: the scale is too small for its group then, and large weights are clipped
=======  =================================================================================================

so that e2m1 becomes e4m3 by adding to exponents. ``activations`` are rounded to e4m3 by whatever multiplies by the packed
weight, each token with its own scale max|x| / 448.

Differences from the papers: m2 rounds ⌊·⌋, so that nothing is clipped.
Complexity: O(out · in).
Re-implemented from the equations (no official code for the constraints).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from weft.calibrate import Change, Statistics
from weft.errors import RecipeError
from weft.function.quantizer import QuantizeMethod
from weft.method import parameter
from weft.packed import Activations, Minifloat, Packed
from weft.packed.levels import MINIFLOATS, minifloat_levels
from weft.quantize.grid import Grid, fit_grid

KINDS = ("e2m1", "e3m0", "e4m3")
CONSTRAINTS = ("free", "m1", "m2", "m2-ceil")
INPUTS = ("none", "e4m3")


@dataclass(frozen=True)
class FloatingPoint(Change):
    """Which numbers, and their scales.

    >>> FloatingPoint(kind="e2m1", group_size=64)
    FloatingPoint(kind='e2m1', group_size=64, constraint='free', activations='none')
    """

    kind: str = parameter("e4m3", "of numbers: e2m1, e3m0 or e4m3", choices=KINDS)
    group_size: int = parameter(0, "inputs that share a scale; 0 for whole rows", minimum=0)
    constraint: str = parameter("free", "of scales: free, m1, m2 or m2-ceil", choices=CONSTRAINTS)
    activations: str = parameter("none", "what inputs are rounded to: none or e4m3", choices=INPUTS)

    def __post_init__(self) -> None:
        if self.kind not in KINDS or self.constraint not in CONSTRAINTS or self.activations not in INPUTS:
            raise RecipeError(
                f"Numbers are {', '.join(KINDS)}, constraints {', '.join(CONSTRAINTS)} and activations {', '.join(INPUTS)}; "
                f"got {self.kind!r}, {self.constraint!r} and {self.activations!r}."
            )
        if self.group_size < 0:
            raise RecipeError(f"A group has at least one input, or all (0); got group_size={self.group_size!r}.")

    def fit(self, name: str, weight: Tensor, statistics: Statistics) -> Packed:
        """A layer's codes; see :class:`weft.calibrate.Change`."""
        return with_inputs(float_codes(weight, float_scales(weight, self), self.kind), self.activations)


def float_scales(weight: Tensor, config: FloatingPoint) -> Tensor:
    """The scale of each group, constrained: (out, groups), float32.

    Args:
        weight: (out, in).
        config: numbers, groups, constraint.

    Raises:
        RecipeError: it is no matrix, its rows do not divide into groups, or its values are not finite.

    Source: arXiv:2307.09782, section 3 (scale constraints M1 and M2).

    >>> weight = torch.tensor([[6.0, 3.0, 0.9, 0.1]])
    >>> [float_scales(weight, FloatingPoint("e2m1", 2, constraint)).tolist() for constraint in ("m1", "m2", "m2-ceil")]
    [[[1.0, 0.25]], [[1.0, 0.25]], [[1.0, 0.125]]]
    """
    fit_grid(weight, Grid(8, config.group_size, "narrow"))  # checks the weight
    groups = weight.detach().float().unflatten(1, (-1, config.group_size or weight.shape[1]))
    tiny = torch.finfo(torch.float32).tiny
    scale = (groups.abs().amax(-1) / MINIFLOATS[config.kind][3]).clamp(min=tiny)
    if config.constraint == "free":
        return scale
    if config.constraint == "m1":
        mantissa, exponent = torch.frexp(scale)  # scale = mantissa · 2^exponent, mantissa in [½, 1)
        return torch.ldexp(torch.ones_like(scale), exponent - (mantissa == 0.5).to(exponent.dtype))
    largest = scale.amax(1, keepdim=True)
    mantissa, exponent = torch.frexp(largest / scale)
    shift = exponent - 1
    if config.constraint == "m2-ceil":
        shift = exponent - (mantissa == 0.5).to(exponent.dtype)
    # below the smallest normal number there is no exact half
    return torch.ldexp(largest.expand_as(scale), -shift).clamp(min=tiny)


def float_codes(weight: Tensor, scale: Tensor, kind: str) -> Minifloat:
    """The nearest numbers.

    Args:
        weight: (out, in).
        scale: (out, groups), as :func:`float_scales` gives them or any others.
        kind: of numbers.

    >>> made = float_codes(torch.tensor([[6.0, 2.4, -2.5, 0.2]]), torch.ones(1, 1), "e2m1")
    >>> made.dequantize().tolist()
    [[6.0, 2.0, -2.0, 0.0]]
    """
    spread = scale.repeat_interleave(weight.shape[1] // scale.shape[1], 1)
    codes = nearest_codes(weight.detach().float() / spread, kind)
    return Minifloat(codes, scale, kind, (1, weight.shape[1] // scale.shape[1]))


def nearest_codes(steps: Tensor, kind: str) -> Tensor:
    """Bit patterns of the nearest numbers, uint8; of two as near the even pattern; larger ones are clipped.

    >>> nearest_codes(torch.tensor([0.25, 0.75, -9.0]), "e2m1").tolist()
    [0, 2, 15]
    """
    levels = minifloat_levels(kind).to(steps.device)
    half = len(levels) // 2
    positive = levels[:half][levels[:half].isfinite()]
    middles = (positive[:-1] + positive[1:]) / 2
    sizes = steps.abs().contiguous()
    up = torch.bucketize(sizes, middles, right=True)  # a middle goes up
    down = torch.bucketize(sizes, middles)  # a middle stays below
    codes = torch.where(up % 2 == 0, up, down)
    return torch.where(steps < 0, codes + half * (codes > 0), codes).to(torch.uint8)


def with_inputs(made: Packed, kind: str) -> Packed:
    """A packed weight whose inputs are rounded to a kind of number; ``none`` leaves it.

    >>> with_inputs(float_codes(torch.ones(1, 1), torch.ones(1, 1), "e4m3"), "e4m3").settings()["form"]
    'activations'
    """
    return made if kind == "none" else Activations(made, kind)


METHODS = (
    QuantizeMethod(
        name="fp8",
        family="quantize",
        config=FloatingPoint,
        summary="Eight bits: a floating-point number e4m3 times a scale of the row; no data.",
        goal="shrink",
        origin="FP8 Formats for Deep Learning, Micikevicius et al. 2022, arXiv:2209.05433",
        checked_by=("brute force", "torch"),
        error=0.026,
        finer={"kind": ("e3m0", "e2m1", "e4m3")},
    ),
)
