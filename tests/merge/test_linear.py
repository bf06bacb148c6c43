"""The weighted average: its equation, its edge cases, and the same bits whatever the chunking."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from task_vector_oracles import SHAPES, add_up, close, models

import weft.engine.chunks as chunks
from weft.errors import NonFiniteError, RecipeError, ShapeError
from weft.merge.linear import linear


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("normalize", [True, False])
def test_equation(shape: tuple[int, ...], normalize: bool) -> None:
    tensors, weights = models(3, shape), [0.5, 2.0, -0.75]
    merged = linear(tensors, weights=weights, normalize=normalize)
    # a rounding for each weight, product and sum
    magnitude = add_up([np.abs(t) for t in tensors], np.abs(weights), False, 1 / sum(weights) if normalize else 1)
    close(merged, add_up(tensors, weights, normalize, 1), 3 * 3, magnitude)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_sums_in_float32_and_rounds_once(dtype: torch.dtype) -> None:
    tensors = [torch.from_numpy(t).to(dtype) for t in models(3, (11, 13))]
    weights = [0.25, 0.5, 0.25]  # exact, and so are their products with bfloat16 and float16
    expected = tensors[0].float() * 0.25
    for tensor, weight in zip(tensors[1:], weights[1:]):
        expected += tensor.float() * weight
    merged = linear(tensors, weights=weights)
    assert merged.dtype == dtype
    assert torch.equal(merged, expected.to(dtype))


def test_one_model_and_equal_models_stay_as_they_are() -> None:
    (tensor,) = models(1, (9, 9))
    np.testing.assert_array_equal(linear([tensor], weights=3.0), tensor)
    np.testing.assert_array_equal(linear([tensor] * 4), tensor)


def test_weights_of_one_and_zero_choose_a_model() -> None:
    tensors = models(3, (33,))
    np.testing.assert_array_equal(linear(tensors, weights=[0, 1, 0]), tensors[1])


def test_state_dicts() -> None:
    tensors = models(4, (5,))
    merged = linear([{"a": tensors[0], "b": tensors[1]}, {"b": tensors[3], "a": tensors[2]}])
    np.testing.assert_array_equal(merged["a"], linear([tensors[0], tensors[2]]))
    np.testing.assert_array_equal(merged["b"], linear([tensors[1], tensors[3]]))


@pytest.mark.parametrize("chunk", [4, 64])
def test_same_bits_at_any_chunking(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = models(3, (1031,))
    whole = linear(tensors, weights=[1, 2, 3])
    monkeypatch.setattr(chunks, "CHUNK", chunk)
    np.testing.assert_array_equal(linear(tensors, weights=[1, 2, 3]), whole)


def test_refuses_what_has_no_average() -> None:
    tensors = models(2, (3,))
    with pytest.raises(RecipeError, match="sum to zero"):
        linear(tensors, weights=[1, -1])
    assert np.isfinite(linear(tensors, weights=[1, -1], normalize=False)).all()
    with pytest.raises(RecipeError, match="3 values for 2 models"):
        linear(tensors, weights=[1, 1, 1])
    with pytest.raises(ShapeError):
        linear([tensors[0], tensors[1][:2]])
    with pytest.raises(NonFiniteError, match="flat index 1"):
        linear([tensors[0], np.float32([0, np.nan, 0])])
