"""Breadcrumbs against sorting: exact counts at both ends, and never an empty task vector by accident."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from task_vector_oracles import SHAPES, add_up, close, elect, models, top

import weft.engine.chunks as chunks
from weft.engine.merging import merge_tensors
from weft.errors import RecipeError
from weft.merge.breadcrumbs import METHODS, breadcrumbs

WEIGHTS = [0.5, 2.0, 0.75]
ROWS = {row.name: row for row in METHODS}


def middle(delta: np.ndarray, density: float, gamma: float) -> np.ndarray:
    """What is left of ``delta``: ⌊density n⌋ elements below the ⌊gamma n⌋ largest."""
    count = int(density * delta.size)
    outliers = min(int(gamma * delta.size), delta.size - count)
    return np.where(top(delta, outliers + count) & ~top(delta, outliers), delta, np.float32(0))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("density", "gamma"), [(0.0, 0.5), (0.4, 0.2), (0.4, 0.0), (0.9, 0.3), (1.0, 0.3), (0.2, 1.0)])
@pytest.mark.parametrize("elects", [True, False])
def test_equation(shape: tuple[int, ...], density: float, gamma: float, elects: bool) -> None:
    deltas = models(3, shape)
    merged = breadcrumbs(deltas, weights=WEIGHTS, density=density, gamma=gamma, elect=elects, lambda_=1.5)
    rest = [middle(d, density, gamma) for d in deltas]
    magnitude = add_up([np.abs(d) for d in rest], WEIGHTS, False, 1.5)
    # a rounding for each weight, product and sum of two running sums, and the scale
    close(merged, (elect if elects else add_up)(rest, WEIGHTS, False, 1.5), 3 * 4 + 2, magnitude)


@pytest.mark.parametrize("values", ["normal", "tied", "all equal"])
@pytest.mark.parametrize(("density", "gamma"), [(0.15, 0.01), (0.5, 0.25), (0.7, 0.4), (0.001, 0.0)])
def test_keeps_exactly_the_share_and_the_right_ones(values: str, density: float, gamma: float) -> None:
    rng = np.random.default_rng(3)
    numbers = {"normal": rng.standard_normal(1000), "tied": rng.integers(1, 4, 1000), "all equal": np.full(1000, -2)}
    delta = numbers[values].astype(np.float32)
    merged = breadcrumbs([delta], density=density, gamma=gamma)
    assert np.count_nonzero(merged) == int(density * 1000)
    np.testing.assert_array_equal(merged, middle(delta, density, gamma))


def test_equal_magnitudes_count_lowest_index_first() -> None:
    merged = breadcrumbs([np.float32([5, -5, 5, -5, 5])], density=0.4, gamma=0.4)
    np.testing.assert_array_equal(merged, [0, 0, 5, -5, 0])


def test_a_share_of_less_than_one_element_takes_nothing_from_the_top() -> None:
    delta = np.float32([4, -3, 2, 1])
    for gamma in (0.0, 0.01, 0.24):
        np.testing.assert_array_equal(breadcrumbs([delta], density=0.5, gamma=gamma), [4, -3, 0, 0])


def test_without_outliers_it_is_trimming() -> None:
    (delta,) = models(1, (90,))
    np.testing.assert_array_equal(
        breadcrumbs([delta], density=0.3, gamma=0), np.where(top(delta, 27), delta, np.float32(0))
    )


def test_each_model_has_its_own_shares() -> None:
    deltas = models(2, (100,))
    merged = breadcrumbs(deltas, density=[0.2, 0.6], gamma=[0.3, 0.0])
    np.testing.assert_array_equal(merged, middle(deltas[0], 0.2, 0.3) + middle(deltas[1], 0.6, 0.0))


def test_each_tensor_is_ranked_by_itself() -> None:
    state = {"large": np.arange(100, 110, dtype=np.float32), "small": np.arange(1, 11, dtype=np.float32)}
    merged = breadcrumbs([state], density=0.5, gamma=0.1)
    assert {n: np.count_nonzero(v) for n, v in merged.items()} == {"large": 5, "small": 5}


def test_rescale_restores_the_norm() -> None:
    (delta,) = models(1, (301, 7))
    merged = breadcrumbs([delta], density=0.2, gamma=0.05, rescale=True).astype(np.float64)
    norm = np.abs(delta.astype(np.float64)).sum()
    # each of the kept elements is rounded twice, the scale once
    assert abs(np.abs(merged).sum() - norm) <= 3 * 2.0**-24 * norm
    np.testing.assert_array_equal(merged != 0, breadcrumbs([delta], density=0.2, gamma=0.05) != 0)


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("chunk", [4, 64])
def test_same_bits_at_any_chunking(name: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    row = ROWS[name]
    deltas = [np.float32(np.round(d * 16)) for d in models(3, (1031,))]  # tied, and norms are exact
    config = row.configure({"density": 0.4, "gamma": 0.07, "weights": WEIGHTS, "rescale": True})
    whole = merge_tensors(row, deltas, config, are_deltas=True)
    monkeypatch.setattr(chunks, "CHUNK", chunk)
    np.testing.assert_array_equal(merge_tensors(row, deltas, config, are_deltas=True), whole)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_merged_in_float32(dtype: torch.dtype) -> None:
    deltas = [torch.from_numpy(d).to(dtype) for d in models(3, (40, 50))]
    exact = sum(middle(d.float().numpy(), 0.3, 0.1) for d in deltas)
    merged = breadcrumbs(deltas, density=0.3, gamma=0.1)
    assert torch.equal(merged, torch.from_numpy(exact).to(dtype))


def test_refuses_shares_beyond_the_whole() -> None:
    with pytest.raises(RecipeError, match="between 0 and 1"):
        breadcrumbs(models(2, (3,)), gamma=1.5)
