"""Singular values from passes over rows against the decomposition of the whole matrix."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from weft.measure import model_statistics, spectrum
from weft.measure.spectrum import Spectrum

FLOAT32 = 1e-5  # float32 products over a few hundred terms keep five digits


def of(matrix: Any) -> Spectrum | None:
    return model_statistics({"w": matrix}, spectrum=True).tensors[0].spectrum


def decaying(rows: int, columns: int, power: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    rank = min(rows, columns)
    left, _ = np.linalg.qr(random.standard_normal((rows, rank)))
    right, _ = np.linalg.qr(random.standard_normal((columns, rank)))
    values = np.arange(1, rank + 1) ** -power
    return ((left * values) @ right.T).astype(np.float32), values


@pytest.mark.parametrize(("rows", "columns"), [(300, 200), (200, 300), (1, 50), (50, 1), (1, 1), (2, 3), (5, 700)])
def test_decaying_values(rows: int, columns: int) -> None:
    matrix, values = decaying(rows, columns, 1.0)
    found = of(matrix)
    assert len(found.singular_values) == min(4, rows, columns)
    assert found.singular_values == pytest.approx(values[:4], rel=FLOAT32)
    assert found.spectral_norm == found.singular_values[0]
    assert found.stable_rank == pytest.approx((values**2).sum(), rel=4 * FLOAT32)


def test_noise_is_approached_from_below() -> None:
    """The hardest case: no gap between the largest singular values."""
    matrix = np.random.default_rng(0).standard_normal((1000, 1000)).astype(np.float32)
    largest = np.linalg.norm(matrix.astype(np.float64), 2)
    assert 0.99 * largest < of(matrix).spectral_norm <= largest * (1 + FLOAT32)


def test_equal_singular_values() -> None:
    found = of(np.eye(40, dtype=np.float32))
    assert found.singular_values == pytest.approx([1] * 4, rel=FLOAT32)
    assert found.stable_rank == pytest.approx(40, rel=FLOAT32)


def test_rank_one_leaves_nothing_behind_the_first() -> None:
    found = of(np.outer(np.arange(1, 30), np.arange(1, 20)).astype(np.float32))
    assert found.stable_rank == pytest.approx(1, rel=FLOAT32)
    # eigenvalues of WᵀW carry float32's 6e-8 of the largest, their roots 2.4e-4, over a few terms
    assert max(found.singular_values[1:]) < 1e-3 * found.spectral_norm


@pytest.mark.parametrize("scale", [1e-33, 1e-6, 1e30])
def test_scale_does_not_matter(scale: float) -> None:
    matrix, values = decaying(60, 50, 1.0)
    found = of((matrix * scale).astype(np.float32))
    assert found.spectral_norm == pytest.approx(scale, rel=FLOAT32)
    assert found.singular_values == pytest.approx(scale * values[:4], rel=10 * FLOAT32)


def test_low_precision_is_read_as_its_values() -> None:
    matrix = torch.tensor(decaying(80, 90, 0.5)[0], dtype=torch.bfloat16)
    assert of(matrix).spectral_norm == pytest.approx(torch.linalg.matrix_norm(matrix.double(), 2).item(), rel=FLOAT32)


def test_several_chunks_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix, values = decaying(333, 64, 1.0)
    monkeypatch.setattr("weft.engine.chunks.CHUNK", 64 * 8)
    assert of(matrix).singular_values == pytest.approx(values[:4], rel=FLOAT32)


def test_what_has_no_spectrum(monkeypatch: pytest.MonkeyPatch) -> None:
    assert of(np.zeros((3, 4), np.float32)) == Spectrum(0.0, None, (0.0, 0.0, 0.0))
    broken = np.ones((3, 4), np.float32)
    broken[0, 0] = np.nan
    for matrix in (np.ones(5, np.float32), np.ones((2, 2, 2), np.float32), np.ones((0, 3), np.float32), broken):
        assert of(matrix) is None
    assert of(np.ones((3, 4), np.int64)) is None
    monkeypatch.setattr(spectrum, "LONGEST_ROW", 3)
    assert of(np.ones((3, 4), np.float32)) is None
