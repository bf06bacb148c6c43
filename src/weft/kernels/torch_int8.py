"""Multiply by a matrix of 8 bits with a scale for each row: torch's int8 operators, on a CPU.

``_weight_int8pack_mm`` keeps the inputs, in bfloat16. It reads sixteen inputs at a time and does not check that there are
as many: other widths are filled up with zeros here. ``_int_mm`` multiplies integers by integers, exactly, for inputs that
are quantised too.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

INPUTS = 16  # they come in multiples of this
MOST_INPUTS = 1 << 16  # whose products and sums of 8-bit codes fit in 32 bits
ONE_BY_ONE = 8  # rows up to which single products are faster than one of a thin matrix


def prepare(codes: Tensor, scale: Tensor) -> list[Tensor]:
    """The matrix as :func:`multiply` takes it.

    Args:
        codes: (out, in) int8.
        scale: (out, 1) floating point.
    """
    return [functional.pad(codes, (0, -codes.shape[1] % INPUTS)).contiguous(), scale.flatten().to(torch.bfloat16)]


def multiply(x: Tensor, ready: list[Tensor]) -> Tensor:
    """x (batch, in), of any floating type -> (batch, out) in bfloat16."""
    codes, scale = ready
    narrow = functional.pad(x.to(torch.bfloat16), (0, codes.shape[1] - x.shape[1])).contiguous()
    return torch.ops.aten._weight_int8pack_mm(narrow, codes, scale)


def multiply_integers(steps: Tensor, codes: Tensor, offset: Tensor | None) -> Tensor:
    """Σ steps · (codes − offset), exactly.

    Args:
        steps: (batch, in) int8.
        codes: (out, in) int8.
        offset: (out,) int32 of at most 255 in size, or None.

    Returns:
        (batch, out) int32.

    >>> multiply_integers(torch.tensor([[1, 2]]).char(), torch.tensor([[3, 4]]).char(), torch.tensor([1])).tolist()
    [[8]]
    """
    if 1 < len(steps) <= ONE_BY_ONE:
        made = torch.cat([torch._int_mm(row, codes.t()) for row in steps.split(1)])
    else:
        made = torch._int_mm(steps, codes.t())
    if offset is not None:
        made = made - steps.sum(1, dtype=torch.int32, keepdim=True) * offset
    return made
