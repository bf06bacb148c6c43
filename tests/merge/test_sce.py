"""SCE against a step-by-step version in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from task_vector_oracles import SHAPES, close, elect, models

import weft.engine.chunks as chunks
from weft.errors import RecipeError
from weft.merge.sce import METHODS, sce


def by_steps(deltas: list[np.ndarray], select_topk: float, floor: float = 0.0) -> np.ndarray:
    exact = np.stack([d.astype(np.float64) for d in deltas])
    if select_topk < 1:
        variance = exact.var(axis=0).reshape(-1) * (exact != exact[0]).any(axis=0).reshape(-1)
        order = sorted(range(variance.size), key=lambda i: (-variance[i], i))
        chosen = np.zeros(variance.size, bool)
        chosen[order[: int(select_topk * np.count_nonzero(variance))]] = True
        exact = exact * chosen.reshape(exact.shape[1:])
    squares = (exact**2).reshape(len(deltas), -1).sum(axis=1) / max(deltas[0].size, 1)
    total = squares.sum()
    weights = list(squares / total) if total and total >= floor else [1 / len(deltas)] * len(deltas)
    return elect(list(exact), weights, True, 1, votes=[1] * len(deltas))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("select_topk", [0.0, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_equation(shape: tuple[int, ...], select_topk: float, count: int) -> None:
    deltas = [np.asarray((1 + i) * d) for i, d in enumerate(models(count, shape))]
    merged = sce(deltas, select_topk=select_topk)
    # a mean lies within the largest; a rounding for each weight, product and sum of two running sums, and the division
    magnitude = np.max(np.abs(deltas), axis=0)
    close(merged, by_steps(deltas, select_topk), 4 * count + 1, magnitude)


def test_weights_are_the_shares_of_the_squared_norms() -> None:
    deltas = [np.float32([3, 4, 0]), np.float32([0, 4, 3]), np.float32([0, 0, 5])]  # each of squared norm 25
    np.testing.assert_allclose(sce(deltas), [3, 4, 4], rtol=4 * 2.0**-24)
    deltas[0] *= 2  # of squared norm 100, out of 150
    np.testing.assert_allclose(sce(deltas), [6, 100 / 125 * 8 + 25 / 125 * 4, 4], rtol=4 * 2.0**-24)


def test_the_sign_is_elected_by_the_changes_themselves_not_by_their_weights() -> None:
    """The first model has nearly all the weight, yet is outvoted at the second element."""
    deltas = [np.float32([100, 1]), np.float32([0, -0.75]), np.float32([0, -0.75])]
    np.testing.assert_array_equal(sce(deltas), [100, -0.75])


def test_one_model_equal_models_and_no_change() -> None:
    (delta,) = models(1, (50,))
    np.testing.assert_array_equal(sce([delta]), delta)
    np.testing.assert_array_equal(sce([delta] * 4), delta)
    zero = np.zeros(5, np.float32)
    np.testing.assert_array_equal(sce([zero, zero]), zero)
    np.testing.assert_array_equal(sce([delta[:5], zero]), delta[:5])


@pytest.mark.parametrize("count", [2, 3, 5, 6, 7])
def test_elements_at_which_models_agree_exactly_are_never_selected(count: int) -> None:
    rng = np.random.default_rng(4)
    deltas = np.tile(rng.standard_normal(200).astype(np.float32), (count, 1))
    deltas[0, ::10] += 1
    selected = np.flatnonzero(sce(list(deltas), select_topk=0.999))
    assert len(selected) == 19
    assert not np.any(selected % 10)


def test_selects_exactly_the_share_of_the_differing_elements_lowest_index_first() -> None:
    deltas = [np.float32([1, 1, 1, 1, 1, 9]), np.float32([3, 3, 3, 1, 3, 9])]  # four differ, all by the same
    np.testing.assert_array_equal(np.flatnonzero(sce(deltas, select_topk=0.5)), [0, 1])
    np.testing.assert_array_equal(np.flatnonzero(sce(deltas, select_topk=0.8)), [0, 1, 2])


def test_each_tensor_is_weighed_by_itself() -> None:
    first, second = models(2, (9,)), models(2, (4, 5), seed=1)
    merged = sce([{"a": first[0], "b": second[0]}, {"a": first[1], "b": second[1]}], select_topk=0.5)
    np.testing.assert_array_equal(merged["a"], sce(first, select_topk=0.5))
    np.testing.assert_array_equal(merged["b"], sce(second, select_topk=0.5))


def test_small_fine_tunes_keep_their_weights_unless_there_is_a_floor() -> None:
    large, small = [np.float32(1e-4) * np.abs(m) * s for m, s in zip(models(2, (1000,)), (2, 1))]
    mean = (large + small) / 2
    np.testing.assert_allclose(sce([large, small], floor=1e-6), mean, rtol=4 * 2.0**-24)
    close(sce([large, small]), by_steps([large, small], 1), 9, large + small)
    assert np.max(np.abs(sce([large, small]) / mean - 1)) > 0.1
    assert METHODS[1].configure({}).floor == 1e-6


@pytest.mark.parametrize("select_topk", [0.3, 1.0])
@pytest.mark.parametrize("chunk", [4, 64])
def test_same_bits_at_any_chunking(chunk: int, select_topk: float, monkeypatch: pytest.MonkeyPatch) -> None:
    deltas = [np.float32(np.round(d * 16)) for d in models(3, (1031,))]  # tied, and squares are exact
    whole = sce(deltas, select_topk=select_topk)
    monkeypatch.setattr(chunks, "CHUNK", chunk)
    np.testing.assert_array_equal(sce(deltas, select_topk=select_topk), whole)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_merged_in_float32(dtype: torch.dtype) -> None:
    deltas = [torch.from_numpy(d).to(dtype) for d in models(3, (40, 50))]
    exact = sce([d.float().numpy() for d in deltas], select_topk=0.4)
    assert torch.equal(sce(deltas, select_topk=0.4), torch.from_numpy(exact).to(dtype))


def test_refuses_shares_beyond_the_whole() -> None:
    with pytest.raises(RecipeError, match="between 0 and 1"):
        sce(models(2, (3,)), select_topk=2)
