"""A weight as a base plus differences from it, each times a trained number: what learned soups and aTLAS fit.

    W = W₀ + Σ_k c_k τ_k              τ_k: fixed, of W's shape; c: (K), trained
    with groups                       W[e] = W₀[e] + Σ_k c[k, g(e)] τ_k[e], g: a fixed random group of each entry; c: (K, P)
    with softmax                      softmax(c) over k instead of c: where τ_k = W_k − W₀, a weighted mean of the W_k
    ∂L/∂c[k, p] = Σ_{e: g(e) = p} (∂L/∂W)[e] τ_k[e]

c may be one for each tensor or one for all. It stands on the ground floor because fine-tuning (adapters) and merging
(soups) are both this function, fitted to different losses.

Complexity: O(K · elements) in each pass; the τ are kept in a type of their own, and no wider copy of them outlives a
pass. Written for this library.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from weft.errors import RecipeError
from weft.function.adapter import Adapter
from weft.function.protocol import FunctionConfig, Gather, WeightFunction, wide

GRANULARITIES = ("tensor", "model")


def combine(coefficients: Tensor, vectors: Tensor, groups: Tensor | None = None) -> Tensor:
    """Σ_k c_k τ_k, in at least float32.

    Args:
        coefficients: (K), or (K, P) with groups.
        vectors: τ, (K, …); no gradient reaches them.
        groups: of each entry, whole numbers below P, of the shape of one τ.

    Returns:
        The shape of one τ.

    >>> combine(torch.tensor([1.0, -0.5]), torch.tensor([[1.0, 2.0], [4.0, 0.0]]))
    tensor([-1.,  2.])
    >>> combine(torch.tensor([[1.0, 10.0]]), torch.ones(1, 3), torch.tensor([0, 1, 1]))
    tensor([ 1., 10., 10.])
    """
    if groups is None and vectors.dtype == torch.promote_types(wide(coefficients), wide(vectors)):
        # one product, whose gradient keeps nothing but the vectors
        return (coefficients.to(vectors.dtype) @ vectors.detach().flatten(1)).reshape(vectors.shape[1:])
    made: Tensor = _Combine.apply(coefficients, vectors, groups)
    return made


class _Combine(torch.autograd.Function):
    """Keeps narrow τ as they are for the backward pass, where the sum's own gradient would keep wider copies."""

    generate_vmap_rule = True

    @staticmethod
    def forward(coefficients: Tensor, vectors: Tensor, groups: Tensor | None) -> Tensor:
        kind = torch.promote_types(wide(coefficients), wide(vectors))
        total = torch.zeros(vectors.shape[1:], dtype=kind, device=vectors.device)
        for number, vector in zip(coefficients.to(kind).unbind(0), vectors.unbind(0)):
            if groups is not None:
                number = number.index_select(0, groups.flatten()).reshape(groups.shape)
            total = total + number * vector.to(kind)
        return total

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
        coefficients, vectors, groups = inputs
        ctx.save_for_backward(vectors, groups)
        ctx.kind, ctx.shape = coefficients.dtype, coefficients.shape

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        gradient = gradients[0]
        vectors, groups = ctx.saved_tensors
        each = []
        for vector in vectors.unbind(0):
            products = gradient * vector.to(gradient.dtype)
            if groups is None:
                each.append(products.sum())
            else:
                empty = torch.zeros(ctx.shape[1:], dtype=products.dtype, device=products.device)
                each.append(empty.index_add(0, groups.flatten(), products.flatten()))
        return torch.stack(each).to(ctx.kind), None, None


class Combination(Adapter):
    """The function of one weight.

    Attributes:
        coefficients: what trains, (K) or (K, P); several functions may have the same Parameter.
        vectors: τ, (K, …).
        groups: of each entry, or None.
        softmax: whether coefficients are weights of a mean.
    """

    vectors: Tensor
    groups: Tensor | None

    def __init__(
        self, coefficients: nn.Parameter, vectors: Tensor, groups: Tensor | None = None, *, softmax: bool = False
    ):
        super().__init__()
        self.coefficients = coefficients
        self.softmax = softmax
        self.register_buffer("vectors", vectors)
        self.register_buffer("groups", groups)
        self.has_lookup = groups is None

    def numbers(self) -> Tensor:
        """c as it acts, in at least float32."""
        numbers = self.coefficients.to(wide(self.coefficients))
        return numbers.softmax(0) if self.softmax else numbers

    def change(self, stored: Tensor) -> Tensor:
        """See the base."""
        return combine(self.numbers(), self.vectors, self.groups)

    def change_rows(self, gather: Gather) -> Tensor:
        """See the base."""
        rows = torch.stack([gather(vector) for vector in self.vectors.unbind(0)])
        return torch.tensordot(self.numbers(), rows.to(wide(rows)), dims=1)


def combinations(
    weights: Mapping[str, Tensor],
    vectors: Mapping[str, Tensor],
    *,
    granularity: str = "tensor",
    partitions: int = 1,
    softmax: bool = False,
    start: float = 0.0,
    seed: int = 0,
) -> dict[str, FunctionConfig]:
    """What builds the function of each weight, for a configuration's ``plan``.

    Args:
        weights: by full name, as functions see them.
        vectors: τ of each, (K, …), of the type to keep them in.
        granularity: "tensor": each has coefficients of its own; "model": all share one Parameter.
        partitions: P, groups of entries.
        softmax: coefficients are weights of a mean.
        start: of all coefficients, before a softmax.
        seed: of the groups, which are drawn for each name.

    Raises:
        RecipeError: there are no vectors, their shapes or numbers differ, or a shared Parameter would need two devices.

    >>> weights = {"a": torch.zeros(2, 2), "b": torch.zeros(3, 2)}
    >>> made = combinations(weights, {n: torch.ones(4, *w.shape) for n, w in weights.items()}, granularity="model")
    >>> a, b = (made[n].build(w, batched=False) for n, w in weights.items())
    >>> a.coefficients is b.coefficients, a.coefficients.shape
    (True, torch.Size([4]))
    """
    if granularity not in GRANULARITIES:
        raise RecipeError(f"granularity must be one of {', '.join(GRANULARITIES)}, got {granularity!r}.")
    counts = {len(vectors[n]) for n in weights}
    if len(counts) != 1 or 0 in counts or partitions < 1:
        raise RecipeError(
            f"Every weight needs the same number of task vectors, one or more, and one or more groups, got "
            f"{sorted(counts)} and {partitions}."
        )
    for name, weight in weights.items():
        if vectors[name].shape[1:] != weight.shape:
            raise RecipeError(
                f"{name} is {list(weight.shape)}, and its task vectors are {list(vectors[name].shape[1:])}; they must be "
                "those of a model of the same architecture."
            )
    shape = (*counts,) if partitions == 1 else (*counts, partitions)
    shared = None
    if granularity == "model":
        devices, kind = {w.device for w in weights.values()}, torch.float32
        if len(devices) > 1:
            raise RecipeError(f'granularity="model" needs all weights on one device, these are on {len(devices)}.')
        for weight in weights.values():
            kind = torch.promote_types(kind, weight.dtype)
        shared = nn.Parameter(torch.full(shape, start, dtype=kind, device=devices.pop()))
    return {n: _Builder(n, vectors[n], shape, shared, softmax, start, seed) for n in weights}


@dataclass(frozen=True, eq=False)
class _Builder:
    name: str
    vectors: Tensor
    shape: tuple[int, ...]
    shared: nn.Parameter | None
    softmax: bool
    start: float
    seed: int

    def build(self, weight: Tensor, *, batched: bool) -> WeightFunction:
        coefficients = self.shared
        if coefficients is None:
            coefficients = nn.Parameter(torch.full(self.shape, self.start, dtype=wide(weight), device=weight.device))
        groups = None
        if len(self.shape) == 2:
            # by name, so that tensors of one shape have groups of their own, whatever else is attached
            generator = torch.Generator().manual_seed(zlib.crc32(f"{self.seed} {self.name}".encode()))
            groups = torch.randint(self.shape[1], weight.shape, generator=generator, dtype=torch.int32)
            groups = groups.to(weight.device)
        return Combination(coefficients, self.vectors, groups, softmax=self.softmax)
