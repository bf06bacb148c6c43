"""Several adapters on one model: which of them act and how strongly, which train, which are merged.

Each of the three is changed by its own verb and by nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import nn

from weft.errors import RecipeError, did_you_mean
from weft.function.adapter import Adapter
from weft.function.attach import functions
from weft.function.classes import Carrier, take_off, unwrapped
from weft.function.protocol import WeightFunction
from weft.function.stack import PackedStack, Stack
from weft.function.updates import stop_updating


@dataclass(frozen=True)
class AdapterState:
    """One adapter of a model.

    Attributes:
        enabled: whether it acts now.
        strength: what it is scaled by; 1 is as trained.
        trains: whether its parameters require gradients.
        merged: whether the weights it changes are merged.
        weights: full names of these.
        parameters: how many numbers it has, each once.
    """

    enabled: bool
    strength: float
    trains: bool
    merged: bool
    weights: tuple[str, ...]
    parameters: int


def adapters(model: nn.Module) -> dict[str, AdapterState]:
    """The adapters of a model by name, in the order of attaching.

    >>> import weft
    >>> layer = nn.Linear(4, 4)
    >>> _ = weft.adapt_(layer, weft.adapt.LoRA(rank=1), where="*", name="mine")
    >>> adapters(layer)["mine"].parameters
    8
    """
    found: dict[str, list[tuple[str, Adapter]]] = {}
    for full, fs in functions(unwrapped(model)).items():
        for function in fs:
            if isinstance(function, Adapter):
                found.setdefault(function.adapter, []).append((full, function))
    stacks = _stacks(model)
    result = {}
    for name, parts in found.items():
        numbers = {id(p): p for _, f in parts for p in f.parameters()}
        result[name] = AdapterState(
            enabled=all(f.enabled for _, f in parts),
            strength=parts[0][1].strength,
            trains=any(p.requires_grad for p in numbers.values()),
            merged=any(stacks[full].merged is not None for full, _ in parts),
            weights=tuple(full for full, _ in parts),
            parameters=sum(p.numel() for p in numbers.values()),
        )
    return result


def switch_(model: nn.Module, names: str | Sequence[str] | Mapping[str, float]) -> None:
    """Let the named adapters act, and no others; nothing else changes.

    Args:
        model: with adapters, none of them merged.
        names: one, several, none (``()`` is the model without adapters), or their strengths by name.

    Raises:
        RecipeError: no adapter has such a name, a strength is no finite number, or some are merged.

    >>> import weft
    >>> layer = nn.Linear(4, 4)
    >>> for name in "ab":
    ...     _ = weft.adapt_(layer, weft.adapt.LoRA(rank=1), where="*", name=name)
    >>> switch_(layer, {"a": 0.5})
    >>> [(s.enabled, s.strength) for s in adapters(layer).values()]
    [(True, 0.5), (False, 1.0)]
    """
    chosen = names if isinstance(names, Mapping) else dict.fromkeys([names] if isinstance(names, str) else names, None)
    _known(model, chosen)
    for name, value in chosen.items():
        real = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if isinstance(names, Mapping) and not real:
            raise RecipeError(f"The strength of {name!r} must be a finite number, got {value!r}; 1 is as trained.")
    _refuse_merged(model)
    for function in _adapters(model):
        function.enabled = function.adapter in chosen
        strength = chosen.get(function.adapter)
        if strength is not None:
            function.strength = float(strength)
    _note(model)


@contextmanager
def switched(model: nn.Module, names: str | Sequence[str] | Mapping[str, float] = ()) -> Iterator[None]:
    """For the length of a ``with``: :func:`switch_`; by default, the model without adapters.

    >>> import torch, weft
    >>> layer, x = nn.Linear(4, 4), torch.ones(1, 4)
    >>> before = layer(x)
    >>> _ = weft.adapt_(layer, weft.adapt.LoRA(rank=1), where="*")
    >>> _ = nn.init.ones_(layer.parametrizations.weight[0].B)
    >>> with switched(layer):
    ...     bool(torch.equal(layer(x), before))
    True
    """
    states = [(f, f.enabled, f.strength) for f in _adapters(model)]
    switch_(model, names)
    try:
        yield
    finally:
        for function, enabled, strength in states:
            function.enabled, function.strength = enabled, strength
        _note(model)


def train_only_(model: nn.Module, names: str | Sequence[str]) -> int:
    """Let the parameters of the named adapters train, and nothing else of the model.

    Returns:
        How many numbers train now.

    Raises:
        RecipeError: no adapter has such a name.
    """
    names = [names] if isinstance(names, str) else list(names)
    _known(model, names)
    wanted = {id(p): p for f in _adapters(model) if f.adapter in names for p in f.parameters()}
    for parameter in unwrapped(model).parameters():
        parameter.requires_grad_(id(parameter) in wanted)
    return sum(p.numel() for p in wanted.values())


def merge_(model: nn.Module) -> list[str]:
    """Compute each adapted weight once and use that, for faster evaluation; :func:`unmerge_` undoes it exactly.

    All adapters that act now are merged, at their strengths. The stored weights are not touched, so memory holds both
    until ``unmerge_``; to keep the merged ones alone, call ``weft.bake_``.

    Returns:
        Full names of the merged weights.
    """
    stacks = {id(s): s for s in _stacks(model).values() if any(isinstance(f, Adapter) for f in s)}
    for stack in stacks.values():
        stack.merge()
    return [n for n, s in _stacks(model).items() if id(s) in stacks]


def unmerge_(model: nn.Module) -> None:
    """Compute adapted weights in each pass again, bit for bit as before :func:`merge_`."""
    for stack in _stacks(model).values():
        stack.unmerge()


def remove_(model: nn.Module, name: str) -> list[str]:
    """Take an adapter away; a weight that has no other function is the stored one again.

    Returns:
        Full names of the weights that it changed.

    Raises:
        RecipeError: there is no such adapter, or some are merged.
    """
    _known(model, [name])
    _refuse_merged(model)
    touched = list(adapters(model)[name].weights)
    take_out(unwrapped(model), [f for f in _adapters(model) if f.adapter == name])
    return touched


def take_out(model: nn.Module, unwanted: Iterable[WeightFunction]) -> None:
    """Take functions off the weights that they are on, under all their names."""
    going, stacks = {id(f) for f in unwanted}, _stacks(model)
    for stack in {id(s): s for s in stacks.values()}.values():
        for function in [f for f in stack if id(f) in going]:
            stack.discard(function)
    for full, stack in stacks.items():
        if len(stack):
            continue
        stored = None if isinstance(stack, PackedStack) else stack.original
        if isinstance(stored, nn.Parameter):
            stored.requires_grad_(stack.trained)
        owner, _, name = full.rpartition(".")
        module = model.get_submodule(owner)
        if isinstance(module, Carrier) and name in module.weft_names:
            take_off(module, name, stored)
    stop_updating(model)


def _stacks(model: nn.Module) -> dict[str, Stack]:
    bare = unwrapped(model)
    found = {}
    for full in functions(bare):
        owner, _, name = full.rpartition(".")
        found[full] = bare.get_submodule(owner).parametrizations[name]
    return found


def _note(model: nn.Module) -> None:
    for stack in _stacks(model).values():
        stack.note()


def _adapters(model: nn.Module) -> list[Adapter]:
    unique = {id(f): f for fs in functions(unwrapped(model)).values() for f in fs}
    return [f for f in unique.values() if isinstance(f, Adapter)]


def _known(model: nn.Module, names: Sequence[str] | Mapping[str, object]) -> None:
    there = {f.adapter for f in _adapters(model)}
    for name in names:
        if name not in there:
            raise RecipeError(f"The model has no adapter {name!r}.{did_you_mean(name, there)}")


def _refuse_merged(model: nn.Module) -> None:
    merged = [n for n, s in _stacks(model).items() if s.merged is not None]
    if merged:
        raise RecipeError(
            f"Adapters are merged into {merged[0]} and {len(merged) - 1} other weights; call weft.adapt.unmerge_(model) first."
        )
