"""Sums and counts over two tensors of one shape, read together chunk by chunk."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from weft.checkpoint.checkpoint import LazyTensor
from weft.engine.chunks import CHUNK, Workspace
from weft.kernels.convert import to_float32
from weft.measure.kernels import pair_counts, pair_sums


@dataclass
class Comparison:
    """Running sums over pairs (a, b) of elements.

    Attributes:
        apart, first, second, product: sums of (b - a)², a², b² and a b over the pairs that are finite.
        equal, changed, broken: pairs that are equal, of opposite sign, not finite.
        largest: largest |b - a|.
    """

    apart: float = 0.0
    first: float = 0.0
    second: float = 0.0
    product: float = 0.0
    equal: int = 0
    changed: int = 0
    broken: int = 0
    largest: float = 0.0

    def add(self, sums: tuple[float, ...], equal: int, changed: int, broken: int, largest: float) -> None:
        """Add what one chunk gave."""
        self.apart += float(sums[0])
        self.first += float(sums[1])
        self.second += float(sums[2])
        self.product += float(sums[3])
        self.equal += int(equal)
        self.changed += int(changed)
        self.broken += int(broken)
        self.largest = max(self.largest, float(largest))


def compare(a: LazyTensor, b: LazyTensor, workspace: Workspace, stopped: Callable[[], bool]) -> Comparison:
    """Read ``a`` and ``b`` once, together. Types that are not floating point are only counted as equal or not."""
    found = Comparison()
    for start in range(0, a.size, CHUNK):
        if stopped():
            break
        count = min(CHUNK, a.size - start)
        x, y = _raw(a, start, count, workspace, "a"), _raw(b, start, count, workspace, "b")
        if not a.dtype.floating:
            found.equal += _equal_bits(x, y, a)
        elif "F64" in (a.dtype.name, b.dtype.name):
            _add_doubles(found, _doubles(x, a), _doubles(y, b))
        else:
            _add_singles(found, _singles(x, a, workspace, "a"), _singles(y, b, workspace, "b"))
    return found


def _raw(tensor: LazyTensor, start: int, count: int, workspace: Workspace, slot: str) -> np.ndarray:
    """The bytes of ``count`` elements; chunks start at whole bytes for any width."""
    first, last = start * tensor.dtype.bits // 8, (start + count) * tensor.dtype.bits // 8
    raw = workspace.array(f"raw {slot}", (last - first,), np.uint8)
    tensor.read_into(raw.data, first)
    return raw


def _singles(raw: np.ndarray, tensor: LazyTensor, workspace: Workspace, slot: str) -> np.ndarray:
    """Values as float32."""
    if tensor.dtype.name == "F32":
        return raw.view(np.float32)
    bits = raw.view(tensor.dtype.numpy)
    return to_float32(bits, tensor.dtype, workspace.array(f"values {slot}", bits.shape))


def _doubles(raw: np.ndarray, tensor: LazyTensor) -> np.ndarray:
    """Values as float64."""
    bits = raw.view(tensor.dtype.numpy)
    with np.errstate(invalid="ignore"):  # casting a signalling NaN
        return bits if tensor.dtype.name == "F64" else to_float32(bits, tensor.dtype).astype(np.float64)


def _add_singles(found: Comparison, a: np.ndarray, b: np.ndarray) -> None:
    x, y = a.view(np.uint32), b.view(np.uint32)
    equal, changed, broken, largest = pair_counts(x, y)
    found.add(pair_sums(x, y), equal, changed, broken, float(np.uint32(largest).view(np.float32)))


def _add_doubles(found: Comparison, a: np.ndarray, b: np.ndarray) -> None:
    finite = np.isfinite(a) & np.isfinite(b)
    equal = int(np.count_nonzero((a == b) | (np.isnan(a) & np.isnan(b))))
    a, b = a[finite], b[finite]
    with np.errstate(over="ignore"):  # squares of 1e200 are infinity, and reported as no value
        apart = b - a
        sums = (np.sum(apart**2), np.sum(a**2), np.sum(b**2), np.sum(a * b))
    changed = int(np.count_nonzero(np.sign(a) * np.sign(b) < 0))
    found.add(sums, equal, changed, finite.size - a.size, np.max(np.abs(apart), initial=0.0))


def _equal_bits(a: np.ndarray, b: np.ndarray, tensor: LazyTensor) -> int:
    """Elements that are stored alike."""
    bits = tensor.dtype.bits
    if bits >= 8:
        return int(np.count_nonzero(a.view(tensor.dtype.numpy) == b.view(tensor.dtype.numpy)))
    alike = np.unpackbits(a ^ b, bitorder="little").reshape(-1, bits)
    return int(np.count_nonzero(~alike.any(axis=1)))
