"""Ranges of grids by the mean error: the search of 80 shares, one by one."""

import pytest
import torch

from weft.calibrate import Statistics
from weft.calibrate.facts import Facts
from weft.errors import RecipeError
from weft.quantize import GPTQ, RTN, Grid, fit_grid, gptq_codes, round_to_nearest


def weights() -> torch.Tensor:
    w = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    w[0] += 5
    w[1] = 0
    w[2, 5] = -30
    w[3] *= 1e-30
    w[4] *= 1e30
    return w


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("kind", ["asymmetric", "symmetric", "narrow"])
def test_each_group_has_the_best_of_all_shares(bits: int, kind: str) -> None:
    w = weights()
    grid = Grid(bits, 16, kind, ranges="mse")
    scale, zero = (v.double() for v in fit_grid(w, grid))
    low, high = grid.codes
    shrunk = 0
    for row in range(5):
        for g in range(2):
            part = w[row, 16 * g : 16 * g + 16].double()

            def error(s: float, z: float, part: torch.Tensor = part) -> float:
                new = ((torch.round(part / s) + z).clamp(low, high) - z) * s
                return float(((new - part).abs() / part.abs().max().clamp(min=1e-300)).pow(2.4).sum())

            tried = []
            for i in range(80):
                p = 1 - i / 100
                if kind == "asymmetric":
                    least, most = min(float(part.min()), 0) * p, max(float(part.max()), 0) * p
                    s = max((most - least) / high, torch.finfo(torch.float32).tiny)
                    z = min(max(round(-least / s), low), high)
                else:
                    s = float(part.abs().max()) * p / (high if kind == "narrow" else (high - low) / 2)
                    s, z = max(s, torch.finfo(torch.float32).tiny), 0
                tried.append(error(s, z))
            found = error(float(scale[row, g]), float(zero[row, g]))
            assert found <= min(tried) * (1 + 1e-3) + 1e-12
            shrunk += found < 0.99 * tried[0]
    assert shrunk >= 2


def test_rows_come_out_the_same_alone_and_among_many() -> None:
    w = torch.randn(700, 8, generator=torch.Generator().manual_seed(1))
    grid = Grid(3, 8, ranges="mse")
    scale, _ = fit_grid(w, grid)
    assert torch.equal(scale[600:], fit_grid(w[600:], grid)[0])


@pytest.mark.parametrize("kind", ["asymmetric", "symmetric"])
def test_rounding_and_gptq_use_them(kind: str) -> None:
    generator = torch.Generator().manual_seed(2)
    w = torch.randn(64, 64, generator=generator)
    full, mse = (float((round_to_nearest(w, Grid(2, 32, kind, ranges=r)) - w).norm()) for r in ("full", "mse"))
    assert mse < 0.85 * full
    found = RTN(2, 32, kind, ranges="mse").fit("layer", w, Statistics({}, Facts()))
    assert torch.equal(found.dequantize(), round_to_nearest(w, Grid(2, 32, kind, ranges="mse")))
    x = torch.randn(500, 64, generator=generator) @ torch.randn(64, 64, generator=generator)
    losses = [
        float((x @ (gptq_codes(w, x.T @ x, GPTQ(2, 32, kind, ranges=r)).codes.dequantize() - w).T).norm())
        for r in ("full", "mse")
    ]
    assert losses[1] < 0.95 * losses[0]
    assert GPTQ(ranges="mse").without_data() == RTN(ranges="mse")


def test_a_rounded_weight_stays() -> None:
    """The full range fits a weight on its grid without error, and nothing is better."""
    grid = Grid(3, 16, "narrow")
    once = round_to_nearest(weights(), grid)
    torch.testing.assert_close(round_to_nearest(once, Grid(3, 16, "narrow", ranges="mse")), once)


def test_other_names_are_refused() -> None:
    with pytest.raises(RecipeError, match="full or mse"):
        Grid(ranges="best")
