"""Cosine transforms, which see no jump where a field ends at a wall, and how many frequencies fields need.

The transform of Transform Once, Poli et al., arXiv:2211.14453 (2022).

    X_k = √((2 − [k = 0]) / N) Σₙ xₙ cos(π (2n + 1) k / 2N)     orthonormal, type II; its inverse is its transpose
    rest(m) = Σ_{k ≥ m} |Y_k|² / Σ_k |Y_k|²                     what m frequencies leave out of targets, by Parseval

Differences from the paper and its code: half of a Fourier transform is computed, since the other half of the spectrum
of real numbers is its mirror image. With two axes or more, modes are the box of fewest coefficients that holds enough.
Complexity: O(N log N) a line, through one Fourier transform of N real numbers (Makhoul's order: even places forwards,
odd ones backwards). Re-implemented from the equations (official code: no licence).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from weft.errors import NonFiniteError, RecipeError


def dct(x: Tensor, dim: int | Sequence[int] = -1) -> Tensor:
    """Orthonormal cosine transform of type II along one axis, or along several one after another.

    Args:
        x: real, floating point, any shape; half precision is transformed in float32.
        dim: the axis or axes.

    Returns:
        Coefficients, of the same shape and dtype.

    Raises:
        RecipeError: x is not floating point, or an axis is missing or empty.

    Source: arXiv:2211.14453; equal to ``scipy.fft.dctn(x, norm="ortho")``.

    >>> bool((dct(torch.ones(4)) - torch.tensor([2.0, 0.0, 0.0, 0.0])).abs().max() < 1e-6)
    True
    """
    for axis in _axes(x, dim):
        x = _dct(x, axis)
    return x


def idct(x: Tensor, dim: int | Sequence[int] = -1) -> Tensor:
    """The inverse of :func:`dct`, which is its transpose.

    Args:
        x: coefficients, real, floating point.
        dim: the axis or axes.

    Returns:
        Values on the grid, of the same shape and dtype.

    Raises:
        RecipeError: as :func:`dct`.

    Source: arXiv:2211.14453; equal to ``scipy.fft.idctn(x, norm="ortho")``.

    >>> bool((idct(torch.tensor([2.0, 0.0, 0.0, 0.0])) - 1).abs().max() < 1e-6)
    True
    """
    for axis in _axes(x, dim):
        x = _idct(x, axis)
    return x


def _axes(x: Tensor, dim: int | Sequence[int]) -> tuple[int, ...]:
    axes = (dim,) if isinstance(dim, int) else tuple(dim)
    if not x.is_floating_point():
        raise RecipeError(
            f"A cosine transform needs real numbers of floating point, got {x.dtype}; convert them first."
        )
    for axis in axes:
        if not -x.dim() <= axis < x.dim() or x.shape[axis] == 0:
            raise RecipeError(f"There is nothing to transform along axis {axis} of a tensor of shape {list(x.shape)}.")
    return axes


def _twiddle(x: Tensor, n: int) -> Tensor:
    """exp(−iπk / 2N) for k = 0 … N/2."""
    angle = torch.arange(n // 2 + 1, dtype=x.dtype, device=x.device) * (-math.pi / (2 * n))
    return torch.complex(torch.cos(angle), torch.sin(angle))


def _dct(x: Tensor, axis: int) -> Tensor:
    wide = x.movedim(axis, -1).to(torch.promote_types(x.dtype, torch.float32))
    n = wide.shape[-1]
    folded = torch.cat([wide[..., ::2], wide[..., 1::2].flip(-1)], dim=-1)
    z = torch.fft.rfft(folded) * _twiddle(wide, n)
    # the spectrum of real numbers is its own mirror image, so coefficient n − k is in the imaginary part of the k-th
    rest = z.imag[..., 1 : (n + 1) // 2].flip(-1).neg()
    y = torch.cat([z.real[..., :1] * math.sqrt(0.5), z.real[..., 1:], rest], dim=-1) * math.sqrt(2 / n)
    return y.movedim(-1, axis).to(x.dtype)


def _idct(x: Tensor, axis: int) -> Tensor:
    wide = x.movedim(axis, -1).to(torch.promote_types(x.dtype, torch.float32))
    n = wide.shape[-1]
    c = torch.cat([wide[..., :1] * math.sqrt(2), wide[..., 1:]], dim=-1) * math.sqrt(n / 2)
    zero = torch.zeros_like(c[..., :1])
    mirror = torch.cat([zero, c[..., 1:].flip(-1)], dim=-1)[..., : n // 2 + 1]
    folded = torch.fft.irfft(torch.complex(c[..., : n // 2 + 1], -mirror) * _twiddle(wide, n).conj(), n=n)
    half = (n + 1) // 2
    odd = torch.cat([folded[..., half:].flip(-1), zero[..., : n % 2]], dim=-1)
    y = torch.stack([folded[..., :half], odd], dim=-1).flatten(-2)[..., :n]
    return y.movedim(-1, axis).to(x.dtype)


@torch.no_grad()
def select_modes(targets: Tensor, tolerance: float = 1e-3) -> tuple[tuple[int, ...], float]:
    """The fewest low frequencies that hold the targets, before anything is trained.

    What a model that keeps them can never reach is the energy above them, by Parseval's theorem.

    Args:
        targets: (samples, channels, grid…) of training.
        tolerance: share of the squared norm that may be left out.

    Returns:
        Modes for each axis with the smallest product (of equal ones, with the smallest rest), and the share left out.

    Raises:
        RecipeError: no targets or no grid, or the tolerance is not between 0 and 1.
        NonFiniteError: targets hold NaN or infinity.

    Source: arXiv:2211.14453, section on the reduced order.

    >>> wave = torch.cos(math.pi * 3 * (torch.arange(32) + 0.5) / 32)
    >>> select_modes(wave.reshape(1, 1, 32))[0]
    (4,)
    """
    if targets.dim() < 3 or not targets.numel() or not 0 <= tolerance < 1:
        raise RecipeError(
            "Modes are chosen from targets (samples, channels, grid…) with a tolerance from 0 to below 1; got "
            f"{list(targets.shape)} and {tolerance}."
        )
    if not bool(targets.isfinite().all()):
        raise NonFiniteError("Targets hold NaN or infinity, so their energy is not defined; repair the data.")
    axes = tuple(range(2, targets.dim()))
    energy = dct(targets.double(), axes).square().sum((0, 1))
    total = float(energy.sum())
    if total == 0:
        return (1,) * len(axes), 0.0
    above = total - _cumulative(energy)  # entry (i, j) belongs to modes (i + 1, j + 1)
    share = (above / total).clamp_min(0)
    sizes = torch.meshgrid(*(torch.arange(1, n + 1, device=share.device) for n in share.shape), indexing="ij")
    count = torch.stack(sizes).prod(0)
    fits = share <= tolerance + 1e-14 * energy.numel()  # rounding of the sums
    fewest = fits & (count == count[fits].min())
    best = int(torch.where(fewest, share, 2.0).argmin())
    return tuple(int(s.flatten()[best]) for s in sizes), float(share.flatten()[best])


def _cumulative(energy: Tensor) -> Tensor:
    for axis in range(energy.dim()):
        energy = energy.cumsum(axis)
    return energy
