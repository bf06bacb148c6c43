"""Lower the rank of a weight that was drawn already, without changing its size: how rich or lazy learning starts.

Liu et al., "How connectivity structure shapes rich and lazy learning in neural circuits", arXiv:2310.08513 (2024).

    W = U Σ Vᵀ        W ← s · U_k Σ_k V_kᵀ        s = size(W) / size(U_k Σ_k V_kᵀ)

W (out, in), k the rank, U_k, Σ_k, V_k the k largest singular values and their vectors. The size that stays is the
Frobenius norm (the paper's choice), the spectral norm σ_1 (then s = 1), or the spectral radius |λ|_max of a square W.
At one Frobenius norm, low rank has larger singular values: k = 1 has σ_1 = ‖W‖_F, √out/2 times that of random numbers, so
that a recurrent network may explode; the other two choices hold its dynamics still instead.

Differences from the paper and its code: the size that is kept is a choice. Any weight can be given: kernels of
convolutions count as (out, in · window).
Complexity: one singular value decomposition in float64. Re-implemented from the equations (official code: no licence).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from weft.errors import RecipeError
from weft.function.initializer import InitMethod, check_fillable, plain_parameter
from weft.method import configure, parameter

_VANISHED = 1e-12  # a spectral radius of so much of σ_1 is rounding: the matrix is nilpotent


@dataclass(frozen=True)
class LowRank:
    """Configuration of :func:`low_rank_`."""

    rank: int = parameter(1, "singular values that stay", minimum=1)
    match: str = parameter("frobenius", "size that stays as it was", choices=("frobenius", "spectral", "radius"))


@torch.no_grad()
def low_rank_(weight: Tensor, rank: int = 1, match: str = "frobenius") -> Tensor:
    """Cut a weight to its largest singular values and rescale it to the size it had, in place.

    Args:
        weight: (out, in, …), floating point, with its values drawn; square for ``match="radius"``. Types of 16 bits round
            the result, whose smaller singular values are then that rounding.
        rank: k; at the smaller side of the matrix or beyond nothing changes.
        match: "frobenius" norm, "spectral" norm or spectral "radius".

    Returns:
        The weight.

    Raises:
        RecipeError: fewer than two axes, NaN or infinity, not square, or a spectral radius that cannot be matched.

    Source: arXiv:2310.08513, section on low-rank initialisation.

    >>> weight = torch.randn(20, 30, generator=torch.Generator().manual_seed(0))
    >>> before = weight.norm()
    >>> torch.linalg.matrix_rank(low_rank_(weight, rank=3)), torch.allclose(weight.norm(), before)
    (tensor(3), True)
    """
    config = configure(LowRank, {"rank": rank, "match": match})
    check_fillable(weight)
    if weight.dim() < 2 or not weight.is_floating_point():
        raise RecipeError(
            f"A weight (out, in, …) of floating point is needed, got {list(weight.shape)}, {weight.dtype}; vectors have no "
            "rank to lower."
        )
    matrix = weight.flatten(1).double()
    if config.match == "radius" and matrix.shape[0] != matrix.shape[1]:
        raise RecipeError(
            f"Only square matrices, as recurrent ones are, have a spectral radius; got {list(weight.shape)}. Match the "
            "frobenius or the spectral norm."
        )
    if config.rank >= min(matrix.shape):
        return weight
    if not bool(matrix.isfinite().all()):
        raise RecipeError("The weight holds NaN or infinity; draw its values first.")
    u, sigma, vt = torch.linalg.svd(matrix, full_matrices=False)
    cut = (u[:, : config.rank] * sigma[: config.rank]) @ vt[: config.rank]
    if config.match == "frobenius":
        scale = sigma.norm() / sigma[: config.rank].norm().clamp(min=torch.finfo(sigma.dtype).tiny)
    elif config.match == "radius":
        before, after = (torch.linalg.eigvals(m).abs().max() for m in (matrix, cut))
        if bool(after <= _VANISHED * sigma[0]) and bool(sigma[0] > 0):
            raise RecipeError(
                f"At rank {config.rank} this weight has a spectral radius of 0, which no factor brings back to "
                f"{float(before):.3g}. Keep a higher rank, or match the frobenius or the spectral norm."
            )
        scale = before / after if bool(sigma[0] > 0) else 1
    else:
        scale = 1
    return weight.copy_((cut * scale).view(weight.shape))


METHODS = (
    InitMethod(
        name="low_rank",
        family="init",
        config=LowRank,
        summary="A drawn weight cut to a lower rank at the size it had; low rank learns features, high rank hardly moves.",
        goal="train",
        paper="rich-lazy",
        function=low_rank_,
        trial=lambda: nn.Linear(8, 8),
        apply=lambda model, generator, **parameters: low_rank_(plain_parameter(model), **parameters),
        random=False,
        checked_by=("closed form", "numpy"),
    ),
)
