"""Put packed weights in the place of a model's layers."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from weft.errors import RecipeError, did_you_mean
from weft.function.classes import Carrier
from weft.function.layout import is_conv1d, layout_of
from weft.packed.experts import QuantizedExperts
from weft.packed.form import Packed
from weft.packed.linear import QuantizedEmbedding, QuantizedLinear

EXPERTS = ("gate_up_proj", "up_proj", "down_proj")


@dataclass
class _Fused:
    """A parameter of fused experts, and what is given for its matrices."""

    module: Any
    name: str
    given: dict[int, Packed] = field(default_factory=dict)

    @property
    def parameter(self) -> Tensor:
        parameter: Tensor = getattr(self.module, self.name)
        return parameter


def replace_(
    model: nn.Module, packed: Mapping[str, Packed], *, dtype: torch.dtype | None = None, backend: str = "auto"
) -> nn.Module:
    """Let layers of a model multiply by packed weights, in place.

    Linear layers and transformers' Conv1D become :class:`~weft.packed.QuantizedLinear`, embeddings
    :class:`~weft.packed.QuantizedEmbedding`, and parameters of fused experts :class:`~weft.packed.QuantizedExperts`, whose
    module is set to its eager implementation. Biases stay as they are.

    Args:
        model: any module.
        packed: by the layer's full name, or its weight's; of fused experts ``"….experts.3.down_proj"``, and all of one
            parameter. Matrices are (out, in), also where the model stores (in, out).
        dtype: the type that products are computed in; None for that of the inputs.
        backend: as in :meth:`QuantizedLinear.from_packed`.

    Returns:
        The model; another object only where the model itself is a layer that is replaced.

    Raises:
        RecipeError: there is no such layer (the message has the nearest), its shape is another, it is of a class with a
            forward pass of its own, or its weight is tied to one that is not given: a packed copy would end the tie. Where
            all names of a tied weight are given, each layer holds its own packed weight and the tie ends. The model is
            unchanged then.

    >>> from weft.packed import Affine
    >>> model = nn.Sequential(nn.Linear(2, 1), nn.ReLU())
    >>> packed = Affine(torch.ones(1, 2, dtype=torch.int16), torch.ones(1, 1), torch.zeros(1, 1), 4, 0)
    >>> type(replace_(model, {"0": packed})[0]).__name__
    'QuantizedLinear'
    """
    places = {path: m for path, m in model.named_modules(remove_duplicate=False) if _replaceable(m)}
    fused = _fused(model)
    chosen: dict[int, tuple[nn.Module, Packed]] = {}
    touched: dict[int, str] = {}
    for name, one in packed.items():
        path = "" if name == "weight" else name.removesuffix(".weight")
        if path in fused:
            place, index = fused[path]
            _check_shape(
                name, one, layout_of(place.module, place.name, place.parameter).seen(place.parameter).shape[1:]
            )
            place.given[index] = one
        elif path in places:
            module: Any = places[path]
            _check_class(name, module)
            _check_shape(name, one, module.weight.T.shape if is_conv1d(type(module)) else module.weight.shape)
            if id(module) in chosen and chosen[id(module)][1] is not one:
                raise RecipeError(f"{name} is one layer under several names, which were given different weights.")
            chosen[id(module)] = (module, one)
            touched[id(module.weight)] = name
        else:
            raise RecipeError(
                f"There is no layer {name!r} that a packed weight can stand for.{did_you_mean(path, [*places, *fused])}"
            )
    whole = {id(place): place for place, _ in fused.values() if place.given}
    for place in whole.values():
        missing = [i for i in range(len(place.parameter)) if i not in place.given]
        if missing:
            raise RecipeError(
                f"{place.name} of {len(place.parameter)} experts is one parameter: give all of them, {missing} are missing."
            )
    untied = _check_ties(model, touched, {id(m) for m, _ in chosen.values()})
    made = {key: _made(module, one, dtype, backend) for key, (module, one) in chosen.items()}
    experts = [
        (place, _experts(place, {i: p.to(place.parameter.device) for i, p in place.given.items()}, dtype, backend))
        for place in whole.values()
    ]
    for place, new in experts:
        del place.module._parameters[place.name]
        place.module.add_module(place.name, new)
        _make_eager(place.module)
    for path, module in places.items():
        if id(module) in made and path:
            owner, _, leaf = path.rpartition(".")
            model.get_submodule(owner)._modules[leaf] = made[id(module)]
    if untied and getattr(getattr(model, "config", None), "tie_word_embeddings", False):
        model.config.tie_word_embeddings = False  # or transformers would tie them again
    return made.get(id(model), model)


def _replaceable(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | nn.Embedding) or is_conv1d(type(module))


def _fused(model: nn.Module) -> dict[str, tuple[_Fused, int]]:
    """Matrices of fused experts by the names that they have as layers."""
    found = {}
    for path, module in model.named_modules():
        if not isinstance(getattr(module, "down_proj", None), nn.Parameter) or not hasattr(type(module), "_apply_gate"):
            continue
        for name in EXPERTS:
            if isinstance(getattr(module, name, None), nn.Parameter):
                place = _Fused(module, name)
                prefix = f"{path}." if path else ""
                found.update({f"{prefix}{i}.{name}": (place, i) for i in range(len(place.parameter))})
    return found


def _check_class(name: str, module: nn.Module) -> None:
    if isinstance(module, Carrier):
        raise RecipeError(f"{name} is computed by a weight function; call weft.bake_(model) before replacing it.")
    base: Any = nn.Linear if isinstance(module, nn.Linear) else nn.Embedding
    if not is_conv1d(type(module)) and type(module).forward is not base.forward:
        raise RecipeError(
            f"{name} is a {type(module).__name__}, which has a forward pass of its own; a packed layer would not do it."
        )
    if isinstance(module, nn.Embedding) and (module.max_norm is not None or module.sparse):
        raise RecipeError(f"{name} renormalises its rows or has sparse gradients, which packed rows cannot.")


def _check_shape(name: str, packed: Packed, shape: torch.Size) -> None:
    if tuple(packed.shape) != tuple(shape):
        raise RecipeError(f"{name} is {list(shape)} (out, in), and the packed weight is {list(packed.shape)}.")


def _check_ties(model: nn.Module, touched: Mapping[int, str], chosen: set[int]) -> bool:
    """Whether a tie ends; refused where only a part of it was given."""
    ends = False
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is None or id(parameter) not in touched or touched[id(parameter)] in (path, f"{path}.{name}"):
                continue
            if id(module) not in chosen:
                raise RecipeError(
                    f"{touched[id(parameter)]} is tied to {path}.{name}, which is not given: give both, and each holds a "
                    "packed weight of its own, or untie them first (a copy of the dense weight stays then)."
                )
            ends = True
    return ends


def _made(module: Any, packed: Packed, dtype: torch.dtype | None, backend: str) -> nn.Module:
    packed = packed.to(module.weight.device)
    new: nn.Module
    if isinstance(module, nn.Embedding):
        new = QuantizedEmbedding.from_packed(packed, padding_idx=module.padding_idx, dtype=module.weight.dtype)
    else:
        new = QuantizedLinear.from_packed(
            packed, module.bias, dtype=dtype, transposed=is_conv1d(type(module)), backend=backend
        )
    return new.train(module.training)


def _experts(place: _Fused, given: Mapping[int, Packed], dtype: torch.dtype | None, backend: str) -> QuantizedExperts:
    transposed = layout_of(place.module, place.name, place.parameter).transposed
    matrices = [given[i] for i in range(len(given))]
    new = QuantizedExperts(matrices, dtype=place.parameter.dtype, transposed=transposed)
    for layer in new.layers:
        layer.dtype, layer.backend = dtype, backend
    return new.train(place.module.training)


def _make_eager(module: Any) -> None:
    """Experts go one after the other: transformers' faster ways read the whole parameter."""
    if hasattr(getattr(module, "config", None), "_experts_implementation"):
        module.config = copy.copy(module.config)
        module.config._experts_implementation = "eager"
