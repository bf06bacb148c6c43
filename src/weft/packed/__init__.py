"""Weights in few bits: the forms that they take, how files hold them, and layers that multiply by them.

Start at :mod:`weft.packed.form`, what a packed weight is; :mod:`weft.packed.forms` has the forms, :mod:`weft.packed.around`
what is put around them, :mod:`weft.packed.formats` the layouts of files, and :mod:`weft.packed.linear` the layers.
"""

from weft.packed.around import Activations, LowRank, Permuted, Transposed
from weft.packed.bits import pack_bits, unpack_bits
from weft.packed.experts import QuantizedExperts
from weft.packed.form import Packed, unpack
from weft.packed.forms import Affine, Binary, Lookup, Minifloat, Vectors
from weft.packed.levels import quantize_inputs
from weft.packed.linear import QuantizedEmbedding, QuantizedLinear, using_backend
from weft.packed.replace import replace_

__all__ = [
    "Activations",
    "Affine",
    "Binary",
    "Lookup",
    "LowRank",
    "Minifloat",
    "Packed",
    "Permuted",
    "QuantizedEmbedding",
    "QuantizedExperts",
    "QuantizedLinear",
    "Transposed",
    "Vectors",
    "pack_bits",
    "quantize_inputs",
    "replace_",
    "unpack",
    "unpack_bits",
    "using_backend",
]
