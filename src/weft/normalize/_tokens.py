"""Statistics over tokens, padding left out, and checks that norms share."""

from __future__ import annotations

import torch
from torch import Tensor

from weft.errors import ShapeError


def widened(x: Tensor) -> Tensor:
    """x in float32 if it is in half precision; statistics of half-precision numbers lose too much."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def mean_over_tokens(x: Tensor, valid: Tensor | None) -> Tensor:
    """(…, C) -> (C): the mean over tokens, over valid ones only where a mask (…) says which."""
    flat = x.reshape(-1, x.shape[-1])
    if valid is None:
        return flat.mean(0)
    weight = valid.reshape(-1, 1).to(x.dtype)
    return (flat * weight).sum(0) / weight.sum().clamp_min(1)


def check_features(x: Tensor, axis: int, features: int, owner: str) -> None:
    """Refuse an input with another number of features."""
    if x.dim() <= max(axis, 0) or x.shape[axis] != features:
        where = "the last axis" if axis == -1 else f"axis {axis}"
        raise ShapeError(
            f"{owner} normalises {features} features along {where} and got an input of shape "
            f"{list(x.shape)}; build it with that number, or move the features."
        )
