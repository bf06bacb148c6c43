"""WiSE-FT: the straight line through two models."""

from __future__ import annotations

from itertools import count, islice

import numpy as np
import pytest
import torch
from geometry_oracle import DTYPES, SHAPES, assert_rounds_to, draw, exact

from weft.errors import RecipeError, ShapeError
from weft.merge.wise_ft import METHODS, interpolation_path, wise_ft


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("alpha", [0.3, -0.5, 1.7])
def test_brute_force(shape: tuple[int, ...], dtype: torch.dtype, alpha: float) -> None:
    base, tuned = draw(shape, 2, dtype)
    a, b = exact([base, tuned])
    result = wise_ft(base, tuned, alpha=alpha)
    assert result.dtype == dtype
    assert_rounds_to(result, (1 - alpha) * a + alpha * b, abs((1 - alpha) * a) + abs(alpha * b))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_ends_are_the_models(dtype: torch.dtype) -> None:
    base, tuned = draw((5, 7), 2, dtype)
    assert torch.equal(wise_ft(base, tuned, alpha=0), base)
    assert torch.equal(wise_ft(base, tuned, alpha=1), tuned)


def test_a_linear_model_on_the_path_is_the_ensemble_of_its_ends() -> None:
    random = np.random.default_rng(0)
    x = random.integers(-8, 9, (6, 5)).astype(np.float64)
    base, tuned = (
        {n: random.integers(-8, 9, s).astype(np.float32) for n, s in {"w": (5, 3), "b": (3,)}.items()} for _ in "ab"
    )

    def output(state: dict[str, np.ndarray]) -> np.ndarray:
        return x @ state["w"] + state["b"]

    for alpha, mix in interpolation_path(base, tuned, [0, 0.25, 0.5, 1, 2]):
        # small integers and quarters: nothing is rounded
        np.testing.assert_array_equal(output(mix), (1 - alpha) * output(base) + alpha * output(tuned))


def test_extrapolation_undoes_interpolation() -> None:
    base, tuned = np.float32([0, 4, -8]), np.float32([4, 8, 0])
    half = wise_ft(base, tuned)
    np.testing.assert_array_equal(half, [2, 6, -4])
    np.testing.assert_array_equal(wise_ft(base, half, alpha=2), tuned)


def test_the_path_is_computed_as_it_is_asked_for() -> None:
    path = interpolation_path(np.zeros(2, np.float32), np.ones(2, np.float32), count())
    assert [(alpha, mix[1]) for alpha, mix in islice(path, 3)] == [(0, 0), (1, 1), (2, 2)]
    broken = interpolation_path(np.zeros(2, np.float32), np.ones(3, np.float32), [0])
    with pytest.raises(ShapeError):
        next(broken)


def test_needs_a_base_and_one_model() -> None:
    row = METHODS[0]
    row.check_models(1, True)
    with pytest.raises(RecipeError, match="base"):
        row.check_models(1, False)
    with pytest.raises(RecipeError, match="exactly 1"):
        row.check_models(2, True)
