"""Remove the smallest weights of every layer: no data, and the baseline of everything that prunes.

Learning both Weights and Connections for Efficient Neural Networks, Han et al., arXiv:1506.02626 (NeurIPS 2015).

    S_oj = |W_oj|         W: (out, in)

Each matrix loses its ⌊sparsity · out · in⌋ lowest scores, or keeps the ``keep`` highest of every ``group`` consecutive ones
of a row. A matrix is what transformers computes with: queries, keys and values that are one layer share their zeros.

Differences from the paper and its code: the paper removes what is below a multiple of the layer's standard deviation, which
leaves the share to chance; here the share is given. Of equal scores the one with the lower index is kept. One shot, without
the training in between.
Complexity: O(out · in), with one selection for each matrix.
Re-implemented from the definition.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from weft.calibrate import Change, Statistics
from weft.errors import RecipeError
from weft.function.pruner import PruneMethod
from weft.method import parameter


@dataclass(frozen=True)
class Magnitude(Change):
    """Which weights go.

    >>> Magnitude(sparsity=0.8)
    Magnitude(sparsity=0.8, keep=0, group=0)
    """

    sparsity: float = parameter(0.5, "share of each matrix to remove, where group is 0", minimum=0, maximum=1)
    keep: int = parameter(0, "how many of every group of weights to keep", minimum=0)
    group: int = parameter(0, "consecutive inputs in a group, such as 4 for 2:4; 0 for whole matrices", minimum=0)

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity <= 1:
            raise RecipeError(f"sparsity must be from 0 to 1, got {self.sparsity!r}.")
        if self.group < 0 or (self.group and not 0 < self.keep <= self.group) or (self.keep and not self.group):
            raise RecipeError(
                f"keep weights of every group need 0 < keep ≤ group, got keep={self.keep!r} and group={self.group!r}; "
                "for 2:4 sparsity give keep=2, group=4."
            )

    def mask(self, name: str, weight: Tensor, statistics: Statistics | None = None) -> Tensor:
        """Which weights of a layer stay; statistics are not read."""
        return magnitude_mask(weight, sparsity=self.sparsity, keep=self.keep, group=self.group)

    def fit(self, name: str, weight: Tensor, statistics: Statistics) -> Tensor:
        """A layer's matrix with zeros; see :class:`weft.calibrate.Change`."""
        return weight.masked_fill(~self.mask(name, weight, statistics), 0)


def magnitude_mask(weight: Tensor, *, sparsity: float = 0.5, keep: int = 0, group: int = 0) -> Tensor:
    """Which weights stay.

    Args:
        weight: (out, in).
        sparsity: share of the matrix to remove, rounded down to whole weights.
        keep, group: keep this many of every group of consecutive inputs, instead of a share.

    Returns:
        (out, in) bool, true where a weight stays.

    Raises:
        RecipeError: it is no matrix, rows do not divide into groups, or values are not finite.

    Source: arXiv:1506.02626, section 3, with a share in the place of a threshold.

    >>> weight = torch.tensor([[4.0, -1.0], [3.0, 2.0]])
    >>> magnitude_mask(weight).tolist()
    [[True, False], [True, False]]
    >>> magnitude_mask(weight, sparsity=0.25).tolist()
    [[True, False], [True, True]]
    """
    Magnitude(sparsity, keep, group)
    if weight.dim() != 2 or not weight.numel() or not weight.is_floating_point():
        raise RecipeError(
            f"Magnitude pruning needs a matrix (out, in) of numbers, got {list(weight.shape)} {weight.dtype}."
        )
    if not weight.isfinite().all():
        raise RecipeError("Magnitude pruning needs finite weights, got NaN or infinity; the model is damaged.")
    if group and weight.shape[1] % group:
        raise RecipeError(f"Rows of {weight.shape[1]} inputs do not divide into groups of {group}.")
    scores = weight.detach().abs()
    scores = scores if scores.dtype == torch.float64 else scores.float()
    if group:
        order = scores.unflatten(1, (-1, group)).sort(dim=-1, descending=True, stable=True).indices
        mask = torch.zeros_like(scores, dtype=torch.bool)
        mask.unflatten(1, (-1, group)).scatter_(-1, order[..., :keep], True)  # (out, groups, group)
        return mask
    removed = int(sparsity * weight.numel() * (1 + 1e-12))  # 0.29 · 100 is 28.999…
    if not removed:
        return torch.ones_like(scores, dtype=torch.bool)
    flat = scores.flatten()
    threshold = flat.kthvalue(removed).values  # the largest that goes, and others that equal it
    mask = flat > threshold
    equal = (flat == threshold).nonzero().flatten()
    mask[equal[: weight.numel() - removed - int(mask.sum())]] = True
    return mask.view_as(scores)


METHODS = (
    PruneMethod(
        name="magnitude",
        family="prune",
        config=Magnitude,
        summary="Remove the smallest weights of every layer; no data.",
        goal="shrink",
        origin="Han et al. 2015, arXiv:1506.02626",
        checked_by=("brute force", "torch"),
        within="matrix",
    ),
)
