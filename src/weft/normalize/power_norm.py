"""Divide features by a running root mean square over the batch: batch norm that works on text, folded away after.

PowerNorm, Shen et al., arXiv:2003.07845 (2020).

    x̂ = x / sqrt(ψ² + ε)         y = γ ⊙ x̂ + β         then ψ² ← a ψ² + (1 − a) mean(x²)
    backward, g = γ ⊙ ∂L/∂y:     ∂L/∂x = (g − ν ⊙ x̂) / sqrt(ψ² + ε)
                                 then ν ← ν (1 − (1 − a) Γ) + (1 − a) Λ,  Γ = mean(x̂²),  Λ = mean(g ⊙ x̂)

Means run over all valid tokens of the batch; x, y: (…, C); ψ², ν, γ, β: (C). While warming up, the batch's own mean
square and Λ stand for ψ² and ν, so that the gradient is exact, and ψ² is the plain average of what was seen.

Differences from the paper and its code: the backward pass divides by the running statistic, as the paper does and the
code does not; warming up has the exact gradient, where the code approximates there, too, and moves ψ² twice; the
factor of ν stays at or above 0, so that a jump of the input (Γ > 1/(1 − a)) cannot make it diverge. ``groups`` (each
token divided by its groups' root mean squares first) is only in the code and off unless asked for. ψ² moves in each
forward pass and ν in each backward pass: twice under gradient checkpointing; statistics are those of one process.
Complexity: O(elements); evaluation is a fixed scale and shift, see ``fuse_``. Re-implemented from the equations
(official code: GPL-3.0).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from weft.errors import RecipeError, ShapeError
from weft.function.layer import LayerMethod
from weft.method import parameter
from weft.normalize._tokens import check_features, mean_over_tokens, widened
from weft.normalize.fold import fold_into_


@dataclass(frozen=True)
class PowerNormConfig:
    """Running quadratic-mean norm over the batch.

    >>> PowerNormConfig(warmup=100).build(8)
    PowerNorm(8, warmup=100, groups=0)
    """

    alpha_forward: float = parameter(0.9, "how much of the running mean square a step keeps", minimum=0, maximum=1)
    alpha_backward: float = parameter(
        0.9, "how much of the running gradient statistic a step keeps", minimum=0, maximum=1
    )
    warmup: int = parameter(1000, "steps that use the batch's own statistics", minimum=0)
    groups: int = parameter(
        0, "first divide each token by the root mean square of so many groups; 0: do not", minimum=0
    )
    eps: float = parameter(1e-5, "added to mean squares", minimum=0)

    def build(self, features: int) -> nn.Module:
        """The layer."""
        return PowerNorm(features, **asdict(self))


class _SmoothGradient(torch.autograd.Function):
    """x̂ -> x̂; its gradient loses ν x̂, and ν moves."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, nu: Tensor, warming: Tensor, valid: Tensor | None, alpha: float) -> Tensor:
        ctx.save_for_backward(x, warming, valid)
        ctx.nu, ctx.alpha = nu, alpha  # not saved: a second use in the same step may move it before this one's backward
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        x, warming, valid = ctx.saved_tensors
        nu = ctx.nu.to(gradient.dtype)
        projection = mean_over_tokens(gradient * x, valid)
        keep = (1 - (1 - ctx.alpha) * mean_over_tokens(x.square(), valid)).clamp_min(0)
        taken = torch.where(warming, projection, nu) * x
        if valid is not None:
            taken = taken * valid.unsqueeze(-1)
        ctx.nu.copy_(nu * keep + (1 - ctx.alpha) * projection)
        return gradient - taken, None, None, None, None


class PowerNorm(nn.Module):
    """Batch-wise norm by running mean squares.

    Args:
        features: C, the last axis.
        alpha_forward, alpha_backward: how much of the running statistics a step keeps.
        warmup: steps that use the batch's own statistics.
        groups: divide each token by the root mean square of so many groups of features first; 0: do not.
        eps: added to mean squares.

    Raises:
        ShapeError: the groups do not divide the features.

    Source: arXiv:2003.07845, algorithms 1 and 2.

    >>> PowerNorm(4)(torch.ones(2, 3, 4)).shape
    torch.Size([2, 3, 4])
    """

    def __init__(
        self,
        features: int,
        *,
        alpha_forward: float = 0.9,
        alpha_backward: float = 0.9,
        warmup: int = 1000,
        groups: int = 0,
        eps: float = 1e-5,
    ):
        super().__init__()
        if groups and features % groups:
            raise ShapeError(f"{groups} groups do not divide {features} features; choose a divisor.")
        self.features = features
        self.alpha_forward = alpha_forward
        self.alpha_backward = alpha_backward
        self.warmup = warmup
        self.groups = groups
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(features))
        self.bias = nn.Parameter(torch.zeros(features))
        self.register_buffer("running_square", torch.ones(features))
        self.register_buffer("running_projection", torch.zeros(features))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """(…, C) -> (…, C); ``valid`` (…): true for tokens that are not padding."""
        check_features(x, -1, self.features, "PowerNorm")
        wide = widened(x)
        if self.groups:
            split = wide.unflatten(-1, (self.groups, -1))
            wide = (split * torch.rsqrt(split.square().mean(-1, keepdim=True) + self.eps)).flatten(-2)
        if self.training:
            warming = self.steps < self.warmup
            square = self._move(wide.detach(), valid, warming)
            normal = wide * torch.rsqrt(square + self.eps)
            normal = _SmoothGradient.apply(normal, self.running_projection, warming, valid, self.alpha_backward)
        else:
            normal = wide * torch.rsqrt(self.running_square.to(wide.dtype) + self.eps)
        return (normal * self.weight + self.bias).to(x.dtype)

    @torch.no_grad()
    def _move(self, x: Tensor, valid: Tensor | None, warming: Tensor) -> Tensor:
        """The mean square to divide by; the running one moves behind it."""
        square = mean_over_tokens(x.square(), valid)
        running = self.running_square.to(x.dtype, copy=True)
        share = torch.where(warming, 1 / (self.steps + 1).to(x.dtype), 1 - self.alpha_forward)
        self.running_square.copy_(running.lerp(square, share))
        self.steps.add_(1)
        return torch.where(warming, square, running)

    @torch.no_grad()
    def fuse_(self, linear: nn.Linear) -> nn.Identity:
        """Fold what evaluation does into the layer that reads the output; put the result in the norm's place.

        Raises:
            RecipeError: the norm divides each token by its groups' root mean squares, which no matrix does.

        >>> norm, linear = PowerNorm(4), nn.Linear(4, 2)
        >>> norm = norm.fuse_(linear)
        """
        if self.groups:
            raise RecipeError(
                f"{self.groups} groups are normalised for each token, which cannot be folded; keep the norm."
            )
        fold_into_(linear, self.weight * torch.rsqrt(self.running_square + self.eps), self.bias)
        return nn.Identity()

    def extra_repr(self) -> str:
        """What ``print`` shows."""
        return f"{self.features}, warmup={self.warmup}, groups={self.groups}"


METHODS = (
    LayerMethod(
        name="power_norm",
        family="normalize",
        config=PowerNormConfig,
        layer=PowerNorm,
        keeps_statistics=True,
        training="Statistics of the batch while warming up, running ones from the steps before afterwards.",
        approximate="the gradient of the running mean square is replaced by a running estimate",
        summary="Features divided by a running root mean square over the batch; folds into the next layer.",
        goal="train",
        paper="power-norm",
        checked_by=("closed form", "brute force"),
    ),
)
