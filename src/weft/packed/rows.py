"""Some rows of a packed weight, as a packed weight of their own."""

from __future__ import annotations

from dataclasses import replace

from weft.packed.form import Packed
from weft.packed.forms import Activations, Affine, Binary, Lookup, LowRank, Minifloat, Transposed, Vectors


def take_rows(packed: Packed, start: int, stop: int) -> Packed | None:
    """Rows of a packed weight.

    Args:
        packed: (out, in).
        start, stop: the first row, and the one behind the last.

    Returns:
        (stop − start, in), with the same values; None where blocks that share a number lie across the border.

    >>> import torch
    >>> made = Affine(torch.arange(4, dtype=torch.int16).reshape(2, 2), torch.ones(2, 1), torch.zeros(2, 1), 4, 0)
    >>> take_rows(made, 1, 2).dequantize().tolist()
    [[2.0, 3.0]]
    """
    part = slice(start, stop)
    if (start, stop) == (0, packed.shape[0]):
        return packed
    if isinstance(packed, Affine):
        return replace(packed, codes=packed.codes[part], scale=packed.scale[part], zero=packed.zero[part])
    if isinstance(packed, Minifloat | Binary):
        height = packed.block[0]
        if start % height or (stop % height and stop != packed.shape[0]):
            return None
        blocks = slice(start // height, -(-stop // height))
        if isinstance(packed, Minifloat):
            return replace(packed, codes=packed.codes[part], scale=packed.scale[blocks])
        return replace(packed, signs=packed.signs[:, part], alpha=packed.alpha[:, blocks])
    if isinstance(packed, Lookup):
        first, last = start * packed.shape[1], stop * packed.shape[1]
        if first % packed.block_size or (last % packed.block_size and stop != packed.shape[0]):
            return None
        table = None if packed.table is None else packed.table[part]
        scale = packed.scales()[first // packed.block_size : -(-last // packed.block_size)]
        return Lookup(packed.codes[part], packed.levels, scale, packed.block_size, table=table)
    if isinstance(packed, Vectors):
        rows = {n: t[part] for n in ("table", "scale", "offset") if (t := getattr(packed, n)) is not None}
        return replace(packed, indices=packed.indices[:, part], **rows)
    if isinstance(packed, LowRank | Activations):
        inner = take_rows(packed.inner, start, stop)
        if inner is None:
            return None
        return replace(packed, inner=inner, **({"left": packed.left[part]} if isinstance(packed, LowRank) else {}))
    if isinstance(packed, Transposed) and isinstance(packed.inner, Affine):
        size = packed.inner.group_size
        if start % size or stop % size:
            return None
        groups = slice(start // size, stop // size)
        scale, zero = packed.inner.scale[:, groups], packed.inner.zero[:, groups]
        return Transposed(replace(packed.inner, codes=packed.inner.codes[:, part], scale=scale, zero=zero))
    return None
