"""What is put around the forms of packed weights (:mod:`weft.packed.forms`).

===========  ==========================================================================================
Transposed   another form's matrix, transposed: groups along the outputs
Permuted     another form's matrix with its columns in another order: groups of columns that lie apart
LowRank      another form's matrix + left · right
Activations  another form's matrix, with inputs that are quantised too when it is multiplied by
===========  ==========================================================================================
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from weft.packed.bits import bytes_of, check
from weft.packed.form import Packed, unpack
from weft.packed.levels import INPUTS, MICROSCALED


class _Around(Packed):
    """A form put around another, whose tensors have names that begin with ``inner_``."""

    inner: Packed

    @property
    def shape(self) -> tuple[int, int]:
        return self.inner.shape

    def dequantize(self) -> Tensor:
        return self.inner.dequantize()

    def tensors(self) -> dict[str, Tensor]:
        return {f"inner_{name}": tensor for name, tensor in self.inner.tensors().items()}

    @property
    def nbytes(self) -> int:
        return self.inner.nbytes

    def settings(self) -> dict[str, Any]:
        return {"form": self.form, "inner": self.inner.settings()}


def _inner(tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Packed:
    inside = {name.removeprefix("inner_"): t for name, t in tensors.items() if name.startswith("inner_")}
    return unpack(inside, settings["inner"])


@dataclass(frozen=True, eq=False)
class Transposed(_Around):
    """Another form's matrix (in, out), transposed.

    >>> from weft.packed import Affine
    >>> inner = Affine(torch.ones(1, 2, dtype=torch.int16), torch.ones(1, 1), torch.zeros(1, 1), 4, 0)
    >>> Transposed(inner).dequantize().tolist()
    [[1.0], [1.0]]
    """

    form: ClassVar[str] = "transposed"
    inner: Packed

    @property
    def shape(self) -> tuple[int, int]:
        return self.inner.shape[1], self.inner.shape[0]

    def dequantize(self) -> Tensor:
        return self.inner.dequantize().T.contiguous()

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Self:
        return cls(_inner(tensors, settings))


@dataclass(frozen=True, eq=False)
class Permuted(_Around):
    """Another form's matrix with its columns in another order.

    Attributes:
        inner: the form.
        order: (in,) int32, the column that each of the inner's columns is.

    >>> from weft.packed import Affine
    >>> inner = Affine(torch.tensor([[1, 2]], dtype=torch.int16), torch.ones(1, 1), torch.zeros(1, 1), 4, 0)
    >>> Permuted(inner, torch.tensor([1, 0], dtype=torch.int32)).dequantize().tolist()
    [[2.0, 1.0]]
    """

    form: ClassVar[str] = "permuted"
    inner: Packed
    order: Tensor

    def dequantize(self) -> Tensor:
        made = self.inner.dequantize()
        return torch.empty_like(made).index_copy_(1, self.order.long(), made)

    def part(self, first: int, last: int) -> Packed | None:
        inner = self.inner.part(first, last)
        return None if inner is None else replace(self, inner=inner)

    def tensors(self) -> dict[str, Tensor]:
        return {**super().tensors(), "order": self.order.to(torch.int32).contiguous()}

    @property
    def nbytes(self) -> int:
        return super().nbytes + torch.int32.itemsize * self.order.numel()

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Self:
        inner, order = _inner(tensors, settings), tensors["order"]
        everyone = torch.arange(inner.shape[1], device=order.device)
        check(order.shape == everyone.shape and torch.equal(order.long().sort()[0], everyone), "no order of columns")
        return cls(inner, order)


@dataclass(frozen=True, eq=False)
class LowRank(_Around):
    """Another form's matrix + left · right.

    Attributes:
        inner: the form.
        left: (out, rank) floating point.
        right: (rank, in) floating point.
    """

    form: ClassVar[str] = "low-rank"
    inner: Packed
    left: Tensor
    right: Tensor

    def dequantize(self) -> Tensor:
        return self.inner.dequantize() + self.left.float() @ self.right.float()

    def tensors(self) -> dict[str, Tensor]:
        return {**super().tensors(), "left": self.left.contiguous(), "right": self.right.contiguous()}

    @property
    def nbytes(self) -> int:
        return super().nbytes + bytes_of(self.left, self.right)

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Self:
        inner, left, right = _inner(tensors, settings), tensors["left"], tensors["right"]
        check((len(left), right.shape[1]) == inner.shape and left.shape[1] == len(right), "the factors do not fit")
        return cls(inner, left, right)


@dataclass(frozen=True, eq=False)
class Activations(_Around):
    """Another form's matrix, whose inputs are quantised before they are multiplied.

    Attributes:
        inner: the form.
        kind: int8 (−128 … 127), int4 (−8 … 7), e4m3; or nvfp4, mxfp4, mxfp8, whose groups of columns have scales in 8 bits.
        input_scale: 0-d floating point for all inputs; None: each row of inputs (token) has its own, from its largest value.
            Of nvfp4 what the scales of groups are multiples of; mxfp4 and mxfp8 have none.
        group_size: consecutive columns of a row of inputs that share a scale where ``input_scale`` is None; 0: all, or the
            groups that the kind has.
    """

    form: ClassVar[str] = "activations"
    inner: Packed
    kind: str
    input_scale: Tensor | None = None
    group_size: int = 0

    def part(self, first: int, last: int) -> Packed | None:
        inner = self.inner.part(first, last)
        return None if inner is None else replace(self, inner=inner)

    def tensors(self) -> dict[str, Tensor]:
        made = super().tensors()
        return made if self.input_scale is None else {**made, "input_scale": self.input_scale}

    @property
    def nbytes(self) -> int:
        return super().nbytes + bytes_of(self.input_scale)

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "kind": self.kind, **({"group_size": self.group_size} if self.group_size else {})}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Self:
        kind, inner, group_size = str(settings["kind"]), _inner(tensors, settings), int(settings.get("group_size", 0))
        check(kind in INPUTS, f"inputs of {kind} are not known")
        check(group_size >= 0, "groups of inputs do not divide")
        size = MICROSCALED[kind][1] if kind in MICROSCALED else group_size
        check(not size or inner.shape[1] % size == 0, "groups of inputs do not divide")
        scale = tensors.get("input_scale")
        check(kind not in MICROSCALED or (scale is not None) is (kind == "nvfp4"), f"inputs of {kind} with that scale")
        check(scale is None or scale.dim() == 0, "the scale of inputs is no single number")
        return cls(inner, kind, scale, group_size)


def within(packed: Packed, kind: type[Packed]) -> Packed:
    """What a form of that kind is put around; the packed weight itself where it is of another.

    >>> from weft.packed import Affine
    >>> grid = Affine(torch.ones(1, 2, dtype=torch.int16), torch.ones(1, 1), torch.zeros(1, 1), 4, 0)
    >>> within(Activations(grid, "int8"), Activations) is within(grid, Activations) is grid
    True
    """
    return packed.inner if isinstance(packed, _Around) and isinstance(packed, kind) else packed
