"""Statistics of single tensors against float64 brute force, and what a whole model's report says."""

from __future__ import annotations

import json
import math
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch

import weft
from weft.engine.chunks import CHUNK
from weft.errors import RecipeError
from weft.measure import model_statistics, statistics
from weft.measure.moments import PERCENTILES
from weft.measure.statistics import TensorStatistics

# Sums over a million float64 terms, about a centre that is off by less than a deviation, keep ten digits.
DIGITS = 1e-10
SIXTEEN_BITS = ("bfloat16", "float16", "float8_e4m3fn", "float8_e5m2")
KINDS = (*SIXTEEN_BITS, "float32", "float64")


def sample(shape: tuple[int, ...], kind: str, seed: int = 0) -> torch.Tensor:
    """Heavy tails around a mean that is not zero, with exact zeros."""
    random = np.random.default_rng([len(shape), math.prod(shape), seed])
    values = np.asarray(0.3 + random.standard_t(4, shape))
    values = np.where(random.random(shape) < 0.1, 0.0, values)
    return torch.tensor(values, dtype=torch.float64).to(getattr(torch, kind))


def one(tensor: Any, **options: Any) -> TensorStatistics:
    (row,) = model_statistics({"w": tensor}, **options).tensors
    return row


def check(row: TensorStatistics, tensor: torch.Tensor) -> None:
    """Everything in ``row`` against plain numpy on the same numbers."""
    exact = row.dtype not in ("F32", "F64")
    every = tensor.double().numpy().reshape(-1)
    x = every[np.isfinite(every)]
    assert (row.parameters, row.shape, row.nbytes) == (
        every.size,
        tuple(tensor.shape),
        every.size * tensor.element_size(),
    )
    assert (row.nan, row.infinite) == (np.isnan(every).sum(), np.isinf(every).sum())
    assert row.zero_share == (np.mean(every == 0) if every.size else None)
    if not x.size:
        assert (row.mean, row.norm, row.percentiles, row.histogram) == (None,) * 4
        return
    assert (row.minimum, row.maximum) == (x.min(), x.max())
    deviation, magnitude = x.std(), np.sort(np.abs(x))
    close = {"rel": DIGITS, "abs": DIGITS * deviation}
    assert row.mean == pytest.approx(x.mean(), **close)
    assert row.norm == pytest.approx(np.linalg.norm(x), rel=DIGITS)
    assert row.rms == pytest.approx(math.sqrt(np.mean(x * x)), rel=DIGITS)
    if x.min() == x.max():
        assert (row.standard_deviation, row.kurtosis, row.peak, row.outlier_share) == (0, None, None, 0)
    else:
        assert row.standard_deviation == pytest.approx(deviation, rel=DIGITS)
        assert row.kurtosis == pytest.approx(scipy.stats.kurtosis(x, fisher=False), rel=DIGITS)
        assert row.peak == pytest.approx(np.abs(x - x.mean()).max() / deviation, rel=DIGITS)
        # an upper half of a float32 stands for numbers at most 2**-8 of their size away
        slack = 0.0 if exact else 2**-8
        far = np.abs(x - x.mean()) - 6 * deviation
        assert np.mean(far > slack * np.abs(x)) <= row.outlier_share <= np.mean(far > -slack * np.abs(x))
    assert row.approximate is not exact
    for name, share in PERCENTILES.items():
        wanted = magnitude[max(math.ceil(share * x.size), 1) - 1]
        assert row.percentiles[name] == pytest.approx(wanted, rel=0 if exact else 2**-8, abs=0)
    positive = magnitude[magnitude > 0]
    if not positive.size:
        assert row.histogram is None
        return
    assert sum(row.histogram.counts) == positive.size
    bins = np.floor(4 * np.log2(positive)).astype(int)
    if exact:
        assert row.histogram.first == bins[0]
        assert row.histogram.counts == tuple(np.bincount(bins - bins[0]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(), (1,), (0,), (0, 3), (7,), (3, 5), (2, 3, 7), (131_072 + 13,), (1_048_576 + 3,)])
def test_any_shape_and_type(shape: tuple[int, ...], kind: str) -> None:
    tensor = sample(shape, kind)
    check(one(tensor), tensor)


@pytest.mark.parametrize("kind", ["bfloat16", "float16", "float32", "float64"])
def test_nan_and_infinity_are_counted_and_left_out(kind: str) -> None:
    tensor = sample((300, 11), kind)
    tensor[0, :3], tensor[5, 1], tensor[6, :2] = math.nan, math.inf, -math.inf
    check(one(tensor), tensor)
    broken = torch.full((4,), math.nan).to(tensor.dtype)
    check(one(broken), broken)


@pytest.mark.parametrize("kind", ["bfloat16", "float16", "float32", "float64"])
@pytest.mark.parametrize("value", [0.0, -0.0, 0.1, -3e-5])
def test_equal_elements_have_no_spread(kind: str, value: float) -> None:
    tensor = torch.full((200_003,), value).to(getattr(torch, kind))
    check(one(tensor), tensor)


def test_every_bit_pattern_of_two_bytes() -> None:
    codes = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16)
    for kind in (torch.bfloat16, torch.float16):
        check(one(codes.view(kind)), codes.view(kind))


def test_nan_that_looks_like_infinity_in_its_upper_half() -> None:
    bits = np.uint32([0x7F800001, 0xFF80FFFF, 0x7F800000, 0xFF800000, 0x3F800000])
    row = one(bits.view(np.float32))
    assert (row.nan, row.infinite, row.mean, row.maximum) == (2, 2, 1.0, 1.0)


def test_a_mean_far_from_zero_keeps_its_deviation() -> None:
    """Sums of squares around zero would lose all digits: 1e6 squared is 1e12 deviations squared."""
    tensor = torch.tensor(1e6 + np.random.default_rng(0).standard_normal(400_000))
    row = one(tensor)
    assert row.standard_deviation == pytest.approx(tensor.std(correction=0).item(), rel=1e-9)
    assert row.kurtosis == pytest.approx(3, abs=5 * math.sqrt(24 / 400_000))  # five standard errors


def test_float64_beyond_the_range_of_float32() -> None:
    row = one(torch.tensor([1e300, -1e-300, 0.0], dtype=torch.float64))
    assert (row.maximum, row.minimum, row.infinite, row.zero_share) == (1e300, -1e-300, 0, 1 / 3)
    assert json.loads(json.dumps(row.to_dict(), allow_nan=False))["kurtosis"] is None


@pytest.mark.parametrize("scale", [1e70, 1e100, 1.1e154, 1e300, 1e-300])
def test_no_power_leaves_the_range_with_an_error(scale: float) -> None:
    """Two chunks around different means, so that sums are moved from one centre to another."""
    tensor = torch.full((2 * CHUNK,), scale, dtype=torch.float64)
    tensor[CHUNK:] *= -1
    report = model_statistics({"w": tensor, "v": tensor * 0.5}, spectrum=True)
    assert report.tensors[0].maximum == scale
    again = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert again["tensors"][0]["rms"] in (None, pytest.approx(scale), 0.0)


@pytest.mark.parametrize("kind", ["int64", "int8", "uint8", "bool"])
def test_other_types_are_only_counted(kind: str) -> None:
    row = one(torch.ones(6, 2).to(getattr(torch, kind)))
    assert (row.parameters, row.nan, row.zero_share, row.rms, row.histogram) == (12, None, None, None, None)
    assert row.checksum


@pytest.mark.parametrize("kind", ["bfloat16", "float32", "float64"])
def test_chunks_do_not_show(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = sample((70_001,), kind)
    whole = one(tensor)
    monkeypatch.setattr(statistics, "CHUNK", 1024)
    cut = one(tensor)
    check(cut, tensor)
    assert cut.checksum == whole.checksum
    assert cut.histogram == whole.histogram
    if kind == "bfloat16":
        assert cut == whole


def test_memory_does_not_grow_with_the_tensor() -> None:
    tensor = torch.ones(16_000_000, dtype=torch.bfloat16)
    one(tensor[:10])
    tracemalloc.start()
    try:
        one(tensor)
        assert tracemalloc.get_traced_memory()[1] < 6_000_000  # four histograms of 0.5 MB, their sum, one chunk
    finally:
        tracemalloc.stop()


def test_threads_do_not_show(llama_folder: Any, tmp_path: Path) -> None:
    folder = llama_folder(tmp_path / "m", layers=3)
    assert model_statistics(folder, threads=1) == model_statistics(folder, threads=4)


def test_groups_are_one_long_tensor(llama_folder: Any, tmp_path: Path) -> None:
    folder = llama_folder(tmp_path / "m", layers=3)
    report = model_statistics(folder)
    assert {g.label for g in report.layers} == {"outside the layers", "0", "1", "2"}
    with weft.open(folder) as checkpoint:
        for group, members in (
            (next(g for g in report.kinds if g.label == "q_proj"), [n for n in checkpoint if "q_proj" in n]),
            (next(g for g in report.layers if g.label == "1"), [n for n in checkpoint if ".layers.1." in n]),
        ):
            joined = np.concatenate([checkpoint[n].numpy().reshape(-1) for n in members]).astype(np.float64)
            assert (group.tensors, group.parameters) == (len(members), joined.size)
            assert group.rms == pytest.approx(math.sqrt(np.mean(joined**2)), rel=DIGITS)
        assert report.parameters == checkpoint.parameters
        assert report.nbytes == checkpoint.nbytes


def test_tied_weights_count_once_and_copies_are_found() -> None:
    shared = torch.randn(4, 3)
    report = model_statistics(
        {"embed": shared, "head": shared, "again": shared.clone(), "a": torch.ones(2, 2), "b": torch.ones(2, 2)}
    )
    assert dict(report.tied) == {"head": "embed"}
    assert [row.name for row in report.tensors] == ["embed", "again", "a", "b"]
    assert report.copies == (("embed", "again"),)
    assert report.parameters == 12 + 12 + 8


def test_a_head_that_config_ties_is_told(llama_folder: Any, tmp_path: Path) -> None:
    folder = llama_folder(tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    assert model_statistics(folder).notes == ()
    with weft.open(folder) as checkpoint:
        rest = {name: checkpoint[name].numpy() for name in checkpoint if name != "lm_head.weight"}
    from safetensors.numpy import save_file

    save_file(rest, folder / "model.safetensors")
    assert "ties it to the embedding" in model_statistics(folder).notes[0]


def test_a_glob_chooses_and_teaches(llama_folder: Any, tmp_path: Path) -> None:
    folder = llama_folder(tmp_path / "m")
    assert len(model_statistics(folder, tensors="*.mlp.*").tensors) == 6
    with pytest.raises(RecipeError, match="none of its 21 tensors matches"):
        model_statistics(folder, tensors="*.mpl.*")


def test_a_report_is_plain_json(llama_folder: Any, tmp_path: Path) -> None:
    report = model_statistics(llama_folder(tmp_path / "m"), spectrum=True).to_dict()
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert report["tensors"][0]["spectrum"]["spectral_norm"] > 0
