"""Counters that see a tensor's bytes chunk by chunk and then know its moments, percentiles and outliers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from weft.checkpoint.checkpoint import LazyTensor
from weft.checkpoint.dtypes import DTYPES
from weft.engine.chunks import Workspace
from weft.kernels.convert import to_float32
from weft.measure.kernels import count_codes, count_upper_halves, extremes, power_sums
from weft.measure.report import Report, ratio

OUTLIER = 6.0  # standard deviations: a normal law has two values in a billion beyond
PERCENTILES = {"p0.1": 0.001, "p1": 0.01, "p10": 0.1, "p50": 0.5, "p90": 0.9, "p99": 0.99, "p99.9": 0.999}
BINS_PER_OCTAVE = 4
_CODES = 1 << 16
_LANES_FROM = 1 << 20  # elements: in a small tensor, clearing four histograms would cost more than they save


@dataclass(frozen=True)
class Histogram(Report):
    """Magnitudes of the finite, non-zero elements: ``counts[i]`` lie from ``2**((first + i) / 4)`` up to the next."""

    first: int
    counts: tuple[int, ...]


def counter(tensor: LazyTensor, workspace: Workspace) -> CodeCounter | ValueCounter | None:
    """What counts the elements of ``tensor``; None for types that are not floating point."""
    if not tensor.dtype.floating:
        return None
    lanes = 4 if tensor.size >= _LANES_FROM else 1  # equal neighbours in one lane would wait for each other
    counts = workspace.array("counts", (lanes, _CODES), np.int64)
    counts[:] = 0
    if tensor.dtype.bits <= 16:
        return CodeCounter(tensor.dtype.name, counts)
    return ValueCounter(tensor.dtype.name, counts, workspace)


class CodeCounter:
    """For types of at most 16 bits: how often each bit pattern occurs, from which all else follows exactly."""

    def __init__(self, dtype: str, counts: np.ndarray):
        self._dtype, self._counts = dtype, counts

    def add(self, raw: np.ndarray) -> None:
        """Count the elements in ``raw``, (bytes,) uint8."""
        count_codes(raw.view(np.uint8 if DTYPES[self._dtype].bits == 8 else np.uint16), self._counts)

    def result(self) -> dict[str, Any]:
        """Fields of ``TensorStatistics``."""
        counts = self._counts.sum(axis=0)
        used = np.flatnonzero(counts)
        counts, values = counts[used], _values(self._dtype)[used]
        nan, infinite = int(counts[np.isnan(values)].sum()), int(counts[np.isinf(values)].sum())
        finite = np.isfinite(values)
        counts, values = counts[finite], values[finite]
        found: dict[str, Any] = {"nan": nan, "infinite": infinite, "zero_share": None, "norm": None}
        total = int(counts.sum())
        if total + nan + infinite:
            found["zero_share"] = float(counts[values == 0].sum()) / (total + nan + infinite)
        if not total:
            return found
        low, high = float(values.min()), float(values.max())
        mean = float(counts @ values) / total
        away = (values - mean) ** 2
        second, fourth = float(counts @ away) / total, float(counts @ away**2) / total
        norm = math.sqrt(float(counts @ values**2))
        return found | _moments(total, low, high, mean, second, fourth, norm) | _spread(values, counts, mean, second)


class ValueCounter:
    """For float32 and float64: sums of powers around the first chunk's mean, and counts of upper halves as float32."""

    def __init__(self, dtype: str, counts: np.ndarray, workspace: Workspace):
        self._double, self._counts, self._workspace = dtype == "F64", counts, workspace
        self._center: float | None = None
        self._elements = self._nan = self._infinite = self._zeros = 0
        self._low, self._high = math.inf, -math.inf
        self._sums = np.zeros(4)

    def add(self, raw: np.ndarray) -> None:
        """Count the elements in ``raw``, (bytes,) uint8."""
        (self._add_double if self._double else self._add_single)(raw)

    def result(self) -> dict[str, Any]:
        """Fields of ``TensorStatistics``."""
        total = self._elements - self._nan - self._infinite
        found: dict[str, Any] = {"nan": self._nan, "infinite": self._infinite, "zero_share": None, "norm": None}
        if self._elements:
            found["zero_share"] = self._zeros / self._elements
        if not total or self._center is None:
            return found
        first, second, third, fourth = (float(s) / total for s in self._sums)
        mean = self._center + first
        square = first * first
        variance = max(second - square, 0.0)
        quartic = fourth - 4 * first * third + 6 * square * second - 3 * square * square
        norm = math.sqrt(total * (variance + mean * mean))
        counts = self._counts.sum(axis=0)
        used = np.flatnonzero(counts)
        values = np.clip(_middles()[used], self._low, self._high)
        finite = np.isfinite(_values("BF16")[used])
        return (
            found
            | _moments(total, self._low, self._high, mean, variance, max(quartic, 0.0), norm)
            | _spread(values[finite], counts[used][finite], mean, variance)
            | {"approximate": True}
        )

    def _add_single(self, raw: np.ndarray) -> None:
        bits, values = raw.view(np.uint32), raw.view(np.float32)
        nan, infinite, zeros, low, high = extremes(bits)
        if nan + infinite < bits.size:
            self._widen(_from_key(low), _from_key(high))
            if self._center is None:
                self._center = float(np.mean(values[np.isfinite(values)], dtype=np.float64))
            self._sums += power_sums(bits, self._center)
        count_upper_halves(bits, self._counts)
        self._tally(bits.size, nan, infinite, zeros)

    def _add_double(self, raw: np.ndarray) -> None:
        values = raw.view(np.float64)
        finite = values[np.isfinite(values)]
        nan = int(np.count_nonzero(np.isnan(values)))
        if finite.size:
            self._widen(float(finite.min()), float(finite.max()))
            largest = float(np.finfo(np.float32).max)
            count_upper_halves(np.clip(finite, -largest, largest).astype(np.float32).view(np.uint32), self._counts)
            with np.errstate(
                over="ignore", invalid="ignore"
            ):  # fourth powers of 1e80 are infinity, and reported as no value
                if self._center is None:
                    self._center = float(np.mean(finite))
                away = finite - self._center
                self._sums += [away.sum(), (away**2).sum(), (away**3).sum(), (away**4).sum()]
        zeros = int(np.count_nonzero(finite == 0))
        self._tally(values.size, nan, values.size - finite.size - nan, zeros)

    def _widen(self, low: float, high: float) -> None:
        self._low, self._high = min(self._low, low), max(self._high, high)

    def _tally(self, elements: int, nan: int, infinite: int, zeros: int) -> None:
        self._elements += elements
        self._nan += nan
        self._infinite += infinite
        self._zeros += zeros


def _moments(
    total: int, low: float, high: float, mean: float, second: float, fourth: float, norm: float
) -> dict[str, Any]:
    """Moments under their names; of equal elements the deviation is exactly zero, whatever rounding left in it."""
    if low == high:
        mean, second, fourth = low, 0.0, 0.0
    deviation = math.sqrt(second)
    return {
        "mean": mean,
        "standard_deviation": deviation,
        "minimum": low,
        "maximum": high,
        "norm": norm,
        "rms": norm / math.sqrt(total),
        "kurtosis": ratio(fourth, second * second),
        "peak": ratio(max(high - mean, mean - low), deviation),
    }


def _spread(values: np.ndarray, counts: np.ndarray, mean: float, variance: float) -> dict[str, Any]:
    """Outliers, percentiles and histogram from values and how often each occurs."""
    far = np.abs(values - mean) > OUTLIER * math.sqrt(variance)
    outliers = float(counts[far].sum()) if values.min() < values.max() else 0.0
    order = np.argsort(np.abs(values), kind="stable")
    magnitudes, rank = np.abs(values)[order], np.cumsum(counts[order])
    total = int(rank[-1])
    places = np.searchsorted(rank, [max(math.ceil(share * total), 1) for share in PERCENTILES.values()])
    return {
        "outlier_share": outliers / total,
        "percentiles": dict(zip(PERCENTILES, magnitudes[places].tolist())),
        "histogram": _histogram(magnitudes, counts[order]),
    }


def _histogram(magnitudes: np.ndarray, counts: np.ndarray) -> Histogram | None:
    positive = magnitudes > 0
    if not positive.any():
        return None
    bins = np.floor(BINS_PER_OCTAVE * np.log2(magnitudes[positive])).astype(np.int64)
    first = int(bins[0])
    totals = np.zeros(int(bins[-1]) - first + 1, np.int64)
    np.add.at(totals, bins - first, counts[positive])
    return Histogram(first, tuple(totals.tolist()))


@cache
def _values(dtype: str) -> np.ndarray:
    """The value of every bit pattern of a type of at most 16 bits, as float64."""
    kind = DTYPES[dtype]
    codes = np.arange(1 << kind.bits, dtype=np.uint8 if kind.bits == 8 else np.uint16)
    with np.errstate(invalid="ignore"):  # casting a signalling NaN
        return to_float32(codes.view(kind.numpy), kind).astype(np.float64)


@cache
def _middles() -> np.ndarray:
    """The middle of the float32 numbers that share each upper half, as float64; zero for the half that holds zero."""
    codes = np.arange(_CODES, dtype=np.uint32)
    inside = np.where(codes & 0x7FFF, np.uint32(0x8000), np.uint32(0))
    with np.errstate(invalid="ignore"):
        return ((codes << 16) | inside).astype(np.uint32).view(np.float32).astype(np.float64)


def _from_key(key: int) -> float:
    """The float32 whose place in the order is ``key``."""
    bits = key ^ ((key >> 31) & 0x7FFFFFFF)
    return float(np.int32(bits).view(np.float32))
