"""Find out what a name means and open it: folder, file, ``base+adapter``, Hub id, or a state dict in memory."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from weft.checkpoint.checkpoint import Checkpoint
from weft.checkpoint.folder import from_safetensors, natural_key, open_path, read_json
from weft.checkpoint.unbaked import refuse_unbaked
from weft.errors import CheckpointError, did_you_mean

__all__ = ["from_safetensors", "natural_key", "open_checkpoint", "open_path", "read_json"]


def open_checkpoint(model: str | os.PathLike[str] | Mapping[str, Any] | Checkpoint) -> Checkpoint:
    """Open a model without reading its weights.

    Args:
        model: a folder (Hugging Face layout, or any ``.safetensors`` files), a file (``.safetensors``, ``.gguf``,
            ``.bin``, ``.pt``, ``.pth``), ``base+adapter`` (a PEFT LoRA folder on top of a base), a Hub id
            ``org/name@revision``, or a mapping of names to torch or numpy tensors.

    A quantised model's packed layers are shown as the plain weights that they stand for, computed when they are read.

    Returns:
        A :class:`Checkpoint`; close it, or use it in a ``with`` statement.

    Raises:
        CheckpointError: the files are missing, damaged or unsafe; the message says which and what to do.

    >>> import numpy as np, weft
    >>> with weft.open({"layer.weight": np.zeros((3, 2), np.float32)}) as checkpoint:
    ...     checkpoint["layer.weight"].shape
    (3, 2)
    """
    if isinstance(model, Checkpoint):
        return model
    checkpoint = _open(model)
    try:
        refuse_unbaked(checkpoint.tensors, checkpoint.name)
        if not _may_be_quantized(checkpoint):
            return checkpoint
        from weft.checkpoint.quantized import dequantized

        return dequantized(checkpoint)
    except CheckpointError:
        checkpoint.close()
        raise


def _open(model: str | os.PathLike[str] | Mapping[str, Any]) -> Checkpoint:
    if isinstance(model, Mapping):
        from weft.checkpoint.memory import from_mapping

        return from_mapping(model)
    text = os.fspath(model)
    if not text.strip():
        raise CheckpointError("A model needs a path or a Hub id; the name given is empty.")
    path = _existing(text)
    if path is not None:
        checkpoint = open_path(path)
        if path.suffix == ".safetensors" and path.with_name("config.json").is_file():
            config = read_json(path.with_name("config.json"))
            if "quantization_config" in config:  # a file by itself does not say what its codes mean
                checkpoint.config = config
        return checkpoint
    from weft.checkpoint.hub import is_hub_id, open_hub

    for base, adapter in _split_adapter(text):
        if (_existing(base) or "+" in base or is_hub_id(base)) and (_existing(adapter) or is_hub_id(adapter)):
            from weft.checkpoint.adapter import with_adapter

            return with_adapter(open_checkpoint(base), open_checkpoint(adapter))
    if is_hub_id(text):
        return open_hub(text)
    raise CheckpointError(
        f"{text[:200]}: no such file or folder, and not a Hub id (org/name).{_nearby(text)} "
        "Check the spelling; paths are relative to the current folder."
    )


def _may_be_quantized(checkpoint: Checkpoint) -> bool:
    return "quantization_config" in checkpoint.config or any(name.endswith(".qweight") for name in checkpoint.tensors)


def _existing(text: str) -> Path | None:
    """The path that ``text`` names, if there is something."""
    try:
        path = Path(text).expanduser()
        return path if path.exists() else None
    except (OSError, RuntimeError, ValueError):  # too long, an unknown user's home, a zero byte
        return None


def _split_adapter(text: str) -> list[tuple[str, str]]:
    """Ways to read ``base+adapter``, the last plus first: paths may hold one too."""
    parts = text.split("+")
    pairs = [("+".join(parts[:i]), "+".join(parts[i:])) for i in range(len(parts) - 1, 0, -1)]
    return [(base, adapter) for base, adapter in pairs if base and adapter]


def _nearby(text: str) -> str:
    """A hint at what lies near a path that does not exist."""
    for part in text.split("+"):
        path = Path(part)
        if _existing(part) is None and _existing(str(path.parent)) is not None:
            try:
                hint = did_you_mean(path.name, [p.name for p in path.parent.iterdir()])
            except OSError:
                return ""
            return hint if "Did" in hint else ""
    return ""
