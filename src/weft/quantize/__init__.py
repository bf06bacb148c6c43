"""Store weights in few bits.

Start at :mod:`weft.quantize.rtn`, the baseline of all: each weight goes to the nearest value of a grid. The grids (bits,
groups, scales, zero points) are in :mod:`weft.quantize.grid`. :mod:`weft.quantize.gptq` is the method to take where there is
calibration data, :mod:`weft.quantize.hqq` and :mod:`weft.quantize.nf4` need none. Functions called ``quantize_…`` write a
model whose weights are quantised values, in the model's own type.
"""

from weft.quantize.gptq import GPTQ, gptq_codes, gptq_factor, quantize_gptq
from weft.quantize.grid import Codes, Grid, dequantize, fake_quantize, fit_grid, quantize
from weft.quantize.hqq import HQQ, hqq_codes, quantize_hqq
from weft.quantize.nf4 import Codebook, codebook_codes, codebook_weight, quantize_codebook
from weft.quantize.rtn import RTN, quantize_rtn, round_to_nearest

__all__ = [
    "GPTQ",
    "HQQ",
    "RTN",
    "Codebook",
    "Codes",
    "Grid",
    "codebook_codes",
    "codebook_weight",
    "dequantize",
    "fake_quantize",
    "fit_grid",
    "gptq_codes",
    "gptq_factor",
    "hqq_codes",
    "quantize",
    "quantize_codebook",
    "quantize_gptq",
    "quantize_hqq",
    "quantize_rtn",
    "round_to_nearest",
]
