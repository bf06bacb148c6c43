"""The safetensors header: what we accept, the reference library reads the same; everything else is a CheckpointError."""

from __future__ import annotations

import json
import struct
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize

from weft.checkpoint.dtypes import DTYPES
from weft.checkpoint.header import Header, build_header, header_length, parse_header
from weft.errors import CheckpointError

WHERE = "file"


def pack(header: bytes | dict[str, Any], data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def ours(file: bytes) -> Header:
    length = header_length(file[:8], len(file), WHERE)
    return parse_header(file[8 : 8 + length], len(file), WHERE)


def check(file: bytes) -> bool:
    """Parse; where we accept, the reference must read the same. Whether we accepted."""
    try:
        header = ours(file)
    except CheckpointError as error:
        str(error).encode("utf-8")
        return False
    theirs = {name: (entry["shape"], bytes(entry["data"])) for name, entry in deserialize(file)}
    assert {n: (list(t.shape), file[t.offset : t.offset + t.nbytes]) for n, t in header.tensors.items()} == theirs
    return True


@st.composite
def files(draw: st.DrawFn) -> bytes:
    """A valid file."""
    entries: dict[str, Any] = {}
    if draw(st.booleans()):
        entries["__metadata__"] = draw(st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=2))
    position = 0
    for name in draw(st.lists(st.text(max_size=6).filter(lambda t: t != "__metadata__"), max_size=4, unique=True)):
        dtype = DTYPES[draw(st.sampled_from(sorted(DTYPES)))]
        shape = draw(st.lists(st.integers(0, 4), max_size=3))
        bits = dtype.bits
        for size in shape:
            bits *= size
        if bits % 8 == 0:
            entries[name] = {"dtype": dtype.name, "shape": shape, "data_offsets": [position, position + bits // 8]}
            position += bits // 8
    text = json.dumps(entries, ensure_ascii=draw(st.booleans())).encode("utf-8", "surrogatepass")
    return pack(text + b" " * draw(st.integers(0, 3)), draw(st.binary(min_size=position, max_size=position)))


@given(files())
@settings(max_examples=150, deadline=None)
def test_valid_files_are_read_as_the_reference_reads_them(file: bytes) -> None:
    assert check(file)


@given(st.binary(max_size=200))
@settings(max_examples=150, deadline=None)
def test_random_bytes(file: bytes) -> None:
    check(file)


@given(st.binary(max_size=200), st.binary(max_size=20))
@settings(max_examples=150, deadline=None)
def test_random_headers(text: bytes, data: bytes) -> None:
    check(pack(text, data))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from(["a", "b", "__metadata__", ""]), JSON, max_size=3), st.binary(max_size=8))
@settings(max_examples=150, deadline=None)
def test_any_json(header: dict[str, Any], data: bytes) -> None:
    check(pack(header, data))


FIELD = JSON | st.sampled_from(["F32", "U8", "F4"]) | st.lists(st.integers(-1, 2**65), max_size=4)


@given(st.fixed_dictionaries({"dtype": FIELD, "shape": FIELD, "data_offsets": FIELD}), st.binary(max_size=8))
@settings(max_examples=300, deadline=None)
def test_any_entry(entry: dict[str, Any], data: bytes) -> None:
    check(pack({"a": entry}, data))


@given(files(), st.lists(st.tuples(st.sampled_from("rid"), st.floats(0, 1), st.integers(0, 255)), max_size=4))
@settings(max_examples=400, deadline=None)
def test_mutated_files(file: bytes, changes: list[tuple[str, float, int]]) -> None:
    """Bytes of the header replaced, inserted or deleted, with the length kept right so that the parser is reached."""
    (length,) = struct.unpack("<Q", file[:8])
    text, data = bytearray(file[8 : 8 + length]), file[8 + length :]
    for kind, place, value in changes:
        position = int(place * len(text))
        if kind == "i":
            text.insert(position, value)
        elif position < len(text):
            text[position : position + 1] = bytes([value]) if kind == "r" else b""
    check(pack(bytes(text), data))


@given(files(), st.integers(1, 40))
@settings(max_examples=100, deadline=None)
def test_truncated_and_extended_files(file: bytes, count: int) -> None:
    assert not check(file[:-count])
    assert not check(file + bytes(count))


ONE = {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}


def entry(shape: list[Any], offsets: list[Any], dtype: str = "U8") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


HOSTILE: dict[str, tuple[bytes, str]] = {
    "overlap": (pack({"a": entry([2], [0, 2]), "b": entry([2], [1, 3])}, b"xyz"), "'b'.*overlaps"),
    "same place twice": (pack({"a": entry([2], [0, 2]), "b": entry([2], [0, 2])}, b"xy"), "overlaps"),
    "hole": (pack({"a": entry([1], [0, 1]), "b": entry([1], [2, 3])}, b"xyz"), "leaves a hole"),
    "hole at the start": (pack({"a": entry([1], [1, 2])}, b"xy"), "leaves a hole"),
    "empty tensor inside another": (pack({"a": entry([2], [0, 2]), "b": entry([0], [1, 1])}, b"xy"), "overlaps"),
    "beyond the end": (pack({"a": entry([9], [0, 9])}, b"xy"), "7 bytes are missing"),
    "trailing bytes": (pack({"a": ONE}, b"xy"), "1 bytes follow"),
    "backwards": (pack({"a": entry([1], [1, 0])}, b"x"), "give -1"),
    "negative size": (pack({"a": entry([-1], [0, 1])}, b"x"), "negative"),
    "negative sizes, positive product": (pack({"a": entry([-1, -1], [0, 1])}, b"x"), "negative"),
    "negative offset": (pack({"a": entry([1], [-1, 0])}, b"x"), "negative"),
    "minus zero": (pack(b'{"a":{"dtype":"U8","shape":[-0],"data_offsets":[0,0]}}'), "negative"),
    "huge size": (pack({"a": entry([2**62, 8], [0, 0])}), "larger than any array"),
    "product that wraps to zero": (pack({"a": entry([2**32, 2**32], [0, 0])}), "larger than any array"),
    "huge but empty": (pack({"a": entry([2**62, 2**62, 0], [0, 0])}), "larger than any array"),
    "beyond 64 bits": (pack({"a": entry([2**65], [0, 1])}, b"x"), "need a list of sizes"),
    "thousands of digits": (pack(b'{"a":{"dtype":"U8","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,1]}}'), "JSON"),
    "many axes": (pack({"a": entry([1] * 70, [0, 1])}, b"x"), "need a list of sizes"),
    "size and bytes disagree": (pack({"a": entry([4], [0, 4], "F32")}, b"wxyz"), r"needs 16 bytes.*give 4"),
    "half a byte": (pack({"a": entry([3], [0, 1], "F4")}, b"x"), "'a': 3 elements of F4"),
    "fraction": (pack({"a": entry([1.0], [0, 1])}, b"x"), "need a list of sizes"),
    "boolean": (pack({"a": entry([True], [0, 1])}, b"x"), "need a list of sizes"),
    "not a number": (pack({"a": entry([float("nan")], [0, 1])}, b"x"), "need a list of sizes"),
    "three offsets": (pack({"a": entry([1], [0, 1, 2])}, b"x"), r"need \[start, end\]"),
    "unknown dtype": (pack({"a": entry([1], [0, 1], "F33")}, b"x"), "unknown dtype.*Did you mean F32"),
    "dtype that is a number": (pack({"a": entry([1], [0, 1], 8)}, b"x"), "unknown dtype"),  # type: ignore[arg-type]
    "missing field": (pack({"a": {"dtype": "U8", "shape": [1]}}, b"x"), "exactly the fields"),
    "extra field": (pack({"a": {**ONE, "more": 1}}, b"x"), "exactly the fields"),
    "entry that is a list": (pack({"a": [1]}, b"x"), "exactly the fields"),
    "duplicate name": (pack(b'{"a":%b,"a":%b}' % ((json.dumps(ONE).encode(),) * 2), b"x"), "'a' stands twice"),
    "duplicate metadata": (pack(b'{"__metadata__":{"k":"a","k":"b"}}'), "'k' stands twice"),
    "metadata that is no text": (pack({"__metadata__": {"k": 1}}), "strings to strings"),
    "metadata that is a list": (pack({"__metadata__": ["k"]}), "strings to strings"),
    "nested metadata": (pack({"__metadata__": {"k": {"l": "m"}}}), "strings to strings"),
    "deep nesting": (pack(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"), "nesting too deep"),
    "half a surrogate": (pack(b'{"\\ud800":%b}' % json.dumps(ONE).encode(), b"x"), "not valid JSON"),
    "half a surrogate in metadata": (pack(b'{"__metadata__":{"k":"\\udfff"}}'), "not valid JSON"),
    "not UTF-8": (pack(b'{"\xff":1}'), "not valid JSON"),
    "byte order mark": (pack(b"\xef\xbb\xbf{}"), "not valid JSON"),
    "zero padding": (pack(b"{}\0\0"), "not valid JSON"),
    "two documents": (pack(b"{}{}"), "not valid JSON"),
    "a list": (pack(b"[]"), "JSON object"),
    "a word": (pack(b"null"), "JSON object"),
    "no header": (pack(b""), "not valid JSON"),
    "no file": (b"", "too short"),
    "seven bytes": (b"\0" * 7, "too short"),
    "claims more than the limit": (struct.pack("<Q", 100_000_001) + b"{}", "more than the 100,000,000"),
    "claims everything": (b"\xff" * 8 + b"{}", "more than the 100,000,000"),
    "claims more than there is": (struct.pack("<Q", 3) + b"{}", "only 2 after"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files_are_refused_with_the_reason(case: str) -> None:
    file, message = HOSTILE[case]
    with pytest.raises(CheckpointError, match=f"^file: .*{message}"):
        ours(file)


# what the reference library lets pass and we do not: each is a way to hide something, or breaks a later reader
STRICTER = {"duplicate metadata", "many axes", "extra field", "duplicate name"}


def test_we_refuse_all_that_the_reference_refuses_and_little_more() -> None:
    accepted = set()
    for case, (file, _) in HOSTILE.items():
        try:
            deserialize(file)
            accepted.add(case)
        except SafetensorError:
            pass
    assert accepted == STRICTER


def test_shapes_and_metadata_are_read() -> None:
    entries = {
        "__metadata__": {"format": "pt"},
        "scalar": entry([], [0, 4], "F32"),
        "empty": entry([3, 0], [4, 4], "F32"),
        "last": entry([2, 2], [4, 6], "F4"),
    }
    header = ours(pack(entries, b"123456"))
    assert header.metadata == {"format": "pt"}
    assert {n: (t.shape, t.nbytes, t.size) for n, t in header.tensors.items()} == {
        "scalar": ((), 4, 1),
        "empty": ((3, 0), 0, 0),
        "last": ((2, 2), 2, 4),
    }


@given(
    st.lists(
        st.tuples(st.text(max_size=6).filter(lambda t: t != "__metadata__"), st.sampled_from(sorted(DTYPES))),
        max_size=6, unique_by=lambda t: t[0],
    ),
    st.dictionaries(st.text(max_size=4), st.text(max_size=4), max_size=2),
)  # fmt: skip
@settings(max_examples=100, deadline=None)
def test_headers_that_we_write_are_aligned_and_read_back(
    names: list[tuple[str, str]], metadata: dict[str, str]
) -> None:
    prefix, header = build_header(((n, DTYPES[d], (2, 4)) for n, d in names), metadata)
    file = prefix + bytes(sum(t.nbytes for t in header.tensors.values()))
    assert check(file)
    assert len(prefix) % 8 == 0
    assert ours(file) == header
    assert header.metadata == {"format": "pt", **metadata}
    for tensor in header.tensors.values():
        assert tensor.dtype.bits < 8 or tensor.offset % (tensor.dtype.bits // 8) == 0
