import numpy as np
import pytest
import torch
from torch import nn

from weft.errors import RecipeError, ShapeError
from weft.normalize import PowerNorm


def random_layer(**options: object) -> PowerNorm:
    layer = PowerNorm(3, **options).double()  # type: ignore[arg-type]
    with torch.no_grad():
        layer.weight.uniform_(0.5, 2)
        layer.bias.normal_()
    return layer


def test_warming_up_it_is_x_over_its_root_mean_square_with_the_exact_gradient() -> None:
    torch.manual_seed(0)
    layer = random_layer(warmup=10)
    for _ in range(4):
        x = torch.randn(4, 5, 3, dtype=torch.float64, requires_grad=True)
        target = torch.randn_like(x)
        made = layer(x)
        expected = x / (x.square().mean((0, 1)) + layer.eps).sqrt() * layer.weight + layer.bias
        torch.testing.assert_close(made, expected)
        ours = torch.autograd.grad((made * target).sum(), (x, layer.weight, layer.bias))
        exact = torch.autograd.grad((expected * target).sum(), (x, layer.weight, layer.bias))
        torch.testing.assert_close(ours, exact)


def test_forward_and_backward_against_the_algorithm_in_numpy() -> None:
    random, warmup, a, b = np.random.default_rng(0), 3, 0.8, 0.9
    layer = random_layer(warmup=warmup, alpha_forward=a, alpha_backward=b)
    gamma, beta = layer.weight.detach().numpy(), layer.bias.detach().numpy()
    square, nu, m = np.ones(3), np.zeros(3), np.zeros(3)
    for step in range(12):
        x, upstream = random.normal(0.3, 1 + step / 10, (7, 3)), random.standard_normal((7, 3))
        batch = (x**2).mean(0)
        used = batch if step < warmup else square.copy()
        square = square + (batch - square) / (step + 1) if step < warmup else a * square + (1 - a) * batch
        normal = x / np.sqrt(used + 1e-5)
        g = gamma * upstream
        projection, size = (g * normal).mean(0), (normal**2).mean(0)
        expected = (g - (projection if step < warmup else nu) * normal) / np.sqrt(used + 1e-5)
        given = torch.from_numpy(x).requires_grad_()
        made = layer(given)
        layer.zero_grad()
        made.backward(torch.from_numpy(upstream))
        np.testing.assert_allclose(made.detach(), normal * gamma + beta, rtol=1e-10)
        np.testing.assert_allclose(given.grad, expected, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(layer.weight.grad, (upstream * normal).sum(0), rtol=1e-9)
        nu = nu * (1 - (1 - b) * size) + (1 - b) * projection
        # the code's form of the same recursion keeps m = ν / (1 − b)
        m = m + ((g - (1 - b) * m * normal) * normal).mean(0)
        np.testing.assert_allclose(layer.running_projection, nu, rtol=1e-9)
        np.testing.assert_allclose(nu, (1 - b) * m, rtol=1e-9)
        np.testing.assert_allclose(layer.running_square, square, rtol=1e-9)


def test_padding_has_no_influence() -> None:
    torch.manual_seed(0)
    valid = torch.tensor([[True, True, False], [True, False, False]])
    x = torch.randn(2, 3, 3, dtype=torch.float64)
    other = torch.where(valid.unsqueeze(-1), x, 100.0)
    for warmup in (0, 5):
        first, second, packed = (random_layer(warmup=warmup) for _ in range(3))
        second.load_state_dict(first.state_dict())
        packed.load_state_dict(first.state_dict())
        for _ in range(3):
            y, z, w = first(x, valid), second(other, valid), packed(x[valid])
            torch.testing.assert_close(y[valid], z[valid])
            torch.testing.assert_close(y[valid], w)
            for made in (y[valid], z[valid], w):
                made.square().sum().backward()
        for name, value in first.state_dict().items():
            torch.testing.assert_close(value, second.state_dict()[name])
            torch.testing.assert_close(value, packed.state_dict()[name])
        torch.testing.assert_close(first.weight.grad, packed.weight.grad)


def test_a_batch_of_padding_only_is_survived() -> None:
    layer = random_layer(warmup=0)
    layer(torch.ones(2, 3, dtype=torch.float64), torch.zeros(2, dtype=torch.bool)).sum().backward()
    assert all(torch.isfinite(v).all() for v in layer.state_dict().values())


def test_a_jump_of_the_input_does_not_make_the_gradient_diverge() -> None:
    torch.manual_seed(0)
    layer = random_layer(warmup=0)
    for _ in range(200):
        layer((100 * torch.randn(64, 3)).double()).square().sum().backward()
        layer.running_square.fill_(1.0)  # as if it lagged for ever
        assert torch.isfinite(layer.running_projection).all()
    # ν is a decayed average of Λ, so it stays of the order of Λ ≈ 2 γ² mean(x̂²) = 2 · 4 · 10⁴ at most
    assert float(layer.running_projection.abs().max()) < 2e5


@pytest.mark.parametrize("bias", [True, False])
def test_fused_into_the_next_layer_evaluation_is_the_same(bias: bool) -> None:
    torch.manual_seed(0)
    layer, linear = random_layer(), nn.Linear(3, 4, bias=bias).double()
    for _ in range(3):
        layer(torch.randn(9, 3, dtype=torch.float64))
    x = torch.randn(2, 5, 3, dtype=torch.float64)
    expected = linear(layer.eval()(x))
    left = layer.fuse_(linear)
    torch.testing.assert_close(linear(left(x)), expected)


def test_groups_divide_each_token_first() -> None:
    torch.manual_seed(0)
    layer = PowerNorm(4, groups=2, warmup=5, eps=0)
    x = torch.randn(6, 4)
    first = (x.view(6, 2, 2) / x.view(6, 2, 2).square().mean(-1, keepdim=True).sqrt()).view(6, 4)
    torch.testing.assert_close(layer(x), first / first.square().mean(0).sqrt())
    torch.testing.assert_close(layer(100 * x), layer(x))
    with pytest.raises(RecipeError, match="cannot be folded"):
        layer.fuse_(nn.Linear(4, 2))
    with pytest.raises(ShapeError, match="3 groups do not divide 4"):
        PowerNorm(4, groups=3)
