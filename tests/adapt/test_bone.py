"""Bone: its own mathematics, and the numbers of PEFT's MiSS."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import weft
from weft.adapt import Bone, block_affine, share_shards, unmerge_block_affine
from weft.errors import RecipeError
from weft.papers import search
from weft.registry import methods

peft = pytest.importorskip("peft")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def function_of(layer: nn.Module) -> Any:
    return layer.parametrizations.weight[0]


KINDS = {
    "miss": (Bone(rank=4), {"r": 4, "init_weights": True}, (8, 6)),
    "miss, rank does not divide": (Bone(rank=5), {"r": 5, "init_weights": True}, (8, 6)),
    "mini": (Bone(rank=4, mini_rank=2), {"r": 4, "mini_r": 2, "init_weights": "mini"}, (8, 6)),
    "mini, rank does not divide": (Bone(rank=3, mini_rank=3), {"r": 3, "mini_r": 3, "init_weights": "mini"}, (8, 6)),
    "bat": (Bone(rank=2, form="block_affine"), {"r": 2, "init_weights": "bat"}, (8, 6)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_gradients_and_merged_weights_as_peft(kind: str, dtype: torch.dtype) -> None:
    config, options, sizes = KINDS[kind]
    ours, twin = nn.Linear(*sizes, dtype=dtype), nn.Linear(*sizes, dtype=dtype)
    twin.load_state_dict(ours.state_dict())
    weft.adapt_(ours, config, where="*")
    theirs = peft.inject_adapter_in_model(peft.MissConfig(target_modules=["0"], **options), nn.Sequential(twin))[0]
    block = theirs.miss_block["default"]
    (parameter,) = function_of(ours).parameters()
    nn.init.normal_(parameter)

    def as_theirs(value: Tensor) -> Tensor:
        return value if config.form == "block_affine" else value.mT

    assert block.shape == as_theirs(parameter).shape
    block.data = as_theirs(parameter.detach()).clone()
    x = torch.randn(3, 5, sizes[0], dtype=dtype)
    y, other = ours(x), theirs(x)
    torch.testing.assert_close(y, other)
    upstream = torch.randn_like(y)
    y.backward(upstream)
    other.backward(upstream)
    torch.testing.assert_close(as_theirs(parameter.grad), block.grad)
    theirs.merge()
    torch.testing.assert_close(ours.weight, theirs.get_base_layer().weight)


def test_dropout_as_peft() -> None:
    ours, twin = nn.Linear(8, 6), nn.Linear(8, 6)
    twin.load_state_dict(ours.state_dict())
    weft.adapt_(ours, Bone(rank=4, dropout=0.5), where="*")
    config = peft.MissConfig(r=4, miss_dropout=0.5, target_modules=["0"])
    theirs = peft.inject_adapter_in_model(config, nn.Sequential(twin))[0]
    nn.init.normal_(function_of(ours).D)
    theirs.miss_block["default"].data = function_of(ours).D.detach().mT.clone()
    x = torch.randn(64, 8)
    draws = []
    for layer in (ours, theirs):
        torch.manual_seed(1)
        draws.append(layer.train()(x))
    torch.testing.assert_close(*draws)
    assert not torch.allclose(draws[0], ours.eval()(x))
    torch.testing.assert_close(ours(x), theirs.eval()(x))


@pytest.mark.parametrize("mini", [None, 3])
@pytest.mark.parametrize("rank", [4, 5, 8])
def test_shards_against_the_equation_and_as_a_lora(rank: int, mini: int | None) -> None:
    layer = nn.Linear(8, 6).double()
    before = layer.weight.detach().clone()
    weft.adapt_(layer, Bone(rank=rank, mini_rank=mini), where="*")
    function = function_of(layer)
    nn.init.normal_(function.D)
    D, change = function.D.detach(), layer.weight.detach() - before
    for o in range(6):
        for j in range(8):
            assert change[o, j] == pytest.approx(float(D[o % (mini or 6), j % rank]))
    assert torch.linalg.matrix_rank(change) == min(rank, mini or 6)
    A, B = function.to_lora()
    assert (A.shape, B.shape) == ((rank, 8), (6, rank))
    torch.testing.assert_close(B @ A, change)


def test_shards_multiply_without_building_the_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = nn.Linear(7, 6), torch.randn(2, 7)
    weft.adapt_(layer, Bone(rank=3), where="*")
    nn.init.normal_(function_of(layer).D)
    dense = nn.functional.linear(x, layer.weight, layer.bias)
    monkeypatch.setattr(function_of(layer), "change", None)
    torch.testing.assert_close(layer(x), dense)


def test_stacks_have_shards_of_their_own() -> None:
    from weft.contract.models import Experts

    experts = Experts()  # (3, 16, 8)
    nn.init.normal_(experts.weight)
    before = experts.weight.detach().clone()
    weft.adapt_(experts, Bone(rank=3, mini_rank=4), where="*")
    function = function_of(experts)
    nn.init.normal_(function.D)
    change = experts.weight - before
    for i in range(3):
        torch.testing.assert_close(change[i], share_shards(function.D[i], 16, 8), atol=1e-6, rtol=0)
    A, B = function.to_lora()
    torch.testing.assert_close(B @ A, change, atol=1e-6, rtol=0)


def test_block_affine_is_block_by_block() -> None:
    W, B = torch.randn(6, 8, dtype=torch.float64), torch.randn(3, 2, 2, dtype=torch.float64)
    expected = W.clone()
    for p in range(3):
        for q in range(4):
            at = (slice(2 * p, 2 * p + 2), slice(2 * q, 2 * q + 2))
            expected[at] = W[at] @ (torch.eye(2, dtype=torch.float64) + B[p]) + B[p]
    torch.testing.assert_close(block_affine(W, B), expected)
    stack = block_affine(torch.stack([W, 2 * W]), torch.stack([B, B]))
    torch.testing.assert_close(stack[0], expected)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-13)])
def test_the_inverse_of_block_affine(dtype: torch.dtype, tolerance: float) -> None:
    W, B = torch.randn(64, 96, dtype=dtype), 0.05 * torch.randn(4, 16, 16, dtype=dtype)
    merged = block_affine(W, B)
    assert (merged - W).abs().max() > 0.1
    assert (unmerge_block_affine(merged, B) - W).abs().max() < tolerance
    B2 = 0.05 * torch.randn(4, 16, 16, dtype=dtype)
    twice = block_affine(merged, B2)
    assert not torch.allclose(twice, block_affine(block_affine(W, B2), B), atol=1e-3)  # the order matters
    assert (unmerge_block_affine(unmerge_block_affine(twice, B2), B) - W).abs().max() < 3 * tolerance
    assert (unmerge_block_affine(unmerge_block_affine(twice, B), B2) - W).abs().max() > 1e-2


def test_the_inverse_is_computed_in_float32_for_bfloat16() -> None:
    W, B = torch.randn(8, 8).bfloat16(), (0.1 * torch.randn(2, 4, 4)).bfloat16()
    back = unmerge_block_affine(block_affine(W, B).bfloat16(), B)
    assert back.dtype == torch.bfloat16
    assert (back - W).abs().max() < 2**-5  # merging rounds to 8 bits


def test_a_merge_that_cannot_be_undone_is_refused() -> None:
    W = torch.randn(4, 4)
    with pytest.raises(RecipeError, match="cannot be undone"):
        unmerge_block_affine(W, -torch.eye(2).expand(2, 2, 2))
    with pytest.raises(RecipeError, match="cannot be undone"):
        unmerge_block_affine(W, torch.full((2, 2, 2), torch.nan))
    for shape in ((2, 3, 3), (3, 2, 2), (2, 2, 1)):
        with pytest.raises(RecipeError, match="blocks must be"):
            unmerge_block_affine(W, torch.zeros(shape))


def test_two_forms_on_one_layer_in_two_orders() -> None:
    def pair(*configs: Bone) -> Tensor:
        torch.manual_seed(3)
        layer = nn.Linear(8, 4).double()
        for i, config in enumerate(configs):
            weft.adapt_(layer, config, where="*", name=str(i))
        for function in layer.parametrizations.weight:
            (parameter,) = function.parameters()
            parameter.data = torch.arange(parameter.numel(), dtype=torch.float64).reshape(parameter.shape) / 10
        assert all(f.to_lora() is None for f in layer.parametrizations.weight if "Affine" in type(f).__name__)
        return layer.weight.detach()

    shards, affine = Bone(rank=3), Bone(rank=2, form="block_affine")
    assert not torch.allclose(pair(shards, affine), pair(affine, shards))
    torch.testing.assert_close(pair(shards, Bone(rank=5)), pair(Bone(rank=5), shards))


@pytest.mark.parametrize(
    ("config", "layer", "message"),
    [
        (Bone(rank=3, form="block_affine"), nn.Linear(8, 6), "not a multiple"),
        (Bone(rank=4, form="block_affine"), nn.Linear(8, 6), "not a multiple"),
        (Bone(rank=2, form="block_affine", mini_rank=2), nn.Linear(8, 6), "belong to form='shards'"),
        (Bone(rank=2, form="block_affine", dropout=0.1), nn.Linear(8, 6), "belong to form='shards'"),
        (Bone(rank=9), nn.Linear(8, 6), "more than the 8 inputs"),
        (Bone(rank=2, mini_rank=4), nn.Linear(8, 6), "does not divide the 6 outputs"),
        (Bone(rank=2, dropout=0.1), nn.Conv2d(4, 4, 3), "built whole"),
        (Bone(rank=0), nn.Linear(8, 6), "between 1"),
        (Bone(rank=2, form="bat"), nn.Linear(8, 6), "must be one of"),
    ],
)
def test_what_does_not_fit_is_refused(config: Bone, layer: nn.Module, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        weft.adapt_(layer, config, where="*")
    assert type(layer) in (nn.Linear, nn.Conv2d)


def test_all_its_names_find_it() -> None:
    for name in ("bone", "miss", "bat"):
        assert methods()[name].paper == "bone"
        assert search(name)[0].paper.key == "bone"
    assert methods()["miss"].configure({}) == methods()["bone"].configure({})
