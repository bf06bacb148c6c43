"""DELLA: ranks, probabilities, and arithmetic on the masks they draw."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from task_vector_oracles import SHAPES, add_up, close, elect, models

import weft.engine.chunks as chunks
from weft.engine.merging import merge_tensors
from weft.errors import RecipeError
from weft.kernels.random import Stream
from weft.merge.della import METHODS, Della, della

WEIGHTS = [0.5, 2.0, 0.75]
ROWS = {row.name: row for row in METHODS}


def probabilities(delta: np.ndarray, density: float, epsilon: float) -> np.ndarray:
    """Linear in the rank of the magnitude in its row; of equal magnitudes the lowest index ranks highest."""
    length = delta.shape[-1] if delta.ndim else 1
    flat = np.abs(delta.astype(np.float64)).reshape(delta.size // max(length, 1), length)
    result = np.full(flat.shape, density)
    for row, out in zip(flat, result):
        order = sorted(range(row.size), key=lambda i: (row[i], -i))
        if row.size > 1:
            out[order] = density - epsilon + 2 * epsilon * np.arange(row.size) / (row.size - 1)
    return result.reshape(delta.shape)


def masks(method: str, deltas: list[np.ndarray], density: float, epsilon: float) -> list[np.ndarray]:
    stream, shape = Stream(0, method, "tensor"), deltas[0].shape
    drawn = [stream.uniform(0, d.size, lane).reshape(shape) for lane, d in enumerate(deltas)]
    return [u < probabilities(d, density, epsilon) for u, d in zip(drawn, deltas)]


@pytest.mark.parametrize("shape", [*SHAPES, (9, 300)])
@pytest.mark.parametrize("elects", [True, False])
@pytest.mark.parametrize("normalize", [True, False])
def test_equation(shape: tuple[int, ...], elects: bool, normalize: bool) -> None:
    deltas = models(3, shape)
    merged = della(deltas, weights=WEIGHTS, density=0.5, epsilon=0.3, elect=elects, normalize=normalize, lambda_=1.5)
    kept = masks("della" if elects else "della_linear", deltas, 0.5, 0.3)
    dropped = [np.where(m, d, 0) / probabilities(d, 0.5, 0.3) for d, m in zip(deltas, kept)]
    magnitude = add_up([np.abs(d) for d in dropped], WEIGHTS, False, 1.5) / (min(WEIGHTS) if normalize else 1)
    # a rounding for each weight, scaling, product and sum of two running sums, the division and the scale; the
    # probability is rounded four times, on the scale of 1, and is at least 0.2
    close(merged, (elect if elects else add_up)(dropped, WEIGHTS, normalize, 1.5), 3 * 5 + 2 + 4 * 5, magnitude)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("elects", [True, False])
def test_mergekit_rows_keep_the_norm_of_each_tensor(shape: tuple[int, ...], elects: bool) -> None:
    deltas = models(3, shape)
    merged = della(deltas, weights=WEIGHTS, density=0.5, epsilon=0.3, elect=elects, normalize=False, match_norm=True)
    dropped = []
    for delta, mask in zip(deltas, masks("mergekit/della" if elects else "mergekit/della_linear", deltas, 0.5, 0.3)):
        kept = np.where(mask, delta, 0).astype(np.float64)
        dropped.append(kept * np.abs(delta.astype(np.float64)).sum() / (np.abs(kept).sum() or 1))
    magnitude = add_up([np.abs(d) for d in dropped], WEIGHTS, False, 1)
    close(merged, (elect if elects else add_up)(dropped, WEIGHTS, False, 1), 3 * 5 + 2, magnitude)


def test_frequencies_follow_the_ranks() -> None:
    """20000 equal rows: every column is kept with its own probability, within five standard deviations."""
    row, n = np.float32([3, -1, 0.5, 2, -4]), 20_000
    kept = np.count_nonzero(della([np.tile(row, (n, 1))], density=0.6, epsilon=0.2, elect=False), axis=0)
    expected = n * np.array([0.7, 0.5, 0.4, 0.6, 0.8])
    assert np.all(np.abs(kept - expected) < 5 * np.sqrt(expected * (1 - expected / n)))


def test_expectation_is_the_change_itself() -> None:
    (delta,) = models(1, (4, 16))
    seeds, q = 400, probabilities(delta, 0.5, 0.25)
    mean = sum(della([delta], density=0.5, epsilon=0.25, seed=s).astype(np.float64) for s in range(seeds)) / seeds
    assert np.all(np.abs(mean - delta) < 5 * np.abs(delta) * np.sqrt((1 - q) / q / seeds))


def test_of_equal_magnitudes_the_lowest_index_ranks_highest() -> None:
    delta = np.tile(np.float32([1, -1, 1, -1]), (20_000, 1))
    kept = np.count_nonzero(della([delta], density=0.5, epsilon=0.45, elect=False), axis=0)
    expected = 20_000 * np.array([0.95, 0.65, 0.35, 0.05])
    assert np.all(np.abs(kept - expected) < 5 * np.sqrt(expected * (1 - expected / 20_000)))


def test_without_epsilon_every_probability_is_the_density() -> None:
    (delta,) = models(1, (8, 8))
    u = Stream(0, "della", "tensor").uniform(0, 64).reshape(8, 8)
    merged = della([delta], density=0.5, epsilon=0)
    np.testing.assert_array_equal(merged, np.where(u < np.float32(0.5), 2 * delta, np.float32(0)))


@pytest.mark.parametrize("shape", [(), (1,), (6, 1)])
def test_rows_of_one_element_are_kept_with_the_density(shape: tuple[int, ...]) -> None:
    delta = np.ones(shape, np.float32)
    kept = [np.count_nonzero(della([delta], density=0.5, epsilon=0.4, seed=s)) for s in range(200)]
    n = 200 * delta.size
    assert abs(sum(kept) - n / 2) < 5 * np.sqrt(n / 4)


def test_keeping_everything_and_nothing() -> None:
    deltas = models(2, (6, 7))
    for match_norm in (True, False):
        merged = della(deltas, density=[1, 0], epsilon=0.15, elect=False, normalize=False, match_norm=match_norm)
        np.testing.assert_array_equal(merged, deltas[0])


def test_rescale_off_leaves_values_alone() -> None:
    (delta,) = models(1, (50, 10))
    for match_norm in (True, False):
        merged = della([delta], density=0.5, epsilon=0.2, rescale=False, match_norm=match_norm)
        np.testing.assert_array_equal(merged[merged != 0], delta[merged != 0])
        assert 0 < np.count_nonzero(merged) < 500


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("chunk", [4, 64])
@pytest.mark.parametrize("shape", [(103, 5), (1031,), (2, 129)])
def test_same_bits_at_any_chunking(
    name: str, chunk: int, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    row = ROWS[name]
    deltas = [np.float32(np.round(d * 64)) for d in models(3, shape)]  # tied, and norms are exact
    config = row.configure({"density": 0.4, "epsilon": 0.2, "weights": WEIGHTS})
    whole = merge_tensors(row, deltas, config, are_deltas=True)
    monkeypatch.setattr(chunks, "CHUNK", chunk)
    np.testing.assert_array_equal(merge_tensors(row, deltas, config, are_deltas=True), whole)


def test_defaults_are_the_paper_s_and_mergekit_s() -> None:
    paper, mergekit = ROWS["della"].configure({}), ROWS["mergekit/della"].configure({})
    assert (paper.density, paper.epsilon, paper.elect, paper.normalize) == (0.7, 0.07, True, True)
    assert (mergekit.density, mergekit.epsilon, mergekit.elect, mergekit.normalize) == (1, 0.15, True, True)
    for name in ("della_linear", "mergekit/della_linear"):
        linear = ROWS[name].configure({})
        assert (linear.elect, linear.normalize) == (False, False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_merged_in_float32(dtype: torch.dtype) -> None:
    deltas = [torch.from_numpy(d).to(dtype) for d in models(3, (40, 50))]
    exact = della([d.float().numpy() for d in deltas])
    assert torch.equal(della(deltas), torch.from_numpy(exact).to(dtype))


def test_refuses_probabilities_beyond_certainty() -> None:
    for density, epsilon in ((0.1, 0.1), (0.95, 0.1), ((0.5, 0.9), 0.2), (0.5, (0.1, 0.5))):
        with pytest.raises(RecipeError, match="must lie in"):
            Della(density=density, epsilon=epsilon)
    Della(density=(1.0, 0.5, 0.0), epsilon=0.4)
    with pytest.raises(RecipeError, match="epsilon has 3 values for 2 models"):
        della(models(2, (3,)), epsilon=[0.1, 0.1, 0.1])
