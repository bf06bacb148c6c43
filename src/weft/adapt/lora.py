"""Fine-tune by a product of two thin matrices beside each frozen weight.

LoRA, Hu et al., arXiv:2106.09685 (2021); rsLoRA, Kalajdzievski, arXiv:2312.03732 (2023).

    W = W₀ + s · B A            A: (rank, in), B: (out, rank), s = alpha / rank, or alpha / √rank (rsLoRA)

B starts at zero, so the model starts unchanged. x Wᵀ is computed as x W₀ᵀ + s (x Aᵀ) Bᵀ, without building W; kernels of
convolutions are matrices (out, in · …), and W is built for them.

PiSSA, Meng et al., arXiv:2404.02948 (2024), starts at the largest singular values instead:

    W₀ = U diag(σ) Vᵀ,    A = √(σ / s) Vᵀ, B = U √(σ / s) of the first rank values,    W = (W₀ − s · B A) + s · B A

so the frozen part is W₀ without these directions, and the start is kept beside the factors to export the change from
W₀ as an adapter of twice the rank.

Differences from the paper and its code: dropout on x is no function of W: it acts only where x is multiplied (linear
layers in training) and is refused where W must be built. Stacks of matrices (fused experts) have factors of their own
for each. An embedding is factored as it is stored, (rows, rank) (rank, columns), so a tied output head shares the
change. Only the touched weights are frozen; ``weft.adapt_`` freezes the rest of the model. PiSSA's frozen part is
computed from the start, so the stored weight stays W₀ and other adapters can stand beside it.
Complexity: 2 · rank · (in + out) multiplications a token. Re-implemented from the equation (official code: MIT).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from weft.errors import RecipeError
from weft.function.adapter import Adapter, PeftForm, add_product
from weft.function.protocol import FunctionMethod, Gather, Inner, WeightFunction, as_matrix, wide
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
    dropout: float = parameter(0.0, "share of inputs dropped in training, in linear layers", minimum=0, maximum=1)
    start: str = parameter(
        "zero",
        "zero: the model starts unchanged, gaussian: so too, A drawn as PEFT's 'gaussian', pissa: at the largest "
        "singular values",
        choices=("zero", "gaussian", "pissa"),
    )
    dtype: str = parameter(
        "float32", "of the factors: at least float32, or the weight's own", choices=("float32", "weight")
    )

    def build(self, weight: Tensor, *, batched: bool) -> WeightFunction:
        """The function for one weight."""
        matrix = weight if batched else as_matrix(weight)
        # PEFT allows more, and its folders are built here without values first
        if self.rank > min(matrix.shape[-2:]) and not weight.is_meta:
            raise RecipeError(
                f"rank {self.rank} is more than a matrix of {list(matrix.shape[-2:])} can have; choose a lower rank, "
                "or leave the layer out."
            )
        if self.dropout and (batched or weight.dim() != 2):
            raise RecipeError(
                f"dropout acts on the inputs of linear layers, and this weight {list(weight.shape)} is built whole; set "
                "dropout=0, or leave the layer out."
            )
        return _LoRA(self, matrix)


class _LoRA(Adapter):
    has_product = True
    has_lookup = True

    def __init__(self, config: LoRA, matrix: Tensor):
        super().__init__(config.alpha / (math.sqrt(config.rank) if config.rslora else config.rank))
        self.config = config
        self.dropout = config.dropout
        *stack, out, inputs = matrix.shape
        # small steps of bfloat16 factors would be rounded away
        kind = {"dtype": wide(matrix) if config.dtype == "float32" else matrix.dtype, "device": matrix.device}
        self.A = nn.Parameter(torch.empty(*stack, config.rank, inputs, **kind))
        self.B = nn.Parameter(torch.zeros(*stack, out, config.rank, **kind))
        self.has_start = config.start == "pissa"
        if config.start == "pissa":
            self._start_at_largest(matrix)
        elif config.start == "gaussian":
            nn.init.normal_(self.A, std=1 / config.rank)
        else:
            bound = 1 / math.sqrt(inputs)  # nn.Linear's own start, which LoRA uses for A
            nn.init.uniform_(self.A, -bound, bound)

    @torch.no_grad()
    def _start_at_largest(self, matrix: Tensor) -> None:
        rank = self.A.shape[-2]
        if not matrix.is_meta:
            if not bool(matrix.isfinite().all()):
                raise RecipeError("the weight holds NaN or infinity; repair it first.")
            u, values, vh = torch.linalg.svd(matrix.to(wide(matrix)), full_matrices=False)
            root = (values[..., :rank] / max(self.scale, 1e-30)).sqrt()  # alpha 0 leaves nothing to share out
            self.A.copy_(root.unsqueeze(-1) * vh[..., :rank, :])
            self.B.copy_(u[..., :rank] * root.unsqueeze(-2))
        self.register_buffer("A_start", self.A.detach().clone())
        self.register_buffer("B_start", self.B.detach().clone())

    def change(self, stored: Tensor) -> Tensor:
        change = self.B @ self.A
        if self.has_start:
            change = change - self.B_start @ self.A_start
        return change.reshape(stored.shape)

    def product(self, x: Tensor, inner: Inner) -> Tensor:
        if self.has_start or not self.enabled:
            return super().product(x, inner)
        return add_product(inner(x), self._thin(x), self.B, self.scale * self.strength)

    def changed(self, x: Tensor) -> Tensor:
        y = functional.linear(self._thin(x), self.B)
        if self.has_start:
            y = y - functional.linear(functional.linear(x.to(self.A.dtype), self.A_start), self.B_start)
        return y

    def _thin(self, x: Tensor) -> Tensor:
        x = x.to(self.A.dtype)
        if self.dropout:
            x = functional.dropout(x, self.dropout, self.training)
        return functional.linear(x, self.A)

    def change_rows(self, gather: Gather) -> Tensor:
        rows = gather(self.B) @ self.A
        if self.has_start:
            rows = rows - gather(self.B_start) @ self.A_start
        return rows

    def to_lora(self) -> tuple[Tensor, Tensor]:
        if self.has_start:
            A = torch.cat([self.A, self.A_start], dim=-2)
            return A, self.scale * torch.cat([self.B, -self.B_start], dim=-1)
        return self.A, self.scale * self.B

    def peft(self) -> PeftForm | None:
        if self.has_start or self.A.dim() != 2:
            return None
        config = self.config
        said = {
            "r": config.rank,
            "lora_alpha": config.alpha,
            "use_rslora": config.rslora,
            "lora_dropout": config.dropout,
        }
        return PeftForm("LORA", said, {"lora_A.weight": self.A, "lora_B.weight": self.B})


METHODS = (
    FunctionMethod(
        name="lora",
        family="adapt",
        config=LoRA,
        summary="A trainable low-rank change beside each frozen weight.",
        goal="adapt",
        origin="LoRA, arXiv:2106.09685",
        starts_at="weight",
        adapter=True,
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
        adapter=True,
        checked_by=("closed form", "peft"),
    ),
    FunctionMethod(
        name="pissa",
        family="adapt",
        config=LoRA,
        summary="LoRA that starts at the largest singular values, so that they are what trains.",
        goal="adapt",
        origin="PiSSA, arXiv:2404.02948",
        defaults={"start": "pissa"},
        starts_at="weight",
        adapter=True,
        checked_by=("closed form", "peft"),
    ),
)
