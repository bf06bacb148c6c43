"""NuSLERP: arcs of whole tensors, of rows and of columns, with and without a base."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from geometry_oracle import DTYPES, SHAPES, UNIT, assert_rounds_to, draw, exact

from weft.engine import chunks
from weft.errors import RecipeError
from weft.merge.nuslerp import METHODS, nuslerp
from weft.merge.slerp import slerp

MODES = {"whole": (True, False), "rows": (False, False), "columns": (False, True)}


def weights_of(u: np.ndarray, v: np.ndarray, t: float) -> tuple[float, float]:
    """Weights of both ends, one vector at a time, with the angle from the half-angle's tangent."""
    lengths = np.linalg.norm(u), np.linalg.norm(v)
    if u.size < 2 or not all(lengths):
        return 1 - t, t
    u, v = u / lengths[0], v / lengths[1]
    theta = 2 * np.arctan2(np.linalg.norm(u - v), np.linalg.norm(u + v))
    assert 1e-3 < theta < np.pi - 1e-3, "the line is tested elsewhere"
    return np.sin((1 - t) * theta) / np.sin(theta), np.sin(t * theta) / np.sin(theta)


def brute_force(a: np.ndarray, b: np.ndarray, t: float, mode: str) -> tuple[np.ndarray, np.ndarray]:
    """The point on each arc and the size of the terms that are added up."""
    shape = a.shape
    if mode == "whole" or a.ndim < 2:
        a, b = a.reshape(1, -1), b.reshape(1, -1)
    elif mode == "rows":
        a, b = a.reshape(-1, shape[-1]), b.reshape(-1, shape[-1])
    else:
        a, b = (x.reshape(shape[0], math.prod(shape[1:])).T for x in (a, b))
    result, scale = np.empty(a.shape), np.empty(a.shape)
    for i in range(len(a)):
        s0, s1 = weights_of(a[i], b[i], t)
        result[i], scale[i] = s0 * a[i] + s1 * b[i], abs(s0 * a[i]) + abs(s1 * b[i])
    if mode == "columns" and len(shape) >= 2:
        result, scale = result.T, scale.T
    return result.reshape(shape), scale.reshape(shape)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("mode", MODES)
def test_brute_force(shape: tuple[int, ...], dtype: torch.dtype, mode: str) -> None:
    flatten, row_wise = MODES[mode]
    a, b = draw(shape, 2, dtype)
    result = nuslerp([a, b], weights=[3, 1], flatten=flatten, row_wise=row_wise)
    assert result.dtype == dtype
    assert_rounds_to(result, *brute_force(*exact([a, b]), 0.25, mode))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("mode", MODES)
def test_with_a_base_the_changes_are_merged(shape: tuple[int, ...], mode: str) -> None:
    flatten, row_wise = MODES[mode]
    base, a, b = draw(shape, 3)
    result = nuslerp([a, b], weights=[1, 3], base=base, flatten=flatten, row_wise=row_wise)
    z, x, y = exact([base, a, b])
    change, scale = brute_force(x - z, y - z, 0.75, mode)
    assert_rounds_to(result, z + change, scale + abs(z + change))


@pytest.mark.parametrize("size", [4, 64])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(13, 3, 5), (50, 7), (101,)])
def test_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], mode: str, size: int) -> None:
    flatten, row_wise = MODES[mode]
    tensors = draw(shape, 2)
    whole = nuslerp(tensors, flatten=flatten, row_wise=row_wise)
    monkeypatch.setattr(chunks, "CHUNK", size)
    # float64 sums may differ in their last bit, which the float32 weights see once in 2^29 cases
    torch.testing.assert_close(nuslerp(tensors, flatten=flatten, row_wise=row_wise), whole, rtol=2 * UNIT, atol=0)


def test_only_the_ratio_of_weights_counts() -> None:
    a, b = draw((5, 7), 2)
    assert torch.equal(nuslerp([a, b], weights=[2, 6]), nuslerp([a, b], weights=[0.25, 0.75]))
    assert torch.equal(nuslerp([a, b], weights=[2, 6]), slerp(a, b, 0.75))
    assert torch.equal(nuslerp([a, b], weights=[1, -1]), slerp(a, b, 0.5))
    assert torch.equal(nuslerp([a, b], weights=[0, 2]), b)
    assert torch.equal(nuslerp([a, b], weights=[3, -1]), slerp(a, b, -0.5))


@pytest.mark.parametrize("factor", [1, 3, -1, -3])
def test_parallel_and_opposite_models_are_joined_by_a_line(factor: float) -> None:
    (a,) = draw((6, 5), 1)
    for flatten, row_wise in MODES.values():
        result = nuslerp([a, factor * a], weights=[3, 1], flatten=flatten, row_wise=row_wise)
        torch.testing.assert_close(result, (0.75 + 0.25 * factor) * a, rtol=4 * UNIT, atol=4 * UNIT)


def test_a_row_of_zeros_is_orthogonal_and_harms_no_other_row() -> None:
    a, b = draw((4, 6), 2)
    a[1], b[2] = 0, 0
    a[3], b[3] = 0, 0
    result = nuslerp([a, b], flatten=False)
    torch.testing.assert_close(result[0], nuslerp([a[0], b[0]]))
    torch.testing.assert_close(result[1], b[1] * 0.5**0.5)
    torch.testing.assert_close(result[2], a[2] * 0.5**0.5)
    assert not result[3].any()


def test_takes_exactly_two_models() -> None:
    for count in (1, 3):
        with pytest.raises(RecipeError, match="exactly 2"):
            nuslerp(draw((3,), count))


def test_recipe_keys_are_those_of_mergekit() -> None:
    config = METHODS[0].configure({"weights": [1, 2], "nuslerp_flatten": False, "nuslerp_row_wise": True})
    assert not config.flatten
    assert config.row_wise
    assert METHODS[0].parameters["weights"].per_model == "weight"
