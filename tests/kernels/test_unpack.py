"""Codes of few bits to float32: the same bits as the formula of the packed form."""

import numpy as np
import pytest
import torch

from weft.kernels.unpack import affine
from weft.packed import Affine


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
