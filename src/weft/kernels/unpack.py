"""From codes of few bits, side by side in words, to float32: what a packed matrix is multiplied by in large batches.

A row of n codes of b bits is a stream of n · b bits in words of 32, the lowest first. Results have the same bits as
(code + low − zero) · scale, or table[code] · scale, computed one after the other in float32.
"""

from __future__ import annotations

import numpy as np

from weft.kernels.jit import kernel


def affine(words: np.ndarray, bits: int, low: int, scale: np.ndarray, zero: np.ndarray, out: np.ndarray) -> np.ndarray:
    """Write (code + low − zero) · scale to ``out``.

    Args:
        words: (rows, ⌈columns · bits / 32⌉) int32, contiguous.
        bits: of a code, 1 to 16.
        low: what a code of 0 stands for.
        scale, zero: (rows, groups) float32; groups of columns / groups consecutive columns.
        out: (rows, columns) float32.

    >>> words = np.array([[0x4321]], np.int32)
    >>> affine(words, 4, -1, np.ones((1, 2), np.float32), np.array([[0, 1]], np.float32), np.empty((1, 4), np.float32))
    array([[0., 1., 1., 2.]], dtype=float32)
    """
    if bits == 8:
        _bytes(words.view(np.uint8), np.float32(low), scale, zero, out)
    elif bits == 4 and out.shape[1] // scale.shape[1] % 2 == 0:
        _nibbles(words.view(np.uint8), np.float32(low), scale, zero, out)
    else:
        _any(words.view(np.uint32), bits, np.float32(low), scale, zero, out)
    return out


def lookup(
    words: np.ndarray, bits: int, table: np.ndarray, scale: np.ndarray, group_size: int, out: np.ndarray
) -> np.ndarray:
    """Write table[code] · scale to ``out``.

    Args:
        words: (rows, ⌈columns · bits / 32⌉) int32, contiguous; or, of 8 bits, (rows, columns) uint8.
        bits: of a code, 1 to 16.
        table: (2ᵇⁱᵗˢ,) float32.
        scale: (rows, ⌈columns / group_size⌉) float32.
        group_size: consecutive columns that share a scale; the last group may be shorter.
        out: (rows, columns) float32.

    >>> scale = np.array([[1, 10]], np.float32)
    >>> lookup(np.array([[0x10]], np.int32), 4, np.arange(16, dtype=np.float32), scale, 1, np.empty((1, 2), np.float32))
    array([[ 0., 10.]], dtype=float32)
    """
    if bits == 8:
        _bytes_of_table(words.view(np.uint8), table, scale, group_size, out)
    elif bits == 4 and group_size % 2 == 0 and out.shape[1] % 2 == 0:
        _nibbles_of_table(words.view(np.uint8), table, scale, group_size, out)
    else:
        _any_of_table(words.view(np.uint32), bits, table, scale, group_size, out)
    return out


# Each group is cut out before the loop over it, and codes become int32 before they become floats: only then are the loops
# vector instructions, ten times faster.
@kernel
def _nibbles(codes, low, scale, zero, out):  # (rows, ≥ columns / 2) uint8
    half = out.shape[1] // scale.shape[1] // 2
    for row in range(out.shape[0]):
        for group in range(scale.shape[1]):
            s, z = scale[row, group], zero[row, group]
            pairs = codes[row, group * half : (group + 1) * half]
            made = out[row, 2 * group * half : 2 * (group + 1) * half]
            for j in range(half):
                pair = np.int32(pairs[j])
                made[2 * j] = (np.float32(pair & np.int32(15)) + low - z) * s
                made[2 * j + 1] = (np.float32(pair >> np.int32(4)) + low - z) * s


@kernel
def _bytes(codes, low, scale, zero, out):  # (rows, ≥ columns) uint8
    size = out.shape[1] // scale.shape[1]
    for row in range(out.shape[0]):
        for group in range(scale.shape[1]):
            s, z = scale[row, group], zero[row, group]
            part = codes[row, group * size : (group + 1) * size]
            made = out[row, group * size : (group + 1) * size]
            for j in range(size):
                made[j] = (np.float32(np.int32(part[j])) + low - z) * s


@kernel
def _any(words, bits, low, scale, zero, out):  # (rows, words) uint32
    size = out.shape[1] // scale.shape[1]
    mask = np.uint64((1 << bits) - 1)
    last = words.shape[1] - 1
    for row in range(out.shape[0]):
        stream = words[row]
        for group in range(scale.shape[1]):
            s, z = scale[row, group], zero[row, group]
            made = out[row, group * size : (group + 1) * size]
            for j in range(size):
                place = (group * size + j) * bits
                word = place >> 5
                pair = np.uint64(stream[word]) | (np.uint64(stream[min(word + 1, last)]) << np.uint64(32))
                made[j] = (np.float32(np.int32((pair >> np.uint64(place & 31)) & mask)) + low - z) * s


@kernel
def _nibbles_of_table(codes, table, scale, size, out):  # (rows, ≥ columns / 2) uint8
    columns = out.shape[1]
    for row in range(out.shape[0]):
        for group in range(scale.shape[1]):
            s, start, stop = scale[row, group], group * size, min((group + 1) * size, columns)
            pairs, made = codes[row, start // 2 : stop // 2], out[row, start:stop]
            for j in range(pairs.size):
                pair = np.int32(pairs[j])
                made[2 * j] = table[pair & np.int32(15)] * s
                made[2 * j + 1] = table[pair >> np.int32(4)] * s


@kernel
def _bytes_of_table(codes, table, scale, size, out):  # (rows, ≥ columns) uint8
    columns = out.shape[1]
    for row in range(out.shape[0]):
        for group in range(scale.shape[1]):
            s, start, stop = scale[row, group], group * size, min((group + 1) * size, columns)
            part, made = codes[row, start:stop], out[row, start:stop]
            for j in range(part.size):
                made[j] = table[np.int32(part[j])] * s


@kernel
def _any_of_table(words, bits, table, scale, size, out):  # (rows, words) uint32
    mask = np.uint64((1 << bits) - 1)
    last = words.shape[1] - 1
    for row in range(out.shape[0]):
        stream = words[row]
        for j in range(out.shape[1]):
            place = j * bits
            word = place >> 5
            pair = np.uint64(stream[word]) | (np.uint64(stream[min(word + 1, last)]) << np.uint64(32))
            out[row, j] = table[np.int32((pair >> np.uint64(place & 31)) & mask)] * scale[row, j // size]
