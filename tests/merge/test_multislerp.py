"""Multi-SLERP: mean direction times mean length."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from geometry_oracle import DTYPES, SHAPES, UNIT, assert_rounds_to, draw, exact

from weft.errors import RecipeError
from weft.merge.multislerp import multislerp
from weft.merge.slerp import slerp

WEIGHTS = (1.0, 0.5, 2.5)


def with_the_tangent_step(vectors: list[np.ndarray], weights: np.ndarray, eps: float = 1e-8) -> np.ndarray:
    """The full construction: mean direction, logarithms there, their mean, exponential, mean length."""
    lengths = np.array([np.linalg.norm(v) for v in vectors])
    units = [v / (n + eps) for v, n in zip(vectors, lengths)]
    mean = sum(w * u for w, u in zip(weights, units))
    mean = mean / np.linalg.norm(mean)
    tangent = sum(w * (u - np.sum(u * mean) * mean) for w, u in zip(weights, units))
    length = np.linalg.norm(tangent) + eps
    point = mean * np.cos(length) + tangent * np.sin(length) / length
    return point * (weights @ lengths)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [s for s in SHAPES if s not in [(), (1,), (0, 4)]])
@pytest.mark.parametrize("normalize", [True, False])
def test_the_tangent_step_changes_nothing(shape: tuple[int, ...], dtype: torch.dtype, normalize: bool) -> None:
    tensors = draw(shape, 3, dtype)
    weights = np.array(WEIGHTS)
    result = multislerp(tensors, weights=WEIGHTS, normalize_weights=normalize)
    assert result.dtype == dtype
    vectors = exact(tensors)
    expected = with_the_tangent_step(vectors, weights / weights.sum() if normalize else weights)
    assert_rounds_to(result, expected, sum(map(abs, vectors)) * WEIGHTS[-1] * len(WEIGHTS))


def test_with_a_base_the_changes_are_merged() -> None:
    base, *tensors = draw((5, 7), 4)
    zero, *vectors = exact([base, *tensors])
    expected = zero + with_the_tangent_step([v - zero for v in vectors], np.full(3, 1 / 3))
    assert_rounds_to(multislerp(tensors, base=base), expected, sum(map(abs, vectors)) + abs(zero))


def test_two_models_of_one_length_meet_in_the_middle_of_their_arc() -> None:
    a, b = exact(draw((5, 7), 2))
    a, b = (torch.from_numpy(v / np.linalg.norm(v)).float() for v in (a, b))
    # the lengths are 1 up to their own rounding, which moves the middle by as much
    torch.testing.assert_close(multislerp([a, b]), slerp(a, b, 0.5), rtol=0, atol=4 * UNIT)


def test_lengths_are_averaged() -> None:
    tensors = draw((5, 7), 3)
    lengths = [np.linalg.norm(v) for v in exact(tensors)]
    mean = np.average(lengths, weights=WEIGHTS)
    assert abs(multislerp(tensors, weights=WEIGHTS).double().norm().item() / mean - 1) < 8 * UNIT


@pytest.mark.parametrize("shape", SHAPES)
def test_one_model_is_itself(shape: tuple[int, ...]) -> None:
    (tensor,) = draw(shape, 1)
    assert torch.equal(multislerp([tensor], weights=3), tensor)
    assert torch.equal(multislerp([tensor], weights=-3, normalize_weights=False), tensor)


def test_numbers_have_a_sign_for_a_direction() -> None:
    assert multislerp([torch.tensor(2.0), torch.tensor(4.0)]).item() == pytest.approx(3, rel=1e-7)
    # signs +, +, -: the mean direction is +, the mean length 3
    assert multislerp([torch.tensor(2.0), torch.tensor(4.0), torch.tensor(-3.0)]).item() == pytest.approx(3, rel=1e-7)


def test_two_that_cancel_are_averaged_and_three_are_refused_by_name() -> None:
    a = torch.tensor([3.0, 4.0])
    torch.testing.assert_close(multislerp([a, -2 * a], weights=[1, 1]), -0.5 * a, rtol=0, atol=4 * UNIT)
    triangle = [torch.tensor([np.cos(k), np.sin(k)], dtype=torch.float32) for k in (0, 2 * np.pi / 3, 4 * np.pi / 3)]
    with pytest.raises(RecipeError, match="layer"):
        multislerp([{"layer": t} for t in [a, -a, torch.zeros(2)]])
    # not quite a triangle in float32: a mean direction is left, and the result is finite
    assert torch.isfinite(multislerp(triangle, eps=0)).all()


def test_a_tensor_that_no_model_changed_stays() -> None:
    base = torch.tensor([1.0, 2.0])
    assert torch.equal(multislerp([base, base, base], base=base), base)


def test_weights_that_sum_to_zero_are_refused_only_where_they_are_divided() -> None:
    a, b = draw((3,), 2)
    with pytest.raises(RecipeError, match="sum to zero"):
        multislerp([a, b], weights=[1, -1])
    assert torch.isfinite(multislerp([a, b], weights=[1, -1], normalize_weights=False)).all()
