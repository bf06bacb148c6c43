"""Codes of few bits in words: the stream is one large whole number, taken apart with Python's own arithmetic."""

import pytest
import torch

from weft.errors import CheckpointError, RecipeError
from weft.packed import pack_bits, unpack_bits


def stream(codes: list[int], bits: int) -> list[int]:
    """The words of a row, from one whole number of as many bits as it takes."""
    number = sum(code << (place * bits) for place, code in enumerate(codes))
    words = -(-len(codes) * bits // 32)
    return [number >> (32 * word) & 0xFFFFFFFF for word in range(words)]


@pytest.mark.parametrize("bits", range(1, 17))
def test_words_are_one_stream_of_bits(bits: int) -> None:
    generator = torch.Generator().manual_seed(bits)
    for count in (1, 2, 31, 32, 33, 63, 64, 65, 97):
        codes = torch.randint(0, 1 << bits, (3, count), generator=generator)
        codes[0] = (1 << bits) - 1  # all ones: words with the sign bit set
        words = pack_bits(codes, bits)
        assert words.dtype == torch.int32
        assert [[w & 0xFFFFFFFF for w in row] for row in words.tolist()] == [stream(r, bits) for r in codes.tolist()]
        back = unpack_bits(words, bits, count)
        assert back.dtype == (torch.uint8 if bits <= 8 else torch.int32)
        assert torch.equal(back.long(), codes)


def test_codes_that_do_not_fit_are_refused() -> None:
    for codes in ([[8]], [[-1]]):
        with pytest.raises(RecipeError, match="Codes of 3 bits are from 0 to 7"):
            pack_bits(torch.tensor(codes), 3)
    with pytest.raises(RecipeError, match="whole numbers"):
        pack_bits(torch.tensor([1, 2]), 3)
    with pytest.raises(RecipeError, match="whole numbers"):
        pack_bits(torch.tensor([[1.0]]), 3)
    for bits in (0, 17):
        with pytest.raises(RecipeError, match="1 to 16 bits"):
            pack_bits(torch.tensor([[1]]), bits)
    with pytest.raises(CheckpointError, match="11 codes of 3 bits are 2 words"):
        unpack_bits(torch.zeros(2, 1, dtype=torch.int32), 3, 11)
    with pytest.raises(CheckpointError, match="int64"):
        unpack_bits(torch.zeros(2, 2, dtype=torch.int64), 3, 11)


def test_rows_without_codes_have_no_words() -> None:
    assert pack_bits(torch.zeros(2, 0, dtype=torch.int64), 5).shape == (2, 0)
    assert unpack_bits(torch.zeros(2, 0, dtype=torch.int32), 5, 0).shape == (2, 0)
