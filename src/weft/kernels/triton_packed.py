"""Products with packed matrices on a GPU, in Triton: codes are unpacked in registers, next to the multiplication.

A row of codes of b bits is a stream in words of 32, as :mod:`weft.packed.bits` has it: files need no other order here. A
weight is (code − zero) · scale, or levels[code] · scale, with one scale for each group of consecutive columns.

Up to ``VECTORS`` inputs each go over the matrix for themselves, in ``SPLIT`` parts of the columns whose sums are added
afterwards in a fixed order; more go in tiles through tensor cores. Sums are in float32.
"""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

VECTORS = 4  # inputs that are multiplied one by one
SPLIT = 4  # parts of the columns, for enough programs at small batches


def affine_linear(x: Tensor, words: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """x (batch, in) times (codes − zero) · scale, transposed: (batch, out) of the same type.

    Args:
        x: floating point.
        words: (out, ⌈in · bits / 32⌉) int32.
        scale: (out, groups) floating point.
        zero: (out, groups), floating point or uint8.
        bits: of a code, 1 to 8.
    """
    return _linear(x, words, scale, zero, bits, table=False)


def lookup_linear(x: Tensor, words: Tensor, levels: Tensor, scale: Tensor, bits: int) -> Tensor:
    """x (batch, in) times levels[codes] · scale, transposed: (batch, out) of the same type.

    Args:
        x: floating point.
        words: (out, ⌈in · bits / 32⌉) int32.
        levels: (2ᵇⁱᵗˢ,) float32, or fewer.
        scale: (out, groups) floating point.
        bits: of a code, 1 to 8.
    """
    return _linear(x, words, scale, levels, bits, table=True)


def _linear(x: Tensor, words: Tensor, scale: Tensor, other: Tensor, bits: int, *, table: bool) -> Tensor:
    batch, columns = x.shape
    rows, groups = scale.shape
    x, words, scale, other = x.contiguous(), words.contiguous(), scale.contiguous(), other.contiguous()
    group = columns // groups
    if os.environ.get("TRITON_INTERPRET") == "1":  # which has no products in bfloat16
        dot = tl.float32
    else:
        dot = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}.get(x.dtype, tl.float32)
    facts = {"bits": bits, "group": group, "table": table}
    if batch <= VECTORS:
        sums = x.new_empty((SPLIT, batch, rows), dtype=torch.float32)
        block = 256 if columns >= 1024 else 64
        part = triton.cdiv(triton.cdiv(columns, SPLIT), block) * block
        with _device(x):
            _vectors[(triton.cdiv(rows, 16), SPLIT, batch)](
                x, words, scale, other, sums, batch, rows, columns, words.shape[1], groups, part,
                **facts, one=group % block == 0, block_rows=16, block_columns=block,
            )  # fmt: skip
        return sums.sum(0).to(x.dtype)
    y = torch.empty(batch, rows, dtype=x.dtype, device=x.device)
    tall = 16 if batch <= 16 else 32 if batch <= 32 else 64
    with _device(x):
        _tiles[(triton.cdiv(batch, tall), triton.cdiv(rows, 64))](
            x, words, scale, other, y, batch, rows, columns, words.shape[1], groups,
            **facts, one=group % 64 == 0, block_batch=tall, block_rows=64, block_columns=64, dot=dot,
        )  # fmt: skip
    return y


def _device(x: Tensor) -> torch.cuda.device:
    return torch.cuda.device(x.device if x.is_cuda else -1)


@triton.jit
def _weights(
    words, scale, other, row, column, rows, columns, width, groups,
    bits: tl.constexpr, group: tl.constexpr, table: tl.constexpr, one: tl.constexpr,
):  # fmt: skip
    """Weights of some rows (r, 1) and columns (1, c), float32; zero outside of the matrix."""
    inside = (row < rows) & (column < columns)
    place = column * bits
    shift = (place & 31).to(tl.uint32)
    address = words + row.to(tl.int64) * width + (place >> 5)
    code = tl.load(address, mask=inside, other=0).to(tl.uint32, bitcast=True) >> shift
    if 32 % bits != 0:  # a code may lie across two words
        across = shift + bits > 32
        upper = tl.load(address + 1, mask=inside & across, other=0).to(tl.uint32, bitcast=True)
        code = tl.where(across, code | (upper << ((32 - shift) & 31)), code)
    code = code & ((1 << bits) - 1)
    if one:  # all these columns are in one group
        where = row.to(tl.int64) * groups + tl.min(column, axis=1, keep_dims=True) // group
    else:
        where = row.to(tl.int64) * groups + column // group
    held = (row < rows) if one else inside
    factor = tl.load(scale + where, mask=held, other=0).to(tl.float32)
    if table:
        value = tl.load(other + code.to(tl.int32), mask=inside, other=0)
    else:
        value = code.to(tl.float32) - tl.load(other + where, mask=held, other=0).to(tl.float32)
    return tl.where(inside, value * factor, 0.0)


@triton.jit
def _vectors(
    x, words, scale, other, sums, batch, rows, columns, width, groups, part,
    bits: tl.constexpr, group: tl.constexpr, table: tl.constexpr, one: tl.constexpr,
    block_rows: tl.constexpr, block_columns: tl.constexpr,
):  # fmt: skip
    """One input, some rows, one part of the columns."""
    split, number = tl.program_id(1), tl.program_id(2)
    row = tl.program_id(0) * block_rows + tl.arange(0, block_rows)
    total = tl.zeros((block_rows, block_columns), tl.float32)
    for start in range(split * part, min((split + 1) * part, columns), block_columns):
        column = start + tl.arange(0, block_columns)
        weight = _weights(
            words, scale, other, row[:, None], column[None, :], rows, columns, width, groups, bits, group, table, one
        )
        value = tl.load(x + number.to(tl.int64) * columns + column, mask=column < columns, other=0).to(tl.float32)
        total += weight * value[None, :]
    out = sums + (split * batch + number).to(tl.int64) * rows + row
    tl.store(out, tl.sum(total, axis=1), mask=row < rows)


@triton.jit
def _tiles(
    x, words, scale, other, y, batch, rows, columns, width, groups,
    bits: tl.constexpr, group: tl.constexpr, table: tl.constexpr, one: tl.constexpr,
    block_batch: tl.constexpr, block_rows: tl.constexpr, block_columns: tl.constexpr, dot: tl.constexpr,
):  # fmt: skip
    """Some inputs, some rows, all columns."""
    number = tl.program_id(0) * block_batch + tl.arange(0, block_batch)
    row = tl.program_id(1) * block_rows + tl.arange(0, block_rows)
    total = tl.zeros((block_batch, block_rows), tl.float32)
    for start in range(0, columns, block_columns):
        column = start + tl.arange(0, block_columns)
        weight = _weights(
            words, scale, other, row[:, None], column[None, :], rows, columns, width, groups, bits, group, table, one
        )
        inside = (number[:, None] < batch) & (column[None, :] < columns)
        value = tl.load(x + number[:, None].to(tl.int64) * columns + column[None, :], mask=inside, other=0)
        total = tl.dot(value.to(dot), tl.trans(weight).to(dot), total, input_precision="ieee")
    out = y + number[:, None].to(tl.int64) * rows + row[None, :]
    tl.store(out, total.to(y.dtype.element_ty), mask=(number[:, None] < batch) & (row[None, :] < rows))
