"""Inner products of models, over whole tensors or row by row, summed in float64.

A merge that moves inside the span of its inputs (a point on an arc, a barycentre on a sphere) needs their (k, k)
matrix of inner products and nothing else: one pass over the weights, then everything happens on k numbers.
"""

from __future__ import annotations

import numpy as np

from weft.engine.chunks import Chunk, Scan
from weft.kernels.jit import kernel, reduction


def gram(scan: Scan, *, with_base: bool = False) -> np.ndarray:
    """Inner products of all pairs of models in scope.

    Args:
        scan: passes over the data in scope.
        with_base: count the base as a model, before all others.

    Returns:
        (models, models) float64, symmetric.
    """
    count = scan.models + with_base

    def add(chunk: Chunk, total: np.ndarray) -> None:
        vectors = [chunk.base, *chunk.tensors] if with_base else list(chunk.tensors)
        for i in range(count):
            for j in range(i, count):
                total[i, j] += dot(vectors[i], vectors[j])

    upper = scan.fold(add, lambda: np.zeros((count, count)))
    return upper + np.triu(upper, 1).T


def row_grams(chunk: Chunk) -> np.ndarray:
    """Inner products of all pairs of models in each row of a chunk that holds whole rows: (rows, models, models)."""
    models, size = chunk.tensors.shape
    shape = (size // chunk.row_length, models, models)
    out = chunk.workspace.array("row grams", shape, np.float64)
    fill_row_grams(chunk.tensors, chunk.row_length, out)
    return out


def weigh_rows(chunk: Chunk, weights: np.ndarray, out: np.ndarray) -> None:
    """Σ over models of each model's rows, every row by its own weight: weights (models, rows) into ``out`` (n,)."""
    add_weighted_rows(chunk.tensors, chunk.row_length, weights.astype(np.float32), out)


@reduction
def dot(a, b):  # (n,), (n,) -> float64
    total = 0.0
    for i in range(a.size):
        total += np.float64(a[i]) * np.float64(b[i])
    return total


@reduction
def fill_row_grams(tensors, row_length, out):  # (models, n) -> (rows, models, models)
    for r in range(out.shape[0]):
        for i in range(out.shape[1]):
            a = tensors[i, r * row_length : (r + 1) * row_length]
            for j in range(i, out.shape[1]):
                b = tensors[j, r * row_length : (r + 1) * row_length]
                total = 0.0
                for e in range(row_length):
                    total += np.float64(a[e]) * np.float64(b[e])
                out[r, i, j] = total
                out[r, j, i] = total


@kernel
def add_weighted_rows(tensors, row_length, weights, out):  # (models, n), (models, rows) -> (n,)
    for r in range(weights.shape[1]):
        target = out[r * row_length : (r + 1) * row_length]
        target[:] = np.float32(0)
        for m in range(weights.shape[0]):
            weight = weights[m, r]
            row = tensors[m, r * row_length : (r + 1) * row_length]
            for e in range(row_length):
                target[e] += row[e] * weight
