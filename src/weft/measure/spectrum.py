"""Largest singular values of a matrix that is read in blocks of rows: block Krylov iteration.

K = [V, A V, A² V, …] with A = Wᵀ W and V four random columns; the singular values of W are approached from below by
the square roots of the eigenvalues of Qᵀ A Q, Q an orthonormal basis of K (Musco and Musco, 2015, arXiv:1504.05477).
With eight passes the largest is half a percent low for 1000 × 1000 independent normal numbers, the hardest case, and
has float32's seven digits where singular values fall off as k^-0.4.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from weft.checkpoint.checkpoint import LazyTensor
from weft.engine.chunks import Inputs, Workspace
from weft.measure.kernels import gram_product
from weft.measure.report import Report, ratio

PASSES = 8
BLOCK = 4  # columns of V, as the compiled loop has them
_RANGE = (1e-36, 1e36)  # norms whose inverse is a normal float32
LONGEST_ROW = 1 << 18  # elements: beyond, the basis would need more than 70 MB


@dataclass(frozen=True)
class Spectrum(Report):
    """Of a matrix.

    Attributes:
        spectral_norm: its largest singular value.
        stable_rank: squared Frobenius norm over squared spectral norm, between 1 and the rank.
        singular_values: the four largest, all approached from below; less than 1e-3 of the largest is rounding.
    """

    spectral_norm: float
    stable_rank: float | None
    singular_values: tuple[float, ...]


def spectrum_of(
    tensor: LazyTensor, workspace: Workspace, norm: float | None, stopped: Callable[[], bool] = lambda: False
) -> Spectrum | None:
    """The spectrum of a matrix of floating-point numbers, all finite.

    None for any other shape, for rows longer than ``LONGEST_ROW`` and for norms at the edge of float32's range.

    Args:
        tensor: (rows, columns).
        workspace: scratch.
        norm: its Frobenius norm.
        stopped: asked from block to block; ends early.
    """
    if len(tensor.shape) != 2 or not tensor.size or tensor.shape[1] > LONGEST_ROW or norm is None:
        return None
    if norm == 0:
        return Spectrum(0.0, None, (0.0,) * min(BLOCK, *tensor.shape))
    if not _RANGE[0] < norm < _RANGE[1]:
        return None
    inputs = Inputs(tensor.name, [tensor], granularity="row", allow_non_finite=True)
    columns = tensor.shape[1]
    basis, image = np.empty((2, PASSES * BLOCK, columns), np.float32)
    block = np.random.default_rng(0).standard_normal((BLOCK, columns), np.float32)
    size = 0
    for _ in range(PASSES):
        first, size = size, _extend(basis, size, block)
        if size == first:
            break
        block[:] = 0
        block[: size - first] = basis[first:size]
        block = _gram_times(inputs, workspace, block, norm, stopped)
        if stopped():
            return None
        image[first:size] = block[: size - first]
    small = np.einsum("ic,jc->ij", basis[:size], image[:size], dtype=np.float64)
    values = norm * np.sqrt(np.maximum(np.linalg.eigvalsh((small + small.T) / 2)[::-1], 0.0))
    top = tuple(float(v) for v in values[: min(BLOCK, *tensor.shape)])
    return Spectrum(top[0], ratio(norm**2, top[0] ** 2), top)


def _gram_times(
    inputs: Inputs, workspace: Workspace, block: np.ndarray, norm: float, stopped: Callable[[], bool]
) -> np.ndarray:
    """V Wᵀ W / norm², from one pass over the rows of W; dividing by the norm keeps float32 in its range."""
    total, part = np.zeros(block.shape), np.empty_like(block)
    for chunk in inputs.chunks(workspace):
        if stopped():
            break
        part[:] = 0
        gram_product(chunk.tensors[0].reshape(-1, block.shape[1]), block, np.float32(1 / norm), part)
        total += part
    return (total / norm).astype(np.float32)


def _extend(basis: np.ndarray, size: int, block: np.ndarray) -> int:
    """Add to the ``size`` orthonormal rows of ``basis`` what the rows of ``block`` hold beside them; the new size.

    einsum and not matmul: BLAS would start threads of its own in each of the engine's threads.
    """
    for row in block:
        length = float(np.linalg.norm(row))
        for _ in range(2):  # once leaves rounding errors as large as what is wanted
            known = basis[:size]
            row = row - np.einsum("i,ic->c", np.einsum("ic,c->i", known, row), known)
        left = float(np.linalg.norm(row))
        if left > 1e-5 * length and size < len(basis):  # the rest is rounding
            basis[size] = row / left
            size += 1
    return size
