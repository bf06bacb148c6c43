"""Schemes by the names that users of vLLM and llm-compressor know: a method, its parameters, and a format of files.

=============  ================================================  ==================  =====================
name           weights                                           inputs              files
=============  ================================================  ==================  =====================
W4A16          4 bits, symmetric, groups of 128                  as they are         pack-quantized
W4A16_ASYM     4 bits, asymmetric, groups of 128                 as they are         pack-quantized
W8A16          8 bits, symmetric, a scale a row                  as they are         pack-quantized
W8A8           8 bits, symmetric, a scale a row                  8 bits, each token  int-quantized
FP8_DYNAMIC    floats e4m3, a scale a row                        e4m3, each token    float-quantized
NF4            16 quantiles of the normal law, blocks of 64      as they are         bitsandbytes
Q4_0           4 bits, symmetric, groups of 32, scales in half   as they are         weft (then GGUF)
Q8_0           8 bits, symmetric, groups of 32, scales in half   as they are         weft (then GGUF)
=============  ================================================  ==================  =====================

Schemes of whole numbers may be combined with any method on such grids: ``--scheme W4A16 --method gptq``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from weft.errors import RecipeError, did_you_mean


@dataclass(frozen=True)
class Scheme:
    """A named scheme.

    Attributes:
        method: a registry id, where the user names none.
        parameters: of the method, which a user's own override.
        file_format: of the files.
        grid: whether other methods with bits, groups and kind may take its place.
    """

    method: str
    parameters: dict[str, Any] = field(default_factory=dict)
    file_format: str = "auto"
    grid: bool = False


def _grid(bits: int, group: int, kind: str, file_format: str = "pack-quantized", **more: Any) -> Scheme:
    return Scheme("rtn", {"bits": bits, "group_size": group, "kind": kind, **more}, file_format, grid=True)


SCHEMES = {
    "W4A16": _grid(4, 128, "symmetric"),
    "W4A16_ASYM": _grid(4, 128, "asymmetric"),
    "W8A16": _grid(8, 0, "symmetric"),
    "W8A8": Scheme("w8a8", {}, "int-quantized"),
    "FP8_DYNAMIC": Scheme("fp8", {}, "float-quantized"),
    "NF4": Scheme("nf4", {}, "bitsandbytes"),
    "Q4_0": _grid(4, 32, "symmetric", "weft", scale_dtype="float16"),
    "Q8_0": _grid(8, 32, "symmetric", "weft", scale_dtype="float16"),
}


def find_scheme(name: str) -> Scheme:
    """A scheme by its name, in any case.

    Raises:
        RecipeError: there is none of that name.

    >>> find_scheme("w8a16").parameters["bits"]
    8
    """
    found = SCHEMES.get(name.upper())
    if found is None:
        raise RecipeError(f"There is no scheme {name!r}.{did_you_mean(name.upper(), SCHEMES)}")
    return found
