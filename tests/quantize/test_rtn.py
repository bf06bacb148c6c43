"""Rounding to grids: the nearest point by brute force, bounds of the error, and a model on disk."""

import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "calibrate"))
from architectures import build

import weft
from weft.errors import RecipeError
from weft.quantize import RTN, Grid, fake_quantize, fit_grid, quantize, quantize_model, round_to_nearest

GRIDS = [
    Grid(bits, size, kind)
    for bits, size, kind in product((1, 2, 3, 4, 8), (0, 4, 16), ("asymmetric", "symmetric", "narrow"))
    if bits > 1 or kind == "asymmetric"
]


def weights() -> torch.Tensor:
    w = torch.randn(6, 32, generator=torch.Generator().manual_seed(0))
    w[0] += 20  # all positive, far from zero
    w[1] = 0
    w[2, 5] = -50
    w[3] *= 1e-30
    return w


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_every_weight_goes_to_the_nearest_value_of_its_grid(grid: Grid) -> None:
    w = weights()
    scale, zero = fit_grid(w, grid)
    found = fake_quantize(w, scale, zero, grid)
    size = grid.group_size or 32
    assert scale.shape == (6, 32 // size)
    low, high = grid.codes
    codes = np.arange(low, high + 1)
    for row, column in product(range(6), range(32)):
        s, z = float(scale[row, column // size]), float(zero[row, column // size])
        values = (codes - z) * s
        assert abs(values).min() == 0  # zero is on the grid
        nearest = abs(values - float(w[row, column])).min()
        distance = abs(float(found[row, column]) - float(w[row, column]))
        assert distance <= nearest + 1e-6 * (s + abs(float(w[row, column])))
        assert distance <= s / 2 * (1 + 1e-4) + 1e-6 * abs(float(w[row, column]))
    assert torch.equal(fake_quantize(found, scale, zero, grid), found)
    assert torch.equal(quantize(w, scale, zero, grid).dequantize(), found)
    assert found[1].abs().max() == 0
    assert torch.equal(round_to_nearest(4 * w, grid), 4 * found)


@pytest.mark.parametrize("kind", ["symmetric", "narrow"])
def test_scales_are_those_of_the_formulas(kind: str) -> None:
    w = weights()
    scale, zero = fit_grid(w, Grid(4, 16, kind))
    largest = w.unflatten(1, (2, 16)).abs().amax(-1)
    torch.testing.assert_close(scale, (largest / (7.5 if kind == "symmetric" else 7)).clamp(min=torch.finfo().tiny))
    assert zero.abs().max() == 0


def test_the_narrow_grid_is_found_again() -> None:
    """The largest weight keeps its place, so the grid of the rounded weights is the same grid."""
    grid = Grid(4, 8, "narrow")
    once = round_to_nearest(weights(), grid)
    torch.testing.assert_close(round_to_nearest(once, grid), once)


@pytest.mark.parametrize("kind", ["asymmetric", "symmetric", "narrow"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_scales_are_rounded_before_codes_are(kind: str, dtype: str) -> None:
    w, grid = weights()[[0, 2, 4, 5]], Grid(4, 16, kind, dtype)
    quantized = quantize(w, *fit_grid(w, grid), grid)
    assert str(quantized.scale.dtype) == f"torch.{dtype}"
    moved = (quantized.dequantize() - w).abs().unflatten(1, (2, 16)).amax(-1)
    width = 2.0**-8 if dtype == "bfloat16" else 2.0**-11
    assert bool((moved <= quantized.scale.float() * (0.5 + 15 * width) * 1.001).all())


def test_error_falls_with_bits_and_with_smaller_groups() -> None:
    w = torch.randn(64, 128, generator=torch.Generator().manual_seed(3))
    errors = [[float((round_to_nearest(w, Grid(b, g)) - w).norm()) for g in (0, 64, 16)] for b in (2, 3, 4, 8)]
    for row in errors:
        assert row == sorted(row, reverse=True)
    for column in zip(*errors):
        assert list(column) == sorted(column, reverse=True)


def test_what_cannot_be_quantized_is_said() -> None:
    with pytest.raises(RecipeError, match="do not divide"):
        round_to_nearest(torch.ones(2, 6), Grid(4, 4))
    for bad in (torch.ones(6), torch.ones(0, 6), torch.ones(2, 6, dtype=torch.int64)):
        with pytest.raises(RecipeError, match="matrix"):
            round_to_nearest(bad, Grid(4, 0))
    with pytest.raises(RecipeError, match="NaN"):
        round_to_nearest(torch.full((2, 2), float("nan")), Grid(4, 0))
    with pytest.raises(RecipeError, match="too large"):
        fit_grid(torch.full((1, 2), 1e30), Grid(4, 0, scale_dtype="float16"))
    for wrong in (
        {"bits": 0},
        {"bits": 9},
        {"kind": "odd"},
        {"group_size": -1},
        {"bits": 1, "kind": "narrow"},
        {"scale_dtype": "int8"},
    ):
        with pytest.raises(RecipeError):
            Grid(**wrong)
    with pytest.raises(RecipeError, match="must be"):
        quantize(torch.ones(2, 4), torch.ones(2, 2), torch.ones(2, 2), Grid(4, 4))


@pytest.mark.parametrize("name", ["mixtral", "gpt2"])
def test_a_model_on_disk(name: str, tmp_path: Path) -> None:
    model, batches = build(name)
    model.save_pretrained(tmp_path / "model")
    config = RTN(bits=8, group_size=16, kind="symmetric")
    made = quantize_model(tmp_path / "model", tmp_path / "out", config, format="dense")
    with weft.open(tmp_path / "model") as before, weft.open(made) as after:
        moved = {n for n in before if not torch.equal(before[n].torch(), after[n].torch())}
        for tensor in moved:
            w = before[tensor].torch()
            w, found = (w.T, after[tensor].torch().T) if name == "gpt2" else (w, after[tensor].torch())
            assert torch.equal(found, round_to_nearest(w, config))
    assert len(moved) == (3 * (4 + 4 * 3) if name == "mixtral" else 3 * 4)
    reread = type(model).from_pretrained(made).eval()
    with torch.no_grad():
        a, b = model(**batches[0])[0], reread(**batches[0])[0]
    assert torch.cosine_similarity(a.flatten(), b.flatten(), 0) > 0.999
