"""What every layer of a family promises, whatever it computes."""

from __future__ import annotations

import copy
import inspect
import io
import json
import pickle
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from weft.contract.outcome import adder, answers_typos, outcome
from weft.errors import WeftError
from weft.function.layer import GAINS_AND_SHIFTS, WHITE_NOISE, LayerMethod

FEATURES = 6
CHECKS: dict[str, Callable[[LayerMethod], None]] = {}


def run(method: LayerMethod) -> list[dict[str, Any]]:
    """All checks on one row.

    Returns:
        For each check its name, "passed", "failed" or "expected", and the reason for the latter two.
    """
    why = {"exact gradient in training": method.approximate}
    return [outcome(name, check, method, why.get(name, "")) for name, check in CHECKS.items()]


_check = adder(CHECKS)


def _layer(method: LayerMethod, *, trained: bool = False) -> nn.Module:
    """A layer; with ``trained``, one whose parameters and statistics are those of some steps on."""
    layer = method.build(method.configure(method.trial), FEATURES)
    if trained:
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
        layer.train()
        for _ in range(3):
            layer(_batch(method)).square().sum().backward()
        layer.zero_grad()
    return layer


def _batch(method: LayerMethod, *, dtype: torch.dtype = torch.float32) -> Tensor:
    shape = (5, FEATURES, *[3] * method.space) if method.axis == 1 else (4, 5, FEATURES)
    return torch.randn(shape).mul(1.5).add(0.3).to(dtype)


def _state(layer: nn.Module) -> dict[str, Tensor]:
    return {n: v.clone() for n, v in layer.state_dict().items()}


def _same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(v, second[n]) for n, v in first.items())


@_check("shape and dtype are kept")
def _shape(method: LayerMethod) -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        layer, x = _layer(method).to(dtype), _batch(method, dtype=dtype)
        for training in (True, False):
            y = layer.train(training)(x)
            assert y.shape == x.shape, f"{list(x.shape)} became {list(y.shape)}"
            assert y.dtype == dtype, f"{dtype} became {y.dtype}"


@_check("bfloat16 is near float32")
def _bfloat16(method: LayerMethod) -> None:
    layer = _layer(method, trained=True).eval()
    layer = layer.to(torch.bfloat16)  # the same rounded parameters on both sides
    wide, x = copy.deepcopy(layer).float(), _batch(method, dtype=torch.bfloat16)
    exact = wide(x.float())
    # 8 bits of mantissa: each of a few roundings moves a value by at most 2^-8 of the largest
    limit = 4 * 2**-8 * exact.abs().max()
    error = (layer(x).float() - exact).abs().max()
    assert error <= limit, f"differs by {error:.3g}, more than {limit:.3g}"


@_check("autocast")
def _autocast(method: LayerMethod) -> None:
    layer, x = _layer(method), _batch(method)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    y.float().square().sum().backward()
    assert torch.isfinite(y).all()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in layer.parameters())


@_check("evaluation repeats itself and changes nothing")
def _evaluation(method: LayerMethod) -> None:
    layer, x = _layer(method, trained=True).eval(), _batch(method)
    before = _state(layer)
    assert torch.equal(layer(x), layer(x)), "two passes differ"
    assert _same(before, _state(layer)), "buffers changed"


@_check("samples are independent in evaluation")
def _independent(method: LayerMethod) -> None:
    layer, x = _layer(method, trained=True).double().eval(), _batch(method, dtype=torch.float64)
    whole = layer(x)
    for i in range(len(x)):
        assert torch.allclose(layer(x[i : i + 1]), whole[i : i + 1], rtol=1e-12, atol=1e-12), (
            "a sample depends on others"
        )


@_check("statistics move in training only where the row says so")
def _statistics(method: LayerMethod) -> None:
    layer = _layer(method).train()
    before = _state(layer)
    layer(_batch(method))
    assert _same(before, _state(layer)) != method.keeps_statistics, f"keeps_statistics is {method.keeps_statistics}"


@_check("training differs from evaluation only where the row says so")
def _training(method: LayerMethod) -> None:
    layer, x = _layer(method, trained=True), _batch(method)
    expected = copy.deepcopy(layer).eval()(x)
    same = torch.allclose(layer.train()(x), expected, atol=1e-5)
    assert same != bool(method.training), (
        f"the row says {method.training!r}, the outputs are {'equal' if same else 'not'}"
    )


@_check("state dict round trip")
def _round_trip(method: LayerMethod) -> None:
    layer, x = _layer(method, trained=True), _batch(method)
    other = _layer(method)
    other.load_state_dict(_state(layer))
    for training in (True, False, True):
        assert torch.equal(layer.train(training)(x), other.train(training)(x)), "a loaded layer computes something else"


@_check("copies are independent")
def _copies(method: LayerMethod) -> None:
    layer = _layer(method, trained=True).train()
    other, before = copy.deepcopy(layer), _state(layer)
    other(_batch(method)).square().sum().backward()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1)
    assert _same(before, _state(layer)), "changing a copy changed the original"


@_check("pickle and torch.save")
def _pickle(method: LayerMethod) -> None:
    layer, x = _layer(method, trained=True).eval(), _batch(method)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for other in (pickle.loads(pickle.dumps(layer)), torch.load(file, weights_only=False)):
        assert torch.equal(other(x), layer(x)), "an unpickled layer computes something else"


@_check("exact gradient in evaluation")
def _gradient(method: LayerMethod) -> None:
    _gradcheck(method, training=False)


@_check("exact gradient in training")
def _training_gradient(method: LayerMethod) -> None:
    _gradcheck(method, training=True)


def _gradcheck(method: LayerMethod, *, training: bool) -> None:
    layer = _layer(method, trained=True).double().train(training)
    names = [n for n, _ in layer.named_parameters()]
    buffers = {n: v.clone() for n, v in layer.named_buffers()}
    values = [p.detach().clone().requires_grad_() for p in layer.parameters()]
    x = _batch(method, dtype=torch.float64)[:3].requires_grad_()

    def compute(x: Tensor, *parameters: Tensor) -> Tensor:
        held = {n: v.clone() for n, v in buffers.items()}
        made: Tensor = torch.func.functional_call(layer, {**held, **dict(zip(names, parameters))}, (x,))
        return made

    torch.autograd.gradcheck(compute, (x, *values))


@_check("compiles whole")
def _compile(method: LayerMethod) -> None:
    for training in (True, False):
        plain = _layer(method, trained=True).train(training)
        other = copy.deepcopy(plain)
        torch._dynamo.reset()
        compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
        for _ in range(3):
            x = _batch(method)
            first, second = x.clone().requires_grad_(), x.clone().requires_grad_()
            y, z = plain(first), compiled(second)
            assert torch.allclose(y, z, atol=1e-5), "the compiled layer computes something else"
            y.square().sum().backward()
            z.square().sum().backward()
            assert torch.allclose(first.grad, second.grad, atol=1e-4), "its gradient differs"
        for name, value in other.state_dict().items():
            assert torch.allclose(value, plain.state_dict()[name], atol=1e-5), f"its buffer {name} differs"
    torch._dynamo.reset()


@_check("used twice in one step")
def _twice(method: LayerMethod) -> None:
    layer = _layer(method, trained=True).train()
    x = _batch(method).requires_grad_()
    layer(layer(x)).square().sum().backward()
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()


@_check("zeros are harmless")
def _zeros(method: LayerMethod) -> None:
    layer = _layer(method).train()
    for _ in range(8):
        x = torch.zeros_like(_batch(method)).requires_grad_()
        y = layer(x)
        y.sum().backward()
        assert torch.isfinite(y).all(), "outputs hold NaN or infinity"
        assert torch.isfinite(x.grad).all(), "gradients hold NaN or infinity"
    assert all(torch.isfinite(v).all() for v in layer.state_dict().values()), "buffers hold NaN or infinity"


@_check("starts as the row says")
def _start(method: LayerMethod) -> None:
    if method.starts_as == GAINS_AND_SHIFTS:
        _gains_and_shifts(_layer(method))
    elif method.starts_as == WHITE_NOISE:
        _white_noise(method)
    else:
        assert callable(method.starts_as), f"starts_as is {method.starts_as!r}, which says nothing"
        layer, x = _layer(method).double(), _batch(method, dtype=torch.float64).clamp(-3, 3)
        # eight roundings in float32, in which layers may compute or keep their constants, come on top
        limit = method.start_error + 8 * torch.finfo(torch.float32).eps * x.abs().max()
        for training in (True, False):
            error = (layer.train(training)(x) - method.starts_as(x)).abs().max()
            assert error <= limit, f"differs by {error:.3g} from what it starts as, more than {limit:.3g}"


def _gains_and_shifts(layer: nn.Module) -> None:
    own = {n: p for n, p in layer.named_parameters() if not n.startswith(("block.", "router."))}
    for name, parameter in own.items():
        last = name.rpartition(".")[2]
        assert last in ("weight", "bias"), f"{name} is neither a gain nor a shift"
        assert bool((parameter == (1 if last == "weight" else 0)).all()), f"{name} does not start as the identity"


def _white_noise(method: LayerMethod) -> None:
    ratios = []
    for _ in range(400):
        x = torch.randn_like(torch.cat([_batch(method)] * 8))
        ratios.append(_layer(method)(x).square().mean() / x.square().mean())
    draws = torch.stack(ratios)
    # a wrong law (twice the variance, the other fan) is off by far more than five standard errors
    mean, error = draws.mean(), draws.std() / len(draws) ** 0.5
    assert draws.std() > 0, "all layers start alike"
    assert (mean - method.start_gain).abs() <= 5 * error, (
        f"the mean square is multiplied by {mean:.3g} ± {error:.2g}, the row says {method.start_gain:.3g}"
    )
    assert error <= 0.05 * method.start_gain, f"{len(draws)} draws tell too little: ± {error:.2g}"


@_check("wrong sizes are refused")
def _wrong(method: LayerMethod) -> None:
    x = _batch(method)
    for bad in (x.narrow(method.axis, 0, FEATURES - 1), torch.cat([x, x], dim=method.axis)):
        try:
            _layer(method)(bad)
        except (WeftError, RuntimeError) as error:
            assert str(FEATURES) in str(error), f"the message does not say how many features fit: {error}"
        else:
            raise AssertionError(f"an input of shape {list(bad.shape)} was let through")


@_check("configuration round trip")
def _configuration(method: LayerMethod) -> None:
    config = method.configure({})
    made = type(config)(
        **{k: tuple(v) if isinstance(v, list) else v for k, v in json.loads(json.dumps(asdict(config))).items()}
    )
    assert made == config, "the configuration does not survive JSON"
    for name, value in inspect.signature(method.layer).parameters.items():
        field = method.parameters.get(name)
        if field is not None and name not in method.defaults:
            assert field.default == value.default, f"{name}: {field.default} here, {value.default} in {method.layer}"
    answers_typos(method)


@_check("documented")
def _documented(method: LayerMethod) -> None:
    assert method.summary.endswith("."), "the summary is a sentence"
    assert method.paper or method.origin, "the row says neither its paper nor its origin"
    assert method.training or not method.keeps_statistics, "the row does not say what the statistics are for"
    assert ">>>" in (method.config.__doc__ or ""), "the configuration has no example"
    for key, field in method.parameters.items():
        assert field.help, f"the parameter {key} has no help"
    assert isinstance(_layer(method), method.layer), "the configuration builds another class"
