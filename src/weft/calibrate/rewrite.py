"""Change a model on disk block by block, each with statistics of what the changed blocks before it give.

    def change(name, weight, statistics):          # weight (out, in) in float32
        return weight * wanda_mask(weight, statistics.norm(name), sparsity=0.5)

    rewrite("model/", batches, change, "pruned/", what="scales")

A block is loaded, its statistics are gathered from the activations that the changed blocks before it give, its layers are
changed, it is written, it runs over the data with its new weights, and it is dropped. What no change touches comes out as
the same bytes. Peak memory: that of :func:`weft.calibrate.collect`, and one matrix in float32.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import weft
from weft.calibrate.check import check_architecture
from weft.calibrate.collectors import KINDS
from weft.calibrate.experts import unfused
from weft.calibrate.facts import Facts
from weft.calibrate.forward import digest_of
from weft.calibrate.source import FromCheckpoint
from weft.calibrate.statistics import Statistics
from weft.calibrate.walker import Block, Walk
from weft.calibrate.watch import check_what
from weft.calibrate.watch_block import block_layers, results_of, watched
from weft.checkpoint.checkpoint import Checkpoint, LazyTensor
from weft.checkpoint.open import open_checkpoint
from weft.engine.checkpoint_writer import SHARD_BYTES, CheckpointWriter
from weft.engine.progress import Progress
from weft.errors import CheckpointError, NonFiniteError, RecipeError
from weft.function.layout import layout_of
from weft.function.where import Selector, nearest_names

Change = Callable[[str, Tensor, Statistics], Tensor | None]


def rewrite(
    model: Checkpoint | str | Path,
    batches: Iterable[Any] | None,
    change: Change,
    output: str | os.PathLike[str],
    *,
    what: str | Iterable[str] = (),
    where: Selector = "*",
    recipe: Mapping[str, Any] | None = None,
    memory: int = 1 << 30,
    shard_bytes: int = SHARD_BYTES,
    force: bool = False,
    check: bool = True,
    progress: Progress | None = None,
) -> Path:
    """Write a changed copy of a transformers model.

    Args:
        model: a folder, Hub id or open checkpoint.
        batches: calibration data; None for a change that needs none.
        change: given a layer's full name, its matrix (out, in) in float32 and the statistics of its block, returns the new
            matrix, or None to leave it. Fused experts come one by one; kernels of convolutions as (out, in · size).
        output: the folder.
        what: statistics to gather before a block is changed: kinds of :data:`weft.calibrate.collectors.KINDS`.
        where: which layers of the blocks to change.
        recipe: what is done, in words for ``weft.json``.
        memory: bytes of hidden states to keep in memory.
        shard_bytes: largest file.
        force: replace an output that weft made.
        check: see :class:`weft.calibrate.Walk`.
        progress: where to report.

    Returns:
        The folder, with the model's configuration and tokenizer and a ``weft.json`` that lists what changed.

    Raises:
        RecipeError: no layer was chosen, or a change returned another shape.
        NonFiniteError: a change returned NaN or infinite values.
        CheckpointError: the model cannot be read or walked.
        OutputError: the output exists or cannot be written.
    """
    kinds = check_what(what, list(KINDS)) if what else []
    if kinds and batches is None:
        raise RecipeError(f"{', '.join(kinds)} are statistics of data, and there is none; give batches.")
    data = None if batches is None else list(batches)
    checkpoint = open_checkpoint(model)
    progress = progress or Progress()
    chosen: set[str] = set()
    try:
        with CheckpointWriter(checkpoint, output, force=force, shard_bytes=shard_bytes) as writer:
            seen: list[tuple[str, nn.Module]] = []
            for block in _blocks(checkpoint, data, memory, check, progress):
                layers = block_layers(block, where)
                seen += block.linears().items()
                chosen |= layers.keys()
                statistics = _statistics_of(block, kinds, layers) if kinds else Statistics({}, Facts())
                changed = [name for name, layer in layers.items() if _change(name, layer, change, statistics)]
                if changed:
                    for name, tensor in block.stored().items():
                        bits = _bits(tensor, checkpoint[name])
                        tied = [alias for alias, first in checkpoint.aliases.items() if first == name]
                        for one in (name, *tied) if bits is not None else ():
                            writer.write(one, bits)
                progress.advance(block.name, 1)
            if not chosen:
                raise RecipeError(f"No layer was chosen by {where!r}.{nearest_names(where, seen)}")
            report = {"weft": weft.__version__, "model": checkpoint.name, "recipe": dict(recipe or {})}
            writer.publish({**report, "data": None if data is None else digest_of(data)})
            return writer.output
    finally:
        if checkpoint is not model:
            checkpoint.close()


def _blocks(
    checkpoint: Checkpoint, batches: list[Any] | None, memory: int, check: bool, progress: Progress
) -> Iterator[Block]:
    """Blocks of a walk; without data, blocks that are only loaded."""
    if batches is not None:
        with Walk(checkpoint, batches, memory=memory, check=check) as walk:
            progress.start("changing", len(walk), len(walk), "blocks")
            yield from walk
        return
    source = FromCheckpoint(checkpoint)
    if check:
        check_architecture(type(source.model), source.model.config)
    names = [n for stack in source.stacks for n in stack]
    progress.start("changing", len(names), len(names), "blocks")
    for number, name in enumerate(names):
        source.load([name])
        module = source.model.get_submodule(name)
        with unfused(module, name) as experts:
            yield Block(name, number, module, _Loaded(source), dict(experts))
        source.drop([name])


class _Loaded(Walk):
    """Stands for a walk where there is no data to walk with."""

    def __init__(self, source: FromCheckpoint):
        self.source = source


def _statistics_of(block: Block, kinds: list[str], layers: Mapping[str, nn.Module]) -> Statistics:
    with watched(block, kinds, layers=layers) as watch:
        block.run()
    facts = Facts()
    found = results_of(watch, layers, facts, fingerprints=False)
    return Statistics({name: t.float() if t.is_floating_point() else t for name, t in found}, facts)


@torch.no_grad()
def _change(name: str, layer: nn.Module, change: Change, statistics: Statistics) -> bool:
    weight: Any = layer.weight
    layout = layout_of(layer, "weight", weight)
    matrix = layout.seen(weight).flatten(1)
    new = change(name, matrix.detach().to(torch.float32, copy=True), statistics)
    if new is None:
        return False
    if new.shape != matrix.shape:
        raise RecipeError(f"{name}: a change must keep the shape {list(matrix.shape)}, it returned {list(new.shape)}.")
    new = new.to(weight.dtype)
    if not new.isfinite().all():
        raise NonFiniteError(f"{name}: the changed weight holds NaN or infinite values as {weight.dtype}.")
    weight.copy_(layout.stored(new.reshape(layout.seen(weight).shape)))
    return True


def _bits(tensor: Tensor, stored: LazyTensor) -> Any:
    """A tensor's elements as the file has them; None if they have not changed."""
    before = stored.torch()
    if before.shape != tensor.shape:
        raise CheckpointError(f"{stored.name}: was {list(before.shape)} and would be {list(tensor.shape)}.")
    if torch.equal(before.to(tensor.dtype), tensor):
        return None  # a file in higher precision than the model runs in keeps it where nothing changed
    flat = tensor.detach().to(getattr(torch, stored.natural_dtype.torch)).contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy()
