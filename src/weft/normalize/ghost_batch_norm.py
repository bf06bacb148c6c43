"""Batch norm over small parts of a large batch, and the two rules that let large batches generalise.

Train longer, generalize better, Hoffer et al., arXiv:1705.08741 (2017).

    ghost batch norm: each part k of B samples is normalised by its own mean and variance;
    running statistics move part by part: μ ← (1 − m)^K μ + Σ_k (1 − m)^(K − k) m μ_k
    learning rate: η_L = sqrt(B_L / B_S) η_S      keeps the covariance of a step
    regime: epochs and their boundaries times B_L / B_S      keeps the number of steps

Differences from the paper and its code: parts are split inside the layer; the official script runs each part through
the whole network, which is the same where batch norm is the only tie between samples. What is left over joins the last
part, and a batch smaller than two parts is one part; the code takes a plain mean of unequal parts.
Complexity: that of batch norm. Re-implemented from the equations (official code: MIT).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from weft.errors import RecipeError, ShapeError
from weft.function.layer import LayerMethod
from weft.method import parameter
from weft.normalize._tokens import check_features, widened


@dataclass(frozen=True)
class GhostBatchNorm1dConfig:
    """Batch norm over parts of the batch, for (batch, features) or (batch, features, length).

    >>> GhostBatchNorm1dConfig(ghost_size=32).build(8)
    GhostBatchNorm1d(8, ghost_size=32, momentum=0.1, eps=1e-05)
    """

    ghost_size: int = parameter(128, "samples in each part", minimum=1)
    momentum: float = parameter(0.1, "how far one part moves the running statistics", minimum=0, maximum=1)
    eps: float = parameter(1e-5, "added to the variance", minimum=0)

    def build(self, features: int) -> nn.Module:
        """The layer."""
        return GhostBatchNorm1d(features, **asdict(self))


@dataclass(frozen=True)
class GhostBatchNorm2dConfig(GhostBatchNorm1dConfig):
    """Batch norm over parts of the batch, for images.

    >>> GhostBatchNorm2dConfig().build(8)
    GhostBatchNorm2d(8, ghost_size=128, momentum=0.1, eps=1e-05)
    """

    def build(self, features: int) -> nn.Module:
        """The layer."""
        return GhostBatchNorm2d(features, **asdict(self))


def scale_learning_rate(learning_rate: float, batch: int, reference: int, rule: str = "sqrt") -> float:
    """The learning rate for another batch size.

    Args:
        learning_rate: what works at ``reference``.
        batch, reference: the two batch sizes.
        rule: "sqrt" keeps the covariance of a step, "linear" its mean over the same samples.

    Raises:
        RecipeError: an unknown rule, or a batch without samples.

    Source: arXiv:1705.08741, section 4.

    >>> scale_learning_rate(0.1, 4096, 256)
    0.4
    """
    if rule not in ("sqrt", "linear") or batch < 1 or reference < 1:
        raise RecipeError(f'rule must be "sqrt" or "linear" and batches positive, got {rule!r}, {batch}, {reference}.')
    ratio = batch / reference
    return learning_rate * (ratio**0.5 if rule == "sqrt" else ratio)


def adapt_regime(boundaries: Sequence[int], epochs: int, batch: int, reference: int) -> tuple[tuple[int, ...], int]:
    """Boundaries of the learning rate's phases and the last epoch, for as many steps as at the reference batch size.

    Args:
        boundaries: epochs at which the learning rate changes, and ``epochs`` in all, at ``reference``.
        batch, reference: the two batch sizes.

    Returns:
        New boundaries and number of epochs; parts of an epoch are rounded up.

    Source: arXiv:1705.08741, section 5.

    >>> adapt_regime([80, 120], 160, batch=512, reference=128)
    ((320, 480), 640)
    """
    if batch < 1 or reference < 1:
        raise RecipeError(f"batches must be positive, got {batch} and {reference}.")
    return tuple(-(-b * batch // reference) for b in boundaries), -(-epochs * batch // reference)


class GhostBatchNorm1d(nn.Module):
    """Batch norm over parts of the batch.

    Args:
        features: channels, axis 1.
        ghost_size: samples in each part.
        momentum: how far one part moves the running statistics.
        eps: added to the variance.

    Raises:
        ShapeError: in training, a part with one value a channel, which has no variance.

    Source: arXiv:1705.08741, algorithm 1.

    >>> GhostBatchNorm1d(3, ghost_size=2)(torch.randn(8, 3)).shape
    torch.Size([8, 3])
    """

    def __init__(self, features: int, *, ghost_size: int = 128, momentum: float = 0.1, eps: float = 1e-5):
        super().__init__()
        self.features = features
        self.ghost_size = ghost_size
        self.momentum = momentum
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(features))
        self.bias = nn.Parameter(torch.zeros(features))
        self.register_buffer("running_mean", torch.zeros(features))
        self.register_buffer("running_var", torch.ones(features))

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels, …) -> the same shape."""
        check_features(x, 1, self.features, type(self).__name__)
        wide = widened(x)
        if not self.training:
            mean, variance, weight, bias = (
                s.to(wide.dtype) for s in (self.running_mean, self.running_var, self.weight, self.bias)
            )
            return functional.batch_norm(wide, mean, variance, weight, bias, eps=self.eps).to(x.dtype)
        size = self.ghost_size
        count = max(1, len(x) // size)
        equal = count if len(x) == count * size else count - 1  # parts of exactly ``size``
        parts = [wide[equal * size :].unsqueeze(0)] if equal < count else []
        if equal:
            parts.insert(0, wide[: equal * size].unflatten(0, (equal, size)))
        return torch.cat([self._normalize(p).flatten(0, 1) for p in parts]).to(x.dtype)

    def _normalize(self, parts: Tensor) -> Tensor:
        """(parts, samples, channels, …): each part by its own statistics."""
        axes = [1, *range(3, parts.dim())]
        values = parts[0].numel() // self.features
        if values < 2:
            raise ShapeError(
                f"A ghost batch of shape {list(parts[0].shape)} has one value a channel, which has no variance; "
                "use larger ghost batches in training."
            )
        variance, mean = torch.var_mean(parts, dim=axes, correction=0)  # (parts, channels)
        self._move(mean.detach(), variance.detach() * (values / (values - 1)))
        return self._affine(parts, mean, variance)

    def _affine(self, parts: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
        shape = (-1, 1, self.features, *[1] * (parts.dim() - 3))
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return (parts - mean.reshape(shape)) * scale.reshape(shape) + self.bias.reshape(shape[1:])

    @torch.no_grad()
    def _move(self, mean: Tensor, variance: Tensor) -> None:
        """Running statistics, as if the parts had come one after another."""
        keep = 1 - self.momentum
        powers = range(len(mean) - 1, -1, -1)
        shares = torch.tensor([self.momentum * keep**k for k in powers], dtype=mean.dtype, device=mean.device)
        for running, parts in ((self.running_mean, mean), (self.running_var, variance)):
            running.copy_(running * keep ** len(parts) + shares @ parts)

    def extra_repr(self) -> str:
        """What ``print`` shows."""
        return f"{self.features}, ghost_size={self.ghost_size}, momentum={self.momentum}, eps={self.eps}"


class GhostBatchNorm2d(GhostBatchNorm1d):
    """:class:`GhostBatchNorm1d` for images, (batch, channels, height, width).

    >>> GhostBatchNorm2d(3, ghost_size=2)(torch.randn(8, 3, 4, 4)).shape
    torch.Size([8, 3, 4, 4])
    """


_TRAINING = "Each part of the batch is normalised by its own statistics."
METHODS = (
    LayerMethod(
        name="ghost_batch_norm",
        family="normalize",
        config=GhostBatchNorm1dConfig,
        layer=GhostBatchNorm1d,
        axis=1,
        keeps_statistics=True,
        training=_TRAINING,
        summary="Batch norm over small parts of a large batch.",
        goal="train",
        paper="ghost-batch-norm",
        checked_by=("closed form", "torch"),
    ),
    LayerMethod(
        name="ghost_batch_norm_2d",
        family="normalize",
        config=GhostBatchNorm2dConfig,
        layer=GhostBatchNorm2d,
        axis=1,
        space=2,
        keeps_statistics=True,
        training=_TRAINING,
        summary="Batch norm over small parts of a large batch of images.",
        goal="train",
        paper="ghost-batch-norm",
        checked_by=("closed form", "torch"),
    ),
)
