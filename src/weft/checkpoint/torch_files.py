"""Torch's own files (``.bin``, ``.pt``, ``.pth``): read with ``weights_only``, never by running what they contain."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from weft.checkpoint.checkpoint import Checkpoint
from weft.checkpoint.files import LocalFile
from weft.checkpoint.folder import read_json
from weft.checkpoint.memory import from_mapping
from weft.errors import CheckpointError, WeftError

# where training frameworks put the weights inside a saved dictionary
_NESTED_UNDER = ("state_dict", "model_state_dict", "model", "module", "ema_state_dict")


def from_torch_files(paths: list[Path], name: str, *, folder: Path | None = None) -> Checkpoint:
    """Open torch files as one checkpoint; tensors stay on disk (memory-mapped) where the format allows it.

    Raises:
        CheckpointError: the file is damaged, or holds anything but tensors and plain containers.
    """
    state: dict[str, Any] = {}
    stamps = []
    for path in paths:
        file = LocalFile(path)
        stamps.append(f"{file.name}:{file.stamp}")
        file.close()
        for key, value in _tensors(_load(path), path).items():
            if key in state:
                raise CheckpointError(f"{path}: tensor {key!r} is in two files of one checkpoint.")
            state[key] = value
    checkpoint = from_mapping(state, name)
    checkpoint.folder = folder
    checkpoint.config = read_json(folder / "config.json") if folder and (folder / "config.json").is_file() else {}
    checkpoint.fingerprint = "|".join(stamps)
    return checkpoint


def _load(path: Path) -> Any:
    import torch

    try:
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap" not in str(error):
                raise
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except WeftError:
        raise
    except Exception as error:  # torch.load raises half a dozen types on damaged input, all mean the same to a user
        first = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        if (
            "weights_only" in str(error).lower()
            or "Unsupported global" in str(error)
            or "WeightsUnpickler" in str(error)
        ):
            raise CheckpointError(
                f"{path}: holds more than tensors, and loading it could run code, so it is refused. "
                "Ask its owner for a safetensors file, or re-save only the state dict. "
                f"(torch says: {first})"
            ) from None
        raise CheckpointError(
            f"{path}: cannot be read as a torch file ({first}). It is damaged or truncated."
        ) from None
    warnings.warn(
        f"{path.name} is in torch's old format, which cannot be mapped: it is read whole into memory. "
        "Convert it once with `weft convert`.",
        stacklevel=4,
    )
    return loaded


def _tensors(value: Any, path: Path) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise CheckpointError(f"{path}: expected a state dict (names to tensors), found {type(value).__name__}.")
    for key in _NESTED_UNDER:
        inner = value.get(key)
        if isinstance(inner, Mapping) and any(hasattr(v, "untyped_storage") for v in inner.values()):
            return _tensors(inner, path)  # tensors beside it are counters of the training run
    found = {str(k): v for k, v in value.items() if hasattr(v, "untyped_storage")}
    if found:
        return found
    keys = ", ".join(map(repr, list(value)[:5]))
    raise CheckpointError(
        f"{path}: holds no tensors at the top level or under {', '.join(_NESTED_UNDER)} (keys: {keys})."
    )
