"""bitsandbytes' files: four bits with a table, which QLoRA trains over, and eight bits for reading.

A layer P with W (out, in), blocks of consecutive weights row after row:

    weight uint8 (⌈out · in / 2⌉, 1)        two codes in a byte, the earlier high
    weight.absmax (blocks,), weight.quant_map float32 (16,)
    weight.quant_state.bitsandbytes__nf4 (or fp4) uint8       JSON: quant_type, blocksize, dtype, shape and the rest
    weight.nested_absmax, weight.nested_quant_map (256,)      where absmax is uint8, scales in 8 bits themselves

    eight bits: weight int8 (out, in), SCB float32 (out,):  W = weight · SCB / 127
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from weft.errors import CheckpointError
from weft.packed.form import Packed
from weft.packed.formats.format import DAMAGED, Format, Get, Shapes, expect, optional, required, shape_of
from weft.packed.formats.nibbles import pack_high_first, unpack_high_first
from weft.packed.forms import Affine, Lookup
from weft.packed.levels import NESTED, dynamic_map, in_blocks

_STATE = "weight.quant_state.bitsandbytes__"


class BitsAndBytes(Format):
    """Four bits with a table and blocks."""

    name: ClassVar[str] = "bitsandbytes"
    method: ClassVar[str] = "bitsandbytes"
    marks: ClassVar[tuple[str, ...]] = (f".{_STATE}nf4", f".{_STATE}fp4", ".SCB")
    parts: ClassVar[tuple[str, ...]] = (
        *(".weight", ".weight.absmax", ".weight.quant_map", ".weight.nested_absmax", ".weight.nested_quant_map"),
        *(f".{_STATE}nf4", f".{_STATE}fp4", ".SCB", ".weight_format"),
    )

    def refuses(self, packed: Packed) -> str:
        if not isinstance(packed, Lookup) or packed.levels.shape != (1, 16):
            return f"it holds tables of sixteen values, not {packed.form}. Take weft."
        size = packed.block_size
        if size < 32 or size & (size - 1):
            return (
                f"its blocks are powers of two from 32 on, not {size}. Quantise with another block_size, or take weft."
            )
        return ""

    def fit(self, packed: Packed, dtype: torch.dtype) -> Packed:
        floats = isinstance(packed, Lookup) and packed.scale.is_floating_point()
        return replace(packed, scale=packed.scale.float()) if isinstance(packed, Lookup) and floats else packed

    def _write(self, packed: Packed, dtype: torch.dtype) -> dict[str, Tensor]:
        assert isinstance(packed, Lookup)
        kind = _kind(packed)
        state: dict[str, Any] = {"quant_type": kind, "blocksize": packed.block_size, "dtype": str(dtype)[6:]}
        state["shape"] = list(packed.shape)
        made = {
            "weight": pack_high_first(packed.codes).unsqueeze(1),
            "weight.absmax": packed.scale,
            "weight.quant_map": packed.levels[0].float().clone(),  # each layer its own: files share no tensors
        }
        if packed.nested_scale is not None and packed.mean is not None:
            state |= {"nested_blocksize": NESTED, "nested_dtype": "float32", "nested_offset": packed.mean.item()}
            made |= {"weight.nested_absmax": packed.nested_scale, "weight.nested_quant_map": dynamic_map().clone()}
        made[f"{_STATE}{kind}"] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
        return made

    def config(self, layers: Mapping[str, Packed], ignored: Sequence[str]) -> dict[str, Any]:
        first = next(iter(layers.values()))
        assert isinstance(first, Lookup)
        return {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": _kind(first),
            "bnb_4bit_use_double_quant": first.nested_scale is not None,
            "bnb_4bit_compute_dtype": "bfloat16",
            "bnb_4bit_quant_storage": "uint8",
            "llm_int8_skip_modules": list(ignored) or None,
        }

    def detects(self, config: Mapping[str, Any]) -> bool:
        flags = ("load_in_4bit", "load_in_8bit")  # early files name no method
        return super().detects(config) or ("quant_method" not in config and any(config.get(f) for f in flags))

    def layers(self, names: Iterable[str], config: Mapping[str, Any]) -> dict[str, list[str]]:
        return {p: found for p, found in super().layers(names, config).items() if f"{p}.weight" in found}

    def shape(self, name: str, shapes: Shapes, get: Get, config: Mapping[str, Any]) -> tuple[int, ...]:
        if f"{name}.SCB" in shapes:
            return shape_of(shapes, f"{name}.weight", 2)
        out, columns = _shape(name, _state(name, get))
        stored = math.prod(shapes[f"{name}.weight"])  # elements of whichever type holds the bytes
        if not -(-out * columns // 16) <= stored <= -(-out * columns // 2):
            raise CheckpointError(
                f"{name}.weight has {stored:,} elements, which is no weight {[out, columns]}. {DAMAGED}"
            )
        return out, columns

    def read(self, name: str, get: Get, config: Mapping[str, Any]) -> Packed:
        weight = required(get, f"{name}.weight")
        rows = optional(get, f"{name}.SCB")
        if rows is not None:
            expect(f"{name}.weight", weight, None, torch.int8)
            out, _ = shape_of({f"{name}.weight": tuple(weight.shape)}, f"{name}.weight", 2)
            scale = expect(f"{name}.SCB", rows, None).float().flatten() / 127
            expect(f"{name}.SCB", scale, (out,))
            return Affine(weight.to(torch.int16), scale.unsqueeze(1), torch.zeros(out, 1), 8, -128)
        state = _state(name, get)
        out, columns = _shape(name, state)
        size = state.get("blocksize")
        if type(size) is not int or size < 1:
            raise CheckpointError(f"{name}: its quant_state has the blocksize {size!r}. {DAMAGED}")
        raw = weight.contiguous().flatten().view(torch.uint8)
        if len(raw) != -(-out * columns // 2):
            raise CheckpointError(
                f"{name}.weight has {len(raw):,} bytes, which is no weight {[out, columns]}. {DAMAGED}"
            )
        codes = unpack_high_first(raw, out * columns).reshape(out, columns)
        levels = expect(f"{name}.weight.quant_map", required(get, f"{name}.weight.quant_map"), (16,), torch.float32)
        scale = required(get, f"{name}.weight.absmax")
        blocks = -(-out * columns // size)
        if scale.dtype != torch.uint8:
            return Lookup(codes, levels.unsqueeze(0), expect(f"{name}.weight.absmax", scale, (blocks,)), size)
        expect(f"{name}.weight.absmax", scale, (blocks,), torch.uint8)
        return _nested(name, Lookup(codes, levels.unsqueeze(0), scale, size), get, state)


def _nested(name: str, packed: Lookup, get: Get, state: Mapping[str, Any]) -> Lookup:
    """With scales that are stored in 8 bits; where their table or blocks are not the usual ones, with plain scales."""
    nested_name, map_name = f"{name}.weight.nested_absmax", f"{name}.weight.nested_quant_map"
    size, offset = state.get("nested_blocksize"), state.get("nested_offset")
    if type(size) is not int or size < 1 or not isinstance(offset, int | float) or not math.isfinite(offset):
        raise CheckpointError(f"{name}: its quant_state has no nested_blocksize and nested_offset. {DAMAGED}")
    nested = required(get, nested_name)
    expect(nested_name, nested, (-(-len(packed.scale) // size),), torch.float32)
    values = expect(map_name, required(get, map_name), (256,), torch.float32)
    if size == NESTED and torch.equal(values, dynamic_map()):
        return replace(packed, nested_scale=nested, mean=torch.tensor(float(offset)))
    blocks = in_blocks(values[packed.scale.long()], min(size, len(packed.scale))) * nested.unsqueeze(1)
    return replace(packed, scale=blocks.flatten()[: len(packed.scale)] + torch.tensor(float(offset)))


def _kind(packed: Lookup) -> str:
    """nf4's table rises; fp4's does not."""
    return "nf4" if bool((packed.levels[0].diff() > 0).all()) else "fp4"


def _state(name: str, get: Get) -> Mapping[str, Any]:
    """The JSON that a tensor of bytes holds."""
    found = next((n for kind in ("nf4", "fp4") if optional(get, n := f"{name}.{_STATE}{kind}") is not None), None)
    if found is None:
        raise CheckpointError(f"{name}.{_STATE}nf4 is missing, and the layer cannot be read without it. {DAMAGED}")
    raw = expect(found, get(found), None, torch.uint8)
    try:
        state = json.loads(bytes(raw.flatten().tolist())) if raw.numel() < 1 << 16 else None
    except (ValueError, RecursionError):
        state = None
    if not isinstance(state, dict):
        raise CheckpointError(f"{found} holds no JSON object. {DAMAGED}")
    return state


def _shape(name: str, state: Mapping[str, Any]) -> tuple[int, int]:
    shape = state.get("shape")
    if not isinstance(shape, list) or len(shape) != 2 or not all(type(s) is int and s > 0 for s in shape):
        raise CheckpointError(f"{name}: its quant_state says the shape {shape!r}, which is no matrix. {DAMAGED}")
    return shape[0], shape[1]
