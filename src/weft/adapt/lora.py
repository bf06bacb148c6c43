"""Fine-tune by a product of two thin matrices beside each frozen weight.

LoRA, Hu et al., arXiv:2106.09685 (2021); rsLoRA, Kalajdzievski, arXiv:2312.03732 (2023).

    W = W₀ + s · B A            A: (rank, in), B: (out, rank), s = alpha / rank, or alpha / √rank (rsLoRA)

B starts at zero, so the model starts unchanged. x Wᵀ is computed as x W₀ᵀ + s (x Aᵀ) Bᵀ, without building W; kernels of
convolutions are matrices (out, in · …), and W is built for them.

Differences from the paper and its code: the dropout on x, which is no function of W, is a separate matter of the
layer's input and is not part of this function. Stacks of matrices (fused experts) have factors of their own for each.
An embedding is factored as it is stored, (rows, rank) (rank, columns), so a tied output head shares the change. Only
the touched weights are frozen; freeze the rest of the model as you need it.
Complexity: 2 · rank · (in + out) multiplications a token. Re-implemented from the equation (official code: MIT).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from weft.errors import RecipeError
from weft.function.protocol import FunctionMethod, Inner, WeightFunction, as_matrix, wide
from weft.method import parameter


@dataclass(frozen=True)
class LoRA:
    """A trainable low-rank change of a frozen weight.

    Source: arXiv:2106.09685, equation 3.

    >>> import torch, weft
    >>> layer = torch.nn.Linear(6, 4)
    >>> x, before = torch.randn(2, 6), layer.weight.detach().clone()
    >>> _ = weft.parametrize_(layer, LoRA(rank=2))
    >>> bool(torch.equal(layer.weight, before)), layer.parametrizations.weight.original.requires_grad
    (True, False)
    """

    rank: int = parameter(8, "columns of B and rows of A", minimum=1)
    alpha: float = parameter(16.0, "numerator of the scale", minimum=0)
    rslora: bool = parameter(False, "scale by alpha / sqrt(rank) instead of alpha / rank")
    dtype: str = parameter(
        "float32", "of the factors: at least float32, or the weight's own", choices=("float32", "weight")
    )

    def build(self, weight: Tensor, *, batched: bool) -> WeightFunction:
        """The function for one weight."""
        matrix = weight if batched else as_matrix(weight)
        if self.rank > min(matrix.shape[-2:]):
            raise RecipeError(
                f"rank {self.rank} is more than a matrix of {list(matrix.shape[-2:])} can have; choose a lower rank, "
                "or leave the layer out."
            )
        return _LoRA(self, matrix)


class _LoRA(WeightFunction):
    has_product = True
    freezes = True

    def __init__(self, config: LoRA, matrix: Tensor):
        super().__init__()
        self.scale = config.alpha / (math.sqrt(config.rank) if config.rslora else config.rank)
        *stack, out, inputs = matrix.shape
        # small steps of bfloat16 factors would be rounded away
        kind = {"dtype": wide(matrix) if config.dtype == "float32" else matrix.dtype, "device": matrix.device}
        self.A = nn.Parameter(torch.empty(*stack, config.rank, inputs, **kind))
        self.B = nn.Parameter(torch.zeros(*stack, out, config.rank, **kind))
        bound = 1 / math.sqrt(inputs)  # nn.Linear's own start, which LoRA uses for A
        nn.init.uniform_(self.A, -bound, bound)

    # not torch.add(..., alpha=scale): inductor (torch 2.13) makes one addmm of a product and such a sum, without alpha

    def forward(self, stored: Tensor) -> Tensor:
        change = self.B @ (self.A * self.scale)
        return (stored + change.reshape(stored.shape)).to(stored.dtype)

    def product(self, x: Tensor, inner: Inner) -> Tensor:
        y = inner(x)
        change = functional.linear(functional.linear(x.to(self.A.dtype), self.A) * self.scale, self.B)
        return (y + change).to(y.dtype)


METHODS = (
    FunctionMethod(
        name="lora",
        family="adapt",
        config=LoRA,
        summary="A trainable low-rank change beside each frozen weight.",
        goal="adapt",
        origin="LoRA, arXiv:2106.09685",
        starts_at="weight",
        checked_by=("closed form", "peft"),
    ),
    FunctionMethod(
        name="rslora",
        family="adapt",
        config=LoRA,
        summary="LoRA scaled by the root of the rank, so that higher ranks learn.",
        goal="adapt",
        origin="rsLoRA, arXiv:2312.03732",
        defaults={"rslora": True},
        starts_at="weight",
        checked_by=("closed form", "peft"),
    ),
)
