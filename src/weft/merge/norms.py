"""How much dropping parts of a task vector shrinks it: what mergekit's rescaling makes up for."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from weft.engine.chunks import Chunk, Scan
from weft.kernels.jit import reduction

_SMALLEST_NORM = 1e-7  # mergekit's: changes that are smaller as a whole are not rescaled


def norm_ratios(scan: Scan, drop: Callable[[Chunk, int], None]) -> list[float]:
    """By how much ``drop(chunk, model)``, which works in place, shrinks the L1 norm of each model: before / after.

    1 where one of the norms is next to zero.
    """

    def visit(chunk: Chunk, norms: np.ndarray) -> None:
        for model, delta in enumerate(chunk.tensors):
            norms[model, 0] += l1_norm(delta)
            drop(chunk, model)
            norms[model, 1] += l1_norm(delta)

    norms = scan.fold(visit, lambda: np.zeros((scan.models, 2)))
    return [float(before / after) if min(before, after) >= _SMALLEST_NORM else 1.0 for before, after in norms]


@reduction
def l1_norm(values):  # (n,) -> float64
    total = 0.0
    for i in range(values.size):
        total += abs(values[i])
    return total
