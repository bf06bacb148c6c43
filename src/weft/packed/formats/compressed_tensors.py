"""compressed-tensors: the format of llm-compressor, which vLLM, SGLang and transformers load.

Five layouts of a layer P with W (out, in):

======================  ====================================================================================
pack-quantized          weight_packed int32 (out, ⌈in · bits / 32⌉), weight_scale (out, groups), weight_shape (2,);
                        asymmetric: weight_zero_point int32 (⌈out · bits / 32⌉, groups), packed along the outputs
int-quantized           weight int8 (out, in), weight_scale (out, groups); inputs are quantised too
float-quantized         weight float8_e4m3 (out, in), weight_scale (1,), (out, groups) or one of each block
nvfp4-pack-quantized    weight_packed uint8 (out, in / 2), the earlier code low; weight_scale float8_e4m3
                        (out, in / 16); weight_global_scale (1,), which scales are divided by
mxfp4-pack-quantized    weight_packed so, weight_scale uint8 (out, in / 32), a power of two each: 2ˢ⁻¹²⁷
======================  ====================================================================================

Codes of whole numbers are stored from 0: a signed code plus 2ᵇⁱᵗˢ⁻¹. Which layers have which numbers stands in
``config_groups``; see :mod:`weft.packed.formats.groups`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from weft.packed.around import Activations, within
from weft.packed.bits import pack_bits
from weft.packed.form import Packed
from weft.packed.formats.compressed_read import plain_shape, read_layer
from weft.packed.formats.format import Format, Get, Shapes
from weft.packed.formats.grids import is_symmetric, not_whole, unsigned
from weft.packed.formats.groups import Scheme, check_config, make_groups
from weft.packed.formats.nibbles import pack_low_first
from weft.packed.forms import Affine, Minifloat

FLOATS = {"nvfp4-pack-quantized": (16, torch.float8_e4m3fn), "mxfp4-pack-quantized": (32, torch.float8_e8m0fnu)}


class CompressedTensors(Format):
    """What the layouts share: one reader for all, since a model may mix them."""

    method: ClassVar[str] = "compressed-tensors"
    marks: ClassVar[tuple[str, ...]] = (".weight_packed", ".weight_scale")
    parts: ClassVar[tuple[str, ...]] = tuple(
        f".{part}"
        for part in (
            *("weight_packed", "weight", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx"),
            *("weight_global_scale", "input_scale", "input_zero_point", "input_global_scale"),
            *("output_scale", "output_zero_point"),
        )
    )

    def scale_dtype(self, dtype: torch.dtype) -> torch.dtype | None:
        return dtype

    def check(self, config: Mapping[str, Any]) -> None:
        check_config(config)

    def config(self, layers: Mapping[str, Packed], ignored: Sequence[str]) -> dict[str, Any]:
        return make_groups(self.name, {name: self.scheme(p) for name, p in layers.items()}, ignored)

    def scheme(self, packed: Packed) -> Scheme:
        """Its weights and inputs as ``config_groups`` say them."""
        inputs = None
        if isinstance(packed, Activations):
            kind, size = "float" if packed.kind == "e4m3" else "int", packed.group_size
            static = packed.input_scale is not None
            strategy = "tensor" if static else "group" if size else "token"
            inputs = {"num_bits": 8, "type": kind, "symmetric": True, "strategy": strategy, "dynamic": not static}
            inputs |= {"group_size": size} if size and not static else {}
            packed = packed.inner
        weights: dict[str, Any] = {"dynamic": False}
        if isinstance(packed, Affine):
            weights |= {"num_bits": packed.bits, "type": "int", "symmetric": is_symmetric(packed)}
            columns: tuple[int, int] = (1, packed.group_size)
        else:
            assert isinstance(packed, Minifloat)
            weights |= {"num_bits": packed.bits, "type": "float", "symmetric": True}
            columns = packed.block
        out, width = packed.shape
        if packed.bits == 4 and isinstance(packed, Minifloat):
            dtype = "torch.float8_e4m3fn" if packed.global_scale is not None else "torch.uint8"
            weights |= {"strategy": "tensor_group" if packed.global_scale is not None else "group"}
            weights |= {"group_size": columns[1], "scale_dtype": dtype, "zp_dtype": dtype}
        elif columns[0] == 1:
            group = columns[1] < width
            weights |= {"strategy": "group", "group_size": columns[1]} if group else {"strategy": "channel"}
        elif columns == (out, width) and columns != (128, 128):
            weights["strategy"] = "tensor"
        else:
            weights |= {"strategy": "block", "block_structure": list(columns)}
        return Scheme(weights, inputs)

    def layers(self, names: Iterable[str], config: Mapping[str, Any]) -> dict[str, list[str]]:
        made = super().layers(names, config)  # a scale alone belongs to a cache of keys, or to an observer
        return {p: found for p, found in made.items() if {f"{p}.weight", f"{p}.weight_packed"} & set(found)}

    def shape(self, name: str, shapes: Shapes, get: Get, config: Mapping[str, Any]) -> tuple[int, ...]:
        return plain_shape(name, shapes, get, config)

    def read(self, name: str, get: Get, config: Mapping[str, Any]) -> Packed:
        return read_layer(name, get, config)


class PackQuantized(CompressedTensors):
    """Whole numbers of 2 to 8 bits, packed."""

    name: ClassVar[str] = "pack-quantized"

    def refuses(self, packed: Packed) -> str:
        inner = within(packed, Activations)
        if not isinstance(inner, Affine):
            return f"it holds grids of whole numbers, not {inner.form}. Take {_other(inner)}."
        if not 2 <= inner.bits <= 8:
            return f"it holds 2 to 8 bits, not {inner.bits}. Take the format weft."
        return not_whole(inner)

    def _write(self, packed: Packed, dtype: torch.dtype) -> dict[str, Tensor]:
        inner = within(packed, Activations)
        assert isinstance(inner, Affine)
        codes, zero = unsigned(inner)
        made = {"weight_packed": pack_bits(codes, inner.bits), "weight_scale": inner.scale}
        made["weight_shape"] = torch.tensor(inner.shape)
        if not is_symmetric(inner):
            made["weight_zero_point"] = pack_bits(zero.T, inner.bits).T
        return made | _input_scale(packed)


class IntQuantized(CompressedTensors):
    """Whole numbers of up to 8 bits in a byte each, for layers whose inputs have 8 bits too."""

    name: ClassVar[str] = "int-quantized"

    def refuses(self, packed: Packed) -> str:
        if not isinstance(packed, Activations) or packed.kind != "int8":
            return "it is for layers whose inputs have 8 bits too. Take pack-quantized."
        inner = packed.inner
        if not isinstance(inner, Affine) or not 2 <= inner.bits <= 8:
            return "it holds grids of 2 to 8 bits. Take weft."
        return not_whole(inner)

    def _write(self, packed: Packed, dtype: torch.dtype) -> dict[str, Tensor]:
        assert isinstance(packed, Activations)
        assert isinstance(packed.inner, Affine)
        codes, zero = unsigned(packed.inner)
        middle = 1 << (packed.inner.bits - 1)
        made = {"weight": (codes - middle).to(torch.int8), "weight_scale": packed.inner.scale}
        if not is_symmetric(packed.inner):
            made["weight_zero_point"] = (zero - middle).to(torch.int8)
        return made | _input_scale(packed)


class FloatQuantized(CompressedTensors):
    """Floats of 8 bits (e4m3)."""

    name: ClassVar[str] = "float-quantized"

    def refuses(self, packed: Packed) -> str:
        inner = within(packed, Activations)
        if not isinstance(inner, Minifloat) or inner.kind != "e4m3" or inner.global_scale is not None:
            return f"it holds floats of the kind e4m3, not {inner.form}. Take {_other(inner)}."
        if isinstance(packed, Activations) and packed.kind != "e4m3":
            return "its inputs are e4m3 too. Take weft."
        return ""

    def _write(self, packed: Packed, dtype: torch.dtype) -> dict[str, Tensor]:
        inner = within(packed, Activations)
        assert isinstance(inner, Minifloat)
        strategy = self.scheme(inner).weights["strategy"]
        scale = inner.scale.reshape(1) if strategy == "tensor" else inner.scale
        made = {"weight": inner.codes.contiguous().view(torch.float8_e4m3fn), "weight_scale": scale}
        return made | _input_scale(packed)


class Float4(CompressedTensors):
    """Floats of 4 bits (e2m1) in blocks of a row."""

    def refuses(self, packed: Packed) -> str:
        size, _ = FLOATS[self.name]
        if not isinstance(packed, Minifloat) or packed.kind != "e2m1" or packed.block != (1, size):
            return f"it holds floats e2m1 in groups of {size} columns, not {packed.form}. Take {_other(packed)}."
        if (packed.global_scale is None) is (size == 16):
            return "scales of NVFP4 have a global scale, those of MXFP4 have none."
        if packed.shape[1] % size:
            return f"a row is whole groups of {size}, not {packed.shape[1]} columns. Take weft."
        return ""

    def fit(self, packed: Packed, dtype: torch.dtype) -> Packed:
        if not isinstance(packed, Minifloat):
            return packed
        common = packed.global_scale
        if common is not None:  # files have what scales are divided by
            common = 1 / (1 / common.double()).float().double()
        return replace(packed, scale=packed.scale.to(FLOATS[self.name][1]), global_scale=common)

    def _write(self, packed: Packed, dtype: torch.dtype) -> dict[str, Tensor]:
        assert isinstance(packed, Minifloat)
        made = {"weight_packed": pack_low_first(packed.codes), "weight_scale": packed.scale}
        if packed.global_scale is None:
            return {**made, "weight_scale": packed.scale.view(torch.uint8)}
        return {**made, "weight_global_scale": (1 / packed.global_scale.double()).float().reshape(1)}


class NVFP4(Float4):
    """Floats of 4 bits, a scale in e4m3 for 16, one for the whole."""

    name: ClassVar[str] = "nvfp4-pack-quantized"


class MXFP4(Float4):
    """Floats of 4 bits, a power of two for 32."""

    name: ClassVar[str] = "mxfp4-pack-quantized"


def _other(packed: Packed) -> str:
    if isinstance(packed, Affine):
        return "pack-quantized"
    known = {"e4m3": "float-quantized", "e2m1": "nvfp4-pack-quantized or mxfp4-pack-quantized"}
    return known.get(packed.kind, "weft") if isinstance(packed, Minifloat) else "weft"


def _input_scale(packed: Packed) -> dict[str, Tensor]:
    scale = packed.input_scale if isinstance(packed, Activations) else None
    return {} if scale is None else {"input_scale": scale.reshape(1)}
