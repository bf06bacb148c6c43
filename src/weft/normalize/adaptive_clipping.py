"""Clip the gradient of each unit to a share of the unit's own norm.

Adaptive gradient clipping as used by FedWon, Zhuang and Lyu, arXiv:2306.05879 (2024); introduced with norm-free
networks, Brock et al., arXiv:2102.06171 (2021).

    Gᵢ ← c · max(|Wᵢ|, ε) / |Gᵢ| · Gᵢ        where |Gᵢ| > c · max(|Wᵢ|, ε)

Wᵢ, Gᵢ: weights and gradient of unit i: a row of a matrix, a filter of a convolution, one of fused experts; a bias or
gain is one unit.

Differences from the paper and its code: none in the equation; layers to leave out are chosen by selectors, with all
that lies below them. Units below their limit keep their gradients bit for bit.
Complexity: O(parameters). Re-implemented from the equation (official code of norm-free networks: Apache-2.0).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from weft.errors import RecipeError
from weft.function.where import Selector, matches


@torch.no_grad()
def clip_grad_adaptive_(
    parameters: nn.Module | Tensor | Iterable[Tensor],
    clip: float = 0.01,
    *,
    eps: float = 1e-3,
    exclude: Selector = (),
) -> Tensor:
    """Clip gradients in place, between ``backward`` and the optimizer's step.

    Args:
        parameters: a model, or tensors with gradients.
        clip: largest norm of a gradient as a share of its unit's norm; larger batches want smaller ones.
        eps: norms of units count as at least this, so that units at zero can move.
        exclude: layers of a model to leave alone, usually the classifier: ``exclude="head"``.

    Returns:
        The share of units that were clipped, a tensor without axes.

    Raises:
        RecipeError: ``clip`` is not positive, or ``exclude`` came without a model.

    Source: arXiv:2102.06171, equation 3.

    >>> layer = nn.Linear(2, 1, bias=False)
    >>> layer.weight.data, layer.weight.grad = torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 2.0]])
    >>> clip_grad_adaptive_(layer, 0.1), layer.weight.grad
    (tensor(1.), tensor([[0.0000, 0.5000]]))
    """
    if clip <= 0:
        raise RecipeError(f"clip must be positive, got {clip}; the paper tunes it between 0.01 and 1.28.")
    if not isinstance(parameters, nn.Module) and exclude != ():
        raise RecipeError("exclude names layers, so it needs a model, not a list of tensors.")
    clipped, units = torch.zeros(()), 0
    for weight in _tensors(parameters, exclude):
        if weight.grad is None:
            continue
        limit = clip * _unit_norm(weight).clamp_min(eps)
        norm = _unit_norm(weight.grad)
        over = norm > limit
        ratio = torch.where(over, limit / norm.clamp_min(torch.finfo(norm.dtype).tiny), 1).to(weight.grad.dtype)
        weight.grad.mul_(ratio)  # times exactly 1 for units below their limit
        clipped = clipped.to(over.device) + over.sum()
        units += over.numel()
    return clipped / max(units, 1)


def _unit_norm(tensor: Tensor) -> Tensor:
    """(units, …) -> (units, 1, …): the norm of each unit, in float32 at least."""
    axes = tuple(range(1, tensor.dim())) if tensor.dim() > 1 else None
    wide = torch.promote_types(tensor.dtype, torch.float32)
    return torch.linalg.vector_norm(tensor, dim=axes, keepdim=True, dtype=wide)


def _tensors(parameters: nn.Module | Tensor | Iterable[Tensor], exclude: Selector) -> list[Tensor]:
    if isinstance(parameters, Tensor):
        return [parameters]
    if not isinstance(parameters, nn.Module):
        return list(parameters)
    left_out = {id(p) for n, m in parameters.named_modules() if matches(exclude, n, m) for p in m.parameters()}
    return [p for p in parameters.parameters() if id(p) not in left_out]
