"""weft.engine.rank against sorting: exact, signed, any chunking, any number of threads."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import weft.engine.chunks as chunks
from weft.checkpoint.memory import from_mapping
from weft.engine.chunks import Inputs, Scan, ThreadWorkspaces
from weft.engine.rank import ranked


def scan_of(*tensors, executor=None):
    """A scan over tensors (models, …), one output tensor each."""
    inputs = [Inputs("w", [from_mapping({"w": m})["w"] for m in t], index=i) for i, t in enumerate(tensors)]
    return Scan(inputs, ThreadWorkspaces(), executor=executor)


def samples():
    rng = np.random.default_rng(0)
    wide = rng.standard_normal((2, 301)) * 10.0 ** rng.integers(-44, 38, (2, 301))
    return {
        "normal": rng.standard_normal((2, 301)),
        "every magnitude, subnormal too": wide,
        "few values": rng.integers(-2, 3, (2, 301)),
        "all equal": np.full((2, 301), -1.5),
        "zeros of both signs": np.where(rng.random((2, 301)) < 0.5, 0.0, -0.0),
        "one bucket": 1 + rng.random((2, 301)) * 2**-9,
    }


@pytest.mark.parametrize("kind", samples())
@pytest.mark.parametrize("size", [4, 64, 1 << 17])
def test_equals_sorting(kind, size, monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK", size)
    values = samples()[kind].astype(np.float32)
    parts = [values[:, :100].reshape(2, 20, 5), values[:, 100:101], values[:, 101:]]
    wanted = [(1, 2, 150, 301, 150), (301, 7)]
    found = ranked(scan_of(*parts), wanted, lambda chunk: chunk.tensors)
    for row, ranks, got in zip(values, wanted, found):
        expected = np.sort(row)[::-1]
        assert got == tuple(float(expected[r - 1]) for r in ranks)


def test_one_number():
    assert ranked(scan_of(np.float32([[-3.5]])), [(1, 1)], lambda chunk: chunk.tensors) == [(-3.5, -3.5)]


def test_threads_count_each_number_once():
    tensors = [np.random.default_rng(i).standard_normal((1, 997)).astype(np.float32) for i in range(20)]
    ranks = [(1, 40, 9970, 19_940)]
    with ThreadPoolExecutor(4) as pool:
        found = ranked(scan_of(*tensors, executor=pool), ranks, lambda chunk: chunk.tensors)
    expected = np.sort(np.concatenate(tensors, axis=1)[0])[::-1]
    assert found == [tuple(float(expected[r - 1]) for r in ranks[0])]


def test_a_measure_may_have_other_rows_than_models():
    values = np.random.default_rng(3).standard_normal((3, 50)).astype(np.float32)
    found = ranked(scan_of(values), [(1,)], lambda chunk: -np.abs(chunk.tensors).sum(0, keepdims=True))
    assert found == [(float(np.max(-np.abs(values).sum(0))),)]
