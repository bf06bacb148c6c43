"""Fused experts over packed weights: what stands where transformers' classes have a parameter (experts, …).

The classes multiply by ``self.down_proj[i]``; here that is a matrix which is not unpacked where it is an argument of
``torch.nn.functional.linear``, and is anywhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from weft.errors import RecipeError
from weft.packed.form import Packed
from weft.packed.linear import QuantizedLinear


class QuantizedExperts(nn.Module):
    """One packed matrix for each expert, at names ``0.codes``, ``1.codes`` and so on.

    ``experts[i]`` is that of expert i, as the model stores it; of several, ``experts[[0, 2]]``, a tensor of them.

    Attributes:
        dtype: of the matrices where they are unpacked.
        transposed: the model stores (experts, in, out); packed weights are (out, in) all the same.

    >>> from weft.packed import Affine
    >>> packed = Affine(torch.ones(1, 2, dtype=torch.int16), torch.ones(1, 1), torch.zeros(1, 1), 4, 0)
    >>> experts = QuantizedExperts([packed, packed])
    >>> functional.linear(torch.ones(1, 2), experts[1]), experts[1] * 2, experts.shape
    (tensor([[2.]]), tensor([[2., 2.]]), torch.Size([2, 1, 2]))
    """

    def __init__(self, packed: Sequence[Packed], *, dtype: torch.dtype = torch.float32, transposed: bool = False):
        super().__init__()
        if not packed or len({one.shape for one in packed}) != 1:
            raise RecipeError(f"Experts are of one shape, and there is at least one; got {[p.shape for p in packed]}.")
        self.dtype, self.transposed = dtype, transposed
        for index, one in enumerate(packed):
            layer = QuantizedLinear.from_packed(one)
            layer.of_experts = True  # "all-linear" leaves experts alone
            self.add_module(str(index), layer)

    def __len__(self) -> int:
        return len(self._modules)

    def __iter__(self) -> Iterator[ExpertMatrix]:
        return (self[index] for index in range(len(self)))

    @property
    def layers(self) -> list[QuantizedLinear]:
        """The experts as linear layers."""
        return [m for m in self._modules.values() if isinstance(m, QuantizedLinear)]

    @property
    def shape(self) -> torch.Size:
        """Of the parameter that it stands for."""
        out, inputs = self.layers[0].shape
        return torch.Size((len(self), inputs, out) if self.transposed else (len(self), out, inputs))

    def __getitem__(self, index: Any) -> Any:
        """An expert's matrix; a tensor (…, rows, columns) for a list or a tensor of indices, or a slice."""
        if isinstance(index, slice):
            index = list(range(*index.indices(len(self))))
        if isinstance(index, list | tuple) or (isinstance(index, Tensor) and index.dim()):
            numbers = torch.as_tensor(index)
            made = [self[i].dense() for i in numbers.flatten().tolist()]
            return torch.stack(made).reshape(*numbers.shape, *self.shape[1:])
        number = int(index)
        if not -len(self) <= number < len(self):
            raise IndexError(f"There are {len(self)} experts, got index {number}.")
        return ExpertMatrix(self.layers[number], self.dtype, self.transposed)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedExperts:
        super()._apply(fn, recurse)
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return self

    def extra_repr(self) -> str:
        """Shape."""
        return f"{list(self.shape)}"

    def __repr__(self) -> str:
        return f"QuantizedExperts({self.extra_repr()}, {self.layers[0].extra_repr()})"


class ExpertMatrix:
    """An expert's matrix: a tensor to torch's functions, multiplied by without being unpacked in ``linear``."""

    def __init__(self, layer: QuantizedLinear, dtype: torch.dtype, transposed: bool):
        self.layer, self.dtype, self.transposed = layer, dtype, transposed

    def dense(self) -> Tensor:
        """The matrix as the model stores it."""
        made = self.layer.weight.to(self.dtype)
        return made.T if self.transposed else made

    @property
    def T(self) -> ExpertMatrix:
        """Transposed."""
        return ExpertMatrix(self.layer, self.dtype, not self.transposed)

    @property
    def mT(self) -> ExpertMatrix:
        """Transposed."""
        return self.T

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("layer", "dtype", "transposed"):
            raise AttributeError(name)
        return getattr(self.dense(), name)

    def __getitem__(self, index: Any) -> Tensor:
        return self.dense()[index]

    def __matmul__(self, other: Any) -> Tensor:
        return self.dense() @ other

    def __rmatmul__(self, other: Tensor) -> Tensor:
        return functional.linear(other, self.T)

    def __mul__(self, other: Any) -> Tensor:
        return self.dense() * other

    __rmul__ = __mul__

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, arguments: Sequence[Any] = (), named: Mapping[str, Any] | None = None
    ) -> Any:
        named = dict(named or {})
        if function is functional.linear and len(arguments) >= 2:
            x, weight, *bias = arguments
            if isinstance(x, Tensor) and isinstance(weight, ExpertMatrix) and not weight.transposed:
                y = weight.layer(x)
                bias = bias or [named.get("bias")]
                return y if bias[0] is None else y + bias[0]
        if function in (torch.matmul, Tensor.matmul, Tensor.__matmul__) and len(arguments) == 2 and not named:
            x, weight = arguments
            if isinstance(x, Tensor) and isinstance(weight, ExpertMatrix) and weight.transposed:
                return weight.layer(x)
        dense = [a.dense() if isinstance(a, ExpertMatrix) else a for a in arguments]
        return function(*dense, **{n: a.dense() if isinstance(a, ExpertMatrix) else a for n, a in named.items()})
