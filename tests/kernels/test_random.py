"""weft.kernels.random: Philox4x32-10 as published, and streams that do not show where they were cut.

All seeds are fixed, so nothing here fails by chance; statistics are held to five standard deviations.
"""

from __future__ import annotations

from itertools import combinations, pairwise

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.kernels.random import Stream, philox_block

MASK = 0xFFFFFFFF
COUNT = 1 << 20


def philox(counter: list[int], key: list[int]) -> list[int]:
    """Ten rounds in plain integers: multiply, exchange, and raise the key by its two constants."""
    x, k = list(counter), list(key)
    for _ in range(10):
        left, right = 0xD2511F53 * x[0], 0xCD9E8D57 * x[2]
        x = [(right >> 32) ^ x[1] ^ k[0], right & MASK, (left >> 32) ^ x[3] ^ k[1], left & MASK]
        k = [(k[0] + 0x9E3779B9) & MASK, (k[1] + 0xBB67AE85) & MASK]
    return x


def reference(seed: int, purpose: str, name: str, start: int, count: int, lane: int) -> np.ndarray:
    """A stream in plain integers: blocks of four numbers, of which the upper 24 bits count."""
    digest = xxhash.xxh3_64_intdigest(f"{seed}\0{purpose}\0{name}".encode())
    words = []
    for block in range(start // 4, (start + count + 3) // 4):
        words += philox([block & MASK, block >> 32, lane, 0], [digest & MASK, digest >> 32])
    return np.array([w >> 8 for w in words[:count]], np.float64) / 2**24


def uniform(seed: int = 0, purpose: str = "dare", name: str = "w", lane: int = 0) -> np.ndarray:
    """A long run of one stream."""
    return Stream(seed, purpose, name).uniform(0, COUNT, lane).astype(np.float64)


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [  # the known answers of Random123
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([MASK] * 4, [MASK] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_known_answers(counter: list[int], key: list[int], answer: list[int]) -> None:
    assert [int(w) for w in philox_block(*(np.uint64(v) for v in counter + key))] == answer
    assert philox(counter, key) == answer


@pytest.mark.parametrize("lane", [0, 1, 7])
@pytest.mark.parametrize("start", [0, 4, 1 << 34, (1 << 34) - 8])  # from 2^34 on, the block number needs two words
def test_a_stream_is_philox_of_its_position(start: int, lane: int) -> None:
    found = Stream(3, "della", "layer.0").uniform(start, 101, lane)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, reference(3, "della", "layer.0", start, 101, lane))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=6), st.integers(0, 9), st.integers(0, 3))
def test_cuts_do_not_show(lengths: list[int], rest: int, lane: int) -> None:
    stream = Stream(0, "dare", "w")
    starts = np.cumsum([0, *(4 * n for n in lengths)])
    counts = [*(b - a for a, b in pairwise(starts)), rest]
    parts = [stream.uniform(int(a), int(n), lane) for a, n in zip(starts, counts)]
    whole = stream.uniform(0, int(starts[-1]) + rest, lane)
    np.testing.assert_array_equal(np.concatenate(parts), whole)


@pytest.mark.parametrize("count", [0, 1, 3, 4, 5, 4096, 4099])
def test_out_is_filled_and_nothing_beyond_it(count: int) -> None:
    buffer = np.full(count + 8, -1, np.float32)
    out = buffer[:count]
    assert Stream(0, "dare", "w").uniform(8, count, 2, out) is out
    np.testing.assert_array_equal(out, reference(0, "dare", "w", 8, count, 2))
    assert (buffer[count:] == -1).all()


@pytest.mark.parametrize("start", [1, 2, 3, 5])
def test_a_start_inside_a_block_is_refused(start: int) -> None:
    with pytest.raises(ValueError, match="multiple of 4"):
        Stream(0, "dare", "w").uniform(start, 4)


def test_numbers_are_multiples_of_two_to_the_minus_24_below_one() -> None:
    numbers = uniform()
    steps = numbers * 2**24
    np.testing.assert_array_equal(steps, np.floor(steps))
    assert numbers.min() >= 0
    assert numbers.max() < 1
    # each of the 24 bits is set half of the time
    bits = (steps.astype(np.int64)[:, None] >> np.arange(24)) & 1
    assert (abs(bits.mean(0) - 0.5) < 5 * 0.5 / COUNT**0.5).all()


@pytest.mark.parametrize("lane", [0, 1])
@pytest.mark.parametrize("seed", [0, 1, 2**63])
def test_numbers_are_uniform(seed: int, lane: int) -> None:
    numbers = uniform(seed, lane=lane)
    assert abs(numbers.mean() - 0.5) < 5 * (1 / 12) ** 0.5 / COUNT**0.5
    assert abs(numbers.var() - 1 / 12) < 5 * (1 / 180) ** 0.5 / COUNT**0.5  # the square's variance is 1/180
    bins = 1024
    observed = np.bincount((numbers * bins).astype(np.int64), minlength=bins)
    chi_square = ((observed - COUNT / bins) ** 2 / (COUNT / bins)).sum()
    assert abs(chi_square - (bins - 1)) < 5 * (2 * (bins - 1)) ** 0.5
    pairs = np.bincount(
        (numbers[::2] * 32).astype(np.int64) * 32 + (numbers[1::2] * 32).astype(np.int64), minlength=bins
    )
    chi_square = ((pairs - COUNT / 2 / bins) ** 2 / (COUNT / 2 / bins)).sum()
    assert abs(chi_square - (bins - 1)) < 5 * (2 * (bins - 1)) ** 0.5


@pytest.mark.parametrize("distance", [1, 2, 3, 4, 5, 1 << 10])
def test_neighbours_are_uncorrelated(distance: int) -> None:
    numbers = uniform() - 0.5
    correlation = 12 * (numbers[:-distance] * numbers[distance:]).mean()
    assert abs(correlation) < 5 / (COUNT - distance) ** 0.5


def test_seeds_purposes_names_and_lanes_are_independent() -> None:
    streams = {
        "plain": uniform(),
        "seed": uniform(seed=1),
        "purpose": uniform(purpose="della"),
        "name": uniform(name="v"),
        "lane 1": uniform(lane=1),
        "lane 2": uniform(lane=2),
        "seed and purpose run together": uniform(seed=0, purpose="", name="dare\0w"),
    }
    for (first, a), (second, b) in combinations(streams.items(), 2):
        correlation = 12 * ((a - 0.5) * (b - 0.5)).mean()
        assert abs(correlation) < 5 / COUNT**0.5, f"{first} and {second}"
        # of 2^20 pairs of 24-bit numbers 2^-4 are equal on average
        assert (a == b).sum() < 5, f"{first} and {second}"


def test_equal_keys_give_equal_streams() -> None:
    np.testing.assert_array_equal(uniform(5, "a", "b"), uniform(5, "a", "b"))
