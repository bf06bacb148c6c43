"""Round every weight to the nearest value of its grid: no data, no search, and the bar for every other method.

No paper; the grids are those of :mod:`weft.quantize.grid`, with W (out, in) and a scale s and zero point z for each group:

    Ŵ = (clamp(round(W / s) + z, low, high) − z) · s

Differences between codes that are called so: zero is always on the grid here (AWQ's quantizer leaves it out and then
clamps the zero point, which moves a group of weights in [10, 11] to 1). A group of zeros stays zeros.
Complexity: O(out · in).
Re-implemented from the equations.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from weft.calibrate import Change, Statistics
from weft.function.quantizer import QuantizeMethod
from weft.packed import Affine
from weft.quantize.grid import Grid, fake_quantize, fit_grid, quantize


@dataclass(frozen=True)
class RTN(Grid, Change):
    """A grid, to which weights are rounded.

    >>> RTN(bits=8, group_size=0, kind="symmetric")
    RTN(bits=8, group_size=0, kind='symmetric', scale_dtype='float32', ranges='full')
    """

    def fit(self, name: str, weight: Tensor, statistics: Statistics) -> Affine:
        """A layer's codes; see :class:`weft.calibrate.Change`."""
        return quantize(weight, *fit_grid(weight, self), self)


def round_to_nearest(weight: Tensor, grid: Grid) -> Tensor:
    """Weights on the grids that hold their groups.

    Args:
        weight: (out, in).
        grid: bits, groups, kind.

    Returns:
        (out, in), float32.

    Raises:
        RecipeError: rows do not divide into groups, or values are not finite.

    >>> import torch
    >>> round_to_nearest(torch.tensor([[0.0, 0.9, 2.1, 3.0]]), Grid(bits=2, group_size=0)).tolist()
    [[0.0, 1.0, 2.0, 3.0]]
    """
    return fake_quantize(weight, *fit_grid(weight, grid), grid)


METHODS = (
    QuantizeMethod(
        name="rtn",
        family="quantize",
        config=RTN,
        summary="Round every weight to the nearest value of its group's grid; no data.",
        goal="shrink",
        origin="rounding to nearest, the baseline of all",
        checked_by=("brute force",),
        codes=lambda config: config.codes,
        error=0.1,
        finer={"bits": (2, 3, 4, 8)},
    ),
)
