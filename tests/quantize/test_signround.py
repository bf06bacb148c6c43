"""SignRound: its start, gradients by hand, its bounds, and that its steps reach either neighbour."""

import sys
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from real_layer import held_out_error, real_layer

from weft.errors import RecipeError
from weft.quantize import RTN, Grid, SignRound, SignRounding, reconstruct_layer, round_to_nearest

GRIDS = [
    Grid(bits, size, kind, dtype)
    for bits, size, kind, dtype in product(
        (2, 4), (0, 8), ("asymmetric", "symmetric", "narrow"), ("float32", "float16")
    )
]


def weights(rows: int = 6, columns: int = 24) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_it_starts_at_rounding_to_nearest_bit_for_bit(grid: Grid) -> None:
    soft = SignRounding(weights(), grid)
    expected = round_to_nearest(weights(), grid)
    assert torch.equal(soft(), expected)
    assert torch.equal(soft.packed().dequantize(), expected)


@pytest.mark.parametrize("kind", ["asymmetric", "symmetric"])
def test_shrunk_ranges_by_the_equations(kind: str) -> None:
    soft = SignRounding(weights(), Grid(3, 8, kind))
    with torch.no_grad():
        soft.lower.fill_(0.75)
        soft.upper.fill_(0.5)
        soft.offset.uniform_(-0.5, 0.5, generator=torch.Generator().manual_seed(1))
    groups = weights().double().unflatten(1, (3, 8))
    low, high = 0.75 * groups.amin(-1, keepdim=True).clamp(max=0), 0.5 * groups.amax(-1, keepdim=True).clamp(min=0)
    if kind == "asymmetric":
        s = (high - low) / 7
        z = (-low / s).round()
        expected = (((groups / s + soft.offset).round() + z).clamp(0, 7) - z) * s
    else:
        s = 2 * torch.maximum(high, -low) / 7
        expected = (groups / s + soft.offset).round().clamp(-4, 3) * s
    assert torch.allclose(soft().double(), expected.flatten(1), atol=1e-6)
    assert torch.equal(soft().detach(), soft.packed().dequantize())


def test_gradients_by_hand() -> None:
    """∂Ŵ/∂V = s inside of the range and 0 where it is clipped; ∂s/∂β = max(W, 0) / (2ᵇ − 1)."""
    torch.manual_seed(0)
    soft = SignRounding(weights(), Grid(4, 8, "symmetric"))
    with torch.no_grad():
        soft.lower.fill_(0.8)
        soft.upper.fill_(0.8)
    upstream = torch.randn(6, 24)
    new = soft()
    (new * upstream).sum().backward()
    groups, up = weights().unflatten(1, (3, 8)), upstream.unflatten(1, (3, 8))
    largest = groups.abs().amax(-1, keepdim=True)
    s = 2 * 0.8 * largest / 15
    inside = ((groups / s).round() >= -8) & ((groups / s).round() <= 7)
    assert not inside.all()
    assert torch.allclose(soft.offset.grad, torch.where(inside, s * up, 0), atol=1e-5)
    codes = (groups / s).round().clamp(-8, 7)
    by_s = (torch.where(inside, codes - groups / s, codes) * up).sum(-1)  # straight through the rounding
    positive = groups.amax(-1) >= -groups.amin(-1)
    assert torch.allclose(soft.upper.grad, torch.where(positive, by_s * 2 * largest[..., 0] / 15, 0), atol=1e-4)
    assert torch.allclose(soft.lower.grad, torch.where(positive, 0, by_s * 2 * largest[..., 0] / 15), atol=1e-4)


def test_codes_are_neighbours_and_bounds_hold() -> None:
    w, generator = weights(8, 32), torch.Generator().manual_seed(1)
    x = torch.randn(99, 32, generator=generator) @ torch.randn(32, 32, generator=generator)
    config = SignRound(3, 0, clip=False, steps=40)
    soft = config.soft(w, generator)
    reconstruct_layer(w, x.T @ x, soft, config.descent())
    made, nearest = soft.packed(), RTN(3, 0)
    from weft.quantize import fit_grid

    scale, zero = fit_grid(w, nearest)
    assert torch.equal(made.scale, scale)
    steps = w / scale + zero
    assert ((made.codes >= steps.floor() - 1e-3) & (made.codes <= steps.ceil() + 1e-3)).all()
    assert soft.offset.abs().max() <= 0.5
    with torch.no_grad():
        soft.lower.fill_(1.2)
        soft.upper.fill_(-0.2)
        soft.project()
    assert (float(soft.lower.detach().max()), float(soft.upper.detach().min())) == (1, 0)


def test_a_constant_gradient_moves_every_offset_by_half() -> None:
    """Σ of rates that fall linearly from 1/n is (n + 1) / 2n: V reaches its bound, whatever the gradient's size."""
    from weft.quantize.soft import descend

    w = weights()
    config = SignRound(4, 0, clip=False, steps=50)
    soft = config.soft(w, torch.Generator())
    descend({"w": soft}, lambda new: 1e-6 * new["w"].sum(), lambda new: float(new["w"].sum()) + 1e3, config.descent())
    inside = (soft.groups - soft.groups.amin(-1, keepdim=True)) > 0.6 * (soft.packed().scale.unsqueeze(-1))
    assert torch.allclose(soft.offset.detach()[inside], torch.tensor(-0.5))


def test_a_real_layer_is_better_than_rounding() -> None:
    weight, gram, held = real_layer()
    nearest, found = (held_out_error(c, weight, gram, held) for c in (RTN(3, 0), SignRound(3, 0, steps=120)))
    assert found < 0.6 * nearest, (found, nearest)


def test_bad_configurations_are_refused() -> None:
    for bad in ({"steps": -1}, {"samples": 0}, {"rate": float("nan")}, {"kind": "none"}):
        with pytest.raises(RecipeError):
            SignRound(**bad)
