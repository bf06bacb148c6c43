"""TIES against an element-by-element version: trimming to exact counts, election, disjoint mean."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from task_vector_oracles import SHAPES, close, elect, models, top

import weft.engine.chunks as chunks
from weft.engine.merging import merge_tensors
from weft.errors import RecipeError
from weft.merge.ties import METHODS, Ties, ties

WEIGHTS = [0.5, 2.0, 0.75]


def trim(delta: np.ndarray, density: float) -> np.ndarray:
    return np.where(top(delta, int(density * delta.size)), delta, np.float32(0))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("normalize", [True, False])
def test_equation(shape: tuple[int, ...], density: float, normalize: bool) -> None:
    deltas = models(3, shape)
    merged = ties(deltas, weights=WEIGHTS, density=density, normalize=normalize, lambda_=1.5)
    trimmed = [trim(d, density) for d in deltas]
    magnitude = elect([np.abs(t) for t in trimmed], WEIGHTS, False, 1.5)
    magnitude = magnitude / (min(WEIGHTS) if normalize else 1)
    # a rounding for each weight, product and sum of two running sums, the division and the scale
    close(merged, elect(trimmed, WEIGHTS, normalize, 1.5), 3 * 4 + 2, magnitude)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_merged_in_float32(dtype: torch.dtype) -> None:
    """16-bit changes have few magnitudes, so nearly every threshold is tied."""
    deltas = [torch.from_numpy(d).to(dtype) for d in models(3, (40, 50))]
    merged = ties(deltas, density=0.25)
    exact = ties([d.float().numpy() for d in deltas], density=0.25)
    assert torch.equal(merged, torch.from_numpy(exact).to(dtype))
    trimmed = [trim(d.float().numpy(), 0.25) for d in deltas]
    close(exact, elect(trimmed, [1, 1, 1], True, 1), 3 * 4 + 2, sum(np.abs(t) for t in trimmed))


@pytest.mark.parametrize("density", [0.0, 0.2, 1 / 3, 0.5, 0.999, 1.0])
@pytest.mark.parametrize("values", ["normal", "tied"])
def test_keeps_exactly_the_share(density: float, values: str) -> None:
    rng = np.random.default_rng(3)
    delta = rng.standard_normal(1000) if values == "normal" else rng.integers(1, 4, 1000)
    assert np.count_nonzero(ties([delta.astype(np.float32)], density=density)) == int(density * 1000)


def test_equal_magnitudes_are_kept_lowest_index_first() -> None:
    delta = np.float32([1, -2, 2, 1, -2, 2, 0.5])
    np.testing.assert_array_equal(ties([delta], density=3 / 7), [0, -2, 2, 0, -2, 0, 0])
    np.testing.assert_array_equal(ties([delta], density=5 / 7), [1, -2, 2, 0, -2, 2, 0])


def test_one_model_that_is_kept_whole_is_unchanged() -> None:
    (delta,) = models(1, (6, 7))
    np.testing.assert_array_equal(ties([delta], density=1), delta)
    np.testing.assert_array_equal(ties([delta] * 4, density=1), delta)


def test_sign_election_is_invariant_to_the_order_of_models() -> None:
    deltas = [np.float32(np.round(d * 64)) for d in models(4, (200,))]  # whole numbers: sums are exact
    forward = ties(deltas, density=0.7, normalize=False)
    np.testing.assert_array_equal(ties(deltas[::-1], density=0.7, normalize=False), forward)


def test_a_tie_of_signs_is_positive() -> None:
    np.testing.assert_array_equal(ties([np.float32([2, -3]), np.float32([-2, 3])], density=1), [2, 3])


def test_negative_weights_vote_and_add_against() -> None:
    deltas, weights = models(3, (101,)), [1.0, -0.5, 0.25]
    expected = elect(deltas, weights, False, 1)
    close(ties(deltas, weights=weights, density=1, normalize=False), expected, 14, sum(np.abs(d) for d in deltas))


def test_each_model_has_its_own_density() -> None:
    deltas = models(2, (50,))
    merged = ties(deltas, density=[0.1, 0.6], normalize=False)
    close(merged, elect([trim(deltas[0], 0.1), trim(deltas[1], 0.6)], [1, 1], False, 1), 14, np.abs(deltas).sum(0))


def test_the_share_counts_over_the_model_or_over_each_tensor() -> None:
    """Of equal magnitudes in several tensors, those of the first are kept."""
    state = {"large": np.full(10, 2, np.float32), "small": np.ones(10, np.float32), "scalar": np.ones((), np.float32)}
    of_model = ties([state], density=13 / 21)
    assert {n: np.count_nonzero(v) for n, v in of_model.items()} == {"large": 10, "small": 3, "scalar": 0}
    np.testing.assert_array_equal(of_model["small"], [1, 1, 1, 0, 0, 0, 0, 0, 0, 0])
    of_tensor = ties([state], density=0.25, scope="tensor")
    assert {n: np.count_nonzero(v) for n, v in of_tensor.items()} == {"large": 2, "small": 2, "scalar": 1}
    assert not any(np.any(v) for v in ties([state], density=0, scope="tensor").values())


@pytest.mark.parametrize("chunk", [4, 64])
@pytest.mark.parametrize("scope", ["model", "tensor"])
def test_same_bits_at_any_chunking(chunk: int, scope: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tied = [
        {"a": np.round(a * 4), "b": b, "c": c} for a, b, c in zip(*(models(3, s, 7) for s in ((41, 7), (513,), ())))
    ]
    whole = ties(tied, density=0.3, weights=WEIGHTS, scope=scope)
    monkeypatch.setattr(chunks, "CHUNK", chunk)
    for name, value in ties(tied, density=0.3, weights=WEIGHTS, scope=scope).items():
        np.testing.assert_array_equal(value, whole[name])


def test_with_a_base_differences_are_taken_and_added_back() -> None:
    base, *fine_tunes = [np.float32(np.round(m * 64)) for m in models(4, (77,))]
    merged = merge_tensors(METHODS[0], fine_tunes, Ties(density=0.5, normalize=False), base=base)
    np.testing.assert_array_equal(merged, base + ties([f - base for f in fine_tunes], density=0.5, normalize=False))
    np.testing.assert_array_equal(merge_tensors(METHODS[0], [base, base], Ties(), base=base), base)


def test_refuses_shares_beyond_the_whole() -> None:
    with pytest.raises(RecipeError, match="between 0 and 1"):
        ties(models(2, (3,)), density=1.5)
    with pytest.raises(RecipeError, match="density has 3 values for 2 models"):
        ties(models(2, (3,)), density=[0.1, 0.2, 0.3])
