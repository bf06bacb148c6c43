"""The header of a safetensors file: parsed strictly, written for in-place output.

A file is ``u64 little-endian length | JSON header | tensor bytes``. A header from a stranger is hostile
until proven otherwise, so :func:`parse_header` checks every promise the format makes and a few that the
reference reader does not: duplicate names, absurd nesting, offsets that overlap or leave holes.
Nothing is allocated from a size that the file merely claims.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from weft.checkpoint.dtypes import DTYPES, DType
from weft.errors import CheckpointError, did_you_mean

MAX_HEADER_BYTES = 100_000_000  # the limit of the reference implementation
_MAX_ELEMENTS = 2**62  # sizes beyond this would not fit the format's 64-bit offsets


@dataclass(frozen=True)
class TensorInfo:
    """What a header says of one tensor: enough to plan without reading its bytes.

    Attributes:
        name: full name.
        dtype: element type.
        shape: sizes of the axes, ``()`` for a scalar.
        offset: position of the first byte in the file.
        nbytes: size in bytes.
    """

    name: str
    dtype: DType
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Header:
    """A parsed header: tensors in file order, string metadata, and where the tensor bytes start."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    data_start: int


def header_length(prefix: bytes, file_size: int, where: str) -> int:
    """Length in bytes of the JSON header from the first 8 bytes of a file, checked against the file's size."""
    if file_size < 8 or len(prefix) < 8:
        raise CheckpointError(
            f"{where}: {file_size} bytes is too short for a safetensors file (8 bytes and a header). "
            "The file is probably truncated; download or save it again."
        )
    (length,) = struct.unpack("<Q", prefix[:8])
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{where}: the header claims {length:,} bytes, more than the {MAX_HEADER_BYTES:,} that safetensors allows. "
            "This is not a safetensors file, or it is damaged."
        )
    if 8 + length > file_size:
        raise CheckpointError(
            f"{where}: the header claims {length:,} bytes but the file has only {file_size - 8:,} after its length. "
            "The file is truncated; download or save it again."
        )
    return length


def parse_header(text: bytes, file_size: int, where: str) -> Header:
    """Parse and check the JSON header ``text`` of a file of ``file_size`` bytes.

    Raises:
        CheckpointError: anything that breaks the format, with the tensor's name and both values.
    """
    try:
        raw = json.loads(text.decode("utf-8"), object_pairs_hook=_checked_pairs, parse_int=_unsigned)
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        reason = "nesting too deep" if isinstance(error, RecursionError) else str(error)
        raise CheckpointError(f"{where}: the header is not valid JSON ({reason}). The file is damaged.") from None
    if not isinstance(raw, dict):
        raise CheckpointError(f"{where}: the header must be a JSON object, found {type(raw).__name__}.")
    metadata = raw.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CheckpointError(f"{where}: __metadata__ must map strings to strings.")
    data_start = 8 + len(text)
    tensors = [_parse_entry(name, entry, data_start, where) for name, entry in raw.items()]
    tensors.sort(key=lambda t: (t.offset, t.nbytes))
    position = data_start
    for tensor in tensors:
        if tensor.offset != position:
            problem = "overlaps the tensor before it" if tensor.offset < position else "leaves a hole before it"
            raise CheckpointError(
                f"{where}: tensor {tensor.name!r} starts at data offset {tensor.offset - data_start} and {problem} "
                f"(expected {position - data_start}). The header is damaged or hostile."
            )
        position += tensor.nbytes
    if position != file_size:
        missing = position - file_size
        problem = f"{missing:,} bytes are missing" if missing > 0 else f"{-missing:,} bytes follow the last tensor"
        raise CheckpointError(
            f"{where}: the header describes {position:,} bytes, the file has {file_size:,} ({problem}). "
            "The file is truncated or damaged; download or save it again."
        )
    return Header({t.name: t for t in tensors}, metadata, data_start)


def build_header(
    tensors: Iterable[tuple[str, DType, tuple[int, ...]]], metadata: Mapping[str, str]
) -> tuple[bytes, Header]:
    """Lay out tensors in a file: the bytes before the tensor data, and where each tensor goes.

    Tensors are ordered by element width, widest first, so that each starts aligned to its own type; the header
    is padded with spaces to a multiple of 8 bytes.
    """
    ordered = sorted(tensors, key=lambda t: (-t[1].bits, t[0]))
    entries: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    position = 0
    for name, dtype, shape in ordered:
        nbytes = dtype.nbytes(math.prod(shape))
        entries[name] = {"dtype": dtype.name, "shape": list(shape), "data_offsets": [position, position + nbytes]}
        position += nbytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text, parse_header(text, 8 + len(text) + position, "new file")


def _checked_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"the name {key!r} stands twice")
        for text in (key, value):
            if isinstance(text, str):
                text.encode("utf-8")  # JSON can spell half of a surrogate pair, which no file or terminal can hold
        result[key] = value
    return result


def _unsigned(literal: str) -> int:
    if literal.startswith("-"):
        raise ValueError(f"the number {literal[:20]} is negative")
    return int(literal)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MAX_ELEMENTS


def _parse_entry(name: str, entry: object, data_start: int, where: str) -> TensorInfo:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where}: tensor {name!r} needs exactly the fields dtype, shape and data_offsets.")
    dtype_name, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype_name, str) or dtype_name not in DTYPES:
        hint = did_you_mean(str(dtype_name), DTYPES)
        raise CheckpointError(f"{where}: tensor {name!r} has the unknown dtype {str(dtype_name)[:40]!r}.{hint}")
    if not isinstance(shape, list) or not all(_is_count(s) for s in shape) or len(shape) > 64:
        raise CheckpointError(f"{where}: tensor {name!r} has the shape {str(shape)[:80]}; need a list of sizes.")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_count(o) for o in offsets):
        raise CheckpointError(f"{where}: tensor {name!r} has the data_offsets {str(offsets)[:80]}; need [start, end].")
    dtype = DTYPES[dtype_name]
    if math.prod(s for s in shape if s) * dtype.bits > 8 * _MAX_ELEMENTS:  # also of an empty tensor: no array has it
        raise CheckpointError(
            f"{where}: tensor {name!r} has the shape {str(shape)[:80]}, larger than any array can be."
        )
    try:
        nbytes = dtype.nbytes(math.prod(shape))
    except CheckpointError as error:
        raise CheckpointError(f"{where}: tensor {name!r}: {error}") from None
    start, end = offsets
    if end - start != nbytes:
        raise CheckpointError(
            f"{where}: tensor {name!r} of shape {shape} and dtype {dtype_name} needs {nbytes:,} bytes, "
            f"its offsets {offsets} give {end - start:,}. The header is damaged or hostile."
        )
    return TensorInfo(name, dtype, tuple(shape), data_start + start, nbytes)
