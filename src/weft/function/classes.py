"""The classes of modules that carry weight functions.

A module whose weight is computed needs a property in its class. torch makes a new class for each instance, which
breaks pickling, makes copies share what they should not, and compiles every layer anew. Here there is one class for
each (base class, names), it pickles by naming these two, and equal layers compile once.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrize import ParametrizationList

from weft.errors import RecipeError
from weft.function.protocol import Inner, Transposed, WeightFunction
from weft.function.where import is_conv1d


class Carrier:
    """Marks classes made here."""

    weft_base: type[nn.Module]
    weft_names: tuple[str, ...]


def carrier(base: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    """The class for modules of class ``base`` whose tensors ``names`` are computed."""
    return _carrier(base, tuple(sorted(names)))


@cache
def _carrier(base: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    def reduce(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
        return _empty, (base, names), self.__getstate__() if hasattr(self, "__getstate__") else self.__dict__

    space: dict[str, Any] = {
        "weft_base": base,
        "weft_names": names,
        "__reduce_ex__": reduce,
        "register_parameter": _register_parameter,
        "__module__": base.__module__,
        "__doc__": base.__doc__,
        **{name: _computed(name) for name in names},
    }
    if "weight" in names and (issubclass(base, nn.Linear) or base.__name__ == "Conv1D"):
        space["forward"] = _linear_forward
    # the properties live in a parent of the class that modules get: torch's remove_parametrizations deletes from the
    # class itself, and must fail here instead of breaking every other module of the class
    holder = type(f"Functional{base.__name__}", (Carrier, base), space)
    return type(holder.__name__, (holder,), {"__module__": base.__module__, "__doc__": base.__doc__})


def _empty(base: type[nn.Module], names: tuple[str, ...]) -> nn.Module:
    """An uninitialised module, to be filled by unpickling or copying."""
    made = carrier(base, names)
    return made.__new__(made)


def _computed(name: str) -> property:
    def get(self: nn.Module) -> Tensor:
        value: Tensor = self.parametrizations[name]()  # type: ignore[index,operator,union-attr]
        return value

    def set(self: nn.Module, value: Any) -> None:
        raise _cannot_set(self, name)

    return property(get, set)


def _register_parameter(self: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
    """What assigning an ``nn.Parameter`` calls instead of the property."""
    if name in type(self).weft_names:  # type: ignore[attr-defined]
        raise _cannot_set(self, name)
    nn.Module.register_parameter(self, name, parameter)


def _cannot_set(module: nn.Module, name: str) -> RecipeError:
    return RecipeError(
        f"{name!r} of this {type(module).__name__} is computed by a weight function and cannot be set. "
        f"Set `parametrizations.{name}.original`, or call weft.bake_ first; in functional_call use names under "
        "`parametrizations.`."
    )


def _linear_forward(self: nn.Module, x: Tensor) -> Tensor:
    """x (…, in) -> (…, out), by the fast path where a function has one."""
    stack: ParametrizationList = self.parametrizations["weight"]  # type: ignore[index,assignment]
    transposed = is_conv1d(self)
    bias = self.bias
    if not any(f.has_product for f in stack):  # type: ignore[union-attr]
        weight = stack()
        return functional.linear(x, weight.mT if transposed else weight, bias)  # type: ignore[arg-type]
    y = _multiply(list(stack), stack.original, transposed)(x)  # type: ignore[arg-type]
    return y if bias is None else y + bias  # type: ignore[return-value,operator]


def _multiply(functions: list[WeightFunction], stored: Tensor, transposed: bool) -> Inner:
    """What multiplies by the weight that ``functions`` make of ``stored``, building no matrix where none is needed."""
    if not functions:
        return lambda x: functional.linear(x, stored.mT if transposed else stored)
    last = functions[-1]
    if last.has_product:
        inner = _multiply(functions[:-1], stored, transposed)
        return lambda x: last.product(x, inner)

    def dense(x: Tensor) -> Tensor:
        weight = stored
        for function in functions:
            weight = function(weight)
        return functional.linear(x, weight.mT if transposed else weight)

    return dense


def put_on(module: nn.Module, name: str, stack: ParametrizationList) -> None:
    """Make tensor ``name`` of ``module`` computed by ``stack``."""
    if not hasattr(module, "parametrizations"):
        module.parametrizations = nn.ModuleDict()
    base = getattr(type(module), "weft_base", type(module))
    names = getattr(type(module), "weft_names", ())
    module._parameters.pop(name, None)
    module._buffers.pop(name, None)
    module.parametrizations[name] = stack  # type: ignore[operator]
    module.__class__ = carrier(base, (*names, name))


def take_off(module: nn.Module, name: str, weight: Tensor) -> None:
    """Make tensor ``name`` of ``module`` a plain one again."""
    base: type[nn.Module] = type(module).weft_base  # type: ignore[attr-defined]
    names = tuple(n for n in type(module).weft_names if n != name)  # type: ignore[attr-defined]
    del module.parametrizations[name]  # type: ignore[operator]
    if names:
        module.__class__ = carrier(base, names)
    else:
        del module.parametrizations
        module.__class__ = base
    if isinstance(weight, nn.Parameter):
        module.register_parameter(name, weight)
    else:
        module.register_buffer(name, weight)


def orient(function: WeightFunction, transposed: bool) -> WeightFunction:
    """A function of (out, in) matrices for a layer that stores (in, out)."""
    return Transposed(function) if transposed else function


def compute(stack: ParametrizationList) -> Tensor:
    """The weight, without gradients."""
    with torch.no_grad():
        value: Tensor = stack()
        return value
