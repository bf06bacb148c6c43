"""Multiply by a matrix of up to 4 bits on a CPU, with torch's int4 operator: bfloat16 inputs, small batches.

torch lays the codes out for the instructions that this machine has, so what :func:`prepare` returns is made where it is
used and never stored. The operator wants outputs in sixteens and groups of 32, 64, 128 or 256 inputs that divide the
inputs: outputs and inputs are filled up with zeros here, and larger groups are divided. It multiplies by
(q − 8) · scale + zero with scale and zero in bfloat16: each is wrong by up to 2⁻⁹ of its size. With inputs of other types
it is a loop over single numbers, slower than a dense matrix, so they are converted before.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

GROUPS = (256, 128, 64, 32)
OUTPUTS = 16  # they come in multiples of this


def kernel_group(columns: int, groups: int) -> int:
    """The operator's group size for a matrix of this many columns and groups; 0 if there is none.

    >>> kernel_group(4096, 32), kernel_group(40, 1), kernel_group(80, 2), kernel_group(1536, 4)
    (128, 64, 0, 128)
    """
    if groups == 1:  # filled up with zeros to a whole group
        return next(g for g in reversed(GROUPS) if g >= columns or g == GROUPS[0])
    return next((g for g in GROUPS if columns // groups % g == 0), 0)


def prepare(codes: Tensor, scale: Tensor, zero: Tensor, bits: int) -> list[Tensor]:
    """The matrix as the operator takes it.

    Args:
        codes: (out, in) integers 0 … 2ᵇⁱᵗˢ − 1.
        scale: (out, groups) floating point.
        zero: (out, groups), what is taken off the codes.
        bits: 1 to 4.

    Returns:
        uint8 (⌈out / 16⌉ · 16, in / 2), and bfloat16 (in / group, ⌈out / 16⌉ · 16, 2), with in filled up to whole groups.
    """
    rows, columns = codes.shape
    group = kernel_group(columns, scale.shape[1])
    middle = 8 - (1 << (bits - 1))  # the codes around the operator's own zero: what is rounded is then smallest
    more_rows, more_columns = -rows % OUTPUTS, -columns % group
    shifted = functional.pad(codes.to(torch.int32) + middle, (0, more_columns, 0, more_rows), value=8)
    repeat = (columns + more_columns) // group // scale.shape[1]
    pairs = torch.stack([scale.float(), (8 - middle - zero.float()) * scale.float()], dim=-1)
    pairs = functional.pad(pairs.repeat_interleave(repeat, 1), (0, 0, 0, 0, 0, more_rows))
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(shifted.contiguous(), 1)
    return [packed, pairs.transpose(0, 1).to(torch.bfloat16).contiguous()]


def multiply(x: Tensor, ready: list[Tensor], rows: int) -> Tensor:
    """x (batch, in), of any floating type -> (batch, rows) in bfloat16."""
    packed, pairs = ready
    columns = 2 * packed.shape[1]
    narrow = functional.pad(x.to(torch.bfloat16), (0, columns - x.shape[1])).contiguous()
    y = torch.ops.aten._weight_int4pack_mm_for_cpu(narrow, packed, columns // len(pairs), pairs)
    return y[:, :rows]
