import copy
import math

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from torch import nn
from torch.nn import functional

import weft
from weft.errors import RecipeError
from weft.normalize import ScaledWeightStandardization, scaled_standardize
from weft.normalize.scaled_weight_standardization import ACTIVATION_SCALES


def test_against_the_formula_filter_by_filter() -> None:
    random = np.random.default_rng(0)
    weight, gain = random.standard_normal((5, 7)), random.standard_normal(5)
    weight[3] *= 1e-4  # below eps: divided by sqrt(eps)
    expected = np.zeros_like(weight)
    for i, row in enumerate(weight):
        mean = sum(row) / 7
        variance = sum((v - mean) ** 2 for v in row) / 7
        expected[i] = [1.5 * gain[i] * (v - mean) / math.sqrt(max(variance * 7, 1e-4)) for v in row]
    made = scaled_standardize(torch.from_numpy(weight), torch.from_numpy(gain), scale=1.5)
    np.testing.assert_allclose(made, expected, rtol=1e-12)


def test_rows_have_zero_mean_and_norm_gain_times_scale() -> None:
    layer = nn.Conv2d(4, 6, 3, groups=2).double()
    weft.parametrize_(layer, ScaledWeightStandardization(scale=2.0))
    weft.functions(layer)["weight"][0].gain.data = torch.arange(1.0, 7.0, dtype=torch.float64)
    rows = layer.weight.detach().flatten(1)
    torch.testing.assert_close(rows.sum(1), torch.zeros(6, dtype=torch.float64), atol=1e-12, rtol=0)
    torch.testing.assert_close(rows.norm(dim=1), 2 * torch.arange(1.0, 7.0, dtype=torch.float64))


def test_scale_and_shift_of_a_filter_do_not_matter() -> None:
    weight = torch.randn(3, 10, dtype=torch.float64)
    torch.testing.assert_close(scaled_standardize(4 * weight + 7), scaled_standardize(weight))


def test_gradients_sum_to_zero_and_are_orthogonal_to_the_weight() -> None:
    weight = torch.randn(4, 9, dtype=torch.float64, requires_grad=True)
    (scaled_standardize(weight) * torch.randn(4, 9)).sum().backward()
    zeros = torch.zeros(4, dtype=torch.float64)
    torch.testing.assert_close(weight.grad.sum(1), zeros, atol=1e-12, rtol=0)
    centred = weight.detach() - weight.detach().mean(1, keepdim=True)
    torch.testing.assert_close((weight.grad * centred).sum(1), zeros, atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", sorted(ACTIVATION_SCALES))
def test_activation_scales_restore_unit_variance(name: str) -> None:
    activate = getattr(functional, name)

    def moment(power: int) -> float:
        def integrand(z: float) -> float:
            value = float(activate(torch.tensor(z, dtype=torch.float64)))
            return value**power * math.exp(-z * z / 2) / math.sqrt(2 * math.pi)

        return quad(integrand, -8, 0, epsabs=1e-10)[0] + quad(integrand, 0, 8, epsabs=1e-10)[0]

    # the published constants were drawn from samples: right to three digits
    assert ACTIVATION_SCALES[name] == pytest.approx((moment(2) - moment(1) ** 2) ** -0.5, rel=2e-3)


def test_the_signal_keeps_its_size_over_twenty_layers() -> None:
    torch.manual_seed(0)
    x = torch.randn(256, 1024)
    plain = x
    for _ in range(20):
        weight = torch.randn(1024, 1024)
        x = functional.relu(x) @ scaled_standardize(weight, scale=ACTIVATION_SCALES["relu"]).T
        plain = functional.relu(plain) @ scaled_standardize(weight).T
    assert float(x.var()) == pytest.approx(1, abs=0.1)
    assert float(plain.var()) < 1e-6  # each layer without the scale leaves a third


def test_attached_to_a_layer_and_baked() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 6, 3))
    weft.parametrize_(model, ScaledWeightStandardization())
    x = torch.randn(5, 2, 8)
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    expected = model(x)
    torch.testing.assert_close(compiled(x), expected)
    expected.sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    weft.bake_(model)
    assert sorted(model.state_dict()) == ["0.bias", "0.weight", "3.bias", "3.weight"]
    torch.testing.assert_close(model(x), expected)


def test_a_stack_of_matrices_is_standardised_matrix_by_matrix() -> None:
    experts = torch.randn(3, 4, 5)
    function = ScaledWeightStandardization().build(experts, batched=True)
    made = function(experts)
    for one, weight in zip(made, experts):
        torch.testing.assert_close(one, scaled_standardize(weight))


def test_without_gain_there_is_nothing_to_learn() -> None:
    function = ScaledWeightStandardization(gain=False).build(torch.randn(3, 4), batched=False)
    assert list(function.parameters()) == []


def test_one_weight_an_output_is_refused() -> None:
    with pytest.raises(RecipeError, match="no variance"):
        weft.parametrize_(nn.Linear(1, 4), ScaledWeightStandardization())
