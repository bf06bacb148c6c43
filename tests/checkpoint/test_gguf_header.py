"""Heads of GGUF files: what we accept, the reference package reads the same; everything else is a CheckpointError."""

from __future__ import annotations

import struct
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from weft.checkpoint.files import Memory
from weft.checkpoint.gguf import open_gguf
from weft.checkpoint.gguf_blocks import GGML_TYPES, ggml_type
from weft.checkpoint.gguf_header import GGUFHeader, build_gguf_header, read_gguf_header, value_bytes
from weft.errors import CheckpointError

gguf = pytest.importorskip("gguf")
PER_FILE = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def ours(data: bytes) -> GGUFHeader:
    return read_gguf_header(Memory(memoryview(data), "file"), "file")


def text(value: bytes | str) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def entry(key: str, kind: int, raw: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + raw


def tensor(name: str, shape: tuple[int, ...], number: int = 0, offset: int = 0) -> bytes:
    head = text(name) + struct.pack("<I", len(shape)) + struct.pack(f"<{len(shape)}Q", *reversed(shape))
    return head + struct.pack("<IQ", number, offset)


def pack(
    entries: list[bytes], tensors: list[bytes], data: bytes = b"", *, version: int = 3, alignment: int = 32
) -> bytes:
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(entries)) + b"".join(entries) + b"".join(tensors)
    return head + bytes(-len(head) % alignment) + data


def sample() -> bytes:
    """A file with a value of every kind and two tensors."""
    entries = {
        "general.architecture": value_bytes("string", "llama"),
        "a": value_bytes("uint8", 3),
        "b": value_bytes("float64", 0.5),
        "c": value_bytes("bool", True),
        "list": value_bytes("int16[]", [1, -2]),
        "words": value_bytes("string[]", ["one", "", "drei"]),
    }
    tensors = [("x", ggml_type("F32"), (3, 5)), ("y", ggml_type("Q4_0"), (2, 32)), ("z", ggml_type("F16"), ())]
    prefix, place, size = build_gguf_header(entries, tensors)
    data = bytearray(size)
    data[: len(prefix)] = prefix
    data[place["x"].offset : place["x"].offset + 60] = np.arange(15, dtype=np.float32).tobytes()
    return bytes(data)


def test_what_is_built_is_read() -> None:
    header = ours(sample())
    assert header.version == 3
    assert header.get("a") == 3
    assert header.get("b") == 0.5
    assert header.get("c") is True
    assert header.get("list") == [1, -2]
    assert header.get("words") == ["one", "", "drei"]
    assert header.get("nothing", 7) == 7
    assert header.plain() == {
        "general.architecture": "llama", "a": "3", "b": "0.5", "c": "True", "list": "[2 values]", "words": "[3 values]",
    }  # fmt: skip
    assert {n: (t.kind.name, t.shape, t.nbytes) for n, t in header.tensors.items()} == {
        "x": ("F32", (3, 5), 60), "y": ("Q4_0", (2, 32), 36), "z": ("F16", (), 2),
    }  # fmt: skip


def test_version_2_is_read() -> None:
    assert ours(pack([], [tensor("x", (2,))], bytes(8), version=2)).tensors["x"].nbytes == 8


KINDS = {
    "uint8": st.integers(0, 255), "int8": st.integers(-128, 127), "uint16": st.integers(0, 65535),
    "int16": st.integers(-32768, 32767), "uint32": st.integers(0, 2**32 - 1), "int32": st.integers(-(2**31), 2**31 - 1),
    "uint64": st.integers(0, 2**64 - 1), "int64": st.integers(-(2**63), 2**63 - 1), "bool": st.booleans(),
    "float32": st.floats(width=32, allow_nan=False), "float64": st.floats(allow_nan=False), "string": st.text(max_size=6),
}  # fmt: skip


@st.composite
def files(draw: st.DrawFn) -> tuple[dict[str, Any], bytes]:
    """A valid file and its metadata."""
    values: dict[str, Any] = {}
    entries = {}
    keys = st.text(st.characters(codec="utf-8", categories=["L", "N"]), min_size=1, max_size=8)
    for key in draw(st.lists(keys, max_size=5, unique=True)):
        kind = draw(st.sampled_from(sorted(KINDS)))
        if draw(st.booleans()):
            value: Any = draw(st.lists(KINDS[kind], min_size=1, max_size=4))
            entries[key] = value_bytes(kind + "[]", value)
        else:
            value = draw(KINDS[kind])
            entries[key] = value_bytes(kind, value)
        values[key] = value
    alignment = draw(st.sampled_from([1, 2, 8, 32, 64, 4096]))
    entries["general.alignment"] = value_bytes("uint32", alignment)
    tensors = []
    for name in draw(st.lists(keys, max_size=4, unique=True)):
        kind = GGML_TYPES[draw(st.sampled_from(sorted(GGML_TYPES)))]
        shape = [*draw(st.lists(st.integers(1, 3), max_size=3)), kind.block * draw(st.integers(1, 2))]
        tensors.append((name, kind, tuple(shape)))
    prefix, _, size = build_gguf_header(entries, tensors, alignment)
    return values, prefix + draw(st.binary(min_size=1, max_size=1)) * (size - len(prefix))


@given(files())
@PER_FILE
def test_valid_files_are_read_as_the_reference_reads_them(tmp_path: Path, made: tuple[dict[str, Any], bytes]) -> None:
    values, data = made
    (tmp_path / "file.gguf").write_bytes(data)
    header, theirs = ours(data), gguf.GGUFReader(tmp_path / "file.gguf")
    assert {key: header.get(key) for key in values} == values
    assert {key: theirs.fields[key].contents() for key in values} == values
    found = {
        t.name: (t.tensor_type.name, tuple(map(int, reversed(t.shape))), t.data_offset, int(t.n_bytes))
        for t in theirs.tensors
    }
    assert {n: (t.kind.name, t.shape, t.offset, t.nbytes) for n, t in header.tensors.items()} == found


def test_files_of_the_reference_are_read(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    arrays = {"a": random.standard_normal((3, 64)).astype(np.float32), "b": np.arange(4, dtype=np.int32)}
    writer = gguf.GGUFWriter(tmp_path / "file.gguf", "something")
    writer.add_token_list(["x", "y"])
    writer.add_rope_freq_base(1e6)
    for name, array in arrays.items():
        writer.add_tensor(name, array)
    q8 = gguf.quants.quantize(arrays["a"], gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("c", q8, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with open_gguf(tmp_path / "file.gguf") as opened:
        assert opened.metadata["general.architecture"] == "something"
        assert opened.metadata["tokenizer.ggml.tokens"] == "[2 values]"
        assert opened["b"].dtype.name == "I32"
        for name, array in arrays.items():
            assert np.array_equal(opened[name].numpy(), array)
        assert np.array_equal(opened["c"].numpy(), gguf.quants.dequantize(q8, gguf.GGMLQuantizationType.Q8_0))


def test_every_truncation_is_refused() -> None:
    data = sample()
    last = ours(data).tensors["z"]
    for length in range(last.offset + last.nbytes):
        with pytest.raises(CheckpointError):
            ours(data[:length])
    assert ours(data[: last.offset + last.nbytes]).tensors  # without the padding behind the last tensor


def test_every_changed_byte_is_read_or_refused(tmp_path: Path) -> None:
    data = sample()
    path = tmp_path / "file.gguf"
    refused = 0
    for place in range(ours(data).data_start):
        for change in (0x01, 0x80, 0xFF):
            changed = bytearray(data)
            changed[place] ^= change
            path.write_bytes(changed)
            try:
                with open_gguf(path) as opened, np.errstate(all="ignore"):
                    str(opened.metadata)
                    for one in opened.values():
                        one.numpy()
            except CheckpointError as error:
                str(error).encode()
                refused += 1
    assert refused > 300


@given(st.binary(max_size=300))
@settings(max_examples=150, deadline=None)
def test_random_bytes(tail: bytes) -> None:
    for data in (tail, b"GGUF" + struct.pack("<I", 3) + tail, b"GGUF" + struct.pack("<IQQ", 3, 1, 1) + tail):
        try:
            ours(data)
        except CheckpointError as error:
            str(error).encode()


HUGE = 2**63 - 1
HOSTILE = {
    "tensor count": (b"GGUF" + struct.pack("<IQQ", 3, HUGE, 0) + bytes(64), "tensors cannot be in"),
    "entry count": (b"GGUF" + struct.pack("<IQQ", 3, 0, HUGE) + bytes(64), "entries of metadata cannot be in"),
    "key length": (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, HUGE) + bytes(64), "a key of 9,223"),
    "key text": (pack([text(b"\xff\xfe") + struct.pack("<I", 0) + b"a"], []), "is not UTF-8"),
    "string length": (pack([entry("k", 8, struct.pack("<Q", HUGE))], []), "ends at byte"),
    "list length": (pack([entry("k", 9, struct.pack("<IQ", 4, HUGE))], []), "claims 9,223"),
    "list of strings": (pack([entry("k", 9, struct.pack("<IQ", 8, HUGE // 8))], []), "claims 1,152"),
    "string in a list": (pack([entry("k", 9, struct.pack("<IQQ", 8, 1, HUGE))], []), "ends at byte"),
    "nesting": (pack([entry("k", 9, struct.pack("<IQ", 9, 1) * 9 + bytes(64))], []), "lists in lists"),
    "wide nesting": (pack([entry("k", 9, struct.pack("<IQ", 9, HUGE))], []), "claims 9,223"),
    "value type": (pack([entry("k", 13, bytes(8))], []), "of the unknown type 13"),
    "list type": (pack([entry("k", 9, struct.pack("<IQ", 99, 1) + bytes(8))], []), "of the unknown type 99"),
    "key twice": (pack([entry("k", 0, b"a"), entry("k", 0, b"b")], []), "'k' stands twice"),
    "alignment 0": (pack([entry("general.alignment", 4, bytes(4))], []), "power of two"),
    "alignment 3": (pack([entry("general.alignment", 4, b"\x03\0\0\0")], []), "power of two"),
    "alignment of text": (pack([entry("general.alignment", 8, text("32"))], []), "power of two"),
    "alignment beyond": (pack([entry("general.alignment", 4, struct.pack("<I", 1 << 31))], [tensor("x", (1,))]), "truncated"),
    "name twice": (pack([], [tensor("x", (8,)), tensor("x", (8,), 0, 32)], bytes(64)), "'x' stands twice"),
    "axes": (pack([], [text("x") + struct.pack("<I", 2**31)]), "2,147,483,648 axes"),
    "size": (pack([], [tensor("x", (HUGE, 2))]), "larger than the file"),
    "product": (pack([], [tensor("x", (2**32, 2**32))]), "larger than the file"),
    "row": (pack([], [tensor("x", (33,), 2)], bytes(64)), "no multiple of the 32 of Q4_0"),
    "tensor type": (pack([], [tensor("x", (8,), 77)], bytes(64)), "is of the type 77"),
    "removed type": (pack([], [tensor("x", (32,), 4)], bytes(64)), "is of the type 4"),
    "overlap": (pack([], [tensor("x", (16,)), tensor("y", (8,), 0, 32)], bytes(64)), "overlaps the tensor before it"),
    "same place": (pack([], [tensor("x", (8,)), tensor("y", (8,))], bytes(32)), "overlaps the tensor before it"),
    "hole": (pack([], [tensor("x", (8,), 0, 32)], bytes(64)), "leaves a hole"),
    "unaligned": (pack([], [tensor("x", (1,)), tensor("y", (1,), 0, 4)], bytes(64)), "overlaps the tensor before it"),
    "beyond the end": (pack([], [tensor("x", (16,))], bytes(32)), "ends at byte"),
    "offset": (pack([], [tensor("x", (8,), 0, HUGE - 31)], bytes(32)), "leaves a hole"),
    "more data": (pack([], [tensor("x", (8,))], bytes(96)), "64 bytes follow the last tensor"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0) + bytes(32), "big-endian"),
    "version 1": (b"GGUF" + struct.pack("<IQQ", 1, 0, 0) + bytes(32), "version 1"),
    "another file": (b"ggml" + bytes(64), "no GGUF file"),
    "empty": (b"", "too short"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_heads_are_refused_without_allocating(name: str) -> None:
    data, words = HOSTILE[name]
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=words):
            ours(data)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
