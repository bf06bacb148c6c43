"""The values that codes stand for: tiny floating-point numbers, scales in 8 bits, and inputs on the values of a grid."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

MINIFLOATS = {  # exponent bits, mantissa bits, bias, largest value
    "e4m3": (4, 3, 7, 448.0),
    "e5m2": (5, 2, 15, 57344.0),
    "e2m1": (2, 1, 1, 6.0),
    "e3m0": (3, 0, 3, 16.0),
}
MICROSCALED = {
    "nvfp4": ("e2m1", 16),
    "mxfp4": ("e2m1", 32),
    "mxfp8": ("e4m3", 32),
}  # numbers, columns that share a scale
INPUTS = ("int8", "int4", "e4m3", *MICROSCALED)  # what inputs are quantised to
NESTED = 256  # scales that share a scale
_MAPS: dict[str, Tensor] = {}


def quantize_inputs(x: Tensor, kind: str, scale: Tensor | None = None, group_size: int = 0) -> Tensor:
    """Inputs on the values that a layer with quantised inputs sees: (…, in) -> (…, in) of the same type.

    Args:
        x: inputs; computed in float32.
        kind: one of ``INPUTS``.
        scale: 0-d, of all inputs; of nvfp4 what the scales of groups are multiples of. Each row's largest size / the largest
            code if None, and for mxfp4 and mxfp8 always each group's.
        group_size: without a scale, each group of so many columns has its own; 0: the row. Those of nvfp4, mxfp4 and mxfp8
            are fixed.

    >>> quantize_inputs(torch.tensor([[127.0, 3.4, -1.6]]), "int8").tolist()
    [[127.0, 3.0, -2.0]]
    >>> quantize_inputs(torch.tensor([[6.0, 2.4, -0.3] + 29 * [0.0]]), "mxfp4")[0, :3].tolist()
    [6.0, 2.0, -0.5]
    """
    if kind in MICROSCALED:
        return _microscaled(x, kind, scale)
    if group_size and scale is None:
        return quantize_inputs(x.unflatten(-1, (-1, group_size)), kind).flatten(-2)
    wide = x.float()
    limit = {"int8": 127.0, "int4": 7.5}.get(kind, MINIFLOATS["e4m3"][3])
    if scale is None:
        scale = (wide.abs().amax(-1, keepdim=True) / limit).clamp(min=torch.finfo(torch.float32).tiny)
    steps = wide / scale
    if kind == "e4m3":
        steps = _e4m3(steps)
    else:
        steps = steps.round().clamp(*((-128, 127) if kind == "int8" else (-8, 7)))
    return (steps * scale).to(x.dtype)


def _microscaled(x: Tensor, kind: str, scale: Tensor | None) -> Tensor:
    """Inputs in tiny floats, each group of columns with a scale of few bits."""
    element, size = MICROSCALED[kind]
    groups = x.float().unflatten(-1, (-1, size))
    largest = groups.abs().amax(-1, keepdim=True)
    if kind == "nvfp4":
        assert scale is not None
        unit = scale.double()
        step = (nvfp4_scales(largest, unit).double() * unit).float()
    else:
        step = torch.exp2(power_scales(largest, element).double()).float()
    steps = groups / step
    return ((_e2m1(steps) if element == "e2m1" else _e4m3(steps)) * step).flatten(-2).to(x.dtype)


def nvfp4_scales(largest: Tensor, unit: Tensor) -> Tensor:
    """The scales of groups in NVFP4: the numbers e4m3 next to largest / (6 · unit); float32.

    Args:
        largest: of each group, its largest size.
        unit: what scales are multiples of, which makes the largest 448.

    >>> nvfp4_scales(torch.tensor([6.0, 3.3, 0.0]), torch.tensor(1.0)).tolist()
    [1.0, 0.5625, 0.125]
    """
    made = _e4m3((largest.double() / 6 / unit.double()).float())
    return torch.where(made == 0, 0.125, made)  # a group of zeros: any scale says it, and none is divided by zero


def power_scales(largest: Tensor, element: str) -> Tensor:
    """The exponents of the powers of two that scale groups of mxfp4 and mxfp8: whole numbers from −127 to 127, int32.

    ⌊log₂ largest⌋ less the exponent of the element's largest number (2 for e2m1, 8 for e4m3), and one more where the largest
    is within an eighth of the next power: it would be clipped by more than that.

    Args:
        largest: of each group, its largest size.
        element: e2m1 or e4m3.

    >>> power_scales(torch.tensor([4.0, 6.9, 7.0, 0.0]), "e2m1").tolist()
    [0, 0, 1, -127]
    """
    mantissa, exponent = torch.frexp(largest.float())  # mantissa · 2^exponent, mantissa in [½, 1)
    _, top = math.frexp(MINIFLOATS[element][3])
    power = exponent + (mantissa >= 0.875).to(exponent.dtype) - top
    return torch.where(largest > 0, power, -127).clamp(-127, 127).to(torch.int32)


def _e4m3(values: Tensor) -> Tensor:
    """The nearest numbers e4m3 as float32; larger ones are clipped."""
    limit = MINIFLOATS["e4m3"][3]
    return values.clamp(-limit, limit).to(torch.float8_e4m3fn).float()


def _e2m1(values: Tensor) -> Tensor:
    """The nearest numbers e2m1, to the even one of two as near; larger ones are clipped."""
    size = values.abs()
    step = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0))
    return torch.copysign(((size / step).round() * step).clamp(max=MINIFLOATS["e2m1"][3]), values)


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
