"""weft.kernels.convert against torch, bit for bit, on every pattern where there are few and on all kinds where not."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from weft.checkpoint.dtypes import DTYPES
from weft.errors import CheckpointError
from weft.kernels.convert import (
    OUTPUT_DTYPES,
    bfloat16_difference,
    count_non_finite,
    from_float32,
    subtract_in_place,
    to_float32,
)

ALL_16 = np.arange(1 << 16, dtype=np.uint16)
FLOAT8 = ["F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ"]


def torch_of(bits: np.ndarray, name: str) -> torch.Tensor:
    """The tensor with these bits."""
    return torch.from_numpy(bits.copy()).view(getattr(torch, DTYPES[name].torch))


def float32_patterns() -> np.ndarray:
    """float32 numbers of every sign, exponent and upper mantissa, at, just below and just above a tie; and random ones.

    The lower halves 0x8000 lie half-way between two bfloat16 numbers; with them come all zeros, subnormals, infinities
    and NaNs of many payloads.
    """
    upper = ALL_16.astype(np.uint32)[:, None] << np.uint32(16)
    edges = (upper | np.uint32([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])).reshape(-1)
    random = np.random.default_rng(0).integers(0, 1 << 32, 1_000_001, dtype=np.uint32)
    return np.concatenate([edges, random]).view(np.float32)


def assert_same_numbers(found: np.ndarray, expected: np.ndarray) -> None:
    """Equal bits, except that a NaN may have any payload."""
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    np.testing.assert_array_equal(np.isnan(found), np.isnan(expected))
    unsigned = f"u{found.dtype.itemsize}"
    real = ~np.isnan(expected)
    np.testing.assert_array_equal(found[real].view(unsigned), expected[real].view(unsigned))


def test_every_bfloat16_to_float32() -> None:
    found = to_float32(ALL_16, DTYPES["BF16"])
    np.testing.assert_array_equal(found.view(np.uint32), torch_of(ALL_16, "BF16").float().numpy().view(np.uint32))


def test_every_bfloat16_survives_the_round_trip() -> None:
    back = from_float32(to_float32(ALL_16, DTYPES["BF16"]), DTYPES["BF16"])
    nan = (ALL_16 & 0x7FFF) > 0x7F80
    np.testing.assert_array_equal(back[~nan], ALL_16[~nan])
    assert ((back[nan] & 0x7FFF) > 0x7F80).all()


def test_float32_to_bfloat16_rounds_as_torch_does() -> None:
    values = float32_patterns()
    found = from_float32(values, DTYPES["BF16"])
    expected = torch.from_numpy(values).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    nan = np.isnan(values)
    assert nan.sum() > 1000
    np.testing.assert_array_equal(found[~nan], expected[~nan])
    # torch's own payloads depend on which of its code paths runs; the quiet NaN without sign is the one it documents
    assert (found[nan] == 0x7FC0).all()
    assert torch.isnan(torch_of(expected[nan], "BF16")).all()


@pytest.mark.parametrize(
    ("value", "bits"),
    [
        (1.0, 0x3F80),
        (1 + 2.0**-8, 0x3F80),  # half-way: to the even one, below
        (1 + 3 * 2.0**-8, 0x3F82),  # half-way: to the even one, above
        (1 + 2.0**-8 + 2.0**-23, 0x3F81),
        (3.3895314e38, 0x7F7F),  # the largest bfloat16
        (3.3961775e38, 0x7F80),  # half-way to the next power of two: infinity
        (np.inf, 0x7F80),
        (-np.inf, 0xFF80),
        (-0.0, 0x8000),
        (1e-45, 0x0000),
        (2.0**-133, 0x0001),  # the smallest subnormal
        (2.0**-134, 0x0000),  # half of it: to the even one, zero
        (np.nan, 0x7FC0),
    ],
)
def test_known_bfloat16(value: float, bits: int) -> None:
    assert from_float32(np.float32([value]), DTYPES["BF16"])[0] == bits


@pytest.mark.parametrize("name", FLOAT8)
def test_every_float8_to_float32(name: str) -> None:
    codes = np.arange(256, dtype=np.uint8)
    found = to_float32(codes, DTYPES[name])
    assert_same_numbers(found, torch_of(codes, name).float().numpy())
    # of 256: one NaN; two; two infinities and six NaNs
    assert np.isnan(found).sum() == {"F8_E4M3": 2, "F8_E5M2": 6}.get(name, 1)
    assert np.isinf(found).sum() == (2 if name == "F8_E5M2" else 0)


def test_every_float16_to_float32_and_back() -> None:
    halves = ALL_16.view(np.float16)
    found = to_float32(halves, DTYPES["F16"])
    assert_same_numbers(found, torch_of(ALL_16, "F16").float().numpy())
    assert_same_numbers(from_float32(found, DTYPES["F16"]), halves)


def test_float32_to_float16_rounds_as_torch_does() -> None:
    # beyond the range is infinity, without a warning (warnings are errors here)
    values = float32_patterns()
    random = np.random.default_rng(1)
    near = random.integers(0, 0x7C00, 300_000).astype(np.uint16).view(np.float16).astype(np.float32)  # finite
    ties = near * np.float32(1 + 2.0**-11)  # half-way between two float16 numbers, or close to it
    for numbers in (values, near, ties, np.float32([65504, 65519.996, 65520, 2.0**-24, 2.0**-25, 1.5 * 2.0**-24])):
        assert_same_numbers(from_float32(numbers, DTYPES["F16"]), torch.from_numpy(numbers).half().numpy())


def test_float64_is_rounded_once_and_float32_is_exact_in_it() -> None:
    values = float32_patterns()
    assert_same_numbers(to_float32(from_float32(values, DTYPES["F64"]), DTYPES["F64"]), values)
    # the last four: beyond the range, below the smallest number, half-way between two, and not a number
    doubles = np.append(np.random.default_rng(0).standard_normal(1000), [1e300, -1e-300, 1 + 2.0**-24, np.nan])
    assert_same_numbers(to_float32(doubles, DTYPES["F64"]), torch.from_numpy(doubles).float().numpy())
    assert_same_numbers(to_float32(values, DTYPES["F32"]), values)
    assert_same_numbers(from_float32(values, DTYPES["F32"]), values)


@pytest.mark.parametrize("name", OUTPUT_DTYPES)
@pytest.mark.parametrize("shape", [(), (1,), (0, 3), (2, 3, 5)])
def test_shapes_are_kept_and_out_is_filled(name: str, shape: tuple[int, ...]) -> None:
    dtype = DTYPES[name]
    values = np.asarray(np.random.default_rng(0).integers(-8, 8, shape), np.float32)
    bits = from_float32(values, dtype)
    assert bits.shape == shape
    assert bits.dtype == dtype.numpy
    assert to_float32(bits, dtype).shape == shape
    out_bits, out = np.empty(shape, dtype.numpy), np.empty(shape, np.float32)
    assert from_float32(values, dtype, out_bits) is out_bits
    assert to_float32(out_bits, dtype, out) is out
    np.testing.assert_array_equal(out, values)


@pytest.mark.parametrize("name", sorted(n for n, d in DTYPES.items() if not d.floating))
def test_other_types_are_refused_both_ways(name: str) -> None:
    dtype = DTYPES[name]
    with pytest.raises(CheckpointError, match=name):
        to_float32(np.zeros(3, dtype.numpy), dtype)
    with pytest.raises(CheckpointError, match=name):
        from_float32(np.zeros(3, np.float32), dtype)


@pytest.mark.parametrize("name", FLOAT8)
def test_float8_is_read_but_not_written(name: str) -> None:
    with pytest.raises(CheckpointError, match="BF16"):
        from_float32(np.zeros(3, np.float32), DTYPES[name])


def test_differences() -> None:
    random = np.random.default_rng(0)
    bits = random.integers(0, 0x7F80, 1001, dtype=np.uint16)
    base = random.standard_normal(1001).astype(np.float32)
    values, out = to_float32(bits, DTYPES["BF16"]), np.empty(1001, np.float32)
    bfloat16_difference(bits, base, out)
    np.testing.assert_array_equal(out, values - base)
    subtract_in_place(values, base)
    np.testing.assert_array_equal(values, out)


def test_non_finite_numbers_are_counted() -> None:
    values = float32_patterns()
    assert count_non_finite(values.view(np.uint32)) == (~np.isfinite(values)).sum() > 1000
    assert count_non_finite(np.empty(0, np.uint32)) == 0
