"""Values at given ranks of millions of signed numbers, exactly, in two passes and without holding them.

Where :mod:`weft.engine.select` keeps the k largest magnitudes and breaks ties by position, this finds only the
values, of numbers with a sign. The bits of a float are mapped to an unsigned number of the same order; one pass
counts its upper 16 bits, a second the lower 16 bits of those in the right bucket.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from threading import get_ident

import numpy as np

from weft.engine.chunks import Chunk, Scan
from weft.kernels.jit import kernel

_BUCKETS = 1 << 16
_SIGN, _ALL = np.uint32(0x80000000), np.uint32(0xFFFFFFFF)
_SIXTEEN, _LOW = np.uint32(16), np.uint32(0xFFFF)


def ranked(
    scan: Scan, ranks: Sequence[Sequence[int]], measure: Callable[[Chunk], np.ndarray]
) -> list[tuple[float, ...]]:
    """The values that stand at ``ranks`` when each row of numbers is sorted from the largest down.

    Args:
        scan: passes over the data in scope.
        ranks: for each row, ranks between 1 (the largest) and ``scan.size`` (the smallest).
        measure: chunk -> (rows, n) float32; may return a scratch buffer.

    Returns:
        For each row the values at its ranks.
    """

    def count_high(chunk: Chunk, totals: np.ndarray) -> None:
        for values, total in zip(measure(chunk), totals):
            histogram_upper(values.view(np.uint32), total)

    high = _count(scan, len(ranks), count_high)
    places = [[_find(histogram, rank) for rank in wanted] for histogram, wanted in zip(high, ranks)]
    buckets = [(row, bucket) for row, found in enumerate(places) for bucket in sorted({b for b, _ in found})]

    def count_low(chunk: Chunk, totals: np.ndarray) -> None:
        rows = measure(chunk)
        for (row, bucket), total in zip(buckets, totals):
            histogram_lower(rows[row].view(np.uint32), np.uint32(bucket), total)

    low = dict(zip(buckets, _count(scan, len(buckets), count_low)))
    return [
        tuple(_value(bucket << 16 | _find(low[row, bucket], inside)[0]) for bucket, inside in found)
        for row, found in enumerate(places)
    ]


def _count(scan: Scan, rows: int, visit: Callable[[Chunk, np.ndarray], None]) -> np.ndarray:
    """(rows, buckets) counts; one accumulator a thread, because counts add up to the same in any order."""
    totals: dict[int, np.ndarray] = {}

    def one(chunk: Chunk) -> None:
        thread = get_ident()
        if thread not in totals:
            totals[thread] = np.zeros((rows, _BUCKETS), np.int64)
        visit(chunk, totals[thread])

    scan.collect(one)
    return np.sum(list(totals.values()), axis=0)


def _find(histogram: np.ndarray, rank: int) -> tuple[int, int]:
    """The bucket that holds the number at ``rank``, and its rank inside that bucket."""
    from_top = np.cumsum(histogram[::-1])
    position = int(np.searchsorted(from_top, rank))
    above = int(from_top[position - 1]) if position else 0
    return _BUCKETS - 1 - position, rank - above


def _value(key: int) -> float:
    """The float whose ordered bits are ``key``."""
    bits = key ^ 0x80000000 if key & 0x80000000 else key ^ 0xFFFFFFFF
    return float(np.uint32(bits).view(np.float32))


@kernel
def histogram_upper(bits, histogram):
    for i in range(bits.size):
        key = bits[i] ^ (_ALL if bits[i] >= _SIGN else _SIGN)
        histogram[key >> _SIXTEEN] += 1


@kernel
def histogram_lower(bits, bucket, histogram):
    for i in range(bits.size):
        key = bits[i] ^ (_ALL if bits[i] >= _SIGN else _SIGN)
        if key >> _SIXTEEN == bucket:
            histogram[key & _LOW] += 1
