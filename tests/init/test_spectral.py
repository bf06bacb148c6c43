import math

import numpy as np
import pytest
import torch

from weft.errors import RecipeError, ShapeError
from weft.init import SpectralConv, spectral_variance_preserving_


@pytest.mark.parametrize("transform", ["dct", "rfft"])
@pytest.mark.parametrize(
    ("modes", "size", "channels"),
    [
        (1, 16, 40),
        (8, 64, 16),
        (8, 257, 5),
        (24, 64, 3),
        (33, 64, 8),
        (8, 15, 30),
        ((4, 5), (16, 14), 8),
        ((8, 9), (16, 16), 4),
    ],
)
def test_white_fields_keep_their_variance(transform: str, modes: object, size: object, channels: int) -> None:
    torch.manual_seed(0)
    grid = (size,) if isinstance(size, int) else size
    ratios = []
    layer = SpectralConv(channels, 16, modes, size, transform=transform)
    for _ in range(80):
        layer.reset_parameters()
        ratios.append(layer(torch.randn(16, channels, *grid)).square().mean().item())
    spread = 2 * np.std(ratios) / math.sqrt(len(ratios))
    assert np.mean(ratios) == pytest.approx(1, abs=max(0.05, spread))
    assert spread < 0.08  # or the test would say nothing


def test_counting_the_ends_matters() -> None:
    # at m = 8 of a half spectrum, N / (4 m c) is short of a tenth, N / (2 m c) twice too much
    weight = spectral_variance_preserving_(torch.empty(100, 100, 8, 2), 64, "rfft")
    exact = weight.var().item()
    assert exact == pytest.approx(64 / (100 * 29), rel=0.02)
    assert exact * 100 * 32 / 64 == pytest.approx(32 / 29, rel=0.02)


def test_cosine_layer_against_sums() -> None:
    layer = SpectralConv(2, 3, modes=4, size=9).double()
    x = torch.randn(5, 2, 9, dtype=torch.float64)
    n, k = np.arange(9), np.arange(9)[:, None]
    basis = np.sqrt(np.where(k == 0, 1, 2) / 9) * np.cos(np.pi * (2 * n + 1) * k / 18)  # rows are frequencies
    expected = np.einsum("kn,bin,iok,kp->bop", basis[:4], x.numpy(), layer.weight.detach().numpy(), basis[:4])
    np.testing.assert_allclose(layer(x).detach(), expected, atol=1e-12)


@pytest.mark.parametrize("grid", [(9,), (8,), (7, 6)])
def test_fourier_layer_against_the_full_spectrum(grid: tuple[int, ...]) -> None:
    modes = (3,) * len(grid)
    layer = SpectralConv(2, 3, modes=modes, size=grid, transform="rfft").double()
    axes = tuple(range(2, 2 + len(grid)))
    x = np.random.default_rng(0).standard_normal((4, 2, *grid))
    weight = layer.weight.detach().numpy() @ np.array([1, 1j])
    spectrum = np.fft.fftn(x, axes=axes)
    out = np.zeros((4, 3, *grid), complex)
    for place in np.ndindex(*weight.shape[2:]):
        where = tuple(p if p < 3 else p - 6 for p in place)  # the second half of a two-sided axis is negative
        value = np.einsum("bi,io->bo", spectrum[(..., *where)], weight[(..., *place)])
        # a real field has the mirror image of what the half spectrum holds; on its first column, the real part
        if where[-1] == 0:
            value = value / 2
        out[(..., *where)] += value
        out[(..., *(-w for w in where))] += value.conj()
    expected = np.fft.ifftn(out, axes=axes)
    assert abs(expected.imag).max() < 1e-12
    np.testing.assert_allclose(layer(torch.from_numpy(x)).detach(), expected.real, atol=1e-12)


def test_all_frequencies_with_identities_are_the_identity() -> None:
    for transform, modes in (("dct", (6, 8)), ("rfft", (3, 5))):
        layer = SpectralConv(3, 3, modes, (6, 8), transform=transform).double()
        with torch.no_grad():
            weight = torch.eye(3, dtype=torch.float64).reshape(3, 3, 1, 1).expand(3, 3, 6, modes[1])
            layer.weight.copy_(weight if transform == "dct" else torch.stack([weight, 0 * weight], -1))
        x = torch.randn(2, 3, 6, 8, dtype=torch.float64)
        torch.testing.assert_close(layer(x), x)


@pytest.mark.parametrize("transform", ["dct", "rfft"])
def test_gradients_in_two_dimensions(transform: str) -> None:
    layer = SpectralConv(1, 2, (2, 3), (5, 6), transform=transform).double()

    def compute(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(layer, {"weight": weight}, (x,))

    x = torch.randn(1, 1, 5, 6, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(compute, (x, layer.weight.detach().clone().requires_grad_()))


def test_the_same_operator_on_a_finer_grid() -> None:
    layer = SpectralConv(1, 1, modes=4, size=16).double()
    coarse, fine = (((torch.arange(n, dtype=torch.float64) + 0.5) / n).reshape(1, 1, n) for n in (16, 48))
    wave = lambda t: torch.cos(2 * math.pi * t) + torch.cos(math.pi * t)  # noqa: E731
    torch.testing.assert_close(layer(wave(fine))[..., 1::3], layer(wave(coarse)))


def test_refuses_shapes_that_do_not_fit() -> None:
    with pytest.raises(RecipeError, match=r"fewer than the \[9\]"):
        SpectralConv(2, 2, modes=9, size=8)
    with pytest.raises(RecipeError, match=r"fewer than the \[6\]"):
        SpectralConv(2, 2, modes=6, size=8, transform="rfft")
    with pytest.raises(RecipeError, match="At least one frequency"):
        SpectralConv(2, 2, modes=0, size=8)
    with pytest.raises(RecipeError, match="Did you mean"):
        SpectralConv(2, 2, modes=2, size=8, transform="fft")
    with pytest.raises(RecipeError, match="one axis of kept frequencies"):
        spectral_variance_preserving_(torch.empty(2, 2, 4), (8, 8))
    with pytest.raises(RecipeError, match=r"kept…, 2"):
        spectral_variance_preserving_(torch.empty(2, 2, 4), 8, "rfft")
    with pytest.raises(ShapeError, match="finer grid"):
        SpectralConv(2, 2, modes=4, size=8)(torch.ones(1, 2, 3))
    with pytest.raises(ShapeError, match="axes of a grid"):
        SpectralConv(2, 2, modes=4, size=8)(torch.ones(1, 2, 8, 8))
