"""The element types of GGUF files: how many bytes a block has, what values it stands for, and how values become blocks.

A row of a quantised tensor is a sequence of blocks of 32 or 256 elements; d and m are float16, codes are whole numbers:

======  =====  ===================================================================================================
type    bytes  value
======  =====  ===================================================================================================
Q8_0       34  d · code, code −128 … 127
Q4_0       18  d · (code − 8); byte j holds the codes of elements j (low half) and j + 16
Q4_1       20  d · code + m
Q5_0       22  d · (code − 16), the fifth bits in a word of 32
Q5_1       24  d · code + m
Q2_K       84  d · s · code − m · t of each 16 elements, s and t of 4 bits
Q3_K      110  d · (s − 32) · (code − 4 where the third bit is 0) of each 16 elements, s of 6 bits
Q4_K      144  d · s · code − m · t of each 32 elements, s and t of 6 bits
Q5_K      176  as Q4_K, with fifth bits
Q6_K      210  d · s · (code − 32) of each 16 elements, s of 8 bits
IQ4_NL     18  d · one of 16 fixed values
IQ4_XS    136  d · (s − 32) · one of 16 fixed values, s of 6 bits for each 32 elements
======  =====  ===================================================================================================

Products are rounded in the order in which the reference (``gguf.quants``) writes them, so values are bit-equal to its.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from weft.errors import CheckpointError, OutputError, did_you_mean
from weft.kernels.convert import bfloat16_to_float32, float32_to_bfloat16
from weft.kernels.jit import kernel

_FIXED = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32)


@dataclass(frozen=True)
class GGMLType:
    """A type of elements.

    Attributes:
        name: as llama.cpp calls it, ``"Q4_0"``.
        number: in files.
        block: elements that are stored together.
        nbytes: of a block.
        plain: the name of the type of :mod:`weft.checkpoint.dtypes` with the same bytes, if there is one.
    """

    name: str
    number: int
    block: int
    nbytes: int
    plain: str = ""


_ROWS: list[tuple[Any, ...]] = [
    ("F32", 0, 1, 4, "F32"), ("F16", 1, 1, 2, "F16"), ("Q4_0", 2, 32, 18), ("Q4_1", 3, 32, 20), ("Q5_0", 6, 32, 22),
    ("Q5_1", 7, 32, 24), ("Q8_0", 8, 32, 34), ("Q8_1", 9, 32, 40), ("Q2_K", 10, 256, 84), ("Q3_K", 11, 256, 110),
    ("Q4_K", 12, 256, 144), ("Q5_K", 13, 256, 176), ("Q6_K", 14, 256, 210), ("Q8_K", 15, 256, 292),
    ("IQ2_XXS", 16, 256, 66), ("IQ2_XS", 17, 256, 74), ("IQ3_XXS", 18, 256, 98), ("IQ1_S", 19, 256, 50),
    ("IQ4_NL", 20, 32, 18), ("IQ3_S", 21, 256, 110), ("IQ2_S", 22, 256, 82), ("IQ4_XS", 23, 256, 136),
    ("I8", 24, 1, 1, "I8"), ("I16", 25, 1, 2, "I16"), ("I32", 26, 1, 4, "I32"), ("I64", 27, 1, 8, "I64"),
    ("F64", 28, 1, 8, "F64"), ("IQ1_M", 29, 256, 56), ("BF16", 30, 1, 2, "BF16"), ("TQ1_0", 34, 256, 54),
    ("TQ2_0", 35, 256, 66), ("MXFP4", 39, 32, 17), ("NVFP4", 40, 64, 36), ("Q1_0", 41, 128, 18),
]  # fmt: skip
GGML_TYPES: dict[int, GGMLType] = {row[1]: GGMLType(*row) for row in _ROWS}


def ggml_type(name: str) -> GGMLType:
    """A type by its name, in capitals or not.

    Raises:
        CheckpointError: there is none.

    >>> ggml_type("q4_0").nbytes
    18
    """
    known = {t.name: t for t in GGML_TYPES.values()}
    if name.upper() not in known:
        raise CheckpointError(f"GGUF has no type {name!r}.{did_you_mean(name.upper(), known)}")
    return known[name.upper()]


def decode_blocks(raw: np.ndarray, kind: GGMLType) -> np.ndarray:
    """The values of blocks.

    Args:
        raw: (blocks, ``kind.nbytes``) uint8.
        kind: a type of ``DECODERS``.

    Returns:
        (blocks, ``kind.block``) float32.

    Raises:
        CheckpointError: weft does not know what the type's bytes mean.

    >>> one = np.array([[0x00, 0x3C, *([0x98] * 16)]], np.uint8)  # d = 1, codes 8 and 9
    >>> decode_blocks(one, ggml_type("Q4_0"))[0, [0, 15, 16, 31]].tolist()
    [0.0, 0.0, 1.0, 1.0]
    """
    if kind.name not in DECODERS:
        raise CheckpointError(
            f"weft does not decode the type {kind.name}, only {', '.join(DECODERS)}. "
            "Take a file in one of these, or requantise with llama.cpp: llama-quantize --allow-requantize."
        )
    return DECODERS[kind.name](np.ascontiguousarray(raw))


def encode_blocks(values: np.ndarray, kind: GGMLType, name: str = "the tensor") -> np.ndarray:
    """Values as blocks, rounded to nearest as llama.cpp does without an importance matrix.

    Args:
        values: (blocks, ``kind.block``) float32.
        kind: a type of ``ENCODERS``.
        name: for messages.

    Returns:
        (blocks, ``kind.nbytes``) uint8.

    Raises:
        OutputError: the type is not written, or a value is not finite or too large for it.

    >>> values = np.linspace(-1, 1, 32, dtype=np.float32)[None]
    >>> bool(np.abs(decode_blocks(encode_blocks(values, ggml_type("Q8_0")), ggml_type("Q8_0")) - values).max() < 0.005)
    True
    """
    if kind.name not in ENCODERS:
        raise OutputError(f"weft does not write the type {kind.name}, only {', '.join(ENCODERS)}.")
    if not np.isfinite(values).all():
        raise OutputError(f"{name}: holds NaN or infinity, which {kind.name} cannot say. Repair the model first.")
    with np.errstate(over="ignore"):  # float16 scales beyond its range are found below
        made = ENCODERS[kind.name](np.ascontiguousarray(values, np.float32))
    if kind.name == "BF16":
        too_large = bool(((made.view(np.uint16) & 0x7FFF) == 0x7F80).any())
    else:
        too_large = kind.name != "F32" and bool(np.isinf(made[:, :2].view(np.float16)).any())
    if too_large:
        raise OutputError(
            f"{name}: its largest value {np.abs(values).max():.4g} is beyond the range of {kind.name}. Take bf16 or f32."
        )
    return made


def encode_weighted(values: np.ndarray, importance: np.ndarray, name: str = "the tensor") -> np.ndarray:
    """Rows as blocks of Q4_0 with scales that are sought by llama.cpp's rule for importance matrices.

    Errors count with weight hⱼ √(σ² + xⱼ²), h the importance of an input and σ² the mean square of the row. Of 19 scales
    near max / −8 the one whose codes, with their least-squares scale, leave the smallest weighted error is taken.

    Args:
        values: (rows, columns) float32, columns a multiple of 32.
        importance: (columns,) mean square of each input, ≥ 0.
        name: for messages.

    Returns:
        (rows · columns / 32, 18) uint8.

    Raises:
        OutputError: a value is not finite, or a scale is beyond float16.
    """
    if not np.isfinite(values).all() or not np.isfinite(importance).all() or (importance < 0).any():
        raise OutputError(
            f"{name}: a weight or its importance is NaN, infinite or negative. Repair the model or imatrix."
        )
    codes = np.empty(values.shape, np.uint8)
    scales = np.empty((values.shape[0], values.shape[1] // 32), np.float32)
    search_scales(np.ascontiguousarray(values, np.float32), np.ascontiguousarray(importance, np.float32), codes, scales)
    with np.errstate(over="ignore"):
        half = scales.astype(np.float16)
    if np.isinf(half).any():
        raise OutputError(f"{name}: a scale is beyond the range of float16. Take q8_0, bf16 or f32.")
    return join_q4_0(codes.reshape(-1, 32), half.reshape(-1, 1))


def keep_grid(values: np.ndarray, blocks: np.ndarray) -> int:
    """Put exact codes into blocks of Q4_0 whose values lie on such a grid already, whatever rounding made of them.

    Rounding to nearest takes a scale from the largest value and calls that −8. Of weights that were put on a grid before,
    with another code for the largest, it would make other values. Here every scale is tried that the largest value can
    have, and taken if it is a float16 number and all 32 products are the values, bit for bit.

    Args:
        values: (blocks, 32) float32.
        blocks: (blocks, 18) uint8, changed in place.

    Returns:
        How many blocks are exact.

    >>> values = np.float32([[0.5, -1.5] * 16])  # codes 1 and −3 of the scale 0.5
    >>> blocks = encode_blocks(values, ggml_type("Q4_0"))
    >>> bool((decode_blocks(blocks, ggml_type("Q4_0")) == values).all()), keep_grid(values, blocks)
    (False, 1)
    >>> bool((decode_blocks(blocks, ggml_type("Q4_0")) == values).all())
    True
    """
    open_ = np.arange(len(values))
    largest = np.take_along_axis(values, np.abs(values).argmax(1)[:, None], 1)
    for code in (-8, *(c for k in range(1, 8) for c in (-k, k))):
        scale = largest[open_] / np.float32(code)
        with np.errstate(over="ignore"):
            half = scale.astype(np.float16)
        likely = np.flatnonzero((half.astype(np.float32) == scale) & (scale != 0))
        for columns in (4, 32):  # most blocks are told by a few values
            tried, place = values[open_[likely], :columns], scale[likely]
            codes = np.rint(tried / place)
            exact = ((codes >= -8) & (codes <= 7) & (codes * place == tried)).all(1)
            likely, codes = likely[exact], codes[exact]
        blocks[open_[likely]] = join_q4_0((codes + 8).astype(np.uint8), half[likely])
        open_ = np.delete(open_, likely)
    zero = int(np.count_nonzero(largest[open_] == 0))  # which every rounding says exactly
    return len(values) - len(open_) + zero


def join_q4_0(codes: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Blocks of Q4_0: codes (blocks, 32) uint8 from 0 to 15, and scales (blocks, 1) float16 -> (blocks, 18)."""
    return np.concatenate([scale.view(np.uint8), codes[:, :16] | (codes[:, 16:] << 4)], axis=1)


def join_q8_0(codes: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Blocks of Q8_0: codes (blocks, 32) int8, and scales (blocks, 1) float16 -> (blocks, 34)."""
    return np.concatenate([scale.view(np.uint8), codes.view(np.uint8)], axis=1)


def _half(raw: np.ndarray, at: int) -> np.ndarray:
    """(blocks, 1): the float16 at byte ``at``."""
    return raw[:, at : at + 2].copy().view(np.float16).astype(np.float32)


def _halves(raw: np.ndarray, size: int) -> np.ndarray:
    """The low then the high half of each of ``size`` bytes, and so on: (blocks, n) -> (blocks, 2 n)."""
    parts = raw.reshape(len(raw), -1, 1, size)
    return np.concatenate([parts & 15, parts >> 4], axis=2).reshape(len(raw), -1)


def _pairs(raw: np.ndarray) -> np.ndarray:
    """Codes of 2 bits, four planes of each 32 bytes: (blocks, n) -> (blocks, 4 n)."""
    planes = np.array([0, 2, 4, 6], np.uint8)[:, None]
    return ((raw.reshape(len(raw), -1, 1, 32) >> planes) & 3).reshape(len(raw), -1)


def _planes(raw: np.ndarray) -> np.ndarray:
    """One bit of each of 32 elements, eight planes: (blocks, 32) -> (blocks, 256)."""
    return ((raw[:, None] >> np.arange(8, dtype=np.uint8)[:, None]) & 1).reshape(len(raw), -1)


def _fifth(raw: np.ndarray, at: int) -> np.ndarray:
    """The fifth bits of 32 codes, in their place."""
    return np.unpackbits(raw[:, at : at + 4], axis=1, bitorder="little") << 4


def _grouped(scale: np.ndarray, codes: np.ndarray, minimum: np.ndarray | None = None) -> np.ndarray:
    """scale · code (− minimum) with scales and minima (blocks, groups) of consecutive codes (blocks, n)."""
    made = scale[:, :, None] * codes.astype(np.float32).reshape(*scale.shape, -1)
    if minimum is not None:
        made -= minimum[:, :, None]
    return made.reshape(codes.shape)


def _six_bits(raw: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Eight scales and eight minima of 6 bits in 12 bytes: (blocks, 12) -> twice (blocks, 8) float32."""
    first, second, rest = raw[:, :4], raw[:, 4:8], raw[:, 8:]
    scales = np.concatenate([first & 63, (rest & 15) | ((first >> 6) << 4)], axis=1)
    minima = np.concatenate([second & 63, (rest >> 4) | ((second >> 6) << 4)], axis=1)
    return scales.astype(np.float32), minima.astype(np.float32)


def _q4_0(raw: np.ndarray) -> np.ndarray:
    return _half(raw, 0) * (_halves(raw[:, 2:], 16).astype(np.float32) - 8)


def _q4_1(raw: np.ndarray) -> np.ndarray:
    return _half(raw, 0) * _halves(raw[:, 4:], 16).astype(np.float32) + _half(raw, 2)


def _q5_0(raw: np.ndarray) -> np.ndarray:
    return _half(raw, 0) * ((_halves(raw[:, 6:], 16) | _fifth(raw, 2)).astype(np.float32) - 16)


def _q5_1(raw: np.ndarray) -> np.ndarray:
    return _half(raw, 0) * (_halves(raw[:, 8:], 16) | _fifth(raw, 4)).astype(np.float32) + _half(raw, 2)


def _q8_0(raw: np.ndarray) -> np.ndarray:
    return _half(raw, 0) * raw[:, 2:].view(np.int8).astype(np.float32)


def _q2_k(raw: np.ndarray) -> np.ndarray:
    scales = _half(raw, 80) * (raw[:, :16] & 15).astype(np.float32)
    minima = _half(raw, 82) * (raw[:, :16] >> 4).astype(np.float32)
    return _grouped(scales, _pairs(raw[:, 16:80]), minima)


def _q3_k(raw: np.ndarray) -> np.ndarray:
    low = _halves(raw[:, 96:104], 8)
    high = ((raw[:, 104:108, None] >> np.array([0, 2, 4, 6], np.uint8)) & 3).transpose(0, 2, 1).reshape(len(raw), 16)
    scales = _half(raw, 108) * ((low | (high << 4)).astype(np.float32) - 32)
    codes = _pairs(raw[:, 32:96]).astype(np.float32) - 4 * (1 - _planes(raw[:, :32]).astype(np.float32))
    return _grouped(scales, codes)


def _q4_k(raw: np.ndarray) -> np.ndarray:
    scales, minima = _six_bits(raw[:, 4:16])
    return _grouped(_half(raw, 0) * scales, _halves(raw[:, 16:], 32), _half(raw, 2) * minima)


def _q5_k(raw: np.ndarray) -> np.ndarray:
    scales, minima = _six_bits(raw[:, 4:16])
    codes = _halves(raw[:, 48:], 32) | (_planes(raw[:, 16:48]) << 4)
    return _grouped(_half(raw, 0) * scales, codes, _half(raw, 2) * minima)


def _q6_k(raw: np.ndarray) -> np.ndarray:
    codes = (_halves(raw[:, :128], 64) | (_pairs(raw[:, 128:192]) << 4)).astype(np.float32) - 32
    return _grouped(_half(raw, 208) * raw[:, 192:208].view(np.int8).astype(np.float32), codes)


def _iq4_nl(raw: np.ndarray) -> np.ndarray:
    return _half(raw, 0) * _FIXED[_halves(raw[:, 2:], 16)]


def _iq4_xs(raw: np.ndarray) -> np.ndarray:
    high = raw[:, 2:4].copy().view("<u2") >> np.arange(0, 16, 2, dtype=np.uint16) & 3
    low = np.stack([raw[:, 4:8] & 15, raw[:, 4:8] >> 4], axis=2).reshape(len(raw), 8)
    scales = _half(raw, 0) * ((low | (high.astype(np.uint8) << 4)).astype(np.float32) - 32)
    return _grouped(scales, _FIXED[_halves(raw[:, 8:], 16)])


def _f32(raw: np.ndarray) -> np.ndarray:
    return raw.view(np.float32)


def _f16(raw: np.ndarray) -> np.ndarray:
    return raw.view(np.float16).astype(np.float32)


def _bf16(raw: np.ndarray) -> np.ndarray:
    made = np.empty(raw.shape[0], np.uint32)
    bfloat16_to_float32(raw.reshape(-1).view(np.uint16), made)
    return made.view(np.float32).reshape(-1, 1)


DECODERS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "F32": _f32, "F16": _f16, "BF16": _bf16, "Q8_0": _q8_0, "Q4_0": _q4_0, "Q4_1": _q4_1, "Q5_0": _q5_0, "Q5_1": _q5_1,
    "Q2_K": _q2_k, "Q3_K": _q3_k, "Q4_K": _q4_k, "Q5_K": _q5_k, "Q6_K": _q6_k, "IQ4_NL": _iq4_nl, "IQ4_XS": _iq4_xs,
}  # fmt: skip


def _inverse(scale: np.ndarray) -> np.ndarray:
    """1 / scale; 0 where a block is zero, or so small that its float16 scale is 0."""
    with np.errstate(divide="ignore", over="ignore"):
        made = 1 / scale
    return np.where(np.isfinite(made), made, np.float32(0))


def _to_q8_0(values: np.ndarray) -> np.ndarray:
    scale = np.abs(values).max(1, keepdims=True) / np.float32(127)
    sizes = values * _inverse(scale)
    whole = np.floor(np.abs(sizes))
    whole += np.abs(sizes) - whole >= 0.5  # halves away from zero
    return join_q8_0((np.sign(sizes) * whole).astype(np.int8), scale.astype(np.float16))


def _to_q4_0(values: np.ndarray) -> np.ndarray:
    largest = np.take_along_axis(values, np.abs(values).argmax(1)[:, None], 1)
    scale = largest / np.float32(-8)
    codes = np.trunc(values * _inverse(scale) + np.float32(8.5)).clip(0, 15).astype(np.uint8)
    return join_q4_0(codes, scale.astype(np.float16))


def _to_f32(values: np.ndarray) -> np.ndarray:
    return values.view(np.uint8)


def _to_f16(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float16).view(np.uint8)


def _to_bf16(values: np.ndarray) -> np.ndarray:
    made = np.empty(values.size, np.uint16)
    float32_to_bfloat16(values.reshape(-1).view(np.uint32), made)
    return made.view(np.uint8).reshape(-1, 2)


ENCODERS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "F32": _to_f32, "F16": _to_f16, "BF16": _to_bf16, "Q8_0": _to_q8_0, "Q4_0": _to_q4_0,
}  # fmt: skip


@kernel
def search_scales(
    values, importance, codes, scales
):  # (rows, columns), (columns,), -> (rows, columns), (rows, columns / 32)
    zero, eight = np.float32(0), np.float32(8)
    weight = np.empty(32, np.float32)
    tried = np.empty(32, np.float32)
    for row in range(values.shape[0]):
        squares = zero
        for j in range(values.shape[1]):
            squares += values[row, j] * values[row, j]
        variance = squares / np.float32(values.shape[1])
        for block in range(scales.shape[1]):
            x = values[row, 32 * block : 32 * block + 32]
            code = codes[row, 32 * block : 32 * block + 32]
            largest, size = zero, zero
            for j in range(32):
                weight[j] = importance[32 * block + j] * np.sqrt(variance + x[j] * x[j])
                if np.abs(x[j]) > size:
                    size, largest = np.abs(x[j]), x[j]
            if size < np.float32(1e-15):
                scales[row, block] = zero
                code[:] = 0
                continue
            best, chosen = zero, zero
            for attempt in range(19):  # first the plain scale, then 0.9 … 0.1 below it and 0.1 … 0.9 above
                step = 0 if attempt == 0 else attempt - 10 if attempt < 10 else attempt - 9
                inverse = -(eight + np.float32(0.1) * np.float32(step)) / largest
                product, square = zero, zero
                for j in range(32):
                    tried[j] = min(max(np.float32(np.rint(inverse * x[j])), -eight), eight - np.float32(1))
                    product += weight[j] * x[j] * tried[j]
                    square += weight[j] * tried[j] * tried[j]
                if attempt == 0 or (square > zero and product * product > best * square):
                    chosen = product / square if square > zero else zero
                    best = chosen * product
                    for j in range(32):
                        code[j] = np.uint8(tried[j] + eight)
            scales[row, block] = chosen
