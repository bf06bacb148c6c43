"""Where the tensors of a model are: each under every name that it has, as itself or as the stack that computes it."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from weft.function.classes import Carrier, unwrapped
from weft.function.layout import Layout, is_packed, layout_of
from weft.function.stack import PackedStack, Stack


@dataclass(frozen=True)
class Place:
    """A tensor of a layer.

    Attributes:
        full: its name in the model.
        module: the layer.
        name: its name in the layer.
        held: the tensor itself, or the stack that computes it.
    """

    full: str
    module: nn.Module
    name: str
    held: Any

    @property
    def path(self) -> str:
        """The layer's name."""
        return self.full[: -len(self.name)].rstrip(".")

    @property
    def layout(self) -> Layout:
        """How a function sees it."""
        if isinstance(self.held, Stack):
            return self.held.layout
        return layout_of(self.module, self.name, self.held)

    def is_weight(self, vectors: bool = False) -> bool:
        """Whether functions can compute it: floats with two axes, or one where ``vectors`` count, too."""
        held = self.held
        if isinstance(held, PackedStack):
            held = held.like
        elif isinstance(held, Stack):
            held = held.original
        if isinstance(held, nn.parameter.UninitializedTensorMixin):
            return True
        return bool(held.dim() >= (1 if vectors else 2) and held.is_floating_point())

    def memory(self) -> Hashable:
        """Where its numbers lie; two parameters may lie in one place without being tied."""
        if isinstance(self.held, PackedStack):
            return id(self.held)
        stored = self.held.original if isinstance(self.held, Stack) else self.held
        if isinstance(stored, nn.parameter.UninitializedTensorMixin) or stored.layout != torch.strided:
            return id(stored)
        return stored.untyped_storage()._cdata, stored.storage_offset()


def places_of(model: nn.Module, packed: bool = False) -> Iterator[Place]:
    """All tensors of a model's layers, under all their names; those inside functions are no layer's.

    Args:
        model: any module.
        packed: also the weights of layers that hold them packed, each as a stack without functions.

    >>> layer = nn.Linear(3, 2)
    >>> [(place.full, place.is_weight()) for place in places_of(nn.Sequential(layer, layer))]
    [('0.weight', True), ('0.bias', False), ('1.weight', True), ('1.bias', False)]
    """
    inside: set[nn.Module] = set()
    for path, module in unwrapped(model).named_modules(remove_duplicate=False):
        if module in inside:
            continue
        held = {**module._parameters, **module._buffers}
        if isinstance(module, Carrier):
            held.update({n: module.parametrizations[n] for n in module.weft_names})
            inside.update(m for n in module.weft_names for m in module.parametrizations[n].modules())
        elif packed and is_packed(module):
            held["weight"] = PackedStack(module)
        for name, value in held.items():
            if value is not None:
                yield Place(f"{path}.{name}" if path else name, module, name, value)
