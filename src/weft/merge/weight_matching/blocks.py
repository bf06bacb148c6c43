"""Tensors of two models as arrays with one named dimension for each group of units, ready for products and moves.

An axis of a tensor is cut into sections, each a product of factors (heads × units of a head); a tensor falls into blocks,
one for each combination of its axes' sections. In a block every factor that permutes is a dimension of its own, so
fused projections, grouped heads and stacked experts need no case of their own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor

from weft.errors import NonFiniteError, RecipeError, ShapeError, did_you_mean
from weft.symmetry import Symmetry

_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")  # of data, so they move but have no say
_COLUMNS = 1 << 14  # of one product in float32; sums of products are in float64


@dataclass(frozen=True)
class Units:
    """A group in a part of a model: its name, its size, and the groups that it lies within there."""

    name: str
    size: int
    within: tuple[str, ...] = ()


@dataclass
class Block:
    """One part of one tensor in both models: (*dims); ``names`` has a group for each dimension, or ``""``."""

    a: Tensor
    b: Tensor
    names: tuple[str, ...]

    def inner(self) -> Tensor:
        """⟨A, B⟩ in float64."""
        return (self.a.double() * self.b.double()).sum()


def state_of(model: Any, symmetry: Symmetry, what: str) -> dict[str, Tensor]:
    """Tensors of a model by the names that a symmetry uses.

    Args:
        model: a mapping from names to torch tensors, numpy arrays or a checkpoint's tensors, or a ``torch.nn.Module``.
        symmetry: of the model.
        what: what messages call the model.

    Raises:
        ShapeError: a tensor that permutes is missing or has another shape. NonFiniteError: it holds NaN or infinity.
    """
    values: Mapping[str, Any] = model if isinstance(model, Mapping) else model.state_dict()
    by_name = {symmetry.aliases.get(name, name): value for name, value in values.items()}
    found = {}
    for name in dict.fromkeys(m.tensor for g in symmetry.groups for m in g.members):
        if name not in by_name:
            raise ShapeError(
                f"{what} has no tensor {name}, which permutes with others.{did_you_mean(name, by_name)} Likely cause: "
                "names of another form, or a part of a model. Give the whole model's state dict."
            )
        value = by_name[name]
        tensor = as_tensor(value)
        if tuple(tensor.shape) != tuple(symmetry.shapes[name]):
            raise ShapeError(
                f"{what}: {name} has shape {tuple(tensor.shape)}; in the traced model it has "
                f"{tuple(symmetry.shapes[name])}. Models to be matched have one architecture and one width."
            )
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise NonFiniteError(f"{what}: {name} holds NaN or infinity, so no unit can be matched. Repair it first.")
        found[name] = tensor
    return found


def as_tensor(value: Any) -> Tensor:
    """A tensor of torch, numpy or a checkpoint, without its gradient."""
    if hasattr(value, "read_into"):
        found: Tensor = value.torch()
        return found
    if isinstance(value, np.ndarray) and not value.flags.writeable:  # torch warns of these
        value = value.copy()
    return torch.as_tensor(value).detach()


def blocks_of(symmetry: Symmetry, a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> list[Block]:
    """All parts of two states in which a group has units, statistics of data and integers left out."""
    found = []
    for name, tensor in a.items():
        if name.rpartition(".")[2] in _STATISTICS or not tensor.is_floating_point():
            continue
        other = b[name].to(tensor.device)
        for sections in product(*(axis_sections(symmetry, name, axis) for axis in range(tensor.ndim))):
            names = tuple(n for section in sections for n in (*section[0], ""))
            if any(names):
                found.append(Block(_part(tensor, sections), _part(other, sections), names))
    return found


Section = tuple[tuple[str, ...], np.ndarray]  # groups, places in the axis: (*sizes of the groups, rest)


def axis_sections(symmetry: Symmetry, tensor: str, axis: int) -> list[Section]:
    """The parts of an axis, each a grid of places with one dimension for each group and one for all the rest."""
    grids: dict[Any, Section] = {}
    for group in symmetry.groups:
        for member in group.members:
            if (member.tensor, member.axis) != (tensor, axis):
                continue
            factors = [(loop.stride, loop.size, loop.group) for loop in member.loops]
            factors = sorted([*factors, (member.stride, group.size, group.name)], reverse=True)
            grids[member.start, tuple(factors)] = _grid(member.start, factors)
    covered = np.zeros(symmetry.shapes[tensor][axis], bool)
    found: list[Section] = []
    for names, grid in sorted(grids.values(), key=lambda section: section[1].size):  # the finest first
        taken = covered[grid]
        rest = ~taken[(0,) * len(names)]
        if (taken == ~rest).all():
            if rest.any():
                found.append((names, grid[..., rest]))
        else:
            raise RecipeError(f"{tensor}, axis {axis}: groups {names} overlap with others in a way that is not nested.")
        covered[grid] = True
    if not covered.all():
        found.append(((), np.flatnonzero(~covered)))
    return found


def _grid(start: int, factors: Sequence[tuple[int, int, str]]) -> Section:
    places = np.array(start)
    for stride, size, _ in factors:
        places = places[..., None] + np.arange(size) * stride
    named = [i for i, factor in enumerate(factors) if factor[2]]
    plain = [i for i, factor in enumerate(factors) if not factor[2]]
    places = places.transpose(*named, *plain)
    return tuple(factors[i][2] for i in named), places.reshape(*places.shape[: len(named)], -1)


def _part(tensor: Tensor, sections: Sequence[Section]) -> Tensor:
    for axis, (_, grid) in enumerate(sections):
        flat = grid.reshape(-1)
        if len(flat) != tensor.shape[axis] or (flat != np.arange(len(flat))).any():
            tensor = tensor.index_select(axis, torch.as_tensor(flat, device=tensor.device))
    return tensor.reshape([n for _, grid in sections for n in grid.shape])


def cost(blocks: Sequence[Block], group: str, size: int) -> np.ndarray:
    """Σ ⟨unit i of A, unit j of B⟩ over all dimensions of a group: (units of A, units of B) float64."""
    total: Tensor | None = None
    for block in blocks:
        dtype = torch.float64 if block.a.dtype == torch.float64 else torch.float32
        for dim, name in enumerate(block.names):
            if name != group:
                continue
            a, b = (t.movedim(dim, 0).reshape(size, -1) for t in (block.a, block.b))
            for start in range(0, a.shape[1], _COLUMNS):
                part = (a[:, start : start + _COLUMNS].to(dtype), b[:, start : start + _COLUMNS].to(dtype))
                add = (part[0] @ part[1].T).double()
                total = add if total is None else total + add
    return np.zeros((size, size)) if total is None else total.cpu().numpy()


def moved(blocks: Sequence[Block], groups: Sequence[Units], step: Mapping[str, np.ndarray]) -> Iterator[Tensor]:
    """B of each block after a step: units inside of others first, then these with all they hold."""
    for block in blocks:
        tensor = block.b
        for units in reversed(groups):
            if units.name in step and units.name in block.names:
                tensor = _move(tensor, list(block.names), units.name, step[units.name], units.within)
        yield tensor


def _move(tensor: Tensor, names: list[str], group: str, order: np.ndarray, within: tuple[str, ...]) -> Tensor:
    if not within:
        index = torch.as_tensor(order, device=tensor.device)
        for dim, name in enumerate(names):
            if name == group:
                tensor = tensor.index_select(dim, index)
        return tensor
    dim = names.index(within[0])
    rest = names[:dim] + names[dim + 1 :]
    rows = [_move(tensor.select(dim, i), rest, group, order[i], within[1:]) for i in range(tensor.shape[dim])]
    return torch.stack(rows, dim)
