"""Divide a weight by its spectral norm and learn its scale, so that attention cannot collapse.

σReparam, Zhai et al., arXiv:2303.06296 (2023).

    Ŵ = γ · W / σ(W)            σ(W) = vᵀ W u: the largest singular value, by power iteration
    v ← W u / |W u|,  u ← Wᵀ v / |Wᵀ v|      once before each forward pass in training, without gradient

W: (out, in) or (out, in, …) as (out, rest); u: (in·…); v: (out); γ: (1), one a matrix. x Ŵᵀ is computed as
x Wᵀ · γ/σ, without building Ŵ.

Differences from the paper and its code: the official code makes new layers and loses trained weights; here γ starts
at σ(W), which leaves the model's outputs as they were (``gain="one"`` starts at 1, for training from scratch). Both
vectors are kept and move once a step, in training only; the official code moves one in each forward pass, and starts
it from a whole singular value decomposition instead of the best vector of a Krylov space. Grouped convolutions work: a
kernel is a matrix of (out, in/groups · …). A weight of zeros has no norm and is refused; one that becomes zero in
training keeps its vectors (10⁻¹⁵ of the old vector is added to each product) and is normalised again when it moves on.
Complexity: three products of a matrix and a vector a step, and two more backwards; 94 when attached. Re-implemented
from the equations (official code: a licence that is not open source).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from weft.errors import RecipeError
from weft.function.protocol import FunctionMethod, Inner, WeightFunction, as_matrix, wide
from weft.method import parameter

_TINY = 1e-12
_TRACE = 1e-15  # no less: its square over the elements of a vector must not underflow in float32
_KRYLOV = (
    32  # the norm of a Gaussian 1024 x 2764 matrix comes out within 2e-4, and of one with 32 rows or columns exactly
)


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
        if not weight.is_meta and not bool(weight.isfinite().all()):
            raise RecipeError("the weight holds NaN or infinity; repair it first.")
        return _SigmaReparam(self, weight, batched)


def top_singular(matrices: Tensor, size: int = _KRYLOV) -> tuple[Tensor, Tensor, Tensor]:
    """The largest singular value of each matrix and its vectors, by Lanczos steps with full reorthogonalisation.

    Args:
        matrices: (…, out, in), floating point.
        size: dimensions of the Krylov space.

    Returns:
        v: (…, out); sigma: (…); u: (…, in), so that vᵀ W u = sigma.

    >>> v, sigma, u = top_singular(torch.tensor([[3.0, 0.0], [0.0, -4.0]]))
    >>> round(float(sigma), 5)
    4.0
    """
    *stack, out, inputs = matrices.shape
    if out < inputs:
        u, sigma, v = top_singular(matrices.mT, size)
        return v, sigma, u
    generator = torch.Generator("cpu").manual_seed(0)  # any start but one orthogonal to u will do
    start = torch.randn(*stack, inputs, 1, generator=generator, dtype=matrices.dtype, device="cpu").to(matrices.device)
    basis = start / start.norm(dim=-2, keepdim=True)
    for _ in range(min(size, inputs) - 1):
        following = matrices.mT @ (matrices @ basis[..., -1:])
        for _ in range(2):  # once leaves rounding errors that grow
            following = following - basis @ (basis.mT @ following)
        basis = torch.cat([basis, following / following.norm(dim=-2, keepdim=True).clamp_min(_TINY)], dim=-1)
    basis = torch.linalg.qr(basis).Q  # a matrix of low rank ends the sequence early, and noise follows
    left, values, right = torch.linalg.svd(matrices @ basis, full_matrices=False)
    return left[..., 0], values[..., 0], (basis @ right[..., 0, :].unsqueeze(-1)).squeeze(-1)


class _SigmaReparam(WeightFunction):
    has_update = True

    def __init__(self, config: SigmaReparam, weight: Tensor, batched: bool):
        super().__init__()
        self.config = config
        self.batched = batched
        self.has_product = not batched
        v, sigma, u = top_singular(self._matrices(weight).to(wide(weight)))
        if not sigma.is_meta and not bool((sigma > _TINY).all()):
            raise RecipeError("a weight of zeros cannot be divided by its norm; leave it out.")
        self.register_buffer("u", u.contiguous())
        self.register_buffer("v", v.contiguous())
        # (1,) and not a scalar: fully sharded training cannot split a tensor without axes
        start = sigma.reshape(-1) if config.gain == "spectral" else torch.ones_like(sigma).reshape(-1)
        self.gain = nn.Parameter(start.to(weight.dtype))

    def forward(self, stored: Tensor) -> Tensor:
        matrices = _cast(self._matrices(stored), wide(stored))
        scale = self._scale(_times(matrices, self._vector("u", matrices.dtype)))
        scaled = matrices * (scale.reshape(-1, 1, 1) if self.batched else scale)
        return _cast(scaled, stored.dtype).reshape(stored.shape)

    def product(self, x: Tensor, inner: Inner) -> Tensor:
        u = self._vector("u", self.gain.dtype)
        device = x.device.type
        if torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                image = inner(u)
        else:
            image = inner(u)
        y = inner(x)
        return _cast(y * self._scale(_cast(image, wide(image))), y.dtype)

    def update(self, stored: Tensor) -> None:
        matrices = _cast(self._matrices(stored), wide(stored))
        held = self._buffers["v"], self._buffers["u"]
        v, u = (_cast(h, matrices.dtype) for h in held)
        transposed = matrices.mT
        for _ in range(self.config.iterations):
            _step(v, matrices, u)
            _step(u, transposed, v)
        if v is not held[0]:  # a model cast to a narrower type after attaching
            held[0].copy_(v)
            held[1].copy_(u)

    def _scale(self, image: Tensor) -> Tensor:
        """γ / σ from W u, (…, out) -> (…)."""
        v = self._vector("v", image.dtype)
        sigma = (v * image).sum(-1) if self.batched else torch.dot(v, image)
        return self.gain / torch.where(sigma.logical_not(), 1.0, sigma)

    def _vector(self, name: str, dtype: torch.dtype) -> Tensor:
        vector = self._buffers[name]
        # the next forward pass in training changes the vector in place, and this one's backward pass still needs it
        copied = self.training and vector.dtype == dtype
        return vector.clone() if copied else _cast(vector, dtype)

    def _matrices(self, weight: Tensor) -> Tensor:
        return weight if self.batched else as_matrix(weight)


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in a dtype. A call of ``to`` that has nothing to do takes as long as a small product."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _times(matrices: Tensor, vectors: Tensor) -> Tensor:
    """(…, a, b), (…, b) -> (…, a)."""
    return matrices @ vectors if matrices.dim() == 2 else (matrices @ vectors.unsqueeze(-1)).squeeze(-1)


def _step(vector: Tensor, matrices: Tensor, other: Tensor) -> None:
    """Make ``vector`` (…, a) that of ``matrices`` (…, a, b) times ``other`` (…, b), of length one.

    A trace of the vector itself is added: where the matrix is zero it stays as it is, and can follow the matrix later.
    """
    if matrices.dim() == 2:
        vector.addmv_(matrices, other, beta=_TRACE)
        vector.div_(torch.linalg.vector_norm(vector))
    else:
        vector.mul_(_TRACE).add_(_times(matrices, other))
        vector.div_(torch.linalg.vector_norm(vector, dim=-1, keepdim=True))


METHODS = (
    FunctionMethod(
        name="sigma_reparam",
        family="normalize",
        config=SigmaReparam,
        summary="Spectral norm divided out, scale learned: stable attention without warm-up.",
        goal="train",
        paper="sigma-reparam",
        starts_at="weight",
        checked_by=("closed form", "torch"),
    ),
)
