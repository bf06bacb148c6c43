"""Root-mean-square norm of tokens stored without their last feature, which zero mean makes redundant.

Pre-CRMSNorm transformers, Jiang et al., arXiv:2305.14858 (2023).

    x of zero mean:  x_d = −Σ_{i<d} x_i, so d − 1 features say all:
    CRMS(x₁…x_{d−1}) = x / sqrt((Σ x² + (Σ x)²) / d + ε)         equals RMS(x₁…x_d) without its last feature
    writers: drop the last row;   readers: A x = A' x₁…x_{d−1},  A' = A[:, :−1] − A[:, −1:]

x: (…, d − 1). The gain γ is folded into the readers before, since it would break the zero mean.

Differences from the paper and its code: the layer has an optional gain of its own, for training from scratch.
Complexity: O(elements). Re-implemented from the equations (official code: MIT).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from weft.function.layer import LayerMethod
from weft.method import parameter
from weft.normalize._tokens import check_features, widened


@dataclass(frozen=True)
class CRMSNormConfig:
    """Norm of tokens of zero mean that are stored without their last feature.

    >>> CRMSNormConfig().build(7)
    CRMSNorm(7, eps=1e-05)
    """

    eps: float = parameter(1e-5, "added to the mean square", minimum=0)
    affine: bool = parameter(True, "learn a gain")

    def build(self, features: int) -> nn.Module:
        """The layer for tokens stored with so many features, one fewer than they have."""
        return CRMSNorm(features, **asdict(self))


def crms_norm(x: Tensor, weight: Tensor | None = None, *, eps: float = 1e-5) -> Tensor:
    """The RMS norm of tokens whose last feature is minus the sum of the others.

    Args:
        x: (…, d − 1).
        weight: (d − 1), multiplied in at the end.
        eps: added to the mean square over d features.

    Returns:
        The shape and dtype of ``x``.

    Source: arXiv:2305.14858, equation 6.

    >>> crms_norm(torch.tensor([1.0]), eps=0)
    tensor([1.])
    """
    wide = widened(x)
    squares = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square()  # unlike x², makes no copy of the size of x
    total = squares + wide.sum(-1, keepdim=True).square()
    y = wide * torch.rsqrt(total / (x.shape[-1] + 1) + eps)
    return (y if weight is None else y * weight).to(x.dtype)


def restore_feature(x: Tensor) -> Tensor:
    """(…, d − 1) -> (…, d): the feature that was left out put back.

    >>> restore_feature(torch.tensor([1.0, 2.0]))
    tensor([ 1.,  2., -3.])
    """
    return torch.cat([x, -x.sum(-1, keepdim=True)], dim=-1)


def drop_input(weight: Tensor) -> Tensor:
    """(out, d) -> (out, d − 1): a reader of tokens of zero mean for tokens stored without their last feature.

    >>> drop_input(torch.tensor([[5.0, 3.0]]))
    tensor([[2.]])
    """
    return weight[..., :-1] - weight[..., -1:]


class CRMSNorm(nn.Module):
    """RMS norm at width d − 1.

    Args:
        features: d − 1, the last axis.
        eps: added to the mean square.
        affine: learn a gain.

    Source: arXiv:2305.14858, section 3.3.

    >>> CRMSNorm(3)(torch.ones(2, 3)).shape
    torch.Size([2, 3])
    """

    def __init__(self, features: int, *, eps: float = 1e-5, affine: bool = True):
        super().__init__()
        self.features = features
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(features)) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        """(…, d − 1) -> (…, d − 1)."""
        check_features(x, -1, self.features, "CRMSNorm")
        return crms_norm(x, self.weight, eps=self.eps)

    def extra_repr(self) -> str:
        """What ``print`` shows."""
        return f"{self.features}, eps={self.eps}"


METHODS = (
    LayerMethod(
        name="crms_norm",
        family="normalize",
        config=CRMSNormConfig,
        layer=CRMSNorm,
        summary="RMS norm for tokens of zero mean that are stored without their last feature.",
        goal="train",
        paper="crmsnorm",
        checked_by=("closed form",),
    ),
)
