import numpy as np
import pytest
import torch
from scipy.optimize import least_squares
from torch.nn import functional

from weft.errors import RecipeError, ShapeError
from weft.init import GroupRational, fit_rational, rational
from weft.init.rational_fit import PRESETS, RationalFit

FUNCTIONS = {"identity": lambda x: x, "gelu": functional.gelu, "silu": functional.silu}
GRID = torch.linspace(-3, 3, 1001, dtype=torch.float64)


def values(fit: RationalFit, x: torch.Tensor) -> torch.Tensor:
    return rational(x, x.new_tensor(fit.numerator), x.new_tensor(fit.denominator), fit.form)


@pytest.mark.parametrize(("name", "form"), PRESETS)
def test_presets_are_what_a_fit_gives(name: str, form: str) -> None:
    stored, again = PRESETS[name, form], fit_rational(FUNCTIONS[name], form=form)
    # coefficients of nearly equal fits may differ, their functions may not
    torch.testing.assert_close(values(stored, GRID), values(again, GRID), rtol=0, atol=1e-6)
    error = (values(stored, GRID) - FUNCTIONS[name](GRID)).abs().max().item()
    assert error == pytest.approx(stored.error, rel=0.01, abs=1e-12)
    assert error <= {"identity": 0, "gelu": 3e-3 if form == "A" else 1e-3, "silu": 1.2e-6}[name]


@pytest.mark.parametrize("form", ["A", "B"])
@pytest.mark.parametrize("function", [functional.gelu, torch.tanh, torch.relu, functional.mish])
def test_scipy_finds_nothing_better(function, form: str) -> None:
    x, y = GRID.numpy(), function(GRID).numpy()
    ours = fit_rational(function, form=form)
    loss = (values(ours, GRID) - function(GRID)).square().sum().item() / 2
    top, below = x[:, None] ** np.arange(6), x[:, None] ** np.arange(1, 5)

    def error(p: np.ndarray) -> np.ndarray:
        q = 1 + (abs(below) @ p[6:] if form == "A" else abs(below @ p[6:]))
        return top @ p[:6] / q - y

    bounds = ([-np.inf] * 6 + [0 if form == "A" else -np.inf] * 4, [np.inf] * 10)
    random = np.random.default_rng(0)
    starts = [np.r_[ours.numerator, ours.denominator]]
    starts += [np.r_[random.standard_normal(6), abs(random.standard_normal(4))] for _ in range(2)]
    for start in starts:
        found = least_squares(error, np.maximum(start, np.array(bounds[0]) + 1e-12), bounds=bounds, max_nfev=60)
        assert loss <= found.cost * (1 + 1e-4)


def test_fits_say_what_they_cannot() -> None:
    with pytest.raises(RecipeError, match="elementwise"):
        fit_rational(lambda x: x.sum())
    with pytest.raises(RecipeError, match="finite"):
        fit_rational(torch.log)
    with pytest.raises(RecipeError, match="interval"):
        fit_rational(torch.tanh, interval=(1, 1))
    wide = fit_rational(functional.gelu, interval=(-8, 8))
    x = torch.linspace(-8, 8, 1001, dtype=torch.float64)
    assert (values(wide, x) - functional.gelu(x)).abs().max().item() == pytest.approx(wide.error)
    assert wide.error < 0.05
    line = fit_rational(lambda x: 3 * x - 1)
    assert line.denominator == pytest.approx((0, 0, 0, 0), abs=1e-12)


@pytest.mark.parametrize("form", ["A", "B"])
def test_identity_is_exact(form: str) -> None:
    layer = GroupRational(16, 4, activation="identity", form=form)
    x = torch.randn(3, 16) * torch.logspace(-20, 6, 16)
    assert torch.equal(layer(x), x)


@pytest.mark.parametrize("form", ["A", "B"])
@pytest.mark.parametrize("axis", [-1, 1])
def test_groups_against_a_loop(form: str, axis: int) -> None:
    torch.manual_seed(0)
    layer = GroupRational(12, 3, form=form, axis=axis).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    x = torch.randn(2, 12, 5, 4, dtype=torch.float64) if axis == 1 else torch.randn(2, 5, 12, dtype=torch.float64)
    a, b = layer.weight_numerator[0], layer.weight_denominator
    expected = torch.empty_like(x)
    for channel in range(12):
        z = x.select(axis, channel)
        terms = [b[channel // 4, i - 1] * z**i for i in range(1, 5)]
        q = 1 + (sum(t.abs() for t in terms) if form == "A" else sum(terms).abs())
        assert bool((q >= 1).all())
        expected.select(axis, channel).copy_(sum(a[i] * z**i for i in range(6)) / q)
    torch.testing.assert_close(layer(x), expected)


def test_gradients_against_the_formulas() -> None:
    torch.manual_seed(0)
    a, b = (
        torch.randn(6, dtype=torch.float64, requires_grad=True),
        torch.randn(4, dtype=torch.float64, requires_grad=True),
    )
    x = torch.randn(7, dtype=torch.float64, requires_grad=True)
    rational(x, a, b).sum().backward()
    z, d = x.detach(), b.detach()
    p = sum(a.detach()[i] * z**i for i in range(6))
    q = 1 + sum(d[i - 1].abs() * z.abs() ** i for i in range(1, 5))
    slope_p = sum(i * a.detach()[i] * z ** (i - 1) for i in range(1, 6))
    slope_q = z.sign() * sum(i * d[i - 1].abs() * z.abs() ** (i - 1) for i in range(1, 5))
    torch.testing.assert_close(a.grad, torch.stack([(z**i / q).sum() for i in range(6)]))
    torch.testing.assert_close(
        b.grad, torch.stack([-(d[i - 1].sign() * z.abs() ** i * p / q**2).sum() for i in range(1, 5)])
    )
    torch.testing.assert_close(x.grad, slope_p / q - p * slope_q / q**2)


@pytest.mark.parametrize("form", ["A", "B"])
def test_denominators_of_the_identity_learn(form: str) -> None:
    layer = GroupRational(4, 2, activation="identity", form=form)
    x = torch.randn(64, 4)
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
    before = (layer(x) - torch.tanh(x)).square().mean()
    for step in range(200):
        loss = (layer(x) - torch.tanh(x)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        if step == 0:
            # ∂F/∂bᵢ = −|x|ⁱ P / Q² with the sign of 0 taken as +1 (form B: −xⁱ P / Q², where Σ bx = 0)
            upstream = 2 * (x - torch.tanh(x)) / x.numel()
            base = x.abs() if form == "A" else x
            expected = [[-(upstream * base**i * x)[:, 2 * g : 2 * g + 2].sum() for i in range(1, 5)] for g in range(2)]
            torch.testing.assert_close(layer.weight_denominator.grad, torch.tensor(expected))
        optimizer.step()
    assert loss < before / 10
    assert layer.weight_denominator.abs().max() > 0.05


def test_powers_do_not_overflow_half_precision() -> None:
    x = torch.linspace(-100, 100, 16).reshape(2, 8).half()
    for layer in (GroupRational(8), GroupRational(8).half()):
        y = layer(x)
        assert y.dtype == torch.float16
        assert bool(y.isfinite().all())
        torch.testing.assert_close(y.float(), layer.float()(x.float()), rtol=1e-3, atol=1e-3)


def test_refuses_what_does_not_fit() -> None:
    with pytest.raises(RecipeError, match="8 groups do not divide 12"):
        GroupRational(12)
    with pytest.raises(RecipeError, match="gelu, identity, silu"):
        GroupRational(8, activation="relu")
    with pytest.raises(RecipeError, match="form A"):
        GroupRational(8, form="B").set_coefficients_(fit_rational(torch.tanh))
    with pytest.raises(ShapeError, match="a multiple of 8"):
        GroupRational(None)(torch.ones(2, 12))
    with pytest.raises(ShapeError, match="axis 1"):
        GroupRational(8, axis=1)(torch.ones(8))
    assert GroupRational(None)(torch.ones(2, 24)).shape == (2, 24)
    assert GroupRational(8)(torch.ones(0, 8)).shape == (0, 8)
