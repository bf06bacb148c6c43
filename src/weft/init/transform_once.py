"""Learn maps between fields in the low frequencies: one cosine transform, the whole network there, one transform back.

Transform Once, Poli et al., arXiv:2211.14453 (2022).

    X = DCT(field and coordinates)[: m]          Z⁰ = lift X
    Zˡ⁺¹ = Zˡ + S (act(W Zˡ))                    W: a matrix over channels for each frequency, S: over frequencies for each channel
    Y = H₂ sin(H₁ Z)                             out = DCT⁻¹(Y and zeros)

X: (batch, c_in, m…), Z: (batch, width, m…), W: (width, width, m…), S: one (width, m_j, m_j) for each axis j of the grid.
W of the first layer has the variance-preserving law N / (width · m) of :mod:`weft.init.spectral`, which makes up for the
frequencies that are left out; nothing is left out after it, so all other W have 1 / width, and S has 1 / m_j.

Differences from the paper and its code: the code may apply the first law in every layer, where it multiplies the
latent variance by N / m each time, and its 1-D layer does not run. Frequencies above m are cut off before the first
layer instead of being carried as zeros, and the lift, being linear, comes after the transform, so that few channels are
transformed; both leave the function as it is. Coordinates are those of cell centres, (n + 1/2) / N, as in the cosine
transform. Only the last map of the head starts near zero; the code starts both at 1e-8, where gradients are as small as
Adam's ε. Coefficients are scaled to the grid of training, so that a model may be used on another grid.
Complexity: O(N log N) once for c_in and once for c_out channels, then O(m width (width + Σ m_j)) a layer. Re-implemented
from the equations (official code: no licence).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from weft.errors import RecipeError, ShapeError
from weft.function.layer import WHITE_NOISE, LayerMethod
from weft.init.cosine import dct, idct
from weft.init.spectral import spectral_variance_preserving_
from weft.method import parameter

_ACTIVATIONS = {"sin": torch.sin, "gelu": functional.gelu}
_NEAR_ZERO = 1e-8  # the head's start; not zero, so that the layers below have a gradient


@dataclass(frozen=True)
class TransformOnceLayerConfig:
    """A residual layer on coefficients.

    >>> TransformOnceLayerConfig(modes=(8, 8)).build(4).channel_mixing.shape
    torch.Size([4, 4, 8, 8])
    """

    modes: int | tuple[int, ...] = parameter(16, "frequencies that it mixes, for each axis", minimum=1)
    activation: str = parameter("sin", "between the two mixings", choices=tuple(_ACTIVATIONS))
    residual: bool = parameter(True, "add the input")
    keep_high: bool = parameter(False, "pass higher frequencies through instead of setting them to zero")

    def build(self, features: int) -> nn.Module:
        """The layer."""
        return TransformOnceLayer(features, **asdict(self))


class TransformOnceLayer(nn.Module):
    """Mixes channels at each frequency, then frequencies in each channel.

    Args:
        width: channels.
        modes: frequencies that it mixes, for each axis.
        activation: "sin" or "gelu", between the two.
        residual: add the input.
        keep_high: pass higher frequencies through instead of setting them to zero.

    Raises:
        RecipeError: no modes, or an unknown activation.

    Source: arXiv:2211.14453, section 3.

    >>> TransformOnceLayer(2, modes=4)(torch.ones(1, 2, 6)).shape
    torch.Size([1, 2, 6])
    """

    def __init__(
        self,
        width: int,
        modes: int | Sequence[int] = 16,
        *,
        activation: str = "sin",
        residual: bool = True,
        keep_high: bool = False,
    ):
        super().__init__()
        self.width = width
        self.modes = (modes,) if isinstance(modes, int) else tuple(modes)
        if min(self.modes, default=0) < 1 or activation not in _ACTIVATIONS:
            raise RecipeError(
                f"Modes are at least 1 on each axis, the activation is one of {', '.join(_ACTIVATIONS)}; got "
                f"modes={modes!r}, activation={activation!r}."
            )
        self.activation = activation
        self.residual = residual
        self.keep_high = keep_high
        self.channel_mixing = nn.Parameter(torch.randn(width, width, *self.modes) / math.sqrt(width))
        self.frequency_mixing = nn.ParameterList(torch.randn(width, m, m) / math.sqrt(m) for m in self.modes)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, width, coefficients…) -> the same shape."""
        _check(x, self.width, self.modes, "TransformOnceLayer")
        low = _low(x, self.modes)
        z = _ACTIVATIONS[self.activation](torch.einsum("bi...,io...->bo...", low, self.channel_mixing))
        for axis, mixing in enumerate(self.frequency_mixing, start=2):
            z = torch.einsum("bc...i,cji->bc...j", z.movedim(axis, -1), mixing).movedim(-1, axis)
        if self.residual:
            z = z + low
        z = z.to(x.dtype)
        for axis in reversed(range(2, x.dim())):  # what lies above, axis by axis
            if z.shape[axis] < x.shape[axis]:
                rest = _low(x, self.modes[: axis - 2]).narrow(axis, z.shape[axis], x.shape[axis] - z.shape[axis])
                z = torch.cat([z, rest if self.keep_high else torch.zeros_like(rest)], dim=axis)
        return z

    def extra_repr(self) -> str:
        """What ``print`` shows."""
        return f"{self.width}, modes={self.modes}, activation={self.activation}"


class TransformOnce(nn.Module):
    """A neural operator that transforms once.

    Args:
        in_channels, out_channels: of the fields.
        size: points of the training grid, for each axis.
        modes: kept frequencies, for each axis; :func:`weft.init.select_modes` chooses them.
        width: channels inside.
        layers: how many.
        head_width: channels between the two maps of the head.
        activation: "sin" or "gelu".
        residual: layers add their input.
        variance_preserving: start the first layer by the variance-preserving law; else like the others.
        inverse: return a field; else its lowest coefficients, to compare with ``dct`` of the target.

    Raises:
        RecipeError: modes and size do not fit.

    Source: arXiv:2211.14453.

    >>> model = TransformOnce(1, 2, size=64, modes=8, width=6, layers=2)
    >>> model(torch.ones(3, 1, 64)).shape, model(torch.ones(3, 1, 100)).shape
    (torch.Size([3, 2, 64]), torch.Size([3, 2, 100]))
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        size: int | Sequence[int],
        modes: int | Sequence[int],
        *,
        width: int = 48,
        layers: int = 4,
        head_width: int = 128,
        activation: str = "sin",
        residual: bool = True,
        variance_preserving: bool = True,
        inverse: bool = True,
    ):
        super().__init__()
        self.in_channels = in_channels
        self.size = (size,) if isinstance(size, int) else tuple(size)
        self.modes = (modes,) if isinstance(modes, int) else tuple(modes)
        if len(self.size) != len(self.modes) or any(not 1 <= m <= n for m, n in zip(self.modes, self.size)):
            raise RecipeError(f"Each axis keeps between 1 and all of its frequencies; got {modes=}, {size=}.")
        self.inverse = inverse
        # the field, its coordinates and a constant, which is the lift's bias
        self.lift = nn.Linear(in_channels + len(self.size) + 1, width, bias=False)
        self.layers = nn.Sequential(
            *(TransformOnceLayer(width, self.modes, activation=activation, residual=residual) for _ in range(layers))
        )
        if variance_preserving and layers:
            spectral_variance_preserving_(self.layers[0].channel_mixing, self.size)
        self.head = nn.Linear(width, head_width, bias=False)
        self.out = nn.Linear(head_width, out_channels, bias=False)
        nn.init.normal_(self.head.weight, std=1 / math.sqrt(width))
        nn.init.normal_(self.out.weight, std=_NEAR_ZERO)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, c_in, grid…) -> (batch, c_out, grid…), or (batch, c_out, modes…) without the inverse."""
        _check(x, self.in_channels, self.modes, "TransformOnce")
        grid, axes = x.shape[2:], tuple(range(2, x.dim()))
        # a field on twice the points has coefficients larger by √2
        scale = math.sqrt(math.prod(grid) / math.prod(self.size))
        place = _low(dct(_coordinates(x), axes), self.modes).expand(len(x), *[-1] * (x.dim() - 1))
        z = torch.cat([_low(dct(x, axes), self.modes), place], dim=1) / scale
        z = self.layers(self.lift(z.movedim(1, -1)).movedim(-1, 1))
        z = self.out(torch.sin(self.head(z.movedim(1, -1)))).movedim(-1, 1) * scale
        if not self.inverse:
            return z
        for axis, n in enumerate(grid, start=2):
            z = torch.cat([z, z.new_zeros([n - s if a == axis else s for a, s in enumerate(z.shape)])], dim=axis)
        return idct(z, axes)


def _check(x: Tensor, channels: int, modes: tuple[int, ...], owner: str) -> None:
    if x.dim() != 2 + len(modes) or x.shape[1] != channels or any(n < m for n, m in zip(x.shape[2:], modes)):
        raise ShapeError(
            f"{owner} works on (batch, {channels}, …) with at least {list(modes)} points on the axes of the grid and got "
            f"an input of shape {list(x.shape)}; build it for that, or keep fewer modes."
        )


def _low(x: Tensor, modes: Sequence[int]) -> Tensor:
    for axis, m in enumerate(modes, start=2):
        x = x.narrow(axis, 0, m)
    return x


def _coordinates(x: Tensor) -> Tensor:
    """Coordinates of cell centres in (0, 1) and a one: (1, axes + 1, grid…)."""
    lines = [(torch.arange(n, dtype=x.dtype, device=x.device) + 0.5) / n for n in x.shape[2:]]
    planes = torch.meshgrid(*lines, indexing="ij")
    return torch.stack([*planes, torch.ones_like(planes[0])]).unsqueeze(0)


METHODS = (
    LayerMethod(
        name="transform_once",
        family="init",
        config=TransformOnceLayerConfig,
        layer=TransformOnceLayer,
        axis=1,
        space=1,
        trial={"modes": 3},
        starts_as=WHITE_NOISE,
        # 1 + E sin²(z) with six channels, where z is normal with variance χ²₆ / 6; for many channels 1 + (1 − e⁻²) / 2
        start_gain=1 + (1 - (1 + 4 / 6) ** -3) / 2,
        summary="A residual layer on cosine coefficients: mixes channels, then frequencies.",
        goal="train",
        paper="transform-once",
        checked_by=("closed form", "brute force"),
    ),
)
