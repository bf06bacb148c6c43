"""The compiled loops of the measurements: counting bit patterns, sums of powers, comparing two arrays."""

from __future__ import annotations

import numpy as np

from weft.kernels.jit import kernel, reduction

_MAGNITUDE = np.uint32(0x7FFFFFFF)
_INFINITY = np.uint32(0x7F800000)
_LEAST, _GREATEST = np.int32(-0x80000000), np.int32(0x7FFFFFFF)


@kernel
def count_codes(codes, counts):  # (n,) uint8 or uint16, (lanes, 65536) int64; lanes a power of two
    mask = counts.shape[0] - 1
    for i in range(codes.size):
        counts[i & mask, codes[i]] += 1


@kernel
def count_upper_halves(bits, counts):  # (n,) uint32 view of float32, (lanes, 65536) int64
    mask = counts.shape[0] - 1
    for i in range(bits.size):
        counts[i & mask, bits[i] >> np.uint32(16)] += 1


@kernel
def extremes(bits):  # (n,) uint32 view of float32 -> NaN, infinities, zeros, smallest and largest finite value's key
    nan, infinite, zeros = 0, 0, 0
    low, high = _GREATEST, _LEAST
    for i in range(bits.size):
        magnitude = bits[i] & _MAGNITUDE
        nan += magnitude > _INFINITY
        infinite += magnitude == _INFINITY
        zeros += magnitude == np.uint32(0)
        signed = np.int32(bits[i])
        key = signed ^ ((signed >> np.int32(31)) & _GREATEST)  # integers in the order of the floats
        finite = magnitude < _INFINITY
        low = min(low, key if finite else _GREATEST)
        high = max(high, key if finite else _LEAST)
    return nan, infinite, zeros, low, high


@reduction
def power_sums(bits, center):  # (n,) uint32 view of float32 -> sums of (x - center)^1..4 over finite x, in float64
    first, second, third, fourth = 0.0, 0.0, 0.0, 0.0
    for i in range(bits.size):
        finite = (bits[i] & _MAGNITUDE) < _INFINITY
        away = np.float64(np.uint32(bits[i]).view(np.float32)) - center
        away = away if finite else 0.0
        square = away * away
        first += away
        second += square
        third += square * away
        fourth += square * square
    return first, second, third, fourth


@reduction
def pair_sums(a, b):  # (n,) uint32 views of float32 -> sums of (b - a)^2, a^2, b^2, a b over finite pairs, in float64
    apart, first, second, product = 0.0, 0.0, 0.0, 0.0
    for i in range(a.size):
        finite = ((a[i] & _MAGNITUDE) < _INFINITY) & ((b[i] & _MAGNITUDE) < _INFINITY)
        x = np.float64(np.uint32(a[i]).view(np.float32))
        y = np.float64(np.uint32(b[i]).view(np.float32))
        x = x if finite else 0.0
        y = y if finite else 0.0
        apart += (y - x) * (y - x)
        first += x * x
        second += y * y
        product += x * y
    return apart, first, second, product


@kernel
def pair_counts(
    a, b
):  # (n,) uint32 views of float32 -> equal, signs changed, non-finite pairs, bits of the largest |b-a|
    equal, changed, broken = 0, 0, 0
    largest = np.uint32(0)
    for i in range(a.size):
        x, y = a[i] & _MAGNITUDE, b[i] & _MAGNITUDE
        finite = (x < _INFINITY) & (y < _INFINITY)
        both_zero, both_nan = (x | y) == np.uint32(0), (x > _INFINITY) & (y > _INFINITY)
        equal += (a[i] == b[i]) | both_zero | both_nan
        opposite = ((a[i] ^ b[i]) >> np.uint32(31)) == np.uint32(1)
        changed += finite & opposite & (x != np.uint32(0)) & (y != np.uint32(0))
        broken += not finite
        away = np.float32(np.uint32(b[i]).view(np.float32) - np.uint32(a[i]).view(np.float32))
        distance = away.view(np.uint32) & _MAGNITUDE
        largest = max(largest, distance if finite else np.uint32(0))
    return equal, changed, broken, largest


@reduction
def gram_product(rows, basis, scale, out):  # W: (r, c), V: (4, c) -> out (4, c) += scale V W^T W
    zero = np.float32(0)
    for r in range(rows.shape[0]):
        row = rows[r]
        d0, d1, d2, d3 = zero, zero, zero, zero
        for c in range(row.size):
            d0 += row[c] * basis[0, c]
            d1 += row[c] * basis[1, c]
            d2 += row[c] * basis[2, c]
            d3 += row[c] * basis[3, c]
        d0, d1, d2, d3 = scale * d0, scale * d1, scale * d2, scale * d3
        for c in range(row.size):
            out[0, c] += d0 * row[c]
            out[1, c] += d1 * row[c]
            out[2, c] += d2 * row[c]
            out[3, c] += d3 * row[c]
