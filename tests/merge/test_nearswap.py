"""NearSwap: no weight moves farther than t."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from geometry_oracle import DTYPES, SHAPES, UNIT, assert_rounds_to, draw, exact

from weft.errors import RecipeError
from weft.merge.nearswap import METHODS, nearswap


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("t", [1e-7, 0.3])
def test_brute_force(shape: tuple[int, ...], dtype: torch.dtype, t: float) -> None:
    base, other = draw(shape, 2, dtype)
    a, b = exact([base, other])
    share = np.minimum(t / np.maximum(abs(a - b), 1e-6), 1)
    result = nearswap(base, other, t)
    assert result.dtype == dtype
    assert_rounds_to(result, share * b + (1 - share) * a, abs(a) + abs(b))


def test_moves_are_cut_at_t_and_keep_their_direction() -> None:
    base, other = draw((31, 17), 2)
    a, b, moved = exact([base, other, nearswap(base, other, 0.5)])
    limit = 8 * UNIT * (abs(a) + abs(b))
    assert (abs(abs(moved - a) - np.minimum(0.5, abs(b - a))) <= limit).all()
    assert (np.sign(moved - a) == np.sign(b - a))[abs(b - a) > limit].all()
    near = abs(b - a) < 0.499
    assert near.any()
    np.testing.assert_array_equal(moved[near], b[near])


def test_nothing_moves_at_zero_and_everything_arrives_far_out() -> None:
    base, other = draw((5, 7), 2)
    assert torch.equal(nearswap(base, other, 0), base)
    assert torch.equal(nearswap(base, other, 1e6), other)
    assert torch.equal(nearswap(base, base, 0.1), base)


def test_differences_below_a_millionth_move_in_proportion() -> None:
    base, other = np.zeros(2, np.float32), np.float32([2.0**-21, 2.0**-24])
    # share = t / 1e-6
    np.testing.assert_allclose(nearswap(base, other, 5e-7), other / 2, rtol=4 * UNIT)


def test_t_is_required_and_at_least_zero() -> None:
    with pytest.raises(RecipeError, match="'t'"):
        METHODS[0].configure({})
    with pytest.raises(RecipeError, match="between 0"):
        nearswap(np.zeros(1, np.float32), np.zeros(1, np.float32), -1)
