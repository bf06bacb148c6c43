"""σReparam: its own mathematics."""

import pytest
import torch
from torch import Tensor, nn

import weft
from weft.adapt import LoRA
from weft.errors import RecipeError
from weft.normalize import SigmaReparam
from weft.normalize.sigma_reparam import top_singular

NUMBERS = torch.Generator().manual_seed(0)


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=NUMBERS)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def spectral_norm(weight: Tensor) -> Tensor:
    return torch.linalg.matrix_norm(weight.detach().double().flatten(1), 2)


def sigma(layer: nn.Module, index: int = 0) -> nn.Module:
    return layer.parametrizations.weight[index]


def attached(layer: nn.Module, **options: object) -> nn.Module:
    weft.parametrize_(layer, SigmaReparam(**options))
    return layer


# finding the norm


@pytest.mark.parametrize(
    "matrix",
    [
        normal(20, 30),
        normal(30, 20),
        normal(200, 100),
        normal(1, 7),
        normal(7, 1),
        normal(1, 1),
        torch.eye(50),
        -torch.eye(3),
        torch.ones(40, 60),
        normal(40, 3) @ normal(3, 50),
        torch.diag(torch.tensor([0.0] * 40 + [5.0])),
        normal(3, 20, 30),
        normal(2, 3, 40, 10),
    ],
    ids=lambda m: "x".join(map(str, m.shape)),
)
def test_the_largest_singular_value(matrix: Tensor) -> None:
    v, value, u = top_singular(matrix.double())
    exact = torch.linalg.svdvals(matrix.double())[..., 0]
    # 200 x 100 is larger than the space that is searched: 1e-6 was seen
    torch.testing.assert_close(value, exact, rtol=1e-5 if max(matrix.shape) > 100 else 1e-12, atol=0)
    torch.testing.assert_close(torch.einsum("...o,...oi,...i->...", v, matrix.double(), u), value)
    for vector in (u, v):
        torch.testing.assert_close(vector.norm(dim=-1), torch.ones_like(value))


def test_a_large_matrix_costs_little_and_comes_close() -> None:
    matrix = torch.randn(600, 1500, generator=torch.Generator().manual_seed(0))
    _, value, _ = top_singular(matrix)
    # the gap between the two largest values decides: 2e-4 is the worst seen among Gaussian matrices
    torch.testing.assert_close(value, torch.linalg.svdvals(matrix)[0], rtol=1e-3, atol=0)


# the equation


@pytest.mark.parametrize("layer", [nn.Linear(9, 5), nn.Conv2d(4, 6, 3, groups=2), nn.Embedding(8, 3)])
def test_attaching_changes_nothing_and_gamma_is_the_norm(layer: nn.Module) -> None:
    layer = layer.double()
    before = layer.weight.detach().clone()
    attached(layer)
    torch.testing.assert_close(layer.weight, before)
    torch.testing.assert_close(sigma(layer).gain.detach(), spectral_norm(before).reshape(1))


def test_gamma_is_the_norm_after_some_iterations() -> None:
    layer = attached(nn.Linear(12, 8).double(), iterations=20)
    left, _, right = torch.linalg.svd(torch.randn(8, 12).double(), full_matrices=False)
    with torch.no_grad():  # the second value is 0.8 of the first: 0.8^40 of it is left after 20 iterations
        layer.parametrizations.weight.original.copy_(left * 0.8 ** torch.arange(8) @ right)
        sigma(layer).gain.fill_(2.5)
    layer.train()(torch.randn(1, 12).double())
    assert abs(spectral_norm(layer.weight) - 2.5) < 2.5e-4


def test_gain_of_one() -> None:
    layer = attached(nn.Linear(9, 5).double(), gain="one")
    torch.testing.assert_close(spectral_norm(layer.weight), torch.tensor(1.0).double())
    assert sigma(layer).gain.item() == 1


def test_blind_to_the_scale_of_the_stored_matrix() -> None:
    layer = attached(nn.Linear(9, 5).double())
    before = layer.weight.detach().clone()
    with torch.no_grad():
        layer.parametrizations.weight.original.mul_(100)
    torch.testing.assert_close(layer.weight, before)


def test_gradients_follow_the_formula_and_the_singular_value() -> None:
    layer = attached(nn.Linear(7, 5, bias=False).double())
    stored, function = layer.parametrizations.weight.original, sigma(layer)
    with torch.no_grad():
        function.gain.fill_(1.7)
    direction = torch.randn(5, 7, dtype=torch.float64)
    (layer.weight * direction).sum().backward()
    value = spectral_norm(stored)
    unit = stored.detach() / value
    formula = 1.7 / value * (direction - (direction * unit).sum() * torch.outer(function.v, function.u))
    torch.testing.assert_close(stored.grad, formula)
    torch.testing.assert_close(function.gain.grad, (direction * unit).sum().reshape(1))
    exact = stored.detach().clone().requires_grad_()
    (1.7 * exact / torch.linalg.svdvals(exact)[0] * direction).sum().backward()
    torch.testing.assert_close(stored.grad, exact.grad)


@pytest.mark.parametrize("layer", [nn.Linear(9, 5), nn.Conv2d(4, 6, 3)])
def test_equals_torchs_spectral_norm_with_the_same_vectors(layer: nn.Module) -> None:
    theirs = nn.utils.parametrizations.spectral_norm(layer.double())
    plain = theirs.parametrizations.weight.original.detach().clone()
    ours = type(layer)(*((4, 6, 3) if plain.dim() == 4 else (9, 5))).double()
    with torch.no_grad():
        ours.weight.copy_(plain)
        ours.bias.copy_(theirs.bias)
    attached(ours, gain="one")
    function, other = sigma(ours), theirs.parametrizations.weight[0]
    function.v.copy_(torch.nn.functional.normalize(torch.randn_like(other._u), dim=0))
    function.u.copy_(torch.nn.functional.normalize(torch.randn_like(other._v), dim=0))
    other._u.copy_(function.v)
    other._v.copy_(function.u)
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64) if plain.dim() == 4 else torch.randn(2, 9, dtype=torch.float64)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))
    ours.train()(x).square().sum().backward()  # one iteration each
    theirs.train()(x).square().sum().backward()
    torch.testing.assert_close(function.v, other._u)
    torch.testing.assert_close(function.u, other._v)
    torch.testing.assert_close(ours.parametrizations.weight.original.grad, theirs.parametrizations.weight.original.grad)
    torch.testing.assert_close(ours.bias.grad, theirs.bias.grad)


def test_experts_have_norms_of_their_own() -> None:
    stack = nn.Module()
    stack.register_parameter("weight", nn.Parameter(torch.randn(3, 4, 6, dtype=torch.float64)))
    attached(stack)
    norms = torch.linalg.matrix_norm(stack.weight.detach(), 2)
    torch.testing.assert_close(sigma(stack).gain.detach(), norms)
    with torch.no_grad():
        sigma(stack).gain.copy_(torch.tensor([1.0, 2.0, 3.0]))
    torch.testing.assert_close(
        torch.linalg.matrix_norm(stack.weight.detach(), 2), torch.tensor([1.0, 2.0, 3.0]).double()
    )


# training


def test_on_lora_the_norm_is_that_of_the_whole_weight() -> None:
    layer = nn.Linear(9, 5).double()
    weft.parametrize_(layer, LoRA(rank=2))
    attached(layer, iterations=30)
    with torch.no_grad():
        layer.parametrizations.weight[0].B.normal_()
        sigma(layer, 1).gain.fill_(0.5)
    layer.train()(torch.randn(1, 9).double())
    assert abs(spectral_norm(layer.weight) - 0.5) < 1e-6
    assert layer.parametrizations.weight.original.requires_grad is False


def test_the_norm_follows_training() -> None:
    torch.manual_seed(0)
    layer = attached(nn.Linear(16, 16))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.05)
    for _ in range(50):
        optimizer.zero_grad()
        (layer(torch.randn(8, 16)) - 1).square().mean().backward()
        optimizer.step()
    # one iteration a step lags a little behind the moving matrix
    torch.testing.assert_close(spectral_norm(layer.weight).float(), sigma(layer).gain.detach()[0], rtol=0.02, atol=0)


def test_autocast_does_not_round_the_norm() -> None:
    layer = attached(nn.Linear(6, 6))
    given = []

    def inner(x: Tensor) -> Tensor:
        given.append(nn.functional.linear(x, layer.parametrizations.weight.original))
        return given[-1]

    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = sigma(layer).product(torch.randn(2, 6), inner)
    assert [g.dtype for g in given] == [torch.float32, torch.bfloat16]  # W u, and W x
    assert y.dtype == torch.bfloat16


def test_a_model_cast_after_attaching_trains() -> None:
    layer = attached(nn.Linear(16, 16)).bfloat16().train()
    layer(torch.randn(2, 16).bfloat16()).sum().backward()
    assert sigma(layer).u.dtype == torch.bfloat16
    assert layer.parametrizations.weight.original.grad.isfinite().all()


def test_vectors_of_a_bfloat16_matrix_move_in_float32() -> None:
    layer = attached(nn.Linear(40, 30).bfloat16()).train()
    u, matrix = sigma(layer).u.clone(), layer.parametrizations.weight.original.detach().double()
    layer(torch.zeros(1, 40).bfloat16())
    v = nn.functional.normalize(matrix @ u.double(), dim=0)
    torch.testing.assert_close(sigma(layer).v.double(), v, rtol=0, atol=1e-6)
    torch.testing.assert_close(
        sigma(layer).u.double(), nn.functional.normalize(matrix.mT @ v, dim=0), rtol=0, atol=1e-6
    )


def test_bfloat16_starts_within_the_rounding_of_gamma() -> None:
    layer = nn.Linear(64, 64).bfloat16()
    before = layer.weight.detach().double()
    attached(layer)
    # γ and each product are rounded to 8 bits: half a unit each
    assert ((layer.weight.double() - before).abs() <= before.abs() * 2**-7).all()


@pytest.mark.parametrize(
    ("value", "message"), [(0.0, "a weight of zeros"), (float("nan"), "holds NaN"), (float("inf"), "holds NaN")]
)
def test_what_has_no_norm_is_refused(value: float, message: str) -> None:
    layer = nn.Linear(3, 2)
    nn.init.constant_(layer.weight, value)
    with pytest.raises(RecipeError, match=f"^weight: .*{message}"):
        attached(layer)


def test_a_matrix_that_becomes_zero_in_training_stays_finite() -> None:
    layer = attached(nn.Linear(3, 2))
    with torch.no_grad():
        layer.parametrizations.weight.original.zero_()
    layer.train()(torch.ones(1, 3)).sum().backward()
    assert torch.equal(layer.weight, torch.zeros(2, 3))
    assert layer.parametrizations.weight.original.grad.isfinite().all()
    assert layer.parametrizations.weight.original.grad.any(), "it cannot leave zero"


@pytest.mark.parametrize("shape", [(5, 4), (2, 5, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_matrix_that_was_zero_for_a_step_is_normalised_again(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    layer = nn.Module()
    layer.register_parameter("weight", nn.Parameter(torch.randn(shape, dtype=dtype)))
    attached(layer, gain="one", iterations=30)
    stack, moved = layer.parametrizations.weight, torch.randn(shape, dtype=dtype)
    for value in (torch.zeros_like(moved), moved):
        with torch.no_grad():
            stack.original.copy_(value)
        stack.update()
    norms = torch.linalg.matrix_norm(layer.weight.detach().double(), 2)
    torch.testing.assert_close(norms, torch.ones_like(norms), rtol=0, atol=0.02 if dtype == torch.bfloat16 else 1e-3)
