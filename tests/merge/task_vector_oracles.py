"""Slow, plain versions in float64 of what the task-vector methods share."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

SHAPES = [(5, 7), (37,), (), (1,), (1, 1), (3, 2, 5), (3, 0), (2051,)]


def models(count: int, shape: tuple[int, ...], seed: int = 0) -> list[np.ndarray]:
    """Random float32 tensors, no two of whose magnitudes are equal."""
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape).astype(np.float32) for _ in range(count)]


def top(values: np.ndarray, count: int) -> np.ndarray:
    """True for the ``count`` largest magnitudes, lowest index first among equals."""
    flat = np.abs(values.reshape(-1).astype(np.float64))
    order = sorted(range(flat.size), key=lambda i: (-flat[i], i))
    chosen = np.zeros(flat.size, bool)
    chosen[order[:count]] = True
    return chosen.reshape(values.shape)


def add_up(deltas: Sequence[np.ndarray], weights: Sequence[float], normalize: bool, scale: float) -> np.ndarray:
    """Σ w τ, divided by Σ w unless that is zero."""
    total = sum(w * d.astype(np.float64) for w, d in zip(weights, deltas))
    mass = sum(weights)
    return np.asarray(scale * total / (mass if normalize and mass else 1))


def elect(
    deltas: Sequence[np.ndarray],
    weights: Sequence[float],
    normalize: bool,
    scale: float,
    votes: Sequence[float] | None = None,
) -> np.ndarray:
    """Element by element: the sign of the (weighted) sum, then the (mean or) sum of those that agree."""
    shape = deltas[0].shape
    columns = np.stack([d.astype(np.float64).reshape(-1) for d in deltas], axis=1)
    result = np.zeros(len(columns))
    for i, column in enumerate(columns):
        positive = sum(v * x for v, x in zip(votes or weights, column)) >= 0
        agree = [(w, x) for w, x, v in zip(weights, column, votes or weights) if (v * x > 0 if positive else v * x < 0)]
        total, mass = sum(w * x for w, x in agree), sum(w for w, _ in agree)
        result[i] = scale * total / (mass if normalize and mass else 1)
    return result.reshape(shape)


def close(actual: np.ndarray, expected: np.ndarray, roundings: int, magnitude: np.ndarray | float) -> None:
    """Assert that float32 arithmetic explains the difference: ``roundings`` of half a unit each of ``magnitude``."""
    bound = roundings * 2.0**-24 * np.asarray(magnitude, np.float64) + 1e-45
    assert actual.shape == expected.shape
    assert np.isfinite(actual).all()
    worst = np.max(np.abs(actual.astype(np.float64) - expected) / bound, initial=0)
    assert worst <= 1, f"off by {worst:.3g} times what {roundings} roundings explain"
