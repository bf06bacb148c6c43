"""How files hold packed weights: one module a format, all with the same few functions, both ways.

Start at :mod:`weft.packed.formats.format`, what a format is. :func:`find_format` gives one by its name, :func:`read_with` the
one that reads a model's files.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from weft.errors import CheckpointError, RecipeError, did_you_mean
from weft.packed.formats.awq import AWQ
from weft.packed.formats.bitsandbytes import BitsAndBytes
from weft.packed.formats.compressed_tensors import (
    MXFP4,
    MXFP8,
    NVFP4,
    FloatQuantized,
    IntQuantized,
    PackQuantized,
)
from weft.packed.formats.experts import Experts
from weft.packed.formats.format import Format
from weft.packed.formats.fp8 import FP8
from weft.packed.formats.gptq import GPTQ, GPTQ2
from weft.packed.formats.own import Own

FORMATS: dict[str, Format] = {
    made.name: made
    for made in (
        *(PackQuantized(), IntQuantized(), FloatQuantized(), NVFP4(), MXFP4(), MXFP8()),
        *(FP8(), GPTQ(), GPTQ2(), AWQ(), BitsAndBytes(), Experts(), Own()),
    )
}

__all__ = ["FORMATS", "Format", "find_format", "read_with"]


def find_format(name: str) -> Format:
    """A format by its name.

    Raises:
        RecipeError: there is none of that name.

    >>> find_format("gptq").name
    'gptq'
    >>> find_format("pack-quantised")
    Traceback (most recent call last):
    weft.errors.RecipeError: There is no format 'pack-quantised'. Did you mean pack-quantized ...?
    """
    if name not in FORMATS:
        raise RecipeError(f"There is no format {name!r}.{did_you_mean(name, FORMATS)}")
    return FORMATS[name]


def read_with(config: Mapping[str, Any]) -> Format:
    """The format that reads the files of a model with this ``quantization_config``.

    Raises:
        CheckpointError: none does, or the configuration asks for what weft does not read.

    >>> read_with({"quant_method": "awq"}).name
    'awq'
    """
    found = next((f for f in FORMATS.values() if f.detects(config)), None)
    if found is None:
        method = str(config.get("quant_method", ""))
        version = (
            f" with the checkpoint_format {config['checkpoint_format']!r}" if config.get("checkpoint_format") else ""
        )
        known = sorted({f.method for f in FORMATS.values()})
        raise CheckpointError(
            f"The model is quantised with the quant_method {method!r}{version}, which weft does not read.{did_you_mean(method, known)} "
            f"It reads {', '.join(known)}. Take the model that was quantised, or dequantise it with the program that made it."
        )
    found.check(config)
    return found
