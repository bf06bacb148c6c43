"""Weights in few bits: the forms that they take, how files hold them, and layers that multiply by them.

Start at :mod:`weft.packed.form`, what a packed weight is; :mod:`weft.packed.forms` has the forms, and
:mod:`weft.packed.formats` the layouts of files.
"""

from weft.packed.bits import pack_bits, unpack_bits
from weft.packed.form import Packed, unpack
from weft.packed.forms import (
    Activations,
    Affine,
    Binary,
    Lookup,
    LowRank,
    Minifloat,
    Permuted,
    Transposed,
    Vectors,
    quantize_inputs,
)

__all__ = [
    "Activations",
    "Affine",
    "Binary",
    "Lookup",
    "LowRank",
    "Minifloat",
    "Packed",
    "Permuted",
    "Transposed",
    "Vectors",
    "pack_bits",
    "quantize_inputs",
    "unpack",
    "unpack_bits",
]
