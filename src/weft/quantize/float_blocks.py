"""Store weights as tiny floating-point numbers times the scale of a block of rows and columns, or of the whole matrix: no data.

FP8 Formats for Deep Learning, Micikevicius et al., arXiv:2209.05433 (2022); blocks of 128 × 128 are those of DeepSeek-V3,
arXiv:2412.19437 (2024).

    Ŵ = S_b · nearest(W / S_b)          S_b = max|W_b| / F          W (out, in), b a block of ``rows`` × ``group_size``

``nearest`` is to the values of e4m3 (F = 448), e2m1 (6) or e3m0 (16), to the even bit pattern of two as near. Blocks at the
edges are cut. Scales are rounded to the type that files have before numbers are chosen.

Differences from the papers: none; DeepSeek's files hold 1 / scale under the name of an inverse, and so does the format fp8.
Complexity: O(out · in).
Re-implemented from the equations.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from weft.calibrate import Change, Statistics
from weft.errors import RecipeError
from weft.function.quantizer import QuantizeMethod
from weft.method import parameter
from weft.packed import Minifloat
from weft.packed.levels import MINIFLOATS
from weft.quantize.floating_point import KINDS, nearest_codes
from weft.quantize.grid import checked

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class FloatBlocks(Change):
    """Which numbers, and their blocks.

    >>> FloatBlocks(rows=0, group_size=0)  # one scale for all
    FloatBlocks(kind='e4m3', rows=0, group_size=0, scale_dtype='float32')
    """

    kind: str = parameter("e4m3", "of numbers: e4m3, e2m1 or e3m0", choices=KINDS)
    rows: int = parameter(128, "outputs that share a scale; 0 for all", minimum=0)
    group_size: int = parameter(128, "inputs that share a scale; 0 for all", minimum=0)
    scale_dtype: str = parameter("float32", "what scales are stored in", choices=tuple(DTYPES))

    file_format: ClassVar[str] = "float-quantized"

    def __post_init__(self) -> None:
        if self.kind not in KINDS or self.scale_dtype not in DTYPES or self.rows < 0 or self.group_size < 0:
            raise RecipeError(
                f"Numbers are {', '.join(KINDS)}, scales {', '.join(DTYPES)}, and blocks not negative, got {self!r}."
            )

    def nominal_bits(self, rows: int, columns: int) -> float:
        """Bits a weight in files: a number, and its share of a scale."""
        exponent, mantissa, _, _ = MINIFLOATS[self.kind]
        share = min(self.rows or rows, rows) * min(self.group_size or columns, columns)
        return 1 + exponent + mantissa + 8 * DTYPES[self.scale_dtype].itemsize / share

    def fit(self, name: str, weight: Tensor, statistics: Statistics) -> Minifloat:
        """A layer's codes; see :class:`weft.calibrate.Change`."""
        return block_codes(weight, self)


def block_codes(weight: Tensor, config: FloatBlocks) -> Minifloat:
    """The nearest numbers, block by block.

    Args:
        weight: (out, in).
        config: numbers, blocks, type of scales.

    Raises:
        RecipeError: it is no matrix, or its values are not finite.

    Source: arXiv:2412.19437, section 3.3.2.

    >>> made = block_codes(torch.tensor([[448.0, 1.0], [-3.0, 2.0]]), FloatBlocks(rows=0, group_size=1))
    >>> made.scale.tolist(), made.dequantize()[:, 0].tolist()
    ([[1.0, 0.004464285913854837]], [448.0, -3.0])
    """
    weight = checked(weight).float()
    out, columns = weight.shape
    block = (config.rows or out, config.group_size or columns)
    height, width = min(block[0], out), min(block[1], columns)
    padded = functional.pad(weight.abs(), (0, -columns % width, 0, -out % height))
    largest = padded.unflatten(1, (-1, width)).unflatten(0, (-1, height)).amax((1, 3))  # (blocks, blocks)
    dtype = DTYPES[config.scale_dtype]
    scale = (largest / MINIFLOATS[config.kind][3]).to(dtype).clamp(min=torch.finfo(dtype).tiny)
    spread = scale.float().repeat_interleave(height, 0)[:out].repeat_interleave(width, 1)[:, :columns]
    return Minifloat(nearest_codes(weight / spread, config.kind), scale, config.kind, block)


METHODS = (
    QuantizeMethod(
        name="fp8_block",
        family="quantize",
        config=FloatBlocks,
        summary="Eight bits: a floating-point number e4m3 times a scale of its block, or of the whole matrix; no data.",
        goal="shrink",
        origin="blocks of DeepSeek-V3, arXiv:2412.19437",
        checked_by=("brute force", "compressed-tensors"),
        error=0.026,
        ragged=True,
        finer={"kind": ("e3m0", "e2m1", "e4m3")},
    ),
)
