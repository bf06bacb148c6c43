"""Karcher mean: the point of the sphere where the pulls of all models cancel."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from geometry_oracle import DTYPES, SHAPES, UNIT, assert_rounds_to, draw, exact

from weft.errors import RecipeError
from weft.merge.karcher import METHODS, barycentre, karcher
from weft.merge.slerp import slerp

WEIGHTS = np.array([1.0, 0.5, 2.5, 1.0])


def logarithm(mean: np.ndarray, point: np.ndarray) -> np.ndarray:
    """The tangent vector at ``mean`` that leads to ``point``, both of length 1."""
    across = point - np.sum(mean * point) * mean
    sine = np.linalg.norm(across)
    return across * np.arctan2(sine, np.sum(mean * point)) / sine if sine > 0 else across


def slow(vectors: list[np.ndarray], weights: np.ndarray) -> np.ndarray:
    """Short steps in the space of the weights themselves, ten times as many as are needed."""
    lengths = np.array([np.linalg.norm(v) for v in vectors])
    units = [v / n for v, n in zip(vectors, lengths)]
    weights = weights / weights.sum()
    mean = units[0]
    for _ in range(200):
        step = 0.7 * sum(w * logarithm(mean, u) for w, u in zip(weights, units))
        size = np.linalg.norm(step)
        mean = np.cos(size) * mean + (np.sin(size) / size * step if size > 0 else 0)
        mean = mean / np.linalg.norm(mean)
    return mean * (weights @ lengths)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3,), (5, 7), (2, 3, 5), (17, 11)])
def test_brute_force(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensors = draw(shape, 4, dtype)
    vectors = exact(tensors)
    result = karcher(tensors, weights=list(WEIGHTS))
    assert result.dtype == dtype
    assert_rounds_to(result, slow(vectors, WEIGHTS), sum(map(abs, vectors)))


def test_several_chunks_and_lengths() -> None:
    tensors = draw((70, 2003), 3)
    vectors = exact(tensors)
    result = karcher(tensors, weights=list(WEIGHTS[:3]))
    lengths = [np.linalg.norm(v) for v in vectors]
    assert abs(result.double().norm().item() / np.average(lengths, weights=WEIGHTS[:3]) - 1) < 8 * UNIT
    pulls = [
        logarithm(result.double().numpy() / result.double().norm().item(), v / n) for v, n in zip(vectors, lengths)
    ]
    total = sum(w * p for w, p in zip(WEIGHTS, pulls)) / WEIGHTS[:3].sum()
    # rounding each element moves the point by at most 4 UNIT of its length, and the pulls at most as much
    assert np.linalg.norm(total) < 8 * UNIT


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 1.0])
def test_two_models_meet_on_their_arc(share: float) -> None:
    a, b = exact(draw((5, 7), 2))
    a, b = (torch.from_numpy(v / np.linalg.norm(v)).float() for v in (a, b))
    torch.testing.assert_close(karcher([a, b], weights=[1 - share, share]), slerp(a, b, share), rtol=0, atol=4 * UNIT)


def test_it_minimises_the_squared_angles() -> None:
    random = np.random.default_rng(1)
    points = random.standard_normal((5, 8)) + 1
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    weights = random.dirichlet(np.ones(5))
    mean = barycentre(points, weights, 1000, 1e-12) @ points

    def cost(x: np.ndarray) -> float:
        return float(weights @ np.arccos(points @ (x / np.linalg.norm(x))) ** 2)

    assert abs(np.linalg.norm(mean) - 1) < 1e-14
    for _ in range(200):
        direction = random.standard_normal(8)
        # a step of 1e-4 raises the cost by about 1e-8, and cost itself is accurate to 1e-15
        assert cost(mean) < cost(mean + 1e-4 * direction)


def test_orthogonal_models_of_equal_weight_give_their_normalised_mean() -> None:
    tensors = list(3 * torch.eye(4))
    torch.testing.assert_close(karcher(tensors), torch.full((4,), 1.5), rtol=4 * UNIT, atol=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_copies_give_the_model(shape: tuple[int, ...]) -> None:
    (tensor,) = draw(shape, 1)
    for copies in (1, 3):
        torch.testing.assert_close(karcher([tensor] * copies), tensor, rtol=4 * UNIT, atol=0)


def test_zero_tensors_and_zero_weights_have_no_direction() -> None:
    a, b = draw((5, 7), 2)
    zero = torch.zeros(5, 7)
    torch.testing.assert_close(karcher([a, b, zero]), karcher([a, b]) * 2 / 3, rtol=8 * UNIT, atol=8 * UNIT)
    torch.testing.assert_close(karcher([zero, b, a], weights=[0, 1, 0]), b, rtol=4 * UNIT, atol=0)
    assert not karcher([zero, zero]).any()
    assert not karcher([a, zero], weights=[0, 1]).any()


def test_tiny_tensors_keep_their_scale() -> None:
    a, b = draw((5, 7), 2)
    torch.testing.assert_close(karcher([a * 2**-40, b * 2**-40]), karcher([a, b]) * 2**-40, rtol=0, atol=0)


def test_opposite_models_fall_back_to_the_first() -> None:
    a = torch.tensor([3.0, 4.0])
    torch.testing.assert_close(karcher([a, -3 * a]), 2 * a, rtol=4 * UNIT, atol=0)
    torch.testing.assert_close(karcher([a, -a], weights=[3, 1]), a, rtol=4 * UNIT, atol=0)
    assert karcher([torch.tensor(2.0), torch.tensor(-4.0)]).item() == pytest.approx(3, rel=1e-6)


def test_mergekits_row_stops_sooner() -> None:
    native, mergekit = METHODS
    assert mergekit.configure({}).max_iter == 10
    tensors = [torch.eye(8)[i] * (1 + 0.1 * i) for i in range(8)]
    weights = [0.3, 1, 1, 1, 1, 1, 1, 3]
    full = karcher(tensors, weights=weights)
    short = karcher(tensors, weights=weights, max_iter=10, tol=1e-5)
    assert 1e-6 < (full - short).norm() / full.norm() < 1e-2
    assert native.configure({}).max_iter > 200


def test_weights_must_be_positive_somewhere_and_negative_nowhere() -> None:
    a, b = draw((3,), 2)
    with pytest.raises(RecipeError, match="zero"):
        karcher([a, b], weights=0)
    with pytest.raises(RecipeError, match="between 0"):
        karcher([a, b], weights=[1, -1])
