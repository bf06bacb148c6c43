"""The values that codes stand for: tiny floating-point numbers, scales in 8 bits, and inputs on the values of a grid."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

MINIFLOATS = {  # exponent bits, mantissa bits, bias, largest value
    "e4m3": (4, 3, 7, 448.0),
    "e5m2": (5, 2, 15, 57344.0),
    "e2m1": (2, 1, 1, 6.0),
    "e3m0": (3, 0, 3, 16.0),
}
NESTED = 256  # scales that share a scale
_MAPS: dict[str, Tensor] = {}


def quantize_inputs(x: Tensor, kind: str, scale: Tensor | None = None, group_size: int = 0) -> Tensor:
    """Inputs on the values that a layer with quantised inputs sees: (…, in) -> (…, in) of the same type.

    Args:
        x: inputs; computed in float32.
        kind: int8 or e4m3.
        scale: 0-d; each row's largest size / the largest code if None.
        group_size: without a scale, each group of so many columns has its own; 0: the row.

    >>> quantize_inputs(torch.tensor([[127.0, 3.4, -1.6]]), "int8").tolist()
    [[127.0, 3.0, -2.0]]
    """
    if group_size and scale is None:
        return quantize_inputs(x.unflatten(-1, (-1, group_size)), kind).flatten(-2)
    wide = x.float()
    limit = 127.0 if kind == "int8" else MINIFLOATS["e4m3"][3]
    if scale is None:
        scale = (wide.abs().amax(-1, keepdim=True) / limit).clamp(min=torch.finfo(torch.float32).tiny)
    steps = wide / scale
    if kind == "int8":
        steps = steps.round().clamp(-128, 127)
    else:
        steps = steps.clamp(-limit, limit).to(torch.float8_e4m3fn).float()
    return (steps * scale).to(x.dtype)


def dynamic_map() -> Tensor:
    """The 256 values of scales in 8 bits: sign, decade, and the finer the larger the decade; sorted, float32.

    Decade 10⁻⁶⁺ⁱ (i = 0 … 6) has 2ⁱ values of either sign, at the middles of equal parts of [0.1, 1]; 0 and 1 come on top.

    >>> dynamic_map().shape, dynamic_map()[[0, 127, 255]].tolist()
    (torch.Size([256]), [-0.992968738079071, 0.0, 1.0])
    """
    if "dynamic" not in _MAPS:
        values = [0.0, 1.0]
        for decade in range(7):
            edges = torch.linspace(0.1, 1, 2**decade + 1)
            middles = (10.0 ** (decade - 6) * ((edges[:-1] + edges[1:]) / 2)).tolist()
            values += [*middles, *(-m for m in middles)]
        _MAPS["dynamic"] = torch.tensor(sorted(values))
    return _MAPS["dynamic"]


def minifloat_levels(kind: str) -> Tensor:
    """The value of each bit pattern: (2ᵇⁱᵗˢ,) float32; NaN and infinite patterns are NaN.

    >>> minifloat_levels("e2m1").tolist()[:8]
    [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    """
    if kind not in _MAPS:
        exponent_bits, mantissa_bits, bias, largest = MINIFLOATS[kind]
        patterns = torch.arange(1 << (exponent_bits + mantissa_bits))
        exponent, mantissa = patterns >> mantissa_bits, (patterns & ((1 << mantissa_bits) - 1)) / (1 << mantissa_bits)
        normal = torch.ldexp(1 + mantissa, exponent - bias)
        values = torch.where(exponent == 0, torch.ldexp(mantissa, torch.tensor(1 - bias)), normal)
        values = torch.where(values > largest, torch.nan, values)
        _MAPS[kind] = torch.cat([values, -values]).float()
    return _MAPS[kind]


def in_blocks(flat: Tensor, size: int) -> Tensor:
    """(n,) -> (⌈n / size⌉, size), filled with zeros.

    >>> in_blocks(torch.ones(3), 2).tolist()
    [[1.0, 1.0], [1.0, 0.0]]
    """
    return functional.pad(flat, (0, -len(flat) % size)).unflatten(0, (-1, size))
