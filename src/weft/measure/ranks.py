"""How many directions a weight uses: three ways to count singular values that are not equally large.

    stable         Σσ² / σ_1²
    participation  (Σσ²)² / Σσ⁴
    entropy        exp(−Σ p log p),  p = σ / Σσ          Roy and Vetterli, "The effective rank" (2007)

σ: singular values. All lie between 1 and the rank, and are the rank where the values that are not 0 are equal.
Complexity: one singular value decomposition in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from weft.errors import RecipeError, did_you_mean

RANKS = ("stable", "participation", "entropy")


@torch.no_grad()
def effective_rank(weight: Tensor, kind: str = "stable") -> float:
    """How many directions a weight uses, a real number between 1 and its rank; 0 for a weight of zeros.

    Args:
        weight: (out, in, …); further axes count with ``in``.
        kind: "stable" ‖σ‖²/σ_1², "participation" (Σσ²)²/Σσ⁴, or "entropy" exp(−Σ p log p) with p = σ/Σσ.

    Raises:
        RecipeError: fewer than two axes, NaN or infinity, an unknown kind.

    >>> [round(effective_rank(torch.diag(torch.tensor([2.0, 1.0])), kind), 4) for kind in RANKS]
    [1.25, 1.4706, 1.8899]
    """
    if kind not in RANKS:
        raise RecipeError(f"There is no effective rank {kind!r}.{did_you_mean(kind, RANKS)}")
    if weight.dim() < 2:
        raise RecipeError(f"A weight (out, in, …) is needed, got {list(weight.shape)}; a vector has no rank.")
    matrix = weight.detach().flatten(1).double()
    if not bool(matrix.isfinite().all()):
        raise RecipeError("The weight holds NaN or infinity.")
    sigma = torch.linalg.svdvals(matrix)
    if not sigma.numel() or not bool(sigma[0] > 0):
        return 0.0
    sigma = sigma / sigma[0]
    if kind == "stable":
        return float(sigma.square().sum())
    if kind == "participation":
        return float(sigma.square().sum().square() / sigma.pow(4).sum())
    return float(torch.special.entr(sigma / sigma.sum()).sum().exp())
