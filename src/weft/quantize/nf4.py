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

import os
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from weft.calibrate import Statistics, rewrite
from weft.checkpoint.checkpoint import Checkpoint
from weft.errors import RecipeError
from weft.function.quantizer import QuantizeMethod
from weft.method import parameter

# quantiles are transcendental: the numbers, to the last bit of float32, are what files mean
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_TWELFTHS = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
FP4 = (*(v / 12 for v in _TWELFTHS), *(-v / 12 for v in _TWELFTHS))
TABLES = {"nf4": NF4, "fp4": FP4}
NESTED = 256  # scales that share a scale


@dataclass(frozen=True)
class Codebook:
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

    def change(self, name: str, weight: Tensor, statistics: Statistics) -> Tensor:
        """A layer's matrix of values of the table; see :func:`weft.calibrate.rewrite`."""
        return codebook_weight(codebook_codes(weight, self))


class BlockCodes(NamedTuple):
    """A quantised matrix.

    Attributes:
        codes: (out, in) uint8, 0 to 15, indices into the table.
        scale: (blocks,), float32; with ``double`` uint8, indices into :func:`dynamic_map`.
        nested_scale: (⌈blocks / 256⌉,) float32, the scales of the scales; empty without ``double``.
        mean: 0-d float32, what was taken off the scales; 0 without ``double``.
        table: "nf4" or "fp4".
        block_size: weights in a block.
    """

    codes: Tensor
    scale: Tensor
    nested_scale: Tensor
    mean: Tensor
    table: str
    block_size: int


def codebook_codes(weight: Tensor, config: Codebook | None = None) -> BlockCodes:
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
    if weight.dim() != 2 or not weight.numel() or not weight.is_floating_point():
        raise RecipeError(f"A codebook is for a matrix (out, in) of numbers, got {list(weight.shape)} {weight.dtype}.")
    flat = weight.detach().float().flatten()
    if not flat.isfinite().all():
        raise RecipeError("The weights hold NaN or infinite values (as float32), which no table has.")
    blocks = _blocks(flat, config.block_size)  # (blocks, block_size)
    largest = blocks.abs().amax(1)
    table = torch.tensor(TABLES[config.table], device=flat.device)
    # a block that is all zeros: 0 / 1; dividing by numbers below the smallest normal one would overflow
    safe = torch.where(largest > 0, largest.clamp(min=torch.finfo(torch.float32).tiny), 1)
    codes = _nearest(blocks / safe.unsqueeze(1), table).to(torch.uint8)
    codes = codes.flatten()[: flat.numel()].reshape(weight.shape)
    if not config.double:
        return BlockCodes(codes, largest, flat.new_empty(0), flat.new_zeros(()), config.table, config.block_size)
    mean = largest.mean()
    rest = _blocks(largest - mean, NESTED)
    nested = rest.abs().amax(1)
    indices = _nearest(rest / torch.where(nested > 0, nested, 1).unsqueeze(1), dynamic_map().to(flat.device))
    scale = indices.to(torch.uint8).flatten()[: len(largest)]
    return BlockCodes(codes, scale, nested, mean, config.table, config.block_size)


def codebook_weight(quantized: BlockCodes) -> Tensor:
    """The weights that codes stand for: (out, in), float32.

    >>> weight = torch.tensor([[2.0, -2.0, 0.0, 0.0]])
    >>> codebook_weight(codebook_codes(weight, Codebook(block_size=2))).tolist()
    [[2.0, -2.0, 0.0, 0.0]]
    """
    table = torch.tensor(TABLES[quantized.table], device=quantized.codes.device)
    values = _blocks(table[quantized.codes.long()].flatten(), quantized.block_size)
    weight = values * block_scales(quantized).unsqueeze(1)
    return weight.flatten()[: quantized.codes.numel()].reshape(quantized.codes.shape)


def block_scales(quantized: BlockCodes) -> Tensor:
    """The scale of each block: (blocks,), float32.

    >>> block_scales(codebook_codes(torch.tensor([[2.0, -4.0]]), Codebook(block_size=1, double=False))).tolist()
    [2.0, 4.0]
    """
    if quantized.scale.dtype != torch.uint8:
        return quantized.scale
    values = _blocks(dynamic_map().to(quantized.scale.device)[quantized.scale.long()], NESTED)
    return (values * quantized.nested_scale.unsqueeze(1)).flatten()[: len(quantized.scale)] + quantized.mean


def pack(codes: Tensor) -> Tensor:
    """Two codes in a byte, the earlier in the high half.

    Args:
        codes: any shape, uint8 from 0 to 15.

    Returns:
        (⌈codes / 2⌉,) uint8; the last half of an odd number is 0.

    Raises:
        RecipeError: codes are above 15, or no uint8.

    >>> pack(torch.tensor([1, 2, 15], dtype=torch.uint8)).tolist()
    [18, 240]
    """
    if codes.dtype != torch.uint8 or (codes.numel() and int(codes.max()) > 15):
        raise RecipeError(f"Codes of four bits are uint8 from 0 to 15, got {codes.dtype}.")
    pairs = functional.pad(codes.flatten(), (0, codes.numel() % 2)).unflatten(0, (-1, 2))
    return (pairs[:, 0] << 4) | pairs[:, 1]


def unpack(packed: Tensor, shape: tuple[int, ...]) -> Tensor:
    """What :func:`pack` packed, in its shape.

    Raises:
        RecipeError: the shape has not as many codes.

    >>> unpack(torch.tensor([18, 240], dtype=torch.uint8), (3,)).tolist()
    [1, 2, 15]
    """
    count = torch.Size(shape).numel()
    if packed.dtype != torch.uint8 or packed.numel() != -(-count // 2):
        raise RecipeError(f"{packed.numel()} bytes ({packed.dtype}) do not hold {count} codes of four bits each.")
    return torch.stack([packed.flatten() >> 4, packed.flatten() & 15], 1).flatten()[:count].reshape(shape)


@cache
def dynamic_map() -> Tensor:
    """The 256 values of quantised scales: sign, decade, and the finer the larger the decade; sorted, float32.

    Decade 10⁻⁶⁺ⁱ (i = 0 … 6) has 2ⁱ values of either sign, at the middles of equal parts of [0.1, 1]; 0 and 1 come on top.

    >>> dynamic_map().shape, dynamic_map()[[0, 127, 255]].tolist()
    (torch.Size([256]), [-0.992968738079071, 0.0, 1.0])
    """
    values = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1)
        middles = (10.0 ** (decade - 6) * ((edges[:-1] + edges[1:]) / 2)).tolist()
        values += [*middles, *(-m for m in middles)]
    return torch.tensor(sorted(values))


def quantize_codebook(
    model: Checkpoint | str | Path, output: str | os.PathLike[str], config: Codebook | None = None, **options: Any
) -> Path:
    """Write a copy of a transformers model whose blocks' matrices hold values of a table, in the model's own type.

    The values are those of a quantised model, rounded to the type of the files; the size is not.

    Args:
        model, output: see :func:`weft.calibrate.rewrite`; so are further options (``where``, ``force``, …).
        config: table and blocks; NF4 with blocks of 64 and double quantisation if None.

    Returns:
        The folder; it loads in transformers as the model did.
    """
    config = config or Codebook()
    recipe = {"method": config.table, "parameters": asdict(config)}
    return rewrite(model, None, config.change, output, recipe=recipe, **options)


def _blocks(flat: Tensor, size: int) -> Tensor:
    """(n,) -> (⌈n / size⌉, size), filled with zeros."""
    return functional.pad(flat, (0, -len(flat) % size)).unflatten(0, (-1, size))


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
        writes=quantize_codebook,
        quantize=lambda weight, config, gram: codebook_codes(weight, config),
        dequantize=codebook_weight,
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
