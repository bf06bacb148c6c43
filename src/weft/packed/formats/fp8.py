"""Floats of 8 bits as DeepSeek and Qwen publish them, which vLLM, SGLang and transformers load.

A layer P with W (out, in): ``weight`` float8_e4m3 (out, in) and ``weight_scale_inv`` float32 (⌈out / 128⌉, ⌈in / 128⌉), which
the weight is multiplied by in spite of its name; one number where there are no blocks. Inputs are quantised too, in groups
as wide as a block.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from weft.errors import CheckpointError, RecipeError
from weft.packed.around import Activations
from weft.packed.form import Packed
from weft.packed.formats.compressed_read import float8
from weft.packed.formats.format import Format, Get, Shapes, expect, optional, required, shape_of
from weft.packed.forms import Minifloat

_SCALES = ("weight_scale_inv", "weight_scale")
_INPUTS = ("activation_scale", "input_scale")


class FP8(Format):
    """Blocks of floats of 8 bits."""

    name: ClassVar[str] = "fp8"
    method: ClassVar[str] = "fp8"
    marks: ClassVar[tuple[str, ...]] = tuple(f".{n}" for n in _SCALES)
    parts: ClassVar[tuple[str, ...]] = tuple(f".{n}" for n in ("weight", *_SCALES, *_INPUTS))

    def scale_dtype(self, dtype: torch.dtype) -> torch.dtype | None:
        return torch.float32

    def refuses(self, packed: Packed) -> str:
        if not isinstance(packed, Activations) or packed.kind != "e4m3":
            return "inputs of its layers are e4m3 too. Take float-quantized, or weft."
        inner = packed.inner
        if not isinstance(inner, Minifloat) or inner.kind != "e4m3" or inner.global_scale is not None:
            return f"it holds floats of the kind e4m3, not {inner.form}. Take weft."
        if inner.block[0] == 1:
            return "it has scales of blocks of rows and columns, not of rows. Take float-quantized."
        if packed.input_scale is None and packed.group_size != (0 if _whole(inner) else inner.block[1]):
            return "inputs are quantised in groups as wide as a block. Take float-quantized."
        return ""

    def _write(self, packed: Packed, dtype: torch.dtype) -> dict[str, Tensor]:
        assert isinstance(packed, Activations)
        inner = packed.inner
        assert isinstance(inner, Minifloat)
        made = {"weight": inner.codes.contiguous().view(torch.float8_e4m3fn), "weight_scale_inv": inner.scale}
        if _whole(inner):
            made["weight_scale_inv"] = inner.scale.reshape(())
        if packed.input_scale is not None:
            made["activation_scale"] = packed.input_scale
        return made

    def config(self, layers: Mapping[str, Packed], ignored: Sequence[str]) -> dict[str, Any]:
        blocks, static = set(), set()
        for packed in layers.values():
            assert isinstance(packed, Activations)
            inner = packed.inner
            assert isinstance(inner, Minifloat)
            blocks.add(None if _whole(inner) else inner.block)
            static.add(packed.input_scale is not None)
        if len(blocks) != 1 or len(static) != 1:
            raise RecipeError(
                "All layers of an fp8 model have blocks of one size, and inputs quantised in one way. Take float-quantized."
            )
        block = blocks.pop()
        return {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "static" if static.pop() else "dynamic",
            "weight_block_size": None if block is None else list(block),
            "modules_to_not_convert": list(ignored),
        }

    def layers(self, names: Iterable[str], config: Mapping[str, Any]) -> dict[str, list[str]]:
        return {p: found for p, found in super().layers(names, config).items() if f"{p}.weight" in found}

    def shape(self, name: str, shapes: Shapes, get: Get, config: Mapping[str, Any]) -> tuple[int, ...]:
        return shape_of(shapes, f"{name}.weight", 2)

    def read(self, name: str, get: Get, config: Mapping[str, Any]) -> Packed:
        plain = expect(f"{name}.weight", required(get, f"{name}.weight"), None, torch.float8_e4m3fn)
        found = next((n for n in _SCALES if optional(get, f"{name}.{n}") is not None), _SCALES[0])
        scale = expect(f"{name}.{found}", required(get, f"{name}.{found}"), None)
        size = config.get("weight_block_size")
        sizes = size if isinstance(size, list) else []
        if size is not None and not (len(sizes) == 2 and all(type(s) is int and s > 0 for s in sizes)):
            raise CheckpointError(f"The quantization_config's weight_block_size is two sizes or null, got {size!r}.")
        out, columns = plain.shape
        one = scale.numel() == 1 and size and (out > size[0] or columns > size[1])
        block = (size[0], size[1]) if size and not one else (out, columns)
        made = float8(name, plain, scale, block)
        if config.get("activation_scheme") == "dynamic":
            group = block[1] if size and not one else 0
            return made if group and columns % group else Activations(made, "e4m3", None, group)
        inputs = next((t for n in _INPUTS if (t := optional(get, f"{name}.{n}")) is not None), None)
        if inputs is None or inputs.numel() != 1 or not inputs.is_floating_point():
            return made
        return Activations(made, "e4m3", inputs.float().reshape(()))


def _whole(packed: Minifloat) -> bool:
    """Whether one scale is for all, and not just because a matrix is smaller than a block."""
    return packed.block == packed.shape and packed.block != (128, 128)
