"""gpt-oss's experts in MXFP4, for reading: all experts of a layer are one tensor.

    P_blocks uint8 (experts, out, in / 32, 16)        two codes e2m1 in a byte, the earlier low
    P_scales uint8 (experts, out, in / 32)            a power of two each, 2ˢ⁻¹²⁷

The plain tensor P is (experts, in, out). As a packed weight it is a matrix (experts · out, in).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from weft.errors import CheckpointError, RecipeError
from weft.packed.form import Packed
from weft.packed.formats.format import DAMAGED, Format, Get, Shapes, expect, required, shape_of
from weft.packed.formats.nibbles import unpack_low_first
from weft.packed.forms import Minifloat

_WHY = "weft reads the experts of gpt-oss and does not write them. Take mxfp4-pack-quantized."


class Experts(Format):
    """Fused experts in MXFP4."""

    name: ClassVar[str] = "mxfp4"
    method: ClassVar[str] = "mxfp4"
    marks: ClassVar[tuple[str, ...]] = ("_blocks",)
    parts: ClassVar[tuple[str, ...]] = ("_blocks", "_scales")

    def refuses(self, packed: Packed) -> str:
        return _WHY

    def config(self, layers: Mapping[str, Packed], ignored: Sequence[str]) -> dict[str, Any]:
        raise RecipeError(_WHY)

    def plain_name(self, name: str) -> str:
        return name

    def plain(self, weight: Tensor, shape: tuple[int, ...]) -> Tensor:
        return weight.reshape(shape[0], shape[2], shape[1]).transpose(1, 2)

    def shape(self, name: str, shapes: Shapes, get: Get, config: Mapping[str, Any]) -> tuple[int, ...]:
        experts, out, groups, size = shape_of(shapes, f"{name}_blocks", 4)
        if shape_of(shapes, f"{name}_scales", 3) != (experts, out, groups) or size != 16:
            raise CheckpointError(
                f"{name}_blocks is {[experts, out, groups, size]} and {name}_scales {list(shapes[f'{name}_scales'])}: blocks are "
                f"16 bytes, and each has a scale. {DAMAGED}"
            )
        return experts, groups * 32, out

    def read(self, name: str, get: Get, config: Mapping[str, Any]) -> Packed:
        blocks = expect(f"{name}_blocks", required(get, f"{name}_blocks"), None, torch.uint8)
        scales = expect(f"{name}_scales", required(get, f"{name}_scales"), None, torch.uint8)
        shapes = {f"{name}_blocks": tuple(blocks.shape), f"{name}_scales": tuple(scales.shape)}
        experts, columns, out = self.shape(name, shapes, get, config)
        codes = unpack_low_first(blocks).reshape(experts * out, columns)
        scale = scales.reshape(experts * out, columns // 32).contiguous().view(torch.float8_e8m0fnu)
        return Minifloat(codes, scale, "e2m1", (1, 32))
