"""Input tensors read in cache-sized chunks of float32, as often as a method asks.

Chunk boundaries depend on the tensor's shape alone, never on the memory budget or the number of threads: this is
what makes a run's output the same bytes everywhere on one class of machine.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import numpy as np

from weft.checkpoint.checkpoint import LazyTensor
from weft.checkpoint.dtypes import DTYPES
from weft.errors import NonFiniteError, ShapeError
from weft.kernels.convert import bfloat16_difference, count_non_finite, subtract_in_place, to_float32
from weft.kernels.random import Stream

CHUNK = (
    1 << 17
)  # elements: 512 KiB of float32 an input, so that four inputs and scratch stay in a 2 MiB second-level cache
T = TypeVar("T")


class Workspace:
    """Named buffers of one thread, reused from chunk to chunk and from tensor to tensor."""

    def __init__(self) -> None:
        self._buffers: dict[str, np.ndarray] = {}

    def array(self, name: str, shape: tuple[int, ...], dtype: Any = np.float32) -> np.ndarray:
        """An uninitialised array of ``shape``; the memory behind ``name`` is kept and grows as needed."""
        count = math.prod(shape)
        nbytes = count * np.dtype(dtype).itemsize
        buffer = self._buffers.get(name)
        if buffer is None or buffer.nbytes < nbytes:
            self._buffers.pop(name, None)
            buffer = self._buffers[name] = np.empty(nbytes, np.uint8)
        return buffer[:nbytes].view(dtype).reshape(shape)


@dataclass
class Chunk:
    """A run of elements of all inputs of one output tensor.

    Attributes:
        tensors: (models, n) float32, the models' values, or their differences from the base.
        base: (n,) float32, or None.
        start: index of the first element in the flattened tensor.
        key: (number of the tensor, number of the chunk): where this chunk stands in the whole.
        row_length: length of the last axis; chunks of row-wise methods hold whole rows.
        workspace: scratch buffers.
        stream: random numbers of this tensor, the same for any chunking.
    """

    tensors: np.ndarray
    base: np.ndarray | None
    start: int
    key: tuple[int, int]
    row_length: int
    workspace: Workspace
    stream: Stream

    @property
    def size(self) -> int:
        """Number of elements."""
        return int(self.tensors.shape[1])

    def uniform(self, lane: int) -> np.ndarray:
        """(n,) float32 random numbers in [0, 1) for model ``lane``; valid until the next call."""
        return self.stream.uniform(self.start, self.size, lane, self.workspace.array("uniform", (self.size,)))

    def scratch(self, name: str, *, models: int | None = None) -> np.ndarray:
        """An uninitialised (n,) or (models, n) float32 buffer."""
        shape = (self.size,) if models is None else (models, self.size)
        return self.workspace.array(f"scratch {name}", shape)


@dataclass
class Inputs:
    """The tensors that one output tensor is computed from.

    Attributes:
        name: name of the output tensor, for messages and random streams.
        tensors: one for each model, all of one shape.
        base: the base model's tensor, if the method has one.
        deltas: hand out differences from the base instead of values.
        granularity: "element", "row" or "tensor": what a chunk must not cut.
        index: number of the output tensor in the plan.
        seed: of the random streams.
        purpose: name of the method, which keys the random streams.
        allow_non_finite: let NaN and infinity through.
    """

    name: str
    tensors: Sequence[LazyTensor]
    base: LazyTensor | None = None
    deltas: bool = False
    granularity: str = "element"
    index: int = 0
    seed: int = 0
    purpose: str = ""
    allow_non_finite: bool = False
    labels: Sequence[str] = ()
    _checked: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        for position, tensor in enumerate(self._all):
            if tensor.shape != self.shape:
                raise ShapeError(
                    f"{self.name}: input {self._label(position)} has shape {list(tensor.shape)}, "
                    f"input {self._label(0)} has {list(self.shape)}. "
                    "The models differ in architecture or vocabulary; choose a tokenizer source, or a policy for "
                    "tensors that do not match."
                )

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the inputs and of the output."""
        return self.tensors[0].shape

    @property
    def size(self) -> int:
        """Elements of one input."""
        return self.tensors[0].size

    @property
    def nbytes(self) -> int:
        """Bytes of all inputs as stored."""
        return sum(t.nbytes for t in self._all)

    @property
    def row_length(self) -> int:
        """Length of the last axis; 1 for a scalar."""
        return self.shape[-1] if self.shape else 1

    @cached_property
    def bounds(self) -> list[tuple[int, int]]:
        """Where chunks start and stop."""
        step = CHUNK
        if self.granularity == "tensor" or (self.granularity == "row" and len(self.shape) < 2):
            step = max(self.size, 1)
        elif self.granularity == "row":
            row = max(self.row_length, 1)
            # a multiple of 4 rows, because random streams start at multiples of 4 elements
            step = max(CHUNK // row // 4 * 4, 4) * row
        return [(a, min(a + step, self.size)) for a in range(0, self.size, step)]

    @property
    def chunk_size(self) -> int:
        """Elements of the largest chunk."""
        bounds = self.bounds
        return bounds[0][1] - bounds[0][0] if bounds else 0

    def stage(self, workspace: Workspace) -> list[np.ndarray]:
        """Read all inputs into memory once, for methods that pass over them several times."""
        staged = []
        for position, tensor in enumerate(self._all):
            raw = workspace.array(f"resident {position}", (tensor.nbytes,), np.uint8)
            tensor.read_into(raw.data)
            staged.append(raw)
        return staged

    def chunks(self, workspace: Workspace, staged: list[np.ndarray] | None = None) -> Iterator[Chunk]:
        """All chunks in order. A chunk's arrays are valid until the next one is taken."""
        for number in range(len(self.bounds)):
            yield self.chunk(number, workspace, staged)

    def chunk(self, number: int, workspace: Workspace, staged: list[np.ndarray] | None = None) -> Chunk:
        """Read chunk ``number``."""
        start, stop = self.bounds[number]
        count = stop - start
        values = workspace.array("tensors", (len(self._all), count))
        models, base = values[: len(self.tensors)], None
        if self.base is not None:
            base = values[-1]
            self._read(len(self.tensors), self.base, start, base, None, workspace, staged)
        for position, tensor in enumerate(self.tensors):
            self._read(position, tensor, start, models[position], base if self.deltas else None, workspace, staged)
        stream = Stream(self.seed, self.purpose, self.name)
        return Chunk(models, base, start, (self.index, number), self.row_length, workspace, stream)

    @cached_property
    def _all(self) -> list[LazyTensor]:
        return [*self.tensors, self.base] if self.base is not None else list(self.tensors)

    def _label(self, position: int) -> str:
        return self.labels[position] if position < len(self.labels) else str(position + 1)

    def _read(
        self,
        position: int,
        tensor: LazyTensor,
        start: int,
        out: np.ndarray,
        base: np.ndarray | None,
        workspace: Workspace,
        staged: list[np.ndarray] | None,
    ) -> None:
        """Values of one input, less ``base`` if it is given, as float32 into ``out``."""
        width = tensor.dtype.bits // 8
        count = out.size
        if staged is not None:
            raw = staged[position][start * width : (start + count) * width]
        elif tensor.dtype is DTYPES["F32"]:
            raw = out.view(np.uint8)
            tensor.read_into(raw.data, start * width)
        else:
            raw = workspace.array("raw", (count * width,), np.uint8)
            tensor.read_into(raw.data, start * width)
        if base is not None and tensor.dtype is DTYPES["BF16"]:
            bfloat16_difference(raw.view(np.uint16), base, out)
        else:
            if staged is not None or tensor.dtype is not DTYPES["F32"]:
                to_float32(raw.view(tensor.dtype.numpy), tensor.dtype, out)
            if base is not None:
                subtract_in_place(out, base)
        if not self.allow_non_finite and position not in self._checked:
            bad = count_non_finite(out.view(np.uint32))
            if bad:
                where = start + int(np.flatnonzero(~np.isfinite(out))[0])
                raise NonFiniteError(
                    f"{self.name}: input {self._label(position)} holds NaN or infinity "
                    f"({bad} in this part, the first at flat index {where}). The checkpoint is damaged or its training "
                    "diverged. Leave the model out, or pass allow_non_finite=True to let such values through."
                )
            if start + count >= self.size:
                self._checked.add(position)


class Scan:
    """Passes over every chunk in scope: those of one tensor, or of the whole model.

    A method's ``prepare`` receives one and may pass over the data as often as it needs.
    """

    def __init__(
        self,
        inputs: Sequence[Inputs],
        workspace: Callable[[], Workspace],
        staged: list[np.ndarray] | None = None,
        executor: Executor | None = None,
    ):
        self.inputs = inputs
        self._workspace = workspace
        self._staged = staged
        self._executor = executor

    @property
    def models(self) -> int:
        """Number of models."""
        return len(self.inputs[0].tensors)

    @property
    def size(self) -> int:
        """Elements of one model in scope."""
        return sum(i.size for i in self.inputs)

    @property
    def rows(self) -> int:
        """Rows (runs of the last axis) of one model in scope."""
        return sum(i.size // max(i.row_length, 1) for i in self.inputs)

    def fold(self, visit: Callable[[Chunk, T], None], zero: Callable[[], T]) -> T:
        """Let ``visit`` add every chunk to an accumulator that supports ``+=``.

        Integer arrays are added up by each thread, since their sum does not depend on the order; accumulators of
        anything else are kept for each tensor and added in order.
        """
        first = zero()
        if isinstance(first, np.ndarray) and first.dtype.kind in "iu":
            return self._fold_exact(visit, zero)

        def one(inputs: Inputs) -> T:
            total = zero()
            for chunk in inputs.chunks(self._workspace(), self._staged):
                visit(chunk, total)
            return total

        for other in self._map(one):
            first += other
        return first

    def _fold_exact(self, visit: Callable[[Chunk, T], None], zero: Callable[[], T]) -> T:
        totals: dict[int, T] = {}

        def one(inputs: Inputs) -> None:
            total = totals.setdefault(threading.get_ident(), zero())
            for chunk in inputs.chunks(self._workspace(), self._staged):
                visit(chunk, total)

        for _ in self._map(one):
            pass
        result = zero()
        for total in totals.values():
            result += total  # type: ignore[operator]
        return result

    def collect(self, visit: Callable[[Chunk], T]) -> dict[tuple[int, int], T]:
        """``visit`` of every chunk, by :attr:`Chunk.key`, in order."""

        def one(inputs: Inputs) -> list[tuple[tuple[int, int], T]]:
            return [(chunk.key, visit(chunk)) for chunk in inputs.chunks(self._workspace(), self._staged)]

        return dict(pair for pairs in self._map(one) for pair in pairs)

    def _map(self, one: Callable[[Inputs], Any]) -> Iterator[Any]:
        if self._executor is None or len(self.inputs) == 1:
            return map(one, self.inputs)
        return iter(list(self._executor.map(one, self.inputs)))


class ThreadWorkspaces(threading.local):
    """A workspace for each thread."""

    def __init__(self) -> None:
        self.workspace = Workspace()

    def __call__(self) -> Workspace:
        """The calling thread's workspace."""
        return self.workspace
