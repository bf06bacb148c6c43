"""See a gradient matrix through a few of its own directions, so that an optimizer keeps few numbers about it.

GaLore, Zhao et al., arXiv:2403.03507 (2024).

    R = Uᵀ G V          G: (out, in), U: (out, r), V: (in, r), the first singular vectors of a gradient
    G̃ = U R Vᵀ

One-sided projections leave U or V out: R is then (out, r) or (r, in).

Differences from the paper and its code: which side is projected is an argument and never guessed from shapes, which the
code does when it projects back, wrongly for wide matrices of full rank. Singular vectors have a sign by definition:
their entry of largest magnitude is positive. Without one, moments kept over a change of basis depend on the linear
algebra library. :func:`carried` moves moments into a new basis, which the paper leaves open.
Complexity: O(out · in · min(out, in)) for a basis, O(out · in · r) for a projection. Re-implemented from the equations
(official code: Apache-2.0).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from weft.errors import RecipeError
from weft.function.layout import is_conv1d
from weft.function.protocol import as_matrix, wide
from weft.function.where import Selector, matches, nearest_names, output_heads

SIDES = ("left", "right")
PROJECTIONS = ("auto", "left", "right", "both")
Bases = tuple[Tensor | None, Tensor | None]


def projected_sides(shape: tuple[int, int], projection: str = "auto") -> tuple[str, ...]:
    """The sides of a matrix (out, in) that are projected; "auto" is the smaller one, "right" for square matrices.

    >>> projected_sides((8, 4)), projected_sides((4, 8)), projected_sides((4, 8), "both")
    (('right',), ('left',), ('left', 'right'))
    """
    if projection == "both":
        return SIDES
    if projection == "auto":
        return ("right",) if shape[0] >= shape[1] else ("left",)
    return (projection,)


def low_rank_basis(gradient: Tensor, rank: int, side: str) -> Tensor:
    """The first singular vectors of a gradient.

    Args:
        gradient: (out, in). NaN and infinity count as 0 here; what is projected keeps them.
        rank: how many vectors; more than min(out, in) count as that.
        side: "left" or "right".

    Returns:
        Orthonormal columns, (out, r) or (in, r), in float32 or the gradient's type where that is wider.

    Raises:
        RecipeError: the gradient is no matrix, or the rank or the side is none.

    Source: arXiv:2403.03507, algorithm 2; signs as in the module's docstring.

    >>> low_rank_basis(torch.tensor([[0.0, -3.0], [0.0, 0.0], [1.0, 0.0]]), 1, "left").T
    tensor([[1., 0., 0.]])
    """
    if gradient.dim() != 2 or not gradient.numel() or rank < 1 or side not in SIDES:
        raise RecipeError(
            f"A basis is of a matrix, has at least one vector and a side of {SIDES}; got a gradient of shape "
            f"{list(gradient.shape)}, rank {rank} and side {side!r}."
        )
    known = gradient.to(wide(gradient)).nan_to_num(0.0, 0.0, 0.0)  # the decomposition would raise an error
    left, _, right = torch.linalg.svd(known, full_matrices=False)
    vectors = left if side == "left" else right.mT
    vectors = vectors[:, :rank]
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return vectors * torch.where(largest < 0, -1, 1).to(vectors)


def project(gradient: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    """Uᵀ G V; a side without a basis stays whole.

    >>> project(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[0.0], [1.0]]), None)
    tensor([[3., 4.]])
    """
    seen = gradient if left is None else left.mT @ gradient
    return seen if right is None else seen @ right


def project_back(low: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    """U R Vᵀ; a side without a basis is whole already.

    >>> project_back(torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0], [1.0]]), None)
    tensor([[0., 0.],
            [3., 4.]])
    """
    whole = low if left is None else left @ low
    return whole if right is None else whole @ right.mT


def carried(first: Tensor, second: Tensor, old: Bases, new: Bases) -> tuple[Tensor, Tensor]:
    """Moments of projected gradients, from one pair of bases into another.

    Args:
        first: running mean of R; it turns as R does, and loses what the new bases do not hold.
        second: running mean of R², entry by entry; exact for entries that are not correlated.
        old, new: (left, right), None for a side that is not projected.

    >>> half = torch.tensor([[0.6, 0.8], [-0.8, 0.6]])
    >>> mean, square = carried(torch.tensor([[1.0], [0.0]]), torch.tensor([[1.0], [0.0]]), (torch.eye(2), None), (half, None))
    >>> mean.T, square.T
    (tensor([[0.6000, 0.8000]]), tensor([[0.3600, 0.6400]]))
    """
    left, right = (None if a is None or b is None else b.mT @ a for a, b in zip(old, new))
    turned = project_back(first, left, right)
    return turned, project_back(second, *(None if t is None else t.square() for t in (left, right)))


def projected_state_size(
    shape: tuple[int, int], rank: int, *, projection: str = "auto", normalize: str = "none"
) -> int:
    """How many numbers are kept for a matrix (out, in); AdamW keeps 2 · out · in.

    >>> projected_state_size((100, 50), 4), projected_state_size((100, 50), 4, projection="both", normalize="weight")
    (1000, 932)
    """
    sides = projected_sides(shape, projection)
    kept = min(rank, *shape)
    low = [kept if side in sides else length for side, length in zip(("left", "right"), shape)]
    bases = sum(kept * length for side, length in zip(("left", "right"), shape) if side in sides)
    return 2 * low[0] * low[1] + bases + (3 * shape[0] if normalize == "weight" else 0)


def projected_groups(
    model: nn.Module, rank: int, where: Selector = "all-linear", *, ignore: Selector = ()
) -> list[dict[str, Any]]:
    """Parameter groups: weights of chosen layers with a ``rank``, all other parameters that train without.

    Args:
        model: any module.
        rank: directions kept; weights whose smaller side is no larger have nothing to gain and are not projected.
        where: which layers, see :mod:`weft.function.where`.
        ignore: layers to leave plain.

    Returns:
        Up to three groups: projected weights, those that are stored transposed (``output_axis`` 1), and the rest.

    Raises:
        RecipeError: no weight is chosen.

    >>> groups = projected_groups(nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 8)), 4, where="0")
    >>> [(len(group["params"]), group.get("rank")) for group in groups]
    [(1, 4), (3, None)]
    """
    heads = output_heads(model)
    layers = [(name, m) for name, m in model.named_modules() if isinstance(m._parameters.get("weight"), nn.Parameter)]
    chosen: dict[Tensor, int] = {}
    for name, module in layers:
        weight = module._parameters["weight"]
        if matches(where, name, module, heads) and not matches(ignore, name, module, heads) and _fits(weight, rank):
            chosen[weight] = int(is_conv1d(type(module)))
    if not chosen:
        raise RecipeError(
            f"No weight is projected: {where!r} has to choose layers whose weights train and have both sides above the "
            f"rank {rank}.{nearest_names(where, layers)}"
        )
    groups: list[dict[str, Any]] = [
        {"params": [w for w, axis in chosen.items() if axis == output_axis], "rank": rank, "output_axis": output_axis}
        for output_axis in (0, 1)
    ]
    groups.append({"params": [p for p in model.parameters() if p.requires_grad and p not in chosen]})
    return [group for group in groups if group["params"]]


def _fits(weight: Tensor, rank: int) -> bool:
    trains = weight.requires_grad and weight.is_floating_point() and weight.dim() >= 2
    return trains and min(as_matrix(weight).shape) > rank
