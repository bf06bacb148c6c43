"""Between the bits on disk and float32: exact one way, round-to-nearest-even the other.

bfloat16 and the 8-bit floats arrive as unsigned integers (numpy has no such types). Rounding to bfloat16
gives the same bits as torch's.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from weft.checkpoint.dtypes import DType
from weft.errors import CheckpointError
from weft.kernels.jit import kernel, reduction

OUTPUT_DTYPES = ("F64", "F32", "F16", "BF16")


def to_float32(bits: np.ndarray, dtype: DType, out: np.ndarray | None = None) -> np.ndarray:
    """Values of ``bits`` (any shape, stored as ``dtype``) as float32; float64 is rounded."""
    if out is None:
        out = np.empty(bits.shape, np.float32)
    flat, target = bits.reshape(-1), out.reshape(-1)
    if dtype.name == "BF16":
        bfloat16_to_float32(flat, target.view(np.uint32))
    elif dtype.name in ("F32", "F16", "F64"):
        with np.errstate(over="ignore", invalid="ignore"):  # float64 beyond the range; callers count what is not finite
            np.copyto(target, flat, casting="same_kind")
    elif dtype.name.startswith("F8_E") and dtype.floating:
        np.take(_float8_table(dtype.name), flat, out=target)
    else:
        raise CheckpointError(
            f"{dtype.name} has no values in floating point; such tensors are copied, not computed on."
        )
    return out


def from_float32(values: np.ndarray, dtype: DType, out: np.ndarray | None = None) -> np.ndarray:
    """``values`` (float32, any shape) rounded to ``dtype``, as the numpy type that holds its bits."""
    if dtype.name not in OUTPUT_DTYPES:
        raise CheckpointError(
            f"Cannot write {dtype.name} from computed values; choose one of {', '.join(OUTPUT_DTYPES)}."
        )
    if out is None:
        out = np.empty(values.shape, dtype.numpy)
    if dtype.name == "BF16":
        float32_to_bfloat16(values.reshape(-1).view(np.uint32), out.reshape(-1))
    else:
        # beyond the range of float16 is infinity, and is counted by the caller; a signalling NaN is let through
        with np.errstate(over="ignore", invalid="ignore"):
            np.copyto(out, values, casting="same_kind")
    return out


@kernel
def bfloat16_to_float32(bits, out):  # (n,) uint16 -> (n,) uint32 view of float32
    for i in range(bits.size):
        out[i] = np.uint32(bits[i]) << np.uint32(16)


@kernel
def bfloat16_difference(bits, base, out):  # (n,) uint16, (n,) float32 -> (n,) float32
    for i in range(bits.size):
        out[i] = np.uint32(np.uint32(bits[i]) << np.uint32(16)).view(np.float32) - base[i]


@kernel
def float32_to_bfloat16(values, out):  # (n,) uint32 view of float32 -> (n,) uint16
    for i in range(values.size):
        v = values[i]
        rounded = (v + np.uint32(0x7FFF) + ((v >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
        is_nan = (v & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
        out[i] = np.uint16(0x7FC0) if is_nan else np.uint16(rounded)


@reduction
def count_non_finite(values):  # (n,) uint32 view of float32 -> number of NaN and infinities
    count = 0
    for i in range(values.size):
        count += (values[i] & np.uint32(0x7F800000)) == np.uint32(0x7F800000)
    return count


@kernel
def subtract_in_place(values, base):  # (n,) -= (n,)
    for i in range(values.size):
        values[i] -= base[i]


@cache
def _float8_table(name: str) -> np.ndarray:
    """The 256 values of an 8-bit float type, by its bits."""
    exponent_bits = int(name[4])
    mantissa_bits = 7 - exponent_bits
    fnuz = name.endswith("FNUZ")
    bias = 2 ** (exponent_bits - 1) - (0 if fnuz else 1)
    code = np.arange(256)
    sign = np.where(code & 0x80, -1.0, 1.0)
    exponent = (code >> mantissa_bits) & (2**exponent_bits - 1)
    mantissa = code & (2**mantissa_bits - 1)
    fraction = mantissa / 2**mantissa_bits
    value = np.where(exponent == 0, fraction * 2.0 ** (1 - bias), (1 + fraction) * 2.0 ** (exponent - bias.__float__()))
    value = sign * value
    if fnuz:  # one NaN, at what would be minus zero; no infinities
        value[0x80] = np.nan
    elif name == "F8_E5M2":  # as IEEE: the top exponent is infinity or NaN
        top = exponent == 31
        value[top & (mantissa == 0)] = sign[top & (mantissa == 0)] * np.inf
        value[top & (mantissa != 0)] = np.nan
    else:  # e4m3fn: only all ones is NaN
        value[(code & 0x7F) == 0x7F] = np.nan
    return value.astype(np.float32)
