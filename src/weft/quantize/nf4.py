"""Store weights as the nearest of sixteen fixed values times the largest of their block: NF4 and FP4.

QLoRA: Efficient Finetuning of Quantized LLMs, Dettmers et al., arXiv:2305.14314 (NeurIPS 2023).

    Ŵ_i = a_b · T[c_i]        a_b = max |W| of block b;   c_i = the nearest entry of T to W_i / a_b

T has 16 entries between −1 and 1. NF4's lie at quantiles of the normal law, with u = Φ⁻¹ and o = 0.9677083:

    { −u(linspace(o, ½, 8)) without its end,  0,  u(linspace(o, ½, 9)) without its end } / u(o)

FP4's are a sign, two bits of exponent and one of mantissa. Blocks are ``block_size`` consecutive weights of the matrix (out,
in) row after row; the last may be shorter. With ``double``, the scales a are stored in 8 bits themselves: their mean is
taken off, and the rest becomes the nearest of 256 values (finer near zero) times the largest of 256 scales:

    a_b ≈ a₂ · D[d_b] + mean(a),      |error| ≤ 0.0071 a₂

Differences from the paper and its code: the paper's text and its code differ in o, which is the code's here. Scales of
blocks of zeros are zero instead of the smallest number. Scales in 8 bits take the nearest value by definition; bitsandbytes
misses it for about one in a thousand, and is equal in everything else.
Complexity: O(out · in).
Re-implemented from the equations (official code: MIT).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from weft.calibrate import Change, Statistics
from weft.errors import RecipeError
from weft.function.quantizer import QuantizeMethod
from weft.method import parameter
from weft.packed import Lookup
from weft.packed.levels import NESTED, dynamic_map, in_blocks
from weft.quantize.grid import checked

# quantiles are transcendental: the numbers, to the last bit of float32, are what files mean
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_TWELFTHS = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
FP4 = (*(v / 12 for v in _TWELFTHS), *(-v / 12 for v in _TWELFTHS))
TABLES = {"nf4": NF4, "fp4": FP4}


@dataclass(frozen=True)
class Codebook(Change):
    """Sixteen values and the blocks that share a scale.

    >>> Codebook(table="fp4", double=False)
    Codebook(table='fp4', block_size=64, double=False)
    """

    table: str = parameter("nf4", "nf4 (quantiles of the normal law) or fp4 (floating point)", choices=tuple(TABLES))
    block_size: int = parameter(64, "consecutive weights that share a scale", minimum=1)
    double: bool = parameter(True, "store scales in 8 bits")

    def __post_init__(self) -> None:
        if self.table not in TABLES or self.block_size < 1:
            raise RecipeError(
                f"A codebook is {' or '.join(TABLES)} with block_size ≥ 1, got {self.table!r} and {self.block_size!r}."
            )

    def fit(self, name: str, weight: Tensor, statistics: Statistics) -> Lookup:
        """A layer's codes; see :class:`weft.calibrate.Change`."""
        return codebook_codes(weight, self)


def codebook_codes(weight: Tensor, config: Codebook | None = None) -> Lookup:
    """The nearest entries of the table, and the blocks' scales.

    Args:
        weight: (out, in); computed in float32.
        config: table, blocks; NF4 with blocks of 64 and double quantisation if None.

    Raises:
        RecipeError: it is no matrix, or its values are not finite.

    Source: arXiv:2305.14314, equations 1 to 4.

    >>> made = codebook_codes(torch.tensor([[2.0, -2.0, 0.1, 1.2]]), Codebook(block_size=4, double=False))
    >>> made.codes.tolist(), made.scale.tolist()
    ([[15, 0, 8, 13]], [2.0])
    """
    config = config or Codebook()
    flat = checked(weight).float().flatten()
    if not flat.isfinite().all():
        raise RecipeError("The weights hold NaN or infinite values (as float32), which no table has.")
    blocks = in_blocks(flat, config.block_size)  # (blocks, block_size)
    largest = blocks.abs().amax(1)
    table = torch.tensor(TABLES[config.table], device=flat.device)
    # a block that is all zeros: 0 / 1; dividing by numbers below the smallest normal one would overflow
    safe = torch.where(largest > 0, largest.clamp(min=torch.finfo(torch.float32).tiny), 1)
    codes = _nearest(blocks / safe.unsqueeze(1), table).to(torch.uint8)
    codes = codes.flatten()[: flat.numel()].reshape(weight.shape)
    if not config.double:
        return Lookup(codes, table.unsqueeze(0), largest, config.block_size)
    mean = largest.mean()
    rest = in_blocks(largest - mean, NESTED)
    nested = rest.abs().amax(1)
    indices = _nearest(rest / torch.where(nested > 0, nested, 1).unsqueeze(1), dynamic_map().to(flat.device))
    scale = indices.to(torch.uint8).flatten()[: len(largest)]
    return Lookup(codes, table.unsqueeze(0), scale, config.block_size, nested, mean)


def _nearest(x: Tensor, table: Tensor) -> Tensor:
    """Indices of the nearest entries of a table in any order; of two as near, the smaller value."""
    values, order = table.sort(stable=True)
    return order[torch.bucketize(x, (values[:-1] + values[1:]) / 2)]


METHODS = tuple(
    QuantizeMethod(
        name=name,
        family="quantize",
        config=Codebook,
        summary=summary,
        goal="shrink",
        origin="QLoRA, Dettmers et al. 2023, arXiv:2305.14314",
        defaults={} if name == "nf4" else {"table": name},
        checked_by=("brute force", "bitsandbytes"),
        codes=lambda config: (0, 15),
        error=error,
        finer={"block_size": (1024, 128, 16)},
        group="block_size",
        ragged=True,
        refits="scales are rounded to 8 bits anew",
    )
    for name, summary, error in (
        ("nf4", "Four bits: quantiles of the normal law times the largest weight of a block.", 0.093),
        ("fp4", "Four bits: a tiny floating-point number times the largest weight of a block.", 0.12),
    )
)
