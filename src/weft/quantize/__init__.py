"""Store weights in few bits.

Start at :mod:`weft.quantize.rtn`, the baseline of all: each weight goes to the nearest value of a grid. The grids (bits,
groups, scales, zero points) are in :mod:`weft.quantize.grid`. :mod:`weft.quantize.gptq` is the method to take where there is
calibration data, :mod:`weft.quantize.hqq` and :mod:`weft.quantize.nf4` need none. :func:`quantize_` quantises a
model in memory, :func:`quantize_model` writes a quantised copy of one on disk, :func:`choose_bits` says which layer of it
gets how many bits.
"""

from weft.quantize.allocate import Allocation, Frontier, allocate_bits, frontier
from weft.quantize.compare import compare_methods
from weft.quantize.curves import Chosen, Curves, choose_bits, error_curves
from weft.quantize.evaluate import evaluate
from weft.quantize.gptq import GPTQ, gptq_codes, gptq_factor
from weft.quantize.grid import Grid, fake_quantize, fit_grid, quantize
from weft.quantize.hqq import HQQ, hqq_codes
from weft.quantize.load import load_quantized
from weft.quantize.nf4 import Codebook, codebook_codes
from weft.quantize.report import compare_reports, make_report, write_report
from weft.quantize.rtn import RTN, round_to_nearest
from weft.quantize.run import quantize_, quantize_model

__all__ = [
    "GPTQ",
    "HQQ",
    "RTN",
    "Allocation",
    "Chosen",
    "Codebook",
    "Curves",
    "Frontier",
    "Grid",
    "allocate_bits",
    "choose_bits",
    "codebook_codes",
    "compare_methods",
    "compare_reports",
    "error_curves",
    "evaluate",
    "fake_quantize",
    "fit_grid",
    "frontier",
    "gptq_codes",
    "gptq_factor",
    "hqq_codes",
    "load_quantized",
    "make_report",
    "quantize",
    "quantize_",
    "quantize_model",
    "round_to_nearest",
    "write_report",
]
