"""Store weights in few bits.

Start at :mod:`weft.quantize.rtn`, the baseline of all: each weight goes to the nearest value of a grid. The grids (bits,
groups, scales, zero points) are in :mod:`weft.quantize.grid`. :mod:`weft.quantize.gptq` is the method to take where there is
calibration data, :mod:`weft.quantize.hqq` and :mod:`weft.quantize.nf4` need none. :func:`quantize_model` writes a quantised
copy of a model.
"""

from weft.quantize.gptq import GPTQ, gptq_codes, gptq_factor
from weft.quantize.grid import Grid, fake_quantize, fit_grid, quantize
from weft.quantize.hqq import HQQ, hqq_codes
from weft.quantize.jlcm import JLCM, jlcm_footprint
from weft.quantize.nf4 import Codebook, codebook_codes
from weft.quantize.rtn import RTN, round_to_nearest
from weft.quantize.run import quantize_model
from weft.quantize.shiftadd import ShiftAdd, binary_coding, lookup_product, shiftadd_codes, shiftadd_sensitivity
from weft.quantize.vptq import VPTQ, VectorQuantization, vptq_codes
from weft.quantize.vq4dit import VQ4DiT

__all__ = [
    "GPTQ",
    "HQQ",
    "JLCM",
    "RTN",
    "VPTQ",
    "Codebook",
    "Grid",
    "ShiftAdd",
    "VQ4DiT",
    "VectorQuantization",
    "binary_coding",
    "codebook_codes",
    "fake_quantize",
    "fit_grid",
    "gptq_codes",
    "gptq_factor",
    "hqq_codes",
    "jlcm_footprint",
    "lookup_product",
    "quantize",
    "quantize_model",
    "round_to_nearest",
    "shiftadd_codes",
    "shiftadd_sensitivity",
    "vptq_codes",
]
