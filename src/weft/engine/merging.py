"""Merges as chunked computations: one description serves tensors in memory and checkpoints of any size.

A merge method is two functions. ``prepare(scan, config)`` may pass over the data to find global numbers (a norm, a
threshold); ``combine(chunk, config, state, out)`` computes one chunk. The engine decides where chunks come from,
how many threads work, and what stays in memory.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any

import numpy as np

from weft.checkpoint.checkpoint import LazyTensor
from weft.checkpoint.dtypes import DTYPES, DType
from weft.checkpoint.header import TensorInfo
from weft.checkpoint.memory import from_mapping
from weft.engine.chunks import Inputs, Scan, ThreadWorkspaces, Workspace
from weft.errors import RecipeError, ShapeError
from weft.kernels.convert import OUTPUT_DTYPES, from_float32
from weft.kernels.jit import kernel
from weft.method import Method


@dataclass(frozen=True)
class MergeMethod(Method):
    """A registry row of the family ``merge``.

    Attributes:
        combine: ``(chunk, config, state, out)``; writes (n,) float32 into ``out``.
        prepare: ``(scan, config) -> state``, or None if chunks need nothing but themselves.
        deltas: chunks hold differences from the base; the base is added to what ``combine`` writes.
        base: "required", "optional" or "none".
        models: fewest and most models (besides the base; None: no limit).
        granularity: what a chunk must not cut: "element", "row" or "tensor".
        model_scope: ``config -> key``: tensors with equal keys are prepared together (True: all of them); False where
            ``prepare`` needs one tensor only.
        function: the public function on tensors.
        differs: for a row of mergekit's, how it differs from weft's row of the same method and why.
    """

    combine: Callable[..., None] = None  # type: ignore[assignment]
    prepare: Callable[..., Any] | None = None
    deltas: bool = False
    base: str = "none"
    models: tuple[int, int | None] = (1, None)
    granularity: str = "element"
    model_scope: Callable[[Any], Hashable] = lambda config: False
    function: Callable[..., Any] | None = None
    differs: str = ""

    def check_models(self, count: int, has_base: bool) -> None:
        """Raise ``RecipeError`` unless the method takes ``count`` models with or without a base."""
        low, high = self.models
        if count < low or (high is not None and count > high):
            need = f"exactly {low}" if low == high else f"at least {low}" if high is None else f"{low} to {high}"
            raise RecipeError(f"{self.name} needs {need} model(s) besides the base, got {count}.")
        if self.base == "required" and not has_base:
            raise RecipeError(f"{self.name} works on differences from a common start: name it (base=…).")
        if self.base == "none" and has_base:
            raise RecipeError(f"{self.name} has no use for a base model; leave it out, or list it among the models.")


class Stage:
    """What several tensors of one merge share: the method and, in model scope, one state for all of them."""

    def __init__(self, method: MergeMethod):
        self.method = method
        self.merges: list[Merge] = []
        self.prepared: dict[Any, Any] = {}
        self.reader = _Reader()
        self.workspaces = ThreadWorkspaces()
        self._lock = threading.Lock()

    def state(self, config: Any, workspace: Callable[[], Workspace], executor: Executor | None = None) -> Any:
        """The state of all tensors whose scope is that of ``config``; computed once."""
        assert self.method.prepare is not None
        key = self.method.model_scope(config)
        with self._lock:
            if key not in self.prepared:
                scope = [m.inputs for m in self.merges if self.method.model_scope(m.config) == key]
                self.prepared[key] = self.method.prepare(Scan(scope, workspace, executor=executor), config)
            return self.prepared[key]


@dataclass
class Merge:
    """One output tensor: a method, its configuration for this tensor, and its inputs."""

    stage: Stage
    config: Any
    inputs: Inputs
    workspaces: Callable[[], Workspace] | None = None
    state: Any = None
    is_ready: bool = False

    def __post_init__(self) -> None:
        self.stage.merges.append(self)

    @property
    def model_scope(self) -> bool:
        """Whether preparing needs the whole model."""
        return self.stage.method.prepare is not None and self.stage.method.model_scope(self.config) is not False

    @property
    def passes(self) -> int:
        """How often chunks are read when they are not kept: once, or more where the method prepares."""
        return 1 if self.stage.method.prepare is None else 3

    def ready(self, workspace: Workspace, staged: list[np.ndarray] | None = None) -> None:
        """Find the state that chunks need."""
        method = self.stage.method
        if self.is_ready or method.prepare is None:
            return
        if self.model_scope:
            self.state = self.stage.state(self.config, self.workspaces or self.stage.workspaces)
        else:
            with _quiet():
                self.state = method.prepare(Scan([self.inputs], lambda: workspace, staged), self.config)
        self.is_ready = True

    def compute(self, number: int, workspace: Workspace, staged: list[np.ndarray] | None = None) -> np.ndarray:
        """(n,) float32 of chunk ``number``, valid until the next call with this workspace."""
        chunk = self.inputs.chunk(number, workspace, staged)
        out = workspace.array("out", (chunk.size,))
        with _quiet():
            self.stage.method.combine(chunk, self.config, self.state, out)
        if self.inputs.deltas and chunk.base is not None:
            add_in_place(out, chunk.base)
        return out


def _quiet() -> np.errstate:
    """Infinities that the user let through are no news; those that a merge makes are refused when it is written."""
    return np.errstate(invalid="ignore", over="ignore", divide="ignore")


class _Reader(threading.local):
    """What one thread needs to read a step's tensors: one set of buffers, and the chunk that they hold."""

    def __init__(self) -> None:
        self.workspace = Workspace()
        self.holds: tuple[int, int] | None = None
        self.values = np.empty(0, np.float32)


class MergeSource:
    """A merge that is read like a file: the input of a later step, computed when read, never stored."""

    def __init__(self, merge: Merge):
        self.merge = merge
        self.name = merge.inputs.name
        self.size = merge.inputs.size * 4
        self._lock = threading.Lock()

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """float32 values, from byte ``offset``."""
        merge, reader = self.merge, self.merge.stage.reader
        with self._lock:
            if not merge.is_ready:
                reader.holds = None
                merge.ready(reader.workspace)
        target = np.frombuffer(buffer, np.float32)
        start = offset // 4
        for number, (low, high) in enumerate(merge.inputs.bounds):
            a, b = max(low, start), min(high, start + target.size)
            if a >= b:
                continue
            if reader.holds != (id(merge), number):
                reader.holds = None
                reader.values = merge.compute(number, reader.workspace)
                reader.holds = (id(merge), number)
            target[a - start : b - start] = reader.values[a - low : b - low]

    def close(self) -> None:
        """The inputs belong to their own checkpoints."""


def as_lazy(merge: Merge) -> LazyTensor:
    """The merged tensor as a lazy float32 tensor."""
    inputs = merge.inputs
    info = TensorInfo(inputs.name, DTYPES["F32"], inputs.shape, 0, inputs.size * 4)
    return LazyTensor(info, MergeSource(merge))


def merge_tensors(
    method: MergeMethod,
    tensors: Sequence[Any],
    config: Any,
    *,
    base: Any = None,
    are_deltas: bool = False,
    seed: int = 0,
    name: str = "tensor",
) -> Any:
    """Merge tensors in memory: what the public functions of the family call.

    Args:
        method: the registry row.
        tensors: one torch tensor or numpy array for each model, all of one shape; or one mapping of names to tensors
            for each model.
        config: the method's configuration.
        base: the common start in the same form, if the method has one.
        are_deltas: ``tensors`` are differences already, and so is the result.
        seed, name: key the random numbers, exactly as a run over checkpoints does.

    Returns:
        The merge in the form and dtype of the first tensor.
    """
    if not tensors:
        raise RecipeError(f"{method.name} needs at least one tensor.")
    method.check_models(len(tensors), base is not None or (are_deltas and method.base == "required"))
    if isinstance(tensors[0], Mapping):
        models, names = list(tensors), list(tensors[0])
        for model in models[1:] + ([base] if base is not None else []):
            if set(model) != set(names):
                odd = sorted(set(model) ^ set(names))
                raise ShapeError(
                    f"The mappings must hold the same names; only some have {odd[0]!r} ({len(odd)} differ)."
                )
    else:
        models, names = [{name: t} for t in tensors], [name]
        base = None if base is None else {name: base}
    opened = [from_mapping(dict(m)) for m in models]
    opened_base = None if base is None else from_mapping(dict(base))
    stage, workspace = Stage(method), Workspace()
    result: dict[str, Any] = {}
    merges = {}
    for index, key in enumerate(names):
        if isinstance(tensors[0], Mapping) and not opened[0][key].dtype.floating:
            continue  # counters and masks are the first model's
        inputs = Inputs(
            key,
            [o[key] for o in opened],
            None if opened_base is None else opened_base[key],
            deltas=method.deltas and not are_deltas,
            granularity=method.granularity,
            index=index,
            seed=seed,
            purpose=method.name,
        )
        merges[key] = Merge(stage, config, inputs, lambda: workspace)
    for key in names:
        if key not in merges:
            result[key] = models[0][key]
            continue
        merge = merges[key]
        merge.ready(workspace)
        parts = [merge.compute(number, workspace).copy() for number in range(len(merge.inputs.bounds))]
        flat = np.concatenate(parts) if parts else np.empty(0, np.float32)
        result[key] = _like(flat.reshape(merge.inputs.shape), models[0][key], merge.inputs.tensors[0].dtype)
    return result if isinstance(tensors[0], Mapping) else result[name]


def _like(values: np.ndarray, example: Any, dtype: DType) -> Any:
    if dtype.name not in OUTPUT_DTYPES:
        dtype = DTYPES["F32"]
    bits = from_float32(values, dtype)
    if isinstance(example, np.ndarray):
        return bits
    import torch

    tensor = torch.from_numpy(bits.reshape(-1)).view(getattr(torch, dtype.torch)).reshape(bits.shape)
    return tensor.to(example.device)


@kernel
def add_in_place(out, base):  # (n,) += (n,)
    for i in range(out.size):
        out[i] += base[i]
