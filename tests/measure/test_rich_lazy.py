import copy
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from weft.errors import RecipeError
from weft.measure import alignment, effective_rank, laziness, representation, sign_agreement, tangent_kernel


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mlp(width: int = 12, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, 2)).double()


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]):
        super().__init__()
        self.rnn = kind(3, 5, batch_first=True)
        self.head = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][:, -1])


def double_loop(model: nn.Module, probe: Tensor, names: list[str]) -> np.ndarray:
    """K by one backward pass for each output of each sample, as the definition has it."""
    chosen = [p for n, p in model.named_parameters() if n in names]
    rows = []
    for sample in probe:
        for output in model(sample[None]).flatten():
            gradients = torch.autograd.grad(output, chosen, retain_graph=True)
            rows.append(np.concatenate([g.flatten().numpy() for g in gradients]))
    return np.stack(rows) @ np.stack(rows).T


@pytest.mark.parametrize("names", [["0.weight"], ["0.weight", "2.bias"], ["0.weight", "0.bias", "2.weight", "2.bias"]])
@pytest.mark.parametrize("samples_a_block", [1, 2, 100])
def test_kernel_equals_the_double_loop(names: list[str], samples_a_block: int) -> None:
    model, probe = mlp(), drawn(5, 3)
    row = 8 * sum(p.numel() for n, p in model.named_parameters() if n in names)
    found = tangent_kernel(model, probe, parameters=names, memory=6 * 2 * row * samples_a_block)
    np.testing.assert_allclose(found.numpy(), double_loop(model, probe, names), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
def test_recurrent_networks(kind: type[nn.RNNBase]) -> None:
    torch.manual_seed(0)
    model, probe = Recurrent(kind).double(), drawn(4, 6, 3)
    found = tangent_kernel(model, probe, parameters="rnn.weight_hh*")
    np.testing.assert_allclose(found.numpy(), double_loop(model, probe, ["rnn.weight_hh_l0"]), rtol=1e-9, atol=1e-12)


def test_attention_and_batch_norm() -> None:
    torch.manual_seed(0)
    attention = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True, dropout=0.5).double()
    model = nn.Sequential(attention, nn.Flatten(), nn.BatchNorm1d(12), nn.Linear(12, 2)).double()
    probe = drawn(5, 3, 4)
    found = tangent_kernel(model, probe)
    assert all(m.training for m in model.modules())
    expected = double_loop(model.eval(), probe, [n for n, _ in model.named_parameters()])
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-9, atol=1e-12)


def test_kernel_of_a_two_layer_linear_network_is_the_closed_form() -> None:
    """f = w₂ᵀ W₁ x:  K(x, x') = ‖w₂‖² xᵀx' + xᵀ W₁ᵀ W₁ x'."""
    first, second = nn.Linear(4, 6, bias=False).double(), nn.Linear(6, 1, bias=False).double()
    x = drawn(7, 4)
    w1, w2 = first.weight.detach(), second.weight.detach()
    expected = w2.square().sum() * x @ x.T + x @ w1.T @ w1 @ x.T
    torch.testing.assert_close(tangent_kernel(nn.Sequential(first, second), x), expected)


def test_identical_models_have_not_moved() -> None:
    model = mlp()
    report = laziness(model, copy.deepcopy(model), drawn(6, 3), layer="1")
    assert report.weight_change == report.relative_weight_change == 0
    assert [report.kernel_alignment, report.representation_alignment] == pytest.approx([1, 1], abs=1e-12)
    assert report.sign_agreement == 1
    assert report.parameters == ("0.weight", "0.bias", "2.weight", "2.bias")
    assert laziness(model, copy.deepcopy(model), drawn(6, 3)).to_dict()["representation_alignment"] is None


def test_report_equals_the_definitions() -> None:
    before, after, probe = mlp(seed=0), mlp(seed=1), drawn(6, 3)
    report = laziness(before, after, probe, parameters="0.weight", layer="1")
    w0, wf = before[0].weight.detach().numpy(), after[0].weight.detach().numpy()
    assert report.weight_change == pytest.approx(np.linalg.norm(wf - w0))
    assert report.relative_weight_change == pytest.approx(np.linalg.norm(wf - w0) / np.linalg.norm(w0))
    h0, hf = (m[:2](probe).detach().numpy() for m in (before, after))
    cosine = np.sum((h0 @ h0.T) * (hf @ hf.T)) / np.linalg.norm(h0 @ h0.T) / np.linalg.norm(hf @ hf.T)
    assert report.representation_alignment == pytest.approx(cosine)
    assert report.sign_agreement == np.mean(np.sign(h0) == np.sign(hf))
    k0, kf = (double_loop(m, probe, ["0.weight"]) for m in (before, after))
    assert report.kernel_alignment == pytest.approx(np.sum(k0 * kf) / np.linalg.norm(k0) / np.linalg.norm(kf))
    called = laziness(before, after, probe, parameters="0.weight", layer=lambda m, x: m[:2](x))
    assert called == report


class Scaled(nn.Module):
    """α (f − f₀), which starts at zero and moves α times as much as f."""

    def __init__(self, alpha: float):
        super().__init__()
        self.alpha, self.model, self.start = alpha, mlp(20), mlp(20).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.alpha * (self.model(x) - self.start(x))


def test_large_outputs_make_training_lazy() -> None:
    """Chizat's limit: at one loss, weights move as 1/α and the kernel's change vanishes."""
    x, y = drawn(10, 3), drawn(10, 2, seed=1)
    reports = []
    for alpha in (10.0, 100.0, 1000.0):
        model = Scaled(alpha)
        before = copy.deepcopy(model)
        for _ in range(2000):
            loss = (model(x) - y).square().mean()
            if loss < 1.2:
                break
            gradients = torch.autograd.grad(loss, list(model.model.parameters()))
            with torch.no_grad():
                for p, g in zip(model.model.parameters(), gradients):
                    p -= 0.1 / alpha**2 * g
        else:
            pytest.fail("not trained")
        reports.append(laziness(before, model, x))
    changes = [1 - (r.kernel_alignment or 0) for r in reports]
    assert (
        changes[0] > 50 * changes[1] > 2500 * changes[2] > 0
    )  # second order in 1/α: a hundred times less for each ten
    weights = [r.weight_change for r in reports]
    assert weights[1] / weights[2] == pytest.approx(10, rel=0.02)
    assert all(name.startswith("model.") for name in reports[0].parameters)  # the frozen start does not count


@pytest.mark.parametrize("rank", [1, 4])
def test_effective_ranks_of_equal_singular_values_are_the_rank(rank: int) -> None:
    left, right = (torch.linalg.qr(drawn(9, 9, seed=s))[0][:, :rank] for s in (0, 1))
    for kind in ("stable", "participation", "entropy"):
        assert effective_rank(1e-200 * left @ right.T, kind) == pytest.approx(rank)
        assert effective_rank(torch.zeros(3, 4), kind) == 0


def test_effective_ranks_equal_numpys() -> None:
    weight = drawn(6, 4, 2)
    sigma = np.linalg.svd(weight.flatten(1).numpy(), compute_uv=False)
    p = sigma / sigma.sum()
    assert effective_rank(weight) == pytest.approx((sigma**2).sum() / sigma[0] ** 2)
    assert effective_rank(weight, "participation") == pytest.approx((sigma**2).sum() ** 2 / (sigma**4).sum())
    assert effective_rank(weight, "entropy") == pytest.approx(math.exp(-(p * np.log(p)).sum()))


def test_alignment_ignores_size_and_survives_it() -> None:
    a, b = drawn(5, 5), drawn(5, 5, seed=1)
    expected = float((a * b).sum() / a.norm() / b.norm())
    assert alignment(a * 1e200, b * 1e-200) == pytest.approx(expected)
    assert alignment(a, -a) == pytest.approx(-1)


def test_importing_measure_does_not_load_torch() -> None:
    code = (
        "import sys, weft.measure; print('torch' in sys.modules); weft.measure.laziness; print('torch' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.split() == ["False", "True"]


class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


def test_bad_input() -> None:
    model, probe = mlp(), drawn(5, 3)
    other = copy.deepcopy(model)
    with pytest.raises(RecipeError, match="one object"):
        laziness(model, model, probe)
    with pytest.raises(RecipeError, match=r"'0\.bias' differs"):
        laziness(model, mlp(5), probe)
    with pytest.raises(RecipeError, match=r"Did you mean 0\.weight"):
        laziness(model, other, probe, parameters="0.weigth")
    with pytest.raises(RecipeError, match="no module 'layer'"):
        laziness(model, other, probe, layer="layer")
    with pytest.raises(RecipeError, match="at least one sample"):
        tangent_kernel(model, probe[:0])
    with pytest.raises(RecipeError, match="more than memory"):
        tangent_kernel(model, probe, memory=100)
    with pytest.raises(RecipeError, match="one tensor"):
        tangent_kernel(nn.Sequential(nn.Linear(3, 3).double(), Pair()), probe)
    with pytest.raises(RecipeError, match="No parameter requires"):
        tangent_kernel(mlp().requires_grad_(False), probe)
    with pytest.raises(RecipeError, match="No parameter is named"):
        tangent_kernel(model, probe, parameters=[])
    with pytest.raises(RecipeError, match="diverged"):
        laziness(model, other, torch.full_like(probe, torch.nan))
    with pytest.raises(RecipeError, match="5 samples"):
        representation(model, probe, lambda m, x: m(x).T)
    with pytest.raises(RecipeError, match="of one shape"):
        sign_agreement(probe, probe[:2])
    with pytest.raises(RecipeError, match="can be aligned"):
        alignment(probe, probe[:2])
    with pytest.raises(RecipeError, match="Did you mean stable"):
        effective_rank(probe, "stabel")
    with pytest.raises(RecipeError, match="a vector has no rank"):
        effective_rank(probe[0])
    with pytest.raises(RecipeError, match="NaN"):
        effective_rank(probe * torch.nan)
    assert alignment(torch.zeros(2, 2), torch.ones(2, 2)) is None
