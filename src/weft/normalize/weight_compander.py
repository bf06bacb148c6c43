"""Make each weight a squashing function of a latent: none dominates, and small ones spread.

Weight Compander, Eichenberg et al., arXiv:2306.16993 (2023).

    W = a · φ(V / b)        φ = arctan (bound π/2), tanh or softsign (bound 1); a, b > 0, learned as log a and log b
    V = b · φ⁻¹(W / a)      start: a = scale · std(W₀), b = a / expansion, so the slope at 0 is the expansion

W, V: any shape, elementwise; a, b: (1), one pair a matrix.

Differences from the paper and its code: no code was published, and the exact published function could not be
confirmed, so φ is an argument with arctan as the default. Weights beyond 99.9% of the bound are clamped to it when the
function is attached; ``function.clamped`` is their number. Keep log a and log b out of weight decay.
Complexity: O(elements) in each forward pass; nothing once baked. Re-implemented from the equations (no official code).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from weft.function.protocol import FunctionMethod, WeightFunction
from weft.method import parameter

_INSIDE = 0.999  # of the bound: the inverse is infinite at it
BOUNDS = {"arctan": math.pi / 2, "tanh": 1.0, "softsign": 1.0}


@dataclass(frozen=True)
class WeightCompander:
    """Bounded weights, a · φ(V / b).

    Source: arXiv:2306.16993.

    >>> import torch, weft
    >>> layer = torch.nn.Linear(6, 4)
    >>> before = layer.weight.detach().clone()
    >>> _ = weft.parametrize_(layer, WeightCompander())
    >>> bool(torch.allclose(layer.weight, before, atol=1e-6))
    True
    """

    function: str = parameter("arctan", "the squashing function", choices=tuple(BOUNDS))
    scale: float = parameter(4.0, "a in standard deviations of the weight", minimum=1e-3)
    expansion: float = parameter(1.0, "slope at zero; above 1 small weights move faster", minimum=1e-3)
    learn: bool = parameter(True, "learn a and b")

    def build(self, weight: Tensor, *, batched: bool) -> WeightFunction:
        """The function for one weight."""
        return _Compander(self, weight, batched)


def compand(latent: Tensor, a: Tensor | float, b: Tensor | float, function: str = "arctan") -> Tensor:
    """a · φ(latent / b), of magnitude below a times the bound of φ.

    >>> compand(torch.tensor([0.0, 1e9]), 1.0, 1.0, "tanh")
    tensor([0., 1.])
    """
    inner = latent / b
    if function == "arctan":
        return a * inner.arctan()
    return a * (inner.tanh() if function == "tanh" else functional.softsign(inner))


def expand(weight: Tensor, a: Tensor | float, b: Tensor | float, function: str = "arctan") -> Tensor:
    """The latent of a weight, clamped to 99.9% of the bound: the inverse of :func:`compand`.

    >>> expand(compand(torch.tensor([0.5]), 1.0, 2.0), 1.0, 2.0)
    tensor([0.5000])
    """
    limit = _INSIDE * BOUNDS[function]
    inner = (weight / a).clamp(-limit, limit)
    if function == "arctan":
        return b * inner.tan()
    return b * (inner.atanh() if function == "tanh" else inner / (1 - inner.abs()))


class _Compander(WeightFunction):
    def __init__(self, config: WeightCompander, weight: Tensor, batched: bool):
        super().__init__()
        self.config = config
        axes = (-2, -1) if batched else tuple(range(weight.dim()))
        spread = weight.float().std(axes, keepdim=True, correction=0)
        a = config.scale * torch.where(spread > 0, spread, torch.ones_like(spread))
        # (1), and not a scalar: fully sharded training cannot split a tensor without axes
        a = (a if batched else a.reshape(1)).to(weight.dtype)
        b = a / config.expansion
        self.clamped = 0 if weight.is_meta else int((weight.abs() > _INSIDE * BOUNDS[config.function] * a).sum())
        if config.learn:
            self.log_a, self.log_b = nn.Parameter(a.log()), nn.Parameter(b.log())
        else:
            self.register_buffer("log_a", a.log())
            self.register_buffer("log_b", b.log())

    def forward(self, stored: Tensor) -> Tensor:
        return compand(stored, self.log_a.exp(), self.log_b.exp(), self.config.function)

    def right_inverse(self, weight: Tensor) -> Tensor:
        return expand(weight, self.log_a.exp(), self.log_b.exp(), self.config.function)


METHODS = (
    FunctionMethod(
        name="weight_compander",
        family="normalize",
        config=WeightCompander,
        summary="Each weight a learned squashing function of a latent: bounded, and spread away from zero.",
        goal="train",
        paper="weight-compander",
        starts_at="weight",
        checked_by=("closed form",),
    ),
)
