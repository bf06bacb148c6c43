"""Packed weights as blocks of GGUF, bit for bit, and back.

A block of Q4_0 or Q8_0 is a float16 scale and 32 whole numbers, −8 … 7 or −128 … 127. An :class:`Affine` says the same where
its groups are multiples of 32 columns, its scales float16 numbers, and codes less zero points in that range. What GPTQ or
any other method rounded to such a grid is then exported as it is and not rounded again.
"""

from __future__ import annotations

import numpy as np
import torch

from weft.checkpoint.gguf_blocks import GGMLType, ggml_type, join_q4_0, join_q8_0
from weft.errors import CheckpointError
from weft.packed.form import Packed
from weft.packed.forms import Affine

BLOCK = 32
_RANGES = (("Q4_0", -8, 7), ("Q8_0", -128, 127))


def to_blocks(packed: Packed) -> tuple[GGMLType, np.ndarray] | None:
    """The blocks that stand for exactly the same matrix.

    Args:
        packed: a weight (out, in).

    Returns:
        The type, and the bytes of each row (out, bytes) uint8; None if no type of GGUF says the matrix exactly.

    >>> codes = torch.arange(-8, 8, dtype=torch.int16).repeat(2)[None]
    >>> made = to_blocks(Affine(codes, torch.tensor([[0.5]]), torch.tensor([[0.0]]), 4, -8))
    >>> made[0].name, made[1].shape
    ('Q4_0', (1, 18))
    """
    if not isinstance(packed, Affine) or packed.group_size % BLOCK:
        return None
    scale = packed.scale.detach().cpu().float()
    half = scale.half()
    zero = packed.zero.detach().cpu().double()
    exact = bool((half.float() == scale).all()) and bool(torch.isfinite(half).all())
    if not exact or not bool((zero == zero.round()).all()):
        return None
    rows, columns = packed.shape
    codes = packed.codes.cpu().long().unflatten(1, (scale.shape[1], -1)) - zero.long().unsqueeze(-1)
    codes = codes.reshape(-1, BLOCK)
    scales = half.repeat_interleave(packed.group_size // BLOCK, 1).reshape(-1, 1).numpy()
    low, high = (int(codes.min()), int(codes.max())) if codes.numel() else (0, 0)
    for name, least, most in _RANGES:
        if least <= low and high <= most and (packed.bits <= 4 or name == "Q8_0"):
            if name == "Q4_0":
                blocks = join_q4_0((codes + 8).numpy().astype(np.uint8), scales)
            else:
                blocks = join_q8_0(codes.numpy().astype(np.int8), scales)
            return ggml_type(name), blocks.reshape(rows, columns // BLOCK * ggml_type(name).nbytes)
    return None


def from_blocks(kind: GGMLType, rows: np.ndarray) -> Affine:
    """A matrix of Q4_0 or Q8_0 as packed weights.

    Args:
        kind: the type.
        rows: the bytes of each row, (out, bytes) uint8.

    Returns:
        Codes, and scales as float16, in groups of 32.

    Raises:
        CheckpointError: the type is another.

    >>> kind, rows = to_blocks(Affine(torch.ones(1, 32, dtype=torch.int16), torch.ones(1, 1), torch.zeros(1, 1), 8, -128))
    >>> kind.name, float(from_blocks(kind, rows).dequantize().sum())
    ('Q8_0', 32.0)
    """
    if kind.name not in ("Q4_0", "Q8_0"):
        raise CheckpointError(f"Packed weights come from Q4_0 and Q8_0, not {kind.name}.")
    blocks = np.ascontiguousarray(rows).reshape(-1, kind.nbytes)
    scale = torch.from_numpy(blocks[:, :2].copy().view(np.float16).reshape(len(rows), -1))
    if kind.name == "Q4_0":
        codes = np.concatenate([blocks[:, 2:] & 15, blocks[:, 2:] >> 4], axis=1).astype(np.int16) - 8
        bits, low = 4, -8
    else:
        codes, bits, low = blocks[:, 2:].view(np.int8).astype(np.int16), 8, -128
    return Affine(torch.from_numpy(codes.reshape(len(rows), -1)), scale, torch.zeros_like(scale), bits, low)
