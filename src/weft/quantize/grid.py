"""Uniform grids: which values a group of weights may take, and the codes of the nearest.

    codes = clamp(round(W / s) + z, low, high)          Ŵ = (codes − z) · s

W is (out, in); groups of ``group_size`` consecutive inputs of a row share a scale s and a zero point z, both (out,
groups). Rounding is to the nearest, halves to the even code, as in torch. With b bits:

=================  =====================  ==============================  ===================
grid               low … high             s                               z
=================  =====================  ==============================  ===================
asymmetric         0 … 2ᵇ − 1             (max(W, 0) − min(W, 0)) / high  round(−min(W, 0)/s)
symmetric          −2ᵇ⁻¹ … 2ᵇ⁻¹ − 1       2 · max|W| / (2ᵇ − 1)           0
symmetric, narrow  −2ᵇ⁻¹ + 1 … 2ᵇ⁻¹ − 1   max|W| / (2ᵇ⁻¹ − 1)             0
=================  =====================  ==============================  ===================

Zero is on every grid. The second is that of compressed-tensors, the third that of AutoAWQ and SmoothQuant. A group of
zeros has the smallest scale there is.

With ``ranges="mse"`` the range is not that of W but the share 1 − i/100 of it, i = 0 … 79, at which Σ |Ŵ − W|^2.4 of the
group is smallest (the search in GPTQ's code): large weights are clipped where that helps the many small ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from weft.errors import RecipeError
from weft.method import parameter
from weft.packed import Affine

KINDS = ("asymmetric", "symmetric", "narrow")
RANGES = ("full", "mse")
SHARES = [1 - i / 100 for i in range(80)]  # of the full range, that are tried
POWER = 2.4  # of errors: between squares and the largest
_ROWS = 512  # of a matrix, whose ranges are sought at a time
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Grid:
    """A kind of grid.

    >>> Grid(bits=8, group_size=0, kind="symmetric").codes
    (-128, 127)
    """

    bits: int = parameter(4, "bits of a code", minimum=1, maximum=8)
    group_size: int = parameter(128, "inputs that share a scale; 0 for whole rows", minimum=0)
    kind: str = parameter(
        "asymmetric", "asymmetric, symmetric, or narrow: symmetric without the lowest code", choices=KINDS
    )
    scale_dtype: str = parameter("float32", "what scales are stored in", choices=tuple(_DTYPES))
    ranges: str = parameter("full", "of groups: full, or mse: shrunk to the smallest error", choices=RANGES)

    file_format: ClassVar[str] = "pack-quantized"

    def __post_init__(self) -> None:
        if self.ranges not in RANGES:
            raise RecipeError(f"Ranges of groups are {' or '.join(RANGES)}, got {self.ranges!r}.")
        if self.kind not in KINDS or self.scale_dtype not in _DTYPES:
            raise RecipeError(
                f"A grid is {', '.join(KINDS)} with scales in {', '.join(_DTYPES)}, got {self.kind!r}, {self.scale_dtype!r}."
            )
        if not (1 if self.kind == "asymmetric" else 2) <= self.bits <= 8 or self.group_size < 0:
            raise RecipeError(
                f"A grid needs 1 to 8 bits (2 if it is symmetric) and no negative group size, got bits={self.bits!r} and "
                f"group_size={self.group_size!r}."
            )

    def nominal_bits(self, rows: int, columns: int) -> float:
        """Bits a weight in files: its code, and its share of a scale and a zero point."""
        zero = self.bits if self.kind == "asymmetric" else 0
        return self.bits + (8 * _DTYPES[self.scale_dtype].itemsize + zero) / min(self.group_size or columns, columns)

    @property
    def codes(self) -> tuple[int, int]:
        """The lowest and the highest code."""
        half = 1 << (self.bits - 1)
        return {"asymmetric": (0, 2 * half - 1), "symmetric": (-half, half - 1), "narrow": (1 - half, half - 1)}[
            self.kind
        ]


def fit_grid(weight: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Scales and zero points that hold all weights of each group, or, with ``ranges="mse"``, most of them.

    Args:
        weight: (out, in).
        grid: its kind.

    Returns:
        Two of (out, groups), in the scales' type: rounded to it before anything is computed with them.

    Raises:
        RecipeError: it is no matrix, its rows do not divide into groups, or its values are not finite.

    >>> scale, zero = fit_grid(torch.tensor([[0.0, 3.0, -1.5, 6.0]]), Grid(bits=4, group_size=0))
    >>> scale.tolist(), zero.tolist()
    ([[0.5]], [[3.0]])
    """
    groups = _groups(weight, grid)
    if grid.ranges == "full":
        return _spanned(groups, grid, 1.0)
    parts = [_spanned(rows, grid, _shares(rows, grid)) for rows in groups.split(_ROWS)]
    return torch.cat([scale for scale, _ in parts]), torch.cat([zero for _, zero in parts])


def _spanned(groups: Tensor, grid: Grid, share: Tensor | float) -> tuple[Tensor, Tensor]:
    """The grid over a share (out, groups) of each group's range."""
    dtype = _DTYPES[grid.scale_dtype]
    low, high = grid.codes
    if grid.kind == "asymmetric":
        smallest = groups.amin(-1).clamp(max=0) * share
        span = groups.amax(-1).clamp(min=0) * share - smallest
        scale = span / high
    else:
        smallest = torch.zeros_like(groups[..., 0])
        scale = groups.abs().amax(-1) * share / (high if grid.kind == "narrow" else (high - low) / 2)
    scale = scale.to(dtype).clamp(min=torch.finfo(dtype).tiny)
    if not scale.isfinite().all():
        raise RecipeError(f"The weights are too large for scales in {grid.scale_dtype}; store them in another type.")
    zero = (-smallest / scale.float()).round().clamp(low, high) if grid.kind == "asymmetric" else smallest
    return scale, zero.to(dtype)


def _shares(groups: Tensor, grid: Grid) -> Tensor:
    """The share of each group's range at which its error is smallest: (out, groups)."""
    unit = groups.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    low, high = grid.codes
    best = torch.full_like(groups[..., 0], torch.inf)
    found = torch.ones_like(best)
    for share in SHARES:
        scale, zero = (v.float().unsqueeze(-1) for v in _spanned(groups, grid, share))
        codes = ((groups / scale).round() + zero).clamp(low, high)
        error = (((codes - zero) * scale - groups) / unit).abs().pow(POWER).sum(-1)
        better = error < best
        best, found = torch.where(better, error, best), torch.where(better, share, found)
    return found


def quantize(weight: Tensor, scale: Tensor, zero: Tensor, grid: Grid) -> Affine:
    """The nearest codes.

    Args:
        weight: (out, in).
        scale, zero: (out, groups), as :func:`fit_grid` gives them or any others.
        grid: its kind.

    >>> grid = Grid(bits=2, group_size=0, kind="symmetric")
    >>> quantize(torch.tensor([[-2.0, -0.6, 0.5, 9.0]]), torch.ones(1, 1), torch.zeros(1, 1), grid).codes.tolist()
    [[-2, -1, 0, 1]]
    """
    groups = _groups(weight, grid)
    if scale.shape != groups.shape[:2] or zero.shape != scale.shape:
        raise RecipeError(
            f"Scales and zero points of {list(weight.shape)} must be {list(groups.shape[:2])}, got {list(scale.shape)} and "
            f"{list(zero.shape)}."
        )
    codes = (groups / scale.float().unsqueeze(-1)).round() + zero.float().unsqueeze(-1)
    low, high = grid.codes
    return Affine(codes.clamp(low, high).to(torch.int16).reshape(weight.shape), scale, zero, grid.bits, low)


def fake_quantize(weight: Tensor, scale: Tensor, zero: Tensor, grid: Grid) -> Tensor:
    """Weights moved to the nearest value of their grid: (out, in), float32.

    Moving them twice on one grid changes nothing. Of a grid that :func:`fit_grid` made, no weight moves by more than half a
    scale (beside the rounding of scales stored in half precision).

    >>> grid = Grid(bits=2, group_size=2)
    >>> weight = torch.tensor([[0.0, 3.1, -1.0, 0.4]])
    >>> [[round(w, 4) for w in row] for row in fake_quantize(weight, *fit_grid(weight, grid), grid).tolist()]
    [[0.0, 3.1, -0.9333, 0.4667]]
    """
    return quantize(weight, scale, zero, grid).dequantize()


def checked(weight: Tensor) -> Tensor:
    """A matrix (out, in) of finite numbers: float64 as it is, others as float32.

    Raises:
        RecipeError: it is something else.

    >>> checked(torch.ones(1, 2, dtype=torch.bfloat16)).dtype
    torch.float32
    """
    if weight.dim() != 2 or not weight.numel() or not weight.is_floating_point():
        raise RecipeError(
            f"What is quantised is a matrix (out, in) of numbers, got {list(weight.shape)} {weight.dtype}."
        )
    weight = weight.detach()
    weight = weight if weight.dtype == torch.float64 else weight.float()
    if not weight.isfinite().all():
        raise RecipeError("The weights hold NaN or infinite values, which cannot be quantised.")
    return weight


def _groups(weight: Tensor, grid: Grid) -> Tensor:
    """(out, in) -> (out, groups, group_size), float32."""
    weight = checked(weight).float()
    size = grid.group_size or weight.shape[1]
    if weight.shape[1] % size:
        raise RecipeError(
            f"Rows of {weight.shape[1]} inputs do not divide into groups of {size}; give another group_size, or 0 for rows."
        )
    return weight.unflatten(1, (-1, size))
