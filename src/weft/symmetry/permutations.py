"""Permutations of a model's groups: identity, random, inverse and composition. numpy only.

A permutation is an array of old places, ``new[j] = old[p[j]]``. For a group that lies within others it has one row for
each of their units, in the order before they are permuted: first units move inside, then these move with all they hold.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from weft.errors import RecipeError, did_you_mean
from weft.symmetry.groups import Group, Symmetry

Permutations = Mapping[str, Any]  # name of a group -> (*within, size) array of old places; absent groups stay
Generator = Any  # torch.Generator or numpy.random.Generator


def checked(symmetry: Symmetry, permutations: Permutations) -> dict[str, np.ndarray]:
    """Permutations as int64 arrays, each what its group needs; one row is repeated for all units around it.

    Raises:
        RecipeError: an unknown group, a wrong shape, or places that are not each there once.
    """
    known = {g.name for g in symmetry.groups}
    done = {}
    for name, value in permutations.items():
        if name not in known:
            raise RecipeError(f"There is no group {name!r}.{did_you_mean(name, known)}")
        shape = symmetry.shape(name)
        array = np.asarray(value)
        if array.shape not in (shape, shape[-1:]) or array.dtype.kind not in "iu":
            raise RecipeError(
                f"{name}: a permutation is an array of integers of shape {shape} or {shape[-1:]}, got {array.dtype} of "
                f"{array.shape}. It has one row for each unit of the groups {symmetry[name].within}."
            )
        array = np.broadcast_to(array.astype(np.int64), shape)
        if not (np.sort(array, -1) == np.arange(shape[-1])).all():
            raise RecipeError(f"{name}: a permutation names each of 0 … {shape[-1] - 1} once.")
        done[name] = array
    return done


def identity(symmetry: Symmetry) -> dict[str, np.ndarray]:
    """Every group in its order."""
    shapes = {g.name: symmetry.shape(g) for g in symmetry.groups}
    return {name: np.broadcast_to(np.arange(s[-1]), s).copy() for name, s in shapes.items()}


def random(symmetry: Symmetry, generator: Generator, groups: tuple[str, ...] | None = None) -> dict[str, np.ndarray]:
    """Every group in a random order, or only the named ones.

    Args:
        symmetry: of the model.
        generator: a ``torch.Generator`` or ``numpy.random.Generator``.
        groups: names; the others are absent from the result and so stay as they are.
    """
    chosen = [g.name for g in symmetry.groups] if groups is None else [symmetry[name].name for name in groups]
    done = {}
    for name in chosen:
        shape = symmetry.shape(name)
        if isinstance(generator, np.random.Generator):
            keys = generator.random(shape)
        else:
            import torch

            keys = torch.rand(shape, generator=generator, dtype=torch.float64, device=generator.device).cpu().numpy()
        done[name] = np.argsort(keys, axis=-1)
    return done


def _units(symmetry: Symmetry, group: Group, permutations: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """New place of every unit around a group, by their old places: one array of the shape of ``within`` for each."""
    shape = symmetry.shape(group)[:-1]
    grid = dict(zip(group.within, np.indices(shape)))
    found = []
    for name in group.within:
        if name not in permutations:
            found.append(grid[name])
            continue
        back = np.argsort(permutations[name], axis=-1)
        found.append(back[(*(grid[p] for p in symmetry[name].within), grid[name])])
    return found


def invert(symmetry: Symmetry, permutations: Permutations) -> dict[str, np.ndarray]:
    """What undoes permutations: ``apply(invert(p), apply(p, state)) = state``."""
    given = checked(symmetry, permutations)
    done = {}
    for name in _touched(symmetry, given):
        group = symmetry[name]
        own = given.get(name, np.broadcast_to(np.arange(group.size), symmetry.shape(group)))
        back = np.argsort(own, axis=-1)
        result = np.empty_like(back)
        result[tuple(_units(symmetry, group, given))] = back
        done[name] = result
    return done


def compose(symmetry: Symmetry, first: Permutations, then: Permutations) -> dict[str, np.ndarray]:
    """One permutation for two: ``apply(compose(p, q), state) = apply(q, apply(p, state))``."""
    one, two = checked(symmetry, first), checked(symmetry, then)
    done = {}
    for name in [g.name for g in symmetry.groups if g.name in one or g.name in two]:
        group = symmetry[name]
        plain = np.broadcast_to(np.arange(group.size), symmetry.shape(group))
        second = two.get(name, plain)[tuple(_units(symmetry, group, one))] if group.within else two.get(name, plain)
        done[name] = np.take_along_axis(one.get(name, plain), second, axis=-1)
    return done


def _touched(symmetry: Symmetry, given: Mapping[str, np.ndarray]) -> list[str]:
    return [g.name for g in symmetry.groups if g.name in given]
