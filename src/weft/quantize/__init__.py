"""Store weights in few bits.

Start at :mod:`weft.quantize.rtn`, the baseline of all: each weight goes to the nearest value of a grid. The grids (bits,
groups, scales, zero points) are in :mod:`weft.quantize.grid`. :mod:`weft.quantize.gptq` is the method to take where there is
calibration data, :mod:`weft.quantize.hqq` and :mod:`weft.quantize.nf4` need none. :mod:`weft.quantize.awq` and
:mod:`weft.quantize.smoothquant` scale channels first, with the inverse folded into the layer before
(:mod:`weft.quantize.folding`). :func:`quantize_model` writes a quantised copy of a model.
"""

from weft.quantize.adadim import AdaDim, adadim_codes, gptq_by_outputs
from weft.quantize.awq import AWQ, awq_scales, weight_share
from weft.quantize.clip import output_clip
from weft.quantize.folding import Fold, find_folds
from weft.quantize.gptq import GPTQ, gptq_codes, gptq_factor
from weft.quantize.grid import Grid, fake_quantize, fit_grid, quantize
from weft.quantize.hqq import HQQ, hqq_codes
from weft.quantize.nf4 import Codebook, codebook_codes
from weft.quantize.rtn import RTN, round_to_nearest
from weft.quantize.run import quantize_model
from weft.quantize.smoothquant import SmoothQuant, smooth_scales
from weft.quantize.w8a8 import W8A8

__all__ = [
    "AWQ",
    "GPTQ",
    "HQQ",
    "RTN",
    "W8A8",
    "AdaDim",
    "Codebook",
    "Fold",
    "Grid",
    "SmoothQuant",
    "adadim_codes",
    "awq_scales",
    "codebook_codes",
    "fake_quantize",
    "find_folds",
    "fit_grid",
    "gptq_by_outputs",
    "gptq_codes",
    "gptq_factor",
    "hqq_codes",
    "output_clip",
    "quantize",
    "quantize_model",
    "round_to_nearest",
    "smooth_scales",
    "weight_share",
]
