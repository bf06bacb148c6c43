"""Change a model so that the changes can be taken back, and show it to a trace as it was before."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from weft.normalize.centered import CenteredEmbedding, CenteredLayerNorm
from weft.normalize.rms_norm import RMSNorm

SIZES = {0: ("out_features", "out_channels", "nx"), 1: ("in_features", "embedding_dim", "nf")}  # axis -> its attributes


class Changes:
    """Changes to a model that can be taken back."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.undo: list[Callable[[], None]] = []
        self.made: set[str] = set()  # biases that there were not
        self.replaced: list[tuple[nn.Module, nn.Module]] = []

    def tensor(self, name: str) -> Tensor:
        path, _, last = name.rpartition(".")
        found: Tensor = getattr(self.model.get_submodule(path), last)
        return found

    def wide(self, name: str) -> Tensor:
        """Values in float64; later writes do not change them."""
        return self.tensor(name).data.double()

    def write(self, name: str, value: Tensor) -> None:
        """New values, of another shape perhaps, for the same parameter."""
        tensor = self.tensor(name)
        old, gradient = tensor.data, tensor.grad

        def undo() -> None:
            tensor.data = old
            tensor.grad = gradient

        self.undo.append(undo)
        tensor.grad = None
        tensor.data = value.to(tensor.dtype).clone(memory_format=torch.contiguous_format)  # no view of a larger storage

    def attribute(self, owner: Any, name: str, value: Any) -> None:
        old = getattr(owner, name)
        self.undo.append(lambda: setattr(owner, name, old))
        setattr(owner, name, value)

    def resize(self, name: str, axis: int, width: int) -> None:
        """The sizes that a layer keeps beside its weight."""
        owner = self.model.get_submodule(name.rpartition(".")[0])
        is_transposed = hasattr(owner, "nf")  # transformers' Conv1D: (in, out)
        for attribute in SIZES[axis]:
            if getattr(owner, attribute, None) == width and (attribute in ("nx", "nf")) == is_transposed:
                self.attribute(owner, attribute, width - 1)

    def module(self, path: str, new: nn.Module) -> None:
        """Replace a module wherever it stands."""
        old = self.model.get_submodule(path)
        self.replaced.append((old, new))
        for parent in list(self.model.modules()):
            for name, child in list(parent._modules.items()):
                if child is old:
                    self.undo.append(partial(parent._modules.__setitem__, name, old))
                    parent._modules[name] = new
        if isinstance(old, nn.LayerNorm):
            for layer in self.model.modules():  # its fast path calls layer_norm with the norms' parameters
                if isinstance(layer, nn.TransformerEncoderLayer) and new in (layer.norm1, layer.norm2):
                    self.attribute(layer, "activation_relu_or_gelu", 0)

    def parameter(self, path: str, name: str, value: Tensor) -> None:
        owner = self.model.get_submodule(path)
        self.undo.append(lambda: owner._parameters.__setitem__(name, None))
        owner._parameters[name] = nn.Parameter(value)
        self.made.add(f"{path}.{name}")

    def back(self) -> None:
        for action in reversed(self.undo):
            action()


@contextmanager
def as_layer_norms(model: nn.Module) -> Iterator[None]:
    """For a trace: converted norms and embeddings look as those that they replaced."""
    undo = []
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            new: Any
            if isinstance(child, RMSNorm | CenteredLayerNorm):
                features = child.features if isinstance(child, RMSNorm) else child.normalized_shape
                new = nn.LayerNorm(features, child.eps, device="meta")
                new.weight, new.bias = child.weight, child.bias
            elif isinstance(child, CenteredEmbedding):
                new = nn.Embedding(*child.weight.shape, padding_idx=child.padding_idx, _weight=child.weight)
                new.weight = child.weight
            else:
                continue
            undo.append((parent, name, child))
            parent._modules[name] = new
    try:
        yield
    finally:
        for parent, name, child in undo:
            parent._modules[name] = child


@contextmanager
def evaluated(model: nn.Module) -> Iterator[None]:
    """Evaluation without caches and without torch's fused encoder layers, which a trace cannot see into."""
    training = {module: module.training for module in model.modules()}
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    cached = [c for c in configs.values() if getattr(c, "use_cache", False)]
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    for config in cached:
        config.use_cache = False
    model.eval()
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for module, mode in training.items():
            module.training = mode
        for config in cached:
            config.use_cache = True
