"""Tensors that are computed when they are read: a base weight with a low-rank update, or with rows replaced.

Values are computed in blocks of whole rows that begin at fixed rows, so a value does not depend on where a read
starts or ends. Each thread keeps the last block: reading a tensor from front to back computes every block once.
"""

from __future__ import annotations

import math
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from weft.checkpoint.checkpoint import LazyTensor
from weft.checkpoint.dtypes import DTYPES
from weft.checkpoint.header import TensorInfo
from weft.errors import CheckpointError
from weft.kernels.convert import to_float32
from weft.kernels.jit import fused, kernel

STEP = 4  # ranks are padded to a multiple of it
_TILE = 512  # columns of four rows and four factors that stay in the first-level cache
BLOCK = 1 << 17  # elements computed at a time: half a megabyte of float32 stays in the second-level cache


class Scratch(threading.local):
    """What one thread keeps between reads, shared by all computed tensors of a checkpoint."""

    def __init__(self) -> None:
        self.owner: object = None
        self.number = -1
        self.values = np.empty(0, np.float32)
        self.factors_of: object = None
        self.factors = Factors(self.values, self.values)
        self._buffers: dict[str, np.ndarray] = {}

    def array(self, name: str, nbytes: int) -> np.ndarray:
        """``nbytes`` uninitialised bytes; the memory behind ``name`` is used again."""
        buffer = self._buffers.get(name)
        if buffer is None or buffer.nbytes < nbytes:
            buffer = self._buffers[name] = np.empty(nbytes, np.uint8)
        return buffer[:nbytes]


class RowBlocks(ABC):
    """A float32 tensor as a source of bytes: ``base``, changed by :meth:`_change` in blocks of whole rows."""

    def __init__(self, base: LazyTensor, scratch: Scratch):
        self.base = base
        self.name = base.name
        self.rows = base.shape[0] if base.shape else 1
        self.columns = base.size // max(self.rows, 1)
        self.size = base.size * 4
        self._block_rows = max(1, BLOCK // max(self.columns, 1))
        self._scratch = scratch

    def _prepare(self) -> None:  # noqa: B027 - most have nothing to prepare
        """What is needed before the first block."""

    @abstractmethod
    def _change(self, values: np.ndarray, first: int) -> None:
        """Turn ``values``, (rows, columns) of the base from row ``first`` on, into those of this tensor."""

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """See :class:`weft.checkpoint.files.ByteSource`."""
        target = np.frombuffer(buffer, np.uint8)
        if offset + target.size > self.size:
            raise CheckpointError(
                f"{self.name}: read beyond its end ({offset + target.size:,} of {self.size:,} bytes)."
            )
        step = max(self._block_rows * self.columns * 4, 1)
        done = 0
        while done < target.size:
            number, within = divmod(offset + done, step)
            block = self._block(number).reshape(-1).view(np.uint8)
            count = min(target.size - done, block.size - within)
            target[done : done + count] = block[within : within + count]
            done += count

    def _block(self, number: int) -> np.ndarray:
        scratch = self._scratch
        if scratch.owner is not self or scratch.number != number:
            scratch.owner = None  # until the block is whole
            first = number * self._block_rows
            self._prepare()
            scratch.values = self._base_rows(first)
            self._change(scratch.values, first)
            scratch.owner, scratch.number = self, number
        return scratch.values

    def _base_rows(self, first: int) -> np.ndarray:
        """(rows, columns) float32 of the base from row ``first`` on, in this thread's buffer."""
        rows = min(self._block_rows, self.rows - first)
        values = self._scratch.array("values", rows * self.columns * 4).view(np.float32).reshape(rows, self.columns)
        width = self.base.dtype.bits // 8
        if self.base.dtype is DTYPES["F32"]:
            raw = values.reshape(-1).view(np.uint8)
        else:
            raw = self._scratch.array("raw", values.size * width)
        self.base.read_into(raw.data, first * self.columns * width)
        if self.base.dtype is not DTYPES["F32"]:
            to_float32(raw.view(self.base.dtype.numpy), self.base.dtype, values.reshape(-1))
        return values

    def close(self) -> None:
        """See :class:`weft.checkpoint.files.ByteSource`."""
        self.base.source.close()


@dataclass(frozen=True)
class Factors:
    """A low-rank change of a weight: ``scale`` times ``left`` (rows, rank) times ``right`` (rank, columns).

    Both are float32 in row order, and the rank is a multiple of ``STEP``: :func:`as_factors` pads it with zeros.
    ``magnitude`` is DoRA's learned length of each output, which is a row of the stored weight, or a column.
    """

    left: np.ndarray
    right: np.ndarray
    magnitude: np.ndarray | None = None
    by_column: bool = False
    scale: float = 1.0


class LowRankUpdate(RowBlocks):
    """W₀ + scale · left · right; with a magnitude m, the same scaled so that each output has the length m."""

    def __init__(
        self, base: LazyTensor, load: Callable[[], Factors], scratch: Scratch, sources: Sequence[LazyTensor] = ()
    ):
        super().__init__(base, scratch)
        self._load = load
        self._sources = sources
        self._column_scale: np.ndarray | None = None
        self._lock = threading.Lock()

    def _prepare(self) -> None:
        scratch = self._scratch
        if scratch.factors_of is not self:
            scratch.factors_of, scratch.factors = self, self._load()
        if not scratch.factors.by_column:
            return
        with self._lock:  # lengths of columns need one pass over the whole tensor
            if self._column_scale is None:
                squares = np.zeros(self.columns)
                for first in range(0, self.rows, self._block_rows):
                    values = self._base_rows(first)
                    self._add(values, first)
                    squares += np.square(values, dtype=np.float64).sum(axis=0)
                self._column_scale = _ratio(scratch.factors.magnitude, np.sqrt(squares))

    def _change(self, values: np.ndarray, first: int) -> None:
        self._add(values, first)
        magnitude = self._scratch.factors.magnitude
        if self._column_scale is not None:
            values *= self._column_scale
        elif magnitude is not None:
            lengths = np.sqrt(np.square(values, dtype=np.float64).sum(axis=1))
            values *= _ratio(magnitude[first : first + len(values)], lengths)[:, None]

    def _add(self, values: np.ndarray, first: int) -> None:
        factors = self._scratch.factors
        add_product(factors.left[first : first + len(values)], factors.right, np.float32(factors.scale), values)

    def close(self) -> None:
        """See :class:`weft.checkpoint.files.ByteSource`."""
        super().close()
        for tensor in self._sources:
            tensor.source.close()


class BlockAffine(RowBlocks):
    """W₀ with every block of r × r made W₀[p, q] (I + B[p]) + B[p]: MiSS's Bat."""

    def __init__(self, base: LazyTensor, load: Callable[[], np.ndarray], scratch: Scratch, blocks: LazyTensor):
        super().__init__(base, scratch)
        self._load = load
        self._blocks = blocks
        self._rank = blocks.shape[-1]

    def _prepare(self) -> None:
        scratch = self._scratch
        if scratch.factors_of is not self:
            blocks = self._load()
            scratch.factors_of, scratch.factors = self, Factors(blocks, blocks)

    def _change(self, values: np.ndarray, first: int) -> None:
        rank, blocks = self._rank, self._scratch.factors.left
        row = 0
        while row < len(values):
            number, within = divmod(first + row, rank)
            count = min(rank - within, len(values) - row)
            cut = values[row : row + count].reshape(count, -1, rank)
            cut += cut @ blocks[number] + blocks[number][within : within + count, None]
            row += count

    def close(self) -> None:
        """See :class:`weft.checkpoint.files.ByteSource`."""
        super().close()
        self._blocks.source.close()


class Between(RowBlocks):
    """W₀ + weight · (W − W₀): part of the way from a base to a tensor of its shape."""

    def __init__(self, base: LazyTensor, goal: LazyTensor, weight: float, scratch: Scratch):
        super().__init__(base, scratch)
        self._goal, self._weight = goal, np.float32(weight)

    def _change(self, values: np.ndarray, first: int) -> None:
        width = self._goal.dtype.bits // 8
        raw = np.empty(values.size * width, np.uint8)
        self._goal.read_into(raw.data, first * self.columns * width)
        goal = to_float32(raw.view(self._goal.dtype.numpy), self._goal.dtype).reshape(values.shape)
        goal -= values
        goal *= self._weight
        values += goal

    def close(self) -> None:
        """See :class:`weft.checkpoint.files.ByteSource`."""
        super().close()
        self._goal.source.close()


class ReplacedRows(RowBlocks):
    """A base with some of its rows replaced."""

    def __init__(self, base: LazyTensor, indices: Sequence[int], rows: LazyTensor, scratch: Scratch):
        super().__init__(base, scratch)
        self._indices = np.asarray(indices, np.int64)
        self._rows = rows

    def _change(self, values: np.ndarray, first: int) -> None:
        inside = (self._indices >= first) & (self._indices < first + len(values))
        if inside.any():
            values[self._indices[inside] - first] = as_float32(self._rows)[inside]

    def close(self) -> None:
        """See :class:`weft.checkpoint.files.ByteSource`."""
        super().close()
        self._rows.source.close()


def computed(source: RowBlocks, name: str | None = None) -> LazyTensor:
    """The lazy tensor of a computed source: float32 when read, of the base's type when written."""
    base = source.base
    info = TensorInfo(name or base.name, DTYPES["F32"], base.shape, 0, math.prod(base.shape) * 4)
    return LazyTensor(info, source, base.natural_dtype)


def as_float32(tensor: LazyTensor) -> np.ndarray:
    """All values of a small tensor as float32."""
    return to_float32(tensor.bits(), tensor.dtype)


def _ratio(wanted: np.ndarray | None, lengths: np.ndarray) -> np.ndarray:
    """wanted/lengths as float32; 0 where the length is 0, which the product then stays at."""
    assert wanted is not None
    result = np.zeros(lengths.shape)
    np.divide(wanted, lengths, out=result, where=lengths > 0)
    return result.astype(np.float32)


def as_factors(left: np.ndarray, right: np.ndarray, magnitude: np.ndarray | None = None, **more: Any) -> Factors:
    """Factors for :func:`add_product` from float32 arrays (rows, rank) and (rank, columns) in any order."""
    padding = -left.shape[1] % STEP
    left, right = np.pad(left, ((0, 0), (0, padding))), np.pad(right, ((0, padding), (0, 0)))
    return Factors(np.ascontiguousarray(left), np.ascontiguousarray(right), magnitude, **more)


@kernel
def _add_scaled(total, scale, goal):  # (n,), scale -> += (n,); total becomes scale · total
    # two loops: in one the compiler would round the product once, with the sum, and merging a live model does not
    for j in range(total.size):
        total[j] = scale * total[j]
    for j in range(goal.size):
        goal[j] = goal[j] + total[j]


@fused
def add_product(left, right, scale, out):  # (rows, rank), (rank, columns), scale -> += (rows, columns); rank by fours
    # Each value is summed over the rank in order, from zero: as BLAS does for the ranks of adapters, so that a weight in a
    # file has the bits that merging the live model gives it.
    whole = out.shape[0] - out.shape[0] % 4
    sums = np.empty((4, _TILE), np.float32)
    for start in range(0, out.shape[1], _TILE):
        stop = min(start + _TILE, out.shape[1])
        w, x, y, z = sums[0, : stop - start], sums[1, : stop - start], sums[2, : stop - start], sums[3, : stop - start]
        for i in range(0, whole, 4):
            sums[:] = 0
            for k in range(0, left.shape[1], 4):
                w0, w1, w2, w3 = left[i, k], left[i, k + 1], left[i, k + 2], left[i, k + 3]
                x0, x1, x2, x3 = left[i + 1, k], left[i + 1, k + 1], left[i + 1, k + 2], left[i + 1, k + 3]
                y0, y1, y2, y3 = left[i + 2, k], left[i + 2, k + 1], left[i + 2, k + 2], left[i + 2, k + 3]
                z0, z1, z2, z3 = left[i + 3, k], left[i + 3, k + 1], left[i + 3, k + 2], left[i + 3, k + 3]
                a, b = right[k, start:stop], right[k + 1, start:stop]
                c, d = right[k + 2, start:stop], right[k + 3, start:stop]
                for j in range(w.size):
                    aj, bj, cj, dj = a[j], b[j], c[j], d[j]
                    w[j] = w[j] + w0 * aj + w1 * bj + w2 * cj + w3 * dj
                    x[j] = x[j] + x0 * aj + x1 * bj + x2 * cj + x3 * dj
                    y[j] = y[j] + y0 * aj + y1 * bj + y2 * cj + y3 * dj
                    z[j] = z[j] + z0 * aj + z1 * bj + z2 * cj + z3 * dj
            for row in range(4):
                _add_scaled(sums[row, : stop - start], scale, out[i + row, start:stop])
        for i in range(whole, out.shape[0]):
            w[:] = 0
            for k in range(left.shape[1]):
                w0, a = left[i, k], right[k, start:stop]
                for j in range(w.size):
                    w[j] = w[j] + w0 * a[j]
            _add_scaled(w, scale, out[i, start:stop])
