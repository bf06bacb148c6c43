"""Codes of few bits to float32: the same bits as the formula of the packed form."""

import numpy as np
import pytest
import torch

from weft.kernels.unpack import affine, lookup
from weft.packed import Affine, Lookup, Minifloat


@pytest.mark.parametrize("bits", range(1, 17))
@pytest.mark.parametrize(("rows", "columns", "groups"), [(1, 1, 1), (33, 40, 5), (5, 9, 3), (3, 1024, 8), (2, 130, 2)])
def test_unpacking_is_exact(bits: int, rows: int, columns: int, groups: int) -> None:
    draw = torch.Generator().manual_seed(bits)
    high = min(1 << bits, 1 << 15)
    codes = torch.randint(high, (rows, columns), generator=draw)
    scale, zero = torch.rand(rows, groups, generator=draw), 5 * torch.rand(rows, groups, generator=draw)
    for low in (0, -min(1 << (bits - 1), 1 << 14)):
        packed = Affine((codes + low).to(torch.int16), scale, zero, bits, low)
        words = packed.tensors()["codes"].numpy()
        out = np.full((rows, columns), np.nan, np.float32)
        affine(words, bits, low, scale.numpy(), zero.numpy(), out)
        assert np.array_equal(out, packed.dequantize().numpy())


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize(("rows", "columns", "size"), [(1, 1, 1), (33, 40, 8), (5, 9, 3), (3, 1024, 64), (2, 130, 65)])
def test_tables_are_exact(bits: int, rows: int, columns: int, size: int) -> None:
    draw = torch.Generator().manual_seed(bits)
    codes = torch.randint(1 << bits, (rows, columns), generator=draw).to(torch.uint8)
    levels, scale = torch.randn(1, 1 << bits, generator=draw), torch.rand(rows * columns // size, generator=draw)
    packed = Lookup(codes, levels, scale, size)
    out = np.full((rows, columns), np.nan, np.float32)
    lookup(packed.tensors()["codes"].numpy(), bits, levels[0].numpy(), scale.view(rows, -1).numpy(), size, out)
    assert np.array_equal(out, packed.dequantize().numpy())


@pytest.mark.parametrize(("kind", "bits"), [("e4m3", 8), ("e5m2", 8), ("e2m1", 4), ("e3m0", 4)])
@pytest.mark.parametrize("size", [1, 3, 16, 32, 64])
def test_the_last_block_of_tiny_floats_may_be_cut(kind: str, bits: int, size: int) -> None:
    from weft.packed.rows import dequantize

    draw = torch.Generator().manual_seed(0)
    codes = torch.randint(1 << bits, (7, 38), generator=draw).to(torch.uint8)
    packed = Minifloat(codes, torch.rand(3, -(-38 // size), generator=draw), kind, (3, size), torch.tensor(0.3))
    made = dequantize(packed.tensors(), packed.settings())
    assert np.array_equal(made.numpy(), packed.dequantize().numpy(), equal_nan=True)
