"""weft.engine.select against sorting: exact counts, ties by lowest index, any chunking."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import weft.engine.chunks as chunks
import weft.engine.select as select
from weft.checkpoint.memory import from_mapping
from weft.engine.chunks import Chunk, Inputs, Scan, ThreadWorkspaces
from weft.engine.select import KEEP_ALL, KEEP_NONE, Threshold, keep, kept, largest

CHUNKS = (4, 64, 1 << 17)


def scan_of(*tensors: np.ndarray, executor: ThreadPoolExecutor | None = None) -> Scan:
    """A scan over tensors (models, …), one output tensor each."""
    inputs = []
    for index, models in enumerate(tensors):
        opened = [from_mapping({"w": m})["w"] for m in models]
        inputs.append(Inputs("w", opened, index=index))
    return Scan(inputs, ThreadWorkspaces(), executor=executor)


def marks(scan: Scan, thresholds: list[Threshold], model: int) -> np.ndarray:
    """Which elements of ``model`` the thresholds keep, all tensors one after another."""

    def visit(chunk: Chunk) -> np.ndarray:
        out = np.empty(chunk.size, np.float32)
        kept(chunk.tensors[model], thresholds[model], chunk.key, out)
        in_place = chunk.tensors[model].copy()
        keep(in_place, in_place, thresholds[model], chunk.key)
        beside = chunk.tensors[model].copy()
        keep(beside, chunk.tensors[model], thresholds[model], chunk.key)
        expected = np.where(out == 1, chunk.tensors[model], np.float32(0))
        np.testing.assert_array_equal(in_place, expected)
        np.testing.assert_array_equal(beside, expected)
        return out

    return np.concatenate(list(scan.collect(visit).values()) or [np.empty(0, np.float32)])


def by_sorting(values: np.ndarray, count: int) -> np.ndarray:
    """1 for the ``count`` largest magnitudes, lowest index first among equals."""
    flat = np.abs(values.reshape(-1).astype(np.float64))
    order = sorted(range(flat.size), key=lambda i: (-flat[i], i))
    result = np.zeros(flat.size, np.float32)
    result[order[: max(count, 0)]] = 1
    return result


def samples() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    wide = rng.standard_normal(301) * 10.0 ** rng.integers(-44, 38, 301)
    return {
        "normal": rng.standard_normal(301).astype(np.float32),
        "few values": rng.integers(-2, 3, 301).astype(np.float32),
        "all equal": np.full(301, -1.5, np.float32),
        "zeros of both signs": np.where(rng.random(301) < 0.5, 0.0, -0.0).astype(np.float32),
        "all magnitudes": wide.astype(np.float32),
        "one low bucket": (1 + np.arange(301) % 7 * 2.0**-23).astype(np.float32),
        "matrix": rng.standard_normal((7, 43)).astype(np.float32),
    }


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("name", samples())
def test_keeps_what_sorting_keeps(name: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "CHUNK", chunk)
    values = samples()[name]
    for count in (-1, 0, 1, 2, 100, 150, 299, 300, 301, 302):
        scan = scan_of(values[None])
        found = marks(scan, largest(scan, [count]), 0)
        np.testing.assert_array_equal(found, by_sorting(values, count))
        assert found.sum() == min(max(count, 0), values.size)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.one_of(st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-45]), st.floats(width=32, allow_nan=False)), max_size=40
    ),
    st.integers(0, 41),
    st.sampled_from(CHUNKS),
)
def test_any_numbers(numbers: list[float], count: int, chunk: int) -> None:
    values = np.nan_to_num(np.asarray(numbers, np.float32))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "CHUNK", chunk)
        scan = scan_of(values[None])
        np.testing.assert_array_equal(marks(scan, largest(scan, [count]), 0), by_sorting(values, count))


@pytest.mark.parametrize("chunk", CHUNKS)
def test_several_tensors_are_one_ranking_in_order(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "CHUNK", chunk)
    rng = np.random.default_rng(1)
    tensors = [rng.integers(-3, 4, (2, size)).astype(np.float32) for size in (5, 130, 1, 64)]
    whole = np.concatenate(tensors, axis=1)
    counts = [77, 20]
    for executor in (None, ThreadPoolExecutor(2)):
        scan = scan_of(*tensors, executor=executor)
        thresholds = largest(scan, counts)
        for model in (0, 1):
            np.testing.assert_array_equal(marks(scan, thresholds, model), by_sorting(whole[model], counts[model]))
        if executor is not None:
            executor.shutdown()


def test_rows_of_any_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "CHUNK", 16)
    rng = np.random.default_rng(2)
    models = rng.standard_normal((2, 100)).astype(np.float32)

    def spread(chunk: Chunk, row: int) -> np.ndarray:
        out = chunk.scratch("spread")
        np.subtract(chunk.tensors[0], chunk.tensors[1], out=out)
        out *= row + 1
        return out

    scan = scan_of(models)
    thresholds = largest(scan, [30, 60, 0], spread)
    expected = np.sort(np.abs(models[0] - models[1]))[::-1]
    assert thresholds[0].value == expected[29]
    assert thresholds[1].value == 2 * expected[59]
    assert thresholds[2] is KEEP_NONE


def test_constants_need_no_pass() -> None:
    scan = scan_of(np.ones((2, 8), np.float32))
    scan.fold = None  # type: ignore[method-assign, assignment]
    assert largest(scan, [8, 0]) == [KEEP_ALL, KEEP_NONE]


def test_nothing_to_choose_from() -> None:
    scan = scan_of(np.empty((1, 0), np.float32))
    assert largest(scan, [0]) == [KEEP_NONE]
    assert marks(scan, [KEEP_NONE], 0).size == 0


def test_quota_names_the_chunks_that_keep_ties() -> None:
    threshold = Threshold(1.0, frozenset({(0, 0)}), (0, 1), 3)
    assert [threshold.quota((0, n)) for n in range(3)] == [-1, 3, 0]
    assert KEEP_ALL.quota((5, 5)) == -1
    assert KEEP_NONE.quota((5, 5)) == 0


@pytest.mark.parametrize("name", sorted(samples()))
@pytest.mark.parametrize("chunk", CHUNKS)
def test_few_and_many_in_the_bucket_agree(name: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The numbers of the threshold's bucket are kept in memory or counted in one more pass: the same result."""
    values = samples()[name].reshape(1, -1)
    monkeypatch.setattr(chunks, "CHUNK", chunk)
    for count in (1, values.size // 3, values.size - 1):
        found = []
        for limit in (0, 1 << 22):
            monkeypatch.setattr(select, "_GATHERED", limit)
            scan = scan_of(values)
            found.append(marks(scan, largest(scan, [count]), 0))
        np.testing.assert_array_equal(found[0], found[1])
