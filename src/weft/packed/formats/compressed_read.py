"""Reading compressed-tensors: the packed weight of a layer's tensors; see :mod:`weft.packed.formats.compressed_tensors`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from weft.errors import CheckpointError
from weft.packed.around import Activations
from weft.packed.bits import unpack_bits
from weft.packed.form import Packed
from weft.packed.formats.format import DAMAGED, Get, Shapes, check_groups, expect, number, optional, required, shape_of
from weft.packed.formats.grids import by_group, signed_affine
from weft.packed.formats.groups import scheme_of
from weft.packed.formats.nibbles import unpack_low_first
from weft.packed.forms import Affine, Minifloat
from weft.packed.levels import MICROSCALED


def plain_shape(name: str, shapes: Shapes, get: Get, config: Mapping[str, Any]) -> tuple[int, ...]:
    """(out, in) of a layer."""
    scale = f"{name}.weight_scale"
    shape_of(shapes, scale, len(shapes.get(scale, (0, 0))))
    if f"{name}.weight_packed" not in shapes:
        return shape_of(shapes, f"{name}.weight", 2)
    out, words = shape_of(shapes, f"{name}.weight_packed", 2)
    weights = scheme_of(name, config).weights
    if weights.get("type") == "float":
        return out, 2 * words
    groups, size = shapes[scale], weights.get("group_size")
    if len(groups) == 2 and type(size) is int and size > 0 and f"{name}.weight_shape" in shapes:
        columns = groups[1] * size
        if -(-columns * number(weights, "num_bits") // 32) == words:
            return out, columns  # nothing was read, which over a network costs a request a layer
    shape_of(shapes, f"{name}.weight_shape", 1)
    stated = expect(f"{name}.weight_shape", get(f"{name}.weight_shape"), (2,), torch.int64, torch.int32).tolist()
    bits = number(weights, "num_bits")
    if not 1 <= bits <= 8 or stated[0] != out or stated[1] < 1 or -(-stated[1] * bits // 32) != words:
        raise CheckpointError(
            f"{name}.weight_shape says {stated}, and {name}.weight_packed is {[out, words]} words of {bits} bits a code: "
            "they do not fit. The file is damaged, or its config.json belongs to another."
        )
    return out, stated[1]


def read_layer(name: str, get: Get, config: Mapping[str, Any]) -> Packed:
    """The packed weight of a layer, of whichever of the layouts.

    Raises:
        CheckpointError: tensors are missing or do not fit together.
    """
    scheme = scheme_of(name, config)
    weights = scheme.weights
    words = optional(get, f"{name}.weight_packed")
    bits, is_float = number(weights, "num_bits"), weights.get("type") == "float"
    if words is None:
        plain = required(get, f"{name}.weight")
        shape_of({f"{name}.weight": tuple(plain.shape)}, f"{name}.weight", 2)
        made = _read_float8(name, plain, get, weights) if is_float else _read_int8(name, plain, get, weights)
    elif is_float and bits == 4:
        made = _read_float4(name, words, get)
    elif is_float:
        raise CheckpointError(
            f"{name}: packed floats of {bits} bits are not known; files have them in 4 bits. {DAMAGED}"
        )
    else:
        made = _read_words(name, words, get, config)
    return _with_inputs(name, made, get, scheme.inputs)


def _read_words(name: str, words: Tensor, get: Get, config: Mapping[str, Any]) -> Packed:
    shapes = {f"{name}.weight_packed": tuple(words.shape), f"{name}.weight_scale": (1,), f"{name}.weight_shape": (2,)}
    required(get, f"{name}.weight_shape")
    out, columns = plain_shape(name, shapes, get, config)
    weights = scheme_of(name, config).weights
    bits = number(weights, "num_bits")
    expect(f"{name}.weight_packed", words, None, torch.int32)
    codes = unpack_bits(words, bits, columns)
    scale = _scales(name, required(get, f"{name}.weight_scale"), out, columns)
    index = optional(get, f"{name}.weight_g_idx")
    grouped = index is not None and bool((index >= 0).all())
    if not grouped and columns % scale.shape[1]:
        raise CheckpointError(f"{name}.weight_scale has {scale.shape[1]} groups, which do not divide {columns} inputs.")
    if weights.get("symmetric", True):
        zero = torch.full_like(scale, 1 << (bits - 1))
        if not grouped:
            return signed_affine(codes, scale, bits)
    else:
        packed = required(get, f"{name}.weight_zero_point")
        expect(f"{name}.weight_zero_point", packed, (-(-out * bits // 32), scale.shape[1]), torch.int32)
        zero = unpack_bits(packed.T.contiguous(), bits, out).T.to(scale.dtype)
    if grouped:
        assert index is not None
        group = check_groups(f"{name}.weight_g_idx", index, columns, scale.shape[1])
        return by_group(codes, scale, zero, group, bits)
    return Affine(codes.to(torch.int16), scale, zero, bits, 0)


def _scales(name: str, scale: Tensor, out: int, columns: int) -> Tensor:
    """(out, groups) of scales of rows or groups; one for all rows is spread."""
    expect(f"{name}.weight_scale", scale, None)
    if scale.numel() == 1:
        return scale.reshape(1, 1).expand(out, 1).contiguous()
    if scale.dim() != 2 or len(scale) != out or not 1 <= scale.shape[1] <= columns:
        raise CheckpointError(
            f"{name}.weight_scale is (out, groups) of a weight {[out, columns]}, got {list(scale.shape)}. The file is damaged."
        )
    return scale


def _read_int8(name: str, plain: Tensor, get: Get, weights: Mapping[str, Any]) -> Packed:
    expect(f"{name}.weight", plain, None, torch.int8)
    out, columns = plain.shape
    scale = _scales(name, required(get, f"{name}.weight_scale"), out, columns)
    if columns % scale.shape[1]:
        raise CheckpointError(f"{name}.weight_scale has {scale.shape[1]} groups, which do not divide {columns} inputs.")
    bits = number(weights, "num_bits")
    low = -(1 << min(max(bits, 1), 8) - 1)
    if not 2 <= bits <= 8 or int(plain.min()) < low or int(plain.max()) >= -low:
        raise CheckpointError(f"{name}.weight has codes that are no signed numbers of {bits} bits. {DAMAGED}")
    if weights.get("symmetric", True):
        return Affine(plain.to(torch.int16), scale, torch.zeros_like(scale), bits, low)
    zero = expect(f"{name}.weight_zero_point", required(get, f"{name}.weight_zero_point"), None, torch.int8)
    zeros = _scales(name, zero.to(torch.int16).float(), out, columns).to(scale.dtype)
    return Affine(plain.to(torch.int16) - low, scale, zeros.expand(scale.shape) - low, bits, 0)


def _read_float8(name: str, plain: Tensor, get: Get, weights: Mapping[str, Any]) -> Packed:
    expect(f"{name}.weight", plain, None, torch.float8_e4m3fn)
    out, columns = plain.shape
    scale = required(get, f"{name}.weight_scale")
    if scale.dtype == torch.uint8:  # powers of two
        scale = scale.view(torch.float8_e8m0fnu)
    return float8(name, plain, expect(f"{name}.weight_scale", scale, None), _block(name, weights, out, columns))


def float8(name: str, plain: Tensor, scale: Tensor, block: tuple[int, int]) -> Minifloat:
    """Floats of 8 bits with a scale for each block."""
    out, columns = plain.shape
    expected = (-(-out // block[0]), -(-columns // block[1]))
    if scale.numel() == 1 and expected[0] * expected[1] == 1:
        scale = scale.reshape(1, 1)
    if scale.dim() == 1 and expected == (len(scale), 1):
        scale = scale.unsqueeze(1)
    if tuple(scale.shape) != expected:
        raise CheckpointError(
            f"{name}: scales of blocks {list(block)} of a weight {list(plain.shape)} are {list(expected)}, got "
            f"{list(scale.shape)}. The file is damaged, or its config.json belongs to another."
        )
    return Minifloat(plain.contiguous().view(torch.uint8), scale, "e4m3", block)


def _block(name: str, weights: Mapping[str, Any], out: int, columns: int) -> tuple[int, int]:
    """Rows and columns that share a scale."""
    strategy = weights.get("strategy") or ("group" if weights.get("group_size") else "tensor")
    if strategy == "tensor":
        return out, columns
    if strategy == "channel":
        return 1, columns
    size = weights.get("block_structure") if strategy == "block" else [1, weights.get("group_size")]
    if isinstance(size, list) and len(size) == 2 and all(type(s) is int and s > 0 for s in size):
        return size[0], size[1]
    raise CheckpointError(f"{name}: config_groups say the strategy {strategy!r} with {size!r}. Repair config.json.")


def _read_float4(name: str, words: Tensor, get: Get) -> Packed:
    expect(f"{name}.weight_packed", words, None, torch.uint8)
    codes = unpack_low_first(words)
    scale = required(get, f"{name}.weight_scale")
    power = torch.float8_e8m0fnu
    if scale.dtype in (torch.uint8, power):
        expect(f"{name}.weight_scale", scale, (len(codes), -(-codes.shape[1] // 32)), torch.uint8, power)
        return Minifloat(codes, scale.view(power), "e2m1", (1, 32))
    expect(f"{name}.weight_scale", scale, (len(codes), -(-codes.shape[1] // 16)))
    common = _divided(f"{name}.weight_global_scale", required(get, f"{name}.weight_global_scale"))
    return Minifloat(codes, scale, "e2m1", (1, 16), common)


def _divided(name: str, divisor: Tensor) -> Tensor:
    """What scales are multiplied by, of what they are divided by."""
    expect(name, divisor, None, torch.float32)
    if divisor.numel() != 1 or not float(divisor.abs()) > 0:
        raise CheckpointError(f"{name} is one number that is not 0. The file is damaged.")
    return 1 / divisor.double().reshape(())


def _with_inputs(name: str, made: Packed, get: Get, inputs: Mapping[str, Any] | None) -> Packed:
    """With inputs of the kinds that weft knows; those of others (one dynamic scale for all) are taken as they come."""
    if not inputs or inputs.get("num_bits") not in (4, 8) or not inputs.get("symmetric", True):
        return made
    size = inputs.get("group_size") if inputs.get("strategy") in ("group", "tensor_group") else 0
    size, dynamic = size or 0, inputs.get("dynamic")
    if type(size) is not int or size < 0 or (size and made.shape[1] % size):
        return made
    kind = _kind(inputs)
    if kind == "nvfp4":
        divisor = optional(get, f"{name}.input_global_scale")
        return made if divisor is None else Activations(made, kind, _divided(f"{name}.input_global_scale", divisor))
    if not kind or dynamic:
        fits = kind and dynamic is True and inputs.get("strategy") in ("token", "group")
        return Activations(made, kind, None, 0 if kind in MICROSCALED else size) if fits else made
    scale = optional(get, f"{name}.input_scale")
    if kind in MICROSCALED or scale is None or scale.numel() != 1 or not scale.is_floating_point():
        return made
    return Activations(made, kind, scale.float().reshape(()))


def _kind(inputs: Mapping[str, Any]) -> str:
    """What inputs are quantised to; empty if weft does not know it."""
    bits, scales = inputs["num_bits"], str(inputs.get("scale_dtype")).removeprefix("torch.")
    if inputs.get("type") != "float":
        return f"int{bits}"
    if scales == "uint8" and inputs.get("strategy") == "group":
        return f"mxfp{bits}" if inputs.get("group_size") == 32 else ""
    if bits == 4:
        nested = inputs.get("strategy") == "tensor_group" and inputs.get("group_size") == 16
        return "nvfp4" if nested and inputs.get("dynamic") == "local" else ""
    return "e4m3"
