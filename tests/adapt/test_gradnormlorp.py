"""GaLore and GradNormLoRP against their equations, torch's AdamW and torch's weight normalisation."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from weft.adapt import LowRankProjectedAdamW, LowRankProjection, projected_state_size, weight_norm_gradients
from weft.errors import RecipeError

SHAPES = [(7, 4), (4, 7), (5, 5)]
RATE, BETAS = 0.03, (0.8, 0.9)
# Seen from both sides the first gradient is diagonal; Adam would make steps of the rounding errors beside it.
EPS = 1e-4


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def follow(optimizer: torch.optim.Optimizer, weight: nn.Parameter, gradients: list[Tensor]) -> list[Tensor]:
    """The weight after each step."""
    path = []
    for gradient in gradients:
        weight.grad = gradient.clone()
        optimizer.step()
        path.append(weight.detach().clone())
    return path


def projected(weight: nn.Parameter, **options: Any) -> LowRankProjectedAdamW:
    group = {key: options.pop(key) for key in ("rank", "output_axis") if key in options}
    return LowRankProjectedAdamW([{"params": [weight], "rank": 2, **group}], **{"lr": RATE, "betas": BETAS, **options})


class Adam:
    """Adam's normalised direction, bias corrected."""

    def __init__(self, eps: float = EPS) -> None:
        self.m, self.v, self.t, self.eps = 0.0, 0.0, 0, eps

    def __call__(self, g: np.ndarray) -> np.ndarray:
        self.t += 1
        self.m = BETAS[0] * self.m + (1 - BETAS[0]) * g
        self.v = BETAS[1] * self.v + (1 - BETAS[1]) * g**2
        return self.m / (1 - BETAS[0] ** self.t) / (np.sqrt(self.v / (1 - BETAS[1] ** self.t)) + self.eps)


class Projector:
    """The published algorithm's projector; singular vectors with their largest entry positive."""

    def __init__(self, sides: str, rank: int, gap: int) -> None:
        self.sides, self.rank, self.gap, self.t = sides, rank, gap, 0
        self.u: np.ndarray
        self.v: np.ndarray

    def __call__(self, g: np.ndarray) -> np.ndarray:
        if self.t % self.gap == 0:
            u, _, vt = np.linalg.svd(g)
            u, v = u[:, : self.rank], vt[: self.rank].T
            self.u = u * np.sign([c[np.abs(c).argmax()] for c in u.T]) if "left" in self.sides else np.eye(len(g))
            self.v = v * np.sign([c[np.abs(c).argmax()] for c in v.T]) if "right" in self.sides else np.eye(g.shape[1])
        self.t += 1
        return self.u.T @ g @ self.v

    def back(self, low: np.ndarray) -> np.ndarray:
        return self.u @ low @ self.v.T


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("projection", ["auto", "left", "right", "both"])
def test_galore_step_by_step(shape: tuple[int, int], projection: str) -> None:
    weight = nn.Parameter(draw(*shape))
    gradients = [draw(*shape, seed=1 + i) for i in range(8)]
    expected, adam = weight.detach().numpy().copy(), Adam()
    sides = {"auto": "right" if shape[0] >= shape[1] else "left", "both": "left, right"}.get(projection, projection)
    projector = Projector(sides, 2, 3)
    optimizer = projected(weight, update_proj_gap=3, scale=0.5, projection=projection, weight_decay=0.1, eps=EPS)
    for gradient, after in zip(gradients, follow(optimizer, weight, gradients)):
        expected = expected * (1 - RATE * 0.1) - RATE * 0.5 * projector.back(adam(projector(gradient.numpy())))
        np.testing.assert_allclose(after.numpy(), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("shape", "projection", "moments", "beta1"),
    [*((s, "auto", "rotate", 0.8) for s in SHAPES), ((5, 5), "both", "rotate", 0.8)]
    + [(s, p, "keep", 0.0) for s in SHAPES for p in ("auto", "left", "right", "both")],
)
def test_full_rank_is_the_plain_step(shape: tuple[int, int], projection: str, moments: str, beta1: float) -> None:
    # The projection drops out of steps that are linear in the gradient: eps far above √v̂ makes Adam's that, a step of
    # lr / eps times the running mean. The mean itself has to turn with the basis, or to hold one gradient only.
    eps = 1e9
    options = {"lr": RATE * eps, "eps": eps, "betas": (beta1, 0.9), "weight_decay": 1e-10}
    first, second = nn.Parameter(draw(*shape)), nn.Parameter(draw(*shape))
    gradients = [draw(*shape, seed=1 + i) for i in range(6)]
    one = projected(first, rank=9, scale=1.0, update_proj_gap=1, projection=projection, moments=moments, **options)
    expected = follow(torch.optim.AdamW([second], **options), second, gradients)
    for a, b in zip(follow(one, first, gradients), expected):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-7)
    assert (expected[-1] - draw(*shape)).abs().max() > 0.03


def test_adam_itself_is_not_the_same_in_another_basis() -> None:
    first, second = nn.Parameter(draw(5, 4)), nn.Parameter(draw(5, 4))
    gradients = [draw(5, 4, seed=1)]
    one = projected(first, rank=4, scale=1.0, update_proj_gap=1)
    (a,) = follow(one, first, gradients)
    (b,) = follow(torch.optim.AdamW([second], lr=RATE, betas=BETAS, weight_decay=0.0), second, gradients)
    assert (a - b).abs().max() > 0.1 * RATE


def test_reset_moments_start_anew() -> None:
    gradients = [draw(6, 4, seed=1 + i) for i in range(6)]
    weight = nn.Parameter(draw(6, 4))
    path = follow(projected(weight, update_proj_gap=3, moments="reset"), weight, gradients)
    fresh = nn.Parameter(path[2].clone())
    later = follow(projected(fresh, update_proj_gap=3, moments="reset"), fresh, gradients[3:])
    torch.testing.assert_close(later, path[3:], rtol=0, atol=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_are_those_of_weight_normalisation(shape: tuple[int, int]) -> None:
    layer = weight_norm(nn.Linear(shape[1], shape[0], bias=False).double())
    g, v = layer.parametrizations.weight.original0, layer.parametrizations.weight.original1
    with torch.no_grad():
        g.copy_(draw(shape[0], 1, seed=1))  # lengths of both signs
        v.copy_(draw(*shape, seed=2))
    gradient = draw(*shape, seed=3)
    layer.weight.backward(gradient)
    of_g, of_v = weight_norm_gradients(gradient, v.detach(), g.detach())
    torch.testing.assert_close(of_g, g.grad)
    torch.testing.assert_close(of_v, v.grad)
    assert (of_v * v).sum(1).abs().max() < 1e-13


@pytest.mark.parametrize("shape", SHAPES)
def test_full_rank_is_adamw_on_torchs_weight_norm(shape: tuple[int, int]) -> None:
    eps = 1e9
    options = {"lr": RATE * eps, "eps": eps, "betas": (0.8, 0.9), "weight_decay": 1e-10}
    layer = nn.Linear(shape[1], shape[0], bias=False).double()
    with torch.no_grad():
        layer.weight.copy_(draw(*shape))
    other = weight_norm(copy.deepcopy(layer))
    lengths, v = other.parametrizations.weight.original0, other.parametrizations.weight.original1
    plain = torch.optim.AdamW([{"params": [lengths]}, {"params": [v], "weight_decay": 0.0}], **options)
    group = {"params": [layer.weight], "rank": 9}
    one = LowRankProjectedAdamW([group], **options, scale=1.0, update_proj_gap=1, normalize="weight", moments="rotate")
    for step in range(12):
        # tall and wide matrices alike; lengths of some rows pass through zero on the way
        target = -draw(*shape) + 0.3 * draw(*shape, seed=4 + step)
        for net, optimizer in ((layer, one), (other, plain)):
            optimizer.zero_grad()
            (10 * (net.weight - target)).square().sum().mul(0.05).backward()
            optimizer.step()
        torch.testing.assert_close(layer.weight, other.weight, rtol=1e-6, atol=1e-6)
    assert bool((lengths < 0).any())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("projection", ["auto", "both"])
def test_gradnormlorp_step_by_step(shape: tuple[int, int], projection: str) -> None:
    # the reference holds v and g; the optimizer has them from W and one number a row
    weight = nn.Parameter(draw(*shape))
    v = weight.detach().numpy().copy()
    g = np.linalg.norm(v, axis=1, keepdims=True)
    sides = {"auto": "right" if shape[0] >= shape[1] else "left", "both": "left, right"}[projection]
    projector, adam_v, adam_g = Projector(sides, 2, 4), Adam(), Adam()
    optimizer = projected(
        weight,
        lr=0.3,
        update_proj_gap=4,
        scale=0.5,
        projection=projection,
        normalize="weight",
        weight_decay=0.1,
        eps=EPS,
    )
    for step in range(20):
        gradient = draw(*shape, seed=1 + step).numpy() + 3 * weight.detach().numpy()  # pulls lengths through zero
        unit = v / np.linalg.norm(v, axis=1, keepdims=True)
        of_g = (gradient * unit).sum(1, keepdims=True)
        of_v = g / np.linalg.norm(v, axis=1, keepdims=True) * (gradient - of_g * unit)
        g = g * (1 - 0.3 * 0.1) - 0.3 * adam_g(of_g)
        v = v - 0.3 * 0.5 * projector.back(adam_v(projector(of_v)))
        (after,) = follow(optimizer, weight, [torch.from_numpy(gradient)])
        np.testing.assert_allclose(
            after.numpy(), g * v / np.linalg.norm(v, axis=1, keepdims=True), rtol=1e-7, atol=1e-9
        )
    assert bool((g < 0).any())


def test_the_learned_length_stays() -> None:
    # Only lengths have to change; with lengths taken back to ‖v‖ at each step, as in the released code, W could not move.
    start = draw(4, 6)
    weight = nn.Parameter(start.clone())
    optimizer = projected(weight, lr=0.05, normalize="weight")
    radius = start.norm(dim=1, keepdim=True)
    for _ in range(400):
        optimizer.zero_grad()
        (weight - 3 * start).square().sum().backward()
        optimizer.step()
    torch.testing.assert_close(weight.detach(), 3 * start, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(optimizer.state[weight]["radius"], radius, rtol=1e-3, atol=0)  # ‖v‖ as it was
    reached = weight.detach().clone()
    weight.grad = torch.zeros_like(weight)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step()
    torch.testing.assert_close(weight.detach(), reached)


def test_rows_of_zeros_come_alive_and_outside_changes_count() -> None:
    start = draw(4, 6)
    start[1] = 0
    weight = nn.Parameter(start.clone())
    optimizer = projected(weight, normalize="weight")
    gradient = draw(4, 6, seed=1)
    (after,) = follow(optimizer, weight, [gradient])
    other = nn.Parameter(start.clone())
    bare = weight_norm_gradients(gradient, start, start.norm(dim=1, keepdim=True))[1]
    assert torch.equal(bare[1], gradient[1])
    (galore,) = follow(projected(other), other, [bare])
    torch.testing.assert_close(after[1], galore[1])
    assert after[1].norm() > 0
    with torch.no_grad():
        weight[0] *= 2
        weight[2] = 0
    before = weight.detach().clone()
    optimizer.param_groups[0]["lr"] = 0.0
    (after,) = follow(optimizer, weight, [gradient])
    torch.testing.assert_close(after, before)


def test_kernels_and_transposed_weights_are_the_same_matrices() -> None:
    gradients = [draw(6, 8, seed=1 + i) for i in range(5)]
    for options in ({}, {"normalize": "weight", "projection": "both", "weight_decay": 0.1}):
        plain = nn.Parameter(draw(6, 8))
        path = follow(projected(plain, **options), plain, gradients)
        kernel = nn.Parameter(draw(6, 8).reshape(6, 2, 2, 2).contiguous(memory_format=torch.channels_last))
        others = follow(projected(kernel, **options), kernel, [g.reshape(6, 2, 2, 2) for g in gradients])
        torch.testing.assert_close([o.reshape(6, 8) for o in others], path)
        stored = nn.Parameter(draw(6, 8).T.contiguous())
        others = follow(projected(stored, output_axis=1, **options), stored, [g.T for g in gradients])
        torch.testing.assert_close([o.T for o in others], path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_plain_groups_are_torchs_adamw(dtype: torch.dtype) -> None:
    shapes = [(), (5,), (3, 4), (2, 3, 2)]
    firsts, seconds = ([nn.Parameter(draw(*s).to(dtype)) for s in shapes] for _ in range(2))
    options = {"lr": RATE, "betas": BETAS, "weight_decay": 0.1}
    one, two = LowRankProjectedAdamW(firsts, **options), torch.optim.AdamW(seconds, **options)
    for step in range(5):
        for a, b in zip(firsts, seconds):
            a.grad = b.grad = draw(*a.shape, seed=step).to(dtype)
        one.step()
        two.step()
        assert all(torch.equal(a, b) for a, b in zip(firsts, seconds))
    assert one.state_bytes() == sum(2 * p.numel() * p.element_size() for p in firsts)


@pytest.mark.parametrize("shape", [*SHAPES, (2, 9)])
@pytest.mark.parametrize("projection", ["auto", "left", "right", "both"])
@pytest.mark.parametrize("normalize", ["none", "weight"])
def test_bytes_of_the_state(shape: tuple[int, int], projection: str, normalize: str) -> None:
    for dtype, width in ((torch.float64, 8), (torch.float32, 4), (torch.bfloat16, 4)):
        weight = nn.Parameter(draw(*shape).to(dtype))
        optimizer = projected(weight, rank=3, projection=projection, normalize=normalize, update_proj_gap=1)
        for _ in range(2):
            follow(optimizer, weight, [draw(*shape).to(dtype)])
        numbers = projected_state_size(shape, 3, projection=projection, normalize=normalize)
        assert optimizer.state_bytes() == width * numbers
    m, n, r = (*shape, min(3, *shape))
    formula = {"left": 2 * r * n + r * m, "right": 2 * r * m + r * n, "both": 2 * r * r + r * (m + n)}
    formula["auto"] = 2 * r * max(m, n) + r * min(m, n)
    assert numbers == formula[projection] + (3 * m if normalize == "weight" else 0)


def test_what_is_refused() -> None:
    weight, bias = nn.Parameter(torch.ones(3, 4)), nn.Parameter(torch.ones(3))
    optimizer = LowRankProjectedAdamW([weight])
    for group, words in (
        ({"params": [bias], "rank": 2}, r"whole matrices, got a parameter of shape \[3\]"),
        ({"params": [bias], "output_axis": 1}, "output_axis is 0"),
        ({"params": [bias], "rank": 0}, "'rank' must be between 1"),
        ({"params": [bias], "betas": (0.9,)}, "betas must be two numbers"),
        ({"params": [bias], "betas": (0.9, 1.0)}, "'beta2' must be between 0 and 1"),
        ({"params": [bias], "lr": float("nan")}, "'lr' must be a finite number"),
        ({"params": [bias], "projection": "rigth"}, "Did you mean right"),
    ):
        with pytest.raises(RecipeError, match=words):
            optimizer.add_param_group(group)
        assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": [bias], "rank": None})


def test_a_model_trains_as_its_configuration_says() -> None:
    model = nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 6))
    config = LowRankProjection(rank=2, lr=0.1, beta1=0.5, update_proj_gap=7, scale=2.0, moments="reset", where="0")
    optimizer = config.build(model)
    group = optimizer.param_groups[0]
    assert group["params"] == [model[0].weight]
    assert (group["rank"], group["lr"], group["betas"], group["eps"]) == (2, 0.1, (0.5, 0.999), 1e-8)
    assert (group["update_proj_gap"], group["scale"], group["moments"]) == (7, 2.0, "reset")
    assert "rank" not in optimizer.param_groups[1]
