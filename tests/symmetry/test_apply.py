"""Permutations as a group, and what becomes of tensors: state dicts, live models, checkpoints, cut lists."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
from networks import Attention, Grouped, check, outputs, randomize

from weft.errors import RecipeError, ShapeError
from weft.symmetry import Frozen, Group, Member, Symmetry, find_symmetry

TOKENS = torch.randn(3, 7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
IMAGE = torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def attention() -> tuple[nn.Module, Symmetry]:
    model = randomize(nn.Sequential(nn.Linear(5, 24), Attention("split"), nn.Linear(24, 2)))
    return model, find_symmetry(model, TOKENS)


def random(symmetry: Symmetry, seed: int) -> dict[str, np.ndarray]:
    return symmetry.random(torch.Generator().manual_seed(seed))


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("case", ["attention", "convolutions"])
def test_permutations_are_a_group(case: str) -> None:
    if case == "attention":
        model, symmetry = attention()
    else:
        model = randomize(Grouped())
        symmetry = find_symmetry(model, IMAGE)
    assert any(g.within for g in symmetry.groups)
    p, q, r = (random(symmetry, seed) for seed in (1, 2, 3))
    one = symmetry.identity()
    assert equal(symmetry.compose(p, one), p)
    assert equal(symmetry.compose(one, p), p)
    assert equal(symmetry.compose(p, symmetry.invert(p)), one)
    assert equal(symmetry.compose(symmetry.invert(p), p), one)
    assert equal(symmetry.compose(symmetry.compose(p, q), r), symmetry.compose(p, symmetry.compose(q, r)))
    state = model.state_dict()
    twice = symmetry.apply(symmetry.apply(state, p), q)
    once = symmetry.apply(state, symmetry.compose(p, q))
    back = symmetry.apply(symmetry.apply(state, p), symmetry.invert(p))
    for name, tensor in state.items():
        assert torch.equal(once[name], twice[name])
        assert torch.equal(back[name], tensor)
    assert not equal(symmetry.compose(p, q), symmetry.compose(q, p))


def test_a_part_of_the_groups_composes_and_inverts() -> None:
    model, symmetry = attention()
    heads = symmetry.random(torch.Generator().manual_seed(1), ("1.heads",))
    inside = symmetry.random(torch.Generator().manual_seed(3), ("1.head_dim",))
    both = symmetry.compose(heads, inside)
    assert both.keys() == {"1.heads", "1.head_dim"}
    state = model.state_dict()
    expected = symmetry.apply(symmetry.apply(state, heads), inside)
    assert all(torch.equal(t, expected[n]) for n, t in symmetry.apply(state, both).items())
    assert symmetry.invert(heads).keys() == {"1.heads"}
    assert symmetry.apply(state, {}) == state


def test_random_draws_from_both_kinds_of_generator() -> None:
    _, symmetry = attention()
    assert equal(random(symmetry, 1), random(symmetry, 1))
    assert not equal(random(symmetry, 1), random(symmetry, 2))
    drawn = symmetry.random(np.random.default_rng(0))
    assert drawn["1.head_dim"].shape == (3, 8)
    assert (np.sort(drawn["1.head_dim"], -1) == np.arange(8)).all()


def test_one_row_serves_all_units_around() -> None:
    model, symmetry = attention()
    row = np.roll(np.arange(8), 3)
    state = model.state_dict()
    a = symmetry.apply(state, {"1.head_dim": row})
    b = symmetry.apply(state, {"1.head_dim": np.tile(row, (3, 1))})
    assert all(torch.equal(a[n], b[n]) for n in state)


def test_a_live_model_changes_in_place_and_tied_weights_once() -> None:
    model = nn.Sequential(nn.Embedding(11, 24), Attention(), nn.Linear(24, 11, bias=False))
    model[2].weight = model[0].weight
    randomize(model)
    tokens = torch.arange(10).view(2, 5)
    symmetry = find_symmetry(model, tokens)
    weight, before, values = model[0].weight, outputs(model, tokens), model[0].weight.detach().clone()
    assert symmetry.apply(model, random(symmetry, 4)) is model
    assert model[0].weight is model[2].weight is weight
    assert not torch.equal(weight, values)
    assert torch.equal(weight.sort(1).values, values.sort(1).values)  # the columns moved, each number is there
    torch.testing.assert_close(outputs(model, tokens), before)


def test_ties_of_a_state_dict_stay_and_ties_that_are_broken_move_both() -> None:
    model = nn.Sequential(nn.Embedding(11, 24), Attention(), nn.Linear(24, 11, bias=False))
    model[2].weight = model[0].weight
    randomize(model)
    symmetry = find_symmetry(model, torch.arange(10).view(2, 5))
    state = model.state_dict()  # two objects over one storage
    moved = symmetry.apply(state, random(symmetry, 4))
    assert state["0.weight"] is not state["2.weight"]
    assert moved["0.weight"] is moved["2.weight"]
    model[2].weight = nn.Parameter(model[0].weight.detach().clone())
    symmetry.apply(model, random(symmetry, 4))
    assert torch.equal(model[0].weight, moved["0.weight"])
    assert torch.equal(model[2].weight, moved["0.weight"])


def test_tied_names_of_a_state_dict_stay_one_tensor() -> None:
    tied = torch.arange(6.0).view(3, 2)
    symmetry = Symmetry((Group("hidden", "hidden", 2, (Member("a", 1, 0, 1),)),), (), (), {"a": (3, 2)}, {"b": "a"})
    moved = symmetry.apply({"a": tied, "b": tied, "c": tied}, {"hidden": np.array([1, 0])})
    assert moved["a"] is moved["b"]
    assert moved["a"].tolist() == [[1, 0], [3, 2], [5, 4]]
    assert moved["c"] is tied
    apart = symmetry.apply({"b": tied.clone()}, {"hidden": np.array([1, 0])})  # a file that has the other name only
    assert torch.equal(apart["b"], moved["a"])


def test_numpy_and_files_give_the_same(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    import weft

    model, symmetry = attention()
    p = random(symmetry, 5)
    state = {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()}
    save_file(state, tmp_path / "model.safetensors")
    expected = symmetry.apply(state, p)
    for name, tensor in symmetry.apply(weft.open(tmp_path / "model.safetensors"), p).items():
        if name in {t for g in symmetry.groups for t in g.tensors}:
            assert tensor.dtype == torch.bfloat16
            assert torch.equal(tensor, expected[name])
    arrays = {name: tensor.float().numpy() for name, tensor in state.items()}
    for name, array in symmetry.apply(arrays, p).items():
        assert isinstance(array, np.ndarray)
        assert np.array_equal(array, expected[name].float().numpy())


def test_json_round_trip() -> None:
    _, symmetry = attention()
    assert Symmetry.from_json(symmetry.to_json()) == symmetry
    assert isinstance(symmetry.frozen[0], Frozen)
    with pytest.raises(RecipeError, match="not a symmetry"):
        Symmetry.from_json('{"groups": [{}]}')
    with pytest.raises(RecipeError, match="not JSON"):
        Symmetry.from_json("{")


def test_refusals() -> None:
    model, symmetry = attention()
    state = model.state_dict()
    with pytest.raises(RecipeError, match=r"Did you mean 1\.heads"):
        symmetry.apply(state, {"1.head": np.arange(3)})
    with pytest.raises(RecipeError, match=r"Did you mean 1\.heads"):
        symmetry["1.headz"]
    with pytest.raises(RecipeError, match="each of 0 … 2 once"):
        symmetry.apply(state, {"1.heads": np.array([0, 1, 1])})
    with pytest.raises(RecipeError, match="shape"):
        symmetry.apply(state, {"1.heads": np.arange(4)})
    with pytest.raises(RecipeError, match="integers"):
        symmetry.apply(state, {"1.heads": np.array([0.0, 1.0, 2.0])})
    with pytest.raises(ShapeError, match=r"1\.qkv\.bias moves with the others but is not in the state"):
        symmetry.apply({n: t for n, t in state.items() if n != "1.qkv.bias"}, random(symmetry, 0))
    with pytest.raises(ShapeError, match="in the traced model"):
        symmetry.apply({**state, "1.qkv.bias": torch.zeros(3)}, random(symmetry, 0))
    with pytest.raises(RecipeError, match="There is no tensor"):
        symmetry.why_frozen("1.qkv.wait", 0)
    for keep, reason in (([], "at least one"), ([0, 0], "no unit twice"), ([3], "0 … 2"), ([0.5], "integers")):
        with pytest.raises(RecipeError, match=reason):
            symmetry.cut("1.heads", keep)


def cut_state(symmetry: Symmetry, state: dict, group: str, keep: object) -> dict:
    result = dict(state)
    for one in symmetry.cut(group, keep):
        result[one.tensor] = one(result[one.tensor])
    return result


def test_cutting_an_mlp_is_slicing_by_hand() -> None:
    model = nn.Sequential(nn.Linear(5, 9), nn.Tanh(), nn.Linear(9, 2)).double()
    symmetry = find_symmetry(model, torch.zeros(3, 5))
    keep = [7, 0, 4]  # in this order
    done = cut_state(symmetry, model.state_dict(), "0.intermediate", keep)
    assert torch.equal(done["0.weight"], model[0].weight[keep])
    assert torch.equal(done["0.bias"], model[0].bias[keep])
    assert torch.equal(done["2.weight"], model[2].weight[:, keep])
    assert done["2.bias"] is not None
    small = nn.Sequential(nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    small.load_state_dict(done)


def test_cutting_heads_is_slicing_by_hand() -> None:
    model, symmetry = attention()
    keep = [2, 0]
    done = cut_state(symmetry, model.state_dict(), "1.heads", keep)
    qkv, out = model[1].qkv, model[1].out
    assert torch.equal(done["1.qkv.weight"], qkv.weight.view(3, 3, 8, 24)[:, keep].reshape(48, 24))
    assert torch.equal(done["1.qkv.bias"], qkv.bias.view(3, 3, 8)[:, keep].reshape(48))
    assert torch.equal(done["1.out.weight"], out.weight.view(24, 3, 8)[:, keep].reshape(24, 16))


def test_cutting_inside_of_heads_keeps_other_units_in_each() -> None:
    model, symmetry = attention()
    keep = np.array([[0, 3], [7, 1], [2, 4]])
    done = cut_state(symmetry, model.state_dict(), "1.head_dim", keep)  # value and output
    rows = torch.tensor([[0, 3], [15, 9], [18, 20]]).flatten()
    weight = model[1].qkv.weight
    assert torch.equal(done["1.qkv.weight"], torch.cat([weight[:48], weight[48 + rows]]))
    assert torch.equal(done["1.out.weight"], model[1].out.weight[:, rows])


def test_cutting_what_is_zero_keeps_the_function() -> None:
    """Heads whose output is zero: without them the layer computes the same."""
    model, symmetry = attention()
    with torch.no_grad():
        model[1].out.weight.view(24, 3, 8)[:, 1] = 0
    before = outputs(model, TOKENS)
    done = cut_state(symmetry, model.state_dict(), "1.heads", [0, 2])
    small = nn.Sequential(nn.Linear(5, 24), Attention("split"), nn.Linear(24, 2)).double()
    small[1].heads, small[1].qkv, small[1].out = 2, nn.Linear(24, 48).double(), nn.Linear(16, 24).double()
    small.load_state_dict(done)
    small[1].forward = lambda x: _two_heads(small[1], x)
    torch.testing.assert_close(outputs(small, TOKENS), before)


def _two_heads(layer: Attention, x: torch.Tensor) -> torch.Tensor:
    b, t, _ = x.shape
    q, k, v = (p.view(b, t, 2, 8).transpose(1, 2) for p in layer.qkv(layer.norm(x)).split(16, dim=-1))
    y = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, 16)
    return x + layer.out(y)


def test_cutting_experts_and_inside_of_experts() -> None:
    """Fused experts: another axis of the same tensor says which units are kept."""
    members = tuple(Member(n, a, s, 1) for n, a, s in (("up", 1, 0), ("up", 1, 4), ("down", 2, 0)))
    experts = Group("e", "experts", 3, (Member("router", 0, 0, 1), Member("up", 0, 0, 1), Member("down", 0, 0, 1)))
    symmetry = Symmetry(
        (experts, Group("i", "intermediate", 4, members, ("e",))), (), (),
        {"router": (3, 2), "up": (3, 8, 2), "down": (3, 2, 4)}, {},
    )  # fmt: skip
    state = {n: torch.randn(s, generator=torch.Generator().manual_seed(0)) for n, s in symmetry.shapes.items()}
    keep = np.array([[0, 1], [3, 2], [1, 3]])
    done = cut_state(symmetry, state, "i", keep)
    for e, row in enumerate(keep):
        assert torch.equal(done["up"][e], state["up"][e, [*row, *(4 + row)]])
        assert torch.equal(done["down"][e], state["down"][e][:, row])
    less = cut_state(symmetry, done, "e", [2, 0])
    assert torch.equal(less["up"], done["up"][[2, 0]])
    assert torch.equal(less["router"], state["router"][[2, 0]])
    p = {"e": np.array([2, 0, 1]), "i": np.array([[1, 0, 2, 3], [0, 3, 2, 1], [3, 2, 1, 0]])}
    moved = symmetry.apply(state, p)
    for new, old in enumerate(p["e"]):
        row = p["i"][old]
        assert torch.equal(moved["up"][new], state["up"][old, [*row, *(4 + row)]])
    back = symmetry.apply(moved, symmetry.invert(p))
    assert all(torch.equal(back[n], t) for n, t in state.items())


def test_check_is_not_blind() -> None:
    """The helper of these tests fails where a group is wrong."""
    model, symmetry = attention()
    wrong = Symmetry((Group("1.heads", "heads", 3, symmetry["1.heads"].members[1:]),), (), (), symmetry.shapes, {})
    with pytest.raises(AssertionError):
        check(model, wrong, TOKENS)
