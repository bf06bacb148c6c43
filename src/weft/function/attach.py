"""``weft.parametrize_``, ``weft.functions`` and ``weft.bake_``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from weft.errors import RecipeError
from weft.function.classes import Carrier, compute, orient, put_on, take_off
from weft.function.protocol import FunctionConfig, Transposed, WeightFunction
from weft.function.where import Selector, is_conv1d, matches, nearest_names, specificity

_UPDATING = "weft_updating"  # attribute of the root module: stacks whose buffers change before a forward pass


@dataclass
class Attached:
    """What ``parametrize_`` did.

    Attributes:
        touched: full names of the tensors that are computed now, with the configuration that each got.
        tied: touched names that share a tensor with an earlier one, and its name.
        ignored: names that a pattern chose and ``ignore`` took back.
        untouched: tensors of the same name in layers that no pattern chose.
    """

    touched: dict[str, Any] = field(default_factory=dict)
    tied: dict[str, str] = field(default_factory=dict)
    ignored: list[str] = field(default_factory=list)
    untouched: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return f"{len(self.touched)} attached ({len(self.tied)} tied), {len(self.ignored)} ignored, {len(self.untouched)} left"


def parametrize_(
    model: nn.Module,
    config: FunctionConfig | Mapping[Any, FunctionConfig | None],
    where: Selector = "*",
    *,
    name: str = "weight",
    ignore: Selector = (),
) -> Attached:
    """Let functions compute weights of a model, in place.

    Args:
        model: any module.
        config: the function's configuration, or selectors with one each (None: leave alone); the most specific
            selector that matches a layer wins.
        where: which layers, see :mod:`weft.function.where`; narrows a mapping, too.
        name: the tensor in each layer: "weight", or for example "gate_up_proj" of fused experts (experts, out, in).
        ignore: layers to leave alone.

    Returns:
        What was touched and what was not.

    Raises:
        RecipeError: nothing matched (the message has the nearest names), or a function does not fit a weight.

    >>> import weft
    >>> from weft.normalize import WeightStandardization
    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Linear(8, 2))
    >>> print(weft.parametrize_(model, WeightStandardization(), where=nn.Conv2d))
    1 attached (0 tied), 0 ignored, 1 left
    >>> bool(model[0].weight.mean() < 1e-6)
    True
    """
    cases: Mapping[Any, FunctionConfig | None] = config if isinstance(config, Mapping) else {"*": config}
    report, chosen = Attached(), []
    layers = [(n, m) for n, m in model.named_modules(remove_duplicate=False) if _has_tensor(m, name)]
    for path, module in layers:
        full = f"{path}.{name}" if path else name
        found = [s for s in cases if matches(where, path, module) and matches(s, path, module)]
        if not found:
            report.untouched.append(full)
        elif matches(ignore, path, module):
            report.ignored.append(full)
        else:
            best = max(found, key=lambda s: specificity(s, path))
            if cases[best] is not None:
                chosen.append((full, module, cases[best]))
    if not chosen:
        names = [n for n, _ in layers]
        hint = nearest_names(where if where != "*" else list(cases), names)
        raise RecipeError(f"No layer with a tensor {name!r} matched {where!r}; {len(layers)} layers have one.{hint}")
    _attach(model, chosen, layers, name, report)
    return report


def _attach(
    model: nn.Module,
    chosen: list[tuple[str, nn.Module, Any]],
    layers: list[tuple[str, nn.Module]],
    name: str,
    report: Attached,
) -> None:
    by_storage: dict[int, list[tuple[str, nn.Module]]] = {}
    for path, module in layers:
        by_storage.setdefault(id(_holder(module, name)), []).append((f"{path}.{name}" if path else name, module))
    built = []
    seen: set[int] = set()
    for full, module, config in chosen:  # build everything before anything is changed
        held = _holder(module, name)
        if id(held) in seen:
            continue
        seen.add(id(held))
        transposed = is_conv1d(module) and name == "weight"
        weight = held.original if isinstance(held, ParametrizationList) else held
        try:
            function = config.build(
                weight.detach().mT if transposed else weight.detach(), batched=_batched(module, weight)
            )
        except RecipeError as error:
            raise RecipeError(f"{full}: {error}") from None
        built.append((full, module, config, held, orient(function.to(weight.device), transposed)))
    for full, _, config, held, function in built:
        stack = _stack(held, function)
        for position, (tied_name, tied) in enumerate(by_storage[id(held)]):
            if not isinstance(held, ParametrizationList) and (name in tied._parameters or name in tied._buffers):
                put_on(tied, name, stack)
            report.touched[tied_name] = config
            if position:
                report.tied[tied_name] = full
                if tied_name in report.untouched:
                    report.untouched.remove(tied_name)
        if function.freezes:
            stack.original.requires_grad_(False)
        if function.has_update:
            _update_before_forward(model, stack)


def functions(model: nn.Module) -> dict[str, list[WeightFunction]]:
    """The functions that compute each tensor of a model, innermost first.

    >>> functions(nn.Linear(2, 2))
    {}
    """
    found = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, Carrier):
            for name in module.weft_names:
                stack = module.parametrizations[name]  # type: ignore[index]
                plain = [f.function if isinstance(f, Transposed) else f for f in stack]  # type: ignore[union-attr]
                found[f"{path}.{name}" if path else name] = plain
    return found


def bake_(model: nn.Module, where: Selector = "*", *, ignore: Selector = ()) -> list[str]:
    """Replace computed weights by their values, in place; the functions and their parameters go.

    Args:
        model: a model with functions attached.
        where, ignore: which layers, see :mod:`weft.function.where`.

    Returns:
        Full names of the tensors that are plain now. Tied ones stay tied.

    >>> import weft
    >>> from weft.normalize import WeightStandardization
    >>> layer = nn.Linear(3, 2)
    >>> _ = weft.parametrize_(layer, WeightStandardization())
    >>> before = layer.weight.detach().clone()
    >>> weft.bake_(layer), bool(torch.equal(layer.weight, before)), type(layer).__name__
    (['weight'], True, 'Linear')
    """
    carriers = [(p, m) for p, m in model.named_modules(remove_duplicate=False) if isinstance(m, Carrier)]
    chosen = {
        id(m.parametrizations[n])  # type: ignore[index]
        for p, m in carriers
        for n in m.weft_names
        if matches(where, p, m) and not matches(ignore, p, m)
    }
    baked: dict[int, Tensor] = {}
    names = []
    for path, module in carriers:
        if not isinstance(module, Carrier):
            continue  # one module under two names, done already
        for name in module.weft_names:
            stack = module.parametrizations[name]  # type: ignore[attr-defined]
            if id(stack) not in chosen:
                continue
            if id(stack) not in baked:
                baked[id(stack)] = _plain(stack)
            take_off(module, name, baked[id(stack)])
            names.append(f"{path}.{name}" if path else name)
    for _, module in model.named_modules():
        left = [s for s in module.__dict__.get(_UPDATING, []) if id(s) not in chosen]
        if _UPDATING in module.__dict__:
            module.__dict__[_UPDATING] = left
    return names


def _plain(stack: ParametrizationList) -> Tensor:
    value = compute(stack).contiguous().clone()
    if isinstance(stack.original, nn.Parameter):
        return nn.Parameter(value, requires_grad=stack.original.requires_grad)
    return value


def _stack(held: Tensor | ParametrizationList, function: WeightFunction) -> ParametrizationList:
    if isinstance(held, ParametrizationList):
        held.append(function)
        return held
    shape, dtype = held.shape, held.dtype
    stack = ParametrizationList([function], held, unsafe=True)
    made = compute(stack)
    if made.shape != shape or made.dtype != dtype:
        raise RecipeError(
            f"{type(function).__name__} turned a weight of shape {list(shape)}, {dtype} into {list(made.shape)}, "
            f"{made.dtype}; a weight function keeps both."
        )
    return stack


def _holder(module: nn.Module, name: str) -> Any:
    """The tensor, or the stack that computes it: what tied layers share."""
    if isinstance(module, Carrier) and name in module.weft_names:
        return module.parametrizations[name]  # type: ignore[index]
    found = module._parameters.get(name)
    return found if found is not None else module._buffers.get(name)


def _has_tensor(module: nn.Module, name: str) -> bool:
    held = _holder(module, name)
    if isinstance(held, ParametrizationList):
        return True
    return isinstance(held, Tensor) and held.dim() >= 2 and held.is_floating_point()


def _batched(module: nn.Module, weight: Tensor) -> bool:
    """Whether a weight is a stack of matrices: three axes, and not a convolution's."""
    return weight.dim() == 3 and not isinstance(module, nn.modules.conv._ConvNd)


def _update_before_forward(model: nn.Module, stack: ParametrizationList) -> None:
    """Have buffers updated once before each forward pass of the model in training.

    The hook sits on the model, not on the layer: a layer inside a checkpointed block runs twice in one step.
    """
    if _UPDATING not in model.__dict__:
        model.__dict__[_UPDATING] = []
        model.register_forward_pre_hook(_update)
    listed: list[ParametrizationList] = model.__dict__[_UPDATING]
    if not any(s is stack for s in listed):
        listed.append(stack)


def _update(model: nn.Module, arguments: Sequence[Any]) -> None:
    if not model.training:
        return
    with torch.no_grad():
        for stack in model.__dict__[_UPDATING]:
            weight = stack.original
            for function in stack:
                if function.has_update:
                    function.update(weight)
                weight = function(weight)
