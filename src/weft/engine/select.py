"""The k-th largest of millions of numbers, exactly, without sorting and without holding them.

Non-negative floats are ordered as their bit patterns are, so counting patterns finds a quantile: one pass counts the
upper 16 bits, a second the lower 16 bits of those in the right bucket (or keeps these, if they are few). Numbers equal to the threshold are kept by
position, lowest index first, so that exactly k are kept whatever the chunking.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from weft.engine.chunks import Chunk, Scan
from weft.kernels.jit import kernel, reduction

_BUCKETS = 1 << 15  # the sign bit is always zero
_LOW_BUCKETS = 1 << 16
_GATHERED = 1 << 22  # numbers in the threshold's bucket that are kept in memory: 16 MiB
_NO_SIGN = np.uint32(0x7FFFFFFF)
Measure = Callable[[Chunk, int], np.ndarray]


@dataclass(frozen=True)
class Threshold:
    """Keep the k largest of one row of numbers.

    Attributes:
        value: the k-th largest; infinity keeps nothing, -1 keeps everything.
        keep_all_ties: chunks that keep all numbers equal to ``value``; None where every chunk does.
        partial: the one chunk that keeps some of them, the first ``partial_count``.
        partial_count: how many that chunk keeps.
    """

    value: float
    keep_all_ties: frozenset[tuple[int, int]] | None
    partial: tuple[int, int] | None = None
    partial_count: int = 0

    def quota(self, key: tuple[int, int]) -> int:
        """Ties that chunk ``key`` keeps: -1 for all."""
        if self.keep_all_ties is None or key in self.keep_all_ties:
            return -1
        return self.partial_count if key == self.partial else 0


KEEP_ALL = Threshold(-1.0, None)
KEEP_NONE = Threshold(float("inf"), frozenset())


def magnitude(chunk: Chunk, row: int) -> np.ndarray:
    """The tensor of model ``row``: everything here looks at magnitudes and ignores signs."""
    values: np.ndarray = chunk.tensors[row]
    return values


def largest(scan: Scan, counts: Sequence[int], measure: Measure = magnitude) -> list[Threshold]:
    """Thresholds that keep the ``counts[row]`` largest values of ``measure(chunk, row)`` for every row.

    Args:
        scan: passes over the data in scope.
        counts: how many to keep, one for each row.
        measure: (n,) float32, finite, of which the magnitude counts; may return a scratch buffer.
    """
    rows = len(counts)
    open_rows = [r for r in range(rows) if 0 < counts[r] < scan.size]
    result = [KEEP_NONE if c <= 0 else KEEP_ALL for c in counts]
    if not open_rows:
        return result

    def count_high(chunk: Chunk, total: np.ndarray) -> None:
        for r in open_rows:
            histogram_high(measure(chunk, r).view(np.uint32), total[r])

    high = scan.fold(count_high, lambda: np.zeros((rows, _BUCKETS), np.int64))
    bucket, inside = np.zeros(rows, np.int64), np.zeros(rows, np.int64)
    for r in open_rows:
        bucket[r], inside[r] = _find(high[r], counts[r])
    if sum(int(high[r][bucket[r]]) for r in open_rows) <= _GATHERED:
        found = _gather(scan, measure, open_rows, bucket, high)
        for r in open_rows:
            result[r] = _among(found[r], int(inside[r]))
        return result

    def count_low(chunk: Chunk, total: np.ndarray) -> None:
        for r in open_rows:
            histogram_low(measure(chunk, r).view(np.uint32), np.uint32(bucket[r]), total[r])

    low = scan.fold(count_low, lambda: np.zeros((rows, _LOW_BUCKETS), np.int64))
    values, quota, tied = np.zeros(rows, np.float32), np.zeros(rows, np.int64), []
    for r in open_rows:
        digit, quota[r] = _find(low[r], int(inside[r]))
        values[r] = np.uint32((int(bucket[r]) << 16) | digit).view(np.float32)
        if quota[r] < low[r][digit]:
            tied.append(r)
        else:
            result[r] = Threshold(float(values[r]), None)
    if tied:
        equal = scan.collect(lambda chunk: [count_equal(measure(chunk, r), values[r]) for r in tied])
        for position, r in enumerate(tied):
            ties = {key: found[position] for key, found in equal.items()}
            result[r] = _by_position(float(values[r]), ties, int(quota[r]))
    return result


def keep(values: np.ndarray, magnitudes: np.ndarray, threshold: Threshold, key: tuple[int, int]) -> None:
    """Set ``values`` to 0 where ``magnitudes`` is not among the largest in magnitude; both (n,) float32."""
    if values is magnitudes:
        keep_largest_in_place(values, np.float32(threshold.value), threshold.quota(key))
    else:
        keep_largest(values, magnitudes, np.float32(threshold.value), threshold.quota(key))


def kept(magnitudes: np.ndarray, threshold: Threshold, key: tuple[int, int], out: np.ndarray) -> None:
    """1.0 where ``magnitudes`` is among the largest, 0.0 elsewhere, into ``out``; both (n,) float32."""
    mark_largest(magnitudes, np.float32(threshold.value), threshold.quota(key), out)


def _gather(
    scan: Scan, measure: Measure, rows: list[int], bucket: np.ndarray, high: np.ndarray
) -> dict[int, dict[tuple[int, int], np.ndarray]]:
    """The numbers in each row's bucket, by chunk: when they are few, one pass instead of two finds the threshold."""

    def visit(chunk: Chunk) -> list[np.ndarray]:
        found = []
        for r in rows:
            out = np.empty(min(chunk.size, int(high[r][bucket[r]])), np.float32)
            count = gather_bucket(measure(chunk, r).view(np.uint32), np.uint32(bucket[r]), out.view(np.uint32))
            found.append(out[:count].copy())
        return found

    gathered = scan.collect(visit)
    return {r: {key: found[i] for key, found in gathered.items()} for i, r in enumerate(rows)}


def _among(found: dict[tuple[int, int], np.ndarray], count: int) -> Threshold:
    """The threshold that keeps the ``count`` largest of the numbers found."""
    numbers = np.concatenate(list(found.values()))
    value = np.partition(numbers, numbers.size - count)[numbers.size - count]
    ties = {key: int(np.count_nonzero(part == value)) for key, part in found.items()}
    quota = count - int(np.count_nonzero(numbers > value))
    if quota == sum(ties.values()):
        return Threshold(float(value), None)
    return _by_position(float(value), ties, quota)


def _find(histogram: np.ndarray, count: int) -> tuple[int, int]:
    """The bucket that holds the ``count``-th largest, and its rank inside that bucket."""
    from_top = np.cumsum(histogram[::-1])
    position = int(np.searchsorted(from_top, count))
    above = int(from_top[position - 1]) if position else 0
    return len(histogram) - 1 - position, count - above


def _by_position(value: float, ties: dict[tuple[int, int], int], quota: int) -> Threshold:
    whole = set()
    for key in sorted(ties):
        if quota >= ties[key]:
            whole.add(key)
            quota -= ties[key]
        else:
            return Threshold(value, frozenset(whole), key, quota)
    return Threshold(value, frozenset(whole))


@kernel
def histogram_high(bits, histogram):
    for i in range(bits.size):
        histogram[(bits[i] & _NO_SIGN) >> np.uint32(16)] += 1


@kernel
def gather_bucket(bits, bucket, out):
    count = 0
    for i in range(bits.size):
        word = bits[i] & _NO_SIGN
        if word >> np.uint32(16) == bucket:
            out[count] = word
            count += 1
    return count


@kernel
def histogram_low(bits, bucket, histogram):
    for i in range(bits.size):
        if (bits[i] & _NO_SIGN) >> np.uint32(16) == bucket:
            histogram[bits[i] & np.uint32(0xFFFF)] += 1


@reduction
def count_equal(values, value):
    count = 0
    for i in range(values.size):
        count += abs(values[i]) == value
    return count


@kernel
def keep_largest(values, magnitudes, threshold, quota):
    zero = np.float32(0)
    if quota < 0:
        for i in range(values.size):
            values[i] = values[i] if abs(magnitudes[i]) >= threshold else zero
    elif quota == 0:
        for i in range(values.size):
            values[i] = values[i] if abs(magnitudes[i]) > threshold else zero
    else:
        for i in range(values.size):
            taken = abs(magnitudes[i]) > threshold
            if abs(magnitudes[i]) == threshold and quota > 0:
                taken = True
                quota -= 1
            values[i] = values[i] if taken else zero


@kernel
def keep_largest_in_place(values, threshold, quota):
    # not keep_largest(values, values): one array under two names is compiled to a loop that is 20 times slower
    zero = np.float32(0)
    if quota < 0:
        for i in range(values.size):
            values[i] = values[i] if abs(values[i]) >= threshold else zero
    elif quota == 0:
        for i in range(values.size):
            values[i] = values[i] if abs(values[i]) > threshold else zero
    else:
        for i in range(values.size):
            taken = abs(values[i]) > threshold
            if abs(values[i]) == threshold and quota > 0:
                taken = True
                quota -= 1
            values[i] = values[i] if taken else zero


@kernel
def mark_largest(magnitudes, threshold, quota, out):
    one, zero = np.float32(1), np.float32(0)
    if quota < 0:
        for i in range(magnitudes.size):
            out[i] = one if abs(magnitudes[i]) >= threshold else zero
    elif quota == 0:
        for i in range(magnitudes.size):
            out[i] = one if abs(magnitudes[i]) > threshold else zero
    else:
        for i in range(magnitudes.size):
            taken = abs(magnitudes[i]) > threshold
            if abs(magnitudes[i]) == threshold and quota > 0:
                taken = True
                quota -= 1
            out[i] = one if taken else zero
