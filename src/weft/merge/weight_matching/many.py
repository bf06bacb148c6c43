"""Match the units of several models: to the first of them, or each to the mean of the others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from weft.errors import RecipeError
from weft.merge.weight_matching.blocks import state_of
from weft.merge.weight_matching.weights import Permutations, match_weights
from weft.symmetry import Symmetry


def match_many(
    models: Sequence[Any], symmetry: Symmetry, *, to: str = "first", max_rounds: int = 100, seed: int = 0
) -> list[Permutations]:
    """Permutations that bring several models into one order, so that they can be averaged.

    Args:
        models: state dicts or modules, at least two.
        symmetry: of all of them.
        to: "first" matches each model to the first; "mean" repeats, in random order, matching each model to the mean
            of all others as they stand, until none moves.
        max_rounds: over all models, with "mean".
        seed: of the orders.

    Returns:
        Permutations of each model, in their order.

    Raises:
        RecipeError: fewer than two models, or another word for ``to``. See also :func:`match_weights`.

    Source: Ainsworth et al., arXiv:2209.04836, algorithm 3, for "mean".

    >>> import torch
    >>> from torch import nn
    >>> from weft.symmetry import find_symmetry
    >>> a = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> symmetry = find_symmetry(a, torch.zeros(5, 3))
    >>> b = symmetry.apply(a.state_dict(), symmetry.random(torch.Generator().manual_seed(0)))
    >>> first, second = match_many([a, b], symmetry)
    >>> bool((symmetry.apply(b, second)["0.weight"] == a[0].weight).all())
    True
    """
    if len(models) < 2 or to not in ("first", "mean"):
        raise RecipeError(f"At least two models are matched, to 'first' or to 'mean'; got {len(models)} and {to!r}.")
    states = [state_of(model, symmetry, f"Model {i}") for i, model in enumerate(models)]
    if to == "first":
        found = [match_weights(states[0], state, symmetry, seed=seed).permutations for state in states[1:]]
        return [symmetry.identity(), *found]
    permutations: list[Permutations] = [symmetry.identity() for _ in states]
    current = [{name: t.to(_wide(t.dtype)) for name, t in s.items()} for s in states]
    generator = np.random.default_rng(seed)
    for _ in range(max_rounds):
        any_moved = False
        for i in generator.permutation(len(states)):
            others = [state for j, state in enumerate(current) if j != i]
            mean = {name: sum(o[name] for o in others) / len(others) for name in others[0]}
            step = match_weights(mean, current[i], symmetry, seed=int(generator.integers(2**31)))
            if len(step.history) > 1:
                any_moved = True
                permutations[i] = symmetry.compose(permutations[i], step.permutations)
                current[i] = symmetry.apply(current[i], step.permutations)
        if not any_moved:
            break
    return permutations


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype.is_floating_point and dtype.itemsize < 4 else dtype
