"""Round every weight to the nearest value of its grid: no data, no search, and the bar for every other method.

No paper; the grids are those of :mod:`weft.quantize.grid`, with W (out, in) and a scale s and zero point z for each group:

    Ŵ = (clamp(round(W / s) + z, low, high) − z) · s

Differences between codes that are called so: zero is always on the grid here (AWQ's quantizer leaves it out and then
clamps the zero point, which moves a group of weights in [10, 11] to 1). A group of zeros stays zeros.
Complexity: O(out · in).
Re-implemented from the equations.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from weft.calibrate import Statistics, rewrite
from weft.checkpoint.checkpoint import Checkpoint
from weft.function.quantizer import QuantizeMethod
from weft.quantize.grid import Grid, dequantize, fake_quantize, fit_grid, quantize


@dataclass(frozen=True)
class RTN(Grid):
    """A grid, to which weights are rounded.

    >>> RTN(bits=8, group_size=0, kind="symmetric")
    RTN(bits=8, group_size=0, kind='symmetric', scale_dtype='float32')
    """

    def change(self, name: str, weight: Tensor, statistics: Statistics) -> Tensor:
        """A layer's matrix on its grid; see :func:`weft.calibrate.rewrite`."""
        return round_to_nearest(weight, self)


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


def quantize_rtn(
    model: Checkpoint | str | Path, output: str | os.PathLike[str], config: RTN | None = None, **options: Any
) -> Path:
    """Write a copy of a transformers model whose blocks' matrices lie on grids, in the model's own type.

    The values are those of a quantised model, rounded to the type of the files; the size is not. Packed files are another
    matter.

    Args:
        model, output: see :func:`weft.calibrate.rewrite`; so are further options (``where``, ``force``, …).
        config: the grid; 4 bits in groups of 128, asymmetric, if None.

    Returns:
        The folder; it loads in transformers as the model did.
    """
    config = config or RTN()
    change: Callable[[str, Tensor, Statistics], Tensor] = config.change
    recipe = {"method": "rtn", "parameters": asdict(config)}
    return rewrite(model, None, change, output, recipe=recipe, **options)


METHODS = (
    QuantizeMethod(
        name="rtn",
        family="quantize",
        config=RTN,
        summary="Round every weight to the nearest value of its group's grid; no data.",
        goal="shrink",
        origin="rounding to nearest, the baseline of all",
        checked_by=("brute force",),
        writes=quantize_rtn,
        quantize=lambda weight, config, gram: quantize(weight, *fit_grid(weight, config), config),
        dequantize=dequantize,
        codes=lambda config: config.codes,
        error=0.1,
        finer={"bits": (2, 3, 4, 8)},
    ),
)
