"""Weight matching: planted orders come back, small cases equal brute force, the objective is what it says it is."""

from __future__ import annotations

import copy
import itertools
import math
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional

import weft.merge
from weft.errors import NonFiniteError, RecipeError, ShapeError
from weft.merge.weight_matching.blocks import axis_sections, blocks_of, state_of
from weft.merge.weight_matching.weights import Matching, align, match_weights
from weft.symmetry import Symmetry, find_symmetry


class Residual(nn.Module):
    def __init__(self, width: int, out: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(width, out, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(out)
        short = nn.Sequential(nn.Conv2d(width, out, 1, stride, bias=False), nn.BatchNorm2d(out))
        self.short = nn.Identity() if width == out else short

    def forward(self, x: Tensor) -> Tensor:
        inside = self.norm2(self.conv2(functional.relu(self.norm1(self.conv1(x)))))
        return functional.relu(inside + self.short(x))


class ResNet(nn.Module):
    def __init__(self, width: int = 8):
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.layers = nn.Sequential(
            Residual(width, width, 1), Residual(width, 2 * width, 2), Residual(2 * width, 2 * width, 1)
        )
        self.head = nn.Linear(2 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(functional.relu(self.norm(self.conv(x)))).mean((2, 3)))


class Attention(nn.Module):
    """Only attention: three heads of three units, so that all orders can be tried."""

    def __init__(self, heads: int = 3, size: int = 3, width: int = 5):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v = (nn.Linear(width, heads * size) for _ in range(3))
        self.out = nn.Linear(heads * size, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (each(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for each in (self.q, self.k, self.v))
        return self.out(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Loop(nn.Module):
    """One square weight, applied twice: its units stand in both of its axes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.again, self.last = nn.Linear(4, 12), nn.Linear(12, 12, bias=False), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        return self.last(torch.tanh(self.again(torch.tanh(self.again(h)))))


SMALL = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "vocab_size": 48}


def mlp(*sizes: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(sizes):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def made(name: str) -> tuple[nn.Module, Any]:
    if name == "mlp":
        return mlp(6, 20, 24, 20, 3), torch.randn(7, 6)
    if name == "resnet":
        return ResNet(), torch.randn(4, 3, 8, 8)
    if name == "loop":
        return Loop(), torch.randn(5, 4)
    if name == "attention":
        return Attention(), torch.randn(2, 4, 5)
    if name == "grouped heads":
        config = transformers.LlamaConfig(**SMALL, num_attention_heads=8, num_key_value_heads=4)
        return transformers.LlamaForCausalLM(config), torch.randint(48, (2, 6))
    if name == "fused projection":
        return transformers.GPTNeoXForCausalLM(
            transformers.GPTNeoXConfig(**SMALL, num_attention_heads=4)
        ), torch.randint(48, (2, 6))
    config = transformers.MixtralConfig(**SMALL, num_attention_heads=4, num_key_value_heads=2, num_local_experts=3)
    return transformers.MixtralForCausalLM(config), torch.randint(48, (2, 6))


NAMES = ("mlp", "resnet", "loop", "attention", "grouped heads", "fused projection", "experts")


def model_of(name: str, seed: int = 0) -> tuple[nn.Module, Any, Symmetry]:
    """A model whose norms and biases are not all equal."""
    torch.manual_seed(seed)
    model, inputs = made(name)
    with torch.no_grad():
        for tensor in model.parameters():
            if tensor.ndim == 1:
                tensor.add_(0.3 * torch.randn_like(tensor))
        model.train()(inputs)  # running statistics of its own
    return model.eval(), inputs, symmetry_of(name)


@cache
def symmetry_of(name: str) -> Symmetry:
    return find_symmetry(*made(name))


def outputs(model: nn.Module, inputs: Any) -> Tensor:
    with torch.no_grad():
        found = model(inputs)
    return found if isinstance(found, Tensor) else found.logits


def same(symmetry: Symmetry, found: Matching, planted: dict[str, np.ndarray]) -> bool:
    inverse = symmetry.invert(planted)
    return all((found.permutations[name] == inverse[name]).all() for name in inverse)


def objective(symmetry: Symmetry, a: dict[str, Tensor], b: dict[str, Tensor], permutations: Any) -> float:
    """Σ ⟨A, π(B)⟩ over tensors with units, by what ``apply`` does."""
    moved = symmetry.apply(b, permutations)
    names = {m.tensor for g in symmetry.groups for m in g.members if "running" not in m.tensor}
    return sum(float((a[n].double() * moved[n].double()).sum()) for n in names)


@pytest.mark.parametrize("name", NAMES)
def test_a_planted_order_is_recovered(name: str) -> None:
    model, _, symmetry = model_of(name)
    assert not symmetry.unknown
    planted = symmetry.random(np.random.default_rng(1))
    a = model.state_dict()
    generator = torch.Generator().manual_seed(2)
    noisy = {
        n: t + 1e-3 * t.std() * torch.randn(t.shape, generator=generator) if t.is_floating_point() else t
        for n, t in a.items()
    }
    found = match_weights(a, symmetry.apply(noisy, planted), symmetry)
    assert found.converged
    assert found.unmatched == ()
    assert same(symmetry, found, planted)


@pytest.mark.parametrize("name", ["mlp", "grouped heads"])
def test_a_planted_order_is_recovered_in_bfloat16(name: str) -> None:
    model, _, symmetry = model_of(name)
    planted = symmetry.random(np.random.default_rng(1))
    model = model.to(torch.bfloat16)
    found = match_weights(model, symmetry.apply(model.state_dict(), planted), symmetry)
    assert same(symmetry, found, planted)


def test_a_group_may_meet_itself() -> None:
    (square,) = {g.name for g in symmetry_of("loop").groups for m in g.members if m.tensor == "again.weight"}
    assert {m.axis for m in symmetry_of("loop")[square].members if m.tensor == "again.weight"} == {0, 1}


@pytest.mark.parametrize("name", NAMES)
def test_an_aligned_model_computes_what_it_did(name: str) -> None:
    reference, inputs, symmetry = model_of(name)
    model, _, _ = model_of(name, seed=1)
    before = outputs(model, inputs)
    aligned = align(model, reference, symmetry)
    assert any(not torch.equal(t, model.state_dict()[n]) for n, t in aligned.items())
    model.load_state_dict(aligned)
    torch.testing.assert_close(outputs(model, inputs), before, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_the_objective_is_exact_and_rises(name: str) -> None:
    a = model_of(name)[0].double().state_dict()
    model, _, symmetry = model_of(name, seed=1)
    b = model.double().state_dict()
    found = match_weights(a, b, symmetry)
    assert len(found.history) > 1
    assert all(later > before for before, later in itertools.pairwise(found.history))
    assert found.history[0] == pytest.approx(objective(symmetry, a, b, {}), rel=1e-12)
    assert found.objective == pytest.approx(objective(symmetry, a, b, found.permutations), rel=1e-12)


def test_one_hidden_layer_takes_one_sweep_and_equals_brute_force() -> None:
    torch.manual_seed(0)
    a, b = (mlp(4, 6, 3).double().state_dict() for _ in range(2))
    symmetry = find_symmetry(mlp(4, 6, 3), torch.zeros(1, 4))
    found = match_weights(a, b, symmetry)
    best = max(
        sum(float((a[n] * t).sum()) for n, t in (("0.weight", b["0.weight"][p]), ("0.bias", b["0.bias"][p]),
                                                 ("2.weight", b["2.weight"][:, p])))
        for p in (torch.tensor(p) for p in itertools.permutations(range(6)))
    )  # fmt: skip
    assert found.objective == pytest.approx(best, rel=1e-12)
    assert len(found.history) == 2
    assert found.sweeps <= 2  # the second finds that there is nothing to do


def test_heads_and_what_they_hold_equal_brute_force() -> None:
    models = [model_of("attention", seed=s)[0].double().state_dict() for s in (0, 1)]
    symmetry = model_of("attention")[2]
    heads = next(g for g in symmetry.groups if not g.within)
    inner = [g for g in symmetry.groups if g.within]
    assert len(inner) == 2  # of queries and keys, of values
    a, b = models
    found = match_weights(a, b, symmetry)
    # for every pair of heads the best of all inner orders, then all orders of heads
    orders = [torch.tensor(p) for p in itertools.permutations(range(3))]

    def head(state: dict[str, Tensor], i: int) -> tuple[list[Tensor], list[Tensor]]:
        rows = slice(3 * i, 3 * i + 3)
        stacked = {n: torch.cat([state[f"{n}.weight"][rows], state[f"{n}.bias"][rows, None]], 1) for n in "qkv"}
        return [stacked["q"], stacked["k"]], [stacked["v"], state["out.weight"][:, rows].T]

    def pair(i: int, j: int) -> float:
        return sum(
            max(sum(float((x * y[p]).sum()) for x, y in zip(one, other)) for p in orders)
            for one, other in zip(head(a, i), head(b, j))
        )

    best = max(sum(pair(i, int(j)) for i, j in enumerate(p)) for p in orders)
    assert found.objective == pytest.approx(best, rel=1e-12)
    assert {heads.name, *(g.name for g in inner)} == set(found.permutations)


@pytest.mark.parametrize("name", NAMES)
def test_sections_cover_every_axis_once(name: str) -> None:
    _, _, symmetry = model_of(name)
    for tensor, shape in symmetry.shapes.items():
        for axis, size in enumerate(shape):
            places = np.concatenate([grid.reshape(-1) for _, grid in axis_sections(symmetry, tensor, axis)])
            assert sorted(places.tolist()) == list(range(size))


def test_blocks_hold_every_element_of_moving_tensors_once() -> None:
    model, _, symmetry = model_of("fused projection")
    state = {n: torch.randn(t.shape) for n, t in state_of(model, symmetry, "it").items()}
    blocks = blocks_of(symmetry, state, state)
    name = next(n for n in state if n.endswith("0.attention.query_key_value.weight"))
    other = {n: t + (n == name) for n, t in state.items()}
    changed = [b for b, c in zip(blocks, blocks_of(symmetry, other, other)) if not torch.equal(b.a, c.a)]
    assert sum(b.a.numel() for b in changed) == state[name].numel()
    assert torch.cat([b.a.flatten() for b in changed]).sort()[0].equal(state[name].flatten().sort()[0])


def test_restarts_keep_the_best_and_repeat_themselves() -> None:
    a, b = (model_of("mlp", seed=s)[0] for s in (0, 1))
    symmetry = model_of("mlp")[2]
    single = [match_weights(a, b, symmetry, seed=s).objective for s in (3, 3)]
    many = match_weights(a, b, symmetry, restarts=6, seed=3)
    again = match_weights(a, b, symmetry, restarts=6, seed=3)
    assert single[0] == single[1]
    assert many.objective > single[0]  # on these models the first descent is not the best
    assert many.restart > 0
    assert all((many.permutations[n] == again.permutations[n]).all() for n in many.permutations)


def test_a_start_that_cannot_be_improved_stays() -> None:
    a, b = (model_of("resnet", seed=s)[0] for s in (0, 1))
    symmetry = model_of("resnet")[2]
    found = match_weights(a, b, symmetry)
    again = match_weights(a, b, symmetry, start=found.permutations, seed=5)
    assert again.history == (pytest.approx(found.objective, rel=1e-9),)
    assert all((again.permutations[n] == found.permutations[n]).all() for n in found.permutations)


def test_equal_units_stay_where_they_are() -> None:
    model = mlp(3, 8, 2)
    for tensor in model.parameters():
        nn.init.ones_(tensor)
    found = match_weights(model, copy.deepcopy(model), find_symmetry(model, torch.zeros(1, 3)))
    assert found.permutations["0.intermediate"].tolist() == list(range(8))


def test_a_model_without_units_stays() -> None:
    model = nn.Linear(3, 2)
    found = match_weights(model, nn.Linear(3, 2), find_symmetry(model, torch.zeros(1, 3)))
    assert (found.permutations, found.objective, found.converged) == ({}, 0.0, True)
    aligned = align(nn.Linear(3, 2), model, inputs=torch.zeros(1, 3))
    assert set(aligned) == {"weight", "bias"}


def test_only_named_groups_move() -> None:
    model, _, symmetry = model_of("grouped heads")
    inside = tuple(g.name for g in symmetry.groups if "layers.0" in g.name and g.kind == "head_dim")
    planted = symmetry.random(np.random.default_rng(0), inside)
    found = match_weights(model, symmetry.apply(model.state_dict(), planted), symmetry, groups=inside)
    for group in symmetry.groups:
        expected = symmetry.invert(planted).get(group.name, symmetry.identity()[group.name])
        assert (found.permutations[group.name] == expected).all()
    other, _, _ = model_of("grouped heads", seed=1)
    found = match_weights(model, other, symmetry, groups=inside)  # heads around them are held
    moving = {n for n, p in found.permutations.items() if (p != symmetry.identity()[n]).any()}
    assert moving == set(inside)


def test_statistics_move_but_have_no_say() -> None:
    model, _, symmetry = model_of("resnet")
    planted = symmetry.random(np.random.default_rng(0))
    b = symmetry.apply(model.state_dict(), planted)
    wild = {n: torch.randn_like(t) * 1e6 if "running" in n else t for n, t in b.items()}
    assert same(symmetry, match_weights(model, wild, symmetry), planted)
    back = symmetry.apply(b, match_weights(model, b, symmetry).permutations)
    assert all(torch.equal(t, model.state_dict()[n]) for n, t in back.items())


def test_numpy_states_and_tied_tensors() -> None:
    config = transformers.LlamaConfig(**SMALL, num_attention_heads=4, tie_word_embeddings=True)
    model = transformers.LlamaForCausalLM(config)
    symmetry = find_symmetry(model)
    assert symmetry.aliases
    planted = symmetry.random(np.random.default_rng(0))
    arrays = {n: t.numpy() for n, t in symmetry.apply(model.state_dict(), planted).items()}
    for array in arrays.values():
        array.flags.writeable = False  # as of a file that is mapped
    found = match_weights(model, arrays, symmetry)
    assert same(symmetry, found, planted)
    aligned = align(arrays, model, symmetry)
    assert all(isinstance(v, np.ndarray) and (v == model.state_dict()[n].numpy()).all() for n, v in aligned.items())


def test_an_aligned_model_merges_with_any_method() -> None:
    model, inputs, symmetry = model_of("mlp")
    b = symmetry.apply(model.state_dict(), symmetry.random(np.random.default_rng(0)))
    merged = weft.merge.uniform_soup([model.state_dict(), weft.merge.align(b, model, inputs=inputs)])
    torch.testing.assert_close(merged, dict(model.state_dict()))
    naive = weft.merge.uniform_soup([model.state_dict(), b])
    assert (naive["0.weight"] - model[0].weight).abs().max() > 0.1


def test_a_matching_is_written_as_json() -> None:
    import json

    model, _, symmetry = model_of("mlp")
    found = match_weights(model, model_of("mlp", seed=1)[0], symmetry)
    read = json.loads(found.to_json())
    assert read["permutations"]["0.intermediate"] == found.permutations["0.intermediate"].tolist()
    assert 0 < read["assignment_seconds"] < read["seconds"]
    assert read["assignments"] >= 3


def test_bad_input_is_refused() -> None:
    model, _, symmetry = model_of("mlp")
    a = model.state_dict()
    with pytest.raises(ShapeError, match="one architecture and one width"):
        match_weights(a, mlp(6, 21, 24, 20, 3).state_dict(), symmetry)
    with pytest.raises(ShapeError, match=r"has no tensor 2\.weight"):
        match_weights(a, {n: t for n, t in a.items() if n != "2.weight"}, symmetry)
    for value in (math.nan, math.inf):
        with pytest.raises(NonFiniteError, match=r"The model: 0\.bias"):
            match_weights(a, {**a, "0.bias": torch.full((20,), value)}, symmetry)
    with pytest.raises(RecipeError, match=r"no group .0\.intermediat.\. Did you mean"):
        match_weights(a, a, symmetry, groups=["0.intermediat"])
    with pytest.raises(RecipeError, match="no group"):
        match_weights(a, a, symmetry, start={"nothing": np.arange(3)})
    with pytest.raises(RecipeError, match="names each of"):
        match_weights(a, a, symmetry, start={"0.intermediate": np.zeros(20, int)})
    for wrong in ("restarts", "max_sweeps"):
        with pytest.raises(RecipeError, match=f"match_weights: parameter '{wrong}' must be between 1 and ∞, got 0"):
            match_weights(a, a, symmetry, **{wrong: 0})
    with pytest.raises(RecipeError, match="found from a module"):
        align(a, a)


def test_without_scipy_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from weft.errors import MissingDependencyError

    model, _, symmetry = model_of("mlp")
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(MissingDependencyError, match="scipy"):
        match_weights(model, model, symmetry)


def test_importing_it_does_not_load_torch() -> None:
    import subprocess
    import sys

    code = (
        "import sys, weft.merge, weft.merge.weight_matching, weft.registry as r; "
        "r.method('ties'); r.method('weight_matching').configure({'restarts': 2}); print('torch' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "False"
    with pytest.raises(AttributeError, match="Did you mean"):
        weft.merge.match_weight  # noqa: B018
    assert set(dir(weft.merge)) >= set(weft.merge.__all__)
    assert all(getattr(weft.merge, name) is not None for name in weft.merge.__all__)
