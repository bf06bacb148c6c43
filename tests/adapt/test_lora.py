"""LoRA: its own mathematics, and PEFT's numbers."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import weft
from weft.adapt import LoRA
from weft.errors import RecipeError

peft = pytest.importorskip("peft")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def function_of(layer: nn.Module, name: str = "weight") -> nn.Module:
    return layer.parametrizations[name][0]


def pair(
    kind: type, *sizes: int, dtype: torch.dtype = torch.float32, rslora: bool = False, **options: object
) -> tuple[nn.Module, nn.Module]:
    """The same layer with weft's function, its factors drawn at random, and with PEFT's."""
    ours, twin = kind(*sizes).to(dtype), kind(*sizes).to(dtype)
    twin.load_state_dict(ours.state_dict())
    weft.parametrize_(ours, LoRA(rank=3, alpha=6.0, rslora=rslora))
    config = peft.LoraConfig(r=3, lora_alpha=6.0, use_rslora=rslora, target_modules=["0"], **options)
    theirs = peft.inject_adapter_in_model(config, nn.Sequential(twin))[0]
    with torch.no_grad():
        for value in (function_of(ours).A, function_of(ours).B):
            value.normal_()
    return ours, theirs


def compare(ours: nn.Module, theirs: nn.Module, x: Tensor, factors: Callable[[], list[Tensor]]) -> None:
    """Equal outputs, gradients and merged weights, once PEFT's factors are those of ``factors``."""
    function = function_of(ours)
    with torch.no_grad():
        for mine, other in zip((function.A, function.B), factors()):
            other.data = other.data.to(mine.dtype)
            other.copy_(mine.reshape(other.shape))
    y, other = ours(x), theirs(x)
    torch.testing.assert_close(y, other)
    assert y.dtype == other.dtype
    upstream = torch.randn_like(y)
    y.backward(upstream)
    other.backward(upstream)
    for mine, other in zip((function.A, function.B), factors()):
        torch.testing.assert_close(mine.grad.reshape(other.shape), other.grad)
    with torch.autocast("cpu", enabled=False):
        theirs.merge()
    torch.testing.assert_close(ours.weight, theirs.get_base_layer().weight)


def linear_factors(theirs: nn.Module) -> Callable[[], list[Tensor]]:
    return lambda: [theirs.lora_A["default"].weight, theirs.lora_B["default"].weight]


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_linear_layers_as_peft(rslora: bool, dtype: torch.dtype) -> None:
    ours, theirs = pair(nn.Linear, 8, 6, dtype=dtype, rslora=rslora)
    assert function_of(ours).A.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    compare(ours, theirs, torch.randn(5, 8, dtype=dtype), linear_factors(theirs))


def test_transposed_layers_of_gpt2_as_peft() -> None:
    from transformers.pytorch_utils import Conv1D

    ours, theirs = pair(Conv1D, 6, 8, dtype=torch.float64, fan_in_fan_out=True)  # 8 inputs, 6 outputs
    compare(ours, theirs, torch.randn(5, 8, dtype=torch.float64), linear_factors(theirs))


def test_convolutions_as_peft() -> None:
    ours, theirs = pair(nn.Conv2d, 4, 6, 3, dtype=torch.float64)
    compare(ours, theirs, torch.randn(2, 4, 5, 5, dtype=torch.float64), linear_factors(theirs))


def test_embeddings_as_peft_with_the_factors_in_each_others_place() -> None:
    ours, theirs = pair(nn.Embedding, 9, 8, dtype=torch.float64)
    function = function_of(ours)
    A, B = theirs.lora_embedding_A["default"], theirs.lora_embedding_B["default"]
    with torch.no_grad():  # PEFT factors the transpose: (dim, rank) (rank, rows)
        A.copy_(function.B.mT)
        B.copy_(function.A.mT)
    tokens = torch.tensor([1, 4, 4])
    y, other = ours(tokens), theirs(tokens)
    torch.testing.assert_close(y, other)
    upstream = torch.randn_like(y)
    y.backward(upstream)
    other.backward(upstream)
    torch.testing.assert_close(function.B.grad, A.grad.mT)
    torch.testing.assert_close(function.A.grad, B.grad.mT)


def test_under_autocast_as_peft() -> None:
    ours, theirs = pair(nn.Linear, 8, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        compare(ours, theirs, torch.randn(5, 8), linear_factors(theirs))
        assert ours(torch.randn(5, 8)).dtype == torch.bfloat16


@pytest.mark.parametrize("shape", [(5, 4), (4, 5), (6, 3, 2, 2)])
@pytest.mark.parametrize("rslora", [False, True])
def test_against_the_equation(shape: tuple[int, ...], rslora: bool) -> None:
    layer = nn.Module()
    layer.kernel_size = 2
    layer.register_parameter("weight", nn.Parameter(torch.randn(shape, dtype=torch.float64)))
    weft.parametrize_(layer, LoRA(rank=2, alpha=5.0, rslora=rslora))
    function, before = function_of(layer), layer.parametrizations.weight.original.detach().numpy()
    nn.init.normal_(function.B)
    scale = 5 / 2**0.5 if rslora else 5 / 2
    change = function.B.detach().numpy() @ function.A.detach().numpy()
    torch.testing.assert_close(layer.weight.detach(), torch.from_numpy(before + scale * change.reshape(shape)))
    flat = (layer.weight - layer.parametrizations.weight.original).flatten(1)
    assert torch.linalg.matrix_rank(flat) == 2


def test_the_start_is_that_of_a_linear_layer() -> None:
    layer = nn.Linear(100, 50)
    before = layer.weight.detach().clone()
    weft.parametrize_(layer, LoRA(rank=40))
    function = function_of(layer)
    assert torch.equal(layer.weight, before)
    assert not function.B.any()
    assert 0.09 < function.A.abs().max() <= 0.1  # uniform within 1 / sqrt(100), 4,000 draws
    torch.testing.assert_close(function.A.std(), torch.tensor(0.1 / 3**0.5), rtol=0.05, atol=0)


def test_only_the_factors_train() -> None:
    layer = nn.Linear(8, 6)
    weft.parametrize_(layer, LoRA(rank=2))
    assert {n for n, p in layer.named_parameters() if p.requires_grad} == {
        "bias",
        "parametrizations.weight.0.A",
        "parametrizations.weight.0.B",
    }
    weft.bake_(layer)
    assert layer.weight.requires_grad


def test_lora_on_lora_is_the_sum() -> None:
    layer = nn.Linear(8, 6).double()
    before = layer.weight.detach().clone()
    for rank in (2, 3):
        weft.parametrize_(layer, LoRA(rank=rank, alpha=float(rank)))
    first, second = layer.parametrizations.weight
    nn.init.normal_(first.B)
    nn.init.normal_(second.B)
    total = before + first.B @ first.A + second.B @ second.A
    torch.testing.assert_close(layer.weight, total)
    x = torch.randn(3, 8, dtype=torch.float64)
    torch.testing.assert_close(layer(x), x @ total.mT + layer.bias)


def test_factors_of_bfloat16_weights_keep_small_steps() -> None:
    for dtype, moves in (("float32", True), ("weight", False)):
        layer = nn.Linear(8, 6).bfloat16()
        weft.parametrize_(layer, LoRA(rank=2, dtype=dtype))
        A = function_of(layer).A
        nn.init.ones_(A)
        with torch.no_grad():
            A += 1e-4
        assert bool((A != 1).all()) is moves


@pytest.mark.parametrize("layer", [nn.Linear(8, 2), nn.Linear(2, 8)])
def test_a_rank_that_no_matrix_of_this_shape_has(layer: nn.Module) -> None:
    with pytest.raises(RecipeError, match=r"^weight: rank 3 is more than a matrix of \[.\, .\] can have"):
        weft.parametrize_(layer, LoRA(rank=3))
