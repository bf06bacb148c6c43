"""Give every filter zero mean and unit variance, so that networks with group norm train at one image a batch.

Weight Standardization, Qiao et al., arXiv:1903.10520 (2019).

    Ŵᵢ = (Wᵢ − mean(Wᵢ)) / sqrt(var(Wᵢ) + ε)        Wᵢ: all weights of output i, (out, in, …) -> rows of in·…

Differences from the paper and its code: the authors' two repositories use the unbiased variance, once with ε outside
the root; here it is the biased variance with ε inside, as the models trained by others with this method use it
(``unbiased=True`` gives the variant with ε inside).
Complexity: O(elements) in each forward pass. Re-implemented from the equation (official code: no licence).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional

from weft.errors import RecipeError
from weft.function.protocol import FunctionMethod, WeightFunction, as_matrix
from weft.method import parameter


@dataclass(frozen=True)
class WeightStandardization:
    """Standardise each output's weights; put it on convolutions that a normalisation layer follows.

    Source: arXiv:1903.10520, equation 5.

    >>> import torch, weft
    >>> layer = torch.nn.Conv2d(3, 4, 3)
    >>> _ = weft.parametrize_(layer, WeightStandardization())
    >>> bool(layer.weight.var(dim=(1, 2, 3), unbiased=False).sub(1).abs().max() < 1e-2)
    True
    """

    eps: float = parameter(1e-5, "added to the variance", minimum=0)
    unbiased: bool = parameter(False, "divide by n - 1 in the variance")

    def build(self, weight: Tensor, *, batched: bool) -> WeightFunction:
        """The function for one weight."""
        if math.prod(weight.shape[2 if batched else 1 :]) < 2:
            raise RecipeError(
                f"each output has one weight ({list(weight.shape)}), which has no variance; leave it out."
            )
        return _Standardize(self, batched)


def standardize(weight: Tensor, *, eps: float = 1e-5, unbiased: bool = False) -> Tensor:
    """Rows with zero mean and unit variance.

    Args:
        weight: (…, rows, n).
        eps: added to the variance; 0 is for rows that vary.
        unbiased: divide by n − 1 in the variance.

    Returns:
        The same shape and dtype.

    >>> import torch
    >>> standardize(torch.tensor([[1.0, 3.0]]), eps=0)
    tensor([[-1.,  1.]])
    """
    n = weight.shape[-1]
    if not unbiased:
        return functional.layer_norm(weight, (n,), eps=eps)
    less = (n - 1) / n  # the biased variance as a share of the unbiased one
    return functional.layer_norm(weight, (n,), eps=eps * less) * math.sqrt(less)


class _Standardize(WeightFunction):
    def __init__(self, config: WeightStandardization, batched: bool):
        super().__init__()
        self.config = config
        self.batched = batched

    def forward(self, stored: Tensor) -> Tensor:
        rows = stored if self.batched else as_matrix(stored)
        return standardize(rows, eps=self.config.eps, unbiased=self.config.unbiased).reshape(stored.shape)


METHODS = (
    FunctionMethod(
        name="weight_standardization",
        family="normalize",
        config=WeightStandardization,
        summary="Zero mean and unit variance for the weights of each output.",
        goal="train",
        paper="weight-standardization",
        starts_at="transformed",
        checked_by=("closed form",),
    ),
)
