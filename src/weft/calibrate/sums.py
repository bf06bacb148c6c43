"""Sums over the inputs of a layer, for one batch: products, sizes, histograms, patches of convolutions."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from weft.errors import RecipeError

BINS = 1 << 16
PANEL = 512  # rows of a product that are made at a time: those below the diagonal are not made, and for memory
_ROWS = 8192  # of one product: a float32 copy of more rows would cost more memory than it saves time


def gram(x: Tensor) -> Tensor:
    """Σ xᵀx over the rows of a batch.

    Args:
        x: (…, rows, channels), of any floating type.

    Returns:
        (…, channels, channels) float64; see :func:`add_gram`.

    >>> gram(torch.tensor([[1.0, 2.0], [3.0, 4.0]])).tolist()
    [[10.0, 14.0], [14.0, 20.0]]
    """
    total = x.new_zeros((*x.shape[:-2], x.shape[-1], x.shape[-1]), dtype=torch.float64)
    return mirrored(add_gram(x, total))


def add_gram(x: Tensor, total: Tensor) -> Tensor:
    """Add Σ xᵀx, on and above the diagonal; what is below is made by :func:`mirrored` in the end.

    Products of up to 8,192 rows are made in float32 (of float64 inputs: in float64). Of numbers in bfloat16 they are made by
    its instructions, which round nothing on the way into float32. So are they under autocast, where a layer multiplies its
    inputs after rounding them to bfloat16: these are counted then.

    Args:
        x: (…, rows, channels), of any floating type.
        total: (…, channels, channels) float64, changed in place.

    >>> add_gram(torch.tensor([[1.0, 2.0]]), torch.zeros(2, 2, dtype=torch.float64))[0].tolist()
    [1.0, 2.0]
    """
    on_cpu = x.device.type == "cpu"
    rounded = on_cpu and torch.is_autocast_enabled("cpu") and x.dtype != torch.float64
    exact = on_cpu and (rounded or x.dtype == torch.bfloat16)
    with torch.autocast("cpu", enabled=False), bfloat16_products() if exact else contextlib.nullcontext():
        for rows in x.split(_ROWS, dim=-2):
            part = wide(rows.bfloat16() if rounded else rows)
            for start in range(0, x.shape[-1], PANEL):
                total[..., start : start + PANEL, start:] += part[..., start : start + PANEL].mT @ part[..., start:]
    return total


def mirrored(total: Tensor) -> Tensor:
    """A symmetric matrix of which only the part on and above the diagonal is known, completed in place.

    >>> mirrored(torch.tensor([[1.0, 2.0], [0.0, 3.0]])).tolist()
    [[1.0, 2.0], [2.0, 3.0]]
    """
    for start in range(0, total.shape[-1], PANEL):
        rows = slice(start, start + PANEL)
        total[..., start + PANEL :, rows] = total[..., rows, start + PANEL :].mT
        corner = total[..., rows, rows].triu()
        total[..., rows, rows] = corner + corner.mT - torch.diag_embed(corner.diagonal(dim1=-2, dim2=-1))
    return total


@contextlib.contextmanager
def bfloat16_products() -> Iterator[None]:
    """While it lasts, matrix products of float32 tensors on the CPU round factors to bfloat16; sums stay in float32.

    Nothing changes on processors without instructions for that.
    """
    settings = torch.backends.mkldnn.matmul
    before = settings.fp32_precision
    settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before


def absolute_sums(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Σ|x|, max|x| and Σx² for each channel of a batch.

    Args:
        x: (rows, channels), with at least one row.

    Returns:
        Three of (channels,): float64, float32 (float64 for float64), float64.

    >>> [s.tolist() for s in absolute_sums(torch.tensor([[1.0, -2.0], [-3.0, 1.0]]))]
    [[4.0, 3.0], [3.0, 2.0], [10.0, 5.0]]
    """
    sizes = wide(x).abs()
    return sizes.sum(0, dtype=torch.float64), sizes.amax(0), sizes.square().sum(0, dtype=torch.float64)


def histogram(x: Tensor) -> Tensor:
    """How many values of a batch have which 16 high bits as float32: sign, exponent and 7 bits of the fraction.

    Args:
        x: any shape.

    Returns:
        (65,536,) int64, in the order of the bits.

    >>> int(histogram(torch.tensor([1.0, 1.001, -2.0])).max())
    2
    """
    bits = x.float().flatten().contiguous().view(torch.int32) >> 16
    return torch.bincount(bits & (BINS - 1), minlength=BINS)


def percentile(counts: Tensor, share: float) -> float:
    """The value below which at least ``share`` of all values lie, from a :func:`histogram`.

    The nearest-rank percentile, with its fraction cut to 7 bits: closer to zero than the exact one by less than 1/128 of
    it, and exact for values in bfloat16.

    Args:
        counts: (65,536,).
        share: from 0 (the smallest value) to 1 (the largest).

    Raises:
        RecipeError: nothing was counted, or ``share`` is no share.

    >>> percentile(histogram(torch.arange(1.0, 101.0)), 0.5)
    50.0
    """
    if not 0 <= share <= 1:
        raise RecipeError(f"share must be from 0 to 1, got {share!r}; the median is 0.5.")
    total = int(counts.sum())
    if not total:
        raise RecipeError("There are no percentiles of no values.")
    half = BINS // 2
    ordered = torch.cat([counts[half:].flip(0), counts[:half]]).cumsum(0)  # negative values have the highest bits
    rank = max(1, -(-int(share * total * 2**20) // 2**20))  # without the last bits, where 0.07 * 100 is above 7
    place = int(torch.searchsorted(ordered, rank))
    bits = BINS - 1 - place if place < half else place - half
    return (torch.tensor(bits, dtype=torch.int32) << 16).view(torch.float32).item()


def patches(x: Tensor, layer: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> Tensor:
    """What a convolution multiplies its matrix by: one row for each place of its output.

    Args:
        x: (batch, channels, …), the layer's input.
        layer: the convolution; its stride, padding, dilation and groups count.

    Returns:
        (rows, groups · n) with n = channels / groups · kernel size; ``rows @ layer.weight.flatten(1).T`` is the output
        without bias of a layer with one group.

    >>> layer = nn.Conv2d(2, 3, 3, padding=1, bias=False)
    >>> x = torch.randn(1, 2, 4, 4)
    >>> out = patches(x, layer) @ layer.weight.flatten(1).T
    >>> torch.allclose(out, layer(x).movedim(1, -1).reshape(-1, 3), atol=1e-5)
    True
    """
    padding: Any = layer._reversed_padding_repeated_twice
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    x = functional.pad(x, padding, mode=mode)
    axes = len(layer.kernel_size)
    for axis, (size, step, gap) in enumerate(zip(layer.kernel_size, layer.stride, layer.dilation), 2):
        x = x.unfold(axis, gap * (size - 1) + 1, step)[..., ::gap]  # the window becomes the last axis
    order = (0, *range(2, 2 + axes), 1, *range(2 + axes, 2 + 2 * axes))
    return x.permute(order).flatten(0, axes).flatten(1)


def wide(x: Tensor) -> Tensor:
    """In float32, or float64 if it is that."""
    return x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
