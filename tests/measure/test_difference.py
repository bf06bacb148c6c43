"""Differences of tensors and models against float64 brute force."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import weft
from weft.errors import RecipeError
from weft.measure import comparison, model_difference
from weft.measure.difference import TensorDifference

DIGITS = 1e-10  # float64 sums of a million terms of one sign


def one(a: Any, b: Any) -> TensorDifference:
    (row,) = model_difference({"w": a}, {"w": b}).tensors
    return row


def pair(shape: tuple[int, ...], kind_a: str, kind_b: str) -> tuple[torch.Tensor, torch.Tensor]:
    random = np.random.default_rng([len(shape), math.prod(shape)])
    a = random.standard_normal(shape)
    b = np.where(random.random(shape) < 0.3, a, a + 0.5 * random.standard_normal(shape))
    a, b = np.where(random.random(shape) < 0.1, 0.0, a), np.where(random.random(shape) < 0.1, -0.0, b)
    return torch.tensor(a).to(getattr(torch, kind_a)), torch.tensor(b).to(getattr(torch, kind_b))


def check(row: TensorDifference, a: torch.Tensor, b: torch.Tensor) -> None:
    x, y = (t.double().numpy().reshape(-1) for t in (a, b))
    finite = np.isfinite(x) & np.isfinite(y)
    assert row.parameters == x.size
    assert row.non_finite == x.size - finite.sum()
    assert row.equal_share == (np.mean((x == y) | (np.isnan(x) & np.isnan(y))) if x.size else None)
    assert row.sign_change_share == (np.mean(np.where(finite, x * y, 0) < 0) if x.size else None)
    x, y = x[finite], y[finite]
    norm, apart = np.linalg.norm(x), np.linalg.norm(y - x)
    assert row.norms == pytest.approx((norm, np.linalg.norm(y)), rel=DIGITS)
    assert row.difference_norm == pytest.approx(apart, rel=DIGITS)
    assert row.largest == pytest.approx(np.abs(y - x).max(initial=0), rel=2**-23)  # one float32 subtraction
    if norm:
        assert row.relative_change == pytest.approx(apart / norm, rel=DIGITS)
    if norm and np.linalg.norm(y):
        assert row.cosine == pytest.approx(x @ y / norm / np.linalg.norm(y), abs=DIGITS)


@pytest.mark.parametrize(
    "kinds",
    [
        ("float32", "float32"), ("bfloat16", "bfloat16"), ("float16", "float16"), ("float64", "float64"),
        ("bfloat16", "float32"), ("float64", "bfloat16"), ("float8_e4m3fn", "float16"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("shape", [(), (1,), (0,), (7,), (3, 5), (0, 4), (131_072 + 13,), (3, 100_001)])
def test_any_shape_and_type(shape: tuple[int, ...], kinds: tuple[str, str]) -> None:
    a, b = pair(shape, *kinds)
    check(one(a, b), a, b)


@pytest.mark.parametrize("kind", ["bfloat16", "float32", "float64"])
def test_nan_and_infinity_are_counted_and_left_out(kind: str) -> None:
    a, b = pair((40, 11), kind, kind)
    a[0, :4], b[0, 2:6], a[3, 3], b[3, 3], a[4, 4] = math.nan, math.nan, math.inf, math.inf, -math.inf
    check(one(a, b), a, b)
    broken = torch.full((5,), math.nan).to(a.dtype)
    row = one(broken, broken)
    assert (row.equal_share, row.relative_change, row.cosine, row.non_finite) == (1, None, None, 5)


def test_zeros() -> None:
    zero, some = torch.zeros(4), torch.tensor([0.0, 3.0, 0.0, -4.0])
    same = one(zero, zero)
    assert (same.relative_change, same.cosine, same.equal_share, same.largest) == (0, None, 1, 0)
    grown = one(zero, some)
    assert (grown.relative_change, grown.difference_norm, grown.sign_change_share) == (None, 5, 0)
    assert one(some, zero).relative_change == 1


def test_opposites_and_scales() -> None:
    a = torch.randn(1000)
    flipped = one(a, -a)
    assert (flipped.cosine, flipped.sign_change_share) == (pytest.approx(-1), 1)
    assert flipped.relative_change == pytest.approx(2)
    assert one(a, 3 * a).cosine == pytest.approx(1)
    assert one(torch.tensor([1e-30]), torch.tensor([-1e-30])).sign_change_share == 1  # their product is zero in float32


def test_float64_differences_below_float32_are_seen() -> None:
    a = torch.ones(3, dtype=torch.float64)
    row = one(a, a + 1e-12)
    assert row.equal_share == 0
    assert row.largest == pytest.approx(1e-12, rel=1e-3)
    huge = one(a * 1e300, -a * 1e300)
    assert huge.sign_change_share == 1
    assert json.dumps(huge.to_dict(), allow_nan=False)


@pytest.mark.parametrize("kind", ["int64", "uint8", "bool"])
def test_other_types_are_equal_or_not(kind: str) -> None:
    a = torch.tensor([0, 1, 1, 0]).to(getattr(torch, kind))
    b = torch.tensor([0, 1, 0, 0]).to(getattr(torch, kind))
    row = one(a, b)
    assert (row.equal_share, row.difference_norm, row.cosine) == (0.75, None, None)


def test_types_below_a_byte(tmp_path: Path) -> None:
    def write(name: str, data: bytes) -> Path:
        header = json.dumps({"w": {"dtype": "F4", "shape": [4], "data_offsets": [0, 2]}}).encode()
        (tmp_path / name).write_bytes(len(header).to_bytes(8, "little") + header + data)
        return tmp_path / name

    report = model_difference(write("a.safetensors", b"\x12\x34"), write("b.safetensors", b"\x12\x35"))
    assert report.tensors[0].equal_share == 0.75


@pytest.mark.parametrize("kind", ["bfloat16", "float64"])
def test_chunks_do_not_show(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = pair((5000,), kind, kind)
    monkeypatch.setattr(comparison, "CHUNK", 64)
    check(one(a, b), a, b)


def test_groups_are_one_long_tensor(llama_folder: Any, tmp_path: Path) -> None:
    a, b = llama_folder(tmp_path / "a"), llama_folder(tmp_path / "b", seed=1)
    report = model_difference(a, b)
    with weft.open(a) as first, weft.open(b) as second:
        for group, members in (
            (report.total, list(first)),
            (next(g for g in report.kinds if g.label == "gate_proj"), [n for n in first if "gate_proj" in n]),
            (next(g for g in report.layers if g.label == "1"), [n for n in first if ".layers.1." in n]),
        ):
            x, y = (np.concatenate([m[n].numpy().reshape(-1) for n in members]).astype(float) for m in (first, second))
            assert group.parameters == x.size
            assert group.relative_change == pytest.approx(np.linalg.norm(y - x) / np.linalg.norm(x), rel=DIGITS)
            assert group.cosine == pytest.approx(x @ y / np.linalg.norm(x) / np.linalg.norm(y), rel=DIGITS)
            assert group.sign_change_share == pytest.approx(np.mean(x * y < 0), rel=DIGITS)
    assert report == model_difference(a, b, threads=3)
    assert json.loads(json.dumps(report.to_dict(), allow_nan=False)) == report.to_dict()


def test_what_does_not_match_is_listed() -> None:
    a = {
        "same": np.zeros(3, np.float32),
        "shape": np.zeros(3, np.float32),
        "type": np.zeros(3, np.float32),
        "only": np.zeros(1),
    }
    b = {
        "same": np.zeros(3, np.float16),
        "shape": np.zeros(4, np.float32),
        "type": np.zeros(3, np.int64),
        "new": np.zeros(1),
    }
    report = model_difference(a, b)
    assert (report.only_a, report.only_b) == (("only",), ("new",))
    assert [(m.name, m.a, m.b) for m in report.shapes] == [
        ("shape", "F32 [3]", "F32 [4]"),
        ("type", "F32 [3]", "I64 [3]"),
    ]
    assert [(m.name, m.a, m.b) for m in report.dtypes] == [("same", "F32", "F16")]
    assert [row.name for row in report.tensors] == ["same"]


def test_a_tie_that_only_one_model_has_is_compared() -> None:
    shared = torch.ones(2, 2)
    tied, loose = {"e": shared, "h": shared}, {"e": shared.clone(), "h": 2 * shared}
    assert [row.name for row in model_difference(tied, tied).tensors] == ["e"]
    report = model_difference(tied, loose)
    assert [(row.name, row.relative_change) for row in report.tensors] == [("e", 0), ("h", 1)]
    assert [row.relative_change for row in model_difference(loose, tied).tensors] == [0, 0.5]


def test_nothing_in_common_teaches() -> None:
    a = {"model.layers.0.w": np.zeros(1, np.float32)}
    with pytest.raises(RecipeError, match=r"no tensor name in common.*saved with a prefix"):
        model_difference(a, {"layers.0.w": np.zeros(1, np.float32)})
    with pytest.raises(RecipeError, match=r"share matches '\*q'"):
        model_difference(a, a, tensors="*q")
