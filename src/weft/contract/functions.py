"""What every weight function promises, whatever it computes: its start, its weight, its state, and that it leaves no trace.

:mod:`weft.contract.surroundings` has what it promises to PyTorch around it, :mod:`weft.contract.adapters` what adapters add.
"""

from __future__ import annotations

import copy
import io
import json
import pickle
import tempfile
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from weft.checkpoint.open import open_checkpoint
from weft.contract import adapters, surroundings
from weft.contract.comparing import (
    gradients_of,
    near,
    same_gradients,
    same_state,
    state_of,
    trial_input,
    trial_net,
)
from weft.contract.models import (
    Net,
    Other,
    Scaled,
    Shifted,
    Tied,
    attach,
    batches,
    configuration,
    fill,
    layers,
    shake,
    stack_of,
)
from weft.contract.outcome import adder, answers_typos, outcome
from weft.errors import CheckpointError, RecipeError
from weft.function.attach import bake_, functions, parametrize_
from weft.function.classes import Carrier
from weft.function.export import plain_state_dict, save
from weft.function.protocol import FunctionMethod

CHECKS: dict[str, Callable[[FunctionMethod], None]] = {}

# What a method cannot promise, with the reason. Kept here so that nobody can skip a check silently.
EXPECTED: dict[str, dict[str, str]] = {
    "training, acting and merging are independent": {
        "whole": "the copy on top takes the place of what is beneath it, which then gets no gradient"
    },
    "meta device": {"eva": "it starts from what the layers are fed, and a model without numbers feeds them nothing"},
}

_check = adder(CHECKS)


def run(method: FunctionMethod) -> list[dict[str, Any]]:
    """All checks on one row.

    Returns:
        For each check its name, "passed", "failed" or "expected", and the reason for the latter two.
    """
    checks = CHECKS | surroundings.CHECKS | (adapters.CHECKS if method.adapter else {})
    results = [outcome(name, check, method, _expected(name, method)) for name, check in checks.items()]
    ways, reason = surroundings.EXPECTED_WAYS.get(method.name, ((), ""))
    for result in results:
        if ways and result["check"] == "distributed training" and result["outcome"] == "passed":
            result |= {"outcome": "expected", "reason": f"{', '.join(ways)}: {reason}"}
    return results


def _expected(name: str, method: FunctionMethod) -> str:
    return EXPECTED.get(name, {}).get(method.name, "") or (method.approximate if name == "gradients" else "")


def _fitting(method: FunctionMethod, dtype: torch.dtype = torch.float32) -> list[tuple[str, nn.Module, Tensor, Tensor]]:
    """(layout, layer with the function, input, weight before) for each layout that the function takes."""
    made = []
    for layout, (layer, x) in layers().items():
        layer, x = layer.to(dtype), x.to(dtype) if x.is_floating_point() else x
        before = layer.weight.detach().clone()
        try:
            attach(method, layer, moved=False)
        except RecipeError as error:
            assert layout != "linear", f"a linear layer is refused: {error}"
            assert not isinstance(layer, Carrier), f"{layout}: refused, and changed"
            continue
        made.append((layout, layer, x, before))
    return made


@_check("shape, dtype and device")
def _shape(method: FunctionMethod) -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        for layout, layer, _, before in _fitting(method, dtype):
            for training in (True, False):
                weight = layer.train(training).weight
                kept = (weight.shape, weight.dtype, weight.device) == (before.shape, before.dtype, before.device)
                assert kept, f"{layout}, {dtype}: {list(before.shape)} became {list(weight.shape)}, {weight.dtype}"
                assert weight.isfinite().all(), f"{layout}, {dtype}: NaN or infinity"
            scalars = [n for n, p in layer.named_parameters() if p.dim() == 0]
            assert not scalars, f"{scalars} has no axes, which sharded training cannot split"


@_check("documented start")
def _start(method: FunctionMethod) -> None:
    assert method.starts_at in ("weight", "transformed"), f"starts_at is {method.starts_at!r}"
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-5), (torch.bfloat16, 2**-6)):
        for layout, layer, _, before in _fitting(method, dtype):
            weight = layer.eval().weight
            if method.starts_at == "weight":
                near(weight, before, f"{layout}, {dtype}", tolerance)
            else:
                assert torch.equal(stack_of(layer).original, before), f"{layout}: the stored tensor changed"
                assert not torch.allclose(weight, before), f"{layout}: the weight is not transformed"


@_check("bake equals forward")
def _bake(method: FunctionMethod) -> None:
    for layout, layer, x, _ in _fitting(method, torch.float64):
        shake(layer)
        base = type(layer).weft_base
        layer.eval()
        weight, y = layer.weight.detach().clone(), layer(x).detach()
        assert bake_(layer) == ["weight"], f"{layout}: bake_ reports other names"
        assert type(layer) is base, f"{layout}: the class is {type(layer).__name__}"
        assert torch.equal(layer.weight, weight), f"{layout}: another weight"
        near(layer(x), y, layout)


@_check("attach and bake leave no trace")
def _trace(method: FunctionMethod) -> None:
    net, before = Net(), Net()
    net.blocks[0].up.weight.requires_grad_(False)
    attach(method, net, moved=False)
    bake_(net)
    assert functions(net) == {}
    for (path, ours), theirs in zip(net.named_modules(), before.modules()):
        assert type(ours) is type(theirs), f"{path} is a {type(ours).__name__}"
        assert ours.__dict__.keys() == theirs.__dict__.keys(), f"{path} keeps attributes"
        assert not ours._forward_pre_hooks, f"{path} keeps a hook"
    frozen = [n for n, p in net.named_parameters() if not p.requires_grad]
    assert frozen == ["blocks.0.up.weight"], f"frozen now: {frozen}"
    assert [n for n, _ in net.named_parameters()] == [n for n, _ in before.named_parameters()], "names or their order"


@_check("state dict into a fresh model")
def _round_trip(method: FunctionMethod) -> None:
    net, fresh = trial_net(method), Net(torch.float64).eval()
    shake(fresh, seed=5)
    attach(method, fresh, seed=5)
    fresh.load_state_dict(net.state_dict())
    same_state(fresh, net, "after loading")
    assert torch.equal(fresh(trial_input()), net(trial_input())), "the loaded model computes something else"


@_check("copies are whole")
def _copies(method: FunctionMethod) -> None:
    net = trial_net(method)
    before, y = state_of(net), net(trial_input())
    twin = copy.deepcopy(net)
    shake(twin, seed=6)
    baked = copy.deepcopy(net)
    bake_(baked)
    near(baked(trial_input()), y, "the baked copy")
    assert isinstance(net.blocks[0].up, Carrier), "baking a copy took the original's functions"
    assert isinstance(twin.blocks[0].up, Carrier), "baking a copy took another copy's functions"
    assert torch.equal(net(trial_input()), y), "a copy shares tensors with the original"
    assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items())


@_check("pickle")
def _pickle(method: FunctionMethod) -> None:
    net = trial_net(method).train()
    back = pickle.loads(pickle.dumps(net))
    same_state(back, net, "after pickling")
    same_gradients(gradients_of(back, trial_input()), gradients_of(net, trial_input()), "after pickling")
    same_state(back, net, "after pickling and a step")


@_check("torch.save")
def _torch_save(method: FunctionMethod) -> None:
    net = trial_net(method)
    for value, weights_only in ((net, False), (net.state_dict(), True)):
        file = io.BytesIO()
        torch.save(value, file)
        file.seek(0)
        back = torch.load(file, weights_only=weights_only)
        if weights_only:
            assert all(torch.equal(t, back[n]) for n, t in net.state_dict().items())
        else:
            assert torch.equal(back(trial_input()), net(trial_input())), "the loaded model computes something else"


@_check("gradients")
def _gradcheck(method: FunctionMethod) -> None:
    for layout, layer, _, _ in _fitting(method, torch.float64):
        shake(layer)
        stack = stack_of(layer.eval())
        named = {n: p.detach().requires_grad_() for n, p in stack.named_parameters()}

        def weight(*values: Tensor, names: tuple[str, ...] = tuple(named), stack: nn.Module = stack) -> Tensor:
            made: Tensor = functional_call(stack, dict(zip(names, values)), ())
            return made

        assert torch.autograd.gradcheck(weight, tuple(named.values()), fast_mode=True), layout


@_check("training reaches every parameter")
def _reaches(method: FunctionMethod) -> None:
    net = trial_net(method).train()
    gradients = gradients_of(net, trial_input())
    stored = [n for n in gradients if n.endswith(".original")]
    freezes = any(f.freezes for stack in functions(net).values() for f in stack)
    frozen = [n for n, p in net.named_parameters() if not p.requires_grad]
    assert frozen == (stored if freezes else []), f"frozen: {frozen}"
    for name in gradients.keys() - set(frozen):
        assert gradients[name].isfinite().all(), f"{name}: NaN or infinity"
        assert gradients[name].any(), f"{name} gets no gradient"


@_check("product equals the dense path")
def _product(method: FunctionMethod) -> None:
    net = trial_net(method)
    layer, x = net.blocks[0].up, trial_input()
    names = [n for n, _ in layer.named_parameters()]
    for training in (False, True):
        layer.train(training)
        y, dense = layer(x), functional.linear(x, layer.weight, layer.bias)
        near(y, dense, "values")
        fast, slow = (
            torch.autograd.grad(v.square().sum(), [p for p in layer.parameters() if p.requires_grad])
            for v in (y, dense)
        )
        for name, ours, theirs in zip(names, fast, slow):
            near(ours, theirs, f"gradient of {name}")


@_check("evaluation changes nothing")
def _evaluation(method: FunctionMethod) -> None:
    net = trial_net(method)
    before = state_of(net)
    first, second = net(trial_input()), net(trial_input())
    assert torch.equal(first, second), "two evaluations differ"
    assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items()), "evaluation changed the state"


@_check("chains")
def _chains(method: FunctionMethod) -> None:
    kinds: list[tuple[type[Scaled] | type[Shifted] | None, ...]] = [(None, None), (None, Scaled, Scaled)]
    kinds += [(Scaled, None), (None, Scaled), (Shifted, None), (None, Shifted)]
    for order in [*kinds, (Scaled, None, Shifted), (Shifted, None, Scaled)]:
        layer, x = nn.Linear(16, 32).double().eval(), trial_input()
        fill(layer, 0)
        what = " under ".join(kind.__name__ if kind else method.name for kind in order)
        for kind in order:
            before = layer.weight.detach().clone()
            try:
                parametrize_(layer, Other(kind) if kind else configuration(method, layer), data=batches(layer))
            except RecipeError as error:
                assert "other order" in str(error), f"{what}: {error}"
                assert torch.equal(layer.weight, before), f"{what}: refused, and changed"
                break
            if kind is None and method.starts_at == "weight":
                near(layer.weight, before, f"{what}: the start", 1e-9)
            shake(layer)
        weight = layer.weight
        assert len(stack_of(layer)) == len(functions(layer)["weight"])
        near(layer(x), functional.linear(x, weight, layer.bias), what)
        parameters = [p for p in layer.parameters() if p.requires_grad]
        fast, slow = (
            torch.autograd.grad(v.square().sum(), parameters, materialize_grads=True)
            for v in (layer(x), functional.linear(x, weight, layer.bias))
        )
        for ours, theirs in zip(fast, slow):
            near(ours, theirs, f"{what}: gradients")
        y = layer(x)
        bake_(layer)
        assert torch.equal(layer.weight, weight), f"{what}: baking gives another weight"
        near(layer(x), y, f"{what}: baked")


@_check("tied weights")
def _tied(method: FunctionMethod) -> None:
    model, tokens = Tied(), torch.tensor([1, 5])
    report = attach(method, model)
    assert report.tied == {"head.weight": "embedding.weight"}, f"tied: {report.tied}"
    assert stack_of(model.embedding) is stack_of(model.head), "each layer has a function of its own"
    y = model.eval()(tokens)
    assert bake_(model) == ["embedding.weight", "head.weight"]
    assert model.embedding.weight is model.head.weight, "baking unties"
    near(model(tokens), y, "baked", 1e-5)  # float32


@_check("a step of training")
def _step(method: FunctionMethod) -> None:
    net = Net().train()
    attach(method, net, moved=False)
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=1e-3)
    x, target = trial_input(torch.float32), trial_input(torch.float32)[:, :8]
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = functional.mse_loss(net(x), target)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0], f"20 small steps took the loss from {losses[0]:.4g} to {losses[-1]:.4g}"


@_check("export")
def _export(method: FunctionMethod) -> None:
    net = trial_net(method)
    before, y = state_of(net), net(trial_input())
    state = plain_state_dict(net)
    assert not any("parametrizations" in n for n in state), "parts of functions are exported"
    plain = Net(torch.float64).eval()
    plain.load_state_dict(state)
    near(plain(trial_input()), y, "the plain model")
    assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items()), "export changed the model"
    with tempfile.TemporaryDirectory() as folder:
        save(net, folder)
        with open_checkpoint(folder) as written:
            assert written.tensors.keys() == state.keys(), "the file has other names"
            assert all(torch.equal(written[n].torch(), t) for n, t in state.items()), "the file has other values"
    try:
        open_checkpoint(net.state_dict())
    except CheckpointError as error:
        assert "weft.save" in str(error), f"the message has no remedy: {error}"
    else:
        raise AssertionError("a state dict with the parts of functions was opened as a model")


@_check("zeros and constants")
def _zeros(method: FunctionMethod) -> None:
    for value in (0.0, 1.0):
        layer = nn.Linear(16, 8)
        nn.init.constant_(layer.weight, value)
        try:
            attach(method, layer, moved=False)
        except RecipeError:
            continue
        assert layer.weight.isfinite().all(), f"NaN or infinity for a weight of {value:g}"
        layer(torch.randn(2, 16)).square().sum().backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in layer.parameters()), f"gradients at {value:g}"


@_check("configuration round trip")
def _configuration(method: FunctionMethod) -> None:
    config = configuration(method)
    back = json.loads(json.dumps(asdict(config)))
    tuples = {k: tuple(v) if isinstance(v, list) else v for k, v in back.items()}
    assert type(config)(**tuples) == config, "the configuration does not survive JSON"
    assert hash(config) == hash(replace(config)), "the configuration is not hashable"


@_check("typos are answered")
def _typo(method: FunctionMethod) -> None:
    answers_typos(method)


@_check("documented")
def _documented(method: FunctionMethod) -> None:
    assert method.summary.endswith("."), "the summary is a sentence"
    assert method.paper or method.origin, "the row says neither its paper nor its origin"
    text = method.config.__doc__ or ""
    for part in ("Source", ">>>"):
        assert part in text, f"the docstring of {method.config.__name__} lacks {part}"
    for key, parameter in method.parameters.items():
        assert parameter.help, f"the parameter {key} has no help"
