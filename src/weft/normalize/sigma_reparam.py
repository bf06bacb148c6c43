"""Divide a weight by its spectral norm and learn its scale, so that attention cannot collapse.

σReparam, Zhai et al., arXiv:2303.06296 (2023).

    Ŵ = γ · W / σ(W)            σ(W) = vᵀ W u: the largest singular value, by power iteration
    v ← W u / |W u|,  u ← Wᵀ v / |Wᵀ v|      once before each forward pass in training, without gradient

W: (out, in) or (out, in, …) as (out, rest); u: (in·…); v: (out); γ: (1), one a matrix.

Differences from the paper and its code: the official code makes new layers and loses trained weights; here γ starts
at σ(W), which leaves the model's outputs as they were (``gain="one"`` starts at 1, for training from scratch). Both
vectors are kept and move once a step, in training only; the official code moves one in each forward pass. Grouped
convolutions work: a kernel is a matrix of (out, in/groups · …). A zero weight stays zero.
Complexity: two products of a matrix and a vector a step. Re-implemented from the equations (official code: a licence
that is not open source).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from weft.function.protocol import FunctionMethod, WeightFunction, as_matrix
from weft.method import parameter

_TINY = 1e-12


@dataclass(frozen=True)
class SigmaReparam:
    """γ / σ(W) times each matrix; keep γ out of weight decay.

    Source: arXiv:2303.06296, section 4.

    >>> import torch, weft
    >>> layer = torch.nn.Linear(6, 4)
    >>> before = layer.weight.detach().clone()
    >>> _ = weft.parametrize_(layer, SigmaReparam())
    >>> bool(torch.allclose(layer.weight, before, atol=1e-6))
    True
    """

    gain: str = parameter(
        "spectral", "start of the learned scale: the spectral norm, or one", choices=("spectral", "one")
    )
    iterations: int = parameter(1, "power iterations before each forward pass in training", minimum=1)

    def build(self, weight: Tensor, *, batched: bool) -> WeightFunction:
        """The function for one weight."""
        return _SigmaReparam(self, weight, batched)


class _SigmaReparam(WeightFunction):
    has_update = True

    def __init__(self, config: SigmaReparam, weight: Tensor, batched: bool):
        super().__init__()
        self.config = config
        self.batched = batched
        matrices = self._matrices(weight).float()  # (…, out, in)
        left, values, right = torch.linalg.svd(matrices, full_matrices=False)
        self.register_buffer("u", right[..., 0, :].clone())
        self.register_buffer("v", left[..., 0].clone())
        start = values[..., :1] if config.gain == "spectral" else torch.ones_like(values[..., :1])
        # (1,) and not a scalar: fully sharded training cannot split a tensor without axes
        self.gain = nn.Parameter(start.to(weight.dtype))

    def forward(self, stored: Tensor) -> Tensor:
        matrices = self._matrices(stored)
        sigma = torch.einsum("...o,...oi,...i->...", self.v.to(stored.dtype), matrices, self.u.to(stored.dtype))
        sigma = sigma.unsqueeze(-1)
        scale = self.gain / torch.where(sigma.abs() > _TINY, sigma, torch.ones_like(sigma))
        return (matrices * scale.unsqueeze(-1)).reshape(stored.shape)

    def update(self, stored: Tensor) -> None:
        matrices = self._matrices(stored).float()
        for _ in range(self.config.iterations):
            self.v.copy_(_normalized(torch.einsum("...oi,...i->...o", matrices, self.u)))
            self.u.copy_(_normalized(torch.einsum("...oi,...o->...i", matrices, self.v)))

    def _matrices(self, weight: Tensor) -> Tensor:
        return weight if self.batched else as_matrix(weight)


def _normalized(vector: Tensor) -> Tensor:
    return vector / vector.norm(dim=-1, keepdim=True).clamp_min(_TINY)


METHODS = (
    FunctionMethod(
        name="sigma_reparam",
        family="normalize",
        config=SigmaReparam,
        summary="Spectral norm divided out, scale learned: stable attention without warm-up.",
        goal="train",
        paper="sigma-reparam",
        starts_at="weight",
        checked_by=("closed form",),
    ),
)
