"""Compacter: sums of Kronecker products, and adapters that come and go without a trace."""

import copy
import io
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import weft
from weft.adapt import (
    Compacter,
    CompacterAdapter,
    LoRA,
    PHMLinear,
    insert_compacter_,
    phm_matrix,
    phm_product,
    remove_compacter_,
)
from weft.errors import RecipeError

WIDTH = 16


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def draws(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize(("n", "rank"), [(1, 1), (2, 1), (4, 1), (4, 3)])
def test_the_matrix_is_the_sum_of_kronecker_products(n: int, rank: int) -> None:
    rule, left, right = draws(n, n, n), draws(n, 12 // n, rank), draws(n, rank, 8 // n)
    expected = sum(torch.kron(rule[i], left[i] @ right[i]) for i in range(n))
    torch.testing.assert_close(phm_matrix(rule, left, right), expected)
    x = draws(3, 5, 12)
    torch.testing.assert_close(phm_product(x, rule, left, right), x @ expected)


def test_gradients_are_those_of_the_built_matrix() -> None:
    values = [v.requires_grad_() for v in (draws(3, 12), draws(4, 4, 4), draws(4, 3, 2), draws(4, 2, 2))]
    x, *factors = values
    upstream = draws(3, 8)
    fast = torch.autograd.grad(phm_product(x, *factors), values, upstream)
    slow = torch.autograd.grad(x @ phm_matrix(*factors), values, upstream)
    for ours, theirs in zip(fast, slow, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_two_products_multiply_complex_numbers() -> None:
    rule = torch.tensor([[[1, 0], [0, 1]], [[0, 1], [-1, 0]]]).double()
    weight = torch.randint(-9, 9, (3, 4)) + 1j * torch.randint(-9, 9, (3, 4))
    x = torch.randint(-9, 9, (5, 3)) + 1j * torch.randint(-9, 9, (5, 3))
    parts = torch.stack([weight.real, weight.imag]).double()
    y = phm_product(torch.cat([x.real, x.imag], -1).double(), rule, torch.eye(3).double().expand(2, 3, 3), parts)
    product = x.to(torch.complex128) @ weight.to(torch.complex128)
    assert torch.equal(y, torch.cat([product.real, product.imag], -1))


def hamilton(p: Tensor, q: Tensor) -> Tensor:
    """(…, 4) times (…, 4)."""
    a, b, c, d = p.unbind(-1)
    e, f, g, h = q.unbind(-1)
    return torch.stack(
        [a * e - b * f - c * g - d * h, a * f + b * e + c * h - d * g,
         a * g - b * h + c * e + d * f, a * h + b * g - c * f + d * e], -1,
    )  # fmt: skip


def test_four_products_multiply_quaternions() -> None:
    units = torch.eye(4).double()
    rule = torch.stack([torch.stack([hamilton(a, i) for a in units]) for i in units])  # the multiplication table
    weight = torch.randint(-9, 9, (3, 2, 4)).double()
    x = torch.randint(-9, 9, (5, 3, 4)).double()
    y = phm_product(x.mT.flatten(1), rule, torch.eye(3).double().expand(4, 3, 3), weight.permute(2, 0, 1))
    expected = hamilton(x.unsqueeze(2), weight).sum(1)  # (5, 2, 4)
    assert torch.equal(y, expected.mT.flatten(1))


@pytest.mark.parametrize(("n", "rank", "bias"), [(4, 1, True), (2, 3, False), (1, 2, True)])
def test_the_number_of_parameters(n: int, rank: int, bias: bool) -> None:
    layer = PHMLinear(24, 8, n=n, rank=rank, bias=bias)
    assert sum(p.numel() for p in layer.parameters()) == n * (24 // n + 8 // n) * rank + 8 * bias + n**3


def test_both_starts() -> None:
    h = torch.randn(64, 384)
    zero = CompacterAdapter(384, init="zero")
    assert torch.equal(zero(h), h)
    zero(h).square().sum().backward()
    assert zero.up.right.grad.any()
    paper = CompacterAdapter(384)
    assert 0 < (paper(h) - h).abs().max() < 1e-3
    assert 0.5e-4 < paper.down.rule.std() < 2e-4
    assert 0.5e-2 < PHMLinear(8, 8).rule.std() < 2e-2
    bound = 2**0.5 * (6 / (384 / 4 + 1)) ** 0.5  # Xavier's of the factor (96, 1)
    assert 0.9 * bound < paper.down.left.abs().max() <= bound
    squares = [PHMLinear(64, 64, rank=2, init="zero")(torch.randn(50, 64)).square().mean() for _ in range(200)]
    mean, error = torch.stack(squares).mean(), torch.stack(squares).std() / 200**0.5
    assert abs(mean - 1) < 5 * error < 0.5


def test_sizes_that_do_not_fit() -> None:
    for features, options in (
        (10, {}),
        (64, {"reduction": 32}),
        (64, {"n": 3, "reduction": 4}),
        (64, {"reduction": 65}),
    ):
        with pytest.raises(RecipeError, match="must divide"):
            CompacterAdapter(features, **options)
    with pytest.raises(RecipeError, match=r"rule must be \[4, 4, 4\]"):
        PHMLinear(8, 8, rule=nn.Parameter(torch.ones(2, 2, 2)))
    with pytest.raises(RecipeError, match="paper"):
        CompacterAdapter(64, init="one")


class Block(nn.Module):
    """A branch whose first layer returns a tuple, as attention does."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = Pair()
        self.dense = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.dense(torch.tanh(self.mix(x)[0])))


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.inner(x), x


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(WIDTH, 3)
        self.checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointing else block(x)
        return self.head(x)


def adapted(config: Compacter | None = None, **options: object) -> Model:
    model = Model()
    insert_compacter_(model, config or Compacter(reduction=4, init="zero"), where="dense", **options)
    moved(model)
    return model


def moved(model: nn.Module) -> None:
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "compacter" in name:
                value.add_(0.3 * torch.randn_like(value))


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(x).square().sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_in_place_shared_and_taken_out_again() -> None:
    model, x = Model(), torch.randn(2, 5, WIDTH)
    before, names = model(x), [n for n, _ in model.named_parameters()]
    report = insert_compacter_(
        model, Compacter(reduction=4, init="zero"), where="dense", also_train=["head", nn.LayerNorm]
    )
    assert report.after == ["blocks.0.dense", "blocks.1.dense"]
    assert torch.equal(model(x), before)
    first, second = (b.dense.compacter for b in model.blocks)
    assert first.down.rule is first.up.rule is second.down.rule is second.up.rule
    assert len([n for n, _ in model.named_parameters() if "rule" in n]) == 1
    ours = 2 * (2 * (WIDTH + 4) + WIDTH + 4) + 4**3  # two adapters of two layers with biases, one rule
    theirs = 2 * 2 * WIDTH + 3 * WIDTH + 3
    assert report.trainable == ours + theirs == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert f"{report.trainable:,}" in str(report)
    gradients(model, x)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    optimizer.step()
    moved(model)
    assert not torch.allclose(model(x), before, atol=1e-2)
    frozen = {n: p for n, p in model.named_parameters() if not p.requires_grad}
    assert {n.split(".")[-2] for n in frozen} == {"inner", "dense"}
    assert remove_compacter_(model) == report.after
    assert remove_compacter_(model) == []
    assert [n for n, _ in model.named_parameters()] == names
    assert not any(m._forward_hooks for m in model.modules())


def test_what_is_removed_leaves_the_outputs_as_they_were() -> None:
    torch.manual_seed(3)
    model, x = Model(), torch.randn(2, WIDTH)
    before = model(x)
    insert_compacter_(model, Compacter(reduction=4), where=["dense", "inner"], shared_rule=False)
    moved(model)
    assert len([n for n, _ in model.named_parameters() if "rule" in n]) == 4
    assert not torch.allclose(model(x), before, atol=1e-3)
    remove_compacter_(model)
    assert torch.equal(model(x), before)


def test_after_a_layer_that_returns_several() -> None:
    pair, x = Pair(), torch.randn(3, WIDTH)
    first, second = pair(x)
    insert_compacter_(pair, Compacter(reduction=4), where=Pair, features=WIDTH)
    moved(pair)
    y, other = pair(x)
    torch.testing.assert_close(y, pair.compacter(first))
    assert other is x
    assert torch.equal(other, second)


def test_copies_pickles_and_state_dicts() -> None:
    model, x = adapted(), torch.randn(2, WIDTH)
    y = model(x)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)):
        assert torch.equal(twin(x), y)
        assert twin.blocks[0].dense.compacter.down.rule is twin.blocks[1].dense.compacter.up.rule
        moved(twin)
        assert torch.equal(model(x), y)
        remove_compacter_(twin)
        assert torch.equal(model(x), y)
    other = adapted()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), y)


def test_written_and_read_with_the_rule_once(tmp_path: Path) -> None:
    model, x = adapted(), torch.randn(2, WIDTH)
    weft.save(model, tmp_path)
    other = adapted()
    with weft.open(tmp_path) as written:
        other.load_state_dict({n: t.torch() for n, t in written.items()}, strict=False)
        assert "blocks.1.dense.compacter.up.left" in written
    assert torch.equal(other(x), model(x))


@pytest.mark.parametrize("training", [True, False])
def test_compiled_whole_and_checkpointed(training: bool) -> None:
    model, x = adapted().train(training), torch.randn(2, WIDTH, requires_grad=True)
    y, expected = model(x), gradients(model, x)
    assert len(expected) == 13  # two adapters of two layers of three, and the rule
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), y)
    for name, value in gradients(compiled, x).items():
        torch.testing.assert_close(value, expected[name.removeprefix("_orig_mod.")])
    model.checkpointing = True
    torch.testing.assert_close(model(x), y)
    torch.testing.assert_close(gradients(model, x), expected)


def test_torchs_own_transformer_runs_them_in_evaluation_too() -> None:
    layer, x = nn.TransformerEncoderLayer(WIDTH, 2, 32, batch_first=True, dropout=0.0).eval(), torch.randn(2, 5, WIDTH)
    with torch.no_grad():  # where torch takes a shortcut around its layers
        before = layer(x)
        insert_compacter_(layer, Compacter(reduction=4), where="linear2")
        moved(layer)
        assert not torch.allclose(layer(x), before, atol=1e-3)


def test_beside_an_adapter_of_weights() -> None:
    model, x = adapted(), torch.randn(2, WIDTH)
    y = model(x)
    weft.parametrize_(model, LoRA(rank=2), where="dense")
    torch.testing.assert_close(model(x), y)
    remove_compacter_(model)
    weft.bake_(model)
    assert type(model.blocks[0].dense) is nn.Linear


def test_refusals_change_nothing() -> None:
    model = Model()
    state = {n: p.requires_grad for n, p in model.named_parameters()}
    config = Compacter(reduction=4)
    for options, message in (
        ({"where": "dens"}, "No module was chosen.*dense"),
        ({"where": ["dense", "head"]}, "must divide the 3 inputs"),
        ({"where": "mix"}, "Pair.*features="),
        ({"where": "blocks"}, "ModuleList"),
        ({"where": "dense", "also_train": "haed"}, "also_train.*head"),
    ):
        with pytest.raises(RecipeError, match=message):
            insert_compacter_(model, config, **options)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == state
    insert_compacter_(model, config, where="dense")
    with pytest.raises(RecipeError, match="has an adapter already"):
        insert_compacter_(model, config, where="dense")
