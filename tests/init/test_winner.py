import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from weft.errors import RecipeError
from weft.init import Siren, noise_scales, siren_, spectral_centroid, winner_


def tone(k: int, samples: int = 96) -> Tensor:
    return torch.cos(2 * math.pi * k * torch.arange(samples, dtype=torch.float64) / samples + 0.3)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("k", [1, 17, 47])
def test_centroid_of_a_tone_is_its_frequency(k: int) -> None:
    assert spectral_centroid(tone(k)) == pytest.approx(2 * k / 96, abs=1e-12)


def test_centroid_of_white_noise_is_one_half() -> None:
    noise = torch.randn(20, 4096, generator=generator(), dtype=torch.float64)
    assert spectral_centroid(noise) == pytest.approx(0.5, abs=0.005)


@pytest.mark.parametrize("samples", [50, 51])
def test_centroid_equals_numpys(samples: int) -> None:
    signal = torch.rand(3, samples, generator=generator(), dtype=torch.float64)
    amplitude, frequency = np.abs(np.fft.rfft(signal.numpy())), np.fft.rfftfreq(samples)
    expected = np.mean([2 * (a * frequency).sum() / a.sum() for a in amplitude])
    assert spectral_centroid(signal) == pytest.approx(expected, rel=1e-12)
    amplitude[:, 0] = 0
    expected = np.mean([2 * (a * frequency).sum() / a.sum() for a in amplitude])
    assert spectral_centroid(signal, remove_mean=True) == pytest.approx(expected, rel=1e-12)


def test_channels_are_averaged_once() -> None:
    one = tone(20)
    assert spectral_centroid(one.expand(3, -1)) == pytest.approx(spectral_centroid(one), rel=1e-12)
    assert spectral_centroid(torch.stack([tone(10), tone(30)])) == pytest.approx(40 / 96, rel=1e-12)


def test_images_are_measured_along_both_axes() -> None:
    stripes = tone(24, 96).expand(40, 96)  # along the rows; columns are constant
    assert spectral_centroid(stripes, 2) == pytest.approx(0.5 * 2 * 24 / 96, rel=1e-9)
    assert spectral_centroid(stripes.mT, 2) == pytest.approx(spectral_centroid(stripes, 2), rel=1e-12)
    checks = tone(5, 40)[:, None] * tone(24, 96)
    expected = (2 * 24 / 96 + 2 * 5 / 40) / 2
    assert spectral_centroid(checks.expand(3, 40, 96), 2) == pytest.approx(expected, rel=1e-9)
    flattened = spectral_centroid(checks.flatten())
    assert abs(flattened - expected) > 0.05  # what measuring the list of pixels would give


@pytest.mark.parametrize("value", [0.0, 3.7])
@pytest.mark.parametrize("remove_mean", [False, True])
def test_constant_signals_have_no_frequency(value: float, remove_mean: bool) -> None:
    assert spectral_centroid(torch.full((50,), value), remove_mean=remove_mean) == pytest.approx(0, abs=1e-12)
    assert spectral_centroid(torch.zeros(3, 8, 8), 2, remove_mean) == 0


def test_scales_are_the_papers() -> None:
    for psi in (0.0, 0.1, 0.5, 1.0):
        assert noise_scales(psi) == pytest.approx((3500 * (1 - math.exp(-7 * psi)), 3 * psi))
        assert noise_scales(psi, 2) == pytest.approx((50 * (1 - math.exp(-5 * psi)), 0.4 * psi))
    first, second = noise_scales(0.4)
    assert noise_scales(0.4, coordinate_range=2.0) == pytest.approx((first / 2, second))


@pytest.mark.parametrize(("omega", "first_omega"), [(30.0, None), (20.0, 300.0)])
def test_noise_has_the_scale_over_omega(omega: float, first_omega: float | None) -> None:
    signal = tone(20)
    plain, noisy = (Siren(4, 300, 2, 3, omega, first_omega).double() for _ in range(2))
    siren_(plain, generator=generator())
    scales = winner_(noisy, signal, generator=generator())
    assert scales == pytest.approx(noise_scales(40 / 96))
    differences = [(b.weight - a.weight).flatten() for a, b in zip(plain.layers, noisy.layers)]
    for difference, scale, factor in zip(differences, scales, (first_omega or omega, omega)):
        law = stats.norm(scale=scale / factor)
        assert stats.kstest(difference.detach().numpy(), law.cdf).pvalue > 1e-3
    assert all(not d.any() for d in differences[2:])


def test_a_constant_signal_leaves_siren_bit_identical() -> None:
    plain, noisy = Siren(2, 16, 1), Siren(2, 16, 1)
    siren_(plain, generator=generator())
    assert winner_(noisy, torch.zeros(3, 8, 8), dimensions=2, generator=generator()) == (0, 0)
    assert all(torch.equal(a.weight, b.weight) for a, b in zip(plain.layers, noisy.layers))


def test_given_scales_go_before_the_rule() -> None:
    network = Siren(1, 16, 1)
    assert winner_(network, None, first_scale=5.0, second_scale=0.5) == (5, 0.5)
    assert winner_(network, tone(20), first_scale=5.0) == (5, pytest.approx(3 * 40 / 96))


@pytest.mark.parametrize("omega", [5.0, 30.0])
def test_arguments_of_sines_keep_their_variance(omega: float) -> None:
    """What SIREN's law is made for: W ~ U(±√(6/d)/ω) gives an argument of variance 2 E[h²], normal for wide layers.

    Behind the first layer, whose phases are all over the circle, E[h²] = 1/2; sin of N(0, v) has (1 − exp(−2v)) / 2.
    """
    network = Siren(1, 512, 1, hidden=5, omega=omega, first_omega=300.0).double()
    siren_(network, generator=generator())
    x = torch.sin(300 * network.layers[0](torch.linspace(-1, 1, 500, dtype=torch.float64)[:, None]))
    variance = 1.0
    for layer in network.layers[1:-1]:
        argument = omega * nn.functional.linear(x, layer.weight)
        assert argument.var().item() == pytest.approx(variance, rel=0.05)
        assert stats.kurtosis(argument.detach().flatten().numpy()) == pytest.approx(0, abs=0.2)
        x, variance = torch.sin(argument), 1 - math.exp(-2 * variance)


def test_noise_raises_the_frequencies_that_a_network_starts_with() -> None:
    torch.manual_seed(0)
    network = Siren(1, 128, 1, hidden=3)
    grid = torch.linspace(-1, 1, 2048)[:, None]
    assert spectral_centroid(network(grid).detach().mT, remove_mean=True) < 0.2
    winner_(network, torch.randn(2048))
    assert spectral_centroid(network(grid).detach().mT, remove_mean=True) > 0.4  # that of white noise is 0.5


def test_forward_compiles_and_equals_the_formula() -> None:
    network = Siren(2, 16, 3, hidden=2, omega=20.0, first_omega=50.0)
    a, b, c = network.layers
    x = torch.rand(5, 2)
    torch.testing.assert_close(network(x), c(torch.sin(20 * b(torch.sin(50 * a(x))))))
    torch.testing.assert_close(torch.compile(network, fullgraph=True, backend="eager")(x), network(x))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: spectral_centroid(torch.ones(1)), "at least 2 samples"),
        (lambda: spectral_centroid(torch.tensor(1.0)), "at least 2 samples"),
        (lambda: spectral_centroid(torch.ones(0)), "at least 2 samples"),
        (lambda: spectral_centroid(torch.ones(9), 2), "at least 2 samples"),
        (lambda: spectral_centroid(torch.ones(9, dtype=torch.complex64)), "real signal"),
        (lambda: spectral_centroid(torch.ones(9, 9, 9), 3), "Signals have 1 dimension"),
        (lambda: spectral_centroid(torch.tensor([1.0, math.nan])), "NaN"),
        (lambda: spectral_centroid(torch.ones(64, 64, 3), 2), "movedim"),
        (lambda: spectral_centroid(torch.ones(1000, 2)), "movedim"),
        (lambda: noise_scales(1.1), r"lies in \[0, 1\]"),
        (lambda: noise_scales(math.nan), r"lies in \[0, 1\]"),
        (lambda: noise_scales(0.5, 3), "1 and 2 dimensions"),
        (lambda: winner_(Siren(1, 8, 1), None), "needs the signal"),
        (lambda: winner_(Siren(1, 8, 1, hidden=1), torch.ones(8)), "At least 3 linear layers"),
        (lambda: winner_(Siren(1, 8, 1), torch.ones(8), dimensions=3), "between 1 and 2"),
        (lambda: siren_([]), "At least 1 linear layer is"),
        (lambda: siren_([nn.Conv1d(2, 3, 3)]), "must be"),
        (lambda: siren_(Siren(1, 8, 1), omega=0.0), "between"),
        (lambda: Siren(1, 8, 1, hidden=0), "at least 1 layer of sines"),
    ],
)
def test_bad_input(call, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        call()
