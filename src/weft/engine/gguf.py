"""Write GGUF: a transformers model of a known architecture, or another GGUF file with the same metadata.

Tensors (:mod:`weft.engine.gguf_tensors`) are written one after the other in pieces of a few megabytes; the file appears
complete or not at all.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from weft.checkpoint.checkpoint import Checkpoint
from weft.checkpoint.files import LocalFile
from weft.checkpoint.gguf import GGUFCheckpoint, open_gguf
from weft.checkpoint.gguf_blocks import ENCODERS, GGMLType, ggml_type
from weft.checkpoint.gguf_header import (
    ALIGNMENT,
    GGUFHeader,
    build_gguf_header,
    read_gguf_header,
    value_bytes,
)
from weft.checkpoint.gguf_names import (
    ARCHITECTURES,
    ROPE_FACTORS,
    config_from_metadata,
    metadata_from_config,
)
from weft.checkpoint.gguf_tokenizer import NO_TOKENIZER, tokenizer_metadata
from weft.checkpoint.header import Header
from weft.checkpoint.open import open_checkpoint
from weft.engine.gguf_tensors import Output, from_gguf, from_transformers
from weft.engine.journal import WorkFolder
from weft.engine.progress import Progress
from weft.engine.writer import ShardWriter
from weft.errors import OutputError, RecipeError, did_you_mean

if TYPE_CHECKING:
    from weft.packed.form import Packed

FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 7, "BF16": 32}  # general.file_type: what most matrices are


@dataclass
class GGUFResult:
    """What was written: the file, its tensors and bytes, how many tensors are of each type, notes, seconds."""

    output: Path
    tensors: int
    nbytes: int
    types: dict[str, int]
    exact: int
    notes: list[str]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**vars(self), "output": str(self.output), "seconds": round(self.seconds, 2)}


def write_gguf(
    model: str | os.PathLike[str] | Checkpoint,
    output: str | os.PathLike[str],
    *,
    kind: str = "q8_0",
    embeddings: str = "",
    packed: Mapping[str, Packed] | None = None,
    importance: Mapping[str, np.ndarray] | None = None,
    name: str = "",
    pre_tokenizer: str = "",
    force: bool = False,
    progress: Progress | None = None,
) -> GGUFResult:
    """Write a model as one GGUF file.

    Args:
        model: a transformers folder (Llama, Mistral, Qwen2, Qwen3), or a GGUF file, whose metadata is kept.
        output: the file.
        kind: of matrices: f32, f16, bf16, q8_0 or q4_0, rounded to nearest as llama.cpp does; blocks whose values are on a
            grid of Q4_0 already keep their values. Vectors are written as F32.
        embeddings: the type of the embedding and the output head; q8_0 beside q4_0, else ``kind``.
        packed: weights by name that are few values already; those on a grid of Q4_0 or Q8_0 are written bit for bit.
        importance: mean square of each input by GGUF's name of the weight, with which scales of Q4_0 are sought.
        name: ``general.name``; the model's own if empty.
        pre_tokenizer: see :func:`weft.checkpoint.gguf_tokenizer.tokenizer_metadata`.
        force: replace a GGUF file.
        progress: reports to it.

    Returns:
        What was written.

    Raises:
        RecipeError: the architecture or its configuration cannot be said in GGUF, or an option is wrong.
        CheckpointError: the model is damaged. OutputError: the output exists, holds the model, or does not fit on the disk.
    """
    began = time.monotonic()
    target = Path(os.path.abspath(Path(output).expanduser()))
    main = _chosen(kind)
    outer = _chosen(embeddings) if embeddings else ggml_type("Q8_0") if main.name == "Q4_0" else main
    opened = _open(model)
    try:
        _check_target(target, opened, force)
        notes: list[str] = []
        if isinstance(opened, GGUFCheckpoint):
            if packed:
                raise RecipeError("Packed weights belong to a transformers model; a GGUF file holds its own.")
            entries, alignment = _kept_metadata(opened, main), opened.header.alignment if opened.header else ALIGNMENT
            outputs, exact = from_gguf(opened, main, outer, importance or {}, notes), 0
        else:
            entries, alignment = _new_metadata(opened, main, name, pre_tokenizer, notes), ALIGNMENT
            outputs, exact = from_transformers(opened, main, outer, packed or {}, importance or {}, notes)
            _check_readable(entries, outputs, opened.name)
        unused = sorted(set(importance or {}) - {o.name for o in outputs})
        if importance and len(unused) == len(importance):
            raise RecipeError(
                f"The importance is of none of the model's weights, but of {unused[0]} and others. It is of another model."
            )
        nbytes = _write(target, entries, outputs, alignment, force, progress or Progress())
    finally:
        if opened is not model:
            opened.close()
    types: dict[str, int] = {}
    for one in outputs:
        types[one.kind.name] = types.get(one.kind.name, 0) + 1
    return GGUFResult(target, len(outputs), nbytes, types, exact, notes, time.monotonic() - began)


def _chosen(kind: str) -> GGMLType:
    known = [n.lower() for n in ENCODERS]
    if kind.lower() not in known:
        raise RecipeError(
            f"GGUF is written with the types {', '.join(known)}, not {kind!r}.{did_you_mean(kind, known)}"
        )
    return ggml_type(kind)


def _open(model: str | os.PathLike[str] | Checkpoint) -> Checkpoint:
    """The model; tensors of a GGUF file by its own names."""
    if isinstance(model, GGUFCheckpoint):
        raise RecipeError("Give the path of a GGUF file that is to be written again, not the opened checkpoint.")
    if isinstance(model, Checkpoint):
        return model
    path = Path(model)
    return open_gguf(path, "file") if path.suffix == ".gguf" and path.is_file() else open_checkpoint(model)


def _kept_metadata(opened: GGUFCheckpoint, main: GGMLType) -> dict[str, tuple[int, bytes]]:
    assert opened.header is not None
    entries = {k: v for k, v in opened.header.entries.items() if not k.startswith("split.")}
    return {**entries, **_file_type(main)}


def _file_type(main: GGMLType) -> dict[str, tuple[int, bytes]]:
    return {
        "general.file_type": value_bytes("uint32", FILE_TYPES[main.name]),
        "general.quantization_version": value_bytes("uint32", 2),
    }


def _new_metadata(
    opened: Checkpoint, main: GGMLType, name: str, pre_tokenizer: str, notes: list[str]
) -> dict[str, tuple[int, bytes]]:
    if not opened.config:
        raise RecipeError(
            f"{opened.name}: has no config.json, and GGUF needs the model's sizes. Give a transformers folder."
        )
    entries = {**metadata_from_config(opened.config, name or opened.name), **_file_type(main)}
    if opened.config.get("model_type") == "mistral" and opened.config.get("sliding_window"):
        notes.append("GGUF's llama has no sliding window: beyond it the file attends to more than the model did.")
    if opened.folder is None:
        notes.append(f"{opened.name} has no folder with a tokenizer, so the file has none.")
        return {**entries, **NO_TOKENIZER}
    tokenizer, more = tokenizer_metadata(opened.folder, opened.config["vocab_size"], pre_tokenizer)
    notes += more
    return {**entries, **tokenizer}


def _check_readable(entries: Mapping[str, tuple[int, bytes]], outputs: list[Output], name: str) -> None:
    """What is written says the model: its configuration is read back from the metadata and fits all tensors."""
    header = GGUFHeader(3, entries, {}, ALIGNMENT, 0)
    row = ARCHITECTURES[header.architecture]
    shapes = {row.to_hugging_face(o.name) or o.name: o.shape for o in outputs if o.name != ROPE_FACTORS}
    config, why = config_from_metadata(header, shapes)
    if not config:
        raise RecipeError(f"{name}: config.json and the weights do not fit together for GGUF's {row.name}: {why}.")


def _check_target(target: Path, opened: Checkpoint, force: bool) -> None:
    if target.suffix != ".gguf":
        raise OutputError(f"{target}: a GGUF file is called NAME.gguf.")
    for source in {id(t.source): t.source for t in opened.values()}.values():
        path = getattr(source, "path", None)
        if path is not None and target.exists() and os.path.samefile(path, target):
            raise OutputError(f"{target}: is the model that is read. Choose another output.")
    if target.exists() or target.is_symlink():
        if not force:
            raise OutputError(f"{target}: exists already. Choose another output, or replace it with --force.")
        if not target.is_file():
            raise OutputError(f"{target}: exists and is no file, so --force does not replace it. Remove it yourself.")


def _write(
    target: Path,
    entries: Mapping[str, tuple[int, bytes]],
    outputs: list[Output],
    alignment: int,
    force: bool,
    progress: Progress,
) -> int:
    prefix, place, size = build_gguf_header(entries, ((o.name, o.kind, o.shape) for o in outputs), alignment)
    work = WorkFolder(target)
    work.acquire()
    try:
        shutil.rmtree(work.files, ignore_errors=True)
        work.files.mkdir()
        path = work.files / target.name
        writer = ShardWriter(path, prefix, Header({}, {}, 0), size)
        try:
            writer.create()
            progress.start(f"writing {target.name}", len(outputs), size)
            for one in outputs:
                tensor = place[one.name]
                position = tensor.offset
                for piece in one.pieces():
                    data = piece.reshape(-1).view(np.uint8)
                    writer.write(data.data, position)
                    position += data.nbytes
                if position != tensor.offset + tensor.nbytes:
                    raise OutputError(
                        f"{one.name}: {position - tensor.offset:,} bytes were made, not {tensor.nbytes:,}."
                    )
                progress.advance(one.name, tensor.nbytes)
            writer.sync()
        finally:
            writer.close()
        made = LocalFile(path)
        try:
            header = read_gguf_header(made, str(path))
        finally:
            made.close()
        if header.tensors != place or header.entries != dict(entries):
            raise OutputError(f"{path}: does not read back as it was written; the disk is faulty.")
        work.publish(force, single_file=True)
    finally:
        if work.root.exists():
            work.remove()
    return size
