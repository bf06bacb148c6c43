import itertools
import math

import numpy as np
import pytest
import torch
from scipy import fft

from weft.errors import NonFiniteError, RecipeError
from weft.init import dct, idct, select_modes


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 8, 17, 64])
def test_equals_scipy_along_any_axis(n: int) -> None:
    x = torch.randn(3, n, 2, dtype=torch.float64)
    for ours, theirs in ((dct, fft.dct), (idct, fft.idct)):
        np.testing.assert_allclose(ours(x, 1), theirs(x.numpy(), axis=1, norm="ortho"), atol=1e-13)
        np.testing.assert_allclose(ours(x.mT), theirs(x.mT.numpy(), norm="ortho"), atol=1e-13)


def test_two_axes_are_two_transforms_and_the_inverse_is_the_transpose() -> None:
    x, y = torch.randn(2, 2, 6, 7, dtype=torch.float64)
    np.testing.assert_allclose(dct(x, (-2, -1)), fft.dctn(x.numpy(), axes=(-2, -1), norm="ortho"), atol=1e-13)
    torch.testing.assert_close(idct(dct(x, (1, 2)), (1, 2)), x)
    assert dct(x, (1, 2)).norm() == pytest.approx(x.norm())  # Parseval
    torch.testing.assert_close((dct(x) * y).sum(), (x * idct(y)).sum())


def test_gradients_and_half_precision() -> None:
    for transform in (dct, idct):
        for n in (4, 5):
            torch.autograd.gradcheck(transform, torch.randn(2, n, dtype=torch.float64, requires_grad=True))
        x = torch.randn(3, 16, dtype=torch.bfloat16)
        torch.testing.assert_close(transform(x), transform(x.float()).bfloat16())


def test_refuses_what_it_cannot_transform() -> None:
    with pytest.raises(RecipeError, match="floating point"):
        dct(torch.ones(3, dtype=torch.long))
    with pytest.raises(RecipeError, match="nothing to transform along axis 1"):
        dct(torch.ones(3, 0), 1)
    with pytest.raises(RecipeError, match="axis 2"):
        idct(torch.ones(3, 2), 2)


@pytest.mark.parametrize("tolerance", [0.3, 0.05, 1e-3])
def test_what_modes_leave_out_is_the_error_of_reconstruction(tolerance: float) -> None:
    torch.manual_seed(0)
    decay = 1 / (1 + torch.arange(12.0).unsqueeze(1) ** 2 + 3 * torch.arange(9.0) ** 2)
    y = idct(torch.randn(20, 2, 12, 9) * decay, (2, 3))
    rests = {}
    for m, n in itertools.product(range(1, 13), range(1, 10)):
        kept = torch.zeros_like(y)
        kept[..., :m, :n] = dct(y, (2, 3))[..., :m, :n]
        rests[m, n] = ((idct(kept, (2, 3)) - y).square().sum() / y.square().sum()).item()
    modes, rest = select_modes(y, tolerance)
    assert rest == pytest.approx(rests[modes], rel=1e-4)
    assert rest <= tolerance
    fewest = min(math.prod(m) for m, r in rests.items() if r <= tolerance)
    assert math.prod(modes) == fewest
    assert rest <= min(r for m, r in rests.items() if math.prod(m) == fewest) * (1 + 1e-4)


def test_modes_of_plain_fields() -> None:
    assert select_modes(torch.ones(2, 1, 8)) == ((1,), pytest.approx(0, abs=1e-12))
    assert select_modes(torch.zeros(2, 1, 8, 8)) == ((1, 1), 0.0)
    assert select_modes(torch.randn(2, 1, 8), 0)[0] == (8,)
    with pytest.raises(RecipeError, match=r"samples, channels, grid"):
        select_modes(torch.ones(0, 1, 8))
    with pytest.raises(RecipeError, match="tolerance"):
        select_modes(torch.ones(1, 1, 8), 1)
    with pytest.raises(NonFiniteError, match="NaN"):
        select_modes(torch.full((1, 1, 4), math.nan))
