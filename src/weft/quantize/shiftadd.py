"""Sums of signs times powers of two: layers that multiply by shifting, looking up and adding.

ShiftAddLLM: Accelerating Pretrained LLMs via Post-Training Multiplication-Less Reparameterization, You et al.,
arXiv:2406.05981 (NeurIPS 2024).

    w ≈ Σᵢ αᵢ bᵢ,   bᵢ ∈ {−1, +1}ᵐ,   i = 1 … bits,   for each block of m weights that share their α
    start:   bᵢ = sign(r),  αᵢ = mean |r|,  r ← r − αᵢ bᵢ                                     (r = w at first)
    rounds:  α = argmin ‖w − B α‖²,   αᵢ ← sum of ``terms`` powers of two,   B = signs of the nearest of the 2ᵇ sums

One power of two after the other is taken: ± 2^round(log₂ |ρ|) of what is left, ρ. ``terms`` = 0 leaves α free. The best round
is kept. Columns are rounded in the loop of :mod:`weft.quantize.gptq`, later ones making up for the errors:

======  =============================================================================  ==================================
blocks  share their α                                                                  fitted
======  =============================================================================  ==================================
column  all outputs of an input (the paper's accuracy variant): x is shifted           when the column's turn comes
tile    8 inputs and an eighth of the outputs (latency): sums are shifted              before the first of the 8 columns
======  =============================================================================  ==================================

Products need no multiplication (:func:`lookup_product`): with T_g[p] = Σⱼ ± xⱼ of the 8 inputs of group g for all 256 signs
p, y_n = Σᵢ α Σ_g T_g[pattern of row n, bit i, group g], and α times a number is a few shifts and sums.

Differences from the paper and its code: α is fitted exactly (a pseudo-inverse, where two signs are alike) instead of by
conjugate gradients, and the best round is kept, as rounding α can make a round worse than the one before. Powers of two below
2⁻¹⁰ of an α's first are dropped, so that half precision holds it. Zero counts as positive. The code's accuracy variant also
rotates weights at random and stores dense ones; here it does not. Widths by sensitivity are left to whoever allocates
bits: :func:`shiftadd_sensitivity` is the score. A convolution with groups takes the sum of its groups' Gram matrices.
Complexity: O(out · in · bits · rounds) beside the loop of GPTQ.
Re-implemented from the equations (official code: Apache-2.0).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import product
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from weft.calibrate import BlockTask, Change, Statistics
from weft.calibrate.task import EachLayer
from weft.errors import RecipeError
from weft.function.quantizer import QuantizeMethod
from weft.method import parameter
from weft.packed import Binary
from weft.quantize.compensate import Compensated, Factor, change_with_factors, column_factor, round_columns
from weft.quantize.grid import checked

BLOCKS = ("column", "tile")
TILE = 8  # inputs of a table
SMALLEST = 2.0**-10  # of the first power of two: what half precision holds beside it


@dataclass(frozen=True)
class ShiftAdd(Change):
    """Signs, their factors, and the weights that share these.

    >>> ShiftAdd(bits=2, blocks="tile").terms
    3
    """

    bits: int = parameter(3, "signs of a weight", minimum=1, maximum=8)
    blocks: str = parameter("column", "weights that share factors: column or tile", choices=BLOCKS)
    terms: int = parameter(3, "powers of two whose sum a factor is; 0 for any number", minimum=0, maximum=8)
    rounds: int = parameter(50, "alternations between factors and signs, at most", minimum=0)
    damping: float = parameter(0.01, "λ as a share of the mean of the Gram matrix' diagonal", minimum=0)
    block_size: int = parameter(128, "columns that are rounded before the rest is updated; for speed only", minimum=1)

    needs: ClassVar[tuple[str, ...]] = ("gram",)

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8 or not 0 <= self.terms <= 8 or self.rounds < 0 or self.block_size < 1:
            raise RecipeError(f"ShiftAdd needs 1 to 8 bits, 0 to 8 terms, rounds ≥ 0 and block_size ≥ 1, got {self}.")
        if self.blocks not in BLOCKS or not 0 <= self.damping < math.inf:
            raise RecipeError(
                f"ShiftAdd knows the blocks {', '.join(BLOCKS)} and damping ≥ 0, got {self.blocks!r}, {self.damping!r}."
            )

    def fit(self, name: str, weight: Tensor, statistics: Statistics) -> Binary:
        """A layer's signs and factors; see :class:`weft.calibrate.Change`."""
        packed = shiftadd_codes(weight, statistics.gram(name), self).packed
        assert isinstance(packed, Binary)
        return packed

    def without_data(self) -> Change:
        """The same without making up for errors."""
        return EachLayer(lambda name, weight, statistics: shiftadd_codes(weight, None, self).packed)

    def change_block(self, task: BlockTask) -> None:
        """Layers with equal inputs share the factor; the report has each one's loss, sensitivity and notes."""

        def rounded(name: str, weight: Tensor, gram: Tensor | Factor) -> Compensated:
            task.note(name, sensitivity=float(shiftadd_sensitivity(weight, gram, self.damping)))
            return shiftadd_codes(weight, gram, self)

        change_with_factors(task, self, lambda gram: column_factor(gram, self.damping, self.neighbours), rounded)

    @property
    def neighbours(self) -> int:
        """Columns that share factors."""
        return 1 if self.blocks == "column" else TILE


def binary_coding(values: Tensor, bits: int, rounds: int = 50, terms: int = 0) -> tuple[Tensor, Tensor]:
    """Signs and factors of blocks of weights.

    Args:
        values: (blocks, m) finite numbers; computed in float64.
        bits: signs of a weight.
        rounds: alternations, at most; fewer where no sign changes.
        terms: powers of two whose sum a factor is; 0 for any number.

    Returns:
        bool (bits, blocks, m), True for +1, and float64 (bits, blocks), none negative, falling where they are free.

    Source: arXiv:2406.05981, section 4.1; alternation as in Xu et al., arXiv:1802.00150.

    >>> signs, alpha = binary_coding(torch.tensor([[3.0, 1.0, -1.0, -3.0]]), 2)
    >>> alpha.flatten().tolist(), signs[:, 0].tolist()
    ([2.0, 1.0], [[True, True, False, False], [True, False, True, False]])
    """
    w = values.double()
    factors = []
    rest = w
    for _ in range(bits):
        factors.append(rest.abs().mean(1))
        rest = rest - torch.where(rest >= 0, factors[-1][:, None], -factors[-1][:, None])
    alpha = _ordered(torch.stack(factors, 1), terms)  # (blocks, bits)
    signs = nearest_signs(w, alpha)  # (blocks, m, bits), ±1
    best = _error(w, signs, alpha)
    kept = alpha, signs
    for _ in range(rounds):
        gram = signs.mT @ signs  # (blocks, bits, bits)
        solution = torch.linalg.pinv(gram, hermitian=True) @ (signs.mT @ w.unsqueeze(2))
        alpha = _ordered(solution.squeeze(2), terms)
        before, signs = signs, nearest_signs(w, alpha)
        error = _error(w, signs, alpha)
        better = error < best
        best = torch.where(better, error, best)
        kept = (
            torch.where(better[:, None], alpha, kept[0]),
            torch.where(better[:, None, None], signs, kept[1]),
        )
        if torch.equal(before, signs):
            break
    alpha, signs = kept
    return (signs > 0).permute(2, 0, 1).contiguous(), alpha.T.contiguous()


def nearest_signs(values: Tensor, alpha: Tensor) -> Tensor:
    """Signs (blocks, m, bits), +1 or −1, of the sums ± α₁ ± α₂ … that are nearest to (blocks, m), α (blocks, bits)."""
    patterns = torch.tensor(list(product((-1.0, 1.0), repeat=alpha.shape[1])), dtype=alpha.dtype, device=alpha.device)
    sums, order = (alpha @ patterns.T).sort(dim=1, stable=True)  # (blocks, 2ᵇ)
    places = torch.searchsorted(((sums[:, :-1] + sums[:, 1:]) / 2).contiguous(), values.contiguous())
    return patterns[order.gather(1, places)]


def powers_of_two(values: Tensor, terms: int) -> Tensor:
    """Each value as a sum of at most ``terms`` positive or negative powers of two; 0 leaves it.

    >>> powers_of_two(torch.tensor([0.8, 5.0, 0.0]), 1).tolist(), powers_of_two(torch.tensor([0.8, 5.0]), 2).tolist()
    ([1.0, 4.0, 0.0], [0.75, 5.0])
    """
    if not terms:
        return values
    rest, total = values, torch.zeros_like(values)
    smallest = torch.zeros_like(values)
    for _ in range(terms):
        power = rest.abs().clamp(min=torch.finfo(values.dtype).tiny).log2().round().exp2()
        power = torch.where((rest != 0) & (power >= smallest), power.copysign(rest), 0)
        smallest = torch.where(total == 0, power.abs() * SMALLEST, smallest)
        total, rest = total + power, rest - power
    return total


def shiftadd_codes(weight: Tensor, gram: Tensor | Factor | None, config: ShiftAdd | None = None) -> Compensated:
    """Signs and factors, with errors made up for by later columns.

    Args:
        weight: (out, in); of float64 the columns are worked on in float64, else in float32.
        gram: (in, in), Σ xᵀx of the layer's inputs, (groups, in, in), or its
            :func:`~weft.quantize.gptq.column_factor` for sets of as many columns as share factors; None: no data.
        config: bits, blocks; the defaults if None.

    Returns:
        The form :class:`weft.packed.Binary`, the loss and notes.

    Raises:
        RecipeError: shapes do not fit, or values are not finite.

    Source: arXiv:2406.05981, section 4.2.

    >>> weight = torch.tensor([[3.0, 0.5], [1.0, 0.5], [-1.0, -0.5], [-3.0, -0.5]])
    >>> made = shiftadd_codes(weight, torch.eye(2), ShiftAdd(bits=2))
    >>> made.packed.alpha.squeeze(1).tolist(), bool((made.packed.dequantize() == weight).all())
    ([[2.0, 0.5], [1.0, 0.0]], True)
    """
    config = config or ShiftAdd()
    weight = checked(weight)
    columns, rows = weight.shape[1], weight.shape[0]
    if gram is None:
        gram = torch.eye(columns, dtype=torch.float64)
    held = column_factor(gram, config.damping, config.neighbours) if isinstance(gram, Tensor) else gram
    if len(held.order) != columns:
        raise RecipeError(
            f"ShiftAdd needs a Gram matrix of the layer's {columns} inputs, got one of {len(held.order)}."
        )
    order = held.order.to(weight.device)
    w = weight.T[order].contiguous()  # (in, out)
    upper = torch.eye(columns) if held.upper is None else held.upper
    wide = config.neighbours
    tall = rows if wide == 1 else -(-rows // TILE)  # outputs that share factors
    sets = (order // wide).tolist()
    begins = [j for j in range(columns) if j == 0 or sets[j] != sets[j - 1]]
    ends = dict(zip(begins, [*begins[1:], columns]))
    alpha = torch.zeros(-(-columns // wide), config.bits, -(-rows // tall), dtype=w.dtype, device=w.device)
    signs = torch.empty(columns, rows, config.bits, dtype=torch.bool, device=w.device)

    def round_column(j: int) -> Tensor:
        if j in ends:
            alpha[sets[j]] = _fitted(w[j : ends[j]], tall, config)
        factors = alpha[sets[j]]  # (bits, blocks of rows)
        found = _signs(w[j], factors, tall)
        signs[j] = found > 0
        return (found * factors.T.repeat_interleave(tall, 0)[:rows]).sum(1)

    # factors are fitted to columns that all before have left up to date: a block ends where a set does
    blocks, start = [], 0
    for end in ends.values():
        if end - start >= config.block_size or end == columns:
            blocks.append((start, end))
            start = end
    loss = round_columns(w, upper.to(w), blocks, round_column)
    stored = alpha.permute(1, 2, 0).contiguous()
    stored = stored.half() if torch.equal(stored.half().to(stored), stored) else stored.float()
    packed = Binary(signs[order.argsort()].permute(2, 1, 0).contiguous(), stored, (tall, wide))
    return Compensated(packed, loss, held.notes)


def shiftadd_sensitivity(weight: Tensor, gram: Tensor | Factor, damping: float = 0.01) -> Tensor:
    """What few bits cost a layer: ‖W / d‖_F · var(W / d), d_j = U_jj of the inverse Gram matrix; 0-d float64.

    Layers with the larger score get the more bits. The score is comparable between layers where the Gram matrices are sums
    over equally many rows.

    Source: arXiv:2406.05981, section 4.3, equation 2.

    >>> float(shiftadd_sensitivity(torch.tensor([[1.0, -1.0]]), torch.eye(2), damping=0))
    1.4142135623730951
    """
    held = column_factor(gram, damping) if isinstance(gram, Tensor) else gram
    if held.upper is None:
        return torch.zeros((), dtype=torch.float64)
    if len(held.order) != weight.shape[-1]:
        raise RecipeError(f"A weight {list(weight.shape)} has no Gram matrix of {len(held.order)} inputs.")
    scaled = checked(weight).double()[:, held.order] / held.upper.diagonal()
    return scaled.norm() * scaled.var(correction=0)


def lookup_product(x: Tensor, packed: Binary) -> Tensor:
    """x Ŵᵀ from tables of sums of signed inputs: how a kernel without multiplication computes it, step by step.

    Args:
        x: (…, in); computed in its own type.
        packed: signs and factors.

    Returns:
        (…, out). In float64 it is the dense product but for the order of the sums.

    >>> packed = Binary(torch.tensor([[[True, False]], [[True, True]]]), torch.tensor([[[2.0]], [[1.0]]]), (1, 2))
    >>> lookup_product(torch.tensor([[1.0, 10.0]]), packed).tolist()
    [[-7.0]]
    """
    bits, rows, columns = packed.signs.shape
    if x.shape[-1] != columns:
        raise RecipeError(f"Inputs {list(x.shape)} do not fit a weight {[rows, columns]}.")
    groups = -(-columns // TILE)
    powers = 1 << torch.arange(TILE, device=x.device)
    every = (torch.arange(1 << TILE, device=x.device)[:, None] // powers % 2 * 2 - 1).to(x.dtype)  # (256, 8), ±1
    fill = groups * TILE - columns
    flags = functional.pad(packed.signs.to(x.device), (0, fill)).unflatten(2, (groups, TILE))
    patterns = (flags * powers).sum(3)  # (bits, out, groups)
    tall, wide = packed.block
    result = x.new_zeros(*x.shape[:-1], rows)
    for bit in range(bits):
        for block, first in enumerate(range(0, rows, tall)):
            factor = packed.alpha[bit, block].to(x).repeat_interleave(wide)[:columns]
            shifted = functional.pad(x * factor, (0, fill)).unflatten(-1, (groups, TILE))
            tables = shifted @ every.T  # (…, groups, 256): the sums that additions alone make
            for row in range(first, min(first + tall, rows)):
                found = tables[..., torch.arange(groups, device=x.device), patterns[bit, row]]
                result[..., row] += found.sum(-1)
    return result


def _ordered(alpha: Tensor, terms: int) -> Tensor:
    """Without signs, which the weights' have, and from the largest down."""
    return powers_of_two(alpha.abs().sort(1, descending=True).values, terms)


def _error(w: Tensor, signs: Tensor, alpha: Tensor) -> Tensor:
    return (w - (signs @ alpha.unsqueeze(2)).squeeze(2)).square().sum(1)


def _split(columns: Tensor, tall: int) -> list[Tensor]:
    """(n, out) -> blocks of rows: (whole blocks, n · tall), and (1, n · rest) if rows are left."""
    whole = columns.shape[1] // tall * tall
    parts = []
    if whole:
        parts.append(columns[:, :whole].unflatten(1, (-1, tall)).transpose(0, 1).flatten(1))
    if whole < columns.shape[1]:
        parts.append(columns[:, whole:].flatten().unsqueeze(0))
    return parts


def _fitted(columns: Tensor, tall: int, config: ShiftAdd) -> Tensor:
    """(n, out) -> factors (bits, blocks), as they are stored."""
    made = [binary_coding(p, config.bits, config.rounds, config.terms)[1] for p in _split(columns, tall)]
    alpha = torch.cat(made, 1)
    if config.terms:  # which single precision holds
        return alpha.to(columns.dtype)
    half = alpha.half().double()  # unless that is out of its range
    return torch.where((half - alpha).abs() <= 1e-3 * alpha, half, alpha).float().to(columns.dtype)


def _signs(column: Tensor, factors: Tensor, tall: int) -> Tensor:
    """(out,), (bits, blocks) -> (out, bits), ±1."""
    parts = _split(column.unsqueeze(0), tall)
    given = factors.T.split([len(p) for p in parts])
    return torch.cat([nearest_signs(p, f.to(p)).flatten(0, 1) for p, f in zip(parts, given)])


METHODS = (
    QuantizeMethod(
        name="shiftaddllm",
        family="quantize",
        config=ShiftAdd,
        summary="Sums of signs times powers of two, whose products are shifts, table look-ups and sums.",
        goal="shrink",
        paper="shiftaddllm",
        needs="calibration",
        checked_by=("brute force", "closed form"),
        error=0.18,
        finer={"bits": (1, 2, 3, 4)},
        group="",
        ragged=True,
        refits="factors are fitted anew, and alternation ends elsewhere",
        exceptions={
            "a row of zeros stays one": "no sum of signs times numbers is zero for one row and not for others",
            "groups that do not divide the inputs": "there are none; making up for errors moves 11 correlated inputs far",
        },
    ),
)
