"""FlexRound and LRQ: their start, gradients by hand, what cannot move, and a real layer against other roundings."""

import sys
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from real_layer import held_out_error, real_layer

from weft.errors import RecipeError
from weft.quantize import RTN, FlexRound, FlexRounding, GradientPTQ, Grid, reconstruct_layer, round_to_nearest
from weft.quantize.soft import Descent

GRIDS = [
    Grid(bits, size, kind, dtype)
    for bits, size, kind, dtype in product(
        (2, 4), (0, 8), ("asymmetric", "symmetric", "narrow"), ("float32", "float16")
    )
]


def weights(rows: int = 6, columns: int = 24, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_it_starts_at_rounding_to_nearest_bit_for_bit(grid: Grid, rank: int) -> None:
    soft = FlexRounding(weights(), grid, rank, torch.Generator().manual_seed(0))
    expected = round_to_nearest(weights(), grid)
    assert torch.equal(soft(), expected)
    assert torch.equal(soft.packed().dequantize(), expected)


def test_gradients_are_those_of_the_card() -> None:
    """∂L/∂δ₂ = −W/(S₂s₃) ⊙ ∂L/∂Ŵ and ∂L/∂δ₁ = Σ (Ŵ − W/(S₂s₃)) ∂L/∂Ŵ inside of the clamp, away from the start too."""
    torch.manual_seed(0)
    grid = Grid(8, 8, "symmetric")
    soft = FlexRounding(weights(), grid)
    with torch.no_grad():
        assert soft.divisor_log is not None
        for p in (soft.divisor_log, soft.row_log):
            p.copy_(0.1 * torch.randn_like(p))
        soft.scale_log.fill_(0.8)  # nothing is clamped
    upstream = torch.randn(6, 24)
    new = soft()
    (new * upstream).sum().backward()
    divided = weights() / soft.divisors()
    assert torch.allclose(soft.divisor_log.grad, -divided * upstream, atol=1e-5)
    assert torch.allclose(soft.row_log.grad, (-divided * upstream).sum(1, keepdim=True), atol=1e-5)
    by_scale = ((new - divided) * upstream).unflatten(1, (3, 8)).sum(-1)
    assert torch.allclose(soft.scale_log.grad, by_scale, atol=1e-4)


def test_gradients_of_a_smooth_version_by_autograd() -> None:
    """With rounding replaced by the identity Ŵ is W / (S₂ s₃), whose gradients autograd knows in float64."""
    torch.manual_seed(0)
    w = torch.randn(3, 8, dtype=torch.float64)
    logs = [torch.randn(3, 8, dtype=torch.float64) * 0.1, torch.randn(3, 1, dtype=torch.float64) * 0.1]

    def smooth(divisor: Tensor, row: Tensor) -> Tensor:
        return w / (divisor + row).exp()

    assert torch.autograd.gradcheck(smooth, [v.requires_grad_() for v in logs])
    soft = FlexRounding(w.float(), Grid(8, 0, "symmetric"))
    with torch.no_grad():
        assert soft.divisor_log is not None
        soft.divisor_log.copy_(logs[0])
        soft.row_log.copy_(logs[1])
        soft.scale_log.fill_(0.5)
    upstream = torch.randn(3, 8)
    (soft() * upstream).sum().backward()
    expected = torch.autograd.grad((smooth(*logs) * upstream).sum(), logs)
    assert torch.allclose(soft.divisor_log.grad, expected[0].float(), atol=1e-5)
    assert torch.allclose(soft.row_log.grad, expected[1].float(), atol=1e-5)


@pytest.mark.parametrize("rank", [0, 4])
def test_zeros_never_move_and_codes_stay_in_range(rank: int) -> None:
    w = weights(8, 32)
    w[:, ::5] = 0
    x = torch.randn(99, 32, generator=torch.Generator().manual_seed(1)) @ weights(32, 32, 2)
    soft = FlexRounding(w, Grid(3, 0), rank, torch.Generator().manual_seed(0))
    reconstruct_layer(w, x.T @ x, soft, Descent(60, 0.05))
    made = soft.packed()
    assert (made.dequantize() - round_to_nearest(w, Grid(3, 0))).abs().max() > 0
    assert made.dequantize()[:, ::5].abs().max() == 0
    assert 0 <= int(made.codes.min()) <= int(made.codes.max()) <= 7
    assert torch.equal(made.zero, made.zero.round())


def test_a_rank_is_used_where_it_saves_numbers() -> None:
    for rank, full in ((3, False), (5, True), (0, True)):  # of 6 · 24 numbers, a rank takes 30 each
        soft = FlexRounding(weights(), Grid(3, 0), rank, torch.Generator().manual_seed(0))
        assert (soft.divisor_log is not None) == full


def test_weights_move_beyond_their_neighbours() -> None:
    """Unlike AdaRound's, and larger ones more often."""
    w = weights(4, 16)
    soft = FlexRounding(w, Grid(4, 0, "symmetric"))
    with torch.no_grad():
        assert soft.divisor_log is not None
        soft.divisor_log.fill_(-0.3)  # one step of descent has the same sign for all
    moved = (soft.packed().codes - RTN(4, 0, "symmetric").fit("", w, None).codes).abs()  # type: ignore[arg-type]
    large = w.abs() > 0.5 * w.abs().amax(1, keepdim=True)
    assert moved[large].float().mean() > moved[~large].float().mean()


def test_a_real_layer_against_other_roundings() -> None:
    """An attention output of MiniLM on held-out docstrings: below AdaRound, which is below rounding to nearest."""
    weight, gram, held = real_layer()
    for bits in (4, 3):
        found = {}
        for name, config in {
            "nearest": RTN(bits, 0), "adaround": GradientPTQ(bits, 0, steps=120), "flexround": FlexRound(bits, 0, steps=120),
            "lrq": FlexRound(bits, 0, steps=120, rank=32),
        }.items():  # fmt: skip
            found[name] = held_out_error(config, weight, gram, held)
        assert found["flexround"] < found["adaround"] < found["nearest"], found
        assert found["lrq"] < found["nearest"], found


def test_bad_configurations_are_refused() -> None:
    for bad in ({"steps": -1}, {"samples": 0}, {"rank": -1}, {"rate": float("nan")}, {"bits": 9}):
        with pytest.raises(RecipeError):
            FlexRound(**bad)
