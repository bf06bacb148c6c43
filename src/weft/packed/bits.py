"""Integers of few bits, side by side in words of 32 bits.

A row of n codes of b bits is a stream of n · b bits, filled up to whole words: code j takes the bits j · b to
(j + 1) · b − 1, the lowest first, and may lie across two words. It is the order of compressed-tensors' ``pack-quantized``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from weft.errors import CheckpointError, RecipeError

WORD = 32


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Codes in as few words as hold them.

    Args:
        codes: (rows, n) integers from 0 to 2ᵇⁱᵗˢ − 1.
        bits: of a code, 1 to 16.

    Returns:
        (rows, ⌈n · bits / 32⌉) int32.

    Raises:
        RecipeError: a code does not fit, or there are no such bits.

    >>> [f"{word & 0xFFFFFFFF:08x}" for word in pack_bits(torch.tensor([[1, 2, 3, 15, 0, 0, 0, 8]]), 4)[0].tolist()]
    ['8000f321']
    """
    _check_bits(bits)
    if codes.dim() != 2 or codes.is_floating_point():
        raise RecipeError(f"Codes are whole numbers (rows, n), got {list(codes.shape)} {codes.dtype}.")
    low, high = (int(t) for t in codes.aminmax()) if codes.numel() else (0, 0)
    if low < 0 or high >= 1 << bits:
        raise RecipeError(f"Codes of {bits} bits are from 0 to {(1 << bits) - 1}, got {low} to {high}.")
    period, words = _period(bits)
    # shifting left in int32 drops what falls off and sets the sign: a word's bits either way
    wide = torch.nn.functional.pad(codes.to(torch.int32), (0, -codes.shape[1] % period)).unflatten(1, (-1, period))
    made = wide.new_zeros((*wide.shape[:2], words))
    for place in range(period):
        word, shift = divmod(place * bits, WORD)
        made[..., word] |= wide[..., place] << shift
        if shift + bits > WORD:
            made[..., word + 1] |= wide[..., place] >> (WORD - shift)
    return made.flatten(1)[:, : -(-codes.shape[1] * bits // WORD)].contiguous()


def unpack_bits(words: Tensor, bits: int, count: int) -> Tensor:
    """What :func:`pack_bits` packed.

    Args:
        words: (rows, ⌈count · bits / 32⌉) int32.
        bits: of a code.
        count: codes in a row.

    Returns:
        (rows, count): uint8 up to 8 bits, else int32.

    Raises:
        CheckpointError: there are more or fewer words.

    >>> unpack_bits(pack_bits(torch.tensor([[5, 0, 7]]), 3), 3, 3).tolist()
    [[5, 0, 7]]
    """
    _check_bits(bits)
    expected = -(-count * bits // WORD)
    if words.dim() != 2 or words.dtype != torch.int32 or words.shape[1] != expected:
        raise CheckpointError(
            f"{count} codes of {bits} bits are {expected} words of int32 a row, got {list(words.shape)} {words.dtype}."
        )
    period, size = _period(bits)
    dtype = torch.uint8 if bits <= 8 else torch.int32
    mask = (1 << bits) - 1
    wide = torch.nn.functional.pad(words, (0, -words.shape[1] % size)).unflatten(1, (-1, size))
    made = torch.empty((*wide.shape[:2], period), dtype=dtype, device=words.device)
    for place in range(period):
        word, shift = divmod(place * bits, WORD)
        # of int32, shifting right repeats the sign: what lies above the code is masked away
        low = wide[..., word] >> shift
        if shift + bits > WORD:
            low = (low & ((1 << (WORD - shift)) - 1)) | (wide[..., word + 1] << (WORD - shift))
        made[..., place] = (low & mask).to(dtype)
    return made.flatten(1)[:, :count].contiguous()


def packed_bytes(rows: int, count: int, bits: int) -> int:
    """Bytes of the words that :func:`pack_bits` makes.

    Args:
        rows, count: of the codes.
        bits: of a code.

    >>> packed_bytes(2, 9, 4), pack_bits(torch.zeros(2, 9, dtype=torch.int32), 4).nbytes
    (16, 16)
    """
    return rows * -(-count * bits // WORD) * (WORD // 8)


def _period(bits: int) -> tuple[int, int]:
    """After how many codes, and words, a code begins with a word again."""
    for period in (1, 2, 4, 8, 16, 32):
        if period * bits % WORD == 0:
            return period, period * bits // WORD
    raise AssertionError(bits)


def _check_bits(bits: int) -> None:
    if not 1 <= bits <= 16:
        raise RecipeError(f"Codes have 1 to 16 bits, got {bits}.")


def bytes_of(*tensors: Tensor | None) -> int:
    """Bytes of those tensors that there are.

    >>> bytes_of(torch.ones(3), None)
    12
    """
    return sum(t.nbytes for t in tensors if t is not None)


def check(holds: bool, why: str) -> None:
    """What forms say of tensors and facts that do not fit together.

    Raises:
        CheckpointError: it does not hold.
    """
    if not holds:
        raise CheckpointError(f"A packed weight is damaged: {why}.")
