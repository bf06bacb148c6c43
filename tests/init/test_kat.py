import math

import pytest
import torch
from scipy import integrate, stats
from torch import nn
from torch.nn import functional

from weft.errors import RecipeError
from weft.init import GRKAN, GroupRational, activation_gain, gr_kan_variance_preserving_, replace_activations_


def test_gains_against_closed_forms_and_scipy() -> None:
    assert activation_gain(lambda x: x) == pytest.approx(1)
    assert activation_gain(torch.relu) == pytest.approx(math.sqrt(2))
    assert activation_gain(torch.exp) == pytest.approx(math.exp(-1))  # E exp(2z) = e²
    # by parts: E[z² Φ(z)²] = 1/3 + 1 / (2π √3)
    assert activation_gain(functional.gelu) == pytest.approx(
        (1 / 3 + 1 / (2 * math.pi * math.sqrt(3))) ** -0.5, abs=1e-9
    )
    for function in (functional.silu, torch.tanh, functional.mish):
        square, _ = integrate.quad(
            lambda z, f=function: f(torch.tensor(z, dtype=torch.float64)).item() ** 2 * stats.norm.pdf(z),
            -12,
            12,
            epsabs=1e-12,
        )
        assert activation_gain(function) == pytest.approx(square**-0.5, abs=1e-9)


def test_gains_that_do_not_exist() -> None:
    with pytest.raises(RecipeError, match="mean square"):
        activation_gain(torch.zeros_like)
    with pytest.raises(RecipeError, match="mean square"):
        activation_gain(torch.log)
    with pytest.raises(RecipeError, match="elementwise"):
        activation_gain(torch.sum)


@pytest.mark.parametrize("activation", ["silu", "gelu", "identity"])
def test_depth_keeps_the_variance_behind_norms(activation: str) -> None:
    torch.manual_seed(0)
    blocks = [GRKAN(128, 256, activation=activation) for _ in range(20)]

    def through() -> tuple[list[float], float]:
        x, found = torch.randn(256, 128), []
        for block in blocks:
            branch = block(functional.layer_norm(x, (128,)))
            found.append(branch.square().mean().item())
            x = x + branch
        return found, x.square().mean().item()

    with torch.no_grad():
        branches, stream = through()
        assert all(0.5 < b < 2 for b in branches)
        assert stream == pytest.approx(21, rel=0.25)  # 1 + 20 branches of variance 1, nearly independent
        for module in nn.ModuleList(blocks).modules():  # what the released training code ends up with
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
        assert max(through()[0]) < 0.01


def variance_map(activation: str, variance: float) -> float:
    """Variance behind an activation and a wide layer of weights that keep variance 1."""
    function = GroupRational(1, 1, activation=activation).double()
    scaled = activation_gain(lambda z: function(math.sqrt(variance) * z.unsqueeze(1)).squeeze(1))
    return (activation_gain(lambda z: function(z.unsqueeze(1)).squeeze(1)) / scaled) ** 2


def test_without_norms_variance_one_is_an_unstable_fixed_point() -> None:
    for activation, rate in (("identity", 1.0), ("silu", 1.173), ("gelu", 1.144)):
        assert variance_map(activation, 1) == pytest.approx(1)
        slope = (variance_map(activation, 1.01) - variance_map(activation, 0.99)) / 0.02
        assert slope == pytest.approx(rate, abs=1e-3)


def test_gains_are_those_of_the_functions_that_are_there() -> None:
    torch.manual_seed(0)
    mlp = GRKAN(64, 512, activation="gelu", groups=2)
    with torch.no_grad():  # a function that has learned to be three times as large
        mlp.act2.weight_numerator.mul_(3)
    gr_kan_variance_preserving_(mlp)
    assert mlp.fc2.weight.var().item() * 512 == pytest.approx(2.3517 / 9, rel=0.03)
    assert mlp.fc1.weight.var().item() * 64 == pytest.approx(1, rel=0.03)
    assert mlp.fc1.bias.abs().max() == mlp.fc2.bias.abs().max() == 0
    with pytest.raises(RecipeError, match="for a GRKAN, got a Linear"):
        gr_kan_variance_preserving_(nn.Linear(2, 2))


def test_built_without_memory() -> None:
    with torch.device("meta"):
        mlp = GRKAN(16)
    assert mlp.fc1.weight.is_meta
    mlp = mlp.to_empty(device="cpu")
    mlp.load_state_dict(GRKAN(16).state_dict())
    assert bool(mlp(torch.ones(16)).isfinite().all())


class Transformer(nn.Module):
    """An encoder whose activations are modules, one of them used twice."""

    def __init__(self) -> None:
        super().__init__()
        shared = nn.GELU()
        self.first = nn.Sequential(nn.Linear(16, 32), shared, nn.Linear(32, 16))
        self.second = nn.Sequential(nn.Linear(16, 32), shared, nn.Linear(32, 16))
        self.third = nn.Sequential(nn.Linear(16, 32), nn.SiLU(), nn.Linear(32, 16))
        self.fourth = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fourth(self.third(self.second(self.first(x))))


@pytest.mark.parametrize("form", ["A", "B"])
def test_replaced_activations_compute_the_same(form: str) -> None:
    torch.manual_seed(0)
    model = Transformer().double().eval()
    x = torch.rand(50, 16, dtype=torch.float64)
    inputs: list[torch.Tensor] = []
    hooks = [
        m.register_forward_pre_hook(lambda m, i: inputs.append(i[0])) for m in model.modules() if isinstance(m, nn.GELU)
    ]
    expected = model(x)
    for hook in hooks:
        hook.remove()
    assert max(i.abs().max() for i in inputs) < 3  # within the interval of the fit
    parts = {n: getattr(model, n)(x) for n in ("first", "third", "fourth")}
    errors = replace_activations_(model, (nn.GELU, nn.SiLU, nn.Tanh), form=form)
    assert set(errors) == {"first.1", "third.1", "fourth.1"}
    for name, before in parts.items():
        part = getattr(model, name)
        limit = errors[f"{name}.1"] * part[2].weight.abs().sum(1).max().item()  # errors through the second matrix
        assert (part(x) - before).abs().max().item() <= limit * 1.05 + 1e-7  # 1e-7: coefficients were float32
    assert (model(x) - expected).abs().max() < 0.01
    assert model.first[1] is model.second[1]
    assert not model.first[1].training
    assert model.first[1].weight_numerator.dtype == torch.float64
    model(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_replacing_by_name_interval_and_axis() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.SiLU(), nn.Conv2d(8, 8, 1), nn.GELU(approximate="tanh"))
    x = 3 * torch.randn(2, 3, 6, 6)
    expected = model(x)
    errors = replace_activations_(model, where=["1", nn.GELU], groups=4, axis=1, interval=(-10, 10))
    assert list(errors) == ["1", "3"]
    assert 1e-6 < max(errors.values()) < 0.1
    assert (model(x) - expected).abs().max() < 0.2
    assert isinstance(model[3], GroupRational)
    assert (model[3].axis, model[3].groups, model[3].activation) == (1, 4, "fitted")


def test_what_cannot_be_replaced_changes_nothing() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.GELU(), nn.Softmax(-1))
    with pytest.raises(RecipeError, match=r"No module was chosen by 'sigmoid'.*types are"):
        replace_activations_(model, "sigmoid")
    with pytest.raises(RecipeError, match=r"'0', a Linear, is no elementwise activation"):
        replace_activations_(model, (nn.GELU, nn.Linear))
    assert isinstance(model[1], nn.GELU)
    with pytest.raises(RecipeError, match="the activation itself"):
        replace_activations_(nn.GELU())


@pytest.mark.parametrize("kind", ["gelu", "gelu_new", "silu"])
def test_transformers_activations_are_found_without_a_name(kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.ViTConfig(**sizes, image_size=8, patch_size=4, hidden_act=kind)
    model = transformers.ViTForImageClassification(config).eval()
    images = torch.randn(2, 3, 8, 8)
    before = model(pixel_values=images).logits
    replaced = replace_activations_(model)
    assert len(replaced) == 2
    assert max(replaced.values()) < 1e-2
    after = model(pixel_values=images).logits
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, before, atol=1e-2, rtol=0)
    with pytest.raises(RecipeError, match="has no GELU and no SiLU"):
        replace_activations_(nn.Sequential(nn.Linear(4, 4), nn.Tanh()))
