"""Remove the weights whose product with the norm of their input is smallest, in one pass and without training.

A Simple and Effective Pruning Approach for Large Language Models, Sun et al., arXiv:2306.11695 (ICLR 2024).

    S_oj = |W_oj| · ‖x_j‖₂         W: (out, in); x_j: input j of the layer over all calibration tokens

Each output row loses its ⌊sparsity · in⌋ lowest scores, or keeps the ``keep`` highest of every ``group`` consecutive ones.
Blocks are pruned in order, each with the inputs that the pruned blocks before it give.

Differences from the paper and its code: the authors divide the squared norms by the number of sequences, which changes no
row's order. n:m there counts zeros in every m, which is the same for 2:4 only; here ``keep`` and ``group`` are named. Of
equal scores the one with the lower index is kept. Padding is not counted. An expert that no token of the data reached is
pruned by magnitude.
Complexity: O(out · in · log in), and one forward pass over the data (two for each block).
Re-implemented from the equations (official code: MIT).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from weft.calibrate import Change, Statistics
from weft.errors import RecipeError
from weft.function.pruner import PruneMethod
from weft.method import parameter

_ROWS = 512  # at a time: sorting takes 32 bytes a weight


@dataclass(frozen=True)
class Wanda(Change):
    """Which weights go.

    >>> Wanda(keep=2, group=4)
    Wanda(sparsity=0.5, keep=2, group=4)
    """

    sparsity: float = parameter(0.5, "share of each row to remove, where group is 0", minimum=0, maximum=1)
    keep: int = parameter(0, "how many of every group of weights to keep", minimum=0)
    group: int = parameter(0, "consecutive inputs in a group, such as 4 for 2:4; 0 for whole rows", minimum=0)

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity <= 1:
            raise RecipeError(f"sparsity must be from 0 to 1, got {self.sparsity!r}.")
        if self.group < 0 or (self.group and not 0 < self.keep <= self.group) or (self.keep and not self.group):
            raise RecipeError(
                f"keep weights of every group need 0 < keep ≤ group, got keep={self.keep!r} and group={self.group!r}; "
                "for 2:4 sparsity give keep=2, group=4."
            )

    needs: ClassVar[tuple[str, ...]] = ("scales",)

    def mask(self, name: str, weight: Tensor, statistics: Statistics) -> Tensor:
        """Which weights of a layer stay, by statistics of the kind ``scales``, as gathered or read from a folder."""
        reached = statistics.rows(name) > 0
        norm = statistics.norm(name) if reached else torch.ones(weight.shape[-1:], device=weight.device)
        return wanda_mask(weight, norm, sparsity=self.sparsity, keep=self.keep, group=self.group)

    def fit(self, name: str, weight: Tensor, statistics: Statistics) -> Tensor:
        """A layer's matrix with zeros; see :class:`weft.calibrate.Change`."""
        return weight.masked_fill(~self.mask(name, weight, statistics), 0)


def wanda_mask(weight: Tensor, norm: Tensor, *, sparsity: float = 0.5, keep: int = 0, group: int = 0) -> Tensor:
    """Which weights stay.

    Args:
        weight: (out, in).
        norm: (in,), ‖x‖₂ of each input; :meth:`weft.calibrate.Statistics.norm`. Any positive multiple gives the same mask.
        sparsity: share of each row to remove, rounded down to whole weights.
        keep, group: keep this many of every group of consecutive inputs, instead of a share.

    Returns:
        (out, in) bool, true where a weight stays.

    Raises:
        RecipeError: shapes do not fit, a norm is negative, or values are not finite.

    Source: arXiv:2306.11695, equation 1 and algorithm 1.

    >>> weight = torch.tensor([[4.0, -1.0, 3.0, 2.0]])
    >>> wanda_mask(weight, torch.tensor([1.0, 9.0, 1.0, 1.0])).tolist()
    [[True, True, False, False]]
    >>> wanda_mask(weight, torch.ones(4), keep=1, group=2).tolist()
    [[True, False, True, False]]
    """
    Wanda(sparsity, keep, group)
    is_matrix = weight.dim() == 2 and weight.numel() and weight.is_floating_point()
    if not is_matrix or norm.shape != weight.shape[1:]:
        raise RecipeError(
            f"Wanda needs a matrix (out, in) of numbers and the norms of its inputs (in,), got {list(weight.shape)} "
            f"{weight.dtype} and {list(norm.shape)}."
        )
    if not weight.isfinite().all() or not norm.isfinite().all() or bool((norm < 0).any()):
        raise RecipeError(
            "Wanda needs finite weights and finite norms that are not negative, got NaN, infinity or a negative norm; the "
            "model or the data is damaged."
        )
    if group and weight.shape[1] % group:
        raise RecipeError(f"Rows of {weight.shape[1]} inputs do not divide into groups of {group}.")
    width = group or weight.shape[1]
    kept = keep if group else width - int(sparsity * width + 1e-9)  # 0.7 · 10 is 6.999…
    mask = torch.zeros(weight.shape, dtype=torch.bool, device=weight.device)
    for rows, part in zip(weight.split(_ROWS), mask.split(_ROWS)):
        scores = rows.abs().double() * norm.to(rows.device, torch.float64)
        order = scores.unflatten(1, (-1, width)).sort(dim=-1, descending=True, stable=True).indices
        part.unflatten(1, (-1, width)).scatter_(-1, order[..., :kept], True)  # (rows, groups, width)
    return mask


METHODS = (
    PruneMethod(
        name="wanda",
        family="prune",
        config=Wanda,
        summary="Remove the weights whose product with the norm of their input is smallest, row by row.",
        goal="shrink",
        origin="Sun et al. 2023, arXiv:2306.11695",
        needs="calibration",
        checked_by=("brute force",),
    ),
)
