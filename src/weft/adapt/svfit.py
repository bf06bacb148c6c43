"""Fine-tune by the largest singular values of each frozen weight, its directions staying: a handful of numbers a layer.

SVFit, Sun et al., arXiv:2409.05926 (2024).

    W₀ = U diag(σ) Vᵀ,    W = W₀ + U diag(s − σ) Vᵀ of the first rank values        U: (out, rank), s: (rank), Vᵀ: (rank, in)

with s = σ + δ, or s = σ · exp(δ), which stays positive; δ trains and starts at zero, so the model starts unchanged. The
gradient of sᵢ is uᵢᵀ G vᵢ where G is the weight's. x Wᵀ is computed as x W₀ᵀ + ((x V) ⊙ (s − σ)) Uᵀ, without building W.
rank is the lowest that holds ``energy`` of Σ σ², unless it is given.

Differences from the paper: no code was published. W₀ stays as it is stored; the paper's frozen part is W₀ without the
first values, which is the same W. What trains is δ, not s: the same gradients, but bfloat16 rounds only the change, and
weight decay pulls to W₀, not to zero. "Information" is read as Σ σ². s may turn negative, which flips a direction. Each
column of U has its largest entry positive, which fixes the signs that a decomposition leaves open. Stacks of matrices
have values of their own for each, at the highest rank that one of them needs; a convolution is its matrix (out, in · …).
Memory: U and V are kept, and saved with δ, so that a state dict means the same on any machine: rank · (in + out) numbers
in at least float32, at full rank of a square matrix as many as two more weights (``dtype="weight"``: in its own type).
A state dict whose rank came from the energy of other weights is refused by torch for its shape.
Complexity: a singular value decomposition at the start, then rank · (in + out) multiplications a token.
Re-implemented from the equations (official code: none).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from weft.errors import RecipeError
from weft.function.adapter import Adapter, add_product
from weft.function.protocol import FunctionMethod, Gather, Inner, WeightFunction, as_matrix, wide
from weft.method import parameter


@dataclass(frozen=True)
class SVFit:
    """Trainable singular values of a frozen weight.

    Source: arXiv:2409.05926.

    >>> import torch, weft
    >>> layer = torch.nn.Linear(6, 4)
    >>> before = layer.weight.detach().clone()
    >>> report = weft.adapt_(layer, SVFit(rank=3), where="*")
    >>> report.trainable, bool(torch.equal(layer.weight, before))
    (3, True)
    """

    rank: int | None = parameter(None, "how many of the largest values train; by energy if not given", minimum=1)
    energy: float = parameter(
        0.99, "share of the squared singular values that the trained ones hold", minimum=0, maximum=1
    )
    exponential: bool = parameter(False, "train the logarithms, so that values stay positive")
    dtype: str = parameter(
        "float32", "of values and directions: at least float32, or the weight's own", choices=("float32", "weight")
    )

    def build(self, weight: Tensor, *, batched: bool) -> WeightFunction:
        """The function for one weight."""
        matrix = weight if batched else as_matrix(weight)
        if self.rank is not None and self.rank > min(matrix.shape[-2:]):
            raise RecipeError(
                f"rank {self.rank} is more than a matrix of {list(matrix.shape[-2:])} can have; choose a lower rank, "
                "give energy instead, or leave the layer out."
            )
        if matrix.is_meta and self.rank is None:
            raise RecipeError("on the meta device there are no values to take a share of; give rank, not energy.")
        return _SVFit(self, matrix)


def rank_for_energy(values: Tensor, energy: float) -> int:
    """The lowest rank whose largest values hold a share of the sum of squares.

    Args:
        values: singular values, (…, n), largest first; of several matrices the highest rank counts.
        energy: the share, 0 to 1; 1 takes all values.

    Returns:
        A rank from 1 to n; 1 for values that are all zero.

    Raises:
        RecipeError: there are no values, one is NaN or infinite, or the share is none.

    >>> import torch
    >>> values = torch.tensor([3.0, 1.0, 0.1])  # squares hold 89.9%, 9.99% and 0.1%
    >>> rank_for_energy(values, 0.89), rank_for_energy(values, 0.99), rank_for_energy(values, 1)
    (1, 2, 3)
    """
    if not values.numel() or not bool(values.isfinite().all()) or not 0 <= energy <= 1:
        raise RecipeError(
            f"energy must be a share from 0 to 1 of finite singular values, got {energy} of {values.numel()} values"
            f"{'' if bool(values.isfinite().all()) else ', some of them NaN or infinite; repair the weight first'}."
        )
    if energy == 1:
        return values.shape[-1]
    held = values.double().square().cumsum(-1)
    return 1 + int((held[..., :-1] < energy * held[..., -1:]).sum(-1).max())


def singular_vectors(matrix: Tensor, rank: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """U (…, out, rank), σ (…, rank), largest first, and Vᵀ (…, rank, in), the largest entry of each column of U positive.

    Args:
        matrix: (…, out, in), at least float32.
        rank: how many; all if not given.

    Raises:
        RecipeError: the matrix holds NaN or infinity.

    >>> import torch
    >>> U, values, Vt = singular_vectors(torch.tensor([[0.0, -2.0], [1.0, 0.0]]))
    >>> values.tolist(), U.abs().equal(U), Vt.tolist()[0][1]
    ([2.0, 1.0], True, -1.0)
    """
    if not bool(matrix.isfinite().all()):
        raise RecipeError("the weight holds NaN or infinity; repair it first.")
    U, values, Vt = torch.linalg.svd(matrix, full_matrices=False)
    U, values, Vt = U[..., :rank], values[..., :rank], Vt[..., :rank, :]
    largest = U.gather(-2, U.abs().argmax(-2, keepdim=True))  # (…, 1, rank)
    sign = torch.where(largest < 0, -1.0, 1.0).to(U.dtype)
    return U * sign, values, Vt * sign.mT


class _SVFit(Adapter):
    has_product = True
    has_lookup = True

    def __init__(self, config: SVFit, matrix: Tensor):
        super().__init__()
        self.exponential = config.exponential
        *stack, out, inputs = matrix.shape
        kind = {"dtype": wide(matrix) if config.dtype == "float32" else matrix.dtype, "device": matrix.device}
        if matrix.is_meta:
            assert config.rank is not None  # build refuses
            rank = config.rank
            U, values, Vt = (torch.empty(*stack, *s, **kind) for s in ((out, rank), (rank,), (rank, inputs)))
        else:
            U, values, Vt = singular_vectors(matrix.detach().to(wide(matrix)))
            rank = config.rank if config.rank is not None else rank_for_energy(values, config.energy)
        self.config = replace(config, rank=rank)  # which builds it again without these values
        self.register_buffer("U", U[..., :rank].to(kind["dtype"]).contiguous())
        self.register_buffer("Vt", Vt[..., :rank, :].to(kind["dtype"]).contiguous())
        self.register_buffer("sigma", values[..., :rank].to(kind["dtype"]).contiguous())
        self.delta = nn.Parameter(torch.zeros(*stack, rank, **kind))

    def _moved(self) -> Tensor:
        """s − σ, (…, rank)."""
        return self.sigma * self.delta.expm1() if self.exponential else self.delta

    def change(self, stored: Tensor) -> Tensor:
        return (self.U * self._moved().unsqueeze(-2) @ self.Vt).reshape(stored.shape)

    def product(self, x: Tensor, inner: Inner) -> Tensor:
        if not self.enabled:
            return super().product(x, inner)
        thin, scale = functional.linear(x.to(self.Vt.dtype), self.Vt), self.scale * self.strength
        if torch.is_grad_enabled():  # a gradient of U diag(s − σ) would cost one more product
            return add_product(inner(x), thin * self._moved(), self.U, scale)
        # to the bit what the factors of to_lora give where others evaluate them
        return add_product(inner(x), thin, self.U * self._moved(), scale)

    def changed(self, x: Tensor) -> Tensor:
        return functional.linear(functional.linear(x.to(self.Vt.dtype), self.Vt) * self._moved(), self.U)

    def change_rows(self, gather: Gather) -> Tensor:
        return gather(self.U) * self._moved() @ self.Vt

    def to_lora(self) -> tuple[Tensor, Tensor]:
        return self.Vt, self.scale * self.U * self._moved().unsqueeze(-2)


METHODS = (
    FunctionMethod(
        name="svfit",
        family="adapt",
        config=SVFit,
        summary="The largest singular values of each frozen weight train, their directions stay.",
        goal="adapt",
        paper="svfit",
        starts_at="weight",
        adapter=True,
        trial={"rank": 5},
        checked_by=("closed form",),
    ),
)
