"""Weight standardisation: its own mathematics."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import weft
from weft.errors import RecipeError
from weft.normalize import WeightStandardization, standardize

# float64, sums of at most a hundred terms
EXACT = {"rtol": 1e-12, "atol": 1e-12}


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("shape", [(1, 2), (3, 7), (4, 3, 5, 5), (2, 5, 3), (0, 4)])
@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("eps", [1e-5, 0.3])
def test_against_numpy(shape: tuple[int, ...], unbiased: bool, eps: float) -> None:
    weight = np.random.default_rng(0).standard_normal(shape)
    rows = weight.reshape(shape[0], -1) if shape[0] else weight
    expected = np.empty_like(rows)
    for i, row in enumerate(rows):
        centred = row - row.sum() / row.size
        variance = (centred**2).sum() / (row.size - (1 if unbiased else 0))
        expected[i] = centred / (variance + eps) ** 0.5
    made = standardize(torch.from_numpy(rows), eps=eps, unbiased=unbiased)
    np.testing.assert_allclose(made.numpy(), expected, rtol=1e-11, atol=1e-12)


def test_rows_have_mean_0_and_variance_1() -> None:
    layer = nn.Conv2d(6, 8, 3, groups=2)
    weft.parametrize_(layer, WeightStandardization(eps=0.0))
    rows = layer.weight.detach().double().flatten(1)
    assert rows.shape == (8, 27)
    # the float32 values themselves are rounded at 1e-7
    torch.testing.assert_close(rows.mean(1), torch.zeros(8, dtype=torch.float64), rtol=0, atol=1e-6)
    torch.testing.assert_close(rows.var(1, correction=0), torch.ones(8, dtype=torch.float64), rtol=0, atol=1e-5)


def test_equals_the_batch_norm_of_the_weight_that_others_use() -> None:
    weight = torch.randn(5, 4, 3, 3, dtype=torch.float64)
    theirs = functional.batch_norm(weight.reshape(1, 5, -1), None, None, training=True, momentum=0.0, eps=1e-6)
    torch.testing.assert_close(standardize(weight.flatten(1), eps=1e-6), theirs[0], **EXACT)


def test_blind_to_the_scale_and_offset_of_each_row() -> None:
    weight = torch.randn(4, 9, dtype=torch.float64)
    scale, offset = torch.rand(4, 1, dtype=torch.float64) + 0.1, torch.randn(4, 1, dtype=torch.float64)
    torch.testing.assert_close(standardize(scale * weight + offset, eps=0), standardize(weight, eps=0), **EXACT)


def test_gradients_sum_to_zero_and_are_orthogonal_to_the_weight() -> None:
    weight = torch.randn(4, 9, dtype=torch.float64, requires_grad=True)
    (standardize(weight, eps=0) ** 3).sum().backward()
    assert weight.grad is not None
    assert weight.grad.abs().max() > 0.1
    centred = weight - weight.mean(1, keepdim=True)
    for sums in (weight.grad.sum(1), (weight.grad * centred).sum(1)):
        torch.testing.assert_close(sums, torch.zeros_like(sums), rtol=0, atol=1e-11)


def test_the_output_of_a_normalised_network_does_not_depend_on_the_scale() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8)).double()
    weft.parametrize_(net, WeightStandardization(eps=0.0), where="0")
    x = torch.randn(1, 3, 6, 6, dtype=torch.float64)
    before = net(x)
    with torch.no_grad():
        net[0].parametrizations.weight.original.mul_(17)
    torch.testing.assert_close(net(x), before, **EXACT)


def test_experts_are_standardised_by_output() -> None:
    stack = nn.Module()
    stack.register_parameter("weight", nn.Parameter(torch.randn(3, 4, 50)))
    weft.parametrize_(stack, WeightStandardization())
    torch.testing.assert_close(stack.weight.mean(-1), torch.zeros(3, 4), rtol=0, atol=1e-6)
    for one, whole in zip(stack.parametrizations.weight.original, stack.weight):
        torch.testing.assert_close(standardize(one), whole)


def test_low_precision_is_rounded_once() -> None:
    weight = torch.randn(4, 300).bfloat16()
    exact = standardize(weight.double(), eps=1e-5)
    # a number is at most half a unit of its 8 bits away from the exact one, and float32 sums a little more
    assert ((standardize(weight) - exact).abs() <= exact.abs() * 2**-8 * 1.01).all()


@pytest.mark.parametrize("layer", [nn.Conv2d(1, 4, 1), nn.Conv2d(4, 4, 1, groups=4), nn.Linear(1, 3)])
def test_one_weight_an_output_has_no_variance(layer: nn.Module) -> None:
    with pytest.raises(RecipeError, match=r"^weight: each output has one weight"):
        weft.parametrize_(layer, WeightStandardization())
