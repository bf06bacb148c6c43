"""Embedding tensors whose rows are gathered from several models, computed when read."""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from weft.checkpoint.checkpoint import Checkpoint, LazyTensor
from weft.checkpoint.dtypes import DTYPES
from weft.checkpoint.header import TensorInfo
from weft.engine.chunks import CHUNK
from weft.kernels.convert import to_float32

_INPUT_NAMES = (
    "embed_tokens.weight", "wte.weight", "word_embeddings.weight", "tok_embeddings.weight", "embed_in.weight",
    "shared.weight", "token_embedding.weight", "embeddings.weight", "embedding.weight",
)  # fmt: skip
_OUTPUT_NAMES = (
    "lm_head.weight", "lm_head.bias", "embed_out.weight", "output.weight", "output_layer.weight", "head.weight",
    "decoder.weight", "decoder.bias", "predictions.bias", "vocab_projector.weight", "vocab_projector.bias",
)  # fmt: skip


def _is_called(name: str, endings: Sequence[str]) -> bool:
    return any(name == e or name.endswith(f".{e}") for e in endings)


def vocabulary_size(config: Mapping[str, Any]) -> int | None:
    """The number of embedding rows that a config states."""
    for level in (config, config.get("text_config")):
        if isinstance(level, Mapping) and isinstance(level.get("vocab_size"), int):
            return int(level["vocab_size"])
    return None


def with_vocabulary_size(config: Mapping[str, Any], rows: int) -> dict[str, Any]:
    """The config for ``rows`` embedding rows, said wherever it says so."""
    result = {k: with_vocabulary_size(v, rows) if k == "text_config" and v else v for k, v in config.items()}
    if "vocab_size" in config or not isinstance(config.get("text_config"), Mapping):
        result["vocab_size"] = rows
    return result


def embedding_rows(checkpoint: Checkpoint) -> int | None:
    """How many rows the token embedding has; None if no tensor is called like one."""
    found = {n: t.shape[0] for n, t in checkpoint.tensors.items() if _is_called(n, _INPUT_NAMES) and len(t.shape) == 2}
    stated = vocabulary_size(checkpoint.config)
    if stated in found.values():
        return stated
    order = sorted(found, key=lambda n: next(i for i, e in enumerate(_INPUT_NAMES) if _is_called(n, [e])))
    return found[order[0]] if order else None


def is_vocabulary(name: str, tensor: LazyTensor, rows: int | None) -> bool:
    """Whether the first axis counts tokens: decided by the name, and by the length where ``rows`` is known."""
    if not tensor.shape or not _is_called(name, (*_INPUT_NAMES, *_OUTPUT_NAMES)):
        return False
    return rows is None or tensor.shape[0] == rows


@dataclass(frozen=True)
class Entries:
    """Where each row of a gathered tensor comes from.

    Row i is the mean of the rows ``row[k]`` of the tensors ``tensor[k]`` for k from ``offsets[i]`` up to
    ``offsets[i + 1]``. A row without any is zero; from row ``mean_from`` on it is the mean of the rows before.
    """

    offsets: np.ndarray  # (rows + 1,) int64
    tensor: np.ndarray  # (entries,) int64
    row: np.ndarray  # (entries,) int64
    mean_from: int

    @property
    def rows(self) -> int:
        """Rows of the gathered tensor."""
        return len(self.offsets) - 1


class RowGather:
    """The bytes (float32) of a tensor whose rows are put together from those of ``tensors``."""

    def __init__(self, name: str, tensors: Sequence[LazyTensor], entries: Entries):
        self.name, self._tensors, self._entries = name, list(tensors), entries
        self._width = math.prod(tensors[0].shape[1:])
        self.size = entries.rows * self._width * 4
        self._mean: np.ndarray | None = None
        self._lock = threading.Lock()
        single = np.diff(entries.offsets) == 1
        first = np.minimum(entries.offsets[:-1], max(len(entries.row) - 1, 0))
        tensor, row = (a[first] if len(a) else first for a in (entries.tensor, entries.row))
        joined = single[1:] & single[:-1] & (tensor[1:] == tensor[:-1]) & (row[1:] == row[:-1] + 1)
        self._run_ends = np.append(np.flatnonzero(~joined) + 1, entries.rows)

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """See :class:`weft.checkpoint.files.ByteSource`."""
        out = np.frombuffer(buffer, np.float32)
        start, done = offset // 4, 0
        offsets, width = self._entries.offsets, self._width
        while done < out.size:
            row, column = divmod(start + done, width)
            first, last = int(offsets[row]), int(offsets[row + 1])
            run = 1
            if last - first == 1:
                run = int(self._run_ends[np.searchsorted(self._run_ends, row, side="right")]) - row
            count = min(run * width - column, out.size - done, CHUNK)
            self._row(row, first, last, column, out[done : done + count])
            done += count

    def close(self) -> None:
        """The tensors belong to their own checkpoints."""

    def _row(self, row: int, first: int, last: int, column: int, out: np.ndarray) -> None:
        if last == first:
            out[:] = self._average()[column : column + out.size] if row >= self._entries.mean_from else 0
            return
        self._values(first, column, out)
        if last - first > 1:
            other = np.empty_like(out)
            for entry in range(first + 1, last):
                self._values(entry, column, other)
                out += other
            out /= np.float32(last - first)

    def _values(self, entry: int, column: int, out: np.ndarray) -> None:
        tensor = self._tensors[self._entries.tensor[entry]]
        element = int(self._entries.row[entry]) * self._width + column
        width = tensor.dtype.bits // 8
        if tensor.dtype is DTYPES["F32"]:
            tensor.read_into(out.view(np.uint8).data, element * 4)
            return
        raw = np.empty(out.size * width, np.uint8)
        tensor.read_into(raw.data, element * width)
        to_float32(raw.view(tensor.dtype.numpy), tensor.dtype, out)

    def _average(self) -> np.ndarray:
        """The mean of all rows before ``mean_from``."""
        with self._lock:
            if self._mean is None:
                total = np.zeros(self._width, np.float64)
                step = max(1, CHUNK // self._width)
                for start in range(0, self._entries.mean_from, step):
                    rows = min(step, self._entries.mean_from - start)
                    block = np.empty((rows, self._width), np.float32)
                    self.read_into(block.reshape(-1).view(np.uint8).data, start * self._width * 4)
                    total += block.sum(axis=0, dtype=np.float64)
                self._mean = (total / self._entries.mean_from).astype(np.float32)
            return self._mean


def gather(example: LazyTensor, tensors: Sequence[LazyTensor], entries: Entries) -> LazyTensor:
    """A lazy float32 tensor like ``example`` with gathered rows."""
    shape = (entries.rows, *example.shape[1:])
    info = TensorInfo(example.name, DTYPES["F32"], shape, 0, math.prod(shape) * 4)
    return LazyTensor(info, RowGather(example.name, tensors, entries), example.natural_dtype)


def first_rows(tensor: LazyTensor, rows: int) -> LazyTensor:
    """The first ``rows`` rows of a tensor, as stored."""
    shape = (rows, *tensor.shape[1:])
    info = TensorInfo(tensor.name, tensor.dtype, shape, tensor.info.offset, tensor.dtype.nbytes(math.prod(shape)))
    return LazyTensor(info, tensor.source, tensor.stored)
