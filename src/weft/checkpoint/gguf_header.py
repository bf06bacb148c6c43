"""The head of a GGUF file (versions 2 and 3): parsed strictly, and written.

A file is ``"GGUF" | u32 version | u64 tensors | u64 entries | entries of metadata | descriptions of tensors | padding |
tensor bytes``, little-endian; tensors begin at multiples of ``general.alignment`` (32 if it is not there). What comes
from a stranger is hostile until proven otherwise: every count and length is compared with the bytes that the file still
has before anything is made from it, and tensors must lie one after the other, as llama.cpp demands. Metadata stays in the
bytes in which it was read, and is decoded when it is asked for, so it can be written again unchanged.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from weft.checkpoint.files import ByteSource
from weft.checkpoint.gguf_blocks import GGML_TYPES, GGMLType
from weft.errors import CheckpointError

MAGIC = b"GGUF"
ALIGNMENT = 32
MAX_HEADER_BYTES = 256_000_000  # ten times the head of a model with a quarter of a million tokens
MAX_ENTRIES = 1_000_000
MAX_DIMENSIONS = 4
MAX_DEPTH = 4  # lists of lists; llama.cpp itself reads none
_CHUNK = 1 << 20
_MAX_NAME = 1 << 12
_STRING, _LIST = 8, 9
_FORMATS = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip
_NAMES = {
    "uint8": 0, "int8": 1, "uint16": 2, "int16": 3, "uint32": 4, "int32": 5, "float32": 6, "bool": 7, "string": 8,
    "uint64": 10, "int64": 11, "float64": 12,
}  # fmt: skip
_SMALLEST = {**{kind: struct.calcsize("<" + f) for kind, f in _FORMATS.items()}, _STRING: 8, _LIST: 12}


@dataclass(frozen=True)
class GGUFTensor:
    """What a head says of one tensor: name, type, sizes of the axes in numpy's order, place and length in bytes."""

    name: str
    kind: GGMLType
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class GGUFHeader:
    """A parsed head.

    Attributes:
        version: 2 or 3.
        entries: each key's type (number) and the bytes of its value.
        tensors: in the order of the file.
        alignment: of tensors, bytes.
        data_start: where the tensors begin.
    """

    version: int
    entries: Mapping[str, tuple[int, bytes]]
    tensors: Mapping[str, GGUFTensor]
    alignment: int
    data_start: int

    def get(self, key: str, default: Any = None) -> Any:
        """A value of the metadata: a number, a truth value, text, or a list; ``default`` if there is none."""
        if key not in self.entries:
            return default
        kind, raw = self.entries[key]
        return _decode(kind, raw, 0)[0]

    @property
    def architecture(self) -> str:
        """``general.architecture``, empty if it is not there or no text."""
        value = self.get("general.architecture", "")
        return value if isinstance(value, str) else ""

    def plain(self) -> dict[str, str]:
        """The metadata as texts; lists only say how many there are."""
        made = {}
        for key, (kind, raw) in self.entries.items():
            if kind == _LIST:
                made[key] = f"[{struct.unpack_from('<Q', raw, 4)[0]:,} values]"
            else:
                value = _decode(kind, raw, 0)[0]
                made[key] = f"{value:.8g}" if isinstance(value, float) else str(value)
        return made


def read_gguf_header(source: ByteSource, where: str) -> GGUFHeader:
    """Read and check the head of a GGUF file.

    Raises:
        CheckpointError: anything that breaks the format, with both values.
    """
    return _Reader(source, where).header()


def value_bytes(kind: str, value: Any) -> tuple[int, bytes]:
    """An entry of the metadata for :func:`build_gguf_header`.

    Args:
        kind: uint8 … float64, bool, string, or one of them with ``[]`` for a list.
        value: a number, text, or a sequence of them.

    >>> value_bytes("uint32", 3), value_bytes("bool[]", [True])[1].hex()
    ((4, b'\\x03\\x00\\x00\\x00'), '07000000010000000000000001')
    """
    inner = kind.removesuffix("[]")
    number = _NAMES[inner]
    if not kind.endswith("[]"):
        return number, _encode(number, value)
    head = struct.pack("<IQ", number, len(value))
    if number == _STRING:
        return _LIST, head + b"".join(_encode(number, v) for v in value)
    return _LIST, head + struct.pack(f"<{len(value)}{_FORMATS[number]}", *value)


def build_gguf_header(
    entries: Mapping[str, tuple[int, bytes]],
    tensors: Iterable[tuple[str, GGMLType, tuple[int, ...]]],
    alignment: int = ALIGNMENT,
) -> tuple[bytes, dict[str, GGUFTensor], int]:
    """Lay out a file of version 3: the bytes before the tensors, where each tensor goes, and the size of the file."""
    parts, place, position = [], {}, 0
    for name, kind, shape in tensors:
        nbytes = math.prod(shape) // kind.block * kind.nbytes
        place[name] = GGUFTensor(name, kind, shape, position, nbytes)
        text = name.encode()
        parts.append(struct.pack("<Q", len(text)) + text + struct.pack("<I", len(shape)))
        parts.append(struct.pack(f"<{len(shape)}Q", *reversed(shape)) + struct.pack("<IQ", kind.number, position))
        position += nbytes + -nbytes % alignment
    head = MAGIC + struct.pack("<IQQ", 3, len(place), len(entries))
    metadata = [
        struct.pack("<Q", len(key.encode())) + key.encode() + struct.pack("<I", kind) + raw
        for key, (kind, raw) in entries.items()
    ]
    prefix = b"".join([head, *metadata, *parts])
    prefix += bytes(-len(prefix) % alignment)
    start = len(prefix)
    moved = {n: GGUFTensor(n, t.kind, t.shape, start + t.offset, t.nbytes) for n, t in place.items()}
    return prefix, moved, start + position


class _Reader:
    """Reads forward; holds what was read, never more than the file has or a head may have."""

    def __init__(self, source: ByteSource, where: str):
        self.source, self.where = source, where
        self.limit = min(source.size, MAX_HEADER_BYTES)
        self.data = bytearray()
        self.at = 0

    def header(self) -> GGUFHeader:
        version, tensor_count, entry_count = self._start()
        entries: dict[str, tuple[int, bytes]] = {}
        for _ in range(entry_count):
            key = self._text("a key")
            if key in entries:
                raise self._error(f"the key {key!r} stands twice")
            kind = self._number("I")
            begin = self.at
            self._skip_value(kind, key, 0)
            entries[key] = (kind, bytes(self.data[begin : self.at]))
        alignment = self._alignment(entries)
        described = [self._tensor() for _ in range(tensor_count)]
        start = self.at + -self.at % alignment
        return GGUFHeader(version, entries, self._placed(described, start, alignment), alignment, start)

    def _start(self) -> tuple[int, int, int]:
        if self.source.size < 24:
            raise self._error(f"{self.source.size} bytes is too short for a GGUF file (24 bytes and metadata)")
        magic, version, tensors, entries = struct.unpack("<4sIQQ", self._take(24))
        if magic != MAGIC:
            raise CheckpointError(f"{self.where}: begins with {magic!r} and not with b'GGUF', so it is no GGUF file.")
        if version & 0xFFFF == 0:
            raise CheckpointError(
                f"{self.where}: is big-endian, which weft does not read. Turn it round: gguf-convert-endian little."
            )
        if version not in (2, 3):
            raise CheckpointError(
                f"{self.where}: is GGUF of version {version}; weft reads 2 and 3. Convert the model again with a current "
                "llama.cpp."
            )
        left = self.source.size - 24
        if entries > min(left // 13, MAX_ENTRIES):  # key length, type, one byte
            raise self._error(f"{entries:,} entries of metadata cannot be in {left:,} bytes")
        if tensors > min(left // 24, MAX_ENTRIES):
            raise self._error(f"{tensors:,} tensors cannot be in {left:,} bytes")
        return version, tensors, entries

    def _take(self, count: int) -> memoryview:
        """The next bytes; the caller's ``count`` may be any claim."""
        self._need(count)
        view = memoryview(self.data)[self.at : self.at + count]
        self.at += count
        return view

    def _need(self, count: int) -> None:
        end = self.at + count
        if end <= len(self.data):
            return
        if end > self.limit:
            if end <= self.source.size:
                raise self._error(f"the head has more than the {MAX_HEADER_BYTES:,} bytes that weft allows")
            raise CheckpointError(
                f"{self.where}: ends at byte {self.source.size:,} while {count:,} more were expected from byte {self.at:,} "
                "on. The file is truncated or damaged; download it again."
            )
        more = min(max(end, 2 * len(self.data), _CHUNK), self.limit) - len(self.data)
        part = bytearray(more)
        self.source.read_into(memoryview(part), len(self.data))
        self.data = self.data + part  # a new object: views of the old one may be alive

    def _number(self, form: str) -> int:
        return int(struct.unpack("<" + form, self._take(struct.calcsize("<" + form)))[0])

    def _text(self, what: str) -> str:
        length = self._number("Q")
        if length > _MAX_NAME:
            raise self._error(f"{what} of {length:,} bytes at byte {self.at - 8:,}")
        try:
            return bytes(self._take(length)).decode("utf-8")
        except UnicodeDecodeError:
            raise self._error(f"{what} at byte {self.at - length:,} is not UTF-8") from None

    def _skip_value(self, kind: int, key: str, depth: int) -> None:
        """Step over a value, checking its lengths."""
        if kind in _FORMATS:
            self._take(_SMALLEST[kind])
        elif kind == _STRING:
            self._take(self._number("Q"))
        elif kind == _LIST:
            inner, count = self._number("I"), self._number("Q")
            if inner not in _SMALLEST:
                raise self._error(f"the list {key!r} is of the unknown type {inner}")
            left = self.source.size - self.at
            if count > left // _SMALLEST[inner]:
                raise self._error(f"the list {key!r} claims {count:,} values with {left:,} bytes left")
            if inner in _FORMATS:
                self._take(count * _SMALLEST[inner])
            elif inner == _STRING:
                self._skip_strings(count)
            elif depth + 1 >= MAX_DEPTH:
                raise self._error(f"{key!r} has lists in lists, {MAX_DEPTH} deep")
            else:
                for _ in range(count):
                    self._skip_value(inner, key, depth + 1)
        else:
            raise self._error(f"{key!r} is of the unknown type {kind}")

    def _skip_strings(self, count: int) -> None:
        unpack = struct.Struct("<Q").unpack_from
        for _ in range(count):
            if self.at + 8 > len(self.data):
                self._need(8)
            length = unpack(self.data, self.at)[0]
            if self.at + 8 + length > len(self.data):
                self._need(8 + length)
            self.at += 8 + length

    def _alignment(self, entries: Mapping[str, tuple[int, bytes]]) -> int:
        if "general.alignment" not in entries:
            return ALIGNMENT
        kind, raw = entries["general.alignment"]
        value = _decode(kind, raw, 0)[0]
        if kind != _NAMES["uint32"] or value == 0 or value & (value - 1):
            raise self._error(f"general.alignment must be a power of two in 32 bits, found {str(value)[:40]}")
        return int(value)

    def _tensor(self) -> GGUFTensor:
        name = self._text("a tensor's name")
        dimensions = self._number("I")
        if dimensions > MAX_DIMENSIONS:
            raise self._error(f"tensor {name!r} has {dimensions:,} axes, more than {MAX_DIMENSIONS}")
        shape = tuple(reversed(struct.unpack(f"<{dimensions}Q", self._take(8 * dimensions))))
        number, offset = self._number("I"), self._number("Q")
        if number not in GGML_TYPES:
            raise CheckpointError(
                f"{self.where}: tensor {name!r} is of the type {number}, which weft does not know. The file is damaged, or "
                "newer than weft."
            )
        kind = GGML_TYPES[number]
        if math.prod(s for s in shape if s) > self.source.size * kind.block:
            raise self._error(f"tensor {name!r} of the shape {list(shape)} is larger than the file")
        row = shape[-1] if shape else 1
        if row % kind.block:
            raise self._error(f"tensor {name!r} has rows of {row:,}, no multiple of the {kind.block} of {kind.name}")
        return GGUFTensor(name, kind, shape, offset, math.prod(shape) // kind.block * kind.nbytes)

    def _placed(self, described: list[GGUFTensor], start: int, alignment: int) -> dict[str, GGUFTensor]:
        """Tensors by name with their places in the file, one after the other."""
        found: dict[str, GGUFTensor] = {}
        position = 0
        for tensor in sorted(described, key=lambda t: (t.offset, t.nbytes)):
            if tensor.name in found:
                raise self._error(f"the tensor {tensor.name!r} stands twice")
            if tensor.offset != position:
                problem = "overlaps the tensor before it" if tensor.offset < position else "leaves a hole before it"
                raise self._error(
                    f"tensor {tensor.name!r} starts at {tensor.offset:,} and {problem} (expected {position:,} with the "
                    f"alignment {alignment})"
                )
            end = position + tensor.nbytes
            if start + end > self.source.size:
                raise CheckpointError(
                    f"{self.where}: tensor {tensor.name!r} ends at byte {start + end:,}, the file has {self.source.size:,}. "
                    "The file is truncated; download it again."
                )
            found[tensor.name] = GGUFTensor(tensor.name, tensor.kind, tensor.shape, start + position, tensor.nbytes)
            position = end + -end % alignment
        if described and self.source.size > start + position:
            raise self._error(f"{self.source.size - start - position:,} bytes follow the last tensor")
        return {t.name: found[t.name] for t in described}

    def _error(self, problem: str) -> CheckpointError:
        return CheckpointError(f"{self.where}: {problem}. The file is damaged or hostile; download it again.")


def _decode(kind: int, raw: bytes, at: int) -> tuple[Any, int]:
    """A value that :class:`_Reader` has checked, and where it ends."""
    if kind == _STRING:
        end = at + 8 + struct.unpack_from("<Q", raw, at)[0]
        return raw[at + 8 : end].decode("utf-8", "replace"), end
    if kind == 7:
        return raw[at] != 0, at + 1
    if kind in _FORMATS:
        return struct.unpack_from("<" + _FORMATS[kind], raw, at)[0], at + _SMALLEST[kind]
    inner, count = struct.unpack_from("<IQ", raw, at)
    at += 12
    if inner in _FORMATS:
        form = "B" if inner == 7 else _FORMATS[inner]
        values = list(struct.unpack_from(f"<{count}{form}", raw, at))
        return [v != 0 for v in values] if inner == 7 else values, at + count * _SMALLEST[inner]
    made = []
    for _ in range(count):
        value, at = _decode(inner, raw, at)
        made.append(value)
    return made, at


def _encode(number: int, value: Any) -> bytes:
    if number == _STRING:
        text = value.encode() if isinstance(value, str) else bytes(value)
        return struct.pack("<Q", len(text)) + text
    return struct.pack("<" + _FORMATS[number], value)
