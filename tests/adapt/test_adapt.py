"""adapt_: names, heads, token rows, refusals; what all adapters share is in the contract."""

from typing import Any

import pytest
import torch
from torch import nn

import weft
from weft.adapt import LoRA, TokenRows, Whole, adapters, merge_, switch_, train_only_
from weft.errors import RecipeError
from weft.normalize import WeightStandardization


class Classifier(nn.Module):
    """An embedding, a body, a norm and a composite head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.body = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.body(self.embedding(tokens)).mean(1)))


@pytest.fixture
def model() -> Classifier:
    torch.manual_seed(0)
    return Classifier().eval()


TOKENS = torch.tensor([[1, 2, 19], [3, 3, 4]])


def test_heads_norms_and_rows_train_beside_an_adapter(model: Classifier) -> None:
    before = model(TOKENS)
    report = weft.adapt_(
        model, LoRA(rank=2), where="body", modules_to_save=["head", "norm"], token_rows=[18, 19], name="task"
    )
    torch.testing.assert_close(model(TOKENS), before)
    lora, head, norm, rows = 2 * 16, 8 * 8 + 8 + 8 * 3 + 3, 16, 2 * 8
    assert report.trainable == lora + head + norm + rows
    assert str(report) == (
        f"trainable params: {report.trainable:,} || all params: {report.total:,} || "
        f"trainable%: {100 * report.trainable / report.total:.4f}"
    )
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.train()(TOKENS).square().sum().backward()
    optimizer.step()
    model.eval()
    trained = model(TOKENS)
    assert not torch.allclose(trained, before, atol=1e-3)
    table = model.embedding.weight.detach()
    stored = model.embedding.parametrizations.weight.original
    assert torch.equal(table[:18], stored[:18])
    assert torch.equal(table[18], stored[18])  # its token was not in the batch
    assert not torch.equal(table[19], stored[19])
    switch_(model, ())
    assert torch.equal(model(TOKENS), before)
    switch_(model, "task")
    assert torch.equal(model(TOKENS), trained)
    weft.bake_(model)
    torch.testing.assert_close(model(TOKENS), trained)
    assert type(model.norm) is nn.LayerNorm


def test_what_trains_whole_gets_no_function_that_its_copy_would_hide(model: Classifier) -> None:
    report = weft.adapt_(model, LoRA(rank=2), where="all-linear", modules_to_save="head")
    assert {n: len(fs) for n, fs in weft.functions(model).items() if "weight" in n} == {
        "body.weight": 1, "head.0.weight": 1, "head.2.weight": 1
    }  # fmt: skip
    model.train()(TOKENS).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert report.trainable == 2 * 16 + 8 * 8 + 8 + 8 * 3 + 3
    with pytest.raises(RecipeError, match="are ignored"):
        weft.adapt_(model, LoRA(rank=2), where="head.0", modules_to_save="head", name="b")


def test_a_mapping_chooses_layers_by_itself(model: Classifier) -> None:
    report = weft.adapt_(model, {"embedding": LoRA(rank=1), "all-linear": LoRA(rank=2)}, ignore="head.*")
    assert {n: c.rank for n, c in report.touched.items()} == {"embedding.weight": 1, "body.weight": 2}


def test_two_heads_for_two_tasks(model: Classifier) -> None:
    for name in ("first", "second"):
        weft.adapt_(model, {"body": LoRA(rank=1), "head.2": Whole()}, where="*", name=name)
        with torch.no_grad():
            model.head[2].parametrizations.weight[-1].value.normal_()
    switch_(model, "first")
    first = model(TOKENS)
    switch_(model, "second")
    assert not torch.allclose(model(TOKENS), first)
    switch_(model, "first")
    assert torch.equal(model(TOKENS), first)
    assert [s.weights for s in adapters(model).values()] == [("body.weight", "head.2.weight")] * 2


def test_what_went_before_is_as_it_was_after_a_refusal(model: Classifier) -> None:
    weft.adapt_(model, LoRA(rank=1), where="body")
    state = {n: p.requires_grad for n, p in model.named_parameters()}
    with pytest.raises(RecipeError, match=r"chooses no module.*head"):
        weft.adapt_(model, LoRA(rank=1), where="body", name="b", modules_to_save="haed")
    with pytest.raises(RecipeError, match="below 20"):
        weft.adapt_(model, LoRA(rank=1), where="body", name="b", token_rows=[20])
    with pytest.raises(RecipeError, match="not an adapter"):
        weft.adapt_(model, WeightStandardization(), where="body", name="b")
    assert {n: p.requires_grad for n, p in model.named_parameters()} == state
    assert list(adapters(model)) == ["default"]
    assert type(model.embedding) is nn.Embedding
    assert len(weft.functions(model)["body.weight"]) == 1


@pytest.mark.parametrize("name", ["", "default", 3, None])
def test_names(model: Classifier, name: Any) -> None:
    weft.adapt_(model, LoRA(rank=1), where="body")
    with pytest.raises(RecipeError, match=r"needs a name, .*got|has an adapter 'default' already"):
        weft.adapt_(model, LoRA(rank=1), where="body", name=name)


def test_token_rows_need_one_input_embedding(model: Classifier) -> None:
    model.second = nn.Embedding(3, 3)
    with pytest.raises(RecipeError, match="has 2 tables"):
        weft.adapt_(model, LoRA(rank=1), where="body", token_rows=[1])
    del model.second
    for wrong in (5, "5", [1.5], [True]):
        with pytest.raises(RecipeError, match=r"token_rows|whole number|finite number"):
            weft.adapt_(model, LoRA(rank=1), where="body", token_rows=wrong)
    weft.adapt_(model, LoRA(rank=1), where="body", token_rows=torch.tensor([3, 1]), name="a")
    assert weft.functions(model)["embedding.weight"][0].config.rows == (3, 1)
    for rows in ((), (1, 1), (20,)):
        with pytest.raises(RecipeError, match="each once"):
            weft.adapt_(model, TokenRows(rows=rows), where="embedding")


def test_an_adapter_attached_to_merged_weights_is_refused(model: Classifier) -> None:
    weft.adapt_(model, LoRA(rank=1), where="body")
    merge_(model)
    with pytest.raises(RecipeError, match="unmerge_"):
        weft.adapt_(model, LoRA(rank=1), where="body", name="b")


def test_removing_walks_over_the_model_a_constant_number_of_times(monkeypatch: pytest.MonkeyPatch) -> None:
    walks = {}
    for count in (4, 32):
        model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(count)))
        weft.adapt_(model, LoRA(rank=1))
        walked = [0]
        with monkeypatch.context() as patch:
            whole = model.named_modules

            def counted(*a: Any, walked: list[int] = walked, whole: Any = whole, **k: Any) -> Any:
                walked[0] += 1
                return whole(*a, **k)

            patch.setattr(model, "named_modules", counted)
            weft.adapt.remove_(model, "default")
        walks[count] = walked[0]
        assert not weft.functions(model)
    assert walks[4] == walks[32]


@pytest.mark.parametrize("strength", [float("nan"), float("inf"), "a", None, True])
def test_strengths_are_finite_numbers(model: Classifier, strength: Any) -> None:
    weft.adapt_(model, LoRA(rank=1), where="body")
    switch_(model, {"default": -0.5})
    with pytest.raises(RecipeError, match=r"strength of 'default' .* finite number, got"):
        switch_(model, {"default": strength})
    assert adapters(model)["default"].strength == -0.5


def test_layers_whose_weight_is_a_vector_are_named(model: Classifier) -> None:
    with pytest.raises(RecipeError, match=r"1 chosen layer has a vector.*norm.*modules_to_save"):
        weft.adapt_(model, LoRA(rank=1), where="norm")


def test_train_only_takes_several(model: Classifier) -> None:
    for name in "abc":
        weft.adapt_(model, LoRA(rank=1), where="body", name=name)
    assert train_only_(model, ["a", "c"]) == 32
    assert [s.trains for s in adapters(model).values()] == [True, False, True]
    with pytest.raises(RecipeError, match="no adapter 'd'"):
        train_only_(model, "d")


def test_rows_of_a_tied_table_are_those_of_the_output_layer() -> None:
    from weft.contract.models import Tied

    model = Tied().eval()
    weft.adapt_(model, TokenRows(rows=(3, 5)), where="embedding")
    with torch.no_grad():
        model.embedding.parametrizations.weight[0].values.add_(1)
    tokens = torch.tensor([5, 1])
    table = model.embedding.weight.detach()
    assert torch.equal(table[3], model.embedding.parametrizations.weight.original[3] + 1)
    torch.testing.assert_close(model(tokens), table[tokens] @ table.T)


def test_a_large_table_is_not_copied_to_look_rows_up(monkeypatch: pytest.MonkeyPatch) -> None:
    table = nn.Embedding(50, 4)
    weft.adapt_(table, {"*": TokenRows(rows=(7,))}, where="*")
    weft.adapt_(table, LoRA(rank=2), where="*", name="b")
    for function in table.parametrizations.weight:
        monkeypatch.setattr(function, "forward", None)
    table(torch.tensor([7, 8])).sum().backward()


def test_pissa_starts_at_the_best_approximation() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(9, 7).double()
    before = layer.weight.detach().clone()
    weft.adapt_(layer, LoRA(rank=3, start="pissa"), where="*")
    function = layer.parametrizations.weight[0]
    u, s, vh = torch.linalg.svd(before)
    best = u[:, :3] * s[:3] @ vh[:3]
    torch.testing.assert_close(function.scale * function.B @ function.A, best)
    torch.testing.assert_close(layer.weight, before)


def test_dropout_acts_in_training_only_and_on_inputs_only() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(8, 8), torch.randn(64, 8)
    weft.adapt_(layer, LoRA(rank=2, dropout=0.5), where="*")
    function = layer.parametrizations.weight[0]
    nn.init.normal_(function.B)
    whole = layer.eval()(x)
    torch.testing.assert_close(whole, nn.functional.linear(x, layer.weight, layer.bias))
    layer.train()
    draws = torch.stack([layer(x) for _ in range(2000)])
    assert (draws[0] != draws[1]).any()
    change = (whole - nn.functional.linear(x, layer.parametrizations.weight.original, layer.bias)).std()
    # a draw is off by about the change itself, the mean of 2000 by 2 % of it; the largest of 512 by a few times that
    assert (draws.mean(0) - whole).abs().max() < 0.2 * change
    with pytest.raises(RecipeError, match="built whole"):
        weft.adapt_(nn.Conv2d(4, 4, 3), LoRA(rank=1, dropout=0.1), where="*")
