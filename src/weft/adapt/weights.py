"""The weights that an adapter changes, and how functions read from a folder are put on them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from weft.adapt.attach import Adapted, Part, attach_parts
from weft.errors import CheckpointError, RecipeError, ShapeError, did_you_mean
from weft.function.adapter import Adapter
from weft.function.attach import functions
from weft.function.classes import unwrapped
from weft.function.layout import is_packed
from weft.function.protocol import FunctionConfig, WeightFunction
from weft.function.stack import PackedStack, Stack


@dataclass(frozen=True)
class AdaptedWeight:
    """A weight with the functions that one adapter has on it.

    Attributes:
        names: its full names in the model; several if it is tied.
        module: the layer that has it under the first name.
        stack: what computes it.
        functions: the adapter's, innermost first.
    """

    names: tuple[str, ...]
    module: nn.Module
    stack: Stack
    functions: tuple[Adapter, ...]

    @property
    def path(self) -> str:
        """Of the layer."""
        return self.names[0].rpartition(".")[0]

    @property
    def tensor(self) -> str:
        """What the layer calls it."""
        return self.names[0].rpartition(".")[2]

    @property
    def layer(self) -> type[nn.Module]:
        """The layer's class without functions."""
        found: type[nn.Module] = getattr(type(self.module), "weft_base", type(self.module))
        return found


def adapted_weights(model: nn.Module, name: str) -> list[AdaptedWeight]:
    """The weights that an adapter changes, each once, in the model's order.

    Raises:
        RecipeError: there is no such adapter.
    """
    bare = unwrapped(model)
    found: dict[int, AdaptedWeight] = {}
    known = set()
    for full, fs in functions(bare).items():
        known |= {f.adapter for f in fs if isinstance(f, Adapter)}
        mine = tuple(f for f in fs if isinstance(f, Adapter) and f.adapter == name)
        if not mine:
            continue
        owner, _, leaf = full.rpartition(".")
        module = bare.get_submodule(owner)
        stack = module.parametrizations[leaf]
        first = found.get(id(stack))
        names = (full,) if first is None else (*first.names, full)
        found[id(stack)] = AdaptedWeight(names, module if first is None else first.module, stack, mine)
    if not found:
        raise RecipeError(f"The model has no adapter {name!r}.{did_you_mean(name, known)}")
    return list(found.values())


def plain_tensors(model: nn.Module) -> dict[str, Any]:
    """All parameters and buffers by the names of the model without functions: tensors, or what computes them.

    >>> list(plain_tensors(nn.Linear(2, 2)))
    ['weight', 'bias']
    """
    found: dict[str, Any] = {}
    for path, module in unwrapped(model).named_modules(remove_duplicate=False):
        if ".parametrizations" in f".{path}":
            continue
        held = {**module._parameters, **module._buffers}
        if is_packed(module):
            held["weight"] = PackedStack(module)
        held |= {n: module.parametrizations[n] for n in getattr(type(module), "weft_names", ())}
        found.update({f"{path}.{n}" if path else n: v for n, v in held.items() if v is not None})
    return found


def base_of(held: Tensor | Stack) -> Tensor:
    """A weight as it is beneath all adapters, as the layer stores it."""
    if not isinstance(held, Stack):
        return held.detach()
    beneath = next((i for i, f in enumerate(held) if isinstance(f, Adapter)), len(held))
    if not beneath:
        return held.original.detach()
    with torch.no_grad():
        return held.layout.stored(held.weight(beneath))


@dataclass
class Stored:
    """One function as a folder holds it.

    Attributes:
        config: what builds it.
        tensors: its parameters and buffers by name.
        shared: names of its tensors that are another's -> (that weight, which of its functions, name).
    """

    config: Any
    tensors: dict[str, Tensor]
    shared: dict[str, tuple[str, int, str]] = field(default_factory=dict)


def put_on(model: nn.Module, stored: Mapping[str, list[Stored]], name: str) -> Adapted:
    """Attach functions to the weights of these names, in place, with the tensors they were saved with.

    Raises:
        CheckpointError: a tensor is missing, too many, or of another shape; the model is then as before.
    """
    built: dict[tuple[str, int], WeightFunction] = {}
    depth = max(map(len, stored.values()))

    def parts() -> Iterator[Part]:
        for level in range(depth):
            by_tensor: dict[str, dict[str, Stored]] = {}
            for full, several in stored.items():
                if level < len(several):
                    by_tensor.setdefault(full.rpartition(".")[2], {})[full] = several[level]
            for tensor, chosen in by_tensor.items():
                paths = {full[: -len(tensor)].rstrip(".") for full in chosen}
                yield _Restore(chosen, level, built), _among(paths), tensor, ()

    return attach_parts(model, parts(), name)


def _among(paths: set[str]) -> Callable[[str, nn.Module], bool]:
    def chosen(path: str, module: nn.Module) -> bool:
        return path in paths

    return chosen


class _Restore:
    """A configuration for all weights of a folder: each gets the function that it had."""

    takes_vectors = True

    def __init__(self, stored: Mapping[str, Stored], level: int, built: dict[tuple[str, int], WeightFunction]):
        self.stored, self.level, self.built = stored, level, built

    def plan(
        self, model: nn.Module, weights: Mapping[str, Tensor], data: Iterable[Any] | None
    ) -> Mapping[str, FunctionConfig]:
        """What builds the function of each weight."""
        planned = plan_again(model, {n: s.config for n, s in self.stored.items()}, weights)
        return {n: _Builder(self, n, planned.get(n, self.stored[n].config), planned=n in planned) for n in weights}


def plan_again(
    model: nn.Module, configs: Mapping[str, Any], weights: Mapping[str, Tensor]
) -> dict[str, FunctionConfig]:
    """What builds the functions that were planned together, those of one configuration each, without data."""
    together: list[tuple[Any, dict[str, Tensor]]] = []
    for full, weight in weights.items():
        config = configs[full]
        if not hasattr(config, "plan"):
            continue
        group = next((g for c, g in together if c == config), None)
        if group is None:
            group = {}
            together.append((config, group))
        group[full] = weight
    builders: dict[str, FunctionConfig] = {}
    for config, group in together:
        with torch.random.fork_rng(devices=[]):
            builders |= config.plan(model, group, None)
    return builders


@dataclass(frozen=True)
class _Builder:
    restore: _Restore
    full: str
    config: Any
    planned: bool

    def build(self, weight: Tensor, *, batched: bool) -> WeightFunction:
        """The function of one weight, with its tensors."""
        stored = self.restore.stored[self.full]
        built = self.restore.built
        function: WeightFunction | None = None
        if not self.planned:  # without computing a start that is replaced at once
            with suppress(RecipeError):  # a shape that only the weight's values decide
                function = self._filled(self.config.build(weight.to("meta"), batched=batched), stored, strict=False)
        if function is None:
            try:
                with torch.random.fork_rng(devices=[]):
                    function = self._filled(self.config.build(weight, batched=batched), stored, strict=True)
            except RecipeError as error:
                raise CheckpointError(
                    f"{self.full}: {error} The folder asks for it: it is damaged, or was made on another model."
                ) from None
        assert function is not None
        function.config = stored.config
        for mine, (other, level, theirs) in stored.shared.items():
            source = built.get((other, level))
            if source is None:
                raise CheckpointError(
                    f"{self.full} shares {mine} with {other}, which the folder does not hold before it."
                )
            owner, leaf = _owner(source, theirs)
            value = getattr(owner, leaf)
            owner, leaf = _owner(function, mine)
            (owner._parameters if leaf in owner._parameters else owner._buffers)[leaf] = value
        built[self.full, self.restore.level] = function
        return function

    def _filled(self, function: WeightFunction, stored: Stored, *, strict: bool) -> WeightFunction | None:
        """The function with the folder's tensors; None where it does not fit and ``strict`` is false."""
        wanted = {n: t for n, t in function.state_dict().items() if n not in stored.shared}
        wrong = [n for n in wanted if n in stored.tensors and stored.tensors[n].shape != wanted[n].shape]
        if wanted.keys() != stored.tensors.keys() or wrong:
            if not strict:
                return None
            missing = sorted(wanted.keys() - stored.tensors.keys())
            extra = sorted(stored.tensors.keys() - wanted.keys())
            if missing or extra:
                hint = did_you_mean(missing[0], extra) if missing and extra else ""
                raise CheckpointError(
                    f"{self.full}: the folder lacks {', '.join(missing) or 'nothing'} of its adapter and holds "
                    f"{', '.join(extra) or 'nothing'} too many.{hint} Configuration and tensors are from different saves."
                )
            raise ShapeError(
                f"{self.full}: {wrong[0]} is {list(stored.tensors[wrong[0]].shape)} in the folder, and its "
                f"configuration makes it {list(wanted[wrong[0]].shape)} on this weight. The adapter was trained on "
                "another model, or configuration and tensors are from different saves."
            )
        function.load_state_dict(stored.tensors, strict=False, assign=True)
        names = {n for n, t in [*function.named_parameters(), *function.named_buffers()] if t.is_meta}
        return None if not strict and names - stored.shared.keys() else function


def _owner(function: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return function.get_submodule(path), leaf
