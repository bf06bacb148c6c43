"""Exponential and hyperbolic tangent in float32, written so that the loops that use them become vector instructions.

The compiler leaves calls into the mathematics library as calls, one for each number; these are pasted in. A value does
not depend on where in a loop it stands.
"""

from __future__ import annotations

import numpy as np

from weft.kernels.jit import inline

_ZERO, _ONE, _TWO, _HALF = np.float32(0), np.float32(1), np.float32(2), np.float32(0.5)
_LOG2_E = np.float32(1.442695041)
_LN2_HIGH, _LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)  # k · high is exact for the k that occur
_LOWEST = np.float32(-87)  # below it the exponential leaves the normal numbers of float32


@inline
def exp_of_negative(x):
    """e^x for x <= 0, at most 1.1e-7 of the value off; e^-87 for everything below -87."""
    x = max(x, _LOWEST)
    k = np.floor(x * _LOG2_E + _HALF)
    r = x - k * _LN2_HIGH - k * _LN2_LOW
    p = np.float32(1 / 720) + r * np.float32(1 / 5040)
    p = np.float32(1 / 24) + r * (np.float32(1 / 120) + r * p)
    p = _ONE + r * (_ONE + r * (_HALF + r * (np.float32(1 / 6) + r * p)))
    return p * np.uint32((np.int32(k) + np.int32(127)) << np.int32(23)).view(np.float32)


@inline
def tanh_within_one(x):
    """tanh(x) for |x| <= 1 by a Padé approximant, at most 2.6e-7 of the value off."""
    s = x * x
    above = x * (np.float32(945) + s * (np.float32(105) + s))
    return above / (np.float32(945) + s * (np.float32(420) + s * np.float32(15)))


@inline
def tanh(x):
    """tanh(x), at most 2.6e-7 of the value off."""
    e = exp_of_negative(-_TWO * abs(x))
    far = (_ONE - e) / (_ONE + e)
    return tanh_within_one(x) if abs(x) < _ONE else (far if x > _ZERO else -far)
