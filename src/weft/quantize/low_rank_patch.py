"""The low-rank patch that makes up best for what quantising a layer lost.

ZeroQuant-V2, Yao et al., arXiv:2303.08302 (2023), calls the plain one LoRC. With E = W − Ŵ (out, in) and the Gram matrix G of
the inputs:

    plain     min ‖E − L R‖²                          L R = U_r Σ_r V_rᵀ of E = U Σ Vᵀ
    weighted  min tr((E − L R) G (E − L R)ᵀ)          L R = U_r U_rᵀ E, with U_r of E G^½ = U Σ Vᵀ

both by Eckart and Young; G need not be invertible.
Complexity: O(min(out, in)³), and O(in³) with G, in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from weft.errors import RecipeError


def low_rank_patch(lost: Tensor, rank: int, gram: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Factors of the best patch of a rank.

    Args:
        lost: (out, in), E.
        rank: r ≤ min(out, in).
        gram: (in, in), Σ xᵀx of the inputs, whose outputs are to be met; None for the weights themselves.

    Returns:
        (out, r) and (r, in), float32, of equal norm in each pair; zero rows of E are exactly zero in the first.

    Raises:
        RecipeError: shapes do not fit, or values are not finite.

    Source: arXiv:2303.08302, section 5 (plain); Eckart and Young for E G^½ (weighted).

    >>> left, right = low_rank_patch(torch.diag(torch.tensor([4.0, 1.0])), 1)
    >>> (left @ right).tolist()
    [[4.0, 0.0], [0.0, 0.0]]
    """
    if lost.dim() != 2 or not 1 <= rank <= min(lost.shape) or (gram is not None and gram.shape != 2 * lost.shape[1:]):
        raise RecipeError(
            f"A patch of {list(lost.shape)} has a rank from 1 to the smaller side and a Gram matrix of its inputs, got "
            f"{rank} and {None if gram is None else list(gram.shape)}."
        )
    if not lost.isfinite().all() or (gram is not None and not gram.isfinite().all()):
        raise RecipeError(
            "What was lost, or the Gram matrix of the inputs, holds NaN or infinite values; gather it again."
        )
    e = lost.detach().double()
    largest = e.abs().amax().clamp(min=torch.finfo(torch.float64).tiny)
    e = e / largest  # squares of tiny errors would vanish
    if gram is None:
        seen = e
    else:
        values, vectors = torch.linalg.eigh(gram.detach().double())
        seen = e @ (vectors * values.clamp(min=0).sqrt())  # E G^½, turned
    if len(e) <= e.shape[1]:
        power, directions = torch.linalg.eigh(seen @ seen.T)
        directions = seen.T @ directions
    else:
        power, directions = torch.linalg.eigh(seen.T @ seen)
    left = seen @ directions.flip(1)[:, :rank]  # the singular vectors U, each times a number
    norm = left.norm(dim=0)
    # beyond the rank of E there is noise of rounding
    real = (power.flip(0)[:rank] > 1e-12 * power.amax()) & (norm > 0)
    left = torch.where(real, left / torch.where(real, norm, 1), 0)
    right = left.T @ e * largest
    even = right.norm(dim=1).sqrt()
    return (left * even).float(), (right / torch.where(even > 0, even, 1).unsqueeze(1)).float()
