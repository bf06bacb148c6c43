"""Store weights in few bits.

Start at :mod:`weft.quantize.rtn`, the baseline of all: each weight goes to the nearest value of a grid. The grids (bits,
groups, scales, zero points) are in :mod:`weft.quantize.grid`. :func:`quantize_rtn` writes a model whose weights lie on a
grid, in the model's own type.
"""

from weft.quantize.grid import Codes, Grid, dequantize, fake_quantize, fit_grid, quantize
from weft.quantize.rtn import RTN, quantize_rtn, round_to_nearest

__all__ = [
    "RTN",
    "Codes",
    "Grid",
    "dequantize",
    "fake_quantize",
    "fit_grid",
    "quantize",
    "quantize_rtn",
    "round_to_nearest",
]
