"""What every weight function promises, whatever it computes."""

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
from weft.contract import adapters
from weft.contract.models import (
    Block,
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
from weft.contract.pair import HOW, train, train_in_pair
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
# Ways of distributed training that a method cannot offer, with the reason; the others are checked.
EXPECTED_WAYS: dict[str, tuple[tuple[str, ...], str]] = {
    "mixture_of_shards": (
        ("fsdp2 by block", "fsdp2 by layer"),
        "FSDP2 shards a parameter in one unit, and the pool belongs to layers of several; it raises",
    ),
}
# sums of at most 100 products of numbers near 1 in float64, in another order
EXACT = 1e-12


def run(method: FunctionMethod) -> list[dict[str, Any]]:
    """All checks on one row.

    Returns:
        For each check its name, "passed", "failed" or "expected", and the reason for the latter two.
    """
    checks = CHECKS | adapters.CHECKS if method.adapter else CHECKS
    results = [outcome(name, check, method, _expected(name, method)) for name, check in checks.items()]
    ways, reason = EXPECTED_WAYS.get(method.name, ((), ""))
    for result in results:
        if ways and result["check"] == "distributed training" and result["outcome"] == "passed":
            result |= {"outcome": "expected", "reason": f"{', '.join(ways)}: {reason}"}
    return results


def _expected(name: str, method: FunctionMethod) -> str:
    return EXPECTED.get(name, {}).get(method.name, "") or (method.approximate if name == "gradients" else "")


_check = adder(CHECKS)


def _net(method: FunctionMethod, dtype: torch.dtype = torch.float64) -> Net:
    """A model with the row's functions, some steps on, in evaluation."""
    net = Net(dtype).eval()
    attach(method, net)
    return net


def _x(dtype: torch.dtype = torch.float64, rows: int = 6) -> Tensor:
    return torch.randn(rows, 16, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(dtype)


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {n: t.detach().clone() for n, t in model.state_dict().items()}


def _near(first: Tensor, second: Tensor, what: str, tolerance: float = EXACT) -> None:
    assert first.shape == second.shape, f"{what}: {list(first.shape)} and {list(second.shape)}"
    if first.numel() == 0:
        return
    error = float((first - second).detach().abs().max())
    limit = tolerance * max(1.0, float(second.detach().abs().max()))
    assert error <= limit, f"{what}: differs by {error:.3g}, more than {limit:.3g}"


def _same_state(first: nn.Module, second: nn.Module, what: str, tolerance: float = 0.0) -> None:
    ours, theirs = _state(first), _state(second)
    assert ours.keys() == theirs.keys(), f"{what}: other names: {sorted(ours.keys() ^ theirs.keys())[:3]}"
    for name, value in ours.items():
        _near(value.double(), theirs[name].double(), f"{what}: {name}", tolerance)


def _gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Gradients of a sum of squares; zeros where there are none."""
    model.zero_grad()
    model(x).square().sum().backward()
    return {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}


def _same_gradients(first: dict[str, Tensor], second: dict[str, Tensor], what: str, tolerance: float = EXACT) -> None:
    assert first.keys() == second.keys(), f"{what}: other parameters"
    for name, value in first.items():
        _near(value, second[name], f"{what}: gradient of {name}", tolerance)


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
                _near(weight, before, f"{layout}, {dtype}", tolerance)
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
        _near(layer(x), y, layout)


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
    net, fresh = _net(method), Net(torch.float64).eval()
    shake(fresh, seed=5)
    attach(method, fresh, seed=5)
    fresh.load_state_dict(net.state_dict())
    _same_state(fresh, net, "after loading")
    assert torch.equal(fresh(_x()), net(_x())), "the loaded model computes something else"


@_check("copies are whole")
def _copies(method: FunctionMethod) -> None:
    net = _net(method)
    before, y = _state(net), net(_x())
    twin = copy.deepcopy(net)
    shake(twin, seed=6)
    baked = copy.deepcopy(net)
    bake_(baked)
    _near(baked(_x()), y, "the baked copy")
    assert isinstance(net.blocks[0].up, Carrier), "baking a copy took the original's functions"
    assert isinstance(twin.blocks[0].up, Carrier), "baking a copy took another copy's functions"
    assert torch.equal(net(_x()), y), "a copy shares tensors with the original"
    assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items())


@_check("pickle")
def _pickle(method: FunctionMethod) -> None:
    net = _net(method).train()
    back = pickle.loads(pickle.dumps(net))
    _same_state(back, net, "after pickling")
    _same_gradients(_gradients(back, _x()), _gradients(net, _x()), "after pickling")
    _same_state(back, net, "after pickling and a step")


@_check("torch.save")
def _torch_save(method: FunctionMethod) -> None:
    net = _net(method)
    for value, weights_only in ((net, False), (net.state_dict(), True)):
        file = io.BytesIO()
        torch.save(value, file)
        file.seek(0)
        back = torch.load(file, weights_only=weights_only)
        if weights_only:
            assert all(torch.equal(t, back[n]) for n, t in net.state_dict().items())
        else:
            assert torch.equal(back(_x()), net(_x())), "the loaded model computes something else"


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
    net = _net(method).train()
    gradients = _gradients(net, _x())
    stored = [n for n in gradients if n.endswith(".original")]
    freezes = any(f.freezes for stack in functions(net).values() for f in stack)
    frozen = [n for n, p in net.named_parameters() if not p.requires_grad]
    assert frozen == (stored if freezes else []), f"frozen: {frozen}"
    for name in gradients.keys() - set(frozen):
        assert gradients[name].isfinite().all(), f"{name}: NaN or infinity"
        assert gradients[name].any(), f"{name} gets no gradient"


@_check("product equals the dense path")
def _product(method: FunctionMethod) -> None:
    net = _net(method)
    layer, x = net.blocks[0].up, _x()
    names = [n for n, _ in layer.named_parameters()]
    for training in (False, True):
        layer.train(training)
        y, dense = layer(x), functional.linear(x, layer.weight, layer.bias)
        _near(y, dense, "values")
        fast, slow = (
            torch.autograd.grad(v.square().sum(), [p for p in layer.parameters() if p.requires_grad])
            for v in (y, dense)
        )
        for name, ours, theirs in zip(names, fast, slow):
            _near(ours, theirs, f"gradient of {name}")


@_check("bfloat16")
def _bfloat16(method: FunctionMethod) -> None:
    exact = _net(method, torch.float32)
    for cast in (False, True):  # attached to a bfloat16 model, and cast after attaching
        net = exact if cast else Net().bfloat16().eval()
        if not cast:
            attach(method, net, seed=5)
            net.load_state_dict(exact.state_dict())
        net = copy.deepcopy(net).bfloat16()
        # 8 bits of mantissa, in weights, inputs and products of three layers
        _near(net(_x(torch.bfloat16)).float(), exact(_x(torch.float32)), "values", 2**-4)
        net.train()
        gradients = _gradients(net, _x(torch.bfloat16))
        assert all(g.isfinite().all() for g in gradients.values()), "gradients with NaN or infinity"


@_check("autocast")
def _autocast(method: FunctionMethod) -> None:
    net, x = _net(method, torch.float32), _x(torch.float32)
    exact, weight = net(x), net.blocks[0].up.weight
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = net(x)
        assert torch.equal(net.blocks[0].up.weight, weight), "the weight is computed in lower precision"
        net.train()
        net(x).float().square().sum().backward()
    assert y.dtype == torch.bfloat16, f"autocast gave {y.dtype}"
    _near(y.float(), exact, "values", 2**-5)


@_check("compiles whole")
def _compile(method: FunctionMethod) -> None:
    net, twin = _net(method), _net(method)
    for model in (net, twin):
        del model.blocks[1]
    torch._dynamo.reset()
    _near(torch.compile(net, backend="eager", fullgraph=True)(_x()), twin(_x()), "in evaluation")
    torch._dynamo.reset()
    compiled = torch.compile(net.train(), backend="aot_eager", fullgraph=True)
    expected = _gradients(twin.train(), _x())
    compiled(_x()).square().sum().backward()
    ours = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in net.named_parameters()}
    _same_gradients(ours, expected, "in training")
    _same_state(net, twin, "buffers after a step", EXACT)


@_check("equal blocks compile once")
def _regional(method: FunctionMethod) -> None:
    blocks = nn.Sequential(*[Block() for _ in range(12)]).eval()
    fill(blocks, 0)
    attach(method, blocks)
    torch._dynamo.reset()
    graphs = 0

    def count(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return graph.forward

    expected = x = _x(torch.float32)
    for block in blocks:
        x = torch.compile(block, backend=count, fullgraph=True)(x).detach()
        expected = block(expected).detach()
    assert graphs <= 3, f"12 equal blocks made {graphs} graphs"
    _near(x, expected, "values", 1e-6)


@_check("functional_call")
def _functional(method: FunctionMethod) -> None:
    net, moved = _net(method), _net(method)
    shake(moved, seed=7)
    parameters = {n: p.detach().clone().requires_grad_() for n, p in moved.named_parameters()}
    y = functional_call(net, parameters, (_x(),))
    _near(y, moved(_x()), "values")
    y.square().sum().backward()
    trained = {n for n, p in net.named_parameters() if p.requires_grad}
    assert all(parameters[n].grad is not None for n in trained), "a parameter gets no gradient"
    before, y = _state(net), net(_x())
    try:
        functional_call(net, {"blocks.0.up.weight": torch.zeros(32, 16, dtype=torch.float64)}, (_x(),))
    except RecipeError as error:
        assert "parametrizations.weight.original" in str(error), f"the message has no remedy: {error}"
    else:
        raise AssertionError("a value for a computed weight was accepted")
    assert all(torch.equal(t, before[n]) for n, t in _state(net).items()), "the refused call changed the model"
    assert torch.equal(net(_x()), y), "the refused call changed the model"


@_check("setting the weight is refused")
def _setting(method: FunctionMethod) -> None:
    net = _net(method)
    layer, before = net.blocks[0].up, net(_x())
    value = torch.zeros(32, 16, dtype=torch.float64)
    identity = nn.Identity()
    for attempt in (
        lambda: setattr(layer, "weight", value),
        lambda: setattr(layer, "weight", nn.Parameter(value)),
        lambda: nn.utils.parametrize.register_parametrization(layer, "weight", identity),
        lambda: nn.utils.parametrize.remove_parametrizations(layer, "weight"),
        lambda: nn.utils.parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False),
    ):
        try:
            attempt()
        except (RecipeError, AttributeError, RuntimeError):
            assert torch.equal(net(_x()), before), "a refused change changed the model"
        else:
            raise AssertionError("a computed weight was set from outside")


@_check("distributed training")
def _distributed(method: FunctionMethod) -> None:
    alone = train(method)
    for how in [h for h in HOW if h not in EXPECTED_WAYS.get(method.name, ((), ""))[0]]:
        for rank, state in enumerate(train_in_pair(method, how)):
            assert state.keys() == alone.keys(), f"{how}: other names"
            for name, value in state.items():
                _near(value, alone[name], f"{how}, process {rank}: {name}", 1e-9)


@_check("checkpointing")
def _checkpointing(method: FunctionMethod) -> None:
    plain = _net(method).train()
    expected = _gradients(plain, _x())
    for reentrant in (False, True):
        for whole in (False, True):
            net = _net(method).train()
            x = _x().requires_grad_()
            net.zero_grad()
            if whole:
                y = torch.utils.checkpoint.checkpoint(net, x, use_reentrant=reentrant)
            else:
                net.checkpointing = reentrant
                y = net(x)
            y.square().sum().backward()
            ours = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in net.named_parameters()}
            what = f"reentrant: {reentrant}, the whole model: {whole}"
            _same_gradients(ours, expected, what)
            _same_state(net, plain, f"buffers, {what}")


@_check("two forward passes before one backward")
def _twice(method: FunctionMethod) -> None:
    net = _net(method).train()
    (net(_x()).square().sum() + net(-_x()).square().sum()).backward()


@_check("evaluation changes nothing")
def _evaluation(method: FunctionMethod) -> None:
    net = _net(method)
    before = _state(net)
    first, second = net(_x()), net(_x())
    assert torch.equal(first, second), "two evaluations differ"
    assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items()), "evaluation changed the state"


@_check("chains")
def _chains(method: FunctionMethod) -> None:
    kinds: list[tuple[type[Scaled] | type[Shifted] | None, ...]] = [(None, None), (None, Scaled, Scaled)]
    kinds += [(Scaled, None), (None, Scaled), (Shifted, None), (None, Shifted)]
    for order in [*kinds, (Scaled, None, Shifted), (Shifted, None, Scaled)]:
        layer, x = nn.Linear(16, 32).double().eval(), _x()
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
                _near(layer.weight, before, f"{what}: the start", 1e-9)
            shake(layer)
        weight = layer.weight
        assert len(stack_of(layer)) == len(functions(layer)["weight"])
        _near(layer(x), functional.linear(x, weight, layer.bias), what)
        parameters = [p for p in layer.parameters() if p.requires_grad]
        fast, slow = (
            torch.autograd.grad(v.square().sum(), parameters, materialize_grads=True)
            for v in (layer(x), functional.linear(x, weight, layer.bias))
        )
        for ours, theirs in zip(fast, slow):
            _near(ours, theirs, f"{what}: gradients")
        y = layer(x)
        bake_(layer)
        assert torch.equal(layer.weight, weight), f"{what}: baking gives another weight"
        _near(layer(x), y, f"{what}: baked")


@_check("tied weights")
def _tied(method: FunctionMethod) -> None:
    model, tokens = Tied(), torch.tensor([1, 5])
    report = attach(method, model)
    assert report.tied == {"head.weight": "embedding.weight"}, f"tied: {report.tied}"
    assert stack_of(model.embedding) is stack_of(model.head), "each layer has a function of its own"
    y = model.eval()(tokens)
    assert bake_(model) == ["embedding.weight", "head.weight"]
    assert model.embedding.weight is model.head.weight, "baking unties"
    _near(model(tokens), y, "baked", 1e-5)  # float32


@_check("meta device")
def _meta(method: FunctionMethod) -> None:
    net = _net(method, torch.float32)
    with torch.device("meta"):
        built = Net()
    attach(method, built, moved=False, seed=5)
    assert all(t.is_meta for t in built.state_dict().values()), "something was made elsewhere"
    built.load_state_dict(net.state_dict(), assign=True)
    assert torch.equal(built.eval()(_x(torch.float32)), net(_x(torch.float32))), "it computes something else"


@_check("gradients of single samples")
def _vmap(method: FunctionMethod) -> None:
    net, x = _net(method), _x(rows=3)
    parameters = {n: p.detach() for n, p in net.named_parameters()}

    def loss(values: dict[str, Tensor], row: Tensor) -> Tensor:
        total: Tensor = functional_call(net, values, (row.unsqueeze(0),)).square().sum()
        return total

    together = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    for i, row in enumerate(x):
        alone = torch.func.grad(loss)(parameters, row)
        for name, value in alone.items():
            _near(together[name][i], value, name)


@_check("a step of training")
def _step(method: FunctionMethod) -> None:
    net = Net().train()
    attach(method, net, moved=False)
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=1e-3)
    x, target = _x(torch.float32), _x(torch.float32)[:, :8]
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
    net = _net(method)
    before, y = _state(net), net(_x())
    state = plain_state_dict(net)
    assert not any("parametrizations" in n for n in state), "parts of functions are exported"
    plain = Net(torch.float64).eval()
    plain.load_state_dict(state)
    _near(plain(_x()), y, "the plain model")
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
