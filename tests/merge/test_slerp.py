"""Slerp: equal steps of angle on an arc."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from geometry_oracle import DTYPES, SHAPES, UNIT, assert_rounds_to, draw, exact

from weft.engine import chunks
from weft.engine.chunks import Inputs
from weft.errors import RecipeError
from weft.merge.slerp import METHODS, slerp


def angle(a: np.ndarray, b: np.ndarray) -> float:
    """Angle between two vectors, accurate for small and large ones."""
    u, v = a / np.linalg.norm(a), b / np.linalg.norm(b)
    return float(2 * np.arctan2(np.linalg.norm(u - v), np.linalg.norm(u + v)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("t", [0.3, -0.5, 1.2])
def test_brute_force(shape: tuple[int, ...], dtype: torch.dtype, t: float) -> None:
    base, other = draw(shape, 2, dtype)
    a, b = exact([base, other])
    result = slerp(base, other, t)
    assert result.dtype == dtype
    theta = angle(a, b) if a.size else 1.0
    if a.size < 2:  # one number has a direction, but no angle between 0 and 180 degrees
        s0, s1 = 1 - t, t
    else:
        assert 0.1 < theta < 3
        s0, s1 = np.sin((1 - t) * theta) / np.sin(theta), np.sin(t * theta) / np.sin(theta)
    assert_rounds_to(result, s0 * a + s1 * b, abs(s0 * a) + abs(s1 * b))


def test_models_of_one_length_keep_it_and_turn_evenly() -> None:
    a, b = exact(draw((41, 13), 2))
    a, b = (v * 3 / np.linalg.norm(v) for v in (a, b))
    theta = angle(a, b)
    for t in np.linspace(0, 1, 7):
        point = slerp(a.astype(np.float32), b.astype(np.float32), float(t)).astype(np.float64)
        # each element is rounded a few times, by at most UNIT of itself: so is the length, and the angle
        assert abs(np.linalg.norm(point) / 3 - 1) < 4 * UNIT
        assert abs(angle(a, point) - t * theta) < 4 * UNIT
        assert abs(angle(point, b) - (1 - t) * theta) < 4 * UNIT


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_ends_are_the_models(dtype: torch.dtype) -> None:
    base, other = draw((5, 7), 2, dtype)
    assert torch.equal(slerp(base, other, 0), base)
    assert torch.equal(slerp(base, other, 1), other)
    assert torch.equal(slerp(other, base, 0.25), slerp(base, other, 0.75))


@pytest.mark.parametrize(
    ("cosine", "straight"), [(0.9996, True), (0.9994, False), (-0.9996, True), (-0.9994, False), (1, True), (-1, True)]
)
def test_nearly_parallel_models_are_joined_by_a_line(cosine: float, straight: bool) -> None:
    a, b = np.float32([1, 0]), np.float32([cosine, np.sqrt(1 - cosine**2)])
    line = 0.75 * a + 0.25 * b
    result = slerp(a, b, 0.25)
    if straight:
        np.testing.assert_array_equal(result, line)
    else:
        assert np.abs(result - line).max() > 1e-5


def test_line_and_arc_differ_as_documented_at_the_threshold() -> None:
    theta = np.arccos(0.9995)
    s = np.sin(theta / 2) / np.sin(theta)
    assert 1.2e-4 < abs((s + s) * np.cos(theta / 2) - np.cos(theta / 2)) < 1.3e-4  # halfway, where it is largest


def test_zeros_count_as_orthogonal() -> None:
    b = np.float32([3, 4])
    np.testing.assert_allclose(slerp(np.zeros(2, np.float32), b, 1 / 3), b / 2, rtol=4 * UNIT)
    np.testing.assert_array_equal(slerp(np.zeros(2, np.float32), np.zeros(2, np.float32), 0.5), np.zeros(2))


def test_each_tensor_of_a_state_dict_has_its_own_arc() -> None:
    a = {"x": np.float32([1, 0]), "y": np.float32([1, 1])}
    b = {"x": np.float32([0, 1]), "y": np.float32([2, 2])}
    mixed = slerp(a, b, 0.5)
    np.testing.assert_allclose(mixed["x"], np.sqrt([0.5, 0.5]), rtol=4 * UNIT)
    np.testing.assert_array_equal(mixed["y"], [1.5, 1.5])


def test_every_chunk_is_read_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    original = Inputs.chunk
    monkeypatch.setattr(chunks, "CHUNK", 64)
    monkeypatch.setattr(
        Inputs, "chunk", lambda self, number, *rest: read.append(number) or original(self, number, *rest)
    )
    slerp(*draw((50, 4), 2), 0.5)
    assert sorted(read) == [0, 0, 1, 1, 2, 2, 3, 3]


def test_t_is_required_and_so_is_the_base() -> None:
    with pytest.raises(RecipeError, match="'t'"):
        METHODS[0].configure({})
    with pytest.raises(RecipeError, match="base"):
        METHODS[0].check_models(2, False)
