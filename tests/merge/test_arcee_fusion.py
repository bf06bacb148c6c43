"""Arcee Fusion: which elements are chosen, and that nothing but a choice is made."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from geometry_oracle import DTYPES, draw

from weft.engine import chunks
from weft.errors import RecipeError
from weft.merge.arcee_fusion import METHODS, arcee_fusion

SHAPES = [(1,), (2,), (3,), (4,), (5,), (8,), (3, 2), (5, 7), (2, 3, 5), (40, 31), (70, 2003)]


def importance(base: np.ndarray, tuned: np.ndarray) -> np.ndarray:
    """Of each element, in float64, row by row."""
    result = np.empty(base.shape)
    for index in np.ndindex(base.shape[:-1]):
        p, q = (np.exp(v - v.max()) / np.exp(v - v.max()).sum() + 1e-8 for v in (tuned[index], base[index]))
        result[index] = abs(tuned[index] - base[index]) * max(np.sum(p * np.log(p / q)), 0)
    return result


def threshold(values: np.ndarray, method: str) -> float:
    """Median plus one and a half times the distance between the quartiles."""
    low, middle, high = np.quantile(values, [0.25, 0.5, 0.75], method=method)
    return float(middle + 1.5 * (high - low))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", ["linear", "lower"])
def test_brute_force(shape: tuple[int, ...], dtype: torch.dtype, method: str) -> None:
    base, tuned = draw(shape, 2, dtype)
    a, b = base.double().numpy(), tuned.double().numpy()
    values = importance(a, b)
    limit = threshold(values, method)
    result = arcee_fusion(base, tuned, quantiles=method)
    assert result.dtype == dtype
    taken = (result == tuned).numpy() & (base != tuned).numpy()
    assert (taken | (result == base).numpy()).all(), "an element is neither the one nor the other"
    # importance is rounded to float32 two or three times: an element this near to the threshold may fall either way
    sure = abs(values - limit) > 1e-6 * limit
    assert sure.sum() >= values.size - 3
    np.testing.assert_array_equal(taken[sure], (values > limit)[sure] & (a != b)[sure])


def test_quartiles_mix_their_neighbours_or_take_the_lower() -> None:
    base = np.zeros((1, 6), np.float32)
    tuned = np.float32([[0, 1, 2, 3, 4, 10]])
    # importance is proportional to 0 1 2 3 4 10. linear: 2.5 + 1.5 (3.75 - 1.25) = 6.25; lower: 2 + 1.5 (3 - 1) = 5
    tuned_near = np.float32([[0, 1, 2, 3, 4, 5.5]])  # importance 5.5 lies between the two thresholds
    assert arcee_fusion(base, tuned)[0].tolist() == [0, 0, 0, 0, 0, 10]
    assert not arcee_fusion(base, tuned_near).any()
    assert arcee_fusion(base, tuned_near, quantiles="lower")[0, 5] == 5.5


def test_probabilities_have_a_floor() -> None:
    """Without it, a row whose likeliest element had probability e^-60 would outweigh all others."""
    base, tuned = (40 * t for t in draw((30, 20), 2))
    a, b = base.double().numpy(), tuned.double().numpy()
    values = importance(a, b)
    taken = (arcee_fusion(base, tuned) == tuned).numpy()
    limit = threshold(values, "linear")
    assert (abs(values - limit) > 1e-6 * limit).all()
    np.testing.assert_array_equal(taken, values > limit)


@pytest.mark.parametrize("size", [4, 64])
def test_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    base, tuned = draw((50, 7), 2)
    whole = arcee_fusion(base, tuned)
    monkeypatch.setattr(chunks, "CHUNK", size)
    assert torch.equal(arcee_fusion(base, tuned), whole)


def test_a_row_whose_distribution_is_unchanged_has_no_importance() -> None:
    base, tuned = draw((8, 16), 2)
    shifted = base.clone()
    shifted[3] += 1  # softmax does not see a constant
    shifted[5] = tuned[5]
    fused = arcee_fusion(base, shifted)
    assert torch.equal(fused[3], shifted[3]), "with a threshold of 0 everything is taken"
    tuned[3] = base[3] + 1
    assert torch.equal(arcee_fusion(base, tuned)[3], base[3])


def test_three_quarters_unchanged_take_the_fine_tune_in_full() -> None:
    base = torch.zeros(4, 8)
    tuned = base.clone()
    tuned[0] = torch.arange(8.0)
    assert torch.equal(arcee_fusion(base, tuned), tuned)


@pytest.mark.parametrize("shape", [(), (1,), (4, 1), (3, 4)])
def test_identical_models_and_rows_of_one_element(shape: tuple[int, ...]) -> None:
    base, tuned = draw(shape, 2)
    assert torch.equal(arcee_fusion(base, base), base)
    if not shape or shape[-1] == 1:  # the softmax of one number is 1: no row differs, the threshold is 0
        assert torch.equal(arcee_fusion(base, tuned), tuned)


def test_close_models_are_told_apart() -> None:
    """The divergence of rows that differ by 1e-4 is about 1e-9: less than the rounding of one float32 logarithm."""
    base, noise = draw((20, 50), 2)
    tuned = base + 1e-4 * noise
    a, b = base.double().numpy(), tuned.double().numpy()
    values = importance(a, b)
    assert 0 < np.max(values / np.maximum(abs(a - b), 1e-12)) < 1e-7
    taken = (arcee_fusion(base, tuned) == tuned).numpy()
    assert 10 < taken.sum() < 500
    np.testing.assert_array_equal(taken & (a != b), (values >= threshold(values, "linear")) & (a != b))


def test_empty_tensors_and_large_logits() -> None:
    assert arcee_fusion(torch.zeros(0, 4), torch.zeros(0, 4)).shape == (0, 4)
    assert arcee_fusion(torch.zeros(4, 0), torch.zeros(4, 0)).shape == (4, 0)
    base, tuned = draw((4, 9), 2)
    assert torch.isfinite(arcee_fusion(base * 1e6, tuned * 1e6)).all()


def test_mergekits_row_takes_lower_quantiles() -> None:
    assert METHODS[1].configure({}).quantiles == "lower"
    with pytest.raises(RecipeError, match="linear, lower"):
        METHODS[0].configure({"quantiles": "nearest"})
