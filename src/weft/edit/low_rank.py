"""The best approximation of a matrix by a product of two thin ones, and sums of such products.

Eckart and Young, Psychometrika 1 (1936): of all matrices of rank r, the r largest singular triplets are nearest.

    Δ ≈ B A,  B = U √Σ (out, r),  A = √Σ Vᵀ (r, in)        Δ = U Σ Vᵀ (out, in)

Singular vectors come from the eigenvectors of the smaller Gram matrix in float64, which resolves singular values down
to 1e-8 of the largest; float32 entries hold no more. Matrices whose smaller side exceeds ``EXACT_SIDE`` go through a
randomised range finder (Halko, Martinsson and Tropp, arXiv:0909.4061, 2009) with four power iterations.

Complexity: O(out · in · side + side³) exact, O(out · in · r) randomised, side = min(out, in). Memory beside Δ: four
float64 matrices of side × side exact, six float32 matrices of (out + in) × r randomised. Re-implemented from the equations.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from weft.errors import RecipeError, ShapeError

EXACT_SIDE = 1024  # at 4096 the exact way took ten times as long as the randomised one, for rank 32
_OVERSAMPLING = 16
_POWER_ITERATIONS = 4
_BLOCK = 1 << 22  # elements turned into float64 at a time


def low_rank(
    delta: Any, rank: int, *, min_energy: float | None = None, exact: bool | None = None
) -> tuple[Any, Any, float]:
    """Factors whose product is the nearest matrix of a rank.

    Args:
        delta: (out, in), torch or numpy.
        rank: the largest rank allowed; min(out, in) at most is used.
        min_energy: use the smallest rank that keeps this share of the squared Frobenius norm, if ``rank`` allows.
        exact: True or False to force the exact or the randomised way; by size otherwise.

    Returns:
        ``(B, A, residual_share)``: (out, r) and (r, in) in float32, of ``delta``'s kind, balanced (row i of A is as
        long as column i of B), and ‖Δ − B A‖²/‖Δ‖², measured.

    Raises:
        ShapeError: ``delta`` is not a matrix. RecipeError: the rank is not positive, or min_energy not in (0, 1].

    Source: Eckart and Young (1936); arXiv:0909.4061, algorithms 4.4 and 5.1.

    >>> import numpy as np
    >>> B, A, lost = low_rank(np.float32([[4, 0], [0, 3]]), rank=1)
    >>> (B @ A).round(4), round(lost, 4)
    (array([[4., 0.],
           [0., 0.]], dtype=float32), 0.36)
    """
    if rank < 1 or (min_energy is not None and not 0 < min_energy <= 1):
        raise RecipeError(
            f"A rank of at least 1 and an energy above 0 and at most 1 are needed, got {rank}, {min_energy}."
        )
    matrix = delta if isinstance(delta, np.ndarray) else delta.detach().cpu().float().numpy()
    if matrix.ndim != 2:
        raise ShapeError(f"A matrix is needed, got the shape {list(matrix.shape)}.")
    up, down, residual = _factor(np.asarray(matrix, np.float32), rank, min_energy, exact)
    if isinstance(delta, np.ndarray):
        return up, down, residual
    import torch

    return torch.from_numpy(up), torch.from_numpy(down), residual


def _factor(
    matrix: np.ndarray, rank: int, min_energy: float | None, exact: bool | None
) -> tuple[np.ndarray, np.ndarray, float]:
    if matrix.shape[0] < matrix.shape[1]:
        left, right, residual = _factor(matrix.T, rank, min_energy, exact)
        return right.T.copy(), left.T.copy(), residual
    rank = max(1, min(rank, matrix.shape[1]))
    total = sum(float(np.square(rows, dtype=np.float64).sum()) for rows in _rows(matrix))
    if total == 0:
        return np.zeros((matrix.shape[0], 1), np.float32), np.zeros((1, matrix.shape[1]), np.float32), 0.0
    if exact is None:
        exact = matrix.shape[1] <= EXACT_SIDE
    energies, basis = _exact_basis(matrix, rank) if exact else _random_basis(matrix, rank)
    if min_energy is not None:
        rank = min(rank, int(np.searchsorted(np.cumsum(energies), min_energy * total * (1 - 1e-12))) + 1)
    basis = basis[:, :rank]
    left = np.concatenate([rows.astype(np.float64) @ basis for rows in _rows(matrix)])
    left, right = _balanced(left, basis.T)
    return left, right, _residual(matrix, left, right, total)


def _exact_basis(matrix: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """Squares of the largest singular values, (side, rank) right singular vectors."""
    gram = np.zeros((matrix.shape[1],) * 2)
    for rows in _rows(matrix):
        wide = rows.astype(np.float64)
        gram += wide.T @ wide
    values, vectors = np.linalg.eigh(gram)
    return np.maximum(values[::-1][:rank], 0), vectors[:, ::-1][:, :rank]


def _random_basis(matrix: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """As :func:`_exact_basis`, from a random sketch whose seed is fixed."""
    width = min(rank + _OVERSAMPLING, matrix.shape[1])
    sketch = matrix @ np.random.default_rng(0).standard_normal((matrix.shape[1], width), np.float32)
    for _ in range(_POWER_ITERATIONS):
        sketch = matrix @ np.linalg.qr(matrix.T @ np.linalg.qr(sketch)[0])[0]
    small = (np.linalg.qr(sketch)[0].T @ matrix).astype(np.float64)
    energies, vectors = np.linalg.eigh(small @ small.T)
    energies, vectors = np.maximum(energies[::-1][:rank], 0), vectors[:, ::-1][:, :rank]
    lengths = np.sqrt(energies)
    inverse = np.divide(1, lengths, out=np.zeros_like(lengths), where=energies > energies[0] * np.finfo(np.float64).eps)
    return energies, small.T @ (vectors * inverse)


def add_low_rank(
    terms: Sequence[tuple[float, np.ndarray, np.ndarray]], rank: int | None = None
) -> tuple[np.ndarray, np.ndarray, float]:
    """Σ wᵢ Bᵢ Aᵢ as one product, without ever forming the large matrix.

    [w₁B₁ …] and [A₁; …] are factored by QR; the singular values of the small product of the triangles are those of the
    sum. With ``rank`` at least the sum of the terms' ranks, the sum is exact up to rounding.

    Args:
        terms: (wᵢ, Bᵢ (out, rᵢ), Aᵢ (rᵢ, in)).
        rank: the largest rank of the result; by default what the sum needs.

    Returns:
        (B, A, residual_share) as :func:`low_rank`.

    >>> import numpy as np
    >>> e, f = np.eye(2, dtype=np.float32)[:, :1], np.eye(2, dtype=np.float32)[:, 1:]
    >>> B, A, lost = add_low_rank([(2, e, e.T), (1, f, f.T)])
    >>> (B @ A).round(4), round(lost, 4)
    (array([[2., 0.],
           [0., 1.]], dtype=float32), 0.0)
    """
    up = np.concatenate([weight * b.astype(np.float64) for weight, b, _ in terms], axis=1)
    down = np.concatenate([a.astype(np.float64) for _, _, a in terms])
    q_up, r_up = np.linalg.qr(up)
    q_down, r_down = np.linalg.qr(down.T)
    u, values, vt = np.linalg.svd(r_up @ r_down.T)
    total = float(np.square(values).sum())
    if total == 0:
        return np.zeros((up.shape[0], 1), np.float32), np.zeros((1, down.shape[1]), np.float32), 0.0
    needed = int(np.count_nonzero(values > values[0] * np.finfo(np.float64).eps * max(up.shape[0], down.shape[1])))
    rank = min(rank or needed, needed)
    left = q_up @ (u[:, :rank] * values[:rank])
    return *_balanced(left, vt[:rank] @ q_down.T), float(np.square(values[rank:]).sum()) / total


def _balanced(left: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``left`` and ``right``, whose rows have length 1, with the lengths shared out equally; float32."""
    lengths = np.sqrt(np.linalg.norm(left, axis=0))
    inverse = np.divide(1, lengths, out=np.zeros_like(lengths), where=lengths > 0)
    return (left * inverse).astype(np.float32), (right * lengths[:, None]).astype(np.float32)


def _residual(matrix: np.ndarray, left: np.ndarray, right: np.ndarray, total: float) -> float:
    lost, step = 0.0, max(1, _BLOCK // matrix.shape[1])
    for first in range(0, matrix.shape[0], step):
        difference = matrix[first : first + step] - left[first : first + step] @ right
        lost += float(np.square(difference, dtype=np.float64).sum())
    return lost / total


def _rows(matrix: np.ndarray) -> list[np.ndarray]:
    """Blocks of rows, so that float64 copies stay small."""
    step = max(1, _BLOCK // matrix.shape[1])
    return [matrix[first : first + step] for first in range(0, matrix.shape[0], step)]
