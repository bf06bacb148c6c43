"""exp and tanh against numpy in float64, everywhere in their domains."""

import numpy as np
import pytest

from weft.kernels.elementary import exp_of_negative, tanh, tanh_within_one
from weft.kernels.jit import kernel


@kernel
def all_exp(x, out):
    for i in range(x.size):
        out[i] = exp_of_negative(x[i])


@kernel
def all_tanh_within_one(x, out):
    for i in range(x.size):
        out[i] = tanh_within_one(x[i])


@kernel
def all_tanh(x, out):
    for i in range(x.size):
        out[i] = tanh(x[i])


def relative_error(function, x, exact):
    x = x.astype(np.float32)
    out = np.empty_like(x)
    function(x, out)
    expected = exact(x.astype(np.float64))
    np.testing.assert_array_equal(out[expected == 0], 0)
    inside = expected != 0
    return np.max(np.abs(out - expected)[inside] / np.abs(expected[inside]))


def test_the_documented_errors():
    # the bounds stand in the functions' docstrings
    assert relative_error(all_exp, np.linspace(-87, 0, 300_001), np.exp) < 1.1e-7
    assert relative_error(all_exp, -np.geomspace(1e-30, 87, 100_001), np.exp) < 1.1e-7
    assert relative_error(all_tanh_within_one, np.linspace(-1, 1, 300_001), np.tanh) < 2.6e-7
    assert relative_error(all_tanh, np.linspace(-20, 20, 400_001), np.tanh) < 2.6e-7
    assert relative_error(all_tanh, np.geomspace(1e-38, 1e38, 100_001), np.tanh) < 2.6e-7


def test_the_ends():
    x = np.float32([0, -0.0, np.inf, -np.inf, 3e38, -3e38, np.nan])
    out = np.empty_like(x)
    all_tanh(x, out)
    np.testing.assert_array_equal(out, np.float32([0, -0.0, 1, -1, 1, -1, np.nan]))
    assert np.signbit(out[1])
    all_exp(np.float32([0, -0.0, -88, -np.inf, -1e30, -1, -2]), out)
    np.testing.assert_array_equal(out[:2], 1)
    np.testing.assert_array_equal(out[2:5], out[2])
    assert np.finfo(np.float32).tiny < out[2] < 2e-38


@pytest.mark.parametrize("function", [all_exp, all_tanh_within_one, all_tanh])
def test_a_value_does_not_depend_on_its_place(function):
    x = -np.random.default_rng(0).random(1000, np.float32)
    whole, alone = np.empty_like(x), np.empty_like(x)
    function(x, whole)
    for i in range(len(x)):
        function(x[i : i + 1], alone[i : i + 1])
    assert whole.tobytes() == alone.tobytes()
