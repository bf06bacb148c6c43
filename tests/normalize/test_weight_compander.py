import copy
import math

import pytest
import torch
from torch import nn

import weft
from weft.normalize import WeightCompander, compand, expand
from weft.normalize.weight_compander import BOUNDS

FUNCTIONS = sorted(BOUNDS)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_round_trip_bound_and_slope(function: str) -> None:
    a, b = 0.7, 0.2
    latent = torch.linspace(-3, 3, 101, dtype=torch.float64, requires_grad=True)
    weight = compand(latent, a, b, function)
    near = latent.abs() < 0.7  # tanh is within 0.1% of its bound at 3.8 b
    torch.testing.assert_close(expand(weight, a, b, function)[near], latent[near])
    assert float(compand(torch.tensor(1e30, dtype=torch.float64), a, b, function)) <= a * BOUNDS[function]
    (slope,) = torch.autograd.grad(weight.sum(), latent)
    u = latent.detach() / b
    expected = {"arctan": 1 / (1 + u**2), "tanh": 1 / u.cosh() ** 2, "softsign": 1 / (1 + u.abs()) ** 2}[function]
    torch.testing.assert_close(slope, a / b * expected)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_wide_function_of_slope_one_is_the_identity(function: str) -> None:
    latent = torch.randn(50, dtype=torch.float64)
    torch.testing.assert_close(compand(latent, 1e9, 1e9, function), latent, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("expansion", [0.5, 1.0, 2.0])
def test_attached_the_weight_stays_and_the_slope_at_zero_is_the_expansion(function: str, expansion: float) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(8, 6).double()
    before = layer.weight.detach().clone()
    weft.parametrize_(layer, WeightCompander(function=function, expansion=expansion))
    torch.testing.assert_close(layer.weight, before)
    attached = weft.functions(layer)["weight"][0]
    a, b = attached.log_a.exp(), attached.log_b.exp()
    torch.testing.assert_close(a, 4 * before.std(correction=0).reshape(1))
    zero = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(compand(zero, a, b, function).sum(), zero)
    assert float(slope) == pytest.approx(expansion)
    assert attached.clamped == 0


def test_weights_beyond_the_bound_are_clamped_and_counted() -> None:
    layer = nn.Linear(100, 10)
    with torch.no_grad():
        layer.weight.normal_()
        layer.weight[0, :3] = 50.0
    before = layer.weight.detach().clone()
    weft.parametrize_(layer, WeightCompander(function="tanh"))
    assert weft.functions(layer)["weight"][0].clamped == 3
    limit = 4 * before.std(correction=0)
    torch.testing.assert_close(layer.weight[0, :3], 0.999 * limit.expand(3))
    torch.testing.assert_close(layer.weight[1:], before[1:], atol=1e-5, rtol=1e-5)


def test_both_parameters_learn_or_stay() -> None:
    learned, fixed = nn.Linear(4, 3), nn.Linear(4, 3)
    weft.parametrize_(learned, WeightCompander())
    weft.parametrize_(fixed, WeightCompander(learn=False))
    learned(torch.randn(5, 4)).square().sum().backward()
    function = weft.functions(learned)["weight"][0]
    for parameter in (function.log_a, function.log_b):
        assert parameter.shape == (1,)
        assert torch.isfinite(parameter.grad).all()
        assert float(parameter.grad) != 0
    assert list(weft.functions(fixed)["weight"][0].parameters()) == []


@pytest.mark.parametrize("function", FUNCTIONS)
def test_gradients_of_everything(function: str) -> None:
    latent = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    a, b = (torch.tensor([v], dtype=torch.float64, requires_grad=True) for v in (0.8, 0.5))
    assert torch.autograd.gradcheck(lambda *v: compand(*v, function), (latent, a, b))


def test_model_compiles_and_bakes() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(12, 2)), torch.randn(4, 2, 4, 4)
    expected = model(x)
    weft.parametrize_(model, WeightCompander())
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected, atol=1e-5, rtol=1e-5)
    weft.bake_(model)
    torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-5)


def test_zeros_and_stacks_of_matrices() -> None:
    layer = nn.Linear(3, 2)
    nn.init.zeros_(layer.weight)
    weft.parametrize_(layer, WeightCompander())
    assert torch.equal(layer.weight, torch.zeros(2, 3))
    experts = torch.randn(3, 4, 5) * torch.tensor([1.0, 10.0, 0.1]).view(3, 1, 1)
    function = WeightCompander().build(experts, batched=True)
    assert function.log_a.shape == (3, 1, 1)
    torch.testing.assert_close(function(function.right_inverse(experts)), experts)
    assert math.isclose(float(function.log_a[1].detach().exp()), 4 * float(experts[1].std(correction=0)), rel_tol=1e-5)
