"""GPTQ's columns of one block: rounded to their grids, their errors spread over those still to come."""

from __future__ import annotations

import numpy as np

from weft.kernels.jit import fused

_TILE = 128  # values of a column at a time: those of 128 columns stay in the second-level cache


@fused
def round_to_grid(w, upper, scales, zeros, groups, codes, errors, start, low, high):
    # w (in, out), upper (in, in), scales and zeros (all groups, out), codes (in, out) int16; groups and errors of the block:
    # for each column j = start + k: code = round(w_j / s) + z, e = (w_j - (code - z) s) / U_jj, w_i -= U_ji e
    count = errors.shape[0]
    for first in range(0, w.shape[1], _TILE):
        some = slice(first, min(first + _TILE, w.shape[1]))
        for k in range(count):
            j = start + k
            column, scale, zero = w[j, some], scales[groups[k], some], zeros[groups[k], some]
            code, error, share = codes[j, some], errors[k, some], upper[j, j]
            for r in range(column.size):
                value = np.rint(column[r] / scale[r]) + zero[r]
                value = low if value < low else value
                value = high if value > high else value
                code[r] = np.int16(value)
                error[r] = (column[r] - (value - zero[r]) * scale[r]) / share
            for i in range(j + 1, start + count):
                rest, factor = w[i, some], upper[j, i]
                for r in range(rest.size):
                    rest[r] = rest[r] - factor * error[r]
