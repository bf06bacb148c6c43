"""Load a quantised model so that it runs on its packed weights."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from weft.calibrate.experts import Slice, unfused
from weft.calibrate.source import FromCheckpoint
from weft.calibrate.watch import layers_of
from weft.checkpoint.checkpoint import Checkpoint
from weft.checkpoint.open import open_checkpoint
from weft.engine.progress import Progress
from weft.function.layout import layout_of
from weft.packed import Packed, Transposed
from weft.packed.replace import replace_
from weft.packed.rows import join_rows


def load_quantized(
    model: Checkpoint | str | os.PathLike[str], *, backend: str = "auto", progress: Progress | None = None
) -> Any:
    """A transformers model whose quantised layers multiply by packed weights.

    Layers that are not quantised are as transformers loads them; of a model that is not quantised, all are. Peak memory: the
    packed model, and one block in its own type.

    Args:
        model: a folder of any format that weft reads (:data:`weft.packed.formats.FORMATS`), or an open checkpoint.
        backend: see :class:`weft.packed.QuantizedLinear`.
        progress: where to report.

    Raises:
        CheckpointError: it cannot be read, or its architecture is not known to transformers.
    """
    checkpoint = open_checkpoint(model)
    progress = progress or Progress()
    try:
        source = FromCheckpoint(checkpoint)
        network = source.model
        names = [n for stack in source.stacks for n in stack]
        progress.start("loading", len(names) + 1, len(names) + 1, "blocks")
        for name in names:
            source.load([name])
            module = network.get_submodule(name)
            with unfused(module, name) as experts:
                layers = {**layers_of(module, name), **experts}
                stored = source.stored_names(name, layers)
            found = _found(checkpoint, stored, layers)
            replace_(module, {n.removeprefix(f"{name}."): p for n, p in found.items()}, backend=backend)
            progress.advance(name, 1)
        source.load_rest()
        others = source.rest_layers()
        rest = _found(checkpoint, source.stored_names("", others), others)
        if rest:
            by_weight = {id(network.get_submodule(n).weight): p for n, p in rest.items()}
            same = {
                n: by_weight[id(m.weight)]
                for n, m in network.named_modules()
                if id(getattr(m, "weight", None)) in by_weight
            }
            replace_(network, same, backend=backend)
        _generation(network, checkpoint.folder)
        progress.advance("the rest", 1)
        return network.eval()
    finally:
        if checkpoint is not model:
            checkpoint.close()


def _found(
    checkpoint: Checkpoint, stored: dict[str, dict[str, tuple[int, int]]], layers: Mapping[str, Any]
) -> dict[str, Packed]:
    """Packed weights (out, in) of layers whose tensors are all packed."""
    made = {}
    for name, tensors in stored.items():
        prefixes = [t.removesuffix(".weight") for t, _ in sorted(tensors.items(), key=lambda item: item[1])]
        if not all(p in checkpoint.packed for p in prefixes):
            continue
        layer = layers[name]
        turned = layout_of(layer, "weight", layer.weight).transposed and not isinstance(layer, Slice)
        parts = [_turn(checkpoint.packed[p]()) if turned else checkpoint.packed[p]() for p in prefixes]
        whole = parts[0] if len(parts) == 1 else join_rows(parts)
        if whole is not None:
            made[name] = whole
    return made


def _turn(packed: Packed) -> Packed:
    return packed.inner if isinstance(packed, Transposed) else Transposed(packed)


def _generation(network: Any, folder: Path | None) -> None:
    if folder is None or not hasattr(network, "generation_config") or not (folder / "generation_config.json").is_file():
        return
    from transformers import GenerationConfig

    network.generation_config = GenerationConfig.from_pretrained(folder)
