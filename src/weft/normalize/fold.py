"""Fold a fixed scale and shift of features into the linear layer that reads them.

    W (s ⊙ x + t) + b = (W diag(s)) x + (b + W t)

W: (out, in); s, t: (in); b: (out).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from weft.errors import RecipeError, ShapeError
from weft.function.classes import Carrier


def fold_affine(
    weight: Tensor, bias: Tensor | None, scale: Tensor, shift: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Weights that read plain features where they read scaled and shifted ones.

    Args:
        weight: (out, in).
        bias: (out), or None for zeros.
        scale: (in).
        shift: (in), or None for zeros.

    Returns:
        New weight (out, in) and bias (out), computed in float64 and cast back; the bias stays None without a shift.

    Raises:
        ShapeError: the scale has another length than the weight's second axis.

    >>> weight, bias = fold_affine(torch.ones(1, 2), None, torch.tensor([2.0, 3.0]), torch.tensor([1.0, 1.0]))
    >>> weight.tolist(), bias.tolist()
    ([[2.0, 3.0]], [2.0])
    """
    if weight.dim() != 2 or weight.shape[1] != scale.numel():
        raise ShapeError(
            f"A scale of {scale.numel()} features cannot be folded into a weight of shape {list(weight.shape)}; the "
            "layer must be the one that reads the norm's output."
        )
    wide = weight.double()
    folded = (wide * scale.double()).to(weight.dtype)
    if shift is None:
        return folded, bias
    offset = wide @ shift.double()
    return folded, (offset if bias is None else offset + bias.double()).to(weight.dtype)


@torch.no_grad()
def fold_into_(linear: nn.Linear, scale: Tensor, shift: Tensor | None = None) -> None:
    """:func:`fold_affine` on a layer, in place; a bias is made where one is needed.

    Raises:
        RecipeError: the layer is not a plain ``nn.Linear``.
        ShapeError: the scale does not fit.

    >>> layer = nn.Linear(2, 1, bias=False)
    >>> fold_into_(layer, torch.ones(2), torch.ones(2))
    >>> bool(torch.allclose(layer.bias, layer.weight.sum(1)))
    True
    """
    if not isinstance(linear, nn.Linear) or isinstance(linear, Carrier):
        raise RecipeError(
            f"A norm folds into a plain linear layer, got {type(linear).__name__}; "
            "bake computed weights first, and leave the norm in place before other layers."
        )
    weight, bias = fold_affine(linear.weight, linear.bias, scale, shift)
    linear.weight.copy_(weight)
    if bias is None:
        return
    if linear.bias is None:
        linear.bias = nn.Parameter(bias)
    else:
        linear.bias.copy_(bias)
