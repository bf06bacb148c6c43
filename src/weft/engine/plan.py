"""What a run will do, decided from headers alone: output tensors, shards, memory, disk and time."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from weft.checkpoint.checkpoint import LazyTensor
from weft.checkpoint.dtypes import DType
from weft.engine.merging import Merge

MEGABYTE = 1_000_000
# Resident memory of the process before any weights: interpreter, numpy, numba and compiled kernels (measured).
BASELINE_BYTES = 175 * MEGABYTE
COPY_BYTES = 4 << 20  # a raw copy moves this much at a time
_SCRATCH_ROWS = 6  # buffers of one chunk beside the inputs and one for each model: output, random numbers, marks …
# Bytes a second that one thread moves through a merge with the files in the page cache (measured, 2-core machine).
_BYTES_PER_SECOND = {"copy": 1.2e9, "one pass": 0.9e9, "several passes": 0.45e9}


@dataclass
class OutputTensor:
    """One tensor of the output.

    Attributes:
        name: name in the output.
        dtype: element type in the output.
        source: where it comes from: a tensor to copy, or a merge to compute.
        rule: the ledger's word for what is done: the method's name, "copied", "renamed" …
    """

    name: str
    dtype: DType
    source: LazyTensor | Merge
    rule: str

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the axes."""
        return self.source.inputs.shape if isinstance(self.source, Merge) else self.source.shape

    @property
    def nbytes(self) -> int:
        """Bytes in the output."""
        size = self.source.inputs.size if isinstance(self.source, Merge) else self.source.size
        return self.dtype.nbytes(size)

    @property
    def input_bytes(self) -> int:
        """Bytes read once."""
        return self.source.inputs.nbytes if isinstance(self.source, Merge) else self.source.nbytes


@dataclass
class LedgerRow:
    """What became of one input tensor: in which model, under which rule, as which output tensor (empty if dropped)."""

    model: str
    tensor: str
    rule: str
    output: str


@dataclass
class Plan:
    """Everything a run needs to know.

    Attributes:
        outputs: tensors of the output, in order.
        shards: file name -> names of its tensors.
        files: small files to write beside the weights: name -> content.
        copies: companion files to copy: name -> path.
        single_file: the output is one .safetensors file, not a folder.
        identity: the recipe and the fingerprints of its inputs; an interrupted run resumes only if it is unchanged.
        ledger: what becomes of every input tensor.
        notes: things a user should read before the run.
        metadata: string metadata of the output files.
    """

    outputs: list[OutputTensor]
    shards: dict[str, list[str]]
    identity: dict[str, Any]
    files: dict[str, bytes] = field(default_factory=dict)
    copies: dict[str, Path] = field(default_factory=dict)
    single_file: bool = False
    ledger: list[LedgerRow] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    metadata: dict[str, str] = field(default_factory=dict)
    report: dict[str, Any] = field(default_factory=dict)

    @property
    def output_bytes(self) -> int:
        """Bytes of all output tensors."""
        return sum(o.nbytes for o in self.outputs)

    def memory(self, threads: int, budget: int) -> int:
        """Estimate of the peak resident memory in bytes, without the page cache."""
        allowance = staging_allowance(self, threads, budget)
        needs = sorted((job_bytes(o, allowance) for o in self.outputs), reverse=True)
        return BASELINE_BYTES + sum(needs[:threads])

    def seconds(self, threads: int) -> float:
        """Rough estimate of the run time with files in the page cache."""
        total = 0.0
        for output in self.outputs:
            kind = "copy"
            if isinstance(output.source, Merge):
                kind = "one pass" if output.source.passes == 1 else "several passes"
            total += (output.input_bytes + output.nbytes) / _BYTES_PER_SECOND[kind]
        return 0.6 + total / threads


def scratch_bytes(output: OutputTensor) -> int:
    """Working memory of one job, whatever the budget."""
    if not isinstance(output.source, Merge):
        return 3 * COPY_BYTES
    inputs = output.source.inputs
    rows = 2 * len(inputs.tensors) + (inputs.base is not None) + _SCRATCH_ROWS
    return inputs.chunk_size * 4 * rows


def staging_allowance(plan: Plan, threads: int, budget: int) -> int:
    """Bytes of input that one thread may keep in memory between passes."""
    scratch = max((scratch_bytes(o) for o in plan.outputs), default=0)
    return max(0, (budget - BASELINE_BYTES) // threads - scratch)


def staged(output: OutputTensor, allowance: int) -> bool:
    """Whether the job reads its inputs once and keeps them for all its passes."""
    merge = output.source
    return isinstance(merge, Merge) and merge.passes > 1 and not merge.model_scope and merge.inputs.nbytes <= allowance


def job_bytes(output: OutputTensor, allowance: int) -> int:
    """Memory of one job."""
    return scratch_bytes(output) + (output.input_bytes if staged(output, allowance) else 0)


def split_into_shards(sizes: Mapping[str, int], shard_bytes: int, stem: str = "model") -> dict[str, list[str]]:
    """Names by output file, in order, each file at most ``shard_bytes`` (a larger tensor gets a file of its own).

    >>> split_into_shards({"a": 3, "b": 3, "c": 2}, 5)
    {'model-00001-of-00002.safetensors': ['a'], 'model-00002-of-00002.safetensors': ['b', 'c']}
    >>> split_into_shards({"a": 3}, 5)
    {'model.safetensors': ['a']}
    """
    groups: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if groups[-1] and filled + size > shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    if len(groups) == 1:
        return {f"{stem}.safetensors": groups[0]}
    return {f"{stem}-{i:05d}-of-{len(groups):05d}.safetensors": names for i, names in enumerate(groups, 1)}


def default_threads() -> int:
    """Cores this process may use, at most 8: beyond that the disk is the limit."""
    return max(1, min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1))


def default_memory() -> int:
    """The smaller of 512 MB and a quarter of the machine's memory."""
    try:
        physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        physical = 4_000 * MEGABYTE
    return min(512 * MEGABYTE, physical // 4)


def index_file(shards: Mapping[str, Sequence[str]], total_bytes: int) -> dict[str, Any]:
    """The ``model.safetensors.index.json`` of sharded weights."""
    weight_map = {name: shard for shard, names in shards.items() for name in names}
    return {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
