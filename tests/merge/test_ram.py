"""RAM and RAM+ against an element-by-element version."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from task_vector_oracles import SHAPES, close, models

import weft.engine.chunks as chunks
from weft.errors import RecipeError
from weft.merge.ram import METHODS, ram, ramplus


def by_element(deltas: list[np.ndarray], epsilon: float, scales: list[float]) -> np.ndarray:
    columns = np.stack([d.astype(np.float64).reshape(-1) for d in deltas], axis=1)
    result = np.zeros(len(columns))
    for i, column in enumerate(columns):
        changed = [(x, s) for x, s in zip(column, scales) if abs(x) > np.float32(epsilon)]
        if len(changed) == 1:
            result[i] = changed[0][0] * changed[0][1]
        elif changed:
            result[i] = sum(x for x, _ in changed) / len(changed)
    return result.reshape(deltas[0].shape)


def overlap_scales(deltas: list[np.ndarray], epsilon: float, r: float, alpha: float) -> list[float]:
    active = np.stack([np.abs(d.reshape(-1)) > np.float32(epsilon) for d in deltas])
    counts = active.sum(axis=0)
    result = []
    for row in active:
        unique, shared = int((row & (counts == 1)).sum()), int((row & (counts > 1)).sum())
        result.append(1 + r * min(shared / max(unique, 1), alpha))
    return result


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("epsilon", [0.0, 0.5, 2.0, 100.0])
def test_equations(shape: tuple[int, ...], count: int, epsilon: float) -> None:
    deltas = models(count, shape)
    magnitude = np.sum(np.abs(deltas), axis=0)
    # a rounding for each sum, the division, or the scale and its product
    close(ram(deltas, epsilon=epsilon), by_element(deltas, epsilon, [1] * count), count + 1, magnitude)
    scales = overlap_scales(deltas, epsilon, 0.7, 0.9)
    merged = ramplus(deltas, epsilon=epsilon, r=0.7, alpha=0.9)
    close(merged, by_element(deltas, epsilon, scales), count + 2, 2 * magnitude)


def test_disjoint_fine_tunes_are_all_kept_whole() -> None:
    deltas = [np.float32([1, 0, 0, 0]), np.float32([0, -2, 0, 0]), np.float32([0, 0, 3, 0])]
    np.testing.assert_array_equal(ram(deltas), [1, -2, 3, 0])
    np.testing.assert_array_equal(ramplus(deltas), [1, -2, 3, 0])  # nothing overlaps, so nothing is enlarged


def test_equal_models_are_one_model() -> None:
    (delta,) = models(1, (60,))
    np.testing.assert_array_equal(ram([delta] * 4), delta)
    np.testing.assert_array_equal(ramplus([delta] * 4), delta)


def test_the_threshold_itself_is_no_change() -> None:
    delta = np.float32([1e-5, -1e-5, 1.1e-5, 0])
    np.testing.assert_array_equal(ram([delta]), np.float32([0, 0, 1.1e-5, 0]))


def test_overlap_is_clipped() -> None:
    deltas = [np.float32([1, 1, 1, 1, 4]), np.float32([1, 1, 1, 1, 0])]  # four shared, one unique
    np.testing.assert_allclose(ramplus(deltas, r=0.5, alpha=10), [1, 1, 1, 1, 4 * 3], rtol=2.0**-23)
    np.testing.assert_allclose(ramplus(deltas, r=0.5, alpha=0.5), [1, 1, 1, 1, 4 * 1.25], rtol=2.0**-23)
    np.testing.assert_array_equal(ramplus(deltas, r=0), ram(deltas))
    np.testing.assert_array_equal(ramplus(deltas, alpha=0), ram(deltas))


def test_overlap_counts_over_the_model_or_over_each_tensor() -> None:
    one = {"a": np.float32([1, 1]), "b": np.float32([1, 0])}
    two = {"a": np.float32([1, 0]), "b": np.float32([0, 0])}
    of_model = ramplus([one, two], r=1, alpha=10)  # one shared, two unique
    assert of_model["a"].tolist() == [1, 1.5]
    assert of_model["b"].tolist() == [1.5, 0]
    of_tensor = ramplus([one, two], r=1, alpha=10, scope="tensor")  # one and one in a, none and one in b
    assert of_tensor["a"].tolist() == [1, 2]
    assert of_tensor["b"].tolist() == [1, 0]


def test_rows_have_their_scopes() -> None:
    scopes = {row.name: row.configure({}).scope for row in METHODS if row.name != "ram"}
    assert scopes == {"ramplus": "model", "ramplus_tl": "tensor"}


@pytest.mark.parametrize("chunk", [4, 64])
def test_same_bits_at_any_chunking(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    deltas = models(3, (2051,))
    whole = ram(deltas, epsilon=0.5), ramplus(deltas, epsilon=0.5)
    monkeypatch.setattr(chunks, "CHUNK", chunk)
    np.testing.assert_array_equal(ram(deltas, epsilon=0.5), whole[0])
    np.testing.assert_array_equal(ramplus(deltas, epsilon=0.5), whole[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_merged_in_float32(dtype: torch.dtype) -> None:
    deltas = [torch.from_numpy(d).to(dtype) for d in models(3, (40, 50))]
    exact = ramplus([d.float().numpy() for d in deltas], epsilon=0.5)
    assert torch.equal(ramplus(deltas, epsilon=0.5), torch.from_numpy(exact).to(dtype))


def test_refuses_negative_thresholds() -> None:
    with pytest.raises(RecipeError, match="between 0"):
        ram(models(2, (3,)), epsilon=-1)
