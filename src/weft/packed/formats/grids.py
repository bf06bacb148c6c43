"""What formats of whole numbers share: codes counted from 0, zero points, groups, and rounding of scales."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from weft.packed.around import Activations, LowRank, Permuted, Transposed
from weft.packed.form import Packed
from weft.packed.forms import Affine, Lookup, Minifloat


def of_scales(packed: Packed) -> dict[str, Tensor]:
    """The floating-point tensors that a format may round."""
    if isinstance(packed, Affine):
        return {"scale": packed.scale, "zero": packed.zero}
    if isinstance(packed, Minifloat | Lookup) and packed.scale.is_floating_point():
        return {"scale": packed.scale}
    return {}


def round_scales(packed: Packed, dtype: torch.dtype) -> Packed:
    """A packed weight whose scales have another type.

    >>> made = Affine(torch.ones(1, 2, dtype=torch.int16), torch.tensor([[0.1]]), torch.zeros(1, 1), 4, 0)
    >>> round_scales(made, torch.bfloat16).dequantize().tolist()
    [[0.10009765625, 0.10009765625]]
    """
    if isinstance(packed, Activations | LowRank | Permuted | Transposed):
        return replace(packed, inner=round_scales(packed.inner, dtype))
    changed: dict[str, Any] = {name: tensor.to(dtype) for name, tensor in of_scales(packed).items()}
    return replace(packed, **changed)


def same_scales(first: Packed, second: Packed) -> bool:
    """Whether rounding changed nothing."""
    if isinstance(first, Activations | LowRank | Permuted | Transposed) and type(first) is type(second):
        return same_scales(first.inner, second.inner)
    pairs = [*zip(of_scales(first).values(), of_scales(second).values())]
    if isinstance(first, Minifloat) and isinstance(second, Minifloat) and first.global_scale is not None:
        assert second.global_scale is not None
        pairs.append((first.global_scale, second.global_scale))
    return all(torch.equal(a.double(), b.double()) for a, b in pairs)


def unsigned(packed: Affine) -> tuple[Tensor, Tensor]:
    """Codes and zero points counted from 0: int32 (out, in) and (out, groups)."""
    low = _lowest(packed)
    return packed.codes.int() - low, packed.zero.double().round().int() - low


def _lowest(packed: Affine) -> int:
    """The code that is written as 0: of signed codes the lowest of their bits, also where a grid leaves it out."""
    return min(packed.low, -(1 << (packed.bits - 1))) if packed.low < 0 else packed.low


def not_whole(packed: Affine) -> str:
    """Why zero points are no codes; empty where they are."""
    shifted = packed.zero.double() - _lowest(packed)
    if (
        bool((shifted == shifted.round()).all())
        and float(shifted.min()) >= 0
        and float(shifted.max()) < 1 << packed.bits
    ):
        return ""
    return f"its zero points are no whole numbers from 0 to {(1 << packed.bits) - 1}. Take the format weft."


def is_symmetric(packed: Affine) -> bool:
    """Whether every zero point is the middle code."""
    return bool((unsigned(packed)[1] == 1 << (packed.bits - 1)).all())


def signed_affine(codes: Tensor, scale: Tensor, bits: int) -> Affine:
    """A symmetric grid, of codes counted from 0."""
    low = -(1 << (bits - 1))
    return Affine(codes.to(torch.int16) + low, scale, torch.zeros_like(scale), bits, low)


def by_group(codes: Tensor, scale: Tensor, zero: Tensor, group: Tensor, bits: int) -> Packed:
    """Codes whose columns name their groups, as groups of consecutive columns, permuted where they lie apart.

    Args:
        codes: (out, in) from 0.
        scale, zero: (out, groups).
        group: (in,) whole numbers, each column's group.
        bits: of a code.
    """
    order = group.argsort(stable=True)
    counts = torch.bincount(group, minlength=scale.shape[1])
    # groups of different sizes, as where the last is cut, become several that share their numbers
    unit = math.gcd(*counts.tolist())
    times = counts // unit
    scale, zero = (t.repeat_interleave(times, 1) for t in (scale, zero))
    made = Affine(codes[:, order].to(torch.int16), scale, zero.to(scale.dtype), bits, 0)
    if torch.equal(order, torch.arange(len(order), device=order.device)):
        return made
    return Permuted(made, order.to(torch.int32))
