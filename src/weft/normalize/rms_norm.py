"""Divide each token by its root mean square, and the two identities that turn a layer norm into this.

Pre-RMSNorm transformers, Jiang et al., arXiv:2305.14858 (2023); RMSNorm: Zhang and Sennrich, arXiv:1910.07467 (2019).

    RMS(x) = x / sqrt(mean(x²) + ε)        y = γ ⊙ RMS(x)        x, y: (…, d); γ: (d)
    LN(x) = RMS(x − mean(x))               with the same ε: the variance of x is the mean square of x − mean(x)
    C (W x + b) = (C W) x + C b            C = I − 11ᵀ/d takes the mean off what a layer writes

Differences from the paper and its code: none in the equations; half precision is normalised in float32.
Complexity: O(elements), one reduction where layer norm has two. Re-implemented from the equations (official code: MIT).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from weft.function.layer import LayerMethod
from weft.method import parameter
from weft.normalize._tokens import check_features, widened


@dataclass(frozen=True)
class RMSNormConfig:
    """Divide each token by its root mean square.

    >>> RMSNormConfig(eps=1e-6).build(4)
    RMSNorm(4, eps=1e-06)
    """

    eps: float = parameter(1e-5, "added to the mean square", minimum=0)

    def build(self, features: int) -> nn.Module:
        """The layer."""
        return RMSNorm(features, **asdict(self))


def rms_norm(x: Tensor, weight: Tensor | None = None, *, eps: float = 1e-5) -> Tensor:
    """Tokens of root mean square 1.

    Args:
        x: (…, d).
        weight: (d), multiplied in at the end.
        eps: added to the mean square.

    Returns:
        The shape and dtype of ``x``.

    >>> rms_norm(torch.full((1, 4), 3.0), eps=0)
    tensor([[1., 1., 1., 1.]])
    """
    wide = widened(x)
    total = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square()  # unlike x², makes no copy of the size of x
    y = wide * torch.rsqrt(total / x.shape[-1] + eps)
    return (y if weight is None else y * weight).to(x.dtype)


def center_output(weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Weights that write the same values with their mean taken off.

    Args:
        weight: (d, in): d is the axis over which the mean is taken. Give an embedding (tokens, d) transposed.
        bias: (d) or None.

    Returns:
        New weight and bias, computed in float64 and cast back.

    Source: arXiv:2305.14858, section 3.2.

    >>> center_output(torch.tensor([[1.0], [3.0]]))[0].tolist()
    [[-1.0], [1.0]]
    """
    wide = weight.double()
    centred = (wide - wide.mean(0, keepdim=True)).to(weight.dtype)
    return centred, None if bias is None else (bias.double() - bias.double().mean()).to(bias.dtype)


class RMSNorm(nn.Module):
    """A norm without mean and shift. On a stream of zero mean it equals layer norm.

    Args:
        features: d, the last axis.
        eps: added to the mean square.
        bias: add a shift at the end, as layer norm does.

    Source: arXiv:1910.07467, equation 4.

    >>> RMSNorm(4)(torch.ones(2, 3, 4)).shape
    torch.Size([2, 3, 4])
    """

    def __init__(self, features: int, *, eps: float = 1e-5, bias: bool = False):
        super().__init__()
        self.features = features
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(features))
        self.bias = nn.Parameter(torch.zeros(features)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """(…, d) -> (…, d)."""
        check_features(x, -1, self.features, "RMSNorm")
        y = rms_norm(x, self.weight, eps=self.eps)
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        """What ``print`` shows."""
        return f"{self.features}, eps={self.eps}"


METHODS = (
    LayerMethod(
        name="rms_norm",
        family="normalize",
        config=RMSNormConfig,
        layer=RMSNorm,
        summary="Each token divided by its root mean square: layer norm of a stream of zero mean.",
        goal="train",
        paper="crmsnorm",
        checked_by=("closed form", "torch"),
    ),
)
