"""Every weight function and every layer compiled by inductor computes what it computes eagerly: `make nightly`.

The suite compiles with backends that generate no code, which takes seconds; this takes minutes and a C++ compiler.
"""

import pytest
import torch
from torch import Tensor, nn

import weft
from weft.contract import models
from weft.errors import RecipeError
from weft.function import FunctionMethod
from weft.function.layer import LayerMethod
from weft.registry import methods

pytestmark = [  # what inductor and dynamo import and do of what torch itself deprecates
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Torchinductor does not support code generation for complex:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.autograd.function.Function.*instantiated:DeprecationWarning"),
]
FUNCTIONS = {name: row for name, row in methods().items() if isinstance(row, FunctionMethod)}
LAYERS = {name: row for name, row in methods().items() if isinstance(row, LayerMethod)}
FEATURES = 6
# kernels of both kinds sum in their own order: a few units in the last place
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-4}


def near(first: Tensor, second: Tensor, what: str) -> None:
    tolerance = TOLERANCES[second.dtype]
    scale = float(second.detach().abs().max()) if second.numel() else 0.0
    torch.testing.assert_close(first, second, rtol=0, atol=tolerance * (scale + 1), msg=lambda m: f"{what}: {m}")


def same_buffers(first: nn.Module, second: nn.Module) -> None:
    others = dict(second.named_buffers())
    for name, value in first.named_buffers():
        if value.is_floating_point():
            near(value, others[name], name)
        else:
            assert torch.equal(value, others[name]), name


def check(module: nn.Module, twin: nn.Module, x: Tensor, training: bool) -> None:
    """Two passes, each with gradients in training, of a compiled module and of an equal one as it is."""
    torch._dynamo.reset()
    compiled = torch.compile(module.train(training), fullgraph=True)
    twin.train(training)
    for _ in range(2):
        if not training:
            with torch.no_grad():
                near(compiled(x), twin(x), "output")
            continue
        inputs = [x.clone().requires_grad_(x.is_floating_point()) for _ in range(2)]
        outputs = compiled(inputs[0]), twin(inputs[1])
        near(*outputs, "output")
        upstream = torch.linspace(-1, 1, outputs[1].numel(), dtype=outputs[1].dtype).reshape(outputs[1].shape)
        for output in outputs:
            output.backward(upstream)
        if x.is_floating_point():
            near(inputs[0].grad, inputs[1].grad, "gradient of the input")
        expected = dict(twin.named_parameters())
        for name, parameter in module.named_parameters():
            if expected[name].grad is not None:
                near(parameter.grad, expected[name].grad, f"gradient of {name}")
    same_buffers(module, twin)


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)
@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_a_model_with_functions(name: str, dtype: torch.dtype, training: bool) -> None:
    net, twin = models.Net(dtype), models.Net(dtype)
    for model in (net, twin):
        models.attach(FUNCTIONS[name], model)
    x = torch.randn(6, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    check(net, twin, x, training)


@pytest.mark.parametrize("kind", sorted(models.layers()))
@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_a_layer_of_each_layout(name: str, kind: str) -> None:
    torch.manual_seed(0)
    layer, x = models.layers()[kind]
    twin = models.layers()[kind][0]
    for module in (layer, twin):
        try:
            models.attach(FUNCTIONS[name], module)
        except RecipeError:  # not for this layout, as the contract knows; a linear layer is for all
            assert kind != "linear"
            pytest.skip(f"{name} refuses a {kind}")
    check(layer, twin, x, training=True)


@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_after_baking(name: str) -> None:
    net, twin = models.Net(), models.Net()
    for model in (net, twin):
        models.attach(FUNCTIONS[name], model)
    x = torch.randn(6, 16, generator=torch.Generator().manual_seed(0))
    torch._dynamo.reset()
    compiled = torch.compile(net.eval(), fullgraph=True)
    near(compiled(x).detach(), twin.eval()(x).detach(), "before")
    weft.bake_(compiled)
    near(compiled(x).detach(), twin(x).detach(), "after")


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)
@pytest.mark.parametrize("name", sorted(LAYERS))
def test_a_layer(name: str, dtype: torch.dtype, training: bool) -> None:
    row = LAYERS[name]
    torch.manual_seed(0)
    layer, twin = (row.build(row.configure(row.trial), FEATURES).to(dtype) for _ in range(2))
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    twin.load_state_dict(layer.state_dict())
    shape = (5, FEATURES, *[3] * row.space) if row.axis == 1 else (4, 5, FEATURES)
    check(layer, twin, (1.5 * torch.randn(shape) + 0.3).to(dtype), training)
