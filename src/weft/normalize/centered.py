"""Layers without mean for models whose residual stream has none: where the mean cannot be taken off weights.

Pre-RMSNorm and Pre-CRMSNorm Transformers, Jiang et al., arXiv:2305.14858 (2023), whose converter is
:func:`weft.normalize.convert_to_rms_`; these layers are ours, for tied tables and norms on embeddings.

    y = C f(x), C = I − 11ᵀ/d         f: rows of a table, or a layer norm;  narrow: without the last of the d features
    y = γ ⊙ [CRMS(x), −Σ CRMS(x)] + β                                       x: (…, d − 1);  y, γ, β: (d)

Complexity: O(elements), one pass more than the plain layer.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from weft.normalize.crms_norm import crms_norm, restore_feature


class CenteredEmbedding(nn.Embedding):
    """An embedding whose rows lose their mean when they are looked up, and their last feature if ``narrow``.

    For a table that something else reads as well, such as a tied output head: the table stays as it is.

    >>> table = CenteredEmbedding(5, 4)
    >>> bool(table(torch.tensor([1])).sum().abs() < 1e-6)
    True
    """

    narrow = False

    def forward(self, input: Tensor) -> Tensor:
        """(…) -> (…, d) or (…, d − 1)."""
        rows = functional.embedding(input, self.weight, self.padding_idx)
        centred = rows - rows.mean(-1, keepdim=True)
        return centred[..., :-1] if self.narrow else centred


class CenteredLayerNorm(nn.LayerNorm):
    """A layer norm whose output loses its mean, and its last feature if ``narrow``.

    For one that makes the residual stream, as norms on embeddings do.

    >>> bool(CenteredLayerNorm(4)(torch.randn(2, 4)).sum().abs() < 1e-5)
    True
    """

    narrow = False

    def forward(self, input: Tensor) -> Tensor:
        """(…, d) -> (…, d) or (…, d − 1)."""
        y = super().forward(input)
        centred = y - y.mean(-1, keepdim=True)
        return centred[..., :-1] if self.narrow else centred


class RestoringCRMSNorm(nn.Module):
    """CRMS norm that puts the dropped feature back and applies gain and shift, for readers of all d features.

    Args:
        features: d, one more than its input has.
        eps: added to the mean square.
        bias: add a shift.

    >>> RestoringCRMSNorm(4)(torch.ones(2, 3)).shape
    torch.Size([2, 4])
    """

    def __init__(self, features: int, *, eps: float = 1e-5, bias: bool = True):
        super().__init__()
        self.features = features
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(features))
        self.bias = nn.Parameter(torch.zeros(features)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """(…, d − 1) -> (…, d)."""
        y = restore_feature(crms_norm(x, eps=self.eps)) * self.weight
        return (y if self.bias is None else y + self.bias).to(x.dtype)

    def extra_repr(self) -> str:
        """What ``print`` shows."""
        return f"{self.features}, eps={self.eps}"
