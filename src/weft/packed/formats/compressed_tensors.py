"""compressed-tensors: the format of llm-compressor, which vLLM, SGLang and transformers load.

Six layouts of a layer P with W (out, in):

======================  ====================================================================================
pack-quantized          weight_packed int32 (out, ⌈in · bits / 32⌉), weight_scale (out, groups), weight_shape (2,);
                        asymmetric: weight_zero_point int32 (⌈out · bits / 32⌉, groups), packed along the outputs
int-quantized           weight int8 (out, in), weight_scale (out, groups); inputs are quantised too
float-quantized         weight float8_e4m3 (out, in), weight_scale (1,), (out, groups) or one of each block
nvfp4-pack-quantized    weight_packed uint8 (out, in / 2), the earlier code low; weight_scale float8_e4m3
                        (out, in / 16); weight_global_scale (1,), which scales are divided by
mxfp4-pack-quantized    weight_packed so, weight_scale uint8 (out, in / 32), a power of two each: 2ˢ⁻¹²⁷
mxfp8-quantized         weight float8_e4m3 (out, in), weight_scale so
======================  ====================================================================================

Inputs that have one scale say it in ``input_scale`` (1,), those of NVFP4 in ``input_global_scale`` (1,), which scales are divided
by. Codes of whole numbers are stored from 0: a signed code plus 2ᵇⁱᵗˢ⁻¹. Which layers have which numbers stands in
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
from weft.packed.formats.groups import EMBEDDINGS, Scheme, check_config, make_groups
from weft.packed.formats.nibbles import pack_low_first
from weft.packed.forms import Affine, Minifloat
from weft.packed.levels import MICROSCALED

WHOLE_WITH = ("int8", "int4", "e4m3")  # inputs of layers of whole numbers
FLOATS = {  # numbers, columns that share a scale, its type, inputs
    "nvfp4-pack-quantized": ("e2m1", 16, torch.float8_e4m3fn, "nvfp4"),
    "mxfp4-pack-quantized": ("e2m1", 32, torch.float8_e8m0fnu, "mxfp4"),
    "mxfp8-quantized": ("e4m3", 32, torch.float8_e8m0fnu, "mxfp8"),
}


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

    def fit(self, packed: Packed, dtype: torch.dtype) -> Packed:
        if isinstance(packed, Activations):
            return replace(packed, inner=self.fit(packed.inner, dtype), input_scale=_fitted_inputs(packed, dtype))
        return super().fit(packed, dtype)

    def check(self, config: Mapping[str, Any]) -> None:
        check_config(config)

    def config(self, layers: Mapping[str, Packed], ignored: Sequence[str]) -> dict[str, Any]:
        return make_groups(self.name, self.schemes(layers), ignored)

    def schemes(self, layers: Mapping[str, Packed]) -> dict[str, Scheme]:
        """Weights and inputs of each layer. Rows that are one group are so called where groups of others are as wide."""
        made = {name: self.scheme(p) for name, p in layers.items()}
        sizes = {s.weights["group_size"] for s in made.values() if s.weights["strategy"] == "group"}
        for name, found in made.items():
            width = layers[name].shape[1]
            if found.weights["strategy"] == "channel" and width in sizes:
                made[name] = found._replace(weights={**found.weights, "strategy": "group", "group_size": width})
        return made

    def scheme(self, packed: Packed) -> Scheme:
        """Its weights and inputs as ``config_groups`` say them."""
        inputs = None
        if isinstance(packed, Activations):
            inputs, packed = _inputs(packed), packed.inner
        weights: dict[str, Any] = {"dynamic": False}
        if isinstance(packed, Affine):
            weights |= {"num_bits": packed.bits, "type": "int", "symmetric": is_symmetric(packed)}
            columns: tuple[int, int] = (1, packed.group_size)
        else:
            assert isinstance(packed, Minifloat)
            weights |= {"num_bits": packed.bits, "type": "float", "symmetric": True}
            columns = packed.block
        out, width = packed.shape
        if isinstance(packed, Minifloat) and (packed.bits == 4 or packed.scale.dtype == torch.float8_e8m0fnu):
            nested = packed.global_scale is not None
            weights |= {"strategy": "tensor_group" if nested else "group"} | _small_scales(columns[1], nested)
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
    """Whole numbers of 2 to 8 bits, packed; embeddings of 8 bits as bytes, since transformers loads no packed ones."""

    name: ClassVar[str] = "pack-quantized"

    def config(self, layers: Mapping[str, Packed], ignored: Sequence[str]) -> dict[str, Any]:
        others = {name: IntQuantized.name for name, p in layers.items() if in_bytes(name, p)}
        return make_groups(self.name, self.schemes(layers), ignored, others)

    def write(self, name: str, packed: Packed, dtype: torch.dtype) -> dict[str, Tensor]:
        made = super().write(name, packed, dtype)
        if not in_bytes(name, packed):
            return made
        assert isinstance(packed, Affine)
        codes = (unsigned(packed)[0] - 128).to(torch.int8)
        return {f"{name}.weight": codes, f"{name}.weight_scale": made[f"{name}.weight_scale"]}

    def refuses(self, packed: Packed) -> str:
        inner = within(packed, Activations)
        if not isinstance(inner, Affine):
            return f"it holds grids of whole numbers, not {inner.form}. Take {_other(inner)}."
        if not 2 <= inner.bits <= 8:
            return f"it holds 2 to 8 bits, not {inner.bits}. Take the format weft."
        if isinstance(packed, Activations) and packed.kind not in WHOLE_WITH:
            return f"inputs of whole numbers are {', '.join(WHOLE_WITH)}, not {packed.kind}. Take the format weft."
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
    """Whole numbers of up to 8 bits in a byte each, for layers whose inputs are quantised too."""

    name: ClassVar[str] = "int-quantized"

    def refuses(self, packed: Packed) -> str:
        if not isinstance(packed, Activations) or packed.kind not in WHOLE_WITH:
            return "it is for layers whose inputs are quantised too. Take pack-quantized."
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
        if isinstance(inner, Minifloat) and inner.scale.dtype == torch.float8_e8m0fnu:
            return "its scales have the model's type, not powers of two in 8 bits. Take mxfp8-quantized."
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


class SmallScales(CompressedTensors):
    """Tiny floats in groups of a row, whose scales have 8 bits."""

    def refuses(self, packed: Packed) -> str:
        element, size, _, inputs = FLOATS[self.name]
        inner = within(packed, Activations)
        if not isinstance(inner, Minifloat) or inner.kind != element or inner.block != (1, size):
            return f"it holds floats {element} in groups of {size} columns, not {inner.form}. Take {_other(inner)}."
        if (inner.global_scale is None) is (inputs == "nvfp4"):
            return "scales of NVFP4 have a global scale, those of MXFP4 and MXFP8 have none."
        if isinstance(packed, Activations) and packed.kind != inputs:
            return f"its inputs are {inputs}, not {packed.kind}. Take weft."
        if inner.shape[1] % size:
            return f"a row is whole groups of {size}, not {inner.shape[1]} columns. Take weft."
        return ""

    def scale_dtype(self, dtype: torch.dtype) -> torch.dtype | None:
        return None  # scales have a type of their own, whatever the model's

    def fit(self, packed: Packed, dtype: torch.dtype) -> Packed:
        if not isinstance(packed, Minifloat):
            return super().fit(packed, dtype)
        common = packed.global_scale
        return replace(
            packed,
            scale=packed.scale.to(FLOATS[self.name][2]),
            global_scale=None if common is None else _inverse(common),
        )

    def _write(self, packed: Packed, dtype: torch.dtype) -> dict[str, Tensor]:
        inner = within(packed, Activations)
        assert isinstance(inner, Minifloat)
        if inner.bits == 8:
            made = {"weight": inner.codes.contiguous().view(torch.float8_e4m3fn)}
        else:
            made = {"weight_packed": pack_low_first(inner.codes)}
        made["weight_scale"] = inner.scale if inner.global_scale is not None else inner.scale.view(torch.uint8)
        if inner.global_scale is not None:
            made["weight_global_scale"] = _divisor(inner.global_scale)
        return made | _input_scale(packed)


class NVFP4(SmallScales):
    """Floats of 4 bits, a scale in e4m3 for 16, one for the whole."""

    name: ClassVar[str] = "nvfp4-pack-quantized"


class MXFP4(SmallScales):
    """Floats of 4 bits, a power of two for 32."""

    name: ClassVar[str] = "mxfp4-pack-quantized"


class MXFP8(SmallScales):
    """Floats of 8 bits (e4m3), a power of two for 32."""

    name: ClassVar[str] = "mxfp8-quantized"


def in_bytes(name: str, packed: Packed) -> bool:
    """Whether a layer is an embedding that files hold as bytes.

    >>> grid = Affine(torch.ones(4, 2, dtype=torch.int16), torch.ones(4, 1), torch.zeros(4, 1), 8, -128)
    >>> in_bytes("model.embed_tokens", grid), in_bytes("lm_head", grid)
    (True, False)
    """
    table = name.rpartition(".")[2] in EMBEDDINGS
    return table and isinstance(packed, Affine) and packed.bits == 8 and is_symmetric(packed)


def _other(packed: Packed) -> str:
    if isinstance(packed, Affine):
        return "pack-quantized"
    known = {"e4m3": "float-quantized", "e2m1": "nvfp4-pack-quantized or mxfp4-pack-quantized"}
    return known.get(packed.kind, "weft") if isinstance(packed, Minifloat) else "weft"


def _inputs(packed: Activations) -> dict[str, Any]:
    """A layer's inputs as ``config_groups`` say them."""
    if packed.kind in MICROSCALED:
        element, size = MICROSCALED[packed.kind]
        nested = packed.kind == "nvfp4"
        bits, strategy, dynamic = (
            4 if element == "e2m1" else 8,
            "tensor_group" if nested else "group",
            "local" if nested else True,
        )
        said = {"num_bits": bits, "type": "float", "symmetric": True, "strategy": strategy, "dynamic": dynamic}
        return said | _small_scales(size, nested)
    bits, kind = 4 if packed.kind == "int4" else 8, "float" if packed.kind == "e4m3" else "int"
    static = packed.input_scale is not None
    strategy = "tensor" if static else "group" if packed.group_size else "token"
    said = {"num_bits": bits, "type": kind, "symmetric": True, "strategy": strategy, "dynamic": not static}
    return said | ({"group_size": packed.group_size} if packed.group_size and not static else {})


def _small_scales(size: int, nested: bool) -> dict[str, Any]:
    """Groups with scales of 8 bits: e4m3 under a global scale, or powers of two."""
    dtype = "torch.float8_e4m3fn" if nested else "torch.uint8"
    return {"group_size": size, "scale_dtype": dtype, "zp_dtype": dtype}


def _divisor(scale: Tensor) -> Tensor:
    """What files have in the place of a global scale: (1,) float32, which scales are divided by."""
    return (1 / scale.double()).float().reshape(1)


def _inverse(scale: Tensor) -> Tensor:
    """A global scale as files will have it: 0-d float64."""
    return (1 / _divisor(scale).double()).reshape(())


def _fitted_inputs(packed: Activations, dtype: torch.dtype) -> Tensor | None:
    """The scale of inputs as files have it."""
    if packed.input_scale is None:
        return None
    return _inverse(packed.input_scale) if packed.kind == "nvfp4" else packed.input_scale.to(dtype)


def _input_scale(packed: Packed) -> dict[str, Tensor]:
    if not isinstance(packed, Activations) or packed.input_scale is None:
        return {}
    if packed.kind == "nvfp4":
        return {"input_global_scale": _divisor(packed.input_scale)}
    return {"input_scale": packed.input_scale.reshape(1)}
