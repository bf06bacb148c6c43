"""The classes of modules that carry weight functions.

A module whose weight is computed needs a property in its class. torch makes a new class for each instance, which
breaks pickling, makes copies share what they should not, and compiles every layer anew. Here there is one class for
each (base class, names), it pickles by naming these two, and equal layers compile once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from weft.errors import RecipeError
from weft.function.layout import is_conv1d
from weft.function.stack import Stack

_ORDER = "weft_order"  # attribute of a module: the order of its parameters before functions were attached
_HELD = "weft_held"  # attribute of a module: weights computed in the forward pass that is running


class Carrier:
    """Marks the classes made here.

    Attributes:
        weft_base: the class without functions.
        weft_names: the tensors that are computed, sorted.
        parametrizations: what computes each of them.
    """

    weft_base: type[nn.Module]
    weft_names: tuple[str, ...]
    parametrizations: Mapping[str, Stack]


def carrier(base: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    """The class for modules of class ``base`` whose tensors ``names`` are computed."""
    return _carrier(cast("Any", base), tuple(sorted(names)))


@cache
def _carrier(base: Any, names: tuple[str, ...]) -> type[nn.Module]:
    def reduce(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
        return empty, (base, names), _state(self)

    space: dict[str, Any] = {
        "weft_base": base,
        "weft_names": names,
        "__reduce_ex__": reduce,
        "register_parameter": _register_parameter,
        "_load_from_state_dict": _load_from_state_dict,
        "__module__": base.__module__,
        "__doc__": base.__doc__,
        **{name: _computed(name) for name in names},
    }
    if "weight" in names and getattr(base, "packed_linear", False):
        space["forward"] = _packed_forward
    elif "weight" in names and _is_plain_linear(base):
        space["forward"] = _linear_forward(base)
    elif "weight" in names and issubclass(base, nn.Embedding) and base.forward is nn.Embedding.forward:
        space["forward"] = _embedding_forward(base)
    elif not issubclass(base, nn.modules.conv._ConvNd | nn.Embedding):
        space["forward"] = _holding_forward(base)
    # the properties live in a parent of the class that modules get: torch's remove_parametrizations deletes from the
    # class itself, and must fail here instead of breaking every other module of the class
    holder = type(f"Functional{base.__name__}", (Carrier, base), space)
    return type(holder.__name__, (holder,), {"__module__": base.__module__, "__doc__": base.__doc__})


def empty(base: type[nn.Module], names: tuple[str, ...]) -> nn.Module:
    """An uninitialised module, to be filled by unpickling or copying."""
    from weft.function.export import bake_on_save  # which imports this module

    bake_on_save()
    made: Any = carrier(base, names)
    return made.__new__(made)


def _state(module: Any) -> dict[str, Any]:
    """What a copy or a pickle holds of a module: no values that belong to one forward pass."""
    state = {n: v for n, v in module.__getstate__().items() if n != _HELD}
    if isinstance(module, nn.RNNBase):  # keeps its computed weights too, which cannot be copied with their graph
        state["_flat_weights"] = [w if w is None or w.is_leaf else w.detach() for w in module._flat_weights]
    return state


class _Stacks(nn.ModuleDict):
    """What computes each tensor of a module, by name.

    torch's own parametrizations would put a property for one more tensor into the module's class, which others share.
    Before they do they ask whether the name is here, and take what is. So all names are here, and taking one that
    nothing computes is refused: nothing has changed by then.
    """

    def __contains__(self, name: object) -> bool:
        return True

    def __getitem__(self, name: str) -> Any:
        if name not in self._modules:
            raise RecipeError(
                f"{name!r} of a module whose {', '.join(map(repr, self._modules))} weft computes cannot have "
                "parametrizations of torch; attach a weft function to it, or call weft.bake_ first."
            )
        return self._modules[name]


def unwrapped(model: Any) -> Any:
    """The model inside torch.compile's and DistributedDataParallel's wrappers: names are those of the plain model."""
    while True:
        if isinstance(model, DistributedDataParallel):
            model = model.module
        elif "_orig_mod" in getattr(model, "_modules", {}):
            model = model._orig_mod
        else:
            return model


def put_on(module: nn.Module, name: str, stack: Stack) -> None:
    """Make tensor ``name`` of ``module`` computed by ``stack``."""
    if "parametrizations" not in module._modules:
        module.parametrizations = _Stacks()
        module.__dict__[_ORDER] = tuple(module._parameters)
    base = getattr(type(module), "weft_base", type(module))
    names = getattr(type(module), "weft_names", ())
    module._parameters.pop(name, None)
    module._buffers.pop(name, None)
    module.parametrizations[name] = stack
    module.__class__ = carrier(base, (*names, name))


def take_off(module: Any, name: str, weight: Tensor | None) -> None:
    """Make tensor ``name`` of a carrier a plain one again; None for that of a packed layer."""
    base: type[nn.Module] = module.weft_base
    names = tuple(n for n in module.weft_names if n != name)
    del module.parametrizations[name]
    if names:
        module.__class__ = carrier(base, names)
    else:
        del module.parametrizations
        module.__class__ = base
    if weight is None:
        pass  # a layer over a packed weight has it still
    elif isinstance(weight, nn.Parameter):
        module.register_parameter(name, weight)
    else:
        module.register_buffer(name, weight)
    if not names:  # an optimizer knows parameters by their order
        for other in module.__dict__.pop(_ORDER):
            if other in module._parameters:
                module._parameters[other] = module._parameters.pop(other)


def _computed(name: str) -> property:
    def get(self: nn.Module) -> Tensor:
        stack: Stack = self._modules["parametrizations"]._modules[name]
        held: dict[Any, Tensor] | None = self.__dict__.get(_HELD)
        if held is None:
            return stack()
        key = (name, torch.is_grad_enabled())  # a value made without gradients must not serve where they are wanted
        if key not in held:
            held[key] = stack()
        return held[key]

    def set(self: nn.Module, value: Any) -> None:
        raise _cannot_set(self, name)

    return property(get, set)


def _register_parameter(self: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
    """What assigning an ``nn.Parameter`` calls instead of the property."""
    if name in type(self).weft_names:
        raise _cannot_set(self, name)
    nn.Module.register_parameter(self, name, parameter)


def _load_from_state_dict(self: Any, state: Mapping[str, Any], prefix: str, *rest: Any) -> None:
    """Refuse a plain weight also where missing names are tolerated: a trainer would go on from other weights."""
    errors: list[str] = rest[-1]
    for name in type(self).weft_names:
        if prefix + name in state:
            errors.append(
                f"{prefix + name} is computed by a weight function here, and the state dict holds a plain weight. Load "
                "it before attaching functions, or load a state dict of a model with the same functions."
            )
    type(self).weft_base._load_from_state_dict(self, state, prefix, *rest)


def _cannot_set(module: nn.Module, name: str) -> RecipeError:
    return RecipeError(
        f"{name!r} of this {type(module).__name__} is computed by a weight function and cannot be set. "
        f"Set `parametrizations.{name}.original`, or call weft.bake_ first; in functional_call use names under "
        "`parametrizations.`."
    )


def _is_plain_linear(base: Any) -> bool:
    """Whether a class multiplies by its weight as nn.Linear or transformers' Conv1D does, and by nothing else."""
    if issubclass(base, nn.Linear):
        return base.forward is nn.Linear.forward
    return any(is_conv1d(c) and "forward" in vars(c) and base.forward is c.forward for c in base.__mro__)


def _linear_forward(base: type[nn.Module]) -> Callable[[Any, Tensor], Tensor]:
    def forward(self: Any, x: Tensor) -> Tensor:
        """x (…, in) -> (…, out), by the fast path where a function has one."""
        stack: Stack = self._modules["parametrizations"]._modules["weight"]
        if not stack.has_product:
            return base.forward(self, x)
        y = stack.multiply(x)
        bias = self.bias
        if bias is None:
            return y
        return y + (bias if bias.dtype == y.dtype else bias.to(y.dtype))  # autocast leaves sums alone

    return forward


def _packed_forward(self: Any, x: Tensor) -> Tensor:
    """x (…, in) -> (…, out): without unpacking the weight where every function multiplies without building its own."""
    stack: Stack = self._modules["parametrizations"]._modules["weight"]
    y = stack.multiply(x)
    return y if self.bias is None else y + self.bias.to(y.dtype)


def _embedding_forward(base: type[nn.Module]) -> Callable[[Any, Tensor], Tensor]:
    def forward(self: Any, tokens: Tensor) -> Tensor:
        """tokens (…) -> (…, columns), without building the table where a function can do without."""
        stack: Stack = self._modules["parametrizations"]._modules["weight"]
        if not stack.has_lookup or self.max_norm is not None or self.scale_grad_by_freq or self.sparse:
            return base.forward(self, tokens)
        rows = stack.lookup(partial(functional.embedding, tokens, padding_idx=self.padding_idx))
        if self.padding_idx is None:
            return rows
        return torch.where((tokens == self.padding_idx).unsqueeze(-1), rows.detach(), rows)  # no gradient from padding

    return forward


def _holding_forward(base: type[nn.Module]) -> Callable[..., Any]:
    """A forward pass that computes a weight once however often it is read: experts are, once for each expert."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.__dict__[_HELD] = {}
        try:
            return base.forward(self, *args, **kwargs)
        finally:
            self.__dict__[_HELD] = None

    return forward
