"""One model described: every tensor by itself, by layer and by kind, with what is tied, copied or missing."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from weft.checkpoint.checkpoint import Checkpoint
from weft.checkpoint.open import open_checkpoint
from weft.engine.progress import Progress
from weft.errors import RecipeError, did_you_mean
from weft.measure.places import group, layer_label, places, stacks_of
from weft.measure.report import Report, each
from weft.measure.statistics import GroupStatistics, TensorStatistics, combine, tensor_statistics


@dataclass(frozen=True)
class ModelStatistics(Report):
    """A model.

    Attributes:
        name: of the checkpoint.
        parameters, nbytes: of all distinct tensors looked at.
        dtypes: element type -> its tensors, parameters and bytes.
        tied: name of a tied tensor -> name of the tensor that it shares storage with (and is counted under).
        copies: groups of tensors with two or more axes that hold the same bytes without being tied.
        notes: what else a reader should know.
        layers, kinds: the same numbers by layer and by kind of module.
        tensors: one entry each, in the model's order.
    """

    name: str
    parameters: int
    nbytes: int
    dtypes: Mapping[str, Mapping[str, int]]
    tied: Mapping[str, str]
    copies: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...]
    layers: tuple[GroupStatistics, ...]
    kinds: tuple[GroupStatistics, ...]
    tensors: tuple[TensorStatistics, ...] = field(repr=False)


def model_statistics(
    model: Any,
    *,
    tensors: str | None = None,
    spectrum: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> ModelStatistics:
    """Describe every tensor of a model.

    Args:
        model: anything that ``weft.open`` takes.
        tensors: only names that match this glob, ``"*.mlp.*"``.
        spectrum: also singular values and stable rank of matrices; reads them eight more times.
        threads: worker threads; default: the cores, at most 8.
        progress: where to report.

    Raises:
        RecipeError: no name matches. CheckpointError: the model cannot be opened or read.

    >>> import numpy as np
    >>> report = model_statistics({"h.0.mlp.weight": np.float32([[3, 0], [-4, 0]])})
    >>> report.tensors[0].norm, report.tensors[0].zero_share, report.tensors[0].place.kind
    (5.0, 0.5, 'mlp')
    """
    checkpoint = open_checkpoint(model)
    try:
        chosen = _select(checkpoint, tensors)
        found = places(checkpoint)
        rows = each(
            [checkpoint[name] for name in chosen],
            lambda tensor, workspace, stopped: tensor_statistics(
                tensor, workspace, place=found[tensor.name], spectrum=spectrum, stopped=stopped
            ),
            lambda tensor: (tensor.name, tensor.nbytes),
            label="inspecting",
            threads=threads,
            progress=progress,
        )
        return _report(checkpoint, tuple(rows))
    finally:
        if checkpoint is not model:
            checkpoint.close()


def _select(checkpoint: Checkpoint, pattern: str | None) -> list[str]:
    """Names of the distinct tensors that match a glob, in order."""
    names = [name for name in checkpoint if name not in checkpoint.aliases]
    if pattern is None:
        return names
    chosen = fnmatch.filter(names, pattern)
    if not chosen:
        raise RecipeError(
            f"{checkpoint.name}: none of its {len(names)} tensors matches {pattern!r} "
            f"(* stands for any text).{did_you_mean(pattern.replace('*', ''), names)}"
        )
    return chosen


def _report(checkpoint: Checkpoint, rows: tuple[TensorStatistics, ...]) -> ModelStatistics:
    stacks = stacks_of(row.place for row in rows)
    by_layer = group(rows, lambda row: layer_label(row.place, stacks))
    by_kind = group(rows, lambda row: row.place.kind)
    by_dtype = group(rows, lambda row: row.dtype)
    return ModelStatistics(
        name=checkpoint.name,
        parameters=sum(row.parameters for row in rows),
        nbytes=sum(row.nbytes for row in rows),
        dtypes={
            dtype: {
                "tensors": len(some),
                "parameters": sum(row.parameters for row in some),
                "nbytes": sum(row.nbytes for row in some),
            }
            for dtype, some in by_dtype.items()
        },
        tied=dict(checkpoint.aliases),
        copies=_copies(rows),
        notes=_notes(checkpoint),
        layers=tuple(combine(label, some) for label, some in by_layer.items()),
        kinds=tuple(combine(label, some) for label, some in by_kind.items()),
        tensors=rows,
    )


def _copies(rows: tuple[TensorStatistics, ...]) -> tuple[tuple[str, ...], ...]:
    """Matrices that are stored more than once; constant ones are not worth a word."""
    matrices = [row for row in rows if len(row.shape) > 1 and row.parameters and row.minimum != row.maximum]
    groups = group(matrices, lambda row: f"{row.dtype} {row.shape} {row.checksum}")
    return tuple(tuple(row.name for row in some) for some in groups.values() if len(some) > 1)


def _notes(checkpoint: Checkpoint) -> tuple[str, ...]:
    text = checkpoint.config.get("text_config")
    config = {**(text if isinstance(text, dict) else {}), **checkpoint.config}
    heads = [name for name in checkpoint if name.endswith(("lm_head.weight", "embed_out.weight"))]
    notes = []
    if config.get("tie_word_embeddings") is True and not heads:
        notes.append("The output head is not stored: config.json ties it to the embedding.")
    if checkpoint.packed:
        layers = "1 layer is" if len(checkpoint.packed) == 1 else f"{len(checkpoint.packed):,} layers are"
        notes.append(f"{layers} packed in few bits, and shown as the float32 weights that they stand for.")
    return tuple(notes)
