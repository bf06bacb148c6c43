"""Start a sinusoidal network with noise on its first two weights, as much as the target's spectrum is high.

WINNER, "Spectral Bottleneck in Deep Neural Networks: Noise is All You Need", arXiv:2509.09719 (2025), on top of SIREN,
Sitzmann et al., arXiv:2006.09661 (2020).

    SIREN:  h_{l+1} = sin(ω_l (W_l h_l + b_l)),  last layer linear    W_0 ~ U(±1/d),  W_l ~ U(±√(6/d) / ω),  d inputs
    ψ = 2 Σ_k f_k |Y_k| / Σ_k |Y_k|,  Y = rfft(y),  f_k = k / N       0 for a constant, 1 at half the sampling rate
    W_0 += (S_0 / ω_0) · N(0, 1)      signals: S_0 = 3500 (1 − e^{−7ψ}), S_1 = 3ψ
    W_1 += (S_1 / ω_1) · N(0, 1)      images:  S_0 = 50 (1 − e^{−5ψ}),   S_1 = 0.4ψ

W_l (out, in); biases keep torch's law. S_0 is the spread of the first layer's frequencies in radians per unit of the
coordinates, which run from −1 to 1 in the paper; the constants were found by trying.

Differences from the paper and its code: ψ is averaged over channels once (the code divides by their number again, and
by its root in the rule for S: right for one channel). Images are measured along both axes, the code along rows, or on the
flattened pixels. Each layer's noise is divided by that layer's own ω. Other ranges of coordinates scale S_0. A constant
signal has ψ = 0 and leaves SIREN's draws as they are.
Complexity: one FFT. Re-implemented from the equations (official code: no licence; SIREN's: MIT).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn

from weft.errors import RecipeError
from weft.function.initializer import InitMethod
from weft.init.siren import OMEGA, Siren, empty_like, linear_weights, siren_
from weft.method import configure, parameter

_CHANNELS = 4  # a last axis of at most so many entries behind a longer first one holds colours


@dataclass(frozen=True)
class ScaleRule:
    """S_0 = limit · (1 − exp(−rate · ψ)), S_1 = slope · ψ, for coordinates from −1 to 1."""

    limit: float
    rate: float
    slope: float


SCALE_RULES = {1: ScaleRule(3500.0, 7.0, 3.0), 2: ScaleRule(50.0, 5.0, 0.4)}


@dataclass(frozen=True)
class Winner:
    """Configuration of :func:`winner_`."""

    dimensions: int = parameter(1, "1 for signals, 2 for images", minimum=1, maximum=2)
    omega: float | None = parameter(None, "ω of the hidden layers: the network's own, or else 30", minimum=1e-6)
    first_omega: float | None = parameter(None, "ω of the first layer: the network's own, or else omega", minimum=1e-6)
    first_scale: float | None = parameter(
        None, "S_0 in radians per unit of the coordinates; by rule if None", minimum=0
    )
    second_scale: float | None = parameter(None, "S_1 in radians; by rule if None", minimum=0)
    coordinate_range: float = parameter(1.0, "coordinates run from minus this to this", minimum=1e-12)
    remove_mean: bool = parameter(False, "leave the signal's mean out of its spectrum")


@torch.no_grad()
def spectral_centroid(signal: Tensor, dimensions: int = 1, remove_mean: bool = False) -> float:
    """Where the amplitudes of a signal's spectrum have their centre: 0 constant, 1 half the sampling rate.

    Each channel is measured alone; an image along its rows and along its columns. The mean over all of these is taken;
    a row, column or channel of zeros counts as 0.

    Args:
        signal: (…, samples) or (…, height, width), channels in front, sampled evenly.
        dimensions: how many of the last axes are space or time, 1 or 2.
        remove_mean: leave the mean of each row, column or signal out.

    Returns:
        ψ in [0, 1].

    Raises:
        RecipeError: too few axes, none or one sample along an axis, NaN or infinity, channels behind.

    Source: equations above.

    >>> t = torch.arange(64).double() / 64
    >>> round(spectral_centroid(torch.sin(2 * torch.pi * 8 * t)), 6)  # 8 periods in 64 samples: a quarter of 32
    0.25
    """
    if dimensions not in (1, 2):
        raise RecipeError(
            f"Signals have 1 dimension and images 2, got {dimensions}; for volumes give the scales yourself."
        )
    sizes = list(signal.shape[-dimensions:])
    if signal.dim() < dimensions or not signal.numel() or min(sizes) < 2 or signal.is_complex():
        raise RecipeError(
            f"A real signal (…, samples) or image (…, height, width) of at least 2 samples an axis is needed, got "
            f"{list(signal.shape)}, {signal.dtype}."
        )
    if sizes[-1] <= _CHANNELS and signal.dim() > dimensions and signal.shape[-1 - dimensions] > 2 * _CHANNELS:
        raise RecipeError(
            f"Channels stand in front, (channels, {'samples' if dimensions == 1 else 'height, width'}); in "
            f"{list(signal.shape)} they seem to stand behind. Use signal.movedim(-1, 0)."
        )
    values = signal.detach().double()
    if not bool(values.isfinite().all()):
        raise RecipeError("The signal holds NaN or infinity.")
    along = [values] if dimensions == 1 else [values, values.mT]
    centroids = []
    for lines in along:  # (…, samples)
        lines = lines - lines.mean(-1, keepdim=True) if remove_mean else lines
        amplitude = torch.fft.rfft(lines).abs()
        if remove_mean:
            amplitude[..., 0] = 0  # rounding
        frequency = torch.fft.rfftfreq(lines.shape[-1], dtype=torch.float64, device=lines.device)
        total = amplitude.sum(-1)
        centroids.append(float((2 * (amplitude @ frequency) / torch.where(total > 0, total, 1)).mean()))
    return sum(centroids) / len(centroids)


def noise_scales(
    centroid: float, dimensions: int = 1, coordinate_range: float = 1.0, rule: ScaleRule | None = None
) -> tuple[float, float]:
    """(S_0, S_1) for a spectral centroid.

    Args:
        centroid: ψ in [0, 1].
        dimensions: 1 for signals, 2 for images; chooses the rule.
        coordinate_range: coordinates run from minus this to this.
        rule: other constants than ``SCALE_RULES[dimensions]``.

    Raises:
        RecipeError: ψ is not in [0, 1], or there is no rule for so many dimensions.

    >>> noise_scales(0.0), noise_scales(0.5, dimensions=2)[1]
    ((0.0, 0.0), 0.2)
    """
    if not 0 <= centroid <= 1:
        raise RecipeError(f"A spectral centroid lies in [0, 1], where 1 is half the sampling rate; got {centroid}.")
    rule = rule or SCALE_RULES.get(dimensions)
    if rule is None or not coordinate_range > 0:
        raise RecipeError("There are rules for 1 and 2 dimensions and ranges above 0; else give both scales.")
    return rule.limit * -math.expm1(-rule.rate * centroid) / coordinate_range, rule.slope * centroid


@torch.no_grad()
def winner_(
    network: nn.Module | Sequence[nn.Module],
    signal: Tensor | None,
    dimensions: int = 1,
    omega: float | None = None,
    first_omega: float | None = None,
    first_scale: float | None = None,
    second_scale: float | None = None,
    coordinate_range: float = 1.0,
    remove_mean: bool = False,
    generator: Generator | None = None,
) -> tuple[float, float]:
    """Fill the weights of a network of sines as SIREN does, then add WINNER's noise to the first two, in place.

    Args:
        network: see :func:`siren_`; at least two layers of sines and the linear one.
        signal: what will be fitted, see :func:`spectral_centroid`; None where both scales are given.
        dimensions: 1 for signals, 2 for images.
        omega, first_omega: ω of the hidden layers and of the first; the network's attributes of these names if it has
            them, else 30 and ``omega``.
        first_scale, second_scale: S_0 and S_1; by rule from the signal if None.
        coordinate_range: coordinates run from minus this to this.
        remove_mean: leave the signal's mean out of its spectrum.
        generator: of torch; torch's global one if None.

    Returns:
        (S_0, S_1).

    Raises:
        RecipeError: fewer than three layers, no signal and no scales, or see :func:`spectral_centroid`.

    Source: equations above.

    >>> network = Siren(1, 32, 1)
    >>> noise = torch.rand(1000, generator=torch.Generator().manual_seed(0)) - 0.5
    >>> [round(scale) for scale in winner_(network, noise)]
    [3394, 2]
    """
    given = {
        "dimensions": dimensions, "omega": omega, "first_omega": first_omega, "first_scale": first_scale,
        "second_scale": second_scale, "coordinate_range": coordinate_range, "remove_mean": remove_mean,
    }  # fmt: skip
    config = configure(Winner, given)
    weights = linear_weights(network, 3)
    first, second = config.first_scale, config.second_scale
    if first is None or second is None:
        if signal is None:
            raise RecipeError("winner_ needs the signal that will be fitted, or both first_scale and second_scale.")
        centroid = spectral_centroid(signal, config.dimensions, config.remove_mean)
        rule = noise_scales(centroid, config.dimensions, config.coordinate_range)
        first, second = (r if s is None else s for r, s in zip(rule, (first, second)))
    own: float = getattr(network, "omega", OMEGA)
    hidden = own if config.omega is None else config.omega
    siren_(network, hidden, generator)
    first_omega = getattr(network, "first_omega", hidden) if config.first_omega is None else config.first_omega
    for weight, scale, factor in zip(weights, (first, second), (first_omega, hidden)):
        if scale:
            weight.add_((empty_like(weight, generator).normal_(generator=generator) * (scale / factor)).to(weight))
    return first, second


METHODS = (
    InitMethod(
        name="winner",
        family="init",
        config=Winner,
        summary="Noise on a network of sines' first weights, as the target's spectrum asks for, so that it fits high notes.",
        goal="train",
        paper="winner",
        needs="calibration",
        function=winner_,
        trial=lambda: Siren(1, 8, 1, hidden=2),
        apply=lambda model, generator, **parameters: winner_(
            model, torch.arange(64.0).square().sin(), generator=generator, **parameters
        ),
        fills=("layers.0.weight", "layers.1.weight", "layers.2.weight"),
        checked_by=("closed form", "numpy"),
    ),
)
