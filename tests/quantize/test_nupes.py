"""PowerQuant and NUPES: a = 1, automorphisms, optima against a fine grid and known laws, gradients and their bounds."""

import math
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from real_layer import held_out_error, real_layer

from weft.errors import RecipeError
from weft.quantize import NUPES, RTN, PowerCodes, PowerQuant, power_codes, power_exponent, reconstruct_layer
from weft.quantize.nupes import _Power
from weft.quantize.powerquant import power_levels
from weft.quantize.soft import Descent


def draws(law: str, rows: int = 4, columns: int = 20000) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    uniform = 2 * torch.rand(rows, columns, generator=generator) - 1
    if law == "uniform":
        return uniform
    if law == "laplace":
        return -uniform.sign() * (1 - uniform.abs()).log()
    return torch.randn(rows, columns, generator=generator)


def by_definition(w: Tensor, a: float, bits: int) -> Tensor:
    q, m = 2 ** (bits - 1) - 1, w.abs().amax(1, keepdim=True)
    code = (q * w.sign() * w.abs() ** a / m**a).round()
    return code.sign() * (code.abs() * m**a / q) ** (1 / a)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("size", [0, 50])
def test_an_exponent_of_one_is_rounding_to_nearest(bits: int, size: int) -> None:
    w = draws("normal", 8, 200)
    nearest = RTN(bits, size, "narrow").fit("", w, None)  # type: ignore[arg-type]
    made = power_codes(w, PowerQuant(bits, size, 1.0))
    assert torch.equal(made.codes.to(torch.int16) - (2 ** (bits - 1) - 1), nearest.codes)
    assert torch.allclose(made.dequantize(), nearest.dequantize(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("a", [0.3, 0.5, 1.3])
def test_codes_by_definition(a: float) -> None:
    w = draws("normal", 8, 200)
    assert torch.allclose(
        power_codes(w, PowerQuant(4, 0, a)).dequantize().double(), by_definition(w.double(), a, 4), atol=1e-6
    )
    q = torch.arange(-7, 8).double()
    assert torch.allclose(
        power_levels(torch.tensor([a]), 4)[0].double(), q.sign() * (q.abs() / 7) ** (1 / float(torch.tensor(a)))
    )


def test_powers_are_automorphisms_of_products() -> None:
    torch.manual_seed(0)
    w, x = torch.randn(99, dtype=torch.float64), torch.randn(99, dtype=torch.float64)
    for a in (0.3, 0.5, 1.4):
        product = (w.abs() ** a * x.abs() ** a) ** (1 / a) * w.sign() * x.sign()
        assert torch.allclose(product, w * x, rtol=1e-12)


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_the_optimum_is_that_of_a_fine_grid(bits: int) -> None:
    w = draws("laplace", 3, 4000)
    errors = {round(a, 3): float((w - by_definition(w.double(), a, bits)).square().sum()) for a in
              torch.arange(0.2, 1.5005, 0.001, dtype=torch.float64).tolist()}  # fmt: skip
    found = power_exponent(w, PowerQuant(bits))
    # the error has small steps: no exponent of the grid is better by a hundredth
    assert errors[round(found, 3)] <= 1.01 * min(errors.values()), (found, min(errors, key=lambda k: errors[k]))
    rows = PowerQuant(bits, unit="row")
    single = [float((w[i : i + 1] - by_definition(w[i : i + 1].double(), power_exponent(w[i : i + 1], PowerQuant(bits)), bits))
                    .square().sum()) for i in range(3)]  # fmt: skip
    assert float((w - power_codes(w, rows).dequantize()).square().sum()) <= 1.01 * sum(single)


@pytest.mark.parametrize(
    ("law", "expected", "gain"), [("normal", 0.62, 1.65), ("laplace", 0.46, 3.1), ("uniform", 1.0, 1.0)]
)
def test_optima_of_known_laws(law: str, expected: float, gain: float) -> None:
    w = draws(law, 1, 300000)
    found = power_exponent(w)
    assert abs(found - expected) < 0.04
    mse = [float((w - power_codes(w, PowerQuant(4, 0, a)).dequantize()).square().mean()) for a in (1.0, found)]
    assert mse[0] / mse[1] == pytest.approx(gain, rel=0.2)


@pytest.mark.parametrize("law", ["normal", "laplace"])
def test_optima_of_many_bits_in_closed_form(law: str) -> None:
    """With fine steps the error is E |w|^{2 − 2a} m^{2a} / 12 q² a², whose derivative by a is zero at the optimum."""
    w = draws(law, 1, 100000)
    largest = w.abs().amax().double()
    a = torch.linspace(0.3, 1.2, 9001, dtype=torch.float64)
    mean_power = {  # log E |w|^{2 − 2a}
        "normal": (1 - a) * math.log(2) + torch.lgamma(1.5 - a) - math.log(math.pi) / 2, "laplace": torch.lgamma(3 - 2 * a),
    }[law]  # fmt: skip
    best = float(a[(mean_power + 2 * a * largest.log() - 2 * a.log()).argmin()])
    assert power_exponent(w, PowerQuant(8)) == pytest.approx(best, abs=0.02)


def test_one_exponent_for_a_network_is_that_of_the_summed_error() -> None:
    a, b = draws("normal", 2, 3000), 0.1 * draws("laplace", 2, 3000)
    found = power_exponent([a, b])
    assert found == pytest.approx(power_exponent(a), abs=0.03)  # a's weights are ten times larger
    assert power_exponent([0.01 * a, b]) == pytest.approx(power_exponent(b), abs=0.03)


def test_gradients() -> None:
    torch.manual_seed(0)
    t = (torch.rand(4, 9, dtype=torch.float64) * 0.9 + 0.1) * torch.randn(4, 9, dtype=torch.float64).sign()
    t, a = t.requires_grad_(), torch.full((4, 1), 0.6, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda t, a: _Power.apply(t, a, 7), (t, a))
    # the card's formula, and its bound: |∂/∂a| a² = t^{1/a} |ln t| ≤ a / e
    for exponent in (0.2, 0.5, 1.5):
        a = torch.tensor([[exponent]], dtype=torch.float64, requires_grad=True)
        t = torch.linspace(0, 1, 2001, dtype=torch.float64).reshape(-1, 1).requires_grad_()
        each = a.expand(2001, 1).clone().detach().requires_grad_()
        _Power.apply(t, each, 127).sum().backward()
        assert each.grad is not None
        assert t.grad is not None
        assert float((each.grad * exponent**2).abs().max()) <= exponent / math.e + 1e-9
        assert float(each.grad[0]) == 0
        assert t.grad.isfinite().all()


@pytest.mark.parametrize("unit", ["matrix", "row"])
def test_nupes_starts_at_powerquant_and_keeps_its_bounds(unit: str) -> None:
    w, generator = draws("normal", 8, 96), torch.Generator().manual_seed(1)
    x = torch.randn(300, 96, generator=generator) @ torch.randn(96, 96, generator=generator)
    config = PowerQuant(3, 8, unit=unit)
    soft = PowerCodes(w, config, learned=0.5)
    start = power_codes(w, config)
    assert torch.equal(soft.packed().codes, start.codes)
    assert torch.allclose(soft(), start.dequantize(), atol=1e-6)
    before, after = reconstruct_layer(w, x.T @ x, soft, Descent(80, 3e-3))
    assert after < 0.96 * before
    made = soft.packed()
    assert int(made.codes.max()) <= 6
    assert 0.2 <= float(soft.exponent().detach().min()) <= float(soft.exponent().detach().max()) <= 1.5
    assert torch.allclose(made.dequantize(), soft().detach(), atol=1e-5)
    if unit == "row":
        assert made.table is not None
        hundredths = 100 * soft.exponent().detach()
        assert torch.allclose(hundredths, hundredths.round(), atol=1e-3)
    with torch.no_grad():
        soft.exponent_log.fill_(5)
        soft.project()
    assert float(soft.exponent().detach().max()) == pytest.approx(1.5)


def test_a_real_layer() -> None:
    weight, gram, held = real_layer()
    error = {name: held_out_error(config, weight, gram, held) for name, config in {
        "narrow": RTN(4, 0, "narrow"), "power": PowerQuant(4), "nupes": NUPES(4, steps=100, rate=3e-3),
    }.items()}  # fmt: skip
    assert error["nupes"] < error["power"] < error["narrow"], error


def test_bad_configurations_are_refused() -> None:
    for bad in ({"bits": 1}, {"group_size": -1}, {"unit": "x"}, {"exponent": 3.0}):
        with pytest.raises(RecipeError):
            PowerQuant(**bad)  # type: ignore[arg-type]
    for bad in ({"steps": -1}, {"samples": 0}, {"learned": 2.0}, {"rate": -1.0}):
        with pytest.raises(RecipeError):
            NUPES(**bad)  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="at least one"):
        power_exponent([])
