"""Schemes by the names that users of vLLM and llm-compressor know: a method, its parameters, inputs, and a format of files.

===============  ================================================  ======================  =====================
name             weights                                           inputs                  files
===============  ================================================  ======================  =====================
W2A16 … W8A16    2 to 8 bits, symmetric, groups of 128             as they are             pack-quantized
W4A16_ASYM       4 bits, asymmetric, groups of 128                 as they are             pack-quantized
W2A8 … W7A8      2 to 7 bits, symmetric, groups of 128             8 bits, each token      int-quantized
W2A4 … W4A4      2 to 4 bits, symmetric, groups of 128             4 bits, each token      int-quantized
W8A8, INT8       8 bits, symmetric, a scale a row                  8 bits, each token      int-quantized
W4AFP8           4 bits, symmetric, groups of 128                  e4m3, each token        pack-quantized
FP8              floats e4m3, one scale                            e4m3, one scale: data   float-quantized
FP8_DYNAMIC      floats e4m3, a scale a row                        e4m3, each token        float-quantized
FP8_BLOCK        floats e4m3, a scale for 128 × 128                e4m3, groups of 128     float-quantized
NVFP4A16         floats e2m1, groups of 16 with scales e4m3        as they are             nvfp4-pack-quantized
NVFP4            the same                                          the same: data          nvfp4-pack-quantized
MXFP4A16         floats e2m1, groups of 32, powers of two          as they are             mxfp4-pack-quantized
MXFP4            the same                                          the same                mxfp4-pack-quantized
MXFP8A16         floats e4m3, groups of 32, powers of two          as they are             mxfp8-quantized
MXFP8            the same                                          the same                mxfp8-quantized
NF4              16 quantiles of the normal law, blocks of 64      as they are             bitsandbytes
Q4_0             4 bits, symmetric, groups of 32, scales in half   as they are             weft (then GGUF)
Q8_0             8 bits, symmetric, groups of 32, scales in half   as they are             weft (then GGUF)
===============  ================================================  ======================  =====================

Schemes of whole numbers may be combined with any method on such grids: ``--scheme W4A16 --method gptq``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from weft.calibrate import Change
from weft.errors import RecipeError, did_you_mean
from weft.quantize.float_blocks import FloatBlocks
from weft.quantize.floating_point import FloatingPoint
from weft.quantize.inputs import QuantizedInputs
from weft.quantize.microscaling import Microscaling
from weft.quantize.nf4 import Codebook
from weft.quantize.nvfp4 import NVFP4
from weft.quantize.rtn import RTN
from weft.quantize.w8a8 import W8A8


@dataclass(frozen=True)
class Scheme:
    """A named scheme.

    Attributes:
        name: its name.
        method: a registry id, where the user names none.
        change: that method's configuration.
        parameters: of the method, which a user's own override.
        file_format: of the files.
        grid: whether other methods with bits, groups and kind may take its place.
        inputs: what inputs are rounded to (:class:`QuantizedInputs`); empty: they stay.
        static: whether they have one scale, from data.
        input_groups: columns of a token that share a scale.
    """

    name: str
    method: str
    change: type[Any]
    parameters: dict[str, Any] = field(default_factory=dict)
    file_format: str = "auto"
    grid: bool = False
    inputs: str = ""
    static: bool = False
    input_groups: int = 0

    def config(self, **values: Any) -> Change:
        """The configuration of the scheme.

        Args:
            values: parameters of the method, in the place of the scheme's.

        >>> find_scheme("W4A8").config(group_size=32)
        QuantizedInputs(weights=RTN(bits=4, group_size=32, kind='symmetric', scale_dtype='float32', ranges='full'), kind='int8', static=False, group_size=0)
        """
        made: Change = self.change(**{**self.parameters, **values})
        return self.around(made)

    def around(self, weights: Change) -> Change:
        """Any method for the weights, with the scheme's inputs."""
        return QuantizedInputs(weights, self.inputs, self.static, self.input_groups) if self.inputs else weights


def _grid(name: str, bits: int, group: int, kind: str, file_format: str = "pack-quantized", **more: Any) -> Scheme:
    facts = {k: more.pop(k) for k in ("inputs",) if k in more}
    return Scheme(
        name, "rtn", RTN, {"bits": bits, "group_size": group, "kind": kind, **more}, file_format, grid=True, **facts
    )


def _all() -> list[Scheme]:
    ints = [(bits, inputs) for inputs, most in ((4, 4), (8, 7)) for bits in range(2, most + 1)]
    whole = {"bits": 8, "group_size": 0, "kind": "narrow"}
    blocks, tensor = {"rows": 128, "group_size": 128}, {"rows": 0, "group_size": 0}
    return [
        *(_grid(f"W{bits}A16", bits, 128, "symmetric") for bits in range(2, 9)),
        _grid("W4A16_ASYM", 4, 128, "asymmetric"),
        *(_grid(f"W{b}A{i}", b, 128, "symmetric", "int-quantized", inputs=f"int{i}") for b, i in ints),
        *(Scheme(n, "w8a8", W8A8, whole, "int-quantized", grid=True, inputs="int8") for n in ("W8A8", "INT8")),
        _grid("W4AFP8", 4, 128, "symmetric", inputs="e4m3"),
        Scheme("FP8", "fp8_block", FloatBlocks, tensor, "float-quantized", inputs="e4m3", static=True),
        Scheme("FP8_DYNAMIC", "fp8", FloatingPoint, {}, "float-quantized", inputs="e4m3"),
        Scheme("FP8_BLOCK", "fp8_block", FloatBlocks, blocks, "float-quantized", inputs="e4m3", input_groups=128),
        Scheme("NVFP4A16", "nvfp4", NVFP4, {}, "nvfp4-pack-quantized"),
        Scheme("NVFP4", "nvfp4", NVFP4, {}, "nvfp4-pack-quantized", inputs="nvfp4", static=True),
        Scheme("MXFP4A16", "mx", Microscaling, {"kind": "mxfp4"}, "mxfp4-pack-quantized"),
        Scheme("MXFP4", "mx", Microscaling, {"kind": "mxfp4"}, "mxfp4-pack-quantized", inputs="mxfp4"),
        Scheme("MXFP8A16", "mx", Microscaling, {"kind": "mxfp8"}, "mxfp8-quantized"),
        Scheme("MXFP8", "mx", Microscaling, {"kind": "mxfp8"}, "mxfp8-quantized", inputs="mxfp8"),
        Scheme("NF4", "nf4", Codebook, {}, "bitsandbytes"),
        _grid("Q4_0", 4, 32, "symmetric", "weft", scale_dtype="float16"),
        _grid("Q8_0", 8, 32, "symmetric", "weft", scale_dtype="float16"),
    ]


SCHEMES = {scheme.name: scheme for scheme in _all()}


def find_scheme(name: str) -> Scheme:
    """A scheme by its name, in any case.

    Raises:
        RecipeError: there is none of that name.

    >>> find_scheme("w8a16").parameters["bits"]
    8
    """
    if name.upper() == "UNQUANTIZED":
        raise RecipeError("The scheme UNQUANTIZED changes nothing: take the model as it is.")
    found = SCHEMES.get(name.upper())
    if found is None:
        raise RecipeError(f"There is no scheme {name!r}.{did_you_mean(name.upper(), SCHEMES)}")
    return found
