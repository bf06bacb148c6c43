"""The forms of packed weights: grids, tiny floats, tables, vectors, signs.

With W (out, in), rows r, columns c:

===========  ==========================================================================================
Affine       (codes − zero) · scale, scale and zero of each group of columns of a row
Minifloat    a tiny floating-point number · scale of its block of rows and columns (· a global scale)
Lookup       levels[code] · scale of a block of consecutive weights, row after row
Vectors      pieces of d columns, each a sum of entries of codebooks; · scale + offset of the row
Binary       Σᵢ αᵢ · (± 1), α of each block of rows and columns
===========  ==========================================================================================

What is put around them is in :mod:`weft.packed.around`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from weft.packed.bits import bytes_of, check, pack_bits, packed_bytes, unpack_bits
from weft.packed.form import Packed
from weft.packed.levels import MINIFLOATS, NESTED, dynamic_map, in_blocks, minifloat_levels


@dataclass(frozen=True, eq=False)
class Affine(Packed):
    """(codes − zero) · scale.

    Attributes:
        codes: (out, in) int16.
        scale: (out, groups) floating point; a group is in / groups consecutive columns.
        zero: (out, groups), the type of the scales; whole numbers but for methods that say otherwise.
        bits: of a code.
        low: the lowest code: 0, or −2ᵇⁱᵗˢ⁻¹ where zero is 0.

    >>> from weft.packed import unpack
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
        zero = self._stored_zero()
        return made if zero is None else {**made, "zero": zero}

    @property
    def nbytes(self) -> int:
        return packed_bytes(*self.shape, self.bits) + bytes_of(self.scale, self._stored_zero())

    def _stored_zero(self) -> Tensor | None:
        """Zero points as files have them: none, in bytes counted from 0, or as they are."""
        if not self.zero.count_nonzero():
            return None
        shifted = self.zero.double() - self.low
        whole = bool((shifted == shifted.round()).all()) and float(shifted.min()) >= 0 and float(shifted.max()) < 256
        return shifted.to(torch.uint8) if whole else self.zero.contiguous()

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
        check(scale.is_floating_point() and zero.is_floating_point(), "scales are no floating-point numbers")
        check(scale.shape == zero.shape and len(scale) == len(codes), "scales and codes differ in their rows")
        check(scale.dim() == 2 and scale.shape[1] > 0 and codes.shape[1] % scale.shape[1] == 0, "groups do not divide")
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

    >>> from weft.packed import unpack
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
        if blocks is None:
            return None
        block = (last - first, self.block[1]) if self.block == self.shape else self.block  # one scale for all stays one
        return replace(self, codes=self.codes[first:last], scale=self.scale[blocks], block=block)

    def tensors(self) -> dict[str, Tensor]:
        codes = self.codes.contiguous() if self.bits == 8 else pack_bits(self.codes.int(), self.bits)
        made = {"codes": codes, "scale": self.scale.contiguous()}
        return made if self.global_scale is None else {**made, "global_scale": self.global_scale}

    @property
    def nbytes(self) -> int:
        codes = self.codes.nbytes if self.bits == 8 else packed_bytes(*self.shape, self.bits)
        return codes + bytes_of(self.scale, self.global_scale)

    def settings(self) -> dict[str, Any]:
        return {"form": self.form, "kind": self.kind, "block": list(self.block), "columns": self.shape[1]}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Self:
        kind, block, columns = str(settings["kind"]), tuple(map(int, settings["block"])), int(settings["columns"])
        exponent, mantissa, _, _ = MINIFLOATS[kind]
        bits, codes = 1 + exponent + mantissa, tensors["codes"]
        codes = codes.view(torch.uint8) if bits == 8 else unpack_bits(codes, bits, columns)
        check(len(block) == 2 and codes.dim() == 2 and codes.shape[1] == columns, "codes are no matrix of that width")
        expected = (-(-codes.shape[0] // block[0]), -(-columns // block[1]))
        check(tensors["scale"].shape == expected, f"scales are not {list(expected)}")
        check(tensors["scale"].is_floating_point(), "scales are no floating-point numbers")
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

    >>> from weft.packed import unpack
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
        return _index_bits(self.levels.shape[1])

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

    @property
    def nbytes(self) -> int:
        others = bytes_of(self.levels, self.scale, self.nested_scale, self.mean, self.table)
        return packed_bytes(*self.shape, self.bits) + others

    def settings(self) -> dict[str, Any]:
        return {"form": self.form, "block_size": self.block_size, "columns": self.shape[1]}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Self:
        levels, columns, block_size = tensors["levels"], int(settings["columns"]), int(settings["block_size"])
        codes = unpack_bits(tensors["codes"], _index_bits(levels.shape[1]), columns)
        check(int(codes.max()) < levels.shape[1], "a code has no level")
        scale, nested, mean = tensors["scale"], tensors.get("nested_scale"), tensors.get("mean")
        check(scale.shape == (-(-codes.numel() // block_size),), "scales do not fit the blocks")
        if scale.dtype == torch.uint8:
            check(nested is not None and nested.shape == (-(-len(scale) // NESTED),), "scales of scales do not fit")
            check(mean is not None and mean.dim() == 0, "the mean of scales is missing")
        else:
            check(scale.is_floating_point() and nested is None, "scales are no floating-point numbers")
        table = tensors.get("table")
        check(len(levels) == 1 if table is None else _fits(table, len(codes), len(levels)), "a row has no table")
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

    >>> from weft.packed import unpack
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
            made[f"indices_{number}"] = pack_bits(one, _index_bits(book.shape[1]))
            made[f"codebook_{number}"] = book.contiguous()
        more = {"table": self.table, "scale": self.scale, "offset": self.offset}
        return {**made, **{name: t for name, t in more.items() if t is not None}}

    @property
    def nbytes(self) -> int:
        _, rows, pieces = self.indices.shape
        indices = sum(packed_bytes(rows, pieces, _index_bits(book.shape[1])) for book in self.codebooks)
        return indices + bytes_of(*self.codebooks, self.table, self.scale, self.offset)

    def settings(self) -> dict[str, Any]:
        return {"form": self.form, "columns": self.columns, "stages": len(self.codebooks)}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Self:
        columns, stages = int(settings["columns"]), int(settings["stages"])
        books = tuple(tensors[f"codebook_{i}"] for i in range(stages))
        pieces = -(-columns // books[0].shape[2])
        indices = [
            unpack_bits(tensors[f"indices_{i}"], _index_bits(b.shape[1]), pieces).to(torch.int32)
            for i, b in enumerate(books)
        ]
        check(all(int(one.max()) < b.shape[1] for one, b in zip(indices, books)), "an index has no entry")
        table, scale, offset = tensors.get("table"), tensors.get("scale"), tensors.get("offset")
        rows = len(indices[0])
        check(
            all(_fits(table, rows, len(b)) if table is not None else len(b) == 1 for b in books), "a row has no table"
        )
        check(all(t is None or t.shape == (rows,) for t in (scale, offset)), "scales or offsets do not fit the rows")
        return cls(torch.stack(indices), books, columns, table, scale, offset)


@dataclass(frozen=True, eq=False)
class Binary(Packed):
    """Σᵢ αᵢ · signᵢ.

    Attributes:
        signs: (bits, out, in) bool, True for +1.
        alpha: (bits, ⌈out / block[0]⌉, ⌈in / block[1]⌉) floating point.
        block: rows and columns that share an α.

    >>> from weft.packed import unpack
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

    @property
    def nbytes(self) -> int:
        return len(self.signs) * packed_bytes(*self.shape, 1) + bytes_of(self.alpha)

    def settings(self) -> dict[str, Any]:
        return {"form": self.form, "block": list(self.block), "columns": self.shape[1]}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Self:
        columns, block = int(settings["columns"]), tuple(map(int, settings["block"]))
        signs = torch.stack([unpack_bits(words, 1, columns).bool() for words in tensors["signs"]])
        expected = (len(signs), -(-signs.shape[1] // block[0]), -(-columns // block[1]))
        check(tensors["alpha"].shape == expected, f"alpha is not {list(expected)}")
        return cls(signs, tensors["alpha"], (block[0], block[1]))


def _index_bits(entries: int) -> int:
    """Bits of an index into so many entries."""
    return max(1, (entries - 1).bit_length())


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
