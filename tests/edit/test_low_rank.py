"""Low-rank factors against the singular value decomposition in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import weft
from weft.edit.low_rank import add_low_rank, low_rank

EPS = float(np.finfo(np.float32).eps)


def matrix(shape: tuple[int, int], decay: float = 0.5, seed: int = 0) -> np.ndarray:
    """A matrix whose singular values fall off by ``decay``."""
    random = np.random.default_rng(seed)
    side = min(shape)
    u, _ = np.linalg.qr(random.standard_normal((shape[0], side)))
    v, _ = np.linalg.qr(random.standard_normal((shape[1], side)))
    return ((u * decay ** np.arange(side)) @ v.T).astype(np.float32)


SHAPES = [(7, 5), (5, 7), (1, 9), (9, 1), (1, 1), (40, 40), (33, 120)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 3, 200])
@pytest.mark.parametrize("exact", [True, False])
def test_product_is_the_nearest_matrix_of_the_rank(shape: tuple[int, int], rank: int, exact: bool) -> None:
    delta = matrix(shape)
    up, down, lost = low_rank(delta, rank, exact=exact)
    used = min(rank, *shape)
    assert (up.shape, down.shape) == ((shape[0], used), (used, shape[1]))
    u, values, vt = np.linalg.svd(delta.astype(np.float64), full_matrices=False)
    nearest = (u[:, :used] * values[:used]) @ vt[:used]
    product = up.astype(np.float64) @ down
    # the entries of the factors are rounded to float32 once: used terms of relative error EPS each
    assert np.linalg.norm(product - nearest) <= 4 * EPS * np.sqrt(used) * values[0]
    optimal = np.square(values[used:]).sum() / np.square(values).sum()
    assert lost == pytest.approx(np.square(delta - product).sum() / np.square(values).sum(), rel=1e-3, abs=EPS**2 * 100)
    assert lost >= optimal * (1 - 1e-3)


def test_randomised_loses_little_more_than_the_best_where_nothing_decays() -> None:
    delta = np.random.default_rng(0).standard_normal((300, 200)).astype(np.float32)
    values = np.linalg.svd(delta.astype(np.float64), compute_uv=False)
    best = np.square(values[20:]).sum() / np.square(values).sum()
    # a flat spectrum is the worst case: sixteen extra directions and four power iterations stay within 2%
    assert best <= low_rank(delta, 20, exact=False)[2] <= 1.02 * best
    assert low_rank(delta, 20, exact=True)[2] == pytest.approx(best, rel=1e-5)


def test_factors_are_balanced_and_orthogonal() -> None:
    up, down, _ = low_rank(matrix((30, 20)), 6)
    values = 0.5 ** np.arange(6)
    np.testing.assert_allclose(up.T @ up, np.diag(values), atol=30 * EPS)
    np.testing.assert_allclose(down @ down.T, np.diag(values), atol=30 * EPS)


@pytest.mark.parametrize("share", [0.5, 0.76, 0.9, 0.99, 0.999999, 1.0])
def test_energy_decides_the_rank(share: float) -> None:
    delta = matrix((30, 20), decay=0.7)
    values = np.linalg.svd(delta.astype(np.float64), compute_uv=False) ** 2
    smallest = int(np.argmax(np.cumsum(values) / values.sum() >= share * (1 - 1e-12))) + 1
    up, _, lost = low_rank(delta, 20, min_energy=share)
    assert up.shape[1] == smallest
    assert lost <= 1 - share + EPS
    assert low_rank(delta, 2, min_energy=share)[0].shape[1] == min(2, smallest)


def test_exact_at_the_rank_of_the_matrix() -> None:
    random = np.random.default_rng(1)
    delta = (random.standard_normal((50, 3)) @ random.standard_normal((3, 40))).astype(np.float32)
    for exact in (True, False):
        up, down, lost = low_rank(delta, 3, exact=exact)
        assert np.abs(up @ down - delta).max() <= 16 * EPS * np.abs(delta).max()
        assert lost < 16 * EPS**2


def test_zero_matrix() -> None:
    up, down, lost = low_rank(np.zeros((4, 6), np.float32), 3)
    assert (up.shape, down.shape, lost) == ((4, 1), (1, 6), 0.0)
    assert not up.any()
    assert not down.any()


def test_tiny_and_huge_values_keep_their_scale() -> None:
    for scale in (1e-18, 1e18):
        delta = matrix((20, 10)) * np.float32(scale)
        up, down, lost = low_rank(delta, 10)
        assert np.abs(up @ down - delta).max() <= 16 * EPS * np.abs(delta).max()
        assert lost < 16 * EPS**2


def test_torch_in_torch_out() -> None:
    delta = torch.from_numpy(matrix((6, 4)))
    up, down, _ = low_rank(delta.to(torch.bfloat16), 4)
    assert isinstance(up, torch.Tensor)
    assert torch.allclose(up @ down, delta.to(torch.bfloat16).float(), atol=16 * EPS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 0}, "rank of at least 1"),
        ({"rank": 1, "min_energy": 0.0}, "energy above 0"),
        ({"rank": 1, "min_energy": 1.5}, "energy above 0"),
    ],
)
def test_bad_parameters(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(weft.WeftError, match=message):
        low_rank(np.ones((2, 2), np.float32), **arguments)
    with pytest.raises(weft.WeftError, match="matrix is needed"):
        low_rank(np.ones(3, np.float32), 1)


@pytest.mark.parametrize("shape", [(30, 20), (6, 40), (3, 3)])
def test_sums_of_products_are_exact_without_the_large_matrix(shape: tuple[int, int]) -> None:
    random = np.random.default_rng(2)
    terms = [
        (
            w,
            random.standard_normal((shape[0], r)).astype(np.float32),
            random.standard_normal((r, shape[1])).astype("f4"),
        )
        for w, r in ((0.7, 3), (-1.3, 2), (2.0, 4))
    ]
    dense = sum(w * b.astype(np.float64) @ a for w, b, a in terms)
    up, down, lost = add_low_rank(terms)
    assert up.shape[1] == min(9, *shape)
    assert lost < 1e-28  # float64 rounding of nine singular values, squared
    assert np.abs(up.astype(np.float64) @ down - dense).max() <= 16 * EPS * np.linalg.norm(dense, 2)
    values = np.linalg.svd(dense, compute_uv=False)
    up, down, lost = add_low_rank(terms, 2)
    assert up.shape[1] == 2
    assert lost == pytest.approx(np.square(values[2:]).sum() / np.square(values).sum(), rel=1e-9)
    assert np.square(dense - up.astype(np.float64) @ down).sum() / np.square(values).sum() == pytest.approx(
        lost, rel=1e-4
    )


def test_sums_use_no_more_rank_than_they_need() -> None:
    random = np.random.default_rng(3)
    b, a = random.standard_normal((8, 2)).astype(np.float32), random.standard_normal((2, 9)).astype(np.float32)
    assert add_low_rank([(1, b, a), (2, b, a)])[0].shape == (8, 2)
    up, down, _ = add_low_rank([(1, b, a), (-1, b, a)])
    assert np.abs(up @ down).max() <= 16 * EPS * np.abs(b @ a).max()
