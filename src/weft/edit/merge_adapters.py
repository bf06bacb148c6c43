"""Add adapters up into one adapter, exactly where the rank allows.

    ΔW = Σᵢ wᵢ sᵢ Bᵢ Aᵢ  ≈  B A           factored anew, see :func:`weft.edit.low_rank.add_low_rank`

Adding A and B separately, as is often done, gives (Σ Bᵢ)(Σ Aᵢ), another matrix with terms of one adapter times
another's. Here the sum of the products is kept: exactly at the rank that it needs (at most the sum of the ranks), or
cut to the nearest of a given rank.

Complexity: QR of (out + in) × Σrᵢ a module; the large matrices are never formed. Re-implemented from the equations.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np

from weft.checkpoint.checkpoint import Checkpoint, LazyTensor
from weft.checkpoint.computed import as_float32
from weft.checkpoint.dtypes import DType, dtype_of
from weft.checkpoint.live_names import live_names
from weft.checkpoint.lora_folder import PREFIX, Adapter, Part, read_adapter
from weft.checkpoint.open import natural_key, open_checkpoint
from weft.edit.adapter_report import AdapterReport
from weft.edit.low_rank import add_low_rank
from weft.engine.adapter_writer import AdapterWriter, plain_config
from weft.errors import CheckpointError, RecipeError, ShapeError
from weft.kernels.convert import OUTPUT_DTYPES, from_float32
from weft.method import per_model

_LAYERS = ("Linear", "Conv1D")


def merge_adapters(
    adapters: Sequence[str | os.PathLike[str] | Checkpoint],
    output: str | os.PathLike[str],
    *,
    weights: float | Sequence[float] = 1.0,
    rank: int | None = None,
    base: str | os.PathLike[str] | Checkpoint | None = None,
    dtype: str = "float32",
    force: bool = False,
) -> AdapterReport:
    """Write the weighted sum of LoRA adapters of one base as one adapter.

    Args:
        adapters: PEFT folders, or what ``weft.open`` makes of them; ranks, scales and targets may differ.
        output: the folder to make.
        weights: one number for each adapter, or one for all.
        rank: the largest rank of a module; by default as large as the exact sum needs.
        base: their base; needed where they hold whole tensors (saved modules) and the weights do not sum to 1, or some
            adapters lack the tensor.
        dtype: of the factors: float32, bfloat16 or float16.
        force: replace an output that weft made.

    Raises:
        CheckpointError: an adapter is damaged, or no sum of low-rank changes (DoRA, replaced rows).
        ShapeError: the adapters belong to different models. OutputError: the output exists or cannot be written.

    >>> import numpy as np, tempfile
    >>> from weft.checkpoint.memory import from_mapping
    >>> A, B = np.ones((1, 3), np.float32), np.ones((2, 1), np.float32)
    >>> one = from_mapping({"fc.lora_A.weight": A, "fc.lora_B.weight": B}, "one")
    >>> one.config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     merge_adapters([one, one], f"{folder}/sum").ranks
    {'fc': 1}
    """
    stored = dtype_of(dtype)
    if not adapters or stored.name not in OUTPUT_DTYPES or (rank is not None and rank < 1):
        raise RecipeError(
            f"Merging adapters needs at least one, a rank of at least 1 and a float dtype; got {len(adapters)}, {rank}, {dtype}."
        )
    shares = per_model(weights, len(adapters))
    with ExitStack() as opened:

        def enter(model: Any) -> Checkpoint:
            return model if isinstance(model, Checkpoint) else opened.enter_context(open_checkpoint(model))

        checkpoints = [enter(model) for model in adapters]
        parsed = [_summable(c) for c in checkpoints]
        start = None if base is None else enter(base)
        writer = opened.enter_context(AdapterWriter(output, force=force))
        report = AdapterReport(writer.output)
        kept = total = 0.0
        for module in sorted({m for a in parsed for m in a.parts}, key=natural_key):
            energy = _add_parts(module, parsed, shares, rank, writer, stored, report)
            kept, total = kept + energy, total + energy / (1 - report.lost[module])
        for name in sorted({n for a in parsed for n in (*a.whole, *a.originals)}, key=natural_key):
            _add_whole(name, parsed, shares, start, writer, report)
        report.kept = kept / total if total else 1.0
        configs = [c.config for c in checkpoints]
        config = plain_config(
            report.ranks,
            modules_to_save=sorted({str(m) for c in configs for m in c.get("modules_to_save") or ()}),
            biases=any(c.get("bias") not in (None, "none") for c in configs),
            fan_in_fan_out=any(a.config.fan_in_fan_out for a in parsed),
            base_model=parsed[0].config.base,
            task_type=configs[0].get("task_type"),
        )
        config["ensure_weight_tying"] = any(a.config.tied for a in parsed)
        writer.publish(config, {**report.to_dict(), "output": writer.output.name})
    return report


def _summable(checkpoint: Checkpoint) -> Adapter:
    if "peft_type" not in checkpoint.config:
        raise CheckpointError(f"{checkpoint.name}: is not an adapter (it has no adapter_config.json).")
    adapter = read_adapter(checkpoint)
    why = (
        "uses DoRA, whose magnitudes multiply the base"
        if adapter.config.dora
        else "replaces rows of an embedding"
        if adapter.rows
        else "is MiSS, whose factors are as wide as the base"
        if adapter.config.miss
        else "changes tied tensors or layers whose factors PEFT keeps in other shapes"
        if any(part.tied or getattr(part, "layer", "Linear") not in _LAYERS for part in adapter.parts.values())
        else "changes biases by factors (lora_bias)"
        if any(part.bias is not None for part in adapter.parts.values())
        else ""
    )
    if why:
        raise CheckpointError(
            f"{checkpoint.name}: {why}, so it is no sum of low-rank changes. Merge base+adapter models instead."
        )
    return adapter


def _add_parts(
    module: str,
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    rank: int | None,
    writer: AdapterWriter,
    dtype: DType,
    report: AdapterReport,
) -> float:
    """Write the sum's factors; the squared norm of their product."""
    parts = [(w, a.parts.get(module)) for w, a in zip(weights, adapters)]
    found = [(w, part) for w, part in parts if isinstance(part, Part)]
    first = found[0][1]
    for _, part in found:
        same = (part.up.shape[0], *part.down.shape[1:]) == (first.up.shape[0], *first.down.shape[1:])
        if not same or part.embedding != first.embedding:
            raise ShapeError(
                f"{module}: the adapters' factors {list(first.up.shape)} × {list(first.down.shape)} and {list(part.up.shape)} "
                f"× {list(part.down.shape)} belong to different weights. The adapters have different bases."
            )
    terms = []
    for weight, part in found:
        up, down = as_float32(part.up), as_float32(part.down)
        terms.append((weight * part.scale, up.reshape(up.shape[0], -1), down.reshape(down.shape[0], -1)))
    up, down, lost = add_low_rank(terms, rank)
    count = up.shape[1]
    shapes = (count, *first.down.shape[1:]), (up.shape[0], count, *first.up.shape[2:])
    names = ("lora_embedding_A", "lora_embedding_B") if first.embedding else ("lora_A.weight", "lora_B.weight")
    for name, factor, shape in zip(names, (down, up), shapes):
        writer.add(f"{PREFIX}{module}.{name}", from_float32(np.ascontiguousarray(factor), dtype), dtype, shape)
    report.ranks[module], report.lost[module] = count, lost
    return float(np.square(np.linalg.norm(up, axis=0) * np.linalg.norm(down, axis=1), dtype=np.float64).sum())


def _add_whole(
    name: str,
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    base: Checkpoint | None,
    writer: AdapterWriter,
    report: AdapterReport,
) -> None:
    """W₀ + Σ wᵢ (Wᵢ − W₀) of a tensor that some adapters hold whole; copies of the base's as they are."""
    held = [(w, a.whole[name]) for w, a in zip(weights, adapters) if name in a.whole]
    copies = [a.originals[name] for a in adapters if name in a.originals]
    tensors = [t for _, t in held] or copies
    if any(t.shape != tensors[0].shape for t in tensors):
        raise ShapeError(
            f"{name}: the adapters hold it in the shapes {', '.join(str(list(t.shape)) for t in tensors)}."
        )
    if not held:
        if any(not np.array_equal(c.numpy(), copies[0].numpy()) for c in copies[1:]):
            raise CheckpointError(
                f"{name}: the adapters hold different copies of the base's tensor; their bases differ."
            )
        module = name.removesuffix(".weight")
        writer.add(f"{PREFIX}{module}.base_layer.weight", copies[0].bits(), copies[0].dtype, copies[0].shape)
        return
    if not tensors[0].dtype.floating:
        if any(not np.array_equal(t.bits(), tensors[0].bits()) for t in tensors[1:]):
            raise CheckpointError(
                f"{name}: the adapters hold different {tensors[0].dtype.name} values, which have no sum."
            )
        writer.add(PREFIX + name, tensors[0].bits(), tensors[0].dtype, tensors[0].shape)
        report.saved.append(name)
        return
    complete = len(held) == len(adapters) and abs(sum(weights) - 1) < 1e-9
    start = None if base is None else _of_base(name, base)
    if not complete and (start is None or start.shape != tensors[0].shape):
        raise CheckpointError(
            f"{name}: {len(held)} of {len(adapters)} adapters hold it whole and the weights sum to {sum(weights):g}, so the "
            "base's tensor is needed for the sum: name the base, or use weights that sum to 1."
        )
    values = np.zeros(tensors[0].shape) if start is None or complete else (1 - sum(w for w, _ in held)) * _wide(start)
    for weight, tensor in held:
        values = values + weight * _wide(tensor)
    dtype = tensors[0].dtype
    key = name.replace(".bias", ".base_layer.bias") if name.removesuffix(".bias") in report.ranks else name
    writer.add(PREFIX + key, from_float32(values.astype(np.float32), dtype), dtype, tensors[0].shape)
    report.saved.append(name)


def _of_base(name: str, base: Checkpoint) -> LazyTensor | None:
    """The base's tensor, whose files may have another name for it than the live model and its adapters."""
    names = None if name in base else live_names(base)
    place = name if names is None else names.places([name], base).get(name, name)
    return base.tensors.get(place)


def _wide(tensor: LazyTensor) -> np.ndarray:
    return as_float32(tensor).astype(np.float64)
