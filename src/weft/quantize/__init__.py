"""Store weights in few bits.

Start at :mod:`weft.quantize.rtn`, the baseline of all: each weight goes to the nearest value of a grid. The grids (bits,
groups, scales, zero points) are in :mod:`weft.quantize.grid`. :mod:`weft.quantize.gptq` and :mod:`weft.quantize.awq` are the
methods to take where there is calibration data, :mod:`weft.quantize.hqq` and :mod:`weft.quantize.nf4` need none. Methods that
train what is rounded on the outputs of blocks share :mod:`weft.quantize.reconstruct`. :func:`quantize_` quantises a model in
memory, :func:`quantize_model` writes a quantised copy of one on disk, :func:`load_quantized` runs it on its packed weights.
:func:`choose_bits` says which layer gets how many bits, :func:`compare_methods` which method to take.
"""

from weft.quantize.adadim import AdaDim, adadim_codes, gptq_by_outputs
from weft.quantize.allocate import Allocation, Frontier, allocate_bits, frontier
from weft.quantize.awq import AWQ, awq_scales, weight_share
from weft.quantize.choose import Chosen, choose_bits
from weft.quantize.clip import output_clip
from weft.quantize.compare import compare_methods
from weft.quantize.curves import Curves
from weft.quantize.evaluate import evaluate
from weft.quantize.flexround import FlexRound, FlexRounding
from weft.quantize.float_blocks import FloatBlocks, block_codes
from weft.quantize.floating_point import FloatingPoint, float_codes, float_scales
from weft.quantize.folding import Fold, find_folds
from weft.quantize.gptq import GPTQ, gptq_codes, gptq_factor
from weft.quantize.gradient_ptq import GradientPTQ, Rounding, importance
from weft.quantize.grid import Grid, fake_quantize, fit_grid, quantize
from weft.quantize.hqq import HQQ, hqq_codes
from weft.quantize.inputs import QuantizedInputs
from weft.quantize.jlcm import JLCM, jlcm_footprint
from weft.quantize.load import load_quantized
from weft.quantize.low_rank_patch import low_rank_patch
from weft.quantize.measure_curves import error_curves
from weft.quantize.microscaling import Microscaling, microscaled_codes
from weft.quantize.nf4 import Codebook, codebook_codes
from weft.quantize.nupes import NUPES, PowerCodes
from weft.quantize.nvfp4 import NVFP4, nvfp4_codes
from weft.quantize.powerquant import PowerQuant, power_codes, power_exponent
from weft.quantize.reconstruct import Reconstruction, reconstruct_block, reconstruct_layer
from weft.quantize.report import compare_reports, make_report, write_report
from weft.quantize.rtn import RTN, round_to_nearest
from weft.quantize.run import quantize_, quantize_model
from weft.quantize.schemes import Scheme, find_scheme
from weft.quantize.shiftadd import ShiftAdd, binary_coding, lookup_product, shiftadd_codes, shiftadd_sensitivity
from weft.quantize.signround import SignRound, SignRounding
from weft.quantize.smoothquant import SmoothQuant, smooth_scales
from weft.quantize.soft import Descent, Soft, descend
from weft.quantize.vptq import VPTQ, VectorQuantization, vptq_codes
from weft.quantize.vq4dit import VQ4DiT
from weft.quantize.w8a8 import W8A8
from weft.quantize.zeroquant_fp import ZeroQuantFP, zeroquant_codes

__all__ = [
    "AWQ",
    "GPTQ",
    "HQQ",
    "JLCM",
    "NUPES",
    "NVFP4",
    "RTN",
    "VPTQ",
    "W8A8",
    "AdaDim",
    "Allocation",
    "Chosen",
    "Codebook",
    "Curves",
    "Descent",
    "FlexRound",
    "FlexRounding",
    "FloatBlocks",
    "FloatingPoint",
    "Fold",
    "Frontier",
    "GradientPTQ",
    "Grid",
    "Microscaling",
    "PowerCodes",
    "PowerQuant",
    "QuantizedInputs",
    "Reconstruction",
    "Rounding",
    "Scheme",
    "ShiftAdd",
    "SignRound",
    "SignRounding",
    "SmoothQuant",
    "Soft",
    "VQ4DiT",
    "VectorQuantization",
    "ZeroQuantFP",
    "adadim_codes",
    "allocate_bits",
    "awq_scales",
    "binary_coding",
    "block_codes",
    "choose_bits",
    "codebook_codes",
    "compare_methods",
    "compare_reports",
    "descend",
    "error_curves",
    "evaluate",
    "fake_quantize",
    "find_folds",
    "find_scheme",
    "fit_grid",
    "float_codes",
    "float_scales",
    "frontier",
    "gptq_by_outputs",
    "gptq_codes",
    "gptq_factor",
    "hqq_codes",
    "importance",
    "jlcm_footprint",
    "load_quantized",
    "lookup_product",
    "low_rank_patch",
    "make_report",
    "microscaled_codes",
    "nvfp4_codes",
    "output_clip",
    "power_codes",
    "power_exponent",
    "quantize",
    "quantize_",
    "quantize_model",
    "reconstruct_block",
    "reconstruct_layer",
    "round_to_nearest",
    "shiftadd_codes",
    "shiftadd_sensitivity",
    "smooth_scales",
    "vptq_codes",
    "weight_share",
    "write_report",
    "zeroquant_codes",
]
