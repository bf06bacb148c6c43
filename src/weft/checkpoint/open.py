"""Find out what a name means and open it: folder, file, ``base+adapter``, Hub id, or a state dict in memory."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from weft.checkpoint.checkpoint import Checkpoint, LazyTensor
from weft.checkpoint.files import ByteSource, LocalFile, read_bytes
from weft.checkpoint.header import Header, header_length, parse_header
from weft.errors import CheckpointError, WeftError

SAFETENSORS_INDEX = "model.safetensors.index.json"
TORCH_INDEX = "pytorch_model.bin.index.json"
_TORCH_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
_MAX_JSON_BYTES = 256_000_000  # an index of a model with millions of tensors is still below this
_STAMP_BYTES = 1 << 20


def open_checkpoint(model: str | os.PathLike[str] | Mapping[str, Any] | Checkpoint) -> Checkpoint:
    """Open a model without reading its weights.

    Args:
        model: a folder (Hugging Face layout, or any ``.safetensors`` files), a file (``.safetensors``, ``.bin``,
            ``.pt``, ``.pth``), ``base+adapter`` (a PEFT LoRA folder on top of a base), a Hub id
            ``org/name@revision``, or a mapping of names to torch or numpy tensors.

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
    if isinstance(model, Mapping):
        from weft.checkpoint.memory import from_mapping

        return from_mapping(model)
    text = os.fspath(model)
    if not text.strip():
        raise CheckpointError("A model needs a path or a Hub id; the name given is empty.")
    path = Path(text).expanduser()
    if path.exists():
        return open_path(path)
    if "+" in text:
        base, _, adapter = text.rpartition("+")
        if base and adapter:
            from weft.checkpoint.adapter import with_adapter

            return with_adapter(open_checkpoint(base), open_checkpoint(adapter))
    from weft.checkpoint import hub

    if hub.is_hub_id(text):
        return hub.open_hub(text)
    parent = next((p for p in path.parents if p.exists()), Path("."))
    near = [p.name for p in parent.iterdir()] if parent.is_dir() else []
    from weft.errors import did_you_mean

    hint = did_you_mean(path.name, near) if near else ""
    raise CheckpointError(
        f"{text}: no such file or folder, and not a Hub id (org/name).{hint if 'Did' in hint else ''} "
        "Check the spelling; paths are relative to the current folder."
    )


def open_path(path: Path) -> Checkpoint:
    """Open a folder or a file on this machine."""
    if path.is_dir():
        return _open_folder(path)
    if path.suffix == ".safetensors":
        return from_safetensors([path], path.name)
    if path.suffix in _TORCH_SUFFIXES:
        from weft.checkpoint.torch_files import from_torch_files

        return from_torch_files([path], path.name)
    if path.name.endswith(".index.json"):
        return _open_folder(path.parent)
    raise CheckpointError(
        f"{path}: not a kind of file that weft reads. Give a folder, a .safetensors file, "
        "or a torch file (.bin, .pt, .pth, .ckpt)."
    )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file that may be hostile: bounded size, clear errors."""
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise CheckpointError(f"{path}: larger than {_MAX_JSON_BYTES:,} bytes, which no real index or config is.")
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValueError, RecursionError) as error:
        if isinstance(error, WeftError):
            raise
        raise CheckpointError(f"{path}: not readable as JSON ({error}). Repair or replace the file.") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(value).__name__}.")
    return value


def shard_names(index: Mapping[str, Any], where: str) -> tuple[dict[str, str], list[str]]:
    """The weight map of an index and its shard file names, each a plain name inside the folder."""
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{where}: needs a non-empty weight_map from tensor names to file names.")
    for tensor, shard in weight_map.items():
        if not isinstance(shard, str) or shard in ("", ".", "..") or "/" in shard or "\\" in shard or "\0" in shard:
            raise CheckpointError(
                f"{where}: tensor {tensor!r} is said to be in {str(shard)[:80]!r}, which is not a plain file name "
                "inside the folder. The index is damaged or hostile; do not use it."
            )
    return weight_map, sorted(set(weight_map.values()))


def read_header(source: ByteSource, where: str) -> Header:
    """Read and check the header of a safetensors file."""
    prefix = read_bytes(source, 0, min(8, source.size))
    length = header_length(prefix, source.size, where)
    return parse_header(read_bytes(source, 8, length), source.size, where)


def collect(
    shards: Iterable[tuple[ByteSource, Header]], weight_map: Mapping[str, str] | None, where: str
) -> dict[str, LazyTensor]:
    """Tensors of all shards in one ordered map, checked against the index if there is one."""
    tensors: dict[str, LazyTensor] = {}
    for source, header in shards:
        for name, info in header.tensors.items():
            if weight_map is not None and weight_map.get(name) != source.name:
                continue  # the index decides; a stray copy in another shard is not the model's
            if name in tensors:
                raise CheckpointError(f"{where}: tensor {name!r} is in two files and no index says which one counts.")
            tensors[name] = LazyTensor(info, source)
    missing = sorted(set(weight_map or ()) - set(tensors))
    if missing:
        assert weight_map is not None
        raise CheckpointError(
            f"{where}: the index lists {missing[0]!r} in {weight_map[missing[0]]!r}, which does not hold it "
            f"({len(missing)} such tensors). Index and shards are from different saves; download them again."
        )
    return dict(sorted(tensors.items(), key=lambda item: natural_key(item[0])))


def natural_key(name: str) -> tuple[tuple[int, int | str], ...]:
    """A sort key under which layer 10 follows layer 9.

    >>> sorted(["h.10.w", "h.9.w"], key=natural_key)
    ['h.9.w', 'h.10.w']
    """
    parts: list[tuple[int, int | str]] = []
    for part in name.split("."):
        parts.append((0, int(part)) if part.isascii() and part.isdigit() else (1, part))
    return tuple(parts)


def from_safetensors(
    paths: list[Path], name: str, *, folder: Path | None = None, index: Path | None = None
) -> Checkpoint:
    """Open safetensors files as one checkpoint."""
    weight_map = None
    if index is not None:
        weight_map, names = shard_names(read_json(index), str(index))
        paths = [index.parent / shard for shard in names]
        absent = [p.name for p in paths if not p.is_file()]
        if absent:
            raise CheckpointError(
                f"{index}: shard {absent[0]} is missing ({len(absent)} of {len(paths)}). Download it."
            )
    files = [LocalFile(path) for path in paths]
    headers = [read_header(file, str(file.path)) for file in files]
    metadata = {key: value for header in headers for key, value in header.metadata.items()}
    config = read_json(folder / "config.json") if folder and (folder / "config.json").is_file() else {}
    return Checkpoint(
        name=name,
        tensors=collect(zip(files, headers), weight_map, str(folder or paths[0])),
        config=config,
        metadata=metadata,
        folder=folder,
        fingerprint="|".join(f"{file.name}:{file.stamp}" for file in files),
    )


def _open_folder(folder: Path) -> Checkpoint:
    name = folder.resolve().name
    if (folder / "adapter_config.json").is_file():
        from weft.checkpoint.adapter import open_adapter

        return open_adapter(folder)
    for index in (folder / SAFETENSORS_INDEX, *sorted(folder.glob("*.safetensors.index.json"))):
        if index.is_file():
            return from_safetensors([], name, folder=folder, index=index)
    if (folder / "model.safetensors").is_file():
        return from_safetensors([folder / "model.safetensors"], name, folder=folder)
    shards = sorted(folder.glob("*.safetensors"))
    if shards:
        return from_safetensors(shards, name, folder=folder)
    from weft.checkpoint.torch_files import from_torch_files

    if (folder / TORCH_INDEX).is_file():
        _, names = shard_names(read_json(folder / TORCH_INDEX), str(folder / TORCH_INDEX))
        return from_torch_files([folder / shard for shard in names], name, folder=folder)
    for pattern in ("pytorch_model.bin", "pytorch_model-*.bin", "*.bin", "*.pt", "*.pth"):
        found = [p for p in sorted(folder.glob(pattern)) if p.name != "training_args.bin"]
        if found:
            return from_torch_files(found, name, folder=folder)
    raise CheckpointError(
        f"{folder}: holds no weights (no .safetensors, .bin, .pt or .pth file, no adapter_config.json). "
        "Check that the path is the model's folder and that the download finished."
    )
