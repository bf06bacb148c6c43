"""What initialisers fill in place must be a parameter's own memory: everything else would be lost without a word."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import weft
from weft.errors import RecipeError

FUNCTIONS: dict[str, Callable[[Any], Any]] = {
    "generalized_gaussian": weft.init.generalized_gaussian_,
    "low_rank": weft.init.low_rank_,
    "mimetic": lambda w: weft.init.mimetic_attention_(w, w, w, w, heads=2),
    "spectral": lambda w: weft.init.spectral_variance_preserving_(w, size=8),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_would_be_lost_is_refused(name: str) -> None:
    fill = FUNCTIONS[name]
    adapted = nn.Linear(4, 4)
    weft.parametrize_(adapted, weft.adapt.LoRA(rank=2))
    before = adapted.weight.detach().clone()
    with pytest.raises(RecipeError, match="a function computes is, so what is written there is lost"):
        fill(adapted.weight)
    with pytest.raises(RecipeError, match="a function computes is, so what is written there is lost"):
        fill(adapted.weight[:4])
    assert torch.equal(adapted.weight, before)
    with pytest.raises(RecipeError, match=r"got a Linear; give its weight"):
        fill(nn.Linear(4, 4))
    with pytest.raises(RecipeError, match="has no values yet"):
        fill(nn.Linear(4, 4, device="meta").weight)


def test_parameters_and_their_views_are_filled() -> None:
    layer = nn.Linear(8, 8)
    before = layer.weight.detach().clone()
    weft.init.generalized_gaussian_(layer.weight[:4])
    assert torch.equal(layer.weight[4:], before[4:])
    assert not torch.isclose(layer.weight[:4], before[:4]).any()
    weft.init.low_rank_(layer.weight, rank=2)
    assert torch.linalg.matrix_rank(layer.weight) == 2
