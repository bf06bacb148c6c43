"""Inner products against numpy in float64."""

from __future__ import annotations

import numpy as np
import pytest

from weft.checkpoint.memory import from_mapping
from weft.engine import chunks
from weft.engine.chunks import Inputs, Scan, Workspace
from weft.engine.gram import dot, gram, row_grams, weigh_rows


def inputs_of(models: list[np.ndarray], base: np.ndarray | None = None, granularity: str = "element") -> Inputs:
    """One output tensor."""
    opened = [from_mapping({"w": m})["w"] for m in models]
    return Inputs("w", opened, None if base is None else from_mapping({"w": base})["w"], granularity=granularity)


@pytest.mark.parametrize("shape", [(), (1,), (7,), (5, 7), (0, 3), (300, 1001)])
@pytest.mark.parametrize("chunk", [64, 1 << 17])
def test_gram(monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], chunk: int) -> None:
    if np.prod(shape) > 1e5 and chunk == 64:
        chunk = 1 << 12
    monkeypatch.setattr(chunks, "CHUNK", chunk)
    random = np.random.default_rng(0)
    base, *models = (random.standard_normal(shape).astype(np.float32) for _ in range(4))
    workspace = Workspace()
    scan = Scan([inputs_of(models, base)], lambda: workspace)
    vectors = np.stack([base, *models]).reshape(4, -1).astype(np.float64)
    # products of float32 are exact in float64; sums of n of them are off by at most n roundings of their magnitudes
    allowed = max(vectors.shape[1], 1) * 2.0**-53 * (abs(vectors) @ abs(vectors).T)
    everything = gram(scan, with_base=True)
    assert (abs(everything - vectors @ vectors.T) <= 2 * allowed).all()
    np.testing.assert_array_equal(everything, everything.T)
    np.testing.assert_array_equal(gram(scan), everything[1:, 1:])


def test_several_tensors_are_added() -> None:
    workspace = Workspace()
    inputs = [inputs_of([np.full(3, v, np.float32), np.full(3, 2 * v, np.float32)]) for v in (1, 2)]
    assert gram(Scan(inputs, lambda: workspace)).tolist() == [[15, 30], [30, 60]]


def test_large_values_do_not_overflow() -> None:
    huge = np.full(4, 3e38, np.float32)
    assert dot(huge, huge) == pytest.approx(3.6e77, rel=1e-6)


@pytest.mark.parametrize("shape", [(), (1,), (7,), (6, 1), (5, 7), (2, 3, 5)])
def test_rows(shape: tuple[int, ...]) -> None:
    random = np.random.default_rng(0)
    models = [random.standard_normal(shape).astype(np.float32) for _ in range(3)]
    (chunk,) = inputs_of(models, granularity="row").chunks(Workspace())
    rows = np.stack(models).astype(np.float64).reshape(3, -1, shape[-1] if shape else 1)
    np.testing.assert_allclose(row_grams(chunk), np.einsum("ire,jre->rij", rows, rows), rtol=0, atol=1e-14 * 7)
    weights = random.standard_normal((3, rows.shape[1]))
    out = np.empty(chunk.size, np.float32)
    weigh_rows(chunk, weights, out)
    expected = np.einsum("mr,mre->re", weights, rows).reshape(-1)
    scale = np.einsum("mr,mre->re", abs(weights), abs(rows)).reshape(-1)
    assert (abs(out - expected) <= 5 * 2.0**-24 * scale).all()  # weight, product and two sums, each rounded once
