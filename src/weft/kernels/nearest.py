"""The nearest entry of a codebook for each of many vectors."""

from __future__ import annotations

import numpy as np

from weft.kernels.jit import fused

_TILE = 256  # vectors at a time: theirs and the best distances stay in the first-level cache


@fused
def nearest_entries(columns, table, halves, found):
    # columns (d, n), table (k, d), halves (k,) = ½ ‖c‖² -> found (n,) int64: the first entry with the least ½ ‖c‖² − u·c
    best = np.empty(_TILE, columns.dtype)
    place = np.empty(_TILE, np.int32)
    value = np.empty(_TILE, columns.dtype)
    for first in range(0, columns.shape[1], _TILE):
        some = slice(first, min(first + _TILE, columns.shape[1]))
        count = some.stop - first
        best[:] = np.inf
        place[:] = 0
        for k in range(table.shape[0]):
            value[:count] = halves[k]
            for d in range(table.shape[1]):
                factor, column = table[k, d], columns[d, some]
                for i in range(count):
                    value[i] = value[i] - column[i] * factor
            for i in range(count):
                better = value[i] < best[i]
                best[i] = value[i] if better else best[i]
                place[i] = k if better else place[i]
        for i in range(count):
            found[first + i] = place[i]
