"""Train a layer whole beside adapters, in a copy of its own: new heads, norms, biases.

What PEFT calls ``modules_to_save``; no paper.

    W = θ                       θ: the shape of the weight, at least float32, starting at W₀

The layer's own tensor stays as it is, so the copy can be switched off and taken away, and two adapters have two copies.

Differences: PEFT copies modules, this copies tensors, so a layer is one module with several weights; a strength between
0 and 1 goes straight from W₀ to θ.
Complexity: the tensor once more. Written for this library.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from weft.function.adapter import Adapter
from weft.function.protocol import FunctionMethod, Gather, Looked, WeightFunction, wide
from weft.method import parameter


@dataclass(frozen=True)
class Whole:
    """A trainable copy of a tensor; ``weft.adapt_(…, modules_to_save=…)`` gives one to all tensors of a module.

    Source: the equation above.

    >>> import torch, weft
    >>> layer = torch.nn.Linear(6, 4)
    >>> report = weft.adapt_(layer, Whole(), where="*")
    >>> report.trainable, layer.parametrizations.weight.original.requires_grad
    (24, False)
    """

    takes_vectors: ClassVar[bool] = True

    dtype: str = parameter(
        "float32", "of the copy: at least float32, or the weight's own", choices=("float32", "weight")
    )

    def build(self, weight: Tensor, *, batched: bool) -> WeightFunction:
        """The function for one tensor."""
        return _Whole(weight, wide(weight) if self.dtype == "float32" else weight.dtype)


class _Whole(Adapter):
    has_lookup = True

    def __init__(self, weight: Tensor, dtype: torch.dtype):
        super().__init__()
        self.value = nn.Parameter(weight.detach().to(dtype, copy=True))

    def forward(self, stored: Tensor) -> Tensor:
        if not self.enabled:
            return stored
        value = self.value if self.strength == 1 else self._between(stored, self.value)
        return value.to(stored.dtype)

    def lookup(self, gather: Gather, inner: Looked) -> Tensor:
        y = inner(gather)
        if not self.enabled:
            return y
        rows = gather(self.value)
        return (rows if self.strength == 1 else self._between(y, rows)).to(y.dtype)

    def _between(self, stored: Tensor, value: Tensor) -> Tensor:
        return torch.lerp(stored.to(value.dtype), value, self.strength)


METHODS = (
    FunctionMethod(
        name="whole",
        family="adapt",
        config=Whole,
        summary="A trainable copy of a whole tensor, for heads and norms beside adapters.",
        goal="adapt",
        origin="PEFT's modules_to_save",
        starts_at="weight",
        adapter=True,
        checked_by=("closed form", "peft"),
    ),
)
