"""DARE: what is dropped is chance, what is merged is arithmetic on the same masks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from task_vector_oracles import SHAPES, add_up, close, elect, models

import weft.engine.chunks as chunks
from weft.engine.merging import merge_tensors
from weft.errors import RecipeError
from weft.kernels.random import Stream
from weft.merge.dare import METHODS, Dare, dare

WEIGHTS = [0.5, 2.0, 0.75]
ROWS = {row.name: row for row in METHODS}


def masks(method: str, density: float, shape: tuple[int, ...], count: int, seed: int = 0) -> list[np.ndarray]:
    """What the random streams of ``method`` keep."""
    size = int(np.prod(shape))
    stream = Stream(seed, method, "tensor")
    return [(stream.uniform(0, size, lane) < np.float32(density)).reshape(shape) for lane in range(count)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("elects", [True, False])
@pytest.mark.parametrize("normalize", [True, False])
def test_equation(shape: tuple[int, ...], density: float, elects: bool, normalize: bool) -> None:
    deltas = models(3, shape)
    merged = dare(deltas, weights=WEIGHTS, density=density, elect=elects, normalize=normalize, lambda_=1.5)
    kept = masks("dare_ties" if elects else "dare_linear", density, shape, 3)
    dropped = [np.where(m, d, 0) / (density or 1) for d, m in zip(deltas, kept)]
    magnitude = add_up([np.abs(d) for d in dropped], WEIGHTS, False, 1.5) / (min(WEIGHTS) if normalize else 1)
    oracle = elect if elects else add_up
    # a rounding for each weight, scaling, product and sum of two running sums, the division and the scale
    close(merged, oracle(dropped, WEIGHTS, normalize, 1.5), 3 * 5 + 2, magnitude)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("elects", [True, False])
def test_mergekit_rows_keep_the_norm_of_each_tensor(shape: tuple[int, ...], elects: bool) -> None:
    deltas = models(3, shape)
    merged = dare(deltas, weights=WEIGHTS, density=0.4, elect=elects, match_norm=True)
    dropped = []
    for delta, mask in zip(deltas, masks("mergekit/dare_ties" if elects else "mergekit/dare_linear", 0.4, shape, 3)):
        kept = np.where(mask, delta, 0).astype(np.float64)
        dropped.append(kept * np.abs(delta.astype(np.float64)).sum() / (np.abs(kept).sum() or 1))
    oracle = elect if elects else add_up
    magnitude = add_up([np.abs(d) for d in dropped], WEIGHTS, False, 1)
    close(merged, oracle(dropped, WEIGHTS, False, 1), 3 * 5 + 2, magnitude)


def test_one_model_keeps_its_norm() -> None:
    (delta,) = models(1, (301, 7))
    merged = dare([delta], density=0.2, match_norm=True)
    norm = np.abs(delta.astype(np.float64)).sum()
    # each of the kept elements is rounded twice, the scale once
    assert abs(np.abs(merged.astype(np.float64)).sum() - norm) <= 3 * 2.0**-24 * norm


def test_changes_next_to_nothing_are_not_rescaled() -> None:
    delta = np.full(8, 1e-9, np.float32)
    merged = dare([delta], density=0.5, match_norm=True, seed=3)
    assert set(merged) == {np.float32(0), np.float32(1e-9)}


@pytest.mark.parametrize("density", [0.05, 0.5, 0.9])
@pytest.mark.parametrize("match_norm", [True, False])
def test_keeps_the_share_in_expectation(density: float, match_norm: bool) -> None:
    n = 100_000
    kept = np.count_nonzero(dare([np.ones(n, np.float32)], density=density, match_norm=match_norm))
    assert abs(kept - n * density) < 5 * np.sqrt(n * density * (1 - density))  # five standard deviations


def test_masks_of_models_tensors_and_seeds_are_independent() -> None:
    n, density = 100_000, 0.3
    ones = np.ones(n, np.float32)
    runs = [dare([ones], density=density, rescale=False, seed=s, name=t) for s, t in ((0, "a"), (1, "a"), (0, "b"))]
    runs += [dare([0 * ones, ones], density=density, rescale=False, seed=0, name="a")]
    expected, deviation = n * density**2, np.sqrt(n * density**2 * (1 - density**2))
    for i in range(4):
        for j in range(i):
            assert abs(np.count_nonzero(runs[i] * runs[j]) - expected) < 5 * deviation


def test_expectation_is_the_change_itself() -> None:
    (delta,) = models(1, (64,))
    seeds = 400
    mean = sum(dare([delta], density=0.25, seed=s).astype(np.float64) for s in range(seeds)) / seeds
    deviation = np.abs(delta) * np.sqrt((1 - 0.25) / 0.25 / seeds)
    assert np.all(np.abs(mean - delta) < 5 * deviation)


def test_keeping_everything_is_task_arithmetic_and_draws_nothing() -> None:
    deltas = models(2, (33,))
    for match_norm in (True, False):
        np.testing.assert_array_equal(dare(deltas, density=1, match_norm=match_norm), deltas[0] + deltas[1])


def test_each_model_has_its_own_density() -> None:
    ones, other = np.ones(1000, np.float32), np.full(1000, 10, np.float32)
    merged = dare([ones, other], density=[1, 0], rescale=False)
    np.testing.assert_array_equal(merged, ones)


def test_rescale_off_leaves_values_alone() -> None:
    (delta,) = models(1, (500,))
    for match_norm in (True, False):
        merged = dare([delta], density=0.5, rescale=False, match_norm=match_norm)
        np.testing.assert_array_equal(merged[merged != 0], delta[merged != 0])


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("chunk", [4, 64])
def test_same_bits_at_any_chunking(name: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    row = ROWS[name]
    deltas = [np.float32(np.round(d * 64)) for d in models(3, (1031,))]  # whole numbers: norms are exact
    config = row.configure({"density": 0.4, "weights": WEIGHTS})
    whole = merge_tensors(row, deltas, config, are_deltas=True)
    monkeypatch.setattr(chunks, "CHUNK", chunk)
    np.testing.assert_array_equal(merge_tensors(row, deltas, config, are_deltas=True), whole)


def test_defaults_are_the_paper_s_and_mergekit_s() -> None:
    paper, mergekit = ROWS["dare_ties"].configure({}), ROWS["mergekit/dare_ties"].configure({})
    assert (paper.density, paper.elect, paper.normalize) == (0.1, True, True)
    assert (mergekit.density, mergekit.elect, mergekit.normalize, mergekit.rescale) == (1, True, False, True)
    assert not ROWS["dare_linear"].configure({}).elect


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_merged_in_float32(dtype: torch.dtype) -> None:
    deltas = [torch.from_numpy(d).to(dtype) for d in models(3, (40, 50))]
    exact = dare([d.float().numpy() for d in deltas], density=0.3, elect=True)
    assert torch.equal(dare(deltas, density=0.3, elect=True), torch.from_numpy(exact).to(dtype))


def test_files_and_tensors_draw_the_same_masks() -> None:
    base, *fine_tunes = models(3, (77,))
    deltas = [f - base for f in fine_tunes]
    for row, elects in ((ROWS["dare_linear"], False), (ROWS["dare_ties"], True)):
        merged = merge_tensors(row, fine_tunes, Dare(density=0.5, elect=elects), base=base, seed=5, name="w")
        np.testing.assert_array_equal(merged, base + dare(deltas, density=0.5, elect=elects, seed=5, name="w"))


def test_refuses_shares_beyond_the_whole() -> None:
    with pytest.raises(RecipeError, match="between 0 and 1"):
        dare(models(2, (3,)), density=-0.1)
