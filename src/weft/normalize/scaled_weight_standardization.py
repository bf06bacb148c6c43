"""Standardise each filter to variance gain²/fan-in, so that networks without norm layers keep their signal's size.

Scaled weight standardisation as used by FedWon, Zhuang and Lyu, arXiv:2306.05879 (2024); introduced with
norm-free networks, Brock et al., arXiv:2101.08692 (2021).

    Ŵᵢ = s · gᵢ · (Wᵢ − mean(Wᵢ)) / sqrt(max(N · var(Wᵢ), ε))      Wᵢ: N weights of output i; gᵢ: learned, 1 at start
    s: makes up for an activation that shrinks variance (ReLU 1.7139588594, SiLU 1.7881293297, GELU 1.7015043497)

Differences from the paper and its code: the variance is biased and N is the true fan-in, as in the reference norm-free
networks; some ports use the unbiased variance, or all weights of the layer for N.
Complexity: O(elements) in each forward pass. Re-implemented from the equation (FedWon: no code published).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from weft.errors import RecipeError
from weft.function.protocol import FunctionMethod, WeightFunction, as_matrix
from weft.method import parameter

ACTIVATION_SCALES = {"relu": 1.7139588594436646, "silu": 1.7881293296813965, "gelu": 1.7015043497085571}


@dataclass(frozen=True)
class ScaledWeightStandardization:
    """Filters of zero mean and variance gain²/fan-in, for networks without norm layers.

    Source: arXiv:2306.05879, section 3.2.

    >>> import torch, weft
    >>> layer = torch.nn.Conv2d(3, 4, 3)
    >>> _ = weft.parametrize_(layer, ScaledWeightStandardization())
    >>> bool(torch.allclose(layer.weight.square().sum((1, 2, 3)), torch.ones(4), atol=1e-3))
    True
    """

    gain: bool = parameter(True, "learn one gain for each output")
    scale: float = parameter(1.0, "makes up for the activation: ReLU 1.71396, SiLU 1.78813, GELU 1.70150", minimum=0)
    eps: float = parameter(1e-4, "least fan-in times variance", minimum=0)

    def build(self, weight: Tensor, *, batched: bool) -> WeightFunction:
        """The function for one weight."""
        if weight[0].numel() // (weight.shape[1] if batched else 1) < 2:
            raise RecipeError(
                f"each output has one weight ({list(weight.shape)}), which has no variance; leave it out."
            )
        return _ScaledStandardize(self, weight, batched)


def scaled_standardize(weight: Tensor, gain: Tensor | None = None, *, scale: float = 1.0, eps: float = 1e-4) -> Tensor:
    """Rows of zero mean and norm gain · scale.

    Args:
        weight: (…, rows, n).
        gain: (…, rows), or None for ones.
        scale: multiplies all.
        eps: least n · variance.

    Returns:
        The same shape and dtype.

    >>> scaled_standardize(torch.tensor([[0.0, 2.0]]), eps=0).square().sum().item().__round__(6)
    1.0
    """
    n = weight.shape[-1]
    variance, mean = torch.var_mean(weight, dim=-1, keepdim=True, correction=0)
    factor = torch.rsqrt(variance.clamp_min(eps / n)) * (scale * n**-0.5)
    return (weight - mean) * (factor if gain is None else factor * gain.unsqueeze(-1))


class _ScaledStandardize(WeightFunction):
    def __init__(self, config: ScaledWeightStandardization, weight: Tensor, batched: bool):
        super().__init__()
        self.config = config
        self.batched = batched
        rows = weight.shape[:2] if batched else weight.shape[:1]
        self.gain = nn.Parameter(torch.ones(rows, dtype=weight.dtype)) if config.gain else None

    def forward(self, stored: Tensor) -> Tensor:
        rows = stored if self.batched else as_matrix(stored)
        made = scaled_standardize(rows, self.gain, scale=self.config.scale, eps=self.config.eps)
        return made if made.shape == stored.shape else made.reshape(stored.shape)


METHODS = (
    FunctionMethod(
        name="scaled_weight_standardization",
        family="normalize",
        config=ScaledWeightStandardization,
        summary="Filters of variance gain²/fan-in: networks without norm layers keep their signal's size.",
        goal="train",
        paper="fedwon",
        starts_at="transformed",
        checked_by=("closed form", "brute force"),
    ),
)
