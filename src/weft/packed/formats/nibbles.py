"""Two codes of four bits in a byte: the order of floating-point formats, and that of bitsandbytes."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def pack_low_first(codes: Tensor) -> Tensor:
    """(…, n) codes, n even -> (…, n / 2) bytes, the earlier code in the low half.

    >>> pack_low_first(torch.tensor([1, 2], dtype=torch.uint8)).tolist()
    [33]
    """
    pairs = codes.to(torch.uint8).unflatten(-1, (-1, 2))
    return pairs[..., 0] | pairs[..., 1] << 4


def unpack_low_first(packed: Tensor) -> Tensor:
    """What :func:`pack_low_first` packed.

    >>> unpack_low_first(torch.tensor([33], dtype=torch.uint8)).tolist()
    [1, 2]
    """
    return torch.stack([packed & 15, packed >> 4], -1).flatten(-2)


def pack_high_first(codes: Tensor) -> Tensor:
    """All codes -> (⌈codes / 2⌉,) bytes, the earlier code in the high half.

    >>> pack_high_first(torch.tensor([1, 2, 15], dtype=torch.uint8)).tolist()
    [18, 240]
    """
    flat = functional.pad(codes.to(torch.uint8).flatten(), (0, codes.numel() % 2)).unflatten(0, (-1, 2))
    return flat[:, 0] << 4 | flat[:, 1]


def unpack_high_first(packed: Tensor, count: int) -> Tensor:
    """(count,) codes that :func:`pack_high_first` packed.

    >>> unpack_high_first(torch.tensor([18, 240], dtype=torch.uint8), 3).tolist()
    [1, 2, 15]
    """
    flat = packed.flatten()
    return torch.stack([flat >> 4, flat & 15], -1).flatten()[:count]
