"""What quantising a model will take: memory and the size of the files, counted from shapes before a weight is read.

Peak memory is that of the largest block: its weights, the statistics that its changes need (8 bytes a number while they are
summed, 4 afterwards), the codes of its layers, what the change of its largest layer takes (:meth:`weft.calibrate.Change.scratch`), the hidden states of
the data within their budget, and one forward pass of a batch; beside what the program has already taken.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from weft.calibrate.experts import unfused
from weft.calibrate.plan import leaders_of_small
from weft.calibrate.rewrite import explicit
from weft.calibrate.source import FromCheckpoint
from weft.calibrate.sums import PANEL
from weft.calibrate.task import as_changes
from weft.calibrate.watch import layers_of
from weft.checkpoint.checkpoint import Checkpoint
from weft.function.layout import layout_of
from weft.function.where import Selector, matches, most_specific
from weft.packed.formats import find_format
from weft.quantize.run import AUTO, DENSE, as_in_files, file_format

_STREAMS = 1  # hidden states: those before a block go as those after it come
_CODES = 2.5  # bytes a weight of the codes that a block's packed weights hold until it is written


def plan_quantization(
    checkpoint: Checkpoint, config: Any, batches: Sequence[Any] | None, *, where: Selector = "*", format: str = AUTO,
    memory: int = 1 << 30,
) -> dict[str, Any]:  # fmt: skip
    """Memory, size and layers of a run of :func:`weft.quantize.quantize_model`.

    Args:
        checkpoint: an open model.
        config: a configuration, or a mapping from selectors to configurations.
        batches: calibration data, or None.
        where: which layers of the blocks.
        format: of the files.
        memory: bytes of hidden states to keep in memory.

    Returns:
        ``memory``: bytes in memory at most; ``hidden``: of which hidden states; ``bytes``: of the files, about (0 where a
        method's size is not known beforehand); ``bytes_before``; ``layers``; ``blocks``.
    """
    source = FromCheckpoint(checkpoint)
    model: Any = source.model
    form = find_format(file_format(config) if format == AUTO else format) if format != DENSE else None
    changes = as_changes(as_in_files(config, form, model.dtype) if form else config)
    leaders = leaders_of_small(type(model), model.config) if any(c.needs for c in changes.values()) else None
    targets = any(c.targets for c in changes.values())
    hidden, forward = _activations(model, batches, memory, 2 * _STREAMS if targets else _STREAMS)
    largest = layers_counted = 0
    saved, known = 0.0, True
    with unfused(model) as experts:
        every = {**layers_of(model), **experts}
        rest = {
            n: m for n, m in source.rest_layers().items() if most_specific(list(explicit(changes)), n, m) is not None
        }
        for index, stack in enumerate(source.stacks):
            for number, block in enumerate(stack):
                chosen = {n: m for n, m in every.items() if n.startswith(f"{block}.") and matches(where, n, m)}
                shared: Mapping[str, str] = leaders[index][min(number, len(leaders[index]) - 1)] if leaders else {}
                weights = sum(p.nbytes for p in model.get_submodule(block).parameters())
                sums, scratch, bits, counted, sure = _block(chosen, changes, shared, f"{block}.")
                held = _CODES * sum(m.weight.numel() for m in chosen.values())
                fitting = sums / 2 + scratch + held
                largest = max(largest, int(weights + max(sums + forward, fitting, forward)))
                saved, layers_counted, known = saved + bits, layers_counted + counted, known and sure
    sums, scratch, bits, counted, sure = _block(rest, changes, {}, "")
    saved, layers_counted, known = saved + bits, layers_counted + counted, known and sure
    outside = sum(p.nbytes for n, p in model.named_parameters() if not n.startswith(source._block_prefixes()))
    first = sum(p.nbytes for p in model.get_submodule(source.stacks[0][0]).parameters())
    capturing = outside + (first if batches is not None else 0) + forward
    peak = max(largest, capturing if batches is not None or rest else 0, outside + sums + scratch if rest else 0)
    return {
        "memory": resident_memory() + int(peak) + hidden,
        "hidden": hidden,
        "bytes": int(checkpoint.nbytes - saved) if known else 0,
        "bytes_before": checkpoint.nbytes,
        "layers": layers_counted,
        "blocks": sum(len(stack) for stack in source.stacks),
    }


def _block(
    layers: Mapping[str, nn.Module], changes: Mapping[Any, Any], shared: Mapping[str, str], prefix: str
) -> tuple[float, float, float, int, bool]:
    """Of a block's layers: bytes of sums, scratch of the largest change, bytes saved on disk, their number, whether sizes are known."""
    inputs: dict[str, int] = {}
    scratch, saved, count, known = 0.0, 0.0, 0, True
    for name, module in layers.items():
        selector = most_specific(list(changes), name, module)
        if selector is None:
            continue
        change, weight = changes[selector], module.weight
        shape = layout_of(module, "weight", weight).seen(weight).flatten(1).shape
        rows, columns = int(shape[0]), int(shape[1])
        count += 1
        if "gram" in change.needs:
            path = name.removeprefix(prefix)
            inputs[shared.get(path, path)] = columns
        scratch = max(scratch, change.scratch(rows, columns))
        bits = change.nominal_bits(rows, columns)
        known = known and bits > 0
        saved += rows * columns * (weight.element_size() - bits / 8)
    sums = sum(8 * n * n for n in inputs.values()) + max((4 * n * PANEL for n in inputs.values()), default=0)
    return float(sums), scratch, saved, count, known


def _activations(model: Any, batches: Sequence[Any] | None, memory: int, streams: int) -> tuple[int, int]:
    """Bytes of hidden states in memory, and of one batch's forward pass."""
    if not batches:
        return 0, 0
    config = model.config.get_text_config()
    width = int(getattr(config, "hidden_size", 0) or getattr(config, "d_model", 768))
    inner = int(getattr(config, "intermediate_size", 0) or 4 * width)
    heads = int(getattr(config, "num_attention_heads", 0) or 12)
    size = model.dtype.itemsize
    shapes = [_tokens(b) for b in batches]
    hidden = sum(rows * length for rows, length in shapes) * width * size * streams
    rows, length = max(shapes, key=lambda s: s[0] * s[1])
    # attention's scores in the model's type and in float32, four matrices of the width and three of the inner width
    forward = rows * heads * length * length * (size + 4) + rows * length * (4 * width + 3 * inner) * size
    return min(hidden, memory), forward


def _tokens(batch: Any) -> tuple[int, int]:
    """Rows and tokens of a batch."""
    tensors = (
        list(batch.values())
        if isinstance(batch, Mapping)
        else list(batch)
        if isinstance(batch, tuple | list)
        else [batch]
    )
    first = next((t for t in tensors if isinstance(t, torch.Tensor) and t.dim() > 1), None)
    return (1, 1) if first is None else (int(first.shape[0]), int(first.shape[1]))


def resident_memory() -> int:
    """Bytes of memory that this process has now, without pages of files."""
    return _status("RssAnon") + _status("RssShmem")


def peak_memory() -> int:
    """The most that this process has had, without the pages of files that it has now."""
    return _status("VmHWM") - _status("RssFile")


def _status(key: str) -> int:
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:  # no Linux
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:")), 0)
