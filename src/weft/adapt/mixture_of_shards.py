"""LoRA whose factors are put together from one pool of short vectors for all layers: a higher rank for as many numbers.

MoS, Wang et al., arXiv:2410.00938 (2025). For a group of L layers of one shape, with the numbers of a LoRA of rank e:

    W = W₀ + s · Bᵀ A        A: (rank, in), B: (rank, out), s = alpha / rank
    A[j] = [PA[I[j l]], …, PA[I[j l + l − 1]]]        PA: (e L l, in / l), trainable; I: rank · l numbers of its rows
    B[j] likewise of PB: (e L l, out / l) by numbers of its own

The numbers are drawn once and stay: (rank − p) l distinct ones of the first (e − p) L l rows, which all layers share,
then the p l rows that are this layer's alone. PA starts as LoRA's A, PB at zero, so the model starts unchanged. Choosing
a subset, choosing for A and B independently, cutting vectors (l = ``shards``) and private rows (p) are the paper's four
ways to let layers differ. It is linear in the pools, and each layer's change is exactly a LoRA (``to_lora``).

A group are the layers that an adapter was given with one last name ("q_proj", numbers left aside) and one shape, as the
paper has one pool for each kind of projection; of a stack of matrices each counts as a layer.

Differences from the paper and its code: numbers are buffers, drawn on the CPU by a generator of their own, so they are
the same in all processes and neither casts nor optimizers touch them. The code's random scaling, a product that is one,
is left out, and dropout is 0, not 0.1, where not given. :func:`unused_shards` counts pool rows that no layer chose:
about (1 − (rank − p) / ((e − p) L))^L of the shared ones.
The pool is a module that all layers of a group have; a state dict has it under each. FSDP2 shards a parameter in one
unit, so shard the layers of a group together, ``fully_shard([*blocks])`` or the whole model; separate units are refused.
Complexity: LoRA's of that rank, and gathering rank · (in + out) numbers a layer in each pass.
Re-implemented from the equations (official code: MIT).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from weft.errors import RecipeError
from weft.function.adapter import Adapter
from weft.function.attach import functions
from weft.function.protocol import FunctionMethod, Gather, WeightFunction, as_matrix, wide
from weft.method import parameter


@dataclass(frozen=True)
class MixtureOfShards:
    """Low-rank changes of frozen weights out of one pool for all layers of a kind.

    Source: arXiv:2410.00938.

    >>> import torch, weft
    >>> blocks = torch.nn.ModuleList(torch.nn.ModuleDict({"up": torch.nn.Linear(8, 6)}) for _ in range(4))
    >>> report = weft.adapt_(blocks, MixtureOfShards(budget_rank=2, rank=5), where="*")
    >>> report.trainable == 4 * 2 * (8 + 6), blocks[3]["up"].parametrizations.weight[0].to_lora()[0].shape
    (True, torch.Size([5, 8]))
    """

    budget_rank: int = parameter(2, "e: the pools hold as many numbers as a LoRA of this rank", minimum=1)
    rank: int = parameter(4, "of the change of each layer", minimum=1)
    shards: int = parameter(2, "l: pieces that each vector is cut into", minimum=1)
    private_rank: int = parameter(1, "p: how much of the rank is each layer's own", minimum=0)
    alpha: float = parameter(16.0, "numerator of the scale", minimum=0)
    dropout: float = parameter(0.0, "share of inputs dropped in training, in linear layers", minimum=0, maximum=1)
    seed: int = parameter(0, "of the choice of shards")
    dtype: str = parameter(
        "float32", "of the pools: at least float32, or the weight's own", choices=("float32", "weight")
    )

    def build(self, weight: Tensor, *, batched: bool) -> WeightFunction:
        """The function for one weight that shares with no other."""
        return self.plan(nn.Module(), {"weight": weight}, None)["weight"].build(weight, batched=batched)

    def plan(self, model: nn.Module, weights: Mapping[str, Tensor], data: Iterable[Any] | None) -> Mapping[str, _Group]:
        """What builds the function of each weight: one pool pair for those of one last name, shape, type and device."""
        groups: dict[Any, list[str]] = {}
        for full, weight in weights.items():
            kind = next((part for part in reversed(full.split(".")[:-1]) if not part.isdigit()), "")
            groups.setdefault((kind, weight.shape, weight.dtype, weight.device), []).append(full)
        generator = torch.Generator().manual_seed(self.seed)
        return {
            full: group
            for names in groups.values()
            for group in [_Group(self, len(names), generator)]
            for full in names
        }


def draw_shards(
    layers: int, budget_rank: int, rank: int, shards: int, private_rank: int, generator: torch.Generator
) -> Tensor:
    """Which rows of a pool each layer's vectors are made of.

    Args:
        layers: L, that share the pool of ``budget_rank`` · L · ``shards`` rows.
        budget_rank, rank, shards, private_rank: e, rank, l and p of the equations.
        generator: on the CPU.

    Returns:
        (layers, rank · shards) row numbers, int64; the last ``private_rank`` · ``shards`` of each are its own rows.

    Raises:
        RecipeError: p is more than e or the rank, or the shared rows are fewer than a layer needs.

    >>> draw_shards(2, 2, 3, 1, 1, torch.Generator().manual_seed(0)).sort()[0].tolist()
    [[0, 1, 2], [0, 1, 3]]
    """
    shared = (budget_rank - private_rank) * layers
    if private_rank > min(budget_rank, rank):
        raise RecipeError(
            f"private_rank = {private_rank} is part of both budget_rank = {budget_rank} and rank = {rank}, and cannot be "
            "more than either."
        )
    if rank - private_rank > shared:
        raise RecipeError(
            f"a layer takes rank - private_rank = {rank - private_rank} different vectors of the (budget_rank - "
            f"private_rank) · layers = {shared} that the {layers} layers of its name and shape share. Choose rank <= "
            f"{shared + private_rank} or a larger budget_rank, or leave layers out of which there are few."
        )
    rows = torch.stack([torch.randperm(shared * shards, generator=generator) for _ in range(layers)])
    own = shared * shards + torch.arange(layers * private_rank * shards).reshape(layers, private_rank * shards)
    return torch.cat([rows[:, : (rank - private_rank) * shards], own], 1)


def gather_shards(pool: Tensor, index: Tensor, rank: int) -> Tensor:
    """Vectors put together from rows of a pool.

    Args:
        pool: (rows, n / shards).
        index: (…, rank · shards) row numbers.
        rank: how many vectors.

    Returns:
        (…, rank, n). Source: arXiv:2410.00938.

    >>> gather_shards(torch.tensor([[1, 2], [3, 4], [5, 6]]), torch.tensor([2, 0, 1, 1]), 2)
    tensor([[5, 6, 1, 2],
            [3, 4, 3, 4]])
    """
    return pool[index].unflatten(-2, (rank, -1)).flatten(-2)


def unused_shards(model: nn.Module) -> dict[str, float]:
    """The share of each pool's rows that no layer chose, by the name of the first weight that has the pool.

    >>> import weft
    >>> model = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
    >>> _ = weft.adapt_(model, MixtureOfShards(rank=4), where="*")  # each takes all that is shared
    >>> unused_shards(model)
    {'0.weight': 0.0}
    """
    found: dict[int, tuple[str, list[_MixtureOfShards]]] = {}
    for full, stack in functions(model).items():
        for function in stack:
            if isinstance(function, _MixtureOfShards):
                found.setdefault(id(function.pool), (full, []))[1].append(function)
    result = {}
    for full, members in found.values():
        indices = [torch.stack([getattr(f, name).flatten() for f in members]) for name in ("index_A", "index_B")]
        rows = len(members[0].pool.A) + len(members[0].pool.B)
        result[full] = 1 - sum(len(i.unique()) for i in indices) / rows
    return result


class _Group:
    """Builds the functions of a group's weights, one after another; the first makes the pool."""

    def __init__(self, config: MixtureOfShards, weights: int, generator: torch.Generator):
        self.config = config
        self.weights = weights
        self.generator = generator
        self.pool: _Pool | None = None
        self.built = 0

    def build(self, weight: Tensor, *, batched: bool) -> WeightFunction:
        config = self.config
        matrix = weight if batched else as_matrix(weight)
        if config.rank > min(matrix.shape[-2:]):
            raise RecipeError(
                f"rank {config.rank} is more than a matrix of {list(matrix.shape[-2:])} can have; choose a lower rank, "
                "or leave the layer out."
            )
        if any(size % config.shards for size in matrix.shape[-2:]):
            raise RecipeError(
                f"shards = {config.shards} must divide both sizes of a matrix, and this one is {list(matrix.shape[-2:])}; "
                "choose fewer shards, or leave the layer out."
            )
        if config.dropout and (batched or weight.dim() != 2):
            raise RecipeError(
                f"dropout acts on the inputs of linear layers, and this weight {list(weight.shape)} is built whole; set "
                "dropout=0, or leave the layer out."
            )
        each = len(matrix) if batched else 1
        if self.pool is None:
            layers = each * self.weights
            ranks = (config.budget_rank, config.rank, config.shards, config.private_rank)
            self.indices = [draw_shards(layers, *ranks, self.generator) for _ in "AB"]
            self.pool = _Pool(config, matrix, layers)
        own = slice(each * self.built, each * (self.built + 1))
        self.built += 1
        index_A, index_B = (i[own] if batched else i[own][0] for i in self.indices)
        return _MixtureOfShards(config, self.pool, index_A.to(weight.device), index_B.to(weight.device))


class _Pool(nn.Module):
    """The shards of all layers of a group."""

    def __init__(self, config: MixtureOfShards, matrix: Tensor, layers: int):
        super().__init__()
        out, inputs = matrix.shape[-2:]
        rows = config.budget_rank * layers * config.shards
        kind = {"dtype": wide(matrix) if config.dtype == "float32" else matrix.dtype, "device": matrix.device}
        self.A = nn.Parameter(torch.empty(rows, inputs // config.shards, **kind))
        self.B = nn.Parameter(torch.zeros(rows, out // config.shards, **kind))
        bound = 1 / math.sqrt(inputs)  # LoRA's start of a whole vector, not that of a shard's width
        nn.init.uniform_(self.A, -bound, bound)


class _MixtureOfShards(Adapter):
    has_product = True
    has_lookup = True

    def __init__(self, config: MixtureOfShards, pool: _Pool, index_A: Tensor, index_B: Tensor):
        super().__init__(config.alpha / config.rank)
        self.rank = config.rank
        self.dropout = config.dropout
        self.pool = pool
        self.register_buffer("index_A", index_A)  # (…, rank · shards)
        self.register_buffer("index_B", index_B)

    def _factors(self) -> tuple[Tensor, Tensor]:
        """A (…, rank, in) and B (…, out, rank)."""
        return (
            gather_shards(self.pool.A, self.index_A, self.rank),
            gather_shards(self.pool.B, self.index_B, self.rank).mT,
        )

    def change(self, stored: Tensor) -> Tensor:
        A, B = self._factors()
        return (B @ A).reshape(stored.shape)

    def changed(self, x: Tensor) -> Tensor:
        A, B = self._factors()
        x = x.to(A.dtype)
        if self.dropout:
            x = functional.dropout(x, self.dropout, self.training)
        return functional.linear(functional.linear(x, A), B)

    def change_rows(self, gather: Gather) -> Tensor:
        A, B = self._factors()
        return gather(B) @ A

    def to_lora(self) -> tuple[Tensor, Tensor]:
        A, B = self._factors()
        return A, self.scale * B


METHODS = (
    FunctionMethod(
        name="mixture_of_shards",
        family="adapt",
        config=MixtureOfShards,
        summary="LoRA put together in each layer from one pool of short vectors: more rank for as many numbers.",
        goal="adapt",
        paper="mixture-of-shards",
        starts_at="weight",
        adapter=True,
        trial={"rank": 2},
        checked_by=("closed form", "brute force"),
    ),
)
