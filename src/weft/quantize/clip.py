"""Clip each group of weights to the range with which the group's part of a layer's output moves least.

    minimise over m in max |w| · (1 − i / 20), i = 0 … 9:    δᵀ G_gg δ,    δ = Q(clamp(w, −m, m)) − w

w (group_size,) is one group of a row, G = Σ xᵀx (in, in) over all calibration rows and G_gg its block of the group's inputs.
The second half of AWQ (:mod:`weft.quantize.awq`, arXiv:2306.00978). Complexity: 10 · out · in · group_size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from weft.errors import RecipeError
from weft.quantize.grid import Grid, fake_quantize, fit_grid

CLIPS = [1 - i / 20 for i in range(10)]
_ROWS = 512  # of a matrix, whose clips are sought at a time


def output_clip(weight: Tensor, gram: Tensor, config: Grid) -> Tensor:
    """The best range of each group: its weights are clamped to ± this before the grid is fitted.

    Args:
        weight: (out, in).
        gram: (in, in), Σ xᵀx of the layer's inputs.
        config: the grid.

    Returns:
        (out, groups), float32.

    Raises:
        RecipeError: shapes do not fit, or values are not finite.

    Source: arXiv:2306.00978, section 3 and the authors' code.

    >>> weight = torch.tensor([[1.0, 0.27, 0.27, 0.27]])
    >>> gram = torch.diag(torch.tensor([0.01, 1.0, 1.0, 1.0]))
    >>> [round(m, 2) for m in output_clip(weight, gram, Grid(bits=2, group_size=0)).flatten().tolist()]
    [0.8]
    """
    fit_grid(weight, config)  # which checks the weight
    if gram.shape != (weight.shape[1],) * 2 or not gram.isfinite().all():
        raise RecipeError(
            f"Clips need the finite Gram matrix (in, in) of a layer's {weight.shape[1]} inputs, got {list(gram.shape)}."
        )
    size = config.group_size or weight.shape[1]
    count = weight.shape[1] // size
    blocks = torch.stack([gram[i * size : (i + 1) * size, i * size : (i + 1) * size] for i in range(count)]).float()
    blocks = blocks / blocks.diagonal(dim1=1, dim2=2).mean().clamp(min=torch.finfo(torch.float32).tiny)
    found = []
    for part in weight.float().split(_ROWS):
        groups = part.unflatten(1, (-1, size))
        largest = groups.abs().amax(-1)  # (rows, groups)
        unit = largest.clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(-1)
        best, bound = torch.full_like(largest, torch.inf), largest.clone()
        for share in CLIPS:
            limit = (share * largest).unsqueeze(-1)
            clipped = groups.clamp(-limit, limit).flatten(1)
            delta = (
                fake_quantize(clipped, *fit_grid(clipped, config), config).unflatten(1, (-1, size)) - groups
            ) / unit
            by_group = delta.transpose(0, 1)  # (groups, rows, size)
            loss = ((by_group @ blocks) * by_group).sum(-1).T
            better = loss < best
            best, bound = torch.where(better, loss, best), torch.where(better, limit.squeeze(-1), bound)
        found.append(bound)
    return torch.cat(found)
