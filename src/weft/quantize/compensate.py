"""Round a matrix column by column, later columns making up for the errors of earlier ones: the loop that methods share.

    minimise  ½ tr(Δ H Δᵀ)        Δ = W − Ŵ (out, in);  H = Σ xᵀx + λ I (in, in);  H⁻¹ = Uᵀ U, U upper triangular
    for each column j:            e = (w_j − Q(w_j)) / U_jj        w_k ← w_k − e · U_jk  for all k ≥ j

Q is any way to round a column. With R upper triangular and H = R Rᵀ (a Cholesky factor with both axes flipped), U = R⁻¹: one
factorisation and one triangular solve, in float64. Where H is not positive definite λ grows tenfold until it is.

Source: GPTQ, Frantar et al., arXiv:2210.17323 (ICLR 2023), algorithm 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from weft.calibrate import BlockTask, Change
from weft.errors import RecipeError
from weft.packed import Packed

_ROWS = 512  # at a time


class Factor(NamedTuple):
    """What GPTQ needs of a Gram matrix.

    Attributes:
        order: (in,) int64, the order of the columns.
        upper: (in, in), U of the inverse, rows and columns in that order, computed in float64 and kept in the Gram matrix'
            type (at least float32); None where no input was ever seen.
        damping: λ, in the Gram matrix' units.
        notes: what had to be done beside, in sentences.
        diagonal: (in,) float64, of H in that order, with λ.
    """

    order: Tensor
    upper: Tensor | None
    damping: float
    notes: tuple[str, ...]
    diagonal: Tensor


class Compensated(NamedTuple):
    """A layer after a compensated loop.

    Attributes:
        packed: the packed weight.
        loss: ½ tr(Δ H Δᵀ) with the damped Gram matrix H, 0-d float64.
        notes: what had to be done beside, in sentences.
    """

    packed: Packed
    loss: Tensor
    notes: tuple[str, ...]


def inverse_factor(gram: Tensor, damping: float, order_of: Callable[[Tensor], Tensor]) -> Factor:
    """:func:`gptq_factor` for columns in any order, which is made of the Gram matrix' diagonal.

    >>> inverse_factor(torch.diag(torch.tensor([1.0, 4.0])), 0.0, torch.argsort).order.tolist()
    [0, 1]
    """
    if gram.dim() != 2 or gram.shape[0] != gram.shape[1] or not gram.numel() or not gram.is_floating_point():
        raise RecipeError(f"GPTQ needs a Gram matrix (in, in) of numbers, got {list(gram.shape)} {gram.dtype}.")
    gram = gram.detach()
    diagonal = gram.diagonal().to(torch.float64)
    if not _is_gram(gram, diagonal):
        raise RecipeError(
            "GPTQ needs a Gram matrix Σ xᵀx: finite, symmetric, with no negative value on its diagonal and none larger than "
            "the diagonal allows. The data or the statistics are damaged; gather them again."
        )
    order = order_of(diagonal)
    notes: tuple[str, ...]
    dead = diagonal == 0
    if dead.all():
        notes = ("no input was ever different from zero: rounded to nearest",)
        return Factor(order, None, 0.0, notes, torch.ones_like(diagonal))
    mean = float(diagonal[~dead].mean())
    turned = order.flip(0)  # a Cholesky factor with both axes flipped is one of the other kind
    h = torch.empty(gram.shape, dtype=torch.float64, device=gram.device)
    for start in range(0, len(h), _ROWS):
        rows = turned[start : start + _ROWS]
        h[start : start + _ROWS] = gram[rows][:, turned]
    plain = torch.where(dead, mean, diagonal)[turned]
    share = damping
    notes = ()
    while True:
        h.diagonal().copy_(plain + share * mean)
        lower, info = torch.linalg.cholesky_ex(h)
        # a factor that is not finite anywhere is not so on its diagonal
        if not int(info) and bool(lower.diagonal().isfinite().all()):
            break
        # ends at 10 · in at the latest: no eigenvalue is below minus the trace
        share = max(10 * share, 1e-8)
        notes = (f"not positive definite: damping {share:g} instead of {damping:g}",)
    del h
    return Factor(order, _inverse(lower, gram.dtype).flip(0, 1), share * mean, notes, (plain + share * mean).flip(0))


def _is_gram(gram: Tensor, diagonal: Tensor) -> bool:
    """Whether a matrix may be Σ xᵀx, looked at some rows at a time."""
    if not diagonal.isfinite().all() or not bool((diagonal >= 0).all()):
        return False
    wide = torch.promote_types(gram.dtype, torch.float32)
    sizes = diagonal.sqrt().to(wide)
    for start in range(0, len(gram), _ROWS):
        rows, mirrored = gram[start : start + _ROWS].to(wide), gram[:, start : start + _ROWS].T.to(wide)
        limits = sizes[start : start + _ROWS, None] * sizes  # of Cauchy and Schwarz: none of Σ xᵀx is larger
        if not rows.isfinite().all() or bool((rows.abs() > 1.001 * limits).any()):
            return False
        if bool(((rows - mirrored).abs() > 1e-3 * limits).any()):
            return False
    return True


def _inverse(lower: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse of a lower triangular matrix, in at least float32, by blocks of columns: those above them are zero."""
    size = len(lower)
    made = torch.zeros(size, size, dtype=torch.promote_types(dtype, torch.float32), device=lower.device)
    for start in range(0, size, _ROWS):
        stop = min(start + _ROWS, size)
        unit = torch.zeros(size - start, stop - start, dtype=lower.dtype, device=lower.device)
        unit.diagonal().fill_(1)
        made[start:, start:stop] = torch.linalg.solve_triangular(lower[start:, start:], unit, upper=False)
    return made


def round_columns(
    w: Tensor, upper: Tensor, blocks: Iterable[tuple[int, int]], round_column: Callable[[int], Tensor]
) -> Tensor:
    """The loop of GPTQ for any way to round a column.

    Args:
        w: (in, out), the columns of the weight as rows, in their order; those still to come are changed in place.
        upper: (in, in), U of the inverse, in that order and of the type of ``w``.
        blocks: where blocks of columns start and stop; columns beyond a block are updated when it ends.
        round_column: given j, the values (out,) that column ``w[j]`` becomes.

    Returns:
        ½ tr(Δ H Δᵀ), 0-d float64.

    Source: arXiv:2210.17323, algorithm 1.

    >>> w = torch.tensor([[0.25], [1.5]])
    >>> loss = round_columns(w, torch.tensor([[2.0, 1.0], [0.0, 1.0]]), [(0, 2)], lambda j: w[j].round())
    >>> w.flatten().tolist()  # 0.25 was rounded to 0, and half of that came off 1.5
    [0.25, 1.375]
    """

    def round_block(start: int, stop: int) -> Tensor:
        errors = torch.empty_like(w[start:stop])
        for i, j in enumerate(range(start, stop)):
            errors[i] = (w[j] - round_column(j)) / upper[j, j]
            w[j + 1 : stop].addr_(upper[j, j + 1 : stop], errors[i], alpha=-1)
        return errors

    return round_blocks(w, upper, blocks, round_block)


def round_blocks(
    w: Tensor, upper: Tensor, blocks: Iterable[tuple[int, int]], round_block: Callable[[int, int], Tensor]
) -> Tensor:
    """:func:`round_columns` where blocks of columns are rounded at once.

    Args:
        w, upper, blocks: as there.
        round_block: given where a block starts and stops, rounds its columns and changes those of the block that are still
            to come; returns their errors (stop − start, out), each divided by its diagonal value of ``upper``.

    Returns:
        ½ tr(Δ H Δᵀ), 0-d float64.
    """
    loss = torch.zeros((), dtype=torch.float64, device=w.device)
    for start, stop in blocks:
        errors = round_block(start, stop)
        w[stop:].addmm_(upper[start:stop, stop:].T, errors, alpha=-1)
        loss += errors.to(torch.float64).square().sum() / 2
    return loss


def column_factor(gram: Tensor, damping: float, columns: int = 1) -> Factor:
    """The factor of a Gram matrix with columns in falling order of its diagonal.

    Args:
        gram: (in, in), or (groups, in, in), of which the sum is taken.
        damping: λ as a share of the mean of the diagonal.
        columns: neighbours that stay together; sets are ordered by the sums of their diagonals.

    Raises:
        RecipeError: it is no Gram matrix.

    >>> column_factor(torch.diag(torch.tensor([1.0, 4.0, 2.0])), 0.0).order.tolist()
    [1, 2, 0]
    """

    def order(diagonal: Tensor) -> Tensor:
        sets = functional.pad(diagonal, (0, -len(diagonal) % columns)).unflatten(0, (-1, columns))
        first = sets.sum(1).argsort(descending=True, stable=True) * columns
        every = (first[:, None] + torch.arange(columns, device=first.device)).flatten()
        return every[every < len(diagonal)]

    return inverse_factor(gram.sum(0) if gram.dim() == 3 else gram, damping, order)


def change_with_factors(
    task: BlockTask,
    change: Change,
    factor_of: Callable[[Tensor], Factor],
    rounded_of: Callable[[str, Tensor, Tensor | Factor], tuple[Packed, Tensor, tuple[str, ...]]],
) -> None:
    """Change a block's layers one by one where those with equal inputs share the factor of their Gram matrix.

    Args:
        task: the block.
        change: what is done, for its :meth:`~weft.calibrate.Change.without_data`.
        factor_of: the factor of a Gram matrix (in, in).
        rounded_of: a layer's packed weight, loss and notes, of its name, its matrix and the factor, or the Gram matrices
            (groups, in, in) of a convolution with groups.
    """
    last: dict[str, Factor] = {}  # such layers follow one another
    for name in task.layers:
        with task.attempt(name):
            instead = task.instead(name, change)
            if instead is not change:
                task.put(name, instead.fit(name, task.weight(name), task.statistics))
                continue
            gram = task.statistics.gram(name)
            leader = task.statistics.shared(name)[0]
            if gram.dim() == 2 and leader not in last:
                last = {leader: factor_of(gram)}
            packed, loss, notes = rounded_of(name, task.weight(name), last.get(leader, gram))
            task.put(name, packed)
            task.note(name, loss=float(loss), **({"notes": list(notes)} if notes else {}))
