"""Matching by activations and by loss, several models, statistics of batch norm, and what a matching is judged by."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.nn import functional

from weft.errors import NonFiniteError, RecipeError, ShapeError
from weft.merge import (
    loss_barrier,
    match_activations,
    match_many,
    match_report,
    match_straight_through,
    match_weights,
    reset_batch_norm_,
    singular_alignment,
    uniform_soup,
)
from weft.merge.weight_matching.diagnostics import distance
from weft.symmetry import Symmetry, find_symmetry


def mlp(seed: int, activation: type[nn.Module] = nn.Tanh, width: int = 16) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, width), activation(), nn.Linear(width, width), activation(), nn.Linear(width, 3))


def convolutions(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(6, 5, 3), nn.BatchNorm2d(5),
        nn.ReLU(), nn.Flatten(), nn.Linear(80, 2),
    )  # fmt: skip


def llama(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=24, num_hidden_layers=2, vocab_size=40, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.3,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def symmetric(model: nn.Module, inputs: Any) -> tuple[Symmetry, dict[str, np.ndarray], nn.Module]:
    """A model's symmetry, a random order, and a copy in that order."""
    import copy

    symmetry = find_symmetry(model, inputs)
    planted = symmetry.random(np.random.default_rng(3))
    return symmetry, planted, symmetry.apply(copy.deepcopy(model), planted)


# activations


@pytest.mark.parametrize("name", ["mlp", "convolutions", "llama"])
def test_activations_recover_a_planted_order(name: str) -> None:
    model, inputs = {
        "mlp": (mlp(0), torch.randn(300, 6)),
        "convolutions": (convolutions(0), torch.randn(40, 1, 8, 8)),
        "llama": (llama(0), torch.randint(40, (40, 9))),
    }[name]
    symmetry, planted, other = symmetric(model, inputs)
    batches = [inputs[:20], inputs[20:]] if name != "llama" else [{"input_ids": inputs}]
    modes = [m.training for m in model.modules()]
    found = match_activations(model, other, symmetry, batches)
    assert found.unmatched == ()
    assert all((found.permutations[n] == p).all() for n, p in symmetry.invert(planted).items())
    assert [m.training for m in model.modules()] == modes
    assert not any(m._forward_hooks for m in model.modules())


def test_activations_of_one_layer_equal_correlations_and_an_assignment() -> None:
    a, b, x = mlp(0), mlp(1), torch.randn(200, 6)
    symmetry = find_symmetry(a, x)
    found = match_activations(a, b, symmetry, [x[:70], x[70:]], groups=[symmetry.groups[0].name])
    with torch.no_grad():
        one, other = (m[0](x).double().numpy().T for m in (a, b))
    table = np.corrcoef(one, other)[:16, 16:]
    rows, columns = linear_sum_assignment(table, maximize=True)
    assert found.permutations[symmetry.groups[0].name].tolist() == columns.tolist()
    rest = match_activations(a, b, symmetry, [x], groups=[]).objective
    # what other groups add is the same before and after
    assert found.objective - rest == pytest.approx(table[rows, columns].sum() - np.trace(table), rel=1e-9)


def test_a_dead_unit_does_not_disturb_activations() -> None:
    a = mlp(0, nn.ReLU)
    with torch.no_grad():
        a[0].weight[2] = 0
    x = torch.randn(100, 6)
    symmetry, planted, b = symmetric(a, x)
    found = match_activations(a, b, symmetry, [x])
    assert math.isfinite(found.objective)
    assert all((found.permutations[n] == p).all() for n, p in symmetry.invert(planted).items())


def test_activations_refuse_what_they_cannot_use() -> None:
    a, x = mlp(0), torch.randn(9, 6)
    symmetry = find_symmetry(a, x)
    with pytest.raises(RecipeError, match="no batch"):
        match_activations(a, mlp(1), symmetry, [])
    with pytest.raises(NonFiniteError, match="Activations of 0"):
        match_activations(a, mlp(1), symmetry, [x * math.nan])
    with pytest.raises(ShapeError, match="one architecture"):
        match_activations(a, mlp(1, width=17), symmetry, [x])

    class Raw(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Parameter(torch.randn(6, 8)), nn.Parameter(torch.randn(8, 2))

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(x @ self.up) @ self.down

    raw = Raw()
    symmetry = find_symmetry(raw, x)
    assert len(symmetry.groups) == 1
    with pytest.raises(RecipeError, match="Match the weights instead"):
        match_activations(raw, Raw(), symmetry, [x])
    plain = nn.Linear(6, 2)  # without any group there is nothing that could be matched otherwise
    assert match_activations(plain, nn.Linear(6, 2), find_symmetry(plain, x), [x]).permutations == {}


# straight-through


def trained(width: int) -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    """Two networks of one task, and its data."""
    x = torch.randn(256, 6, generator=torch.Generator().manual_seed(0))
    y = torch.stack([x[:, 0] * x[:, 1], x[:, 2].sin(), x[:, 3].abs()], 1)
    models = []
    for seed in (0, 1):
        model = mlp(seed, nn.ReLU, width)
        optimizer = torch.optim.Adam(model.parameters(), 0.01)
        for _ in range(100):
            loss = functional.mse_loss(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        model.zero_grad()
        models.append(model)
    return models[0], models[1], x, y


def test_straight_through_lowers_the_loss_of_the_average() -> None:
    a, b, x, y = trained(48)
    before = {n: t.clone() for n, t in a.state_dict().items()}
    symmetry = find_symmetry(a, x)
    found = match_straight_through(a, b, symmetry, [(x, y)] * 80, functional.mse_loss, learning_rate=0.1)

    def average(permutations: Any) -> float:
        moved = symmetry.apply(b.state_dict(), permutations)
        state = {n: (t + moved[n]) / 2 for n, t in a.state_dict().items()}
        with torch.no_grad():
            return functional.mse_loss(torch.func.functional_call(a, state, x), y).item()

    assert len(found.losses) == 80
    assert found.best_step == int(np.argmin(found.losses))
    # the first step is plain weight matching; losses are those of the real average
    assert found.losses[0] == pytest.approx(average(match_weights(a, b, symmetry).permutations), rel=1e-5)
    assert average(found.permutations) == pytest.approx(min(found.losses), rel=1e-5)
    assert min(found.losses) < 0.95 * found.losses[0]
    assert all(torch.equal(t, before[n]) for n, t in a.state_dict().items())


def test_straight_through_moves_by_the_gradient_of_the_average(monkeypatch: pytest.MonkeyPatch) -> None:
    from weft.merge.weight_matching import straight_through

    a, b, x, y = trained(16)
    symmetry, seen = find_symmetry(a, x), []

    def spy(reference: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append({n: t.clone() for n, t in reference.items()})
        return match_weights(reference, *args, **kwargs)

    monkeypatch.setattr(straight_through, "match_weights", spy)
    batches = [(x, y)] * 2
    match_straight_through(a, b, symmetry, batches, functional.mse_loss, learning_rate=0.3, momentum=0)
    moved = symmetry.apply(b.state_dict(), match_weights(a, b, symmetry).permutations)
    middle = {n: ((t + moved[n]) / 2).requires_grad_() for n, t in a.state_dict().items()}
    loss = functional.mse_loss(torch.func.functional_call(a, middle, x), y)
    for (name, start), gradient in zip(a.state_dict().items(), torch.autograd.grad(loss, list(middle.values()))):
        torch.testing.assert_close(seen[0][name], start)
        torch.testing.assert_close(seen[1][name], start - 0.3 * gradient / 2)


def test_straight_through_keeps_what_a_score_prefers() -> None:
    a, b, x, y = trained(16)
    symmetry, scores = find_symmetry(a, x), iter([3.0, math.nan, 1.0, 2.0])
    found = match_straight_through(a, b, symmetry, [(x, y)] * 4, functional.mse_loss, score=lambda state: next(scores))
    assert found.best_step == 2


def test_straight_through_leaves_batch_norm_as_it_was() -> None:
    a, b = convolutions(0).eval(), convolutions(1)
    x, y = torch.randn(20, 1, 8, 8), torch.randint(2, (20,))
    before = {n: t.clone() for n, t in a.state_dict().items()}
    symmetry = find_symmetry(a, x)
    found = match_straight_through(a, b, symmetry, [(x, y)] * 2, functional.cross_entropy)
    assert all(torch.equal(t, before[n]) for n, t in a.state_dict().items())
    assert not any(m.training for m in a.modules())
    # the loss is that of the average with statistics of its own batch
    moved = symmetry.apply(b.state_dict(), match_weights(a, b, symmetry).permutations)
    merged = convolutions(2).eval()
    merged.load_state_dict({n: (t + moved[n]) / 2 if t.is_floating_point() else t for n, t in before.items()})
    merged[1].train()
    merged[5].train()
    assert found.losses[0] == pytest.approx(functional.cross_entropy(merged(x), y).item(), rel=1e-5)


def test_straight_through_refuses_no_data_and_nan() -> None:
    a, x = mlp(0), torch.randn(9, 6)
    symmetry = find_symmetry(a, x)
    with pytest.raises(RecipeError, match="no batch"):
        match_straight_through(a, mlp(1), symmetry, [], functional.mse_loss)
    with pytest.raises(RecipeError, match="NaN at all of 1 steps"):
        match_straight_through(a, mlp(1), symmetry, [(x * math.nan, x[:, :3])], functional.mse_loss)
    with pytest.raises(RecipeError, match=r"'learning_rate' must be between 0 and ∞, got -0\.1"):
        match_straight_through(a, mlp(1), symmetry, [(x, x[:, :3])], functional.mse_loss, learning_rate=-0.1)


# several models


@pytest.mark.parametrize("to", ["first", "mean"])
def test_several_models_come_into_one_order(to: str) -> None:
    model, x = mlp(0), torch.randn(4, 6)
    symmetry = find_symmetry(model, x)
    copies = [symmetry.apply(model.state_dict(), symmetry.random(np.random.default_rng(s))) for s in range(4)]
    moved = [symmetry.apply(c, p) for c, p in zip(copies, match_many(copies, symmetry, to=to))]
    merged = uniform_soup(moved)
    torch.testing.assert_close(torch.func.functional_call(model, merged, x), model(x))
    if to == "first":
        torch.testing.assert_close(moved[1], dict(copies[0]))


def test_the_mean_brings_models_nearer_to_each_other_than_the_first() -> None:
    models = [mlp(s) for s in range(4)]
    symmetry = find_symmetry(models[0], torch.zeros(1, 6))

    def spread(to: str) -> float:
        states = [symmetry.apply(m.state_dict(), p) for m, p in zip(models, match_many(models, symmetry, to=to))]
        return sum(distance(a, b) ** 2 for a in states for b in states)

    assert spread("mean") < spread("first")


def test_several_models_are_refused_where_there_is_one() -> None:
    model = mlp(0)
    symmetry = find_symmetry(model, torch.zeros(1, 6))
    with pytest.raises(RecipeError, match="At least two"):
        match_many([model], symmetry)
    with pytest.raises(RecipeError, match="'first' or to 'mean'"):
        match_many([model, model], symmetry, to="last")


# batch norm


def test_statistics_are_those_of_the_batches() -> None:
    model = convolutions(0)
    model(torch.randn(8, 1, 8, 8) * 9)
    model[4].eval()
    modes, momentum = [m.training for m in model.modules()], model[1].momentum
    batches = [torch.randn(10, 1, 8, 8) + i for i in range(3)]
    assert reset_batch_norm_(model, batches) is model
    with torch.no_grad():
        inside = [model[0](batch) for batch in batches]
    expected = torch.stack([h.mean((0, 2, 3)) for h in inside]).mean(0)
    torch.testing.assert_close(model[1].running_mean, expected)
    variance = torch.stack([h.transpose(0, 1).flatten(1).var(1) for h in inside]).mean(0)
    torch.testing.assert_close(model[1].running_var, variance)
    # dropout is off: the second norm sees what evaluation would give it
    with torch.no_grad():
        deeper = [model[4](functional.relu(functional.batch_norm(h, None, None, model[1].weight, model[1].bias, True)))
                  for h in inside]  # fmt: skip
    torch.testing.assert_close(model[5].running_mean, torch.stack([h.mean((0, 2, 3)) for h in deeper]).mean(0))
    assert [m.training for m in model.modules()] == modes
    assert model[1].momentum == momentum


def test_no_batch_leaves_the_statistics() -> None:
    model = convolutions(0)
    model(torch.randn(8, 1, 8, 8))
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(RecipeError, match="there is none"):
        reset_batch_norm_(model, [])
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    plain = mlp(0)
    assert reset_batch_norm_(plain, []) is plain


# what a matching is judged by


def test_the_barrier_of_a_known_loss() -> None:
    a, b = {"w": torch.tensor([2.0]), "n": torch.tensor(3)}, {"w": torch.tensor([-1.0]), "n": torch.tensor(4)}
    found = loss_barrier(a, b, lambda state: float(1 - state["w"] ** 2), points=301)
    # 1 − w² over its chord: ((2 − w)(w + 1)), at most 9/4
    assert found.height == pytest.approx(9 / 4, rel=1e-6)
    assert len(found.positions) == len(found.losses) == 301
    assert loss_barrier(a, b, lambda state: float(state["w"] ** 2)).height == 0
    assert math.isnan(loss_barrier(a, b, lambda state: math.nan).height)
    with pytest.raises(RecipeError, match="3 points"):
        loss_barrier(a, b, lambda state: 0.0, points=2)
    with pytest.raises(ShapeError, match="nothing in the second"):
        loss_barrier(a, {"w": a["w"]}, lambda state: 0.0)


def polar_sum(a: Tensor, b: Tensor, gamma: float) -> tuple[float, int, int]:
    """Σ_ij (u_a,i · u_b,j)(v_a,i · v_b,j), pair by pair."""
    (ua, sa, va), (ub, sb, vb) = (torch.linalg.svd(m, full_matrices=False) for m in (a, b))
    kept = [[i for i, s in enumerate(sigma) if s >= gamma * sigma[0]] for sigma in (sa, sb)]
    total = sum(float(ua[:, i] @ ub[:, j]) * float(va[i] @ vb[j]) for i in kept[0] for j in kept[1])
    return total, len(kept[0]), len(kept[1])


@pytest.mark.parametrize("gamma", [0.0, 0.3, 0.8])
def test_agreement_of_directions_is_the_double_sum(gamma: float) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (
        {"x": torch.randn(7, 5, generator=generator, dtype=torch.float64),
         "y": torch.randn(4, 2, 3, generator=generator, dtype=torch.float64), "bias": torch.ones(4)} for _ in range(2)
    )  # fmt: skip
    sums = [polar_sum(a[n].flatten(1), b[n].flatten(1), gamma) for n in "xy"]
    expected = sum(s[0] for s in sums) / sum(math.sqrt(s[1] * s[2]) for s in sums)
    assert singular_alignment(a, b, gamma=gamma) == pytest.approx(expected, abs=1e-12)
    assert singular_alignment(a, a, gamma=gamma) == pytest.approx(1, abs=1e-12)
    scaled = {n: 3 * t for n, t in a.items()}
    assert singular_alignment(a, scaled, gamma=gamma) == pytest.approx(1, abs=1e-12)


def test_distance_is_made_of_singular_directions() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(8, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    p, q = torch.randperm(8, generator=generator), torch.randperm(6, generator=generator)
    (ua, sa, va), (ub, sb, vb) = (torch.linalg.svd(m, full_matrices=False) for m in (a, b))
    cross = sum(float(sa[i] * sb[j] * (ua[:, i] @ ub[p, j]) * (va[i] @ vb[j, q])) for i in range(6) for j in range(6))
    moved = b[p][:, q]
    expected = float((sa**2).sum() + (sb**2).sum() - 2 * cross)
    assert distance({"w": a}, {"w": moved}) ** 2 == pytest.approx(expected, abs=1e-8)
    torch.testing.assert_close(torch.linalg.svdvals(moved), sb)


def test_agreement_does_not_depend_on_a_common_order() -> None:
    a, b = mlp(0), mlp(1)
    symmetry = find_symmetry(a, torch.zeros(1, 6))
    planted = symmetry.random(np.random.default_rng(0))
    both = [symmetry.apply(m.state_dict(), planted) for m in (a, b)]
    assert singular_alignment(*both) == pytest.approx(singular_alignment(a, b), abs=1e-9)
    alone = singular_alignment(both[0], b)
    assert abs(alone - singular_alignment(a, b)) > 1e-3


def test_agreement_of_odd_weights() -> None:
    zero = {"w": torch.zeros(3, 3)}
    assert singular_alignment(zero, zero) == 0
    one = {"w": torch.eye(3)}  # all singular values equal: any basis, one polar factor
    assert singular_alignment(one, {"w": 2 * torch.eye(3)}) == pytest.approx(1)
    with pytest.raises(RecipeError, match="0 to 1"):
        singular_alignment(one, one, gamma=2)
    with pytest.raises(RecipeError, match="two axes"):
        singular_alignment({"b": torch.ones(3)}, {"b": torch.ones(3)})
    with pytest.raises(NonFiniteError, match="w holds NaN"):
        singular_alignment(one, {"w": torch.full((3, 3), math.nan)})


def test_a_report_says_what_matching_did() -> None:
    model, x = mlp(0), torch.randn(50, 6)
    symmetry, _, other = symmetric(model, x)
    aligned = symmetry.apply(other.state_dict(), match_weights(model, other, symmetry).permutations)
    with torch.no_grad():
        target = model(x)

    def loss(state: dict[str, Tensor]) -> float:
        with torch.no_grad():
            return functional.mse_loss(torch.func.functional_call(model, state, x), target).item()

    report = match_report(model, other, aligned, loss=loss)
    assert report.distance_reduction == 1
    assert report.alignment_after == {"0": pytest.approx(1), "0.3": pytest.approx(1)}
    assert report.alignment_before["0.3"] < 0.5
    assert report.barrier_before is not None
    assert report.barrier_after is not None
    assert report.barrier_before.height > 0.01
    assert report.barrier_after.height == pytest.approx(0, abs=1e-10)
    read = json.loads(report.to_json())
    assert read["barrier_before"]["height"] == report.barrier_before.height
    assert len(read["barrier_before"]["losses"]) == 25
