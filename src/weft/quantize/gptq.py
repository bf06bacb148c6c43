"""Round a layer column by column, and let the columns still to come make up for each one's error on calibration inputs.

GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers, Frantar et al., arXiv:2210.17323
(ICLR 2023).

    minimise  ½ tr(Δ H Δᵀ)        Δ = W − Ŵ (out, in);  H = Σ xᵀx + λ I (in, in);  H⁻¹ = Uᵀ U, U upper triangular
    for each column j:            e = (w_j − Q(w_j)) / U_jj        w_k ← w_k − e · U_jk  for all k ≥ j

Q rounds to the grid of the column's group (:mod:`weft.quantize.grid`); λ is ``damping`` times the mean of H's diagonal.
With R upper triangular and H = R Rᵀ (a Cholesky factor with both axes flipped), U = R⁻¹: one factorisation and one
triangular solve, in float64. Updates beyond the next ``block_size`` columns are made at once, which changes nothing.

==========  ====================================================================================
``order``   columns are rounded
==========  ====================================================================================
none        from the first to the last
static      by falling diagonal of H; grids are of the original groups and weights
gar         groups by their largest diagonal, and columns within each: groups stay in one piece
==========  ====================================================================================

``groups``: grids are fitted to the original weights (static), or to what is left of a group when it begins (dynamic).

Differences from the paper and its code: an input that calibration never saw (zero on H's diagonal) is rounded to nearest;
the authors set its weights to zero. Where H is not positive definite λ grows tenfold until it is, and a note says so. The
authors' order with groups formed anew (``desc_act`` without static groups) is left out: it needs an index for each column
that no current format stores. Grids are those of this package. Blocks end where dynamic groups begin, so that a group's
grid always sees all compensation. A layer that no token reached is rounded to nearest, and named.
Complexity: O(in³) for the factor, once for layers with equal inputs, and O(out · in²).
Re-implemented from the equations (official code: Apache-2.0).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from weft.calibrate import BlockTask, Change, Statistics
from weft.errors import RecipeError
from weft.function.quantizer import QuantizeMethod
from weft.method import parameter
from weft.packed import Affine
from weft.quantize.compensate import Factor, change_with_factors, inverse_factor, round_blocks, round_columns
from weft.quantize.grid import Grid, fit_grid, quantize
from weft.quantize.rtn import RTN

ORDERS = ("none", "static", "gar")
GROUPS = ("static", "dynamic")


@dataclass(frozen=True)
class GPTQ(Grid, Change):
    """A grid, and how columns are rounded to it.

    >>> GPTQ(bits=3, group_size=64, order="gar").damping
    0.01
    """

    damping: float = parameter(0.01, "λ as a share of the mean of the Gram matrix' diagonal", minimum=0)
    block_size: int = parameter(128, "columns that are rounded before the rest is updated; for speed only", minimum=1)
    order: str = parameter("static", "of columns: none, static or gar", choices=ORDERS)
    groups: str = parameter(
        "static", "when grids are fitted: static or dynamic (not with order static)", choices=GROUPS
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.damping < float("inf") or self.block_size < 1:
            raise RecipeError(
                f"GPTQ needs damping ≥ 0 and block_size ≥ 1, got damping={self.damping!r}, block_size={self.block_size!r}."
            )
        if self.order not in ORDERS or self.groups not in GROUPS:
            raise RecipeError(
                f"GPTQ knows the orders {', '.join(ORDERS)} and groups {', '.join(GROUPS)}, got {self.order!r}, "
                f"{self.groups!r}."
            )
        if self.order == "static" and self.groups == "dynamic":
            raise RecipeError(
                "order='static' takes columns of many groups in turn, so their grids are fitted before: give "
                "groups='static', or order='gar', which keeps groups in one piece."
            )

    needs: ClassVar[tuple[str, ...]] = ("gram",)

    def fit(self, name: str, weight: Tensor, statistics: Statistics) -> Affine:
        """A layer's codes; see :class:`weft.calibrate.Change`."""
        return gptq_codes(weight, statistics.gram(name), self).codes

    def without_data(self) -> RTN:
        """Rounding to nearest on the same grid."""
        return RTN(self.bits, self.group_size, self.kind, self.scale_dtype, self.ranges)

    def scratch(self, rows: int, columns: int) -> float:
        """A factorisation in float64, then its result beside what every change takes."""
        return max(20.0 * columns**2, 4.0 * columns**2 + super().scratch(rows, columns))

    def change_block(self, task: BlockTask) -> None:
        """Layers with equal inputs share the factor; the report has each one's loss and notes."""
        change_with_factors(
            task, self, lambda gram: gptq_factor(gram, self), lambda name, weight, gram: gptq_codes(weight, gram, self)
        )


class Rounded(NamedTuple):
    """A layer after GPTQ.

    Attributes:
        codes: codes, scales and zero points.
        loss: ½ tr(Δ H Δᵀ) with the damped Gram matrix H (inputs never seen have the mean of its diagonal); 0-d float64.
        notes: see :class:`Factor`.
    """

    codes: Affine
    loss: Tensor
    notes: tuple[str, ...]


def gptq_factor(gram: Tensor, config: GPTQ) -> Factor:
    """The order of columns and the factor of the inverse; layers with equal inputs share it.

    Args:
        gram: (in, in), Σ xᵀx of the layer's inputs; :meth:`weft.calibrate.Statistics.gram`. Any positive multiple gives
            the same codes.
        config: damping, order, group size.

    Raises:
        RecipeError: it is no symmetric matrix of finite numbers with a diagonal that is not negative, or its size does not
            divide into groups.

    Source: arXiv:2210.17323, section 3.3, step 3.

    >>> gptq_factor(torch.diag(torch.tensor([1.0, 4.0])), GPTQ(group_size=0, damping=0)).upper.tolist()
    [[0.5, 0.0], [0.0, 1.0]]
    """
    return inverse_factor(gram, config.damping, lambda diagonal: _order(diagonal, config))


def gptq_codes(
    weight: Tensor,
    gram: Tensor | Factor,
    config: GPTQ | None = None,
    fitted: tuple[Tensor, Tensor] | None = None,
) -> Rounded:
    """Weights on a grid, with errors made up for by later columns.

    Args:
        weight: (out, in); of float64 the columns are worked on in float64, else in float32.
        gram: (in, in), Σ xᵀx of the layer's inputs, or its :func:`gptq_factor`. For a convolution with groups
            (groups, in, in), one matrix for each run of out / groups rows.
        config: bits, groups, order; the defaults if None.
        fitted: scales and zero points, two of (out, groups), for static groups; those that hold all weights if None.

    Returns:
        Codes, the loss and notes.

    Raises:
        RecipeError: shapes do not fit, values are not finite, or rows do not divide into groups.

    Source: arXiv:2210.17323, algorithm 1.

    >>> weight = torch.tensor([[0.4, 1.4, 3.0]])
    >>> gram = torch.tensor([[1.0, 0.9, 0.0], [0.9, 1.0, 0.0], [0.0, 0.0, 1.0]])
    >>> gptq_codes(weight, gram, GPTQ(bits=2, group_size=0, order="none")).codes.dequantize().tolist()  # 1.4 makes up for 0.4
    [[0.0, 2.0, 3.0]]
    """
    config = config or GPTQ()
    if isinstance(gram, Tensor) and gram.dim() == 3:
        if not len(gram) or weight.dim() != 2 or len(weight) % len(gram):
            raise RecipeError(f"{list(weight.shape)} has no rows for each of {len(gram)} Gram matrices.")
        grids = [None] * len(gram) if fitted is None else list(zip(*(v.chunk(len(gram)) for v in fitted)))
        parts = zip(weight.chunk(len(gram)), gram, grids)
        return _joined([gptq_codes(w, g, config, f) for w, g, f in parts], config)
    weight = weight.detach()
    scale, zero = fit_grid(weight, config)  # which checks the weight
    scale, zero = fitted or (scale, zero)
    held = gptq_factor(gram, config) if isinstance(gram, Tensor) else gram
    if len(held.order) != weight.shape[1]:
        raise RecipeError(
            f"GPTQ needs a Gram matrix of the layer's {weight.shape[1]} inputs, got one of {len(held.order)}."
        )
    if held.upper is None:
        codes = quantize(weight, scale, zero, config)
        return Rounded(codes, torch.zeros((), dtype=torch.float64), held.notes)
    order = held.order.to(weight.device)
    # columns lie as rows, (in, out): each is one piece of memory
    w = weight.to(torch.float64 if weight.dtype == torch.float64 else torch.float32).T[order].contiguous()
    upper = held.upper.to(w)
    size = config.group_size or len(order)
    groups = (order // size).tolist()  # of each column, in the new order
    low, high = config.codes
    made = torch.empty_like(w, dtype=torch.int16)
    scales, zeros = (t.T.to(w.dtype).contiguous() for t in (scale, zero))  # (groups, out)

    def fit_group(j: int) -> None:
        if config.groups == "dynamic" and j % size == 0:
            fitted = fit_grid(w[j : j + size].T, replace(config, group_size=0))
            group = groups[j]
            scale[:, group], zero[:, group] = fitted[0][:, 0], fitted[1][:, 0]
            scales[group], zeros[group] = scale[:, group].to(w.dtype), zero[:, group].to(w.dtype)

    def round_column(j: int) -> Tensor:
        fit_group(j)
        s, z = scales[groups[j]], zeros[groups[j]]
        code = (w[j] / s).round_().add_(z).clamp_(low, high)
        made[j] = code
        return code.sub_(z).mul_(s)

    def round_block(start: int, stop: int) -> Tensor:
        from weft.kernels.compensate import round_to_grid

        fit_group(start)
        errors = torch.empty_like(w[start:stop])
        grids = scales.numpy(), zeros.numpy(), np.asarray(groups[start:stop])
        column = w.numpy()
        ends = column.dtype.type(low), column.dtype.type(high)  # one type in all of the loop
        round_to_grid(column, upper.numpy(), *grids, made.numpy(), errors.numpy(), start, *ends)
        return errors

    blocks = _blocks(len(order), config)
    if _has_kernel(w):
        loss = round_blocks(w, upper, blocks, round_block)
    else:
        loss = round_columns(w, upper, blocks, round_column)
    codes = Affine(made[order.argsort()].T.contiguous(), scale, zero, config.bits, low)
    return Rounded(codes, loss, held.notes)


def _has_kernel(w: Tensor) -> bool:
    return w.device.type == "cpu"


def _order(diagonal: Tensor, config: GPTQ) -> Tensor:
    """(in,) -> (in,) indices of columns."""
    size = config.group_size or len(diagonal)
    if len(diagonal) % size:
        raise RecipeError(
            f"Rows of {len(diagonal)} inputs do not divide into groups of {size}; give another group_size, or 0 for rows."
        )
    if config.order == "none":
        return torch.arange(len(diagonal), device=diagonal.device)
    if config.order == "static":
        return diagonal.argsort(descending=True, stable=True)
    groups = diagonal.unflatten(0, (-1, size))  # (groups, size)
    within = groups.argsort(dim=1, descending=True, stable=True)
    between = groups.amax(1).argsort(descending=True, stable=True)
    return (between[:, None] * size + within[between]).flatten()


def _blocks(columns: int, config: GPTQ) -> list[tuple[int, int]]:
    """Where blocks of columns start and stop."""
    starts = set(range(0, columns, config.block_size))
    if config.groups == "dynamic":
        starts |= set(range(0, columns, config.group_size or columns))
    ordered = sorted(starts)
    return list(zip(ordered, [*ordered[1:], columns]))


def _joined(parts: list[Rounded], config: GPTQ) -> Rounded:
    codes, scale, zero = (torch.cat([getattr(p.codes, key) for p in parts]) for key in ("codes", "scale", "zero"))
    notes = tuple(dict.fromkeys(n for p in parts for n in p.notes))
    whole = Affine(codes, scale, zero, config.bits, config.codes[0])
    return Rounded(whole, torch.stack([p.loss for p in parts]).sum(), notes)


METHODS = (
    QuantizeMethod(
        name="gptq",
        family="quantize",
        config=GPTQ,
        summary="Round column by column, later columns making up for the errors of earlier ones on calibration data.",
        goal="shrink",
        origin="Frantar et al. 2023, arXiv:2210.17323",
        needs="calibration",
        checked_by=("brute force", "closed form"),
        codes=lambda config: config.codes,
        error=0.1,
        finer={"bits": (2, 3, 4, 8)},
        refits="grids are fitted anew, and the lowest or the highest code may be unused",
    ),
)
