"""AutoAWQ's files of the kind ``gemm``, which vLLM and SGLang load.

A layer P with W (out, in), four bits, eight codes of neighbouring outputs in a word:

    qweight int32 (in, out / 8);   qzeros int32 (groups, out / 8);   scales float16 (groups, out)

    W[o, i] = (code[i, o] − zero[g, o]) · scale[g, o]        g = ⌊i / group_size⌋

Word c holds the outputs 8c + (0, 2, 4, 6, 1, 3, 5, 7), the first in the lowest bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from weft.errors import CheckpointError, RecipeError
from weft.packed.bits import pack_bits, unpack_bits
from weft.packed.form import Packed
from weft.packed.formats.format import DAMAGED, Format, Get, Shapes, expect, required, shape_of
from weft.packed.formats.grids import not_whole, unsigned
from weft.packed.forms import Affine

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


class AWQ(Format):
    """Four bits in groups."""

    name: ClassVar[str] = "awq"
    method: ClassVar[str] = "awq"
    marks: ClassVar[tuple[str, ...]] = (".qweight",)
    parts: ClassVar[tuple[str, ...]] = (".qweight", ".qzeros", ".scales")

    def scale_dtype(self, dtype: torch.dtype) -> torch.dtype | None:
        return torch.float16

    def refuses(self, packed: Packed) -> str:
        if not isinstance(packed, Affine) or packed.bits != 4:
            return f"it holds grids of 4 bits, not {packed.form}. Take pack-quantized, or weft."
        if packed.shape[0] % 8:
            return f"{packed.shape[0]} outputs are not whole words of 8 codes. Take pack-quantized."
        return not_whole(packed)

    def _write(self, packed: Packed, dtype: torch.dtype) -> dict[str, Tensor]:
        assert isinstance(packed, Affine)
        codes, zero = unsigned(packed)
        return {"qweight": _pack(codes.T), "qzeros": _pack(zero.T), "scales": packed.scale.T}

    def config(self, layers: Mapping[str, Packed], ignored: Sequence[str]) -> dict[str, Any]:
        sizes = {p.group_size if p.scale.shape[1] > 1 else -1 for p in layers.values() if isinstance(p, Affine)}
        if len(sizes) != 1:
            raise RecipeError(
                f"All layers of an AWQ model have one group_size, got {sorted(sizes)}. Take pack-quantized, which has several."
            )
        return {
            "quant_method": "awq",
            "bits": 4,
            "group_size": sizes.pop(),
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": list(ignored) or None,
        }

    def check(self, config: Mapping[str, Any]) -> None:
        version = str(config.get("version", "gemm")).lower()
        if version != "gemm" or config.get("bits", 4) != 4:
            raise CheckpointError(
                f"AWQ files are read in their version 'gemm' with 4 bits, not {version!r} with {config.get('bits')}. "
                "Convert them with AutoAWQ, or quantise the model again."
            )

    def shape(self, name: str, shapes: Shapes, get: Get, config: Mapping[str, Any]) -> tuple[int, ...]:
        columns, words = shape_of(shapes, f"{name}.qweight", 2)
        groups, out = shape_of(shapes, f"{name}.scales", 2)
        if out != 8 * words or columns % groups:
            raise CheckpointError(
                f"{name}.scales is {[groups, out]}, which does not fit {columns} inputs and {8 * words} outputs. {DAMAGED}"
            )
        if shape_of(shapes, f"{name}.qzeros", 2) != (groups, words):
            raise CheckpointError(
                f"{name}.qzeros is {list(shapes[f'{name}.qzeros'])} and should be {[groups, words]}. {DAMAGED}"
            )
        return out, columns

    def read(self, name: str, get: Get, config: Mapping[str, Any]) -> Packed:
        found = {f"{name}.{part}": required(get, f"{name}.{part}") for part in ("qweight", "qzeros", "scales")}
        self.shape(name, {n: tuple(t.shape) for n, t in found.items()}, get, config)
        words, zeros = (expect(n, t, None, torch.int32) for n, t in list(found.items())[:2])
        scale = expect(f"{name}.scales", found[f"{name}.scales"], None).T.contiguous()
        codes = _unpack(words).T.to(torch.int16).contiguous()
        return Affine(codes, scale, _unpack(zeros).T.to(scale.dtype).contiguous(), 4, 0)


def _pack(codes: Tensor) -> Tensor:
    """(rows, n) codes -> (rows, n / 8) words."""
    return pack_bits(codes.unflatten(1, (-1, 8))[..., ORDER].flatten(1), 4)


def _unpack(words: Tensor) -> Tensor:
    codes = unpack_bits(words, 4, 8 * words.shape[1]).unflatten(1, (-1, 8))
    return torch.empty_like(codes).index_copy_(2, torch.tensor(ORDER, device=codes.device), codes).flatten(1)
