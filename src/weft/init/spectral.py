"""Start layers that keep a few frequencies of a field so that the field's variance passes through.

Transform Once, Poli et al., arXiv:2211.14453 (2022), section on initialisation; the layer is FNO's.

    X = T(x),  Y[b, o, k] = Σᵢ X[b, i, k] W[i, o, k] for kept frequencies k, else 0,  y = T⁻¹(Y)    T orthonormal
    cosine transform:   Var W = gain² N / (c_in m)              m: kept coefficients of N
    Fourier transform:  Var Re W = Var Im W = gain² N / (c_in Σₖ eₖ)     eₖ = 4 inside the half spectrum, 1 on its ends

x: (batch, c_in, grid…), white with variance σ²; then y: (batch, c_out, grid…) has variance gain² σ². The half spectrum
has frequencies 0 … N/2 of the last axis; inside, an entry and its mirror image both carry |W|², while on the ends
(frequency 0, and N/2 if N is even) the inverse transform takes the real part. In one dimension Σ eₖ = 4m − 3.

Differences from the paper and its code: the ends are counted (4m alone loses a tenth of the variance at m = 8). One
Fourier layer of the code uses N / (2 m c_in), which doubles the variance; its 2-D cosine layer also keeps the highest
frequencies of the first axis, as if they were negative ones, and counts them twice; here the lowest are kept.
Complexity: O(N log N) a channel for a transform, O(m c_in c_out) to mix. Re-implemented from the equations (official
code: no licence).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Generator, Tensor, nn

from weft.errors import RecipeError, ShapeError
from weft.function.initializer import InitMethod, check_fillable, plain_parameter
from weft.function.layer import WHITE_NOISE, LayerMethod
from weft.init.cosine import dct, idct
from weft.method import configure, parameter

TRANSFORMS = ("dct", "rfft")


@dataclass(frozen=True)
class SpectralVariancePreserving:
    """Configuration of :func:`spectral_variance_preserving_`."""

    transform: str = parameter("dct", "cosine transform, or half of a Fourier transform", choices=TRANSFORMS)
    gain: float = parameter(1.0, "standard deviation of outputs over that of inputs", minimum=0)


@dataclass(frozen=True)
class SpectralConvConfig:
    """A linear layer on the lowest frequencies.

    >>> SpectralConvConfig(modes=8, size=64).build(3)
    SpectralConv(3, 3, modes=(8,), size=(64,), transform=dct)
    """

    modes: int | tuple[int, ...] = parameter(16, "kept frequencies, for each axis of the grid", minimum=1)
    size: int | tuple[int, ...] = parameter(64, "points of the grid that training uses, for each axis", minimum=1)
    transform: str = parameter("dct", "cosine transform, or half of a Fourier transform", choices=TRANSFORMS)
    gain: float = parameter(1.0, "standard deviation of outputs over that of inputs at the start", minimum=0)

    def build(self, features: int) -> nn.Module:
        """The layer."""
        return SpectralConv(features, features, **asdict(self))


@torch.no_grad()
def spectral_variance_preserving_(
    tensor: Tensor,
    size: int | Sequence[int],
    transform: str = "dct",
    gain: float = 1.0,
    generator: Generator | None = None,
) -> Tensor:
    """Fill the weight of a truncated spectral layer so that white fields keep their variance, in place.

    For layers that transform back: zeros stand for the frequencies that are left out, and the kept ones make up for
    them. Where layers follow each other without transforming back, only the first may have this start.

    Args:
        tensor: (c_in, c_out, kept…) for "dct"; (c_in, c_out, kept…, 2) for "rfft", real and imaginary parts last.
        size: points of the grid, one number for each axis of kept frequencies.
        transform: "dct" or "rfft".
        gain: standard deviation of outputs over that of inputs.
        generator: of torch; torch's global one if None.

    Returns:
        The tensor.

    Raises:
        RecipeError: shapes do not fit, or a parameter is out of bounds.

    Source: arXiv:2211.14453; the count for "rfft" is derived above.

    >>> weight = spectral_variance_preserving_(torch.empty(50, 40, 8), 64, generator=torch.Generator().manual_seed(0))
    >>> abs(weight.var().item() * 50 * 8 / 64 - 1) < 0.05
    True
    """
    config = configure(SpectralVariancePreserving, {"transform": transform, "gain": gain})
    check_fillable(tensor)
    grid = (size,) if isinstance(size, int) else tuple(size)
    kept = tuple(tensor.shape[2:-1] if config.transform == "rfft" else tensor.shape[2:])
    paired = config.transform == "dct" or (tensor.dim() > 2 and tensor.shape[-1] == 2)
    if not tensor.is_floating_point() or not grid or len(kept) != len(grid) or not paired:
        shape = "(c_in, c_out, kept…)" if config.transform == "dct" else "(c_in, c_out, kept…, 2)"
        raise RecipeError(
            f"A weight {shape} with one axis of kept frequencies for each axis of the grid is needed; got "
            f"{list(tensor.shape)}, {tensor.dtype}, and a grid of {list(grid)}."
        )
    most = [*grid[:-1], grid[-1] // 2 + 1 if config.transform == "rfft" else grid[-1]]
    if any(k > n for k, n in zip(kept, most)):
        raise RecipeError(f"A grid of {list(grid)} has {most} frequencies, fewer than the {list(kept)} that are kept.")
    if not tensor.numel():
        return tensor
    energy = math.prod(kept)
    if config.transform == "rfft":
        ends = 1 + (grid[-1] > 1 and grid[-1] % 2 == 0 and kept[-1] == most[-1])
        energy = math.prod(kept[:-1]) * (4 * kept[-1] - 3 * ends)
    deviation = config.gain * math.sqrt(math.prod(grid) / (tensor.shape[0] * energy))
    return tensor.normal_(0, deviation, generator=generator)


class SpectralConv(nn.Module):
    """Multiplies the lowest frequencies of a field by a matrix each and leaves out the others.

    Args:
        in_channels, out_channels: of the field.
        modes: kept frequencies for each axis; with "rfft" so many positive and so many negative ones on all axes but
            the last, which keeps 0 … modes − 1.
        size: points of the grid that training uses, for the start; the layer takes any grid that has the modes.
        transform: "dct" for fields that end at walls, "rfft" for periodic ones.
        gain: standard deviation of outputs over that of inputs at the start.

    Raises:
        RecipeError: modes and size do not fit.

    Source: arXiv:2211.14453; with "rfft" the layer of the Fourier neural operator, arXiv:2010.08895.

    >>> SpectralConv(2, 3, modes=(4, 4), size=(16, 16), transform="rfft")(torch.ones(1, 2, 16, 16)).shape
    torch.Size([1, 3, 16, 16])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        modes: int | Sequence[int] = 16,
        size: int | Sequence[int] = 64,
        *,
        transform: str = "dct",
        gain: float = 1.0,
    ):
        super().__init__()
        self.in_channels = in_channels
        self.modes = (modes,) if isinstance(modes, int) else tuple(modes)
        self.size = (size,) if isinstance(size, int) else tuple(size)
        if min(self.modes, default=0) < 1:
            raise RecipeError(f"At least one frequency is kept on each axis, got modes={modes!r}.")
        self.transform = transform
        self.gain = gain
        kept = self.modes if transform == "dct" else (*(2 * m for m in self.modes[:-1]), self.modes[-1], 2)
        self.weight = nn.Parameter(torch.empty(in_channels, out_channels, *kept))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weight anew."""
        spectral_variance_preserving_(self.weight, self.size, self.transform, self.gain)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, c_in, grid…) -> (batch, c_out, grid…)."""
        grid, axes = tuple(x.shape[2:]), tuple(range(2, x.dim()))
        if len(grid) != len(self.modes) or x.shape[1] != self.in_channels:
            raise ShapeError(
                f"SpectralConv works on (batch, {self.in_channels}, …) with {len(self.modes)} axes of a grid and got an "
                f"input of shape {list(x.shape)}."
            )
        kept = tuple(self.weight.shape[2 : 2 + len(grid)])
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        weight = self.weight.to(wide.dtype)
        if self.transform == "dct":
            self._check(kept, grid)
            low = _lowest(dct(wide, axes), kept, mirrored=False)
            y = idct(_among_zeros(_mix(low, weight), grid, mirrored=False), axes)
        else:
            half = (*grid[:-1], grid[-1] // 2 + 1)
            self._check(kept, half)
            low = _lowest(torch.fft.rfftn(wide, dim=axes, norm="ortho"), kept, mirrored=True)
            mixed = _mix(low, torch.view_as_complex(weight.contiguous()))
            y = torch.fft.irfftn(_among_zeros(mixed, half, mirrored=True), s=grid, dim=axes, norm="ortho")
        return y.to(x.dtype)

    def _check(self, kept: tuple[int, ...], there: tuple[int, ...]) -> None:
        if any(k > n for k, n in zip(kept, there)):
            raise ShapeError(
                f"SpectralConv keeps {list(kept)} frequencies, this grid has {list(there)}: use a finer grid."
            )

    def extra_repr(self) -> str:
        """What ``print`` shows."""
        channels = f"{self.in_channels}, {self.weight.shape[1]}"
        return f"{channels}, modes={self.modes}, size={self.size}, transform={self.transform}"


def _mix(x: Tensor, weight: Tensor) -> Tensor:
    """(batch, c_in, kept…), (c_in, c_out, kept…) -> (batch, c_out, kept…)."""
    with torch.autocast(x.device.type, enabled=False):  # coefficients of long signals overflow half precision
        return torch.einsum("bi...,io...->bo...", x, weight)


def _lowest(x: Tensor, kept: tuple[int, ...], *, mirrored: bool) -> Tensor:
    """The lowest coefficients of each axis of the grid; ``mirrored``: also the negative ones, but for the last axis."""
    for axis, k in enumerate(kept, start=2):
        if mirrored and axis < x.dim() - 1:
            x = torch.cat([x.narrow(axis, 0, k // 2), x.narrow(axis, x.shape[axis] - k // 2, k // 2)], dim=axis)
        else:
            x = x.narrow(axis, 0, k)
    return x


def _among_zeros(x: Tensor, grid: tuple[int, ...], *, mirrored: bool) -> Tensor:
    """Put the lowest coefficients back into a spectrum of zeros."""
    for axis, n in enumerate(grid, start=2):
        k = x.shape[axis]
        zeros = x.new_zeros([n - k if a == axis else s for a, s in enumerate(x.shape)])
        if mirrored and axis < x.dim() - 1:
            x = torch.cat([x.narrow(axis, 0, k // 2), zeros, x.narrow(axis, k // 2, k // 2)], dim=axis)
        else:
            x = torch.cat([x, zeros], dim=axis)
    return x


METHODS = (
    InitMethod(
        name="spectral_variance_preserving",
        family="init",
        config=SpectralVariancePreserving,
        summary="Weights of truncated spectral layers drawn so that the field keeps its variance.",
        goal="train",
        paper="transform-once",
        function=spectral_variance_preserving_,
        trial=lambda: SpectralConv(4, 4, modes=5, size=16),
        apply=lambda model, generator, **parameters: spectral_variance_preserving_(
            plain_parameter(model), model.size, generator=generator, **parameters
        ),
        checked_by=("closed form",),
    ),
    LayerMethod(
        name="spectral_conv",
        family="init",
        config=SpectralConvConfig,
        layer=SpectralConv,
        axis=1,
        space=1,
        trial={"modes": 2, "size": 3},
        starts_as=WHITE_NOISE,
        summary="A matrix for each of the lowest frequencies of a field, by cosine or Fourier transform.",
        goal="train",
        paper="transform-once",
        checked_by=("closed form", "scipy"),
    ),
)
