"""Divide features by the geometric mean of the last batches' mean squares, skip outliers, fold it away after training.

Unified Normalization, Yang et al., arXiv:2208.01313 (2022).

    q = mean(x²) over tokens; window: the last M values of q
    v = exp(mean(log window))              z = x / sqrt(v + ε)       y = γ ⊙ z + β
    u ← a u + (1 − a) v                    evaluation divides by sqrt(u + ε)
    outlier: mean(window) − exp(mean(log window)) > M · V,  V: variance of sqrt(window) before q entered it; then
    v = q for this batch, and the old u takes q's place in the window
    backward: r = sqrt((v + ε) / (u_old + ε)) in [1/5, 5], g = γ r ∂L/∂y, p = mean(g ⊙ z), p̄: mean of p's own window
    s ← a s + (1 − a) p̄                    ∂L/∂x = (g − s ⊙ z) / sqrt(v + ε)       ∂L/∂γ = Σ r z ∂L/∂y

x, y, z: (…, C); q, u, v, s, γ, β: (C). Before the window is full and while warming up, v = q and p̄ = p; r = 1 for the
first 1000 steps and in warm-up; an outlier has r = 1 and s = p.

Differences from the paper and its code: the outlier test is per channel, as the inequality behind it is, and a channel
skips alone; the code takes one variance over all channels, and one channel makes all skip (``pooled=True``). On a skip
the code moves u by the outlier itself, here by the window's geometric mean. Steps that use the batch's own statistics
have the exact gradient (s = p), where the code already uses the average. Padding counts in no mean, in the code only
not in the first. Statistics move in each forward and backward pass: twice under gradient checkpointing.
Complexity: O(elements); evaluation is a fixed scale and shift, see ``fuse_``. Re-implemented from the equations
(official code: Apache-2.0).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from weft.function.layer import LayerMethod
from weft.method import parameter
from weft.normalize._tokens import check_features, mean_over_tokens, widened
from weft.normalize.fold import fold_into_

_RATIO_STEPS = 1000  # steps before gradients are scaled by the ratio of the two norms
_RATIO_LIMIT = 5.0


@dataclass(frozen=True)
class UnifiedNormConfig:
    """Geometric-mean norm over the last batches.

    >>> UnifiedNormConfig(warmup=100).build(8)
    UnifiedNorm(8, window=4, warmup=100)
    """

    window: int = parameter(4, "batches in the geometric mean", minimum=1)
    warmup: int = parameter(
        4000, "steps that use the batch's own statistics: as many as the learning rate's", minimum=0
    )
    alpha: float = parameter(0.9, "how much of the running statistics a step keeps", minimum=0, maximum=1)
    outlier_filter: bool = parameter(True, "skip smoothing where a batch is an outlier; for text, better off")
    pooled: bool = parameter(False, "test outliers with one variance for all channels")
    eps: float = parameter(1e-5, "added to mean squares", minimum=0)

    def build(self, features: int) -> nn.Module:
        """The layer."""
        return UnifiedNorm(features, **asdict(self))


def geometric_mean(window: Tensor) -> Tensor:
    """(M, C) -> (C): the geometric mean of positive numbers; 0 where one is 0.

    >>> geometric_mean(torch.tensor([[1.0], [4.0]]))
    tensor([2.])
    """
    return window.log().mean(0).exp()


class _SmoothGradient(torch.autograd.Function):
    """(z, γ) -> γ z, with the smoothed gradient; its statistics move."""

    @staticmethod
    def forward(
        ctx: Any, z: Tensor, weight: Tensor, ratio: Tensor, exact: Tensor, skip: Tensor, slot: Tensor,
        valid: Tensor | None, window: Tensor, running: Tensor, alpha: float,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(z, weight, ratio, exact, skip, slot, valid)
        ctx.window, ctx.running, ctx.alpha = window, running, alpha
        return z * weight

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        z, weight, ratio, exact, skip, slot, valid = ctx.saved_tensors
        running, window = ctx.running.to(gradient.dtype), ctx.window.to(gradient.dtype)
        g = gradient * (weight * ratio)
        projection = mean_over_tokens(g * z, valid)
        filled = torch.where(slot, torch.where(skip, running, projection), window)
        smooth = running * ctx.alpha + (1 - ctx.alpha) * torch.where(exact, projection, filled.mean(0))
        taken = torch.where(exact, projection, smooth) * z
        if valid is not None:
            taken = taken * valid.unsqueeze(-1)
        ctx.window.copy_(filled)
        ctx.running.copy_(smooth)
        of_weight = (gradient * z * ratio).reshape(-1, z.shape[-1]).sum(0)
        return g - taken, of_weight, None, None, None, None, None, None, None, None


class UnifiedNorm(nn.Module):
    """Batch-wise norm by the geometric mean over a window of batches.

    Args:
        features: C, the last axis.
        window: batches in the geometric mean, M.
        warmup: steps that use the batch's own statistics.
        alpha: how much of the running statistics a step keeps.
        outlier_filter: skip smoothing where a batch is an outlier.
        pooled: test outliers with one variance for all channels; any channel then makes all skip.
        eps: added to mean squares.

    Source: arXiv:2208.01313, section 3.

    >>> UnifiedNorm(4)(torch.ones(2, 3, 4)).shape
    torch.Size([2, 3, 4])
    """

    def __init__(
        self,
        features: int,
        *,
        window: int = 4,
        warmup: int = 4000,
        alpha: float = 0.9,
        outlier_filter: bool = True,
        pooled: bool = False,
        eps: float = 1e-5,
    ):
        super().__init__()
        self.features = features
        self.window = window
        self.warmup = warmup
        self.alpha = alpha
        self.outlier_filter = outlier_filter
        self.pooled = pooled
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(features))
        self.bias = nn.Parameter(torch.zeros(features))
        self.register_buffer("running_square", torch.ones(features))
        self.register_buffer("running_projection", torch.zeros(features))
        self.register_buffer("squares", torch.ones(window, features))
        self.register_buffer("projections", torch.zeros(window, features))
        self.register_buffer("skipped", torch.zeros(features, dtype=torch.long))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """(…, C) -> (…, C); ``valid`` (…): true for tokens that are not padding."""
        check_features(x, -1, self.features, "UnifiedNorm")
        wide = widened(x)
        if not self.training:
            normal = wide * torch.rsqrt(self.running_square.to(wide.dtype) + self.eps) * self.weight
            return (normal + self.bias).to(x.dtype)
        square, ratio, exact, skip, slot = self._move(wide.detach(), valid)
        z = wide * torch.rsqrt(square + self.eps)
        y = _SmoothGradient.apply(
            z, self.weight, ratio, exact, skip, slot, valid, self.projections, self.running_projection, self.alpha
        )
        return (y + self.bias).to(x.dtype)

    @torch.no_grad()
    def _move(self, x: Tensor, valid: Tensor | None) -> tuple[Tensor, ...]:
        """The mean square to divide by, the gradient's ratio, and which channels use the batch's own statistics."""
        square = mean_over_tokens(x.square(), valid)
        running, window = self.running_square.to(x.dtype, copy=True), self.squares.to(x.dtype)
        slot = (torch.arange(self.window, device=x.device) == self.steps % self.window).unsqueeze(1)  # (M, 1)
        candidate = torch.where(slot, square, window)
        geometric = geometric_mean(candidate)
        early = (self.steps < self.window) | (self.steps + 1 < self.warmup)
        skip = torch.zeros_like(square, dtype=torch.bool)
        if self.outlier_filter and self.window > 1:
            roots = window.sqrt()
            spread = roots.var() if self.pooled else roots.var(0, correction=0)
            skip = (candidate.mean(0) - geometric > self.window * spread) & ~early
            skip = skip.any().expand_as(skip) if self.pooled else skip
        exact = early | skip | (self.window == 1)
        used = torch.where(exact, square, geometric)
        ratio = torch.sqrt((used + self.eps) / (running + self.eps)).clamp(1 / _RATIO_LIMIT, _RATIO_LIMIT)
        ratio = torch.where((self.steps < max(_RATIO_STEPS, self.warmup)) | skip, 1, ratio)
        self.running_square.copy_(running * self.alpha + (1 - self.alpha) * torch.where(early, square, geometric))
        self.squares.copy_(torch.where(slot & skip, running, candidate))
        self.skipped.add_(skip)
        self.steps.add_(1)
        return used, ratio, exact, skip, slot

    @torch.no_grad()
    def fuse_(self, linear: nn.Linear) -> nn.Identity:
        """Fold what evaluation does into the layer that reads the output; put the result in the norm's place.

        >>> norm, linear = UnifiedNorm(4), nn.Linear(4, 2)
        >>> norm = norm.fuse_(linear)
        """
        fold_into_(linear, self.weight * torch.rsqrt(self.running_square + self.eps), self.bias)
        return nn.Identity()

    def extra_repr(self) -> str:
        """What ``print`` shows."""
        return f"{self.features}, window={self.window}, warmup={self.warmup}"


METHODS = (
    LayerMethod(
        name="unified_norm",
        family="normalize",
        config=UnifiedNormConfig,
        layer=UnifiedNorm,
        keeps_statistics=True,
        training="Statistics of the batch while warming up, of a window of batches afterwards.",
        approximate="the gradient's projection is an average over steps",
        summary="Features divided by a geometric mean over the last batches, outliers skipped; folds into the next layer.",
        goal="train",
        paper="unified-norm",
        checked_by=("closed form", "brute force"),
    ),
)
