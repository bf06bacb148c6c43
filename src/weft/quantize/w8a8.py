"""Weights and inputs of eight bits, so that layers multiply integers: weights rounded to nearest, inputs as they come.

    ŷ = s_x · s_w · (X̂ Ŵᵀ)        X̂ (tokens, in), Ŵ (out, in) int8;  s_x = max |x| / 127 of each token,  s_w of each row

No paper: the scheme that SmoothQuant (:mod:`weft.quantize.smoothquant`) prepares models for, without it; enough where inputs
have no channels that are far larger than the others. The matrix is the inner form of :class:`weft.packed.Activations`, which
tells what multiplies by it to quantise its inputs.
Complexity: O(out · in).
Re-implemented from the equations.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from weft.calibrate import Change, Statistics
from weft.function.quantizer import QuantizeMethod
from weft.method import parameter
from weft.packed import Activations
from weft.quantize.grid import KINDS, Grid, fit_grid, quantize

INT8 = 127.0  # the largest code of an input


@dataclass(frozen=True)
class W8A8(Grid, Change):
    """The weights' grid; each token's inputs are int8 with a scale of their own.

    >>> W8A8().bits, W8A8().kind
    (8, 'narrow')
    """

    bits: int = parameter(8, "bits of a weight's code", minimum=1, maximum=8)
    group_size: int = parameter(0, "inputs that share a scale; 0 for whole rows", minimum=0)
    kind: str = parameter(
        "narrow", "asymmetric, symmetric, or narrow: symmetric without the lowest code", choices=KINDS
    )

    def fit(self, name: str, weight: Tensor, statistics: Statistics) -> Activations:
        """A layer's codes; see :class:`weft.calibrate.Change`."""
        return with_inputs(weight, self)


def with_inputs(weight: Tensor, grid: Grid, input_scale: Tensor | None = None) -> Activations:
    """Weights rounded to nearest, for inputs of int8.

    Args:
        weight: (out, in).
        grid: of the weights.
        input_scale: 0-d, of all inputs; each token has its own if None.

    Raises:
        RecipeError: it is no matrix, its rows do not divide into groups, or its values are not finite.

    >>> import torch
    >>> made = with_inputs(torch.tensor([[127.0, -3.0]]), W8A8())
    >>> made.kind, made.dequantize().tolist()
    ('int8', [[127.0, -3.0]])
    """
    return Activations(quantize(weight, *fit_grid(weight, grid), grid), "int8", input_scale)


METHODS = (
    QuantizeMethod(
        name="w8a8",
        family="quantize",
        config=W8A8,
        summary="Eight bits for weights and inputs, rounded to nearest; no data.",
        goal="shrink",
        origin="int8 matrix products with one scale for each token and each output",
        checked_by=("brute force",),
        error=0.007,
        finer={"bits": (2, 4, 8)},
    ),
)
