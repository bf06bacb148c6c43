"""Model Stock: the point between base and average that is nearest to the centre of the fine-tunes."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch
from geometry_oracle import DTYPES, SHAPES, UNIT, assert_rounds_to, draw, exact

from weft.engine.merging import merge_tensors
from weft.errors import RecipeError
from weft.merge.model_stock import METHODS, model_stock


def brute_force(deltas: list[np.ndarray], floor: float = 0.0) -> np.ndarray:
    """One vector a model, pair by pair."""
    cosines = []
    for a, b in combinations(deltas, 2):
        lengths = max(np.linalg.norm(a) * np.linalg.norm(b), floor)
        cosines.append(np.sum(a * b) / lengths if lengths else 0.0)
    c, n = np.mean(cosines), len(deltas)
    return n * c / (1 + (n - 1) * c) * np.mean(deltas, axis=0)


def brute_force_rows(deltas: list[np.ndarray], floor: float = 0.0) -> np.ndarray:
    """Row by row; a vector or a number is one row."""
    shape = deltas[0].shape
    rows = [d.reshape(-1, shape[-1]) if d.ndim else d.reshape(1, 1) for d in deltas]
    return np.array([brute_force([r[i] for r in rows], floor) for i in range(len(rows[0]))]).reshape(shape)


def largest_term(deltas: list[np.ndarray], result: np.ndarray) -> np.ndarray:
    """Size of the terms of the sum, whose weight t is at most this much larger than the result's."""
    mean = np.mean(deltas, axis=0)
    t = np.abs(np.divide(result, mean, out=np.zeros_like(mean), where=mean != 0)).max(initial=0)
    return np.abs(deltas).sum(0) * max(t, 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("count", [2, 4])
def test_brute_force(shape: tuple[int, ...], dtype: torch.dtype, count: int) -> None:
    deltas = draw(shape, count, dtype, seed=1)
    vectors = exact(deltas)
    result = model_stock(deltas)
    assert result.dtype == dtype
    expected = brute_force(vectors)
    assert_rounds_to(result, expected, largest_term(vectors, expected))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("count", [2, 4])
def test_filter_wise_is_row_by_row(shape: tuple[int, ...], count: int) -> None:
    deltas = draw(shape, count, seed=1)
    vectors = exact(deltas)
    expected = brute_force_rows(vectors)
    assert_rounds_to(model_stock(deltas, filter_wise=True), expected, largest_term(vectors, expected))


@pytest.mark.parametrize("filter_wise", [False, True])
def test_with_a_base_it_is_added(filter_wise: bool) -> None:
    base, *models = draw((5, 7), 4)
    zero, *vectors = exact([base, *models])
    deltas = [v - zero for v in vectors]
    change = (brute_force_rows if filter_wise else brute_force)(deltas)
    config = METHODS[0].configure({"filter_wise": filter_wise})
    result = merge_tensors(METHODS[0], models, config, base=base)
    assert_rounds_to(result, zero + change, largest_term(deltas, change) + abs(zero + change))


@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("spread", [0.1, 1.0, 3.0])
def test_it_is_the_point_nearest_to_the_centre(count: int, spread: float) -> None:
    """The paper's picture: fine-tunes at right angles to each other and to the base, as seen from their centre."""
    axes = np.linalg.qr(np.random.default_rng(0).standard_normal((20, 20)))[0]
    centre = 2 * axes[0]
    deltas = np.array([centre + spread * axes[1 + i] for i in range(count)])
    mean = deltas.mean(0)
    nearest = mean * (mean @ centre) / (mean @ mean)
    result = torch.from_numpy(model_stock(list(deltas.astype(np.float32))))
    assert_rounds_to(result, nearest, np.abs(deltas).sum(0))


def test_agreement_averages_and_independence_returns_to_the_base() -> None:
    (delta,) = draw((5, 7), 1)
    torch.testing.assert_close(model_stock([delta, delta, delta]), delta, rtol=4 * UNIT, atol=0)
    torch.testing.assert_close(model_stock([delta, 3 * delta]), 2 * delta, rtol=4 * UNIT, atol=0)
    assert not model_stock(list(torch.eye(3))).any()


@pytest.mark.parametrize("filter_wise", [False, True])
def test_no_estimate_means_the_base(filter_wise: bool) -> None:
    (delta,) = draw((5, 7), 1)
    assert not model_stock([delta, -delta], filter_wise=filter_wise).any()
    assert not model_stock([delta, -4 * delta], filter_wise=filter_wise).any()  # 1 + (N - 1) c = 0
    assert not model_stock([delta, torch.zeros(5, 7)], filter_wise=filter_wise).any()
    assert not model_stock([torch.zeros(5, 7)] * 2, filter_wise=filter_wise).any()


@pytest.mark.parametrize("filter_wise", [False, True])
def test_only_mergekits_row_shrinks_small_changes(filter_wise: bool) -> None:
    deltas = draw((5, 7), 2, seed=3)
    small = [d * 2.0**-14 for d in deltas]  # lengths below 1e-3
    assert max(d.norm().item() for d in small) < 1e-3
    assert torch.equal(
        model_stock(small, filter_wise=filter_wise), model_stock(deltas, filter_wise=filter_wise) * 2.0**-14
    )
    vectors = exact(small)
    expected = (brute_force_rows if filter_wise else brute_force)(vectors, 1e-6)
    shrunk = model_stock(small, filter_wise=filter_wise, floor=METHODS[1].configure({}).floor)
    assert_rounds_to(shrunk, expected, np.abs(vectors).sum(0))
    assert shrunk.norm() < 0.7 * model_stock(small, filter_wise=filter_wise).norm()


def test_needs_two_fine_tunes_and_a_base() -> None:
    with pytest.raises(RecipeError, match="at least 2"):
        model_stock(draw((3,), 1))
    with pytest.raises(RecipeError, match="base"):
        METHODS[0].check_models(2, False)
