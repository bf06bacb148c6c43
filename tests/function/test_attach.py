"""Attaching to what models really have, and baking."""

import copy
import pickle
import threading

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import weft
from weft.adapt import LoRA
from weft.errors import RecipeError
from weft.function import WeightFunction
from weft.function.classes import Carrier
from weft.function.layout import Layout, layout_of
from weft.normalize import SigmaReparam, WeightCompander, WeightStandardization


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


class Counted(WeightFunction):
    """Twice the weight; counts forward passes and updates."""

    has_update = True

    def __init__(self, weight: Tensor):
        super().__init__()
        self.built_for = tuple(weight.shape)
        self.value = weight.clone()
        self.calls = 0
        self.register_buffer("updates", torch.zeros(1))

    def forward(self, stored: Tensor) -> Tensor:
        self.calls += 1
        return 2 * stored

    def update(self, stored: Tensor) -> None:
        self.updates += 1


class Count:
    """The configuration of :class:`Counted`."""

    def build(self, weight: Tensor, *, batched: bool) -> WeightFunction:
        function = Counted(weight)
        function.batched = batched
        return function


def counted(layer: nn.Module, name: str = "weight") -> Counted:
    return layer.parametrizations[name][0]


def attached(layer: nn.Module, **options: str) -> Counted:
    """A layer's function, with its calls counted from here on."""
    weft.parametrize_(layer, Count(), **options)
    function = counted(layer, options.get("name", "weight"))
    function.calls = 0
    return function


# layouts


@pytest.mark.parametrize(
    ("layer", "seen"),
    [
        (nn.Linear(3, 5), (5, 3)),
        (nn.Embedding(7, 4), (7, 4)),
        (nn.Conv1d(4, 6, 3), (6, 4, 3)),
        (nn.Conv3d(4, 6, (1, 2, 3), groups=2), (6, 2, 1, 2, 3)),
        (nn.ConvTranspose1d(4, 6, 3), (6, 4, 3)),
        (nn.ConvTranspose2d(4, 6, 3, groups=2), (6, 2, 3, 3)),
        (nn.Bilinear(2, 3, 5), (5, 2, 3)),
    ],
)
def test_what_a_function_sees(layer: nn.Module, seen: tuple[int, ...]) -> None:
    assert attached(layer).built_for == seen
    assert counted(layer).batched is False


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_a_transposed_convolution_by_rows_of_outputs(groups: int) -> None:
    """Row o of what a function sees makes output o, and nothing else: scaling it scales that channel."""
    layer = nn.ConvTranspose2d(8, 4, 3, groups=groups, bias=False)
    layout = layout_of(layer, "weight", layer.weight)
    x = torch.randn(1, 8, 5, 5)
    y = layer(x)
    factors = torch.arange(1.0, 5.0)
    with torch.no_grad():
        seen = layout.seen(layer.weight) * factors[:, None, None, None]
        assert torch.equal(layout.stored(layout.seen(layer.weight)), layer.weight)
        layer.weight.copy_(layout.stored(seen))
    torch.testing.assert_close(layer(x), y * factors[:, None, None])


def test_layers_of_ones_own() -> None:
    stack, image = torch.zeros(2, 3, 4), torch.zeros(2, 3, 4, 5)
    layer = nn.Module()
    assert layout_of(layer, "w", stack) == Layout(batched=True)
    assert layout_of(layer, "w", image) == Layout()
    layer.is_transposed = True
    assert layout_of(layer, "w", stack) == Layout(batched=True, transposed=True)
    assert layout_of(layer, "w", stack[0]) == Layout(transposed=True)
    assert layout_of(layer, "w", image) == Layout()
    layer.kernel_size = 5
    assert layout_of(layer, "w", stack) == Layout()


def test_only_weights_are_taken() -> None:
    layer = nn.Module()
    layer.register_parameter("weight", nn.Parameter(torch.zeros(3, 3, dtype=torch.int8), requires_grad=False))
    with pytest.raises(RecipeError, match="0 layers have one"):
        weft.parametrize_(layer, Count())
    layer.register_parameter("weight", None)
    with pytest.raises(RecipeError, match="0 layers have one"):
        weft.parametrize_(layer, Count())
    with pytest.raises(RecipeError, match="weight has no shape yet"):
        weft.parametrize_(nn.LazyLinear(3), Count())


def test_a_buffer_stays_a_buffer() -> None:
    layer = nn.Module()
    layer.register_buffer("table", torch.ones(2, 3))
    weft.parametrize_(layer, Count(), name="table")
    assert torch.equal(layer.table, torch.full((2, 3), 2.0))
    assert list(layer.parameters()) == []
    weft.bake_(layer)
    assert list(layer.state_dict()) == ["table"]
    assert list(layer.parameters()) == []


# whole models of transformers


def test_gpt2_stores_its_matrices_transposed() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=11, n_embd=8, n_layer=1, n_head=2)).eval()
    tokens = torch.tensor([[1, 2, 3]])
    before = model(tokens).logits
    report = weft.parametrize_(model, LoRA(rank=2), where="c_attn")
    assert list(report.touched) == ["transformer.h.0.attn.c_attn.weight"]
    layer = model.transformer.h[0].attn.c_attn
    assert layer.parametrizations.weight[0].B.shape == (24, 2)
    torch.testing.assert_close(model(tokens).logits, before)
    nn.init.normal_(layer.parametrizations.weight[0].B)
    x = torch.randn(2, 3, 8)
    torch.testing.assert_close(layer(x), x @ layer.weight + layer.bias)
    y = model(tokens).logits
    weft.bake_(model)
    assert type(layer) is transformers.pytorch_utils.Conv1D
    torch.testing.assert_close(model(tokens).logits, y)
    assert not torch.allclose(y, before)


def test_standardisation_works_on_outputs_of_gpt2() -> None:
    pytest.importorskip("transformers")
    from transformers.pytorch_utils import Conv1D

    layer = Conv1D(6, 4)  # 4 inputs, 6 outputs
    nn.init.normal_(layer.weight)
    weft.parametrize_(layer, WeightStandardization())
    torch.testing.assert_close(layer.weight.mean(0), torch.zeros(6), atol=1e-6, rtol=0)


def experts_model(kind: str, implementation: str = "eager") -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    if kind == "mixtral":
        config = transformers.MixtralConfig(vocab_size=11, intermediate_size=24, num_local_experts=4, **size)
        made = transformers.MixtralForCausalLM
    elif kind == "qwen3_moe":
        config = transformers.Qwen3MoeConfig(
            vocab_size=11, moe_intermediate_size=24, num_experts=4, num_experts_per_tok=2, head_dim=8, **size
        )
        made = transformers.Qwen3MoeForCausalLM
    else:
        config = transformers.GptOssConfig(vocab_size=11, intermediate_size=24, num_local_experts=4, head_dim=8, **size)
        made = transformers.GptOssForCausalLM
    config._experts_implementation = implementation
    model = made(config).eval()
    with torch.no_grad():
        for value in model.parameters():
            value.copy_(0.3 * torch.randn_like(value))
    return model


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("name", ["gate_up_proj", "down_proj"])
def test_fused_experts(kind: str, name: str) -> None:
    model = experts_model(kind)
    tokens = torch.tensor([[1, 2, 3, 4]])
    before = model(tokens).logits
    experts = model.model.layers[0].mlp.experts
    inputs, outputs = (16, 48) if name == "gate_up_proj" else (24, 16)
    plain = getattr(experts, name).detach().clone()
    assert plain.shape == (4, inputs, outputs) if kind == "gpt_oss" else (4, outputs, inputs)
    report = weft.parametrize_(model, LoRA(rank=2), where="experts", name=name)
    assert list(report.touched) == [f"model.layers.0.mlp.experts.{name}"]
    function = experts.parametrizations[name][0]
    assert function.A.shape == (4, 2, inputs)
    assert function.B.shape == (4, outputs, 2)
    torch.testing.assert_close(model(tokens).logits, before)
    nn.init.normal_(function.B)
    change = torch.stack([8.0 * b @ a for a, b in zip(function.A, function.B)])
    torch.testing.assert_close(getattr(experts, name), plain + (change.mT if kind == "gpt_oss" else change))
    y = model(tokens).logits
    assert not torch.allclose(y, before)
    weft.bake_(model)
    torch.testing.assert_close(model(tokens).logits, y)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm"])
def test_experts_are_computed_once_a_pass(implementation: str) -> None:
    model = experts_model("mixtral", implementation)
    experts = model.model.layers[0].mlp.experts
    function = attached(experts, name="gate_up_proj")
    y = model(torch.arange(8)[None]).logits
    assert function.calls == 1
    assert torch.equal(model(torch.arange(8)[None]).logits, y)
    assert function.calls == 2
    assert torch.equal(experts.gate_up_proj, 2 * experts.parametrizations.gate_up_proj.original)
    assert function.calls == 3  # outside a pass it is computed anew


class ReadsTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 2))
        self.fails = False

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            size = self.weight.norm()
        if self.fails:
            raise ZeroDivisionError
        return x @ self.weight / size + x @ self.weight


def test_a_value_without_gradients_does_not_serve_where_they_are_wanted() -> None:
    layer = ReadsTwice()
    function = attached(layer)
    layer(torch.ones(1, 2)).sum().backward()
    assert function.calls == 2  # one without gradients, one with
    assert layer.parametrizations.weight.original.grad.ne(0).all()
    layer.fails = True
    with pytest.raises(ZeroDivisionError):
        layer(torch.ones(1, 2))
    with torch.no_grad():
        layer.parametrizations.weight.original.zero_()
    assert torch.equal(layer.weight, torch.zeros(2, 2)), "a value of a pass that failed is kept"


def test_layers_that_read_the_weights_of_others() -> None:
    attention = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    x = torch.randn(2, 3, 8)
    weft.parametrize_(attention, LoRA(rank=2), where="out_proj")
    weft.parametrize_(attention, LoRA(rank=2), name="in_proj_weight")
    for stack in (attention.out_proj.parametrizations.weight, attention.parametrizations.in_proj_weight):
        nn.init.normal_(stack[0].B)
    y, _ = attention(x, x, x)
    weft.bake_(attention)
    torch.testing.assert_close(attention(x, x, x)[0], y)


def test_recurrent_layers() -> None:
    layer, x = nn.LSTM(4, 6), torch.randn(5, 2, 4)
    weft.parametrize_(layer, LoRA(rank=2), name="weight_hh_l0")
    nn.init.normal_(layer.parametrizations.weight_hh_l0[0].B)
    y, _ = layer(x)
    y.sum().backward()
    assert layer.parametrizations.weight_hh_l0[0].B.grad.any()
    weft.bake_(layer)
    torch.testing.assert_close(layer(x)[0], y)


class Doubling(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def test_a_layer_with_a_forward_pass_of_its_own_keeps_it() -> None:
    layer, x = Doubling(4, 3), torch.randn(2, 4)
    before = layer(x)
    weft.parametrize_(layer, LoRA(rank=2))
    torch.testing.assert_close(layer(x), before)
    nn.init.normal_(layer.parametrizations.weight[0].B)
    torch.testing.assert_close(layer(x), 2 * functional.linear(x, layer.weight, layer.bias))


# tied weights


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(6, 4), nn.Linear(4, 6, bias=False)
        self.head.weight = self.embed.weight
        self.other = nn.Module()
        self.other.kernel = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.embed(tokens)) @ self.other.kernel


def test_tied_weights_have_one_function_under_any_name() -> None:
    model = Tied()
    report = weft.parametrize_(model, Count(), where="head")
    assert list(report.touched) == ["embed.weight", "head.weight", "other.kernel"]
    assert report.tied == {"embed.weight": "head.weight", "other.kernel": "head.weight"}
    assert report.untouched == []
    function = counted(model.embed)
    assert counted(model.head) is function is counted(model.other, "kernel")
    model.train()(torch.tensor([1]))
    assert function.updates == 1
    assert len(list(model.parameters())) == 1
    assert weft.bake_(model, where="head") == ["embed.weight", "head.weight", "other.kernel"]
    assert model.embed.weight is model.head.weight is model.other.kernel
    assert weft.functions(model) == {}


def test_tied_weights_need_one_configuration() -> None:
    for options in ({"config": Count(), "ignore": "head"}, {"config": {"embed": LoRA(rank=1), "head": LoRA(rank=2)}}):
        model = Tied()
        with pytest.raises(RecipeError, match=r"embed\.weight and head\.weight share one tensor"):
            weft.parametrize_(model, **options)
        assert weft.functions(model) == {}
    report = weft.parametrize_(Tied(), {"embed": LoRA(rank=1), "head": LoRA(rank=1)})
    assert set(report.touched.values()) == {LoRA(rank=1)}


def test_one_layer_under_two_names() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    model.append(model[0])
    assert weft.parametrize_(model, Count()).tied == {"2.weight": "0.weight"}
    assert len(model[0].parametrizations.weight) == 1
    assert weft.bake_(model) == ["0.weight", "2.weight"]
    assert type(model[0]) is nn.Linear


def test_a_second_function_goes_on_the_shared_stack_once() -> None:
    model = Tied()
    weft.parametrize_(model, LoRA(rank=1))
    weft.parametrize_(model, LoRA(rank=2), where="embed")
    assert {n: len(f) for n, f in weft.functions(model).items()} == {
        "embed.weight": 2,
        "head.weight": 2,
        "other.kernel": 2,
    }


# what functions are built from, and where they stand


def test_a_function_on_top_is_built_from_the_weight_and_not_from_what_is_stored() -> None:
    layer = nn.Linear(6, 4)
    weft.parametrize_(layer, Count())
    weft.parametrize_(layer, Count())
    assert torch.equal(layer.parametrizations.weight[1].value, 2 * layer.parametrizations.weight.original)


def test_sigma_on_a_trained_lora_starts_at_the_weight() -> None:
    layer = nn.Linear(6, 4)
    weft.parametrize_(layer, LoRA(rank=2))
    nn.init.normal_(layer.parametrizations.weight[0].B)
    before = layer.weight.detach().clone()
    weft.parametrize_(layer, SigmaReparam())
    torch.testing.assert_close(layer.weight, before)


def test_a_function_with_an_inverse_keeps_the_parameter_and_stores_the_latent() -> None:
    layer = nn.Linear(6, 4)
    parameter, before = layer.weight, layer.weight.detach().clone()
    weft.parametrize_(layer, WeightCompander(expansion=2.0))
    assert layer.parametrizations.weight.original is parameter, "an optimizer made before would lose it"
    assert not torch.allclose(parameter, before)
    torch.testing.assert_close(layer.weight, before)


def test_a_function_with_an_inverse_goes_only_on_what_can_be_inverted() -> None:
    layer = nn.Linear(6, 4)
    weft.parametrize_(layer, WeightCompander())
    before = layer.weight.detach().clone()
    weft.parametrize_(layer, WeightCompander(function="tanh"))
    torch.testing.assert_close(layer.weight, before)
    other = nn.Linear(6, 4)
    weft.parametrize_(other, WeightStandardization())
    with pytest.raises(RecipeError, match="attach them in the other order"):
        weft.parametrize_(other, WeightCompander())
    assert len(other.parametrizations.weight) == 1


def test_the_stored_parameter_is_the_one_that_the_layer_had() -> None:
    layer = nn.Linear(6, 4)
    parameter = layer.weight
    weft.parametrize_(layer, WeightStandardization())
    assert layer.parametrizations.weight.original is parameter


def test_a_function_follows_its_layer_into_evaluation() -> None:
    layer = nn.Linear(6, 4).eval()
    weft.parametrize_(layer, Count())
    assert not counted(layer).training


def test_names_inside_functions_are_no_layers() -> None:
    class Generator(WeightFunction):
        def __init__(self, weight: Tensor):
            super().__init__()
            self.inside = nn.Linear(weight.shape[1], weight.shape[1])

        def forward(self, stored: Tensor) -> Tensor:
            return self.inside(stored)

    class Generate:
        def build(self, weight: Tensor, *, batched: bool) -> WeightFunction:
            return Generator(weight)

    layer = nn.Linear(6, 4)
    weft.parametrize_(layer, Generate())
    report = weft.parametrize_(layer, Count())
    assert list(report.touched) == ["weight"]
    assert report.untouched == []
    assert weft.bake_(layer) == ["weight"]


class Wrong(WeightFunction):
    def __init__(self, change: str):
        super().__init__()
        self.change = change

    def forward(self, stored: Tensor) -> Tensor:
        return stored.double() if self.change == "dtype" else stored[:1]


class MakesWrong:
    def __init__(self, change: str):
        self.change = change

    def build(self, weight: Tensor, *, batched: bool) -> WeightFunction:
        if self.change == "refuses" and weight.shape[0] == 2:
            raise RecipeError("two rows are too few.")
        return Wrong(self.change) if weight.shape[0] == 2 else Counted(weight)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("dtype", r"1\.weight: Wrong turned a weight of shape \[2, 3\], torch.float32 into \[2, 3\], torch.float64"),
        ("shape", r"1\.weight: Wrong turned a weight of shape \[2, 3\], torch.float32 into \[1, 3\]"),
        ("refuses", r"1\.weight: two rows are too few"),
    ],
)
def test_a_function_that_does_not_fit_changes_nothing(change: str, message: str) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    before = {n: id(p) for n, p in model.named_parameters()}
    with pytest.raises(RecipeError, match=message):
        weft.parametrize_(model, MakesWrong(change))
    assert {n: id(p) for n, p in model.named_parameters()} == before
    assert not any(isinstance(m, Carrier) for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LoRA, "configuration is needed"),
        ("lora", "configuration is needed"),
        (LoRA(rank=0), "'rank' must be between 1"),
        (LoRA(rank=2.5), "'rank' must be a whole number"),
        (SigmaReparam(gain="two"), "must be one of spectral, one"),
        ({"*": LoRA(alpha=-1.0)}, "'alpha' must be between 0"),
        ({}, "0 of these are ignored"),
    ],
)
def test_configurations_are_checked(config: object, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        weft.parametrize_(nn.Linear(6, 4), config)


def test_torchs_own_parametrizations_are_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 3), torch.nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)))
    with pytest.raises(RecipeError, match="1 has parametrizations of torch"):
        weft.parametrize_(model, LoRA(rank=1))


# updates


class Layered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def updates(model: nn.Module) -> list[int]:
    return [int(f.updates) for m in model.modules() if isinstance(m, Counted) for f in [m]]


def test_updates_come_once_a_pass_in_training() -> None:
    model = Layered()
    weft.parametrize_(model, Count())
    x = torch.randn(2, 3)
    model(x)
    model(x=x)
    assert updates(model) == [2, 2]
    model.eval()(x)
    assert model.inner[0].weight.isfinite().all()
    assert updates(model) == [2, 2]


def test_updates_of_a_part_and_of_the_whole_do_not_add_up() -> None:
    for order in (("part", "whole"), ("whole", "part")):
        model = Layered()
        for which in order:
            if which == "part":
                weft.parametrize_(model.inner, Count(), where="0")
            else:
                weft.parametrize_(model, Count(), where="inner.1")
        model(torch.randn(2, 3))
        assert updates(model) == [1, 1], order


def test_a_layer_added_later_is_updated_too() -> None:
    model = Layered()
    weft.parametrize_(model, Count())
    model.inner.append(copy.deepcopy(model.inner[1]))
    model(torch.randn(2, 3))
    assert updates(model) == [1, 1, 1]


def test_baking_a_part_ends_its_updates_only() -> None:
    model = Layered()
    weft.parametrize_(model, Count())
    weft.bake_(model.inner, where="0")
    model(torch.randn(2, 3))
    assert updates(model) == [1]
    weft.bake_(model)
    assert not model._forward_pre_hooks
    assert "weft_updates" not in model.__dict__


def test_compiled_models_take_functions_and_update() -> None:
    torch._dynamo.reset()
    model = Layered()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    x = torch.randn(2, 3)
    before = compiled(x)
    weft.parametrize_(compiled, LoRA(rank=2))
    torch.testing.assert_close(compiled(x), before)
    report = weft.parametrize_(compiled, SigmaReparam(), where="inner.0")
    assert list(report.touched) == ["inner.0.weight"]
    assert list(weft.functions(compiled)) == ["inner.0.weight", "inner.1.weight"]
    assert weft.plain_state_dict(compiled).keys() == Layered().state_dict().keys()
    u = model.inner[0].parametrizations.weight[1].u.clone()
    with torch.no_grad():
        model.inner[0].parametrizations.weight.original.add_(torch.eye(3))
    y = compiled(x)
    assert not torch.equal(model.inner[0].parametrizations.weight[1].u, u)
    assert weft.bake_(compiled) == ["inner.0.weight", "inner.1.weight"]
    torch.testing.assert_close(compiled(x), y)


# wrapping


def test_wrapped_models_are_refused() -> None:
    import torch.distributed as dist

    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(Layered())
        with pytest.raises(RecipeError, match="attach functions first, then wrap"):
            weft.parametrize_(model, LoRA(rank=1))
        assert weft.plain_state_dict(model).keys() == Layered().state_dict().keys()
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (1,))
        with pytest.raises(RecipeError, match="attach functions first, then wrap"):
            weft.parametrize_(fully_shard(Layered(), mesh=mesh), LoRA(rank=1))
        model = Layered()
        weft.parametrize_(model, LoRA(rank=1))
        fully_shard(model, mesh=mesh)
        with pytest.raises(RecipeError, match="is sharded and cannot be baked in place"):
            weft.bake_(model)
        assert sorted(weft.plain_state_dict(model)) == sorted(Layered().state_dict())
    finally:
        dist.destroy_process_group()


# baking


def test_baking_a_choice() -> None:
    model = Layered()
    weft.parametrize_(model, LoRA(rank=1))
    assert weft.bake_(model, ignore="inner.1") == ["inner.0.weight"]
    assert list(weft.functions(model)) == ["inner.1.weight"]
    assert weft.bake_(model, where=nn.Conv1d) == []
    assert weft.bake_(model, where="all-linear") == ["inner.1.weight"]
    assert weft.bake_(model) == []


def test_baking_gives_the_value_of_evaluation() -> None:
    class Noisy(WeightFunction):
        def forward(self, stored: Tensor) -> Tensor:
            return stored + torch.randn_like(stored) if self.training else stored

    class Noise:
        def build(self, weight: Tensor, *, batched: bool) -> WeightFunction:
            return Noisy()

    layer = nn.Linear(3, 2).train()
    before = layer.weight.detach().clone()
    weft.parametrize_(layer, Noise())
    assert torch.equal(weft.plain_state_dict(layer)["weight"], before)
    assert layer.parametrizations.weight[0].training, "export changed the mode"
    stored = layer.parametrizations.weight.original
    weft.bake_(layer)
    assert torch.equal(layer.weight, before)
    assert layer.weight.untyped_storage().data_ptr() != stored.untyped_storage().data_ptr()


def test_two_tensors_of_one_layer() -> None:
    attention = nn.MultiheadAttention(8, 2)
    weft.parametrize_(attention, Count(), name="in_proj_weight")
    weft.parametrize_(attention, Count(), where="out_proj")
    assert sorted(weft.functions(attention)) == ["in_proj_weight", "out_proj.weight"]
    layer = nn.LSTM(4, 6)
    weft.parametrize_(layer, Count(), name="weight_ih_l0")
    weft.parametrize_(layer, Count(), name="weight_hh_l0")
    assert type(layer).weft_names == ("weight_hh_l0", "weight_ih_l0")
    assert weft.bake_(layer) == ["weight_ih_l0", "weight_hh_l0"]
    assert type(layer) is nn.LSTM


def test_equal_layers_share_a_class_and_plain_ones_are_let_alone() -> None:
    first, second, plain = nn.Linear(2, 2), nn.Linear(3, 5), nn.Linear(2, 2)
    weft.parametrize_(first, LoRA(rank=1))
    weft.parametrize_(second, WeightStandardization())
    assert type(first) is type(second)
    assert isinstance(first, nn.Linear)
    assert type(plain) is nn.Linear


def test_threads_may_share_a_model() -> None:
    model = experts_model("mixtral")
    weft.parametrize_(model, LoRA(rank=2), where="experts", name="down_proj")
    tokens = torch.arange(8)[None]
    with torch.no_grad():
        expected, results = model(tokens).logits, []
        threads = [threading.Thread(target=lambda: results.append(forward(model, tokens))) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(results) == 4
    assert all(torch.equal(r, expected) for r in results)


@torch.no_grad()
def forward(model: nn.Module, tokens: Tensor) -> Tensor:
    return model(tokens).logits


# what others do to a model


def test_torchs_parametrizations_do_not_get_into_a_class_that_other_layers_share() -> None:
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    for layer in (first, second):
        weft.parametrize_(layer, LoRA(rank=1))
    names, x = list(first.state_dict()), torch.randn(2, 4)
    before = first(x)
    with pytest.raises(RecipeError, match=r"'bias' of a module whose 'weight' weft computes .* weft\.bake_ first"):
        nn.utils.parametrize.register_parametrization(first, "bias", nn.Identity())
    assert list(first.state_dict()) == names
    assert torch.equal(first(x), before)
    assert second.bias is not None


@pytest.mark.parametrize("config", [LoRA(rank=1), WeightCompander(expansion=2.0)])
def test_a_tie_to_a_part_that_was_attached_alone_is_noticed(config: object) -> None:
    model = Tied()
    weft.parametrize_(model.head, WeightStandardization())
    before = model.head.weight.detach().clone()
    with pytest.raises(RecipeError, match=r"embed\.weight is what head\.weight is computed from"):
        weft.parametrize_(model, config, where="embed")
    assert torch.equal(model.head.weight, before)
    assert list(weft.functions(model)) == ["head.weight"]


def test_two_parameters_in_one_memory_are_not_turned_into_latents_twice() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = nn.Parameter(model[0].weight)
    before = model[0].weight.detach().clone()
    for where in ("*", "1"):
        with pytest.raises(RecipeError, match=r"weight and \d\.weight are two parameters in one memory"):
            weft.parametrize_(model, WeightCompander(expansion=2.0), where=where)
    assert torch.equal(model[0].weight, before)
    weft.parametrize_(model, WeightStandardization())  # changes nothing that is stored


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_are_copied_after_a_pass_and_a_cast(kind: type) -> None:
    layer, x = kind(4, 6, num_layers=2), torch.randn(5, 2, 4)
    weft.parametrize_(layer, LoRA(rank=2), name="weight_hh_l0")
    nn.init.normal_(layer.parametrizations.weight_hh_l0[0].B)
    y, _ = layer(x)
    for made in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer.double()).float()):
        torch.testing.assert_close(made(x)[0], y)
        with torch.no_grad():
            made.parametrizations.weight_hh_l0[0].B.zero_()
        assert not torch.allclose(made(x)[0], y), "it goes on with an old value"


def test_a_copy_made_in_a_forward_pass_is_whole() -> None:
    class Copies(ReadsTwice):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            self.made.append(copy.deepcopy(self))
            return y

    layer = Copies()
    layer.made = []
    attached(layer)
    layer(torch.ones(1, 2))
    made = layer.made[0]
    with torch.no_grad():
        made.parametrizations.weight.original.zero_()
    assert torch.equal(made.weight, torch.zeros(2, 2)), "it goes on with the value of the pass"


@pytest.mark.parametrize("config", [LoRA(rank=1), SigmaReparam(), WeightStandardization(), WeightCompander()])
def test_empty_weights_are_refused(config: object) -> None:
    layer = nn.Module()
    for shape in ((0, 4), (4, 0)):
        layer.weight = nn.Parameter(torch.zeros(shape))
        with pytest.raises(RecipeError, match=r"weight of shape \[\d, \d\] has no elements; leave it out"):
            weft.parametrize_(layer, config)


def test_an_optimizer_made_before_does_not_move_what_a_function_freezes() -> None:
    layer = nn.Linear(4, 4)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    layer(torch.ones(1, 4)).sum().backward()
    weft.parametrize_(layer, LoRA(rank=1))
    before = layer.parametrizations.weight.original.clone()
    optimizer.step()  # with the gradients of before, but for the frozen one
    assert torch.equal(layer.parametrizations.weight.original, before)


@pytest.mark.parametrize("config", [LoRA(rank=1), SigmaReparam(), WeightStandardization(), WeightCompander()])
def test_functions_are_made_where_the_weight_is_whatever_the_default_device(config: object) -> None:
    layer = nn.Linear(4, 4)
    with torch.device("meta"):
        weft.parametrize_(layer, config)
    assert layer(torch.ones(1, 4)).isfinite().all()
    with torch.device("meta"):
        built = nn.Linear(4, 4)
    weft.parametrize_(built, config)
    assert all(t.is_meta for t in built.state_dict().values())


def test_embeddings_with_sparse_gradients_are_refused() -> None:
    for layer in (nn.Embedding(6, 4, sparse=True), nn.EmbeddingBag(6, 4, sparse=True)):
        with pytest.raises(RecipeError, match="weight has sparse gradients"):
            weft.parametrize_(layer, LoRA(rank=1))
        layer.sparse = False
        weft.parametrize_(layer, LoRA(rank=1))
