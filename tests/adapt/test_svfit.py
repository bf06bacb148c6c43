"""SVFit: gradients, subspaces and counts, against numpy's decomposition."""

import numpy as np
import pytest
import torch
from torch import nn

import weft
from weft.adapt import SVFit, rank_for_energy, singular_vectors
from weft.errors import RecipeError


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def adapted(config: SVFit, layer: nn.Module | None = None) -> tuple[nn.Module, torch.Tensor]:
    layer = (layer or nn.Linear(7, 9)).double()
    before = layer.weight.detach().clone()
    weft.adapt_(layer, config, where="*")
    return layer, before


@pytest.mark.parametrize("exponential", [False, True])
@pytest.mark.parametrize("rank", [1, 3, 7])
def test_gradients_are_those_of_the_weight_in_each_direction(rank: int, exponential: bool) -> None:
    layer, before = adapted(SVFit(rank=rank, exponential=exponential))
    function = layer.parametrizations.weight[0]
    plain = nn.Linear(7, 9).double()
    plain.load_state_dict({"weight": before, "bias": layer.bias.detach()})
    x = torch.randn(5, 7, dtype=torch.float64)
    for model in (layer, plain):
        model(x).square().sum().backward()
    G = plain.weight.grad.numpy()
    u, values, vt = np.linalg.svd(before.numpy(), full_matrices=False)
    expected = [u[:, i] @ G @ vt[i] * (values[i] if exponential else 1) for i in range(rank)]
    np.testing.assert_allclose(function.delta.grad.numpy(), expected, atol=1e-12)
    assert [n for n, p in layer.named_parameters() if p.requires_grad] == ["parametrizations.weight.0.delta"]
    assert function.delta.shape == (rank,)


@pytest.mark.parametrize("exponential", [False, True])
def test_only_singular_values_change(exponential: bool) -> None:
    layer, before = adapted(SVFit(rank=4, exponential=exponential))
    function = layer.parametrizations.weight[0]
    assert torch.equal(layer.weight, before)
    nn.init.normal_(function.delta)
    u, values, vt = np.linalg.svd(before.numpy(), full_matrices=False)
    inside = u.T @ layer.weight.detach().numpy() @ vt.T  # (7, 7)
    delta = function.delta.detach().numpy()
    trained = values[:4] * np.exp(delta) if exponential else values[:4] + delta
    np.testing.assert_allclose(inside, np.diag([*trained, *values[4:]]), atol=1e-12)
    outside = layer.weight.detach().numpy() - u @ inside @ vt
    np.testing.assert_allclose(outside, 0, atol=1e-12)
    # the paper's form: what is left of W₀, and the trained part
    frozen = before.numpy() - u[:, :4] * values[:4] @ vt[:4]
    np.testing.assert_allclose(layer.weight.detach(), frozen + u[:, :4] * trained @ vt[:4], atol=1e-12)
    assert not exponential or (np.diag(inside) > 0).all()


def test_the_change_is_a_lora() -> None:
    for exponential in (False, True):
        layer, before = adapted(SVFit(rank=3, exponential=exponential))
        nn.init.normal_(layer.parametrizations.weight[0].delta)
        A, B = layer.parametrizations.weight[0].to_lora()
        assert (A.shape, B.shape) == ((3, 7), (9, 3))
        torch.testing.assert_close(before + B @ A, layer.weight)


def test_signs_are_fixed() -> None:
    W = torch.randn(8, 5, dtype=torch.float64)
    U, values, Vt = singular_vectors(W)
    torch.testing.assert_close(U * values @ Vt, W)
    np.testing.assert_allclose(values, np.linalg.svd(W.numpy(), compute_uv=False))
    assert (U.gather(0, U.abs().argmax(0, keepdim=True)) > 0).all()
    for other in (singular_vectors(-W), singular_vectors(torch.stack([W, -W]), 3)):
        rank = other[1].shape[-1]
        torch.testing.assert_close(other[0].reshape(-1, 8, rank)[-1], U[:, :rank])
        torch.testing.assert_close(other[2].reshape(-1, rank, 5)[-1], -Vt[:rank])


@pytest.mark.parametrize("energy", [0.0, 0.3, 0.5, 0.9, 0.99, 1.0])
def test_the_lowest_rank_that_holds_the_energy(energy: float) -> None:
    for seed in range(20):
        values = np.sort(np.random.default_rng(seed).random(9) ** 2)[::-1].copy()
        rank = rank_for_energy(torch.from_numpy(values), energy)
        total = (values**2).sum()
        assert (values[:rank] ** 2).sum() >= energy * total * (1 - 1e-12)
        assert rank == 1 or energy == 1 or (values[: rank - 1] ** 2).sum() < energy * total
    assert rank_for_energy(torch.ones(4), energy) == max(1, int(np.ceil(4 * energy)))


def test_ranks_of_stacks_and_of_nothing() -> None:
    assert rank_for_energy(torch.zeros(4), 0.9) == 1
    assert rank_for_energy(torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 0.0]]), 0.9) == 2
    for values in (torch.zeros(0), torch.tensor([1.0, torch.nan])):
        with pytest.raises(RecipeError, match="energy must be"):
            rank_for_energy(values, 0.9)
    with pytest.raises(RecipeError, match="energy must be"):
        rank_for_energy(torch.ones(2), 1.5)


def test_the_rank_of_a_layer_by_energy() -> None:
    layer = nn.Linear(6, 6)
    with torch.no_grad():
        layer.weight.copy_(torch.diag(torch.tensor([10.0, 5.0, 1.0, 0.1, 0.1, 0.1])))
    layer, _ = adapted(SVFit(energy=0.99), layer)  # 125 of 126.03 is 99.2%
    assert layer.parametrizations.weight[0].delta.shape == (2,)
    fresh, _ = adapted(SVFit(energy=0.99), nn.Linear(6, 6))
    with pytest.raises(RuntimeError, match="size mismatch"):
        fresh.load_state_dict(layer.state_dict())


def test_convolutions_and_stacks() -> None:
    from weft.contract.models import Experts

    layer, before = adapted(SVFit(rank=2), nn.Conv2d(3, 5, 2))
    nn.init.normal_(layer.parametrizations.weight[0].delta)
    change = (layer.weight - before).flatten(1)
    assert torch.linalg.matrix_rank(change) == 2
    torch.testing.assert_close(
        torch.linalg.svdvals(change)[:2].prod(), layer.parametrizations.weight[0].delta.prod().abs()
    )
    experts = Experts()
    nn.init.normal_(experts.weight)
    experts, before = adapted(SVFit(rank=3), experts)
    function = experts.parametrizations.weight[0]
    nn.init.normal_(function.delta)
    for i in range(3):
        alone, _ = adapted(SVFit(rank=3), _linear(before[i]))
        alone.parametrizations.weight[0].delta.data = function.delta[i].data
        torch.testing.assert_close(experts.weight[i], alone.weight)


def _linear(weight: torch.Tensor) -> nn.Linear:
    layer = nn.Linear(*weight.T.shape)
    layer.weight = nn.Parameter(weight.clone())
    return layer


def test_bfloat16_keeps_small_changes() -> None:
    layer = nn.Linear(16, 16).bfloat16()
    with torch.no_grad():
        layer.weight.copy_(100 * torch.eye(16))
    before = layer.weight.detach().clone()
    weft.adapt_(layer, SVFit(energy=1.0), where="*")
    function = layer.parametrizations.weight[0]
    layer.bfloat16()
    nn.init.constant_(function.delta, 0.01)  # 1/50 of what separates the neighbours of 100 in bfloat16
    x = torch.ones(1, 16, dtype=torch.bfloat16)
    change = function.changed(x)
    torch.testing.assert_close(change.float(), 0.01 * torch.ones(1, 16), rtol=2**-7, atol=0)
    assert torch.equal(layer.weight, before)


@pytest.mark.parametrize(
    ("config", "weight", "message"),
    [
        (SVFit(rank=5), torch.ones(4, 6), "more than a matrix of"),
        (SVFit(), torch.ones(4, 6, device="meta"), "give rank"),
        (SVFit(rank=2), torch.full((4, 6), torch.nan), "NaN or infinity"),
        (SVFit(energy=1.5), torch.ones(4, 6), "between 0 and 1"),
    ],
)
def test_what_does_not_fit_is_refused(config: SVFit, weight: torch.Tensor, message: str) -> None:
    layer = nn.Linear(6, 4)
    layer.weight = nn.Parameter(weight)
    with pytest.raises(RecipeError, match=message):
        weft.adapt_(layer, config, where="*")
    assert type(layer) is nn.Linear
