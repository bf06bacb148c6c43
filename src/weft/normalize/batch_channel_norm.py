"""Batch norm followed by group norm, so that channels do not die; with running estimates it trains on tiny batches.

Batch-Channel Normalization, Qiao et al., arXiv:1911.09738 (2019) and arXiv:1903.10520 (2019).

    y = BN(x)                              a batch norm, with its own gain and shift for each channel
    z = γ_g (y − μ_ng) / sqrt(var_ng + ε) + β_g      sample n, group g of channels; one gain and shift a group

For micro-batches BN is replaced by an estimate, before x is normalised (no gradient through it):

    μ ← (1 − r) μ + r mean(x)              v ← (1 − r) v + r mean((x − μ_old)²)

x, y, z: (batch, channels, height, width); μ, v: (channels); γ_g, β_g: (groups).

Differences from the paper and its code: the rate r is an argument that starts at 0.1 and a buffer that a schedule may
set (``layer.rate.fill_``); the official buffer starts at 0, which silently keeps mean 0 and variance 1. Under gradient
checkpointing estimates move twice, as those of every batch norm.
Complexity: O(elements), two passes. Re-implemented from the equations (official code: no licence).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from weft.errors import ShapeError
from weft.function.layer import LayerMethod
from weft.method import parameter
from weft.normalize._tokens import check_features, widened


@dataclass(frozen=True)
class EstimatedBatchNormConfig:
    """Batch norm by running estimates, in training too.

    >>> EstimatedBatchNormConfig(rate=0.05).build(8)
    EstimatedBatchNorm2d(8, eps=1e-05)
    """

    rate: float = parameter(0.1, "how far one batch moves the estimates", minimum=0, maximum=1)
    eps: float = parameter(1e-5, "added to the variance", minimum=0)

    def build(self, features: int) -> nn.Module:
        """The layer."""
        return EstimatedBatchNorm2d(features, **asdict(self))


@dataclass(frozen=True)
class BatchChannelNormConfig:
    """Batch norm, then group norm.

    >>> type(BatchChannelNormConfig(groups=2).build(8)).__name__
    'BatchChannelNorm2d'
    """

    groups: int = parameter(1, "groups of channels; the paper's networks have 32", minimum=1)
    estimate: bool = parameter(False, "normalise by running estimates: for micro-batches")
    rate: float = parameter(0.1, "how far one batch moves the running statistics", minimum=0, maximum=1)
    eps: float = parameter(1e-5, "added to the variances", minimum=0)

    def build(self, features: int) -> nn.Module:
        """The layer."""
        return BatchChannelNorm2d(features, **asdict(self))


class EstimatedBatchNorm2d(nn.Module):
    """Batch norm whose statistics are running estimates, updated before they are used.

    Args:
        features: channels.
        rate: how far one batch moves the estimates; lower it along with the learning rate.
        eps: added to the variance.

    Source: arXiv:1911.09738, section 4.

    >>> EstimatedBatchNorm2d(3)(torch.ones(1, 3, 2, 2)).shape
    torch.Size([1, 3, 2, 2])
    """

    def __init__(self, features: int, *, rate: float = 0.1, eps: float = 1e-5):
        super().__init__()
        self.features = features
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(features))
        self.bias = nn.Parameter(torch.zeros(features))
        self.register_buffer("running_mean", torch.zeros(features))
        self.register_buffer("running_var", torch.ones(features))
        self.register_buffer("rate", torch.full((), rate))

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels, …) -> the same shape."""
        check_features(x, 1, self.features, "EstimatedBatchNorm2d")
        wide = widened(x)
        mean, variance = self.running_mean, self.running_var
        if self.training:
            mean, variance = self._estimate(wide.detach())
        shape = (1, -1, *[1] * (x.dim() - 2))
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return ((wide - mean.view(shape)) * scale.view(shape) + self.bias.view(shape)).to(x.dtype)

    @torch.no_grad()
    def _estimate(self, x: Tensor) -> tuple[Tensor, Tensor]:
        axes = [0, *range(2, x.dim())]
        rate = self.rate.to(x.dtype)
        old_mean, old_variance = self.running_mean.to(x.dtype), self.running_var.to(x.dtype)
        square = (x - old_mean.view(1, -1, *[1] * (x.dim() - 2))).square().mean(axes)
        # new tensors, not the buffers: a second call in the same step must not change what backward needs
        mean, variance = old_mean.lerp(x.mean(axes), rate), old_variance.lerp(square, rate)
        self.running_mean.copy_(mean)
        self.running_var.copy_(variance)
        return mean, variance

    def extra_repr(self) -> str:
        """What ``print`` shows."""
        return f"{self.features}, eps={self.eps}"


class BatchChannelNorm2d(nn.Module):
    """A batch norm in front of a group norm with one gain and shift a group.

    Args:
        features: channels.
        groups: groups of channels; must divide the channels.
        estimate: normalise by running estimates (:class:`EstimatedBatchNorm2d`), for batches of one or two images.
        rate: how far one batch moves the running statistics.
        eps: added to the variances.

    Raises:
        ShapeError: the groups do not divide the channels.

    Source: arXiv:1903.10520, section 5.

    >>> BatchChannelNorm2d(4, groups=2)(torch.randn(2, 4, 3, 3)).shape
    torch.Size([2, 4, 3, 3])
    """

    def __init__(self, features: int, *, groups: int = 1, estimate: bool = False, rate: float = 0.1, eps: float = 1e-5):
        super().__init__()
        if features % groups:
            raise ShapeError(f"{groups} groups do not divide {features} channels; choose a divisor.")
        self.features = features
        self.groups = groups
        self.eps = eps
        self.batch_norm: nn.Module = (
            EstimatedBatchNorm2d(features, rate=rate, eps=eps)
            if estimate
            else nn.BatchNorm2d(features, momentum=rate, eps=eps)
        )
        self.weight = nn.Parameter(torch.ones(groups))
        self.bias = nn.Parameter(torch.zeros(groups))

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels, height, width) -> the same shape."""
        check_features(x, 1, self.features, "BatchChannelNorm2d")
        size = self.features // self.groups
        weight, bias = (p.unsqueeze(1).expand(-1, size).reshape(-1) for p in (self.weight, self.bias))
        return functional.group_norm(self.batch_norm(x), self.groups, weight, bias, self.eps)

    def extra_repr(self) -> str:
        """What ``print`` shows."""
        return f"{self.features}, groups={self.groups}, eps={self.eps}"


METHODS = (
    LayerMethod(
        name="batch_channel_norm",
        family="normalize",
        config=BatchChannelNormConfig,
        layer=BatchChannelNorm2d,
        axis=1,
        space=2,
        keeps_statistics=True,
        training="The batch norm inside uses the batch's statistics.",
        summary="Batch norm, then group norm with one gain a group: channels do not die.",
        goal="train",
        paper="weight-standardization",
        checked_by=("closed form", "torch"),
    ),
    LayerMethod(
        name="estimated_batch_norm",
        family="normalize",
        config=EstimatedBatchNormConfig,
        layer=EstimatedBatchNorm2d,
        axis=1,
        space=2,
        keeps_statistics=True,
        training="Estimates move before they are used.",
        approximate="no gradient flows through the estimates, which the batch has moved",
        summary="Batch norm by running estimates in training too: works on one image a batch.",
        goal="train",
        paper="weight-standardization",
        checked_by=("brute force",),
    ),
)
