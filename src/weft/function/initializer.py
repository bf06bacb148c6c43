"""What an initialiser's registry row says: functions that fill weights of a model in place, before it is trained.

Such a function takes what it fills first, then its data, then its parameters by name, and a ``generator`` last.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from weft.errors import RecipeError, did_you_mean
from weft.function.classes import Carrier
from weft.method import Method


@dataclass(frozen=True)
class InitMethod(Method):
    """A registry row of an initialiser.

    Attributes:
        function: the public function; fields of the configuration are its keyword arguments, with the same defaults.
        trial: makes a small model for the contract battery.
        apply: ``apply(model, generator=…, **parameters)`` fills such a model with ``function``.
        fills: names of the tensors of the trial's model that change; all others keep their values.
        random: whether anything is drawn.
        resizes: whether filled tensors are new ones of another shape (new rows of an embedding).
    """

    function: Callable[..., Any] = lambda: None
    trial: Callable[[], nn.Module] = nn.Module
    apply: Callable[..., Any] = lambda model, generator: None
    fills: tuple[str, ...] = ("weight",)
    random: bool = True
    resizes: bool = False


def plain_parameter(module: nn.Module, name: str = "weight") -> nn.Parameter:
    """The parameter ``name`` of a layer, if it can be filled in place.

    Raises:
        RecipeError: the layer has none, or a weight function computes it (filling the computed value would be lost), or
            it has no values yet.

    >>> plain_parameter(nn.Linear(3, 2), "bias").shape
    torch.Size([2])
    """
    kind = type(module).__name__
    if isinstance(module, Carrier) and name in module.weft_names:
        raise RecipeError(
            f"{name!r} of this {module.weft_base.__name__} is computed by a weight function, so what is written there "
            "is lost. Initialise first and attach functions then, or call weft.bake_ first."
        )
    value: Tensor | None = module._parameters.get(name)
    if value is None:
        known = [n for n, p in module._parameters.items() if p is not None]
        raise RecipeError(f"This {kind} has no parameter {name!r}.{did_you_mean(name, known)}")
    if isinstance(value, nn.parameter.UninitializedTensorMixin) or value.is_meta:
        raise RecipeError(
            f"{name!r} of this {kind} has no values yet (it is lazy or on the meta device); give it memory first: run the "
            "model once, or call to_empty(device=...)."
        )
    if not isinstance(value, nn.Parameter):
        raise RecipeError(f"{name!r} of this {kind} is a {type(value).__name__}, not a parameter.")
    return value


def check_fillable(*tensors: Tensor) -> None:
    """Raise ``RecipeError`` unless tensors can be filled in place: values of a parameter, or views of one.

    >>> layer = nn.Linear(3, 2)
    >>> check_fillable(layer.weight, layer.weight[:1])
    >>> check_fillable(layer)
    Traceback (most recent call last):
    weft.errors.RecipeError: A tensor is filled, got a Linear; give its weight: layer.weight.
    """
    for tensor in tensors:
        if not isinstance(tensor, Tensor):
            module = "; give its weight: layer.weight" if isinstance(tensor, nn.Module) else ""
            raise RecipeError(f"A tensor is filled, got a {type(tensor).__name__}{module}.")
        if isinstance(tensor, nn.parameter.UninitializedTensorMixin) or tensor.is_meta:
            raise RecipeError(
                "The tensor has no values yet (it is lazy or on the meta device); give it memory first: run the model once, "
                "or call to_empty(device=...)."
            )
        owner = tensor._base if tensor._is_view() else tensor
        if owner is not None and owner.grad_fn is not None:
            raise RecipeError(
                f"This tensor {list(tensor.shape)} is a result of others ({owner.grad_fn.name()}), as a weight that a function "
                "computes is, so what is written there is lost. Initialise first and attach functions then, or call "
                "weft.bake_ first."
            )
