"""The forms of packed weights: grids, tiny floats, tables, vectors, signs; and what is put around them.

With W (out, in), rows r, columns c:

===========  ==========================================================================================
Affine       (codes − zero) · scale, scale and zero of each group of columns of a row
Minifloat    a tiny floating-point number · scale of its block of rows and columns (· a global scale)
Lookup       levels[code] · scale of a block of consecutive weights, row after row
Vectors      pieces of d columns, each a sum of entries of codebooks; · scale + offset of the row
Binary       Σᵢ αᵢ · (± 1), α of each block of rows and columns
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
from torch.nn import functional

from weft.errors import CheckpointError
from weft.packed.bits import pack_bits, unpack_bits
from weft.packed.form import Packed, unpack

MINIFLOATS = {  # exponent bits, mantissa bits, bias, largest value
    "e4m3": (4, 3, 7, 448.0),
    "e5m2": (5, 2, 15, 57344.0),
    "e2m1": (2, 1, 1, 6.0),
    "e3m0": (3, 0, 3, 16.0),
}


@dataclass(frozen=True, eq=False)
class Affine(Packed):
    """(codes − zero) · scale.

    Attributes:
        codes: (out, in) int16.
        scale: (out, groups) floating point; a group is in / groups consecutive columns.
        zero: (out, groups), the type of the scales; whole numbers but for methods that say otherwise.
        bits: of a code.
        low: the lowest code: 0, or −2ᵇⁱᵗˢ⁻¹ where zero is 0.

    >>> made = Affine(torch.tensor([[0, 5]], dtype=torch.int16), torch.tensor([[0.5]]), torch.tensor([[1.0]]), 4, 0)
    >>> made.dequantize().tolist(), unpack(made.tensors(), made.settings()).dequantize().tolist()
    ([[-0.5, 2.0]], [[-0.5, 2.0]])
    """

    form: ClassVar[str] = "affine"
    codes: Tensor
    scale: Tensor
    zero: Tensor
    bits: int
    low: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def group_size(self) -> int:
        """Columns that share a scale."""
        return self.codes.shape[1] // self.scale.shape[1]

    def dequantize(self) -> Tensor:
        groups = self.codes.float().unflatten(1, (self.scale.shape[1], -1))  # its own memory, changed in place
        return groups.sub_(self.zero.float().unsqueeze(-1)).mul_(self.scale.float().unsqueeze(-1)).flatten(1)

    def part(self, first: int, last: int) -> Packed | None:
        rows = slice(first, last)
        return replace(self, codes=self.codes[rows], scale=self.scale[rows], zero=self.zero[rows])

    def tensors(self) -> dict[str, Tensor]:
        made = {"codes": pack_bits(self.codes.int() - self.low, self.bits), "scale": self.scale.contiguous()}
        if not self.zero.count_nonzero():
            return made
        shifted = self.zero.double() - self.low
        whole = bool((shifted == shifted.round()).all()) and float(shifted.min()) >= 0 and float(shifted.max()) < 256
        return {**made, "zero": shifted.to(torch.uint8) if whole else self.zero.contiguous()}

    def settings(self) -> dict[str, Any]:
        return {"form": self.form, "bits": self.bits, "low": self.low, "columns": self.shape[1]}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Self:
        bits, low = int(settings["bits"]), int(settings["low"])
        scale, zero = tensors["scale"], tensors.get("zero")
        codes = unpack_bits(tensors["codes"], bits, int(settings["columns"])).to(torch.int16) + low
        if zero is None:
            zero = torch.zeros_like(scale)
        elif zero.dtype == torch.uint8:
            zero = zero.to(scale.dtype) + low
        _check(scale.is_floating_point() and zero.is_floating_point(), "scales are no floating-point numbers")
        _check(scale.shape == zero.shape and len(scale) == len(codes), "scales and codes differ in their rows")
        _check(scale.dim() == 2 and scale.shape[1] > 0 and codes.shape[1] % scale.shape[1] == 0, "groups do not divide")
        return cls(codes, scale, zero, bits, low)


@dataclass(frozen=True, eq=False)
class Minifloat(Packed):
    """Tiny floating-point numbers · the scale of their block (· a global scale).

    Attributes:
        codes: (out, in) uint8, the bits of each number: sign, exponent, mantissa.
        scale: (⌈out / block[0]⌉, ⌈in / block[1]⌉) floating point.
        kind: a key of ``MINIFLOATS``.
        block: rows and columns that share a scale.
        global_scale: 0-d floating point that multiplies the scales (in float64, rounded to float32 once), or None.

    >>> made = Minifloat(torch.tensor([[2, 15]], dtype=torch.uint8), torch.tensor([[0.5]]), "e2m1", (1, 2))
    >>> made.dequantize().tolist(), unpack(made.tensors(), made.settings()).dequantize().tolist()
    ([[0.5, -3.0]], [[0.5, -3.0]])
    """

    form: ClassVar[str] = "minifloat"
    codes: Tensor
    scale: Tensor
    kind: str
    block: tuple[int, int]
    global_scale: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def bits(self) -> int:
        """Of a number."""
        exponent, mantissa, _, _ = MINIFLOATS[self.kind]
        return 1 + exponent + mantissa

    def dequantize(self) -> Tensor:
        values = _pick(minifloat_levels(self.kind).to(self.codes.device), self.codes)
        scale = self.scale.float()
        if self.global_scale is not None:
            scale = (scale.double() * self.global_scale.double()).float()
        rows, columns = (min(b, n) for b, n in zip(self.block, self.shape))
        if self.shape[0] % rows or self.shape[1] % columns:
            return values.mul_(_spread(scale, self.block, self.shape))
        blocks = values.unflatten(1, (-1, columns)).unflatten(0, (-1, rows))  # a view
        blocks.mul_(scale[:, None, :, None])
        return values

    def part(self, first: int, last: int) -> Packed | None:
        blocks = _block_rows(first, last, self.block[0], self.shape[0])
        return None if blocks is None else replace(self, codes=self.codes[first:last], scale=self.scale[blocks])

    def tensors(self) -> dict[str, Tensor]:
        codes = self.codes.contiguous() if self.bits == 8 else pack_bits(self.codes.int(), self.bits)
        made = {"codes": codes, "scale": self.scale.contiguous()}
        return made if self.global_scale is None else {**made, "global_scale": self.global_scale}

    def settings(self) -> dict[str, Any]:
        return {"form": self.form, "kind": self.kind, "block": list(self.block), "columns": self.shape[1]}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Self:
        kind, block, columns = str(settings["kind"]), tuple(map(int, settings["block"])), int(settings["columns"])
        exponent, mantissa, _, _ = MINIFLOATS[kind]
        bits, codes = 1 + exponent + mantissa, tensors["codes"]
        codes = codes.view(torch.uint8) if bits == 8 else unpack_bits(codes, bits, columns)
        _check(len(block) == 2 and codes.dim() == 2 and codes.shape[1] == columns, "codes are no matrix of that width")
        expected = (-(-codes.shape[0] // block[0]), -(-columns // block[1]))
        _check(tensors["scale"].shape == expected, f"scales are not {list(expected)}")
        _check(tensors["scale"].is_floating_point(), "scales are no floating-point numbers")
        return cls(codes, tensors["scale"], kind, (block[0], block[1]), tensors.get("global_scale"))


@dataclass(frozen=True, eq=False)
class Lookup(Packed):
    """levels[code] · scale.

    Attributes:
        codes: (out, in) uint8, indices into the levels.
        levels: (tables, n) float32.
        scale: (⌈out · in / block_size⌉,): floating point, or uint8 indices into :func:`dynamic_map`.
        block_size: consecutive weights, row after row, that share a scale; the last block may be shorter.
        nested_scale: (⌈blocks / 256⌉,) float32, the scales of scales that are indices; None where they are not.
        mean: 0-d float32, what was taken off scales that are indices.
        table: (out,) uint8, which table each row uses; None where there is one.

    >>> made = Lookup(torch.tensor([[0, 2]], dtype=torch.uint8), torch.tensor([[-1.0, 0.0, 1.0]]), torch.tensor([3.0]), 2)
    >>> made.dequantize().tolist(), unpack(made.tensors(), made.settings()).dequantize().tolist()
    ([[-3.0, 3.0]], [[-3.0, 3.0]])
    """

    form: ClassVar[str] = "lookup"
    codes: Tensor
    levels: Tensor
    scale: Tensor
    block_size: int
    nested_scale: Tensor | None = None
    mean: Tensor | None = None
    table: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def bits(self) -> int:
        """Of a code."""
        return max(1, (self.levels.shape[1] - 1).bit_length())

    def scales(self) -> Tensor:
        """The scale of each block: (blocks,), float32.

        >>> made = Lookup(torch.zeros(1, 2, dtype=torch.uint8), torch.ones(1, 2), torch.tensor([2.0, 4.0]), 1)
        >>> made.scales().tolist()
        [2.0, 4.0]
        """
        if self.nested_scale is None or self.mean is None:
            return self.scale.float()
        values = in_blocks(dynamic_map().to(self.scale.device)[self.scale.long()], NESTED)
        return (values * self.nested_scale.unsqueeze(1)).flatten()[: len(self.scale)] + self.mean

    def dequantize(self) -> Tensor:
        codes = self.codes
        if self.table is None:
            values = _pick(self.levels[0].float(), codes)
        else:
            values = self.levels.float()[self.table.long().unsqueeze(1), codes.long()]
        # its own memory, changed in place
        blocks = in_blocks(values.flatten(), min(self.block_size, codes.numel())).mul_(self.scales().unsqueeze(1))
        return blocks.flatten()[: codes.numel()].reshape(codes.shape)

    def part(self, first: int, last: int) -> Packed | None:
        start, end = first * self.shape[1], last * self.shape[1]
        if start % self.block_size:
            return None
        scale = self.scales()[start // self.block_size : -(-end // self.block_size)]
        table = None if self.table is None else self.table[first:last]
        codes = self.codes[first:last]
        return replace(self, codes=codes, scale=scale, nested_scale=None, mean=None, table=table)

    def tensors(self) -> dict[str, Tensor]:
        codes = pack_bits(self.codes.int(), self.bits)
        more = {"nested_scale": self.nested_scale, "mean": self.mean, "table": self.table}
        made = {"codes": codes, "levels": self.levels, "scale": self.scale}
        return {**made, **{name: t for name, t in more.items() if t is not None}}

    def settings(self) -> dict[str, Any]:
        return {"form": self.form, "block_size": self.block_size, "columns": self.shape[1]}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Self:
        levels, columns, block_size = tensors["levels"], int(settings["columns"]), int(settings["block_size"])
        codes = unpack_bits(tensors["codes"], max(1, (levels.shape[1] - 1).bit_length()), columns)
        _check(int(codes.max()) < levels.shape[1], "a code has no level")
        scale, nested, mean = tensors["scale"], tensors.get("nested_scale"), tensors.get("mean")
        _check(scale.shape == (-(-codes.numel() // block_size),), "scales do not fit the blocks")
        if scale.dtype == torch.uint8:
            _check(nested is not None and nested.shape == (-(-len(scale) // NESTED),), "scales of scales do not fit")
            _check(mean is not None and mean.dim() == 0, "the mean of scales is missing")
        else:
            _check(scale.is_floating_point() and nested is None, "scales are no floating-point numbers")
        table = tensors.get("table")
        _check(len(levels) == 1 if table is None else _fits(table, len(codes), len(levels)), "a row has no table")
        return cls(codes, levels, scale, block_size, nested, mean, table)


@dataclass(frozen=True, eq=False)
class Vectors(Packed):
    """Pieces of d columns, each a sum of one entry of every stage's codebook; · scale + offset of the row.

    Attributes:
        indices: (stages, out, ⌈in / d⌉) int32; the last piece of a row may be cut.
        codebooks: for each stage (tables, entries, d) floating point.
        columns: in.
        table: (out,) uint8, which table of each stage a row uses; None where there is one.
        scale, offset: (out,) floating point, or None.

    >>> book = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])
    >>> made = Vectors(torch.tensor([[[1, 0]]], dtype=torch.int32), (book,), 3)
    >>> made.dequantize().tolist(), unpack(made.tensors(), made.settings()).dequantize().tolist()
    ([[3.0, 4.0, 1.0]], [[3.0, 4.0, 1.0]])
    """

    form: ClassVar[str] = "vectors"
    indices: Tensor
    codebooks: tuple[Tensor, ...]
    columns: int
    table: Tensor | None = None
    scale: Tensor | None = None
    offset: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.indices.shape[1], self.columns

    def dequantize(self) -> Tensor:
        rows = self.indices.shape[1]
        table = torch.zeros(rows, dtype=torch.long) if self.table is None else self.table.long()
        table = table.to(self.indices.device).unsqueeze(1)
        made = sum(book.float()[table, one.long()] for book, one in zip(self.codebooks, self.indices))
        assert isinstance(made, Tensor)
        weight = made.flatten(1)[:, : self.columns]
        if self.scale is not None:
            weight = weight * self.scale.float().unsqueeze(1)
        return weight if self.offset is None else weight + self.offset.float().unsqueeze(1)

    def part(self, first: int, last: int) -> Packed | None:
        of_rows = {"table": self.table, "scale": self.scale, "offset": self.offset}
        cut: dict[str, Any] = {name: t[first:last] for name, t in of_rows.items() if t is not None}
        return replace(self, indices=self.indices[:, first:last], **cut)

    def tensors(self) -> dict[str, Tensor]:
        made = {}
        for number, (book, one) in enumerate(zip(self.codebooks, self.indices)):
            made[f"indices_{number}"] = pack_bits(one, max(1, (book.shape[1] - 1).bit_length()))
            made[f"codebook_{number}"] = book.contiguous()
        more = {"table": self.table, "scale": self.scale, "offset": self.offset}
        return {**made, **{name: t for name, t in more.items() if t is not None}}

    def settings(self) -> dict[str, Any]:
        return {"form": self.form, "columns": self.columns, "stages": len(self.codebooks)}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Self:
        columns, stages = int(settings["columns"]), int(settings["stages"])
        books = tuple(tensors[f"codebook_{i}"] for i in range(stages))
        pieces = -(-columns // books[0].shape[2])
        indices = [
            unpack_bits(tensors[f"indices_{i}"], max(1, (b.shape[1] - 1).bit_length()), pieces).to(torch.int32)
            for i, b in enumerate(books)
        ]
        _check(all(int(one.max()) < b.shape[1] for one, b in zip(indices, books)), "an index has no entry")
        table, scale, offset = tensors.get("table"), tensors.get("scale"), tensors.get("offset")
        rows = len(indices[0])
        _check(
            all(_fits(table, rows, len(b)) if table is not None else len(b) == 1 for b in books), "a row has no table"
        )
        _check(all(t is None or t.shape == (rows,) for t in (scale, offset)), "scales or offsets do not fit the rows")
        return cls(torch.stack(indices), books, columns, table, scale, offset)


@dataclass(frozen=True, eq=False)
class Binary(Packed):
    """Σᵢ αᵢ · signᵢ.

    Attributes:
        signs: (bits, out, in) bool, True for +1.
        alpha: (bits, ⌈out / block[0]⌉, ⌈in / block[1]⌉) floating point.
        block: rows and columns that share an α.

    >>> made = Binary(torch.tensor([[[True, False]], [[True, True]]]), torch.tensor([[[2.0]], [[1.0]]]), (1, 2))
    >>> made.dequantize().tolist(), unpack(made.tensors(), made.settings()).dequantize().tolist()
    ([[3.0, -1.0]], [[3.0, -1.0]])
    """

    form: ClassVar[str] = "binary"
    signs: Tensor
    alpha: Tensor
    block: tuple[int, int]

    @property
    def shape(self) -> tuple[int, int]:
        return self.signs.shape[1], self.signs.shape[2]

    def dequantize(self) -> Tensor:
        weight = torch.zeros(self.shape, device=self.signs.device)
        for sign, alpha in zip(self.signs, self.alpha.float()):
            spread = _spread(alpha, self.block, self.shape)
            weight += torch.where(sign, spread, -spread)
        return weight

    def part(self, first: int, last: int) -> Packed | None:
        blocks = _block_rows(first, last, self.block[0], self.shape[0])
        return None if blocks is None else replace(self, signs=self.signs[:, first:last], alpha=self.alpha[:, blocks])

    def tensors(self) -> dict[str, Tensor]:
        words = torch.stack([pack_bits(sign.int(), 1) for sign in self.signs])
        return {"signs": words, "alpha": self.alpha.contiguous()}

    def settings(self) -> dict[str, Any]:
        return {"form": self.form, "block": list(self.block), "columns": self.shape[1]}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Self:
        columns, block = int(settings["columns"]), tuple(map(int, settings["block"]))
        signs = torch.stack([unpack_bits(words, 1, columns).bool() for words in tensors["signs"]])
        expected = (len(signs), -(-signs.shape[1] // block[0]), -(-columns // block[1]))
        _check(tensors["alpha"].shape == expected, f"alpha is not {list(expected)}")
        return cls(signs, tensors["alpha"], (block[0], block[1]))


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

    def settings(self) -> dict[str, Any]:
        return {"form": self.form, "inner": self.inner.settings()}


def _inner(tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Packed:
    inside = {name.removeprefix("inner_"): t for name, t in tensors.items() if name.startswith("inner_")}
    return unpack(inside, settings["inner"])


@dataclass(frozen=True, eq=False)
class Transposed(_Around):
    """Another form's matrix (in, out), transposed.

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

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Self:
        inner, order = _inner(tensors, settings), tensors["order"]
        everyone = torch.arange(inner.shape[1], device=order.device)
        _check(order.shape == everyone.shape and torch.equal(order.long().sort()[0], everyone), "no order of columns")
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

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Self:
        inner, left, right = _inner(tensors, settings), tensors["left"], tensors["right"]
        _check((len(left), right.shape[1]) == inner.shape and left.shape[1] == len(right), "the factors do not fit")
        return cls(inner, left, right)


@dataclass(frozen=True, eq=False)
class Activations(_Around):
    """Another form's matrix, whose inputs are quantised before they are multiplied.

    Attributes:
        inner: the form.
        kind: int8 (−128 … 127) or e4m3.
        input_scale: 0-d float32 for all inputs; None: each row of inputs (token) has its own, from its largest value.
        group_size: consecutive columns of a row of inputs that share a scale where ``input_scale`` is None; 0: all.
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

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "kind": self.kind, **({"group_size": self.group_size} if self.group_size else {})}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Self:
        kind, inner, group_size = str(settings["kind"]), _inner(tensors, settings), int(settings.get("group_size", 0))
        _check(kind in ("int8", "e4m3"), f"inputs of {kind} are not known")
        _check(group_size >= 0, "groups of inputs do not divide")
        _check(not group_size or inner.shape[1] % group_size == 0, "groups of inputs do not divide")
        scale = tensors.get("input_scale")
        _check(scale is None or scale.dim() == 0, "the scale of inputs is no single number")
        return cls(inner, kind, scale, group_size)


def quantize_inputs(x: Tensor, kind: str, scale: Tensor | None = None, group_size: int = 0) -> Tensor:
    """Inputs on the values that a layer with quantised inputs sees: (…, in) -> (…, in) of the same type.

    Args:
        x: inputs; computed in float32.
        kind: int8 or e4m3.
        scale: 0-d; each row's largest size / the largest code if None.
        group_size: without a scale, each group of so many columns has its own; 0: the row.

    >>> quantize_inputs(torch.tensor([[127.0, 3.4, -1.6]]), "int8").tolist()
    [[127.0, 3.0, -2.0]]
    """
    if group_size and scale is None:
        return quantize_inputs(x.unflatten(-1, (-1, group_size)), kind).flatten(-2)
    wide = x.float()
    limit = 127.0 if kind == "int8" else MINIFLOATS["e4m3"][3]
    if scale is None:
        scale = (wide.abs().amax(-1, keepdim=True) / limit).clamp(min=torch.finfo(torch.float32).tiny)
    steps = wide / scale
    if kind == "int8":
        steps = steps.round().clamp(-128, 127)
    else:
        steps = steps.clamp(-limit, limit).to(torch.float8_e4m3fn).float()
    return (steps * scale).to(x.dtype)


NESTED = 256  # scales that share a scale
_MAPS: dict[str, Tensor] = {}


def dynamic_map() -> Tensor:
    """The 256 values of scales in 8 bits: sign, decade, and the finer the larger the decade; sorted, float32.

    Decade 10⁻⁶⁺ⁱ (i = 0 … 6) has 2ⁱ values of either sign, at the middles of equal parts of [0.1, 1]; 0 and 1 come on top.

    >>> dynamic_map().shape, dynamic_map()[[0, 127, 255]].tolist()
    (torch.Size([256]), [-0.992968738079071, 0.0, 1.0])
    """
    if "dynamic" not in _MAPS:
        values = [0.0, 1.0]
        for decade in range(7):
            edges = torch.linspace(0.1, 1, 2**decade + 1)
            middles = (10.0 ** (decade - 6) * ((edges[:-1] + edges[1:]) / 2)).tolist()
            values += [*middles, *(-m for m in middles)]
        _MAPS["dynamic"] = torch.tensor(sorted(values))
    return _MAPS["dynamic"]


def minifloat_levels(kind: str) -> Tensor:
    """The value of each bit pattern: (2ᵇⁱᵗˢ,) float32; NaN and infinite patterns are NaN.

    >>> minifloat_levels("e2m1").tolist()[:8]
    [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    """
    if kind not in _MAPS:
        exponent_bits, mantissa_bits, bias, largest = MINIFLOATS[kind]
        patterns = torch.arange(1 << (exponent_bits + mantissa_bits))
        exponent, mantissa = patterns >> mantissa_bits, (patterns & ((1 << mantissa_bits) - 1)) / (1 << mantissa_bits)
        normal = torch.ldexp(1 + mantissa, exponent - bias)
        values = torch.where(exponent == 0, torch.ldexp(mantissa, torch.tensor(1 - bias)), normal)
        values = torch.where(values > largest, torch.nan, values)
        _MAPS[kind] = torch.cat([values, -values]).float()
    return _MAPS[kind]


def in_blocks(flat: Tensor, size: int) -> Tensor:
    """(n,) -> (⌈n / size⌉, size), filled with zeros.

    >>> in_blocks(torch.ones(3), 2).tolist()
    [[1.0, 1.0], [1.0, 0.0]]
    """
    return functional.pad(flat, (0, -len(flat) % size)).unflatten(0, (-1, size))


def _spread(scale: Tensor, block: tuple[int, int], shape: tuple[int, int]) -> Tensor:
    """A number for each block -> one for each element."""
    wide = scale.repeat_interleave(min(block[0], shape[0]), 0)[: shape[0]]
    return wide.repeat_interleave(min(block[1], shape[1]), 1)[:, : shape[1]]


def _pick(levels: Tensor, codes: Tensor) -> Tensor:
    """levels[codes], in less time and memory than indexing takes."""
    return levels.index_select(0, codes.flatten().int()).view(codes.shape)


def _block_rows(first: int, last: int, size: int, rows: int) -> slice | None:
    """The blocks of ``size`` rows that some rows are; None if they begin within one that does not hold all."""
    if size >= rows:
        return slice(0, 1)
    return None if first % size else slice(first // size, -(-last // size))


def _fits(table: Tensor, rows: int, tables: int) -> bool:
    """Whether each row has a table."""
    return table.shape == (rows,) and table.dtype == torch.uint8 and int(table.max()) < tables


def _check(holds: bool, why: str) -> None:
    if not holds:
        raise CheckpointError(f"A packed weight is damaged: {why}.")
