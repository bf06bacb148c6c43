"""Element types as safetensors names them, with the numpy type that holds their bits.

numpy has no bfloat16 and no 8-bit floats. They are held as unsigned integers of the same width,
and :mod:`weft.kernels.convert` converts them to float32 bit by bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from weft.errors import CheckpointError, did_you_mean

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class DType:
    """One element type.

    Attributes:
        name: as in a safetensors header, ``"BF16"``.
        bits: width of one element.
        storage: name of the numpy type that holds one element's bits (a byte for sub-byte types).
        torch: name of the torch type, empty where torch has none.
        floating: whether arithmetic on it is done in floating point.
    """

    name: str
    bits: int
    storage: str
    torch: str
    floating: bool

    @property
    def numpy(self) -> np.dtype:
        """The numpy type that holds one element's bits."""
        import numpy as np

        return np.dtype(self.storage)

    def nbytes(self, count: int) -> int:
        """Bytes of ``count`` elements; raises ``CheckpointError`` where a sub-byte type does not fill whole bytes."""
        bits = count * self.bits
        if bits % 8:
            raise CheckpointError(f"{count} elements of {self.name} ({self.bits} bits each) do not fill whole bytes.")
        return bits // 8

    def __str__(self) -> str:
        return self.name


_ROWS = [
    ("F64", 64, "float64", "float64", True),
    ("F32", 32, "float32", "float32", True),
    ("F16", 16, "float16", "float16", True),
    ("BF16", 16, "uint16", "bfloat16", True),
    ("F8_E4M3", 8, "uint8", "float8_e4m3fn", True),
    ("F8_E5M2", 8, "uint8", "float8_e5m2", True),
    ("F8_E4M3FNUZ", 8, "uint8", "float8_e4m3fnuz", True),
    ("F8_E5M2FNUZ", 8, "uint8", "float8_e5m2fnuz", True),
    ("F8_E8M0", 8, "uint8", "float8_e8m0fnu", False),
    ("F6_E2M3", 6, "uint8", "", False),
    ("F6_E3M2", 6, "uint8", "", False),
    ("F4", 4, "uint8", "float4_e2m1fn_x2", False),
    ("I64", 64, "int64", "int64", False),
    ("I32", 32, "int32", "int32", False),
    ("I16", 16, "int16", "int16", False),
    ("I8", 8, "int8", "int8", False),
    ("U64", 64, "uint64", "uint64", False),
    ("U32", 32, "uint32", "uint32", False),
    ("U16", 16, "uint16", "uint16", False),
    ("U8", 8, "uint8", "uint8", False),
    ("BOOL", 8, "bool", "bool", False),
    ("C64", 64, "complex64", "complex64", False),
]
DTYPES: dict[str, DType] = {row[0]: DType(*row) for row in _ROWS}
_ALIASES = {d.torch: d for d in DTYPES.values() if d.torch} | {
    "fp32": DTYPES["F32"],
    "fp16": DTYPES["F16"],
    "bf16": DTYPES["BF16"],
    "fp64": DTYPES["F64"],
    "float": DTYPES["F32"],
    "half": DTYPES["F16"],
    "double": DTYPES["F64"],
}


def dtype_of(name: str) -> DType:
    """Find a type by its safetensors, torch or short name.

    >>> dtype_of("bfloat16").name, dtype_of("fp16").name, dtype_of("torch.float32").bits
    ('BF16', 'F16', 32)
    """
    key = name.removeprefix("torch.")
    found = DTYPES.get(key.upper()) or _ALIASES.get(key.lower())
    if found is None:
        raise CheckpointError(f"Unknown dtype {name!r}.{did_you_mean(key, [*DTYPES, *_ALIASES])}")
    return found
