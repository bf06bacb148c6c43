"""AdaRound and its relatives: starts, the end of rounding, what each choice trains, and importance by hand."""

import sys
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from real_layer import held_out_error, real_layer

from weft.errors import RecipeError
from weft.quantize import (
    RTN,
    FlexRounding,
    GradientPTQ,
    PowerCodes,
    Rounding,
    fit_grid,
    importance,
    reconstruct_layer,
    round_to_nearest,
)
from weft.quantize.gradient_ptq import VARIABLES
from weft.quantize.soft import descend


def weights(rows: int = 6, columns: int = 24) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


def gram(columns: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(9 * columns, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    return x.T @ x


@pytest.mark.parametrize("variable", ["adaround", "sigmoid", "straight-through", "division"])
@pytest.mark.parametrize(("kind", "size"), list(product(("asymmetric", "symmetric", "narrow"), (0, 8))))
def test_what_is_packed_at_the_start_is_rounding_to_nearest(variable: str, kind: str, size: int) -> None:
    config = GradientPTQ(3, size, kind, variable=variable)
    w = weights()
    w[0, :4] = torch.tensor([0.0, 0.5, 1.5, 2.5]) * fit_grid(w, config)[0][0, 0]  # halves go to the even code
    soft = config.soft(w, torch.Generator())
    assert torch.equal(soft.packed().dequantize(), round_to_nearest(w, config))
    if variable in ("adaround", "sigmoid") and kind == "narrow":  # the ends of other grids are cut
        assert torch.allclose(soft(), w, atol=2e-3)


def test_soft_weights_by_the_equations() -> None:
    torch.manual_seed(0)
    w = weights()
    for variable in ("adaround", "sigmoid"):
        soft = Rounding(w, GradientPTQ(3, 0, variable=variable))
        with torch.no_grad():
            soft.variable.copy_(2 * torch.randn_like(soft.variable))
        soft.begin(0.5)
        v = soft.variable.detach()[:, 0].double()
        h = (1.2 * torch.sigmoid(v) - 0.1).clamp(0, 1) if variable == "adaround" else torch.sigmoid(10.5 * v)
        scale, zero = (t.double() for t in fit_grid(w, soft.config))
        expected = (((w / scale).floor() + h + zero).clamp(0, 7) - zero) * scale
        assert torch.allclose(soft().double(), expected, atol=1e-5)
        penalty = soft.penalty()
        if variable == "sigmoid":
            assert penalty is None
            continue
        beta = 2 + 18 * (1 - 0.3 / 0.8)
        assert penalty is not None
        assert torch.allclose(penalty.double(), 100 * (1 - (2 * h - 1).abs() ** beta).mean(), rtol=1e-4)
        soft.begin(0.1)
        assert soft.penalty() is None


@pytest.mark.parametrize("variable", ["adaround", "sigmoid"])
def test_rounding_is_decided_in_the_end(variable: str) -> None:
    w = weights(8, 32)
    config = GradientPTQ(3, 0, variable=variable, steps=200)
    soft = Rounding(w, config)
    g, later = gram(32) / 288, iter(range(1000, 0, -1))

    def loss(new: dict[str, Tensor]) -> Tensor:
        delta = new["w"] - w
        return ((delta @ g) * delta).sum()

    nearest = loss({"w": round_to_nearest(w, config)})
    # the judge likes every later state more: what is kept is the last; the start's loss is 1 to the penalty
    descend({"w": soft}, lambda new: 1000 * loss(new) / nearest, lambda new: next(later), config.descent())
    h = soft.shares().detach()
    # a steep sigmoid has no end, as R has
    assert (torch.minimum(h, 1 - h) < 0.01).float().mean() > (0.99 if variable == "adaround" else 0.8)
    assert loss({"w": soft.packed().dequantize()}) < 0.8 * nearest
    made = soft.packed()
    low = (w / fit_grid(w, config)[0]).floor() + made.zero
    assert ((made.codes == low.clamp(0, 7)) | (made.codes == (low + 1).clamp(0, 7))).all()


def test_degrees_of_freedom() -> None:
    w = weights(8, 32)
    for scales in (False, True):
        config = GradientPTQ(3, 8, variable="straight-through", scales=scales, steps=60, rate=0.01)
        soft = config.soft(w, torch.Generator())
        reconstruct_layer(w, gram(32), soft, config.descent())
        same = torch.equal(soft.packed().scale, fit_grid(w, config)[0])  # type: ignore[attr-defined]
        assert same != scales
    assert isinstance(GradientPTQ(3, 8, variable="division").soft(w, torch.Generator()), FlexRounding)
    assert isinstance(GradientPTQ(3, 8, "narrow", variable="power").soft(w, torch.Generator()), PowerCodes)


@pytest.mark.parametrize("optimizer", ["adam", "adamax", "momentum", "sign"])
@pytest.mark.parametrize("loss", ["l2", "l1", "cosine"])
def test_choices_reach_the_descent(optimizer: str, loss: str) -> None:
    from weft.quantize.soft import angles, sizes, squares

    descent = GradientPTQ(optimizer=optimizer, loss=loss, steps=50).descent()
    assert descent.optimizer == optimizer
    assert descent.loss is {"l2": squares, "l1": sizes, "cosine": angles}[loss]
    assert descent.rate == (0.02 if optimizer == "sign" else VARIABLES["adaround"])


def test_a_real_layer_is_better_than_rounding_with_every_variable() -> None:
    weight, statistics, held = real_layer()
    nearest = held_out_error(RTN(3, 0), weight, statistics, held)
    for variable in ("adaround", "sigmoid", "straight-through"):
        found = held_out_error(GradientPTQ(3, 0, variable=variable, steps=120), weight, statistics, held)
        assert found < 0.85 * nearest, (variable, found, nearest)


def test_importance_is_the_loss_of_a_quadratic() -> None:
    """Where the loss is Σ g Δ + ½ F Δ² and all gΔ are positive, it is the very change of the loss."""
    torch.manual_seed(0)
    w, fisher = torch.randn(5, 16, dtype=torch.float64), torch.rand(5, 16, dtype=torch.float64)
    made = RTN(2, 0).fit("", w, None)  # type: ignore[arg-type]
    delta = made.dequantize().double() - w
    gradient = delta.sign() * torch.rand(5, 16, dtype=torch.float64)
    expected = (gradient * delta + fisher * delta**2 / 2).sum(1)
    assert torch.allclose(importance(w, made, gradient, fisher), expected)
    by_bits = [importance(w, RTN(b, 0).fit("", w, None), gradient, fisher).sum() for b in (2, 4, 8)]  # type: ignore[arg-type]
    assert by_bits[0] > by_bits[1] > by_bits[2] > 0
    with pytest.raises(RecipeError, match="shape"):
        importance(w, made, gradient[:4], fisher)


def test_bad_configurations_are_refused() -> None:
    for bad in (
        {"variable": "x"}, {"loss": "x"}, {"optimizer": "x"}, {"steps": -1}, {"penalty": -1}, {"samples": 0},
        {"variable": "power"},
    ):  # fmt: skip
        with pytest.raises(RecipeError):
            GradientPTQ(**bad)  # type: ignore[arg-type]
