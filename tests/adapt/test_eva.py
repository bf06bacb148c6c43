"""EVA: its starts and ranks, against a decomposition of all inputs, and PEFT's numbers."""

from collections import UserDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import weft
from weft.adapt import EVA, LoRA, redistribute_ranks
from weft.errors import RecipeError

WIDTH = 12


class Attention(nn.Module):
    """q and k read one tensor; the layer below another; a table and a convolution beside."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(WIDTH, WIDTH)
        self.k = nn.Linear(WIDTH, WIDTH)
        self.out = nn.Linear(WIDTH, 7)
        self.table = nn.Embedding(4, WIDTH)
        self.conv = nn.Conv1d(WIDTH, WIDTH, 1)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        return self.out(self.drop(torch.tanh(self.q(x)) * self.k(x)))


@pytest.fixture
def model() -> Attention:
    torch.manual_seed(0)
    return Attention().double().train()


def batches(count: int = 4, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    falling = 0.6 ** torch.arange(WIDTH, dtype=torch.float64)
    return [torch.randn(16, 10, WIDTH, generator=generator, dtype=torch.float64) * falling + 1 for _ in range(count)]


def factors(model: nn.Module) -> dict[str, Tensor]:
    return {n.removesuffix(".weight"): fs[0].A.detach() for n, fs in weft.functions(model).items()}


def directions(x: Tensor, rank: int, *, center: bool = True) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    return torch.linalg.svd(rows - rows.mean(0) if center else rows, full_matrices=False).Vh[:rank]


def projection(A: Tensor) -> Tensor:
    return A.mT @ A


@pytest.mark.parametrize("center", [True, False])
def test_starts_at_the_principal_components_and_changes_nothing(model: Attention, center: bool) -> None:
    data = batches()
    before = model.eval()(data[0])
    weft.adapt_(model.train(), EVA(rank=3, rho=1, center=center), where=["q", "k", "out"], data=data[:1])
    assert model.training
    assert model.drop.training
    torch.testing.assert_close(model.eval()(data[0]), before)  # the bias is added in another place
    inner = torch.tanh(model.q(data[0])) * model.k(data[0])
    for name, A in factors(model).items():
        expected = directions(inner.detach() if name == "out" else data[0], 3, center=center)
        torch.testing.assert_close(projection(A), projection(expected))
        torch.testing.assert_close(A @ A.mT, torch.eye(3, dtype=torch.float64))
    q, k = (weft.functions(model)[f"{n}.weight"][0] for n in "qk")
    assert torch.equal(q.A, k.A)
    assert q.A.data_ptr() != k.A.data_ptr()


def test_no_other_start_of_orthonormal_rows_captures_more(model: Attention) -> None:
    x = batches(1)[0]
    weft.adapt_(model, EVA(rank=3, rho=1), where="q", data=[x])
    centred = (x - x.mean((0, 1))).reshape(-1, WIDTH)
    captured = (centred @ factors(model)["q"].mT).square().sum()
    for _ in range(100):
        other = torch.linalg.qr(torch.randn(WIDTH, 3, dtype=torch.float64)).Q
        assert (centred @ other).square().sum() < captured


def test_ranks_go_to_the_largest_shares_of_variance_and_sum_to_the_budget(model: Attention) -> None:
    data = batches(1)
    nn.init.normal_(model.q.weight, std=9.0)  # a saturated tanh spreads variance over many directions
    report = weft.adapt_(model, EVA(rank=4, rho=2), where=["q", "k", "out"], data=data)
    with weft.adapt.switched(model):
        inner = (torch.tanh(model.eval().q(data[0])) * model.k(data[0])).detach()
    shares = {}
    for name, x in {"q": data[0], "k": data[0], "out": inner}.items():
        rows = x.reshape(-1, WIDTH)
        values = torch.linalg.svdvals(rows - rows.mean(0)).square()
        shares[name] = (values / values.sum())[:8]
    chosen = torch.cat(list(shares.values())).sort(descending=True).values[:12].min()
    ranks = {n: len(A) for n, A in factors(model).items()}
    assert sum(ranks.values()) == 12
    assert ranks["q"] == ranks["k"] < 4 < ranks["out"]
    for name, rank in ranks.items():
        assert (shares[name][:rank] >= chosen * (1 - 1e-9)).all()
    # the scale is that of the rank asked for
    assert {round(fs[0].scale, 9) for fs in weft.functions(model).values()} == {16 / 4}
    assert report.trainable == sum(
        r * sum(getattr(model, n).parametrizations.weight.original.shape) for n, r in ranks.items()
    )


def test_a_layer_whose_share_is_none_gets_no_adapter() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"sharp": nn.Linear(8, 8), "flat": nn.Linear(8, 8)})
    noise = torch.randn(400, 8)
    spiky = torch.zeros(400, 8)
    spiky[:, :2] = noise[:, :2]

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = model

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.layers["sharp"](x) + self.layers["flat"](y)

    both = Both()
    report = weft.adapt_(both, EVA(rank=1, rho=2, adjust_alpha=False, alpha=6.0), data=[(spiky, noise)])
    assert {n: len(A) for n, A in factors(both).items()} == {"layers.sharp": 2}
    assert report.untouched == ["layers.flat.weight"]
    assert weft.functions(both)["layers.sharp.weight"][0].scale == 3
    assert not any(p.requires_grad for p in model["flat"].parameters())


def test_rho_of_one_is_uniform(model: Attention) -> None:
    weft.adapt_(model, EVA(rank=4, rho=1), where=["q", "k", "out"], data=batches())
    assert [len(A) for A in factors(model).values()] == [4, 4, 4]


def test_whitened_once_where_layers_share_inputs(model: Attention) -> None:
    data = batches(1)
    weft.adapt_(model, EVA(rank=3, rho=1, whiten=True), where=["q", "k"], data=data)
    rows = data[0].reshape(-1, WIDTH)
    values = torch.linalg.svdvals(rows - rows.mean(0))[:3]
    for A in factors(model).values():
        torch.testing.assert_close(A.norm(dim=1), values.rsqrt())


@pytest.mark.parametrize("kind", [dict, UserDict, tuple, list])
def test_padding_and_unlabelled_tokens_do_not_count(kind: Any) -> None:
    x = batches(1)[0]
    attention = torch.ones(16, 10, dtype=torch.long)
    attention[:, 7:] = 0
    labels = torch.zeros(16, 10, dtype=torch.long)
    labels[:, :2] = -100
    spoiled = x.clone()
    spoiled[:, 7:] = 1e3
    spoiled[:, :2] *= torch.linspace(9, 1, WIDTH).flip(0)
    found = {}
    for label_mask in (True, False):
        torch.manual_seed(0)
        model = Attention().double()
        batch = {"x": spoiled, "attention_mask": attention, "labels": labels}
        data = kind(batch) if issubclass(kind, dict | UserDict) else kind(batch.values())
        weft.adapt_(model, EVA(rank=2, rho=1, label_mask=label_mask), where="q", data=[data])
        found[label_mask] = projection(factors(model)["q"])
    if issubclass(kind, dict | UserDict):
        torch.testing.assert_close(found[True], projection(directions(x[:, 2:7], 2)))
        torch.testing.assert_close(found[False], projection(directions(spoiled[:, :7], 2)))
    else:
        torch.testing.assert_close(found[True], projection(directions(spoiled, 2)))


def test_it_stops_when_directions_stand_still(model: Attention) -> None:
    used = []

    def stream() -> Any:
        for batch in batches(50):
            used.append(1)
            yield batch

    weft.adapt_(model, EVA(rank=2), where=["q", "k"], data=stream())
    assert 2 <= len(used) < 20
    with pytest.warns(UserWarning, match="after 3 batches"):
        weft.adapt_(model, EVA(rank=2, tolerance=1.0, max_batches=3), where="out", name="b", data=batches(5))


def test_directions_of_equal_variance_stand_still() -> None:
    model, used = nn.Linear(6, 6), []

    def stream() -> Any:
        generator = torch.Generator().manual_seed(0)
        scale = torch.tensor([5, 5, 5, 1, 1, 1.0])  # the first three turn among themselves for ever
        for _ in range(60):
            used.append(1)
            yield torch.randn(20, 6, generator=generator) * scale

    weft.adapt_(model, EVA(rank=3, rho=1), where="*", data=stream())
    assert len(used) < 10


def test_a_tied_table_starts_from_the_inputs_of_the_output_layer() -> None:
    from weft.contract.models import Tied

    model = Tied().double()
    tokens = torch.randint(0, 16, (100,))
    weft.adapt_(model, EVA(rank=2, rho=1), where=["embedding", "head"], data=[tokens])
    A = weft.functions(model)["head.weight"][0].A.detach()
    torch.testing.assert_close(projection(A), projection(directions(model.embedding(tokens).detach(), 2)))


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_as_peft(kind: str) -> None:
    peft = pytest.importorskip("peft")
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    made = nn.Linear if kind == "linear" else lambda i, o: Conv1D(o, i)

    class Layers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = made(WIDTH, 16), made(16, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(torch.tanh(self.first(x)))

    ours = Layers()
    theirs = Layers()
    theirs.load_state_dict(ours.state_dict())
    data = [b.float().flatten(0, 1) for b in batches(8)]
    weft.adapt_(ours, EVA(rank=3, rho=2, tolerance=1.0, alpha=6.0), where="*", data=data)
    wrapped = peft.PeftModel(
        theirs,
        peft.LoraConfig(
            r=3, lora_alpha=6, target_modules=["first", "second"], init_lora_weights="eva", fan_in_fan_out=kind == "conv1d",
            eva_config=peft.EvaConfig(rho=2, tau=0.999, use_label_mask=False),
        ),
    )  # fmt: skip
    peft.initialize_lora_eva_weights(
        wrapped,
        data * 4,
        forward_fn=lambda model, batch: model(batch),
        prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=None,
        show_progress_bar=False,
    )
    for name, mine in factors(ours).items():
        layer = getattr(wrapped.base_model.model, name)
        other = layer.lora_A["default"].weight.detach()
        assert mine.shape == other.shape
        assert weft.functions(ours)[f"{name}.weight"][0].scale == pytest.approx(layer.scaling["default"])
        # theirs are of half the data or less, by random decompositions in float32
        assert torch.linalg.svdvals(mine @ other.mT).min() > 0.99


def test_it_is_lora_in_all_but_its_start(model: Attention) -> None:
    weft.adapt_(model, EVA(rank=2, rho=1), where="q", data=batches())
    function = weft.functions(model)["q.weight"][0]
    plain = nn.Linear(WIDTH, WIDTH).double()
    weft.parametrize_(plain, LoRA(rank=2))
    assert type(function) is type(plain.parametrizations.weight[0])
    nn.init.normal_(function.B)
    A, B = function.to_lora()
    change = model.q.weight - model.q.parametrizations.weight.original
    torch.testing.assert_close(B @ A, change)


def test_redistribution() -> None:
    ratios = {"a": torch.tensor([0.5, 0.25, 0.01]), "b": [0.3, 0.25, 0.2], "c": [0.001] * 3}
    for budget in range(7):
        ranks = redistribute_ranks(ratios, budget, 2)
        assert sum(ranks.values()) == budget
        assert max(ranks.values()) <= 2
    assert redistribute_ranks(ratios, 3, 3) == {"a": 2, "b": 1, "c": 0}  # a and b tie for the last
    assert redistribute_ranks(ratios, 5, {"a": 3, "b": 2, "c": 3}) == {"a": 3, "b": 2, "c": 0}
    assert redistribute_ranks({}, 0, 3) == {}
    with pytest.raises(RecipeError, match=r"budget of 7 .* of 6"):
        redistribute_ranks(ratios, 7, 2)
    with pytest.raises(RecipeError, match="NaN"):
        redistribute_ranks({"a": [float("nan")]}, 1, 1)


def test_refusals_say_what_to_do(model: Attention) -> None:
    few = [torch.randn(1, 5, WIDTH, dtype=torch.float64)]
    state = {n: p.requires_grad for n, p in model.named_parameters()}
    for config, where, data, message in (
        (EVA(), "q", None, "data is missing.*data=batches"),
        (EVA(), "q", [], "no batch"),
        (EVA(), "q", ["a text"], r"a str is no batch.*tokenizer"),
        (EVA(), "q", [["a", "text"]], r"a str is no batch.*tokenizer"),
        (EVA(), "q", "a text", r"a str is no batch.*tokenizer"),
        (EVA(), "q", 5, "data is a int, not batches"),
        (EVA(rank=3), "q", few, "5 tokens.*7 or more"),
        (EVA(rank=13), "q", few, r"^q.weight: rank 13 is more than"),
        (EVA(rank=2), "table", few, r"table.weight .*Embedding.*all-linear"),
        (EVA(rank=2), "conv", few, r"conv.weight .*Conv1d is no linear layer"),
        (EVA(rank=2), "q", [torch.full((1, 9, WIDTH), torch.nan, dtype=torch.float64)], r"q.weight.*NaN"),
        (EVA(rank=2, rho=1, whiten=True), "q", [torch.ones(1, 9, WIDTH, dtype=torch.float64)], "cannot be whitened"),
    ):
        with pytest.raises(RecipeError, match=message):
            weft.adapt_(model, config, where=where, data=data)
    model.idle = nn.Linear(3, 3)
    with pytest.raises(RecipeError, match=r"idle.weight saw no inputs"):
        weft.adapt_(model, EVA(rank=2), where=["q", "idle"], data=batches())
    del model.idle
    assert {n: p.requires_grad for n, p in model.named_parameters()} == state
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert model.training
    with pytest.raises(RecipeError, match="meta device"):
        weft.adapt_(nn.Linear(3, 3, device="meta"), EVA(rank=1), where="*", data=few)
    with pytest.raises(RecipeError, match="whole model"):
        EVA().build(torch.ones(3, 3), batched=False)


@pytest.mark.parametrize(("bad", "reason"), [(16, "id 16.*has 16 rows, of the ids 0 to 15"), (-1, "hold the id -1")])
def test_ids_that_the_model_does_not_have_are_named(bad: int, reason: str) -> None:
    from weft.contract.models import Tied

    model = Tied()
    tokens = torch.randint(0, 16, (40,))
    tokens[7] = bad
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(RecipeError, match=reason):
        weft.adapt_(model, EVA(rank=2, rho=1), where="head", data=[tokens])
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
