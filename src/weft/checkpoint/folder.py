"""Folders and files of weights on this machine: safetensors (one file or shards) and torch's own."""

from __future__ import annotations

import json
import re
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
_NOT_WEIGHTS = {"training_args.bin", "optimizer.bin", "optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state.pth"}
_MAX_JSON_BYTES = 256_000_000  # an index of a model with millions of tensors is still below this


def open_path(path: Path) -> Checkpoint:
    """Open a folder or a file on this machine."""
    if path.is_dir():
        return _open_folder(path)
    if path.suffix == ".safetensors":
        return from_safetensors([path], path.name)
    if path.suffix in _TORCH_SUFFIXES:
        from weft.checkpoint.torch_files import from_torch_files

        return from_torch_files([path], path.name)
    if path.suffix == ".gguf":
        from weft.checkpoint.gguf import open_gguf

        return open_gguf(path)
    if path.name.endswith(".safetensors.index.json"):
        return from_safetensors([], path.resolve().parent.name, folder=path.parent, index=path)
    if path.name == TORCH_INDEX:
        return _open_torch_index(path)
    raise CheckpointError(
        f"{path}: not a kind of file that weft reads. Give a folder, a .safetensors or .gguf file, "
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
        plain = isinstance(shard, str) and shard not in ("", ".", "..") and not set(shard) & set("/\\")
        if not plain or not shard.isprintable() or len(shard) > 255:
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
    _check_complete(tensors, weight_map or {}, where)
    return dict(sorted(tensors.items(), key=lambda item: natural_key(item[0])))


def natural_key(name: str) -> tuple[tuple[int, int | str], ...]:
    """A sort key under which layer 10 follows layer 9.

    >>> sorted(["h.10.w", "h.9.w"], key=natural_key)
    ['h.9.w', 'h.10.w']
    """
    parts: list[tuple[int, int | str]] = []
    for part in name.split("."):
        number = (
            part.isascii() and part.isdigit() and len(part) < 20
        )  # int() refuses the thousands of digits of a prank
        parts.append((0, int(part)) if number else (1, part))
    return tuple(parts)


def from_safetensors(
    paths: list[Path], name: str, *, folder: Path | None = None, index: Path | None = None
) -> Checkpoint:
    """Open safetensors files as one checkpoint."""
    weight_map = None
    if index is not None:
        weight_map, names = shard_names(read_json(index), str(index))
        paths = [index.parent / shard for shard in names]
        _check_present(paths, index)
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
    if (folder / "weft_adapter.json").is_file() or (
        (folder / "adapter_config.json").is_file() and not _has_model(folder)
    ):
        from weft.checkpoint.lora_folder import open_adapter

        return open_adapter(folder)
    if (folder / "model.safetensors").is_file():
        return from_safetensors([folder / "model.safetensors"], name, folder=folder)
    for index in (folder / SAFETENSORS_INDEX, *sorted(folder.glob("*.safetensors.index.json"))):
        if index.is_file():
            return from_safetensors([], name, folder=folder, index=index)
    shards = sorted(folder.glob("*.safetensors"))
    if shards:
        _check_numbering(shards)
        return from_safetensors(shards, name, folder=folder)
    if (folder / TORCH_INDEX).is_file():
        return _open_torch_index(folder / TORCH_INDEX)
    from weft.checkpoint.torch_files import from_torch_files

    for pattern in ("pytorch_model.bin", "pytorch_model-*.bin", "*.bin", "*.pt", "*.pth"):
        found = [p for p in sorted(folder.glob(pattern)) if p.name not in _NOT_WEIGHTS]
        if found:
            _check_numbering(found)
            return from_torch_files(found, name, folder=folder)
    files = sorted(folder.glob("*.gguf"))
    if files and (len(files) == 1 or len({re.sub(r"-\d{5}-of-", "", p.name) for p in files}) == 1):
        opened = open_path(files[0])
        opened.folder = folder
        if (folder / "config.json").is_file():
            opened.config = read_json(folder / "config.json")
        return opened
    if files:
        raise CheckpointError(f"{folder}: holds {len(files)} GGUF models. Name the file, such as {files[0].name}.")
    inner = sorted(p.parent.name for n in ("config.json", "adapter_config.json") for p in folder.glob(f"*/{n}"))
    hint = f" Its subfolder {inner[-1]!r} looks like one." if inner else ""
    raise CheckpointError(
        f"{folder}: holds no weights (no .safetensors, .bin, .pt, .pth or .gguf file, no adapter_config.json).{hint} "
        "Check that the path is the model's folder and that the download finished."
    )


def _has_model(folder: Path) -> bool:
    """Whether a folder with an adapter's configuration holds a whole model instead of the adapter."""
    adapters = ("adapter_model.safetensors", "adapter_model.bin")
    models = ("model.safetensors", SAFETENSORS_INDEX, "pytorch_model.bin", TORCH_INDEX)
    return not any((folder / n).is_file() for n in adapters) and any((folder / n).is_file() for n in models)


def _open_torch_index(index: Path) -> Checkpoint:
    from weft.checkpoint.torch_files import from_torch_files

    weight_map, names = shard_names(read_json(index), str(index))
    paths = [index.parent / shard for shard in names]
    _check_present(paths, index)
    checkpoint = from_torch_files(paths, index.resolve().parent.name, folder=index.parent)
    _check_complete(checkpoint.tensors, weight_map, str(index))
    return checkpoint


def _check_present(paths: list[Path], index: Path) -> None:
    absent = [p.name for p in paths if not p.is_file()]
    if absent:
        raise CheckpointError(f"{index}: shard {absent[0]} is missing ({len(absent)} of {len(paths)}). Download it.")


def _check_complete(tensors: Mapping[str, LazyTensor], weight_map: Mapping[str, str], where: str) -> None:
    missing = sorted(set(weight_map) - set(tensors))
    if missing:
        raise CheckpointError(
            f"{where}: the index lists {missing[0]!r} in {weight_map[missing[0]]!r}, which does not hold it "
            f"({len(missing)} such tensors). Index and shards are from different saves; download them again."
        )


def _check_numbering(paths: Iterable[Path]) -> None:
    """Files called 00001-of-00003 must all be there, also where no index lists them."""
    for path in paths:
        numbered = re.search(r"-(\d{5})-of-(\d{5})(?=\.)", path.name)
        if numbered is None:
            continue
        count = int(numbered[2])
        for number in range(1, min(count, 99_999) + 1):
            name = path.name[: numbered.start()] + f"-{number:05d}-of-{count:05d}" + path.name[numbered.end() :]
            if not (path.parent / name).is_file():
                raise CheckpointError(f"{path.parent}: {path.name} is one of {count} files and {name} is missing.")
