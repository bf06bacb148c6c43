"""GGUF files, llama.cpp's, as checkpoints: lazy tensors by their names in transformers, computed in float32 when read.

Start at :func:`open_gguf`, which ``weft.open("model.gguf")`` calls.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from weft.checkpoint.checkpoint import Checkpoint, LazyTensor
from weft.checkpoint.computed import RowBlocks, Scratch, computed
from weft.checkpoint.dtypes import DTYPES
from weft.checkpoint.files import ByteSource, LocalFile
from weft.checkpoint.gguf_blocks import DECODERS, GGMLType, decode_blocks
from weft.checkpoint.gguf_header import GGUFHeader, GGUFTensor, read_gguf_header
from weft.checkpoint.gguf_names import ARCHITECTURES, ROPE_FACTORS, Architecture, config_from_metadata, head_counts
from weft.checkpoint.header import TensorInfo
from weft.errors import CheckpointError

_SPLIT = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")


@dataclass
class GGUFCheckpoint(Checkpoint):
    """A checkpoint with the head of its file.

    Attributes:
        header: of the file, or of the first of several.
        stored: for each tensor what the file says of it, and the file.
        no_config: why there is no configuration; empty if there is one.
    """

    header: GGUFHeader | None = None
    stored: dict[str, tuple[GGUFTensor, ByteSource]] = field(default_factory=dict)
    no_config: str = ""


def open_gguf(path: Path, names: str = "hugging_face") -> GGUFCheckpoint:
    """Open a GGUF file, or all files of a split one, without reading weights.

    Args:
        path: the file; of a split model any of its files.
        names: ``hugging_face``: tensors are called, and their rows ordered, as in transformers, if the architecture is in
            :data:`weft.checkpoint.gguf_names.ARCHITECTURES`; ``file``: as in the file.

    Returns:
        The checkpoint. ``config`` is what transformers needs to load such weights; it is empty, and ``no_config`` says why,
        where the metadata does not say it without doubt. ``metadata`` holds numbers and texts, ``header.get`` also lists.
        Plain types (F32, F16, BF16, integers) are read as they are, quantised ones as float32.

    Raises:
        CheckpointError: a file is missing or damaged, or a tensor is of a type that weft does not decode.
    """
    if names not in ("hugging_face", "file"):
        raise CheckpointError(f"Names are hugging_face or file, got {names!r}.")
    files = [LocalFile(p) for p in _parts(path)]
    try:
        return _open(path, files, names)
    except BaseException:
        for file in files:
            file.close()
        raise


def _open(path: Path, files: list[LocalFile], names: str) -> GGUFCheckpoint:
    headers = [read_gguf_header(file, str(file.path)) for file in files]
    for number, (file, header) in enumerate(zip(files, headers)):
        said = header.get("split.count", 1), header.get("split.no", 0)
        if said[0] not in (0, 1) and said != (len(files), number):
            raise CheckpointError(
                f"{file.path}: says that it is part {said[1]} (from 0) of {said[0]} and is read as part {number} of "
                f"{len(files)}. Files of a split model are called NAME-00001-of-00003.gguf; give them these names back."
            )
    stored: dict[str, tuple[GGUFTensor, ByteSource]] = {}
    for file, part in zip(files, headers):
        for name, tensor in part.tensors.items():
            if name in stored:
                raise CheckpointError(f"{path}: tensor {name!r} is in two files of one model.")
            if tensor.kind.name not in DECODERS and not tensor.kind.plain:
                raise CheckpointError(
                    f"{file.path}: tensor {name!r} is of the type {tensor.kind.name}, which weft does not decode; it "
                    f"decodes {', '.join(DECODERS)}. Take a file in one of these, or requantise it with llama.cpp: "
                    "llama-quantize --allow-requantize."
                )
            stored[name] = (tensor, file)
    header = headers[0]
    row, heads, why = _naming(header, stored) if names == "hugging_face" else (None, None, "names are the file's")
    scratch = Scratch()
    tensors: dict[str, LazyTensor] = {}
    for name, (tensor, source) in stored.items():
        known = row.to_hugging_face(name) if row else None
        if (known or name) in tensors:
            raise CheckpointError(
                f"{path}: two tensors would be called {known or name!r}. The file is damaged or hostile."
            )
        tensors[known or name] = _lazy(known or name, tensor, source, scratch, row if known else None, heads)
    config: dict[str, Any] = {}
    if row is not None:
        config, why = config_from_metadata(header, {n: t.shape for n, t in tensors.items()}, _rope_factors(tensors))
        if config and ROPE_FACTORS in tensors:  # the configuration says them
            del tensors[ROPE_FACTORS], stored[ROPE_FACTORS]
    return GGUFCheckpoint(
        name=path.name,
        tensors=tensors,
        config=config,
        metadata=header.plain(),
        fingerprint="|".join(f"{file.name}:{file.stamp}" for file in files),
        header=header,
        stored=dict(zip(tensors, stored.values())),
        no_config=why,
    )


def _parts(path: Path) -> list[Path]:
    """The files of a split model in order, or the file alone."""
    found = _SPLIT.fullmatch(path.name)
    if found is None or not 1 < int(found[3]) < 10_000:
        return [path]
    paths = [path.with_name(f"{found[1]}-{i + 1:05d}-of-{found[3]}.gguf") for i in range(int(found[3]))]
    absent = [p.name for p in paths if not p.is_file()]
    if absent:
        raise CheckpointError(f"{path.parent}: {path.name} is one of {len(paths)} files and {absent[0]} is missing.")
    return paths


def _rope_factors(tensors: dict[str, LazyTensor]) -> np.ndarray | None:
    """The few divisors of frequencies that a file of Llama 3.1 holds."""
    held = tensors.get(ROPE_FACTORS)
    small = held is not None and held.dtype.name == "F32" and held.size <= 1 << 12
    return held.numpy() if held is not None and small else None


def _naming(
    header: GGUFHeader, stored: dict[str, tuple[GGUFTensor, ByteSource]]
) -> tuple[Architecture | None, tuple[int, int] | None, str]:
    """The architecture whose names and orders apply, its heads, and why there is none."""
    row = ARCHITECTURES.get(header.architecture)
    if row is None:
        return None, None, f"weft has no names for the architecture {header.architecture!r}"
    if not row.permuted:
        return row, None, ""
    heads = head_counts(header)
    if heads is None:
        return None, None, f"{row.name}.attention.head_count is not one whole number"
    for name, (tensor, _) in stored.items():
        count = _heads_of(name, heads)
        if count and (not tensor.shape or not tensor.shape[0] or tensor.shape[0] % (2 * count)):
            return None, None, f"the rows of {name} do not divide into {count} heads"
    return row, heads, ""


def _heads_of(name: str, heads: tuple[int, int]) -> int:
    """How many heads the rows of a tensor are, if they are stored in the order of pairs; else 0."""
    if ".attn_q." in name:
        return heads[0]
    return heads[1] if ".attn_k." in name else 0


def _lazy(
    name: str,
    tensor: GGUFTensor,
    file: ByteSource,
    scratch: Scratch,
    row: Architecture | None,
    heads: tuple[int, int] | None,
) -> LazyTensor:
    source: ByteSource = file
    offset = tensor.offset
    count = _heads_of(tensor.name, heads) if row is not None and heads is not None else 0
    if count:
        source, offset = HalvedHeads(file, tensor, count), 0
    shifted = row is not None and row.shifted and tensor.name.endswith("norm.weight")
    if tensor.kind.plain and not shifted:
        info = TensorInfo(name, DTYPES[tensor.kind.plain], tensor.shape, offset, tensor.nbytes)
        return LazyTensor(info, source)
    blocks = Blocks(name, tensor, source, offset, scratch, np.float32(-1 if shifted else 0))
    made = computed(blocks)
    info = TensorInfo(name, DTYPES["F32"], tensor.shape, 0, blocks.size)
    return LazyTensor(info, blocks, DTYPES[tensor.kind.plain] if tensor.kind.plain else made.stored)


class Blocks(RowBlocks):
    """Values of blocks that lie in a file, decoded as they are read; a row is a block."""

    def __init__(
        self, name: str, tensor: GGUFTensor, source: ByteSource, offset: int, scratch: Scratch, shift: np.float32
    ):
        self._kind: GGMLType = tensor.kind
        self._offset = offset
        self._shift = shift
        shape = (tensor.nbytes // tensor.kind.nbytes, tensor.kind.block)
        info = TensorInfo(name, DTYPES["F32"], shape, offset, tensor.nbytes)
        super().__init__(LazyTensor(info, source), scratch)

    def _base_rows(self, first: int) -> np.ndarray:
        rows = min(self._block_rows, self.rows - first)
        raw = self._scratch.array("raw", rows * self._kind.nbytes)
        self.base.source.read_into(raw.data, self._offset + first * self._kind.nbytes)
        with np.errstate(over="ignore", invalid="ignore"):  # scales may be infinite; callers count what is not finite
            return decode_blocks(raw.reshape(rows, self._kind.nbytes), self._kind)

    def _change(self, values: np.ndarray, first: int) -> None:
        if self._shift:
            values += self._shift


class HalvedHeads:
    """A tensor's bytes with rows in transformers' order.

    A head has d rows. In the file rows 2 j and 2 j + 1 turn together, in transformers rows j and j + d / 2 do.
    """

    def __init__(self, file: ByteSource, tensor: GGUFTensor, heads: int):
        self.name, self.size = tensor.name, tensor.nbytes
        self._file, self._start = file, tensor.offset
        self._row = tensor.nbytes // tensor.shape[0]
        self._half = tensor.shape[0] // heads // 2

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """See :class:`weft.checkpoint.files.ByteSource`."""
        done = 0
        while done < len(buffer):
            row, within = divmod(offset + done, self._row)
            count = min(self._row - within, len(buffer) - done)
            place = self._start + self._row * row_in_file(row, self._half) + within
            self._file.read_into(buffer[done : done + count], place)
            done += count

    def close(self) -> None:
        """See :class:`weft.checkpoint.files.ByteSource`."""
        self._file.close()


def row_in_file(row: int, half: int) -> int:
    """Where a row of q or k lies in a file of ``llama``.

    Args:
        row: in transformers' order.
        half: half the rows of a head.

    >>> [row_in_file(row, 2) for row in range(8)]
    [0, 2, 1, 3, 4, 6, 5, 7]
    """
    head, within = divmod(row, 2 * half)
    side, pair = divmod(within, half)
    return 2 * half * head + 2 * pair + side
