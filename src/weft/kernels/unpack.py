"""From codes of few bits, side by side in words, to float32: what a packed matrix is multiplied by in large batches.

A row of n codes of b bits is a stream of n · b bits in words of 32, the lowest first. The result has the same bits as
(code + low − zero) · scale computed one after the other in float32.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np

from weft.kernels.jit import kernel

_LEAST = 1 << 18  # numbers that are worth a second thread


def affine(
    words: np.ndarray, bits: int, low: int, scale: np.ndarray, zero: np.ndarray, out: np.ndarray, threads: int = 1
) -> np.ndarray:
    """Write (code + low − zero) · scale to ``out``.

    Args:
        words: (rows, ⌈columns · bits / 32⌉) int32, contiguous.
        bits: of a code, 1 to 16.
        low: what a code of 0 stands for.
        scale, zero: (rows, groups) float32; groups of columns / groups consecutive columns.
        out: (rows, columns) float32.
        threads: how many share the rows.

    >>> words = np.array([[0x4321]], np.int32)
    >>> affine(words, 4, -1, np.ones((1, 2), np.float32), np.array([[0, 1]], np.float32), np.empty((1, 4), np.float32))
    array([[0., 1., 1., 2.]], dtype=float32)
    """
    size = out.shape[1] // scale.shape[1]
    if bits == 8 or (bits == 4 and size % 2 == 0):
        loop, codes = (_bytes if bits == 8 else _nibbles), words.view(np.uint8)

        def part(rows: slice) -> None:
            loop(codes[rows], np.float32(low), scale[rows], zero[rows], out[rows])
    else:
        unsigned = words.view(np.uint32)

        def part(rows: slice) -> None:
            _any(unsigned[rows], bits, np.float32(low), scale[rows], zero[rows], out[rows])

    _shared(part, len(out), min(threads, out.size // _LEAST))
    return out


def _shared(part: Callable[[slice], None], rows: int, threads: int) -> None:
    """Run ``part`` for all rows, on several threads."""
    if threads <= 1:
        part(slice(0, rows))
        return
    step = -(-rows // threads)
    first, *rest = [slice(a, min(a + step, rows)) for a in range(0, rows, step)]
    running = [_pool(os.getpid()).submit(part, one) for one in rest]
    part(first)
    for one in running:
        one.result()


@cache
def _pool(_process: int) -> ThreadPoolExecutor:
    """Threads of this process: those of a parent are not there after a fork."""
    return ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="weft-unpack")


@kernel
def _nibbles(codes, low, scale, zero, out):  # (rows, ≥ columns / 2) uint8
    half = out.shape[1] // scale.shape[1] // 2
    for row in range(out.shape[0]):
        for group in range(scale.shape[1]):
            s, z = scale[row, group], zero[row, group]
            for j in range(group * half, (group + 1) * half):
                code = codes[row, j]
                out[row, 2 * j] = (np.float32(code & np.uint8(15)) + low - z) * s
                out[row, 2 * j + 1] = (np.float32(code >> np.uint8(4)) + low - z) * s


@kernel
def _bytes(codes, low, scale, zero, out):  # (rows, ≥ columns) uint8
    size = out.shape[1] // scale.shape[1]
    for row in range(out.shape[0]):
        for group in range(scale.shape[1]):
            s, z = scale[row, group], zero[row, group]
            for j in range(group * size, (group + 1) * size):
                out[row, j] = (np.float32(codes[row, j]) + low - z) * s


@kernel
def _any(words, bits, low, scale, zero, out):  # (rows, words) uint32
    size = out.shape[1] // scale.shape[1]
    mask = np.uint64((1 << bits) - 1)
    last = words.shape[1] - 1
    for row in range(out.shape[0]):
        for group in range(scale.shape[1]):
            s, z = scale[row, group], zero[row, group]
            for j in range(group * size, (group + 1) * size):
                place = j * bits
                word = place >> 5
                pair = np.uint64(words[row, word]) | (np.uint64(words[row, min(word + 1, last)]) << np.uint64(32))
                out[row, j] = (np.float32(np.int64((pair >> np.uint64(place & 31)) & mask)) + low - z) * s
