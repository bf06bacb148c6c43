"""Permute, and cut, the tensors of a model: state dicts of torch or numpy, live models, tensors of a checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from weft.errors import RecipeError, ShapeError, did_you_mean
from weft.symmetry.groups import Group, Member, Symmetry
from weft.symmetry.permutations import Permutations, checked


@dataclass(frozen=True)
class Cut:
    """What to keep of one axis of one tensor: places, or one row of places for each place of the axis ``along``."""

    tensor: str
    axis: int
    places: np.ndarray
    along: int | None = None

    def __call__(self, tensor: Any) -> Any:
        """The tensor without the rest."""
        return _take(tensor, self.axis, self.places, self.along)


def apply(symmetry: Symmetry, state: Any, permutations: Permutations) -> Any:
    """Permute a model's tensors together, so that its function stays the same.

    Args:
        symmetry: of the model.
        state: a mapping from names to torch tensors, numpy arrays or a checkpoint's tensors, which stays as it is; or a
            ``torch.nn.Module``, which is changed in place.
        permutations: ``new[j] = old[p[j]]`` for each group that moves; absent groups stay.

    Returns:
        A new mapping of the same names (tensors that nothing moves are the same objects), or the module.

    Raises:
        RecipeError: an unknown group or no permutation of it. ShapeError: a tensor that moves is absent or has another
            shape than the model that was traced.
    """
    moves = _moves(symmetry, checked(symmetry, permutations))
    if not isinstance(state, Mapping):
        return _apply_to_module(symmetry, state, moves)
    given = dict(state)
    result = dict(given)
    moved: dict[Any, Any] = {}  # a storage under several names is moved once and stays one
    for name in _names_in(symmetry, given, moves):
        first = symmetry.aliases.get(name, name)
        key = (first, _storage(given[name]))
        if key not in moved:
            moved[key] = _move(_array(given[name]), moves[first])
        result[name] = moved[key]
    return result


def _storage(tensor: Any) -> Any:
    """What tensors of one storage have in common."""
    if hasattr(tensor, "data_ptr") and tensor.device.type != "meta":
        return tensor.data_ptr(), tuple(tensor.stride())
    return id(tensor)


def _apply_to_module(symmetry: Symmetry, module: Any, moves: Mapping[str, list[Cut]]) -> Any:
    import torch

    tensors = {**dict(module.named_parameters(remove_duplicate=False)), **dict(module.named_buffers())}
    once = {id(tensors[name]): name for name in _names_in(symmetry, tensors, moves)}
    with torch.no_grad():
        for name in once.values():
            tensors[name].copy_(_move(tensors[name], moves[symmetry.aliases.get(name, name)]))
    return module


def _names_in(symmetry: Symmetry, state: Mapping[str, Any], moves: Mapping[str, Any]) -> Iterator[str]:
    """Names of a state that move, after a check that all are there in their shapes."""
    names = [n for n in state if symmetry.aliases.get(n, n) in moves]
    there = {symmetry.aliases.get(n, n) for n in names}
    for name in moves:
        if name not in there:
            raise ShapeError(
                f"{name} moves with the others but is not in the state.{did_you_mean(name, state)} Likely cause: a part "
                "of a model, or names of another form (as a file has them). Give the whole model's state dict."
            )
    for name in names:
        shape = symmetry.shapes[symmetry.aliases.get(name, name)]
        if tuple(state[name].shape) != tuple(shape):
            raise ShapeError(f"{name} has shape {tuple(state[name].shape)}; in the traced model it has {tuple(shape)}.")
    yield from names


def _array(tensor: Any) -> Any:
    """A tensor of a checkpoint as torch sees it; torch's and numpy's as they are."""
    return tensor.torch() if hasattr(tensor, "read_into") else tensor


def _move(tensor: Any, moves: Iterable[Cut]) -> Any:
    for move in moves:
        tensor = move(tensor)
    return tensor


def _take(tensor: Any, axis: int, places: np.ndarray, along: int | None) -> Any:
    if along is None:
        if isinstance(tensor, np.ndarray):
            return np.take(tensor, places, axis=axis)
        import torch

        return tensor.index_select(axis, torch.as_tensor(places, device=tensor.device))
    rows = [_take(_row(tensor, along, i), axis, row, None) for i, row in enumerate(places)]
    if isinstance(tensor, np.ndarray):
        return np.concatenate(rows, axis=along)
    import torch

    return torch.cat(rows, dim=along)


def _row(tensor: Any, axis: int, i: int) -> Any:
    return tensor[(slice(None),) * axis + (slice(i, i + 1),)]


# where the units lie


def _moves(symmetry: Symmetry, permutations: Mapping[str, np.ndarray]) -> dict[str, list[Cut]]:
    """What to do to each tensor, in order: units inside of others first, then these with all they hold."""
    moves: dict[str, list[Cut]] = {}
    for group in reversed(symmetry.groups):  # groups come after those that they lie within
        if group.name not in permutations:
            continue
        for tensor, axis in dict.fromkeys((m.tensor, m.axis) for m in group.members):
            order, along = _places(symmetry, group, tensor, axis, permutations[group.name])
            before = moves.setdefault(tensor, [])
            if before and along is None and (before[-1].axis, before[-1].along) == (axis, None):
                before[-1] = Cut(tensor, axis, before[-1].places[order])
            else:
                before.append(Cut(tensor, axis, order, along))
    return moves


def _positions(member: Member, size: int) -> np.ndarray:
    """Places of a member's units in its axis: (*sizes of the loops, units)."""
    grid = np.array(member.start)
    for loop in member.loops:
        grid = grid[..., None] + np.arange(loop.size) * loop.stride
    return grid[..., None] + np.arange(size) * member.stride


def _places(
    symmetry: Symmetry, group: Group, tensor: str, axis: int, permutation: np.ndarray
) -> tuple[np.ndarray, int | None]:
    """Old places of an axis in their new order; one row for each place of another axis that units around lie in."""
    members = [m for m in group.members if (m.tensor, m.axis) == (tensor, axis)]
    across = [p for p in group.within if p not in {loop.group for loop in members[0].loops}]
    length = symmetry.shapes[tensor][axis]
    if not across:
        return _order(group, members, length, permutation, {}), None
    along, units = _other_axis(symmetry, tensor, axis, across)
    fixed = [{name: int(unit[i]) for name, unit in units.items()} for i in range(symmetry.shapes[tensor][along])]
    return np.stack([_order(group, members, length, permutation, f) for f in fixed]), along


def _order(
    group: Group, members: list[Member], length: int, permutation: np.ndarray, fixed: Mapping[str, int]
) -> np.ndarray:
    """Old places of an axis in their new order; a group may be two factors of one axis, as of x xᵀ laid flat."""
    order = np.arange(length)
    for member in members:
        step = np.arange(length)
        step[_positions(member, group.size)] = _moved(group, member, permutation, fixed)
        order = order[step]
    return order


def _moved(group: Group, member: Member, permutation: np.ndarray, fixed: Mapping[str, int]) -> np.ndarray:
    """Old places of a member's units in their new order: (*sizes of the loops, units)."""
    sizes = tuple(loop.size for loop in member.loops)
    numbers = {loop.group: i for i, loop in enumerate(member.loops)}
    grid = np.indices(sizes)
    index = tuple(grid[numbers[p]] if p in numbers else np.full(sizes, fixed[p]) for p in group.within)
    chosen = permutation[index] if index else np.broadcast_to(permutation, (*sizes, group.size))
    return np.take_along_axis(_positions(member, group.size), chosen, axis=-1)


def _other_axis(symmetry: Symmetry, tensor: str, axis: int, names: Sequence[str]) -> tuple[int, dict[str, np.ndarray]]:
    """The axis that the units around lie in, and their number at each of its places."""
    units, axes = {}, set()
    for name in names:
        group = symmetry[name]
        member = next(m for m in group.members if m.tensor == tensor and m.axis != axis)
        axes.add(member.axis)
        unit = np.empty(symmetry.shapes[tensor][member.axis], np.int64)
        unit[_positions(member, group.size)] = np.arange(group.size)
        units[name] = unit
    if len(axes) > 1:
        raise RecipeError(
            f"{tensor}: {list(names)} lie in several axes, which cannot be permuted one inside the other."
        )
    return axes.pop(), units


# removal


def cut(symmetry: Symmetry, group: str, keep: Any) -> tuple[Cut, ...]:
    """What to keep of each tensor so that only some units of a group remain: channels, heads, experts, width.

    Args:
        symmetry: of the model.
        group: its name.
        keep: numbers of the units, in the order that they shall have: (kept,), or (*within, kept) where the group lies
            within others and other units are kept in each of theirs.

    Returns:
        One :class:`Cut` for each axis; call it with the tensor. Attributes of modules (sizes, numbers of heads) are not
        touched.

    Raises:
        RecipeError: an unknown group; no unit, one twice, or one that is not there.

    >>> from weft.symmetry.groups import Group, Member, Symmetry
    >>> members = (Member("up", 0, 0, 1), Member("down", 1, 0, 1))
    >>> symmetry = Symmetry((Group("mlp", "intermediate", 4, members),), (), (), {"up": (4, 2), "down": (3, 4)}, {})
    >>> [(c.tensor, c.axis, c.places.tolist()) for c in symmetry.cut("mlp", [0, 2])]
    [('up', 0, [0, 2]), ('down', 1, [0, 2])]
    """
    found = symmetry[group]
    shape = symmetry.shape(found)
    kept = np.asarray(keep)
    if kept.dtype.kind not in "iu" or kept.ndim not in (1, len(shape)) or not kept.size:
        raise RecipeError(f"{group}: keep names the units as integers, at least one, got {kept.dtype} of {kept.shape}.")
    count = kept.shape[-1]
    if kept.ndim == 1:
        kept = np.broadcast_to(kept, (*shape[:-1], count))
    ordered = np.sort(kept, -1)
    if kept.shape[:-1] != shape[:-1] or (ordered[..., 1:] == ordered[..., :-1]).any():
        raise RecipeError(f"{group}: keep has shape (kept,) or {(*shape[:-1], 'kept')} and names no unit twice.")
    if ordered.min() < 0 or ordered.max() >= found.size:
        raise RecipeError(f"{group}: units are 0 … {found.size - 1}, got {ordered.min()} … {ordered.max()}.")
    there = np.zeros(shape, bool)
    np.put_along_axis(there, kept, True, axis=-1)
    rest = np.argsort(there, axis=-1, kind="stable")[..., : found.size - count]  # the others, behind
    order = np.concatenate([kept, rest], axis=-1)
    cuts = []
    for tensor, axis in dict.fromkeys((m.tensor, m.axis) for m in found.members):
        places, along = _places(symmetry, found, tensor, axis, order)
        stays = np.ones(symmetry.shapes[tensor][axis], bool)
        for member in found.members:
            if (member.tensor, member.axis) == (tensor, axis):
                stays[_positions(member, found.size)[..., count:]] = False
        cuts.append(Cut(tensor, axis, places[..., stays], along))
    return tuple(cuts)
