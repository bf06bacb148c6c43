"""Store weights as tiny floating-point numbers in groups of 32 whose scale is a power of two, as the MX formats do: no data.

Microscaling Data Formats for Deep Learning, Rouhani et al., arXiv:2310.10537 (2023). W (out, in) in groups g of 32 inputs of a
row, F the largest number (e2m1: 6, e4m3: 448):

    s_g = 2^(⌊log₂ max|W_g|⌋ − ⌊log₂ F⌋)        Ŵ = s_g · nearest(W / s_g)

``nearest`` is to the values of e2m1 or e4m3, to the even bit pattern of two as near; larger ones are clipped to F.

Differences from the paper: the scale is twice as large where max|W_g| is at least 1.75 times a power of two, as in
compressed-tensors: of e2m1, numbers from 7 to 8 would be clipped to 6 otherwise. A group of zeros has the smallest scale.
Complexity: O(out · in).
Re-implemented from the equations (compressed-tensors, Apache-2.0, is compared with bit for bit).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from weft.calibrate import Change, Statistics
from weft.errors import RecipeError
from weft.function.quantizer import QuantizeMethod
from weft.method import parameter
from weft.packed import Minifloat
from weft.packed.levels import MICROSCALED, power_scales
from weft.quantize.floating_point import nearest_codes
from weft.quantize.grid import checked

KINDS = ("mxfp4", "mxfp8")
FORMATS = {"mxfp4": "mxfp4-pack-quantized", "mxfp8": "mxfp8-quantized"}
BIAS = 127  # of the exponents that files hold


@dataclass(frozen=True)
class Microscaling(Change):
    """Which numbers, and their groups.

    >>> Microscaling(kind="mxfp8").file_format
    'mxfp8-quantized'
    """

    kind: str = parameter("mxfp4", "mxfp4: numbers e2m1 of four bits; mxfp8: e4m3 of eight", choices=KINDS)
    group_size: int = parameter(32, "inputs that share a scale; the files of MX formats have 32", minimum=1)

    def __post_init__(self) -> None:
        if self.kind not in KINDS or self.group_size < 1:
            raise RecipeError(f"Microscaling is {' or '.join(KINDS)} with groups of at least one input, got {self!r}.")

    @property
    def file_format(self) -> str:  # type: ignore[override]  # the kind decides
        """The format of files that says it."""
        return FORMATS[self.kind]

    def nominal_bits(self, rows: int, columns: int) -> float:
        """Bits a weight in files: a number, and its share of a scale."""
        return (4 if self.kind == "mxfp4" else 8) + 8 / self.group_size

    def fit(self, name: str, weight: Tensor, statistics: Statistics) -> Minifloat:
        """A layer's codes; see :class:`weft.calibrate.Change`."""
        return microscaled_codes(weight, self)


def microscaled_codes(weight: Tensor, config: Microscaling) -> Minifloat:
    """The nearest numbers.

    Args:
        weight: (out, in).
        config: numbers and groups.

    Raises:
        RecipeError: it is no matrix, its rows do not divide into groups, or its values are not finite.

    Source: arXiv:2310.10537, algorithm 1.

    >>> made = microscaled_codes(torch.tensor([[6.9, -2.4], [7.0, 1.0]]), Microscaling(group_size=2))
    >>> made.scale.float().tolist(), made.dequantize().tolist()
    ([[1.0], [2.0]], [[6.0, -2.0], [8.0, 1.0]])
    """
    weight = checked(weight).float()
    if weight.shape[1] % config.group_size:
        raise RecipeError(
            f"Rows of {weight.shape[1]} inputs do not divide into groups of {config.group_size}; leave these layers out with "
            "where, or take a scheme of whole rows such as FP8_DYNAMIC."
        )
    element = MICROSCALED[config.kind][0]
    groups = weight.unflatten(1, (-1, config.group_size))
    power = power_scales(groups.abs().amax(-1), element)
    codes = nearest_codes(groups / torch.exp2(power.double()).float().unsqueeze(-1), element).flatten(1)
    scale = (power + BIAS).to(torch.uint8).view(torch.float8_e8m0fnu)
    return Minifloat(codes, scale, element, (1, config.group_size))


METHODS = (
    QuantizeMethod(
        name="mx",
        family="quantize",
        config=Microscaling,
        summary="Four or eight bits: floating-point numbers in groups of 32 whose scale is a power of two; no data.",
        goal="shrink",
        origin="Microscaling Data Formats, Rouhani et al. 2023, arXiv:2310.10537",
        checked_by=("brute force", "compressed-tensors"),
        error=0.115,
        finer={"kind": ("mxfp4", "mxfp8")},
        exceptions=dict.fromkeys(
            ("zeros and constants are harmless", "one row and one column"),
            "a number alone moves too: its scale is a power of two",
        ),
    ),
)
