"""Blocks of GGUF: bit-equal to the reference package both ways; weighted scales against the rule written out."""

from __future__ import annotations

import numpy as np
import pytest

from weft.checkpoint.gguf_blocks import (
    DECODERS,
    ENCODERS,
    GGML_TYPES,
    decode_blocks,
    encode_blocks,
    encode_weighted,
    ggml_type,
    keep_grid,
)
from weft.errors import CheckpointError, OutputError

gguf = pytest.importorskip("gguf")


def number_of(name: str):
    return gguf.GGMLQuantizationType(ggml_type(name).number)


def test_the_table_of_types_is_the_reference_s() -> None:
    theirs = {int(t): (t.name, *gguf.GGML_QUANT_SIZES[t]) for t in gguf.GGMLQuantizationType}
    assert {n: (t.name, t.block, t.nbytes) for n, t in GGML_TYPES.items()} == theirs


@pytest.mark.parametrize("name", DECODERS)
def test_values_are_bit_equal_to_the_reference(name: str) -> None:
    kind = ggml_type(name)
    raw = np.random.default_rng(0).integers(0, 256, (4000, kind.nbytes), dtype=np.uint8)  # all scales, NaN among them
    with np.errstate(all="ignore"):
        ours, theirs = decode_blocks(raw, kind), np.asarray(gguf.quants.dequantize(raw.copy(), number_of(name)))
    assert ours.shape == (4000, kind.block)
    theirs = theirs.reshape(ours.shape)
    equal = (ours.view(np.uint32) == theirs.view(np.uint32)) | (np.isnan(ours) & np.isnan(theirs))
    assert equal.all()


@pytest.mark.parametrize("name", ENCODERS)
def test_blocks_are_bit_equal_to_the_reference(name: str) -> None:
    kind, random = ggml_type(name), np.random.default_rng(1)
    values = random.standard_normal((4000, kind.block)) * 10.0 ** random.integers(-7, 3, (4000, 1))
    values[0] = 0
    values[1] = random.integers(-127, 128, kind.block) / 2  # ties
    values[2] = np.round(values[2] * 4) / 4
    values = values.astype(np.float32)
    with np.errstate(all="ignore"):
        theirs = np.asarray(gguf.quants.quantize(values, number_of(name)))
    assert np.array_equal(encode_blocks(values, kind), theirs.view(np.uint8).reshape(4000, kind.nbytes))


@pytest.mark.parametrize("name", ["Q8_0", "Q4_0"])
def test_blocks_of_a_scale_below_float16_are_zero(name: str) -> None:
    values = np.full((1, 32), 1e-42, np.float32)  # 1 / scale is infinite
    assert not decode_blocks(encode_blocks(values, ggml_type(name)), ggml_type(name)).any()


@pytest.mark.parametrize("name", [n for n in ENCODERS if n != "F32"])
def test_values_that_a_type_cannot_say_are_refused(name: str) -> None:
    kind = ggml_type(name)
    for value, words in ((np.nan, "NaN"), (np.inf, "NaN"), (np.float32(3.4e38), "beyond the range")):
        with pytest.raises(OutputError, match=words):
            encode_blocks(np.full((1, kind.block), value, np.float32), kind, "w")


def test_types_that_are_not_known_are_refused_by_name() -> None:
    with pytest.raises(CheckpointError, match=r"does not decode the type IQ2_XXS.*requantise"):
        decode_blocks(np.zeros((1, 66), np.uint8), ggml_type("IQ2_XXS"))
    with pytest.raises(OutputError, match="does not write the type Q6_K"):
        encode_blocks(np.zeros((1, 256), np.float32), ggml_type("Q6_K"))
    with pytest.raises(CheckpointError, match="Did you mean"):
        ggml_type("q4_00")


def weighted(row: np.ndarray, importance: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """llama.cpp's rule for one row, sums in its order, all in float32: codes and scales."""
    one = np.float32
    codes, scales = [], []
    squares = one(0)
    for x in row:
        squares = one(squares + one(x * x))
    variance = one(squares / one(len(row)))
    for block, h in zip(row.reshape(-1, 32), importance.reshape(-1, 32)):
        weight = h * np.sqrt(variance + block * block)
        largest = block[np.abs(block).argmax()]
        best, scale, chosen = one(0), one(0), np.zeros(32, np.int64)
        if abs(largest) >= one(1e-15):
            for number, step in enumerate([0, *range(-9, 0), *range(1, 10)]):
                inverse = -(one(8) + one(0.1) * one(step)) / largest
                tried = np.clip(np.rint(inverse * block), -8, 7).astype(np.float32)
                product, square = one(0), one(0)
                for w, x, code in zip(weight, block, tried):
                    product = one(product + one(w * x) * code)
                    square = one(square + one(w * code) * code)
                if number == 0 or (square > 0 and product * product > best * square):
                    scale = product / square if square > 0 else one(0)
                    best, chosen = one(scale * product), tried.astype(np.int64) + 8
        codes.append(chosen)
        scales.append(scale)
    return np.concatenate(codes), np.array(scales, np.float32)


def test_weighted_scales_follow_the_rule() -> None:
    random = np.random.default_rng(2)
    values = random.standard_normal((6, 64)).astype(np.float32)
    values[1, :32] = 0
    importance = (random.standard_normal(64) ** 2).astype(np.float32)
    importance[5] = 0
    made = encode_weighted(values, importance).reshape(6, 2, 18)
    for row, blocks in zip(values, made):
        codes, scales = weighted(row, importance)
        halves = blocks[:, :2].copy().view(np.float16).reshape(-1)
        assert np.array_equal(halves, scales.astype(np.float16))
        assert np.array_equal(np.concatenate([blocks[:, 2:] & 15, blocks[:, 2:] >> 4], axis=1).reshape(-1), codes)


def test_weighted_scales_leave_a_smaller_weighted_error() -> None:
    random = np.random.default_rng(3)
    values = random.standard_normal((64, 256)).astype(np.float32)
    importance = (random.standard_normal(256) ** 4).astype(np.float32)
    kind = ggml_type("Q4_0")

    def error(blocks: np.ndarray) -> float:
        return float(
            (importance * (decode_blocks(blocks.reshape(-1, 18), kind).reshape(values.shape) - values) ** 2).sum()
        )

    assert error(encode_weighted(values, importance)) < 0.9 * error(encode_blocks(values.reshape(-1, 32), kind))


def test_weighted_scales_refuse_what_is_not_finite() -> None:
    values = np.ones((1, 32), np.float32)
    for bad in (np.full(32, np.nan, np.float32), np.full(32, -1, np.float32)):
        with pytest.raises(OutputError, match="NaN, infinite or negative"):
            encode_weighted(values, bad)


def test_values_on_a_grid_keep_their_values() -> None:
    random, kind = np.random.default_rng(4), ggml_type("Q4_0")
    scale = (random.standard_normal((3000, 1)) * 10.0 ** random.integers(-4, 2, (3000, 1))).astype(np.float16)
    scale[scale == 0] = 1
    codes = random.integers(-8, 8, (3000, 32)) // random.integers(1, 8, (3000, 1))
    on = scale.astype(np.float32) * codes.astype(np.float32)
    blocks = encode_blocks(on, kind)
    assert (decode_blocks(blocks, kind) != on).any(1).mean() > 0.2
    assert keep_grid(on, blocks) == 3000
    assert np.array_equal(decode_blocks(blocks, kind), on)
    off = random.standard_normal((3000, 32)).astype(np.float32)
    blocks = encode_blocks(off, kind)
    before = blocks.copy()
    assert keep_grid(off, blocks) == 0
    assert np.array_equal(blocks, before)
    large = np.full((1, 32), 393_216, np.float32)  # beyond float16, an eighth of it is not
    assert keep_grid(large, encode_blocks(large, kind)) == 1
    whole = (random.integers(-64, 65, (3000, 32)) / 64).astype(np.float32)  # exact in float16, on no such grid
    whole[:, 0] = 65 / 64
    blocks = encode_blocks(whole, kind)
    before = blocks.copy()
    assert keep_grid(whole, blocks) == 0
    assert np.array_equal(blocks, before)
