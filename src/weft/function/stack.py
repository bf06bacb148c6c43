"""A stored tensor and the functions that turn it into a weight.

It stands at ``layer.parametrizations.<name>``, where torch keeps its own parametrizations, so names in a state dict are
torch's: ``parametrizations.weight.original`` and ``parametrizations.weight.0.<parameter>``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from weft.errors import RecipeError
from weft.function.layout import Layout
from weft.function.protocol import Gather, Inner, Looked, WeightFunction


class Stack(nn.ModuleList):
    """Functions, innermost first, over one stored tensor.

    Attributes:
        original: the stored tensor, as the layer lays it out.
        layout: how functions see it.
        trained: whether the tensor trained before a function was attached.
        has_product: whether some function multiplies without building its weight.
        has_lookup: whether some function takes rows without building its weight.
        has_update: whether some function changes buffers before a forward pass.
        merged: the weight as the layer stores it, kept while functions are merged for faster evaluation; else None.
    """

    original: Tensor
    merged: Tensor | None

    def __init__(self, stored: Tensor, layout: Layout):
        super().__init__()
        if isinstance(stored, nn.Parameter):
            self.register_parameter("original", stored)
        else:
            self.register_buffer("original", stored)
        self.layout = layout
        self.trained: bool = stored.requires_grad
        self.register_buffer("merged", None, persistent=False)
        self.note()

    def note(self) -> None:
        """Look again what the functions offer, after one came, went, or was switched."""
        self.has_product = any(f.has_product and f.enabled for f in self)
        self.has_lookup = any(f.has_lookup and f.enabled for f in self)
        self.has_update = any(f.has_update for f in self)
        self._last_update = max((i for i, f in enumerate(self) if f.has_update), default=-1)

    def __iter__(self) -> Iterator[WeightFunction]:
        return iter(self._modules.values())

    def append(self, function: nn.Module) -> Stack:
        """Put a function on top."""
        if not isinstance(function, WeightFunction):
            raise RecipeError(
                f"A {type(function).__name__} cannot go on a weight that weft computes; attach a weft.function."
                "WeightFunction with weft.parametrize_, or call weft.bake_ first."
            )
        super().append(function)
        self.note()
        return self

    def discard(self, function: WeightFunction) -> None:
        """Take a function out; those above it move down."""
        kept = [f for f in self if f is not function]
        self._modules.clear()
        self._modules.update({str(i): f for i, f in enumerate(kept)})
        self.note()

    @torch.no_grad()
    def merge(self) -> None:
        """Keep the weight of evaluation, and use it until :meth:`unmerge`; the stored tensor is not touched."""
        self.merged = None
        self.merged = self.value().detach().clone()

    def unmerge(self) -> None:
        """Compute the weight again, exactly as before merging."""
        self.merged = None

    def forward(self) -> Tensor:
        """The weight as the layer stores it."""
        if self.merged is not None:
            return self._while_merged(self.merged)
        return self.layout.stored(self.weight())

    def _while_merged(self, merged: Tensor) -> Tensor:
        if self.training and torch.is_grad_enabled():
            raise RecipeError(
                "Adapters of this model are merged, so a training step would not reach them. Call "
                "weft.adapt.unmerge_(model) before training, or model.eval()."
            )
        return merged

    def weight(self, count: int | None = None) -> Tensor:
        """The weight as functions see it, or what the first ``count`` functions make.

        Autocast rules products with a weight; it is off while the weight is computed.
        """
        device = self.original.device.type
        if device != "meta" and torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                return self._through(count)
        return self._through(count)

    @torch.no_grad()
    def value(self, parts: Mapping[str, Tensor] | None = None) -> Tensor:
        """The weight as the layer stores it, in evaluation, from the stack's own tensors or from others."""
        modes = [(m, m.training) for m in self.modules()]
        self.eval()
        try:
            value: Tensor = self() if parts is None else functional_call(self, dict(parts), ())
        finally:
            for module, training in modes:
                module.training = training
        return value

    def multiply(self, x: Tensor) -> Tensor:
        """x (…, in) -> (…, out), building no matrix where none is needed."""
        if self.merged is not None:
            return functional.linear(x, self.layout.seen(self._while_merged(self.merged)))
        return self._inner(len(self))(x)

    def lookup(self, gather: Gather) -> Tensor:
        """Rows of the weight, building no table where none is needed."""
        if self.merged is not None:
            return gather(self._while_merged(self.merged))
        return self._looked(len(self))(gather)

    @torch.no_grad()
    def update(self) -> None:
        """Change the functions' buffers, innermost first. Sharded tensors are gathered one stack at a time."""
        stored = self.original
        device = stored.device.type
        if device != "meta" and torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                self._update(stored)
        else:
            self._update(stored)

    def _update(self, stored: Tensor) -> None:
        weight = self.layout.seen(gathered(stored))
        for i, function in enumerate(self):
            if function.has_update:
                function.update(weight)
            if i < self._last_update:
                weight = _with_whole_parameters(function, weight)

    def _through(self, count: int | None) -> Tensor:
        weight = self.layout.seen(self.original)
        for function in list(self)[:count]:
            weight = function(weight)
        return weight

    def _inner(self, count: int) -> Inner:
        """What multiplies by the weight that the first ``count`` functions make."""
        if count == 0:
            return partial(_times, weight=self.layout.seen(self.original))
        function = list(self)[count - 1]
        if function.has_product:
            return partial(function.product, inner=self._inner(count - 1))
        return partial(_times, weight=self.weight(count))

    def _looked(self, count: int) -> Looked:
        """What takes rows of the weight that the first ``count`` functions make."""
        if count == 0:
            return partial(_take, table=self.layout.seen(self.original))
        function = list(self)[count - 1]
        if function.has_lookup:
            return partial(function.lookup, inner=self._looked(count - 1))
        return partial(_take, table=self.weight(count))


class PackedStack(Stack):
    """Functions over the packed weight of a layer, which keeps it: it is unpacked where a function needs the matrix.

    What it computes is (out, in), also where the layer stands for one that stores (in, out).
    """

    def __init__(self, layer: Any):
        nn.ModuleList.__init__(self)
        self._layer = (layer,)  # in a tuple it is no part of this module
        self.layout = Layout()
        self.trained = False
        self.register_buffer("merged", None, persistent=False)
        self.note()

    @property
    def original(self) -> Tensor:
        """The matrix, unpacked anew whenever it is asked for."""
        layer = self._layer[0]
        made: Tensor = layer.unpacked()
        return made

    @property
    def like(self) -> Tensor:
        """A tensor without values, of the matrix's shape and type."""
        layer = self._layer[0]
        return torch.empty(layer.shape, dtype=layer.dtype or torch.float32, device="meta")

    def multiply(self, x: Tensor) -> Tensor:
        """x (…, in) -> (…, out), of the inputs' type."""
        if self.merged is not None:
            return _times_in_its_type(x, self._while_merged(self.merged))
        return self._inner(len(self))(x)

    def _inner(self, count: int) -> Inner:
        if count == 0:
            inner: Inner = self._layer[0].multiply
            return inner
        if list(self)[count - 1].has_product:
            return super()._inner(count)
        return partial(_times_in_its_type, weight=self.weight(count))


def _times_in_its_type(x: Tensor, weight: Tensor) -> Tensor:
    """As :func:`_times`; a packed weight has no type of its own that inputs would have to be of."""
    return _times(x, weight.to(x.dtype))


def _times(x: Tensor, weight: Tensor) -> Tensor:
    """x (…, in), weight (out, in) -> (…, out). Of a vector torch's linear would make a matrix and back."""
    return weight @ x if x.dim() == 1 else functional.linear(x, weight)


def _take(gather: Gather, table: Tensor) -> Tensor:
    return gather(table)


def _with_whole_parameters(function: WeightFunction, stored: Tensor) -> Tensor:
    parameters = dict(function.named_parameters())
    if not any(map(is_sharded, parameters.values())):
        return function(stored)
    return functional_call(function, {n: gathered(p) for n, p in parameters.items()}, (stored,))


def gathered(tensor: Tensor) -> Tensor:
    """A tensor with all its shards; every process of the group must ask for it."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is torch's DTensor."""
    return hasattr(tensor, "full_tensor")
