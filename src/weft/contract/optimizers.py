"""What every optimizer of a family promises, whatever it computes: to be one of torch's in all but the step."""

from __future__ import annotations

import copy
import inspect
import io
import json
import pickle
from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from weft.contract.outcome import adder, answers_typos, outcome
from weft.function.optimizer import OptimizerMethod

RATE = 0.05
CHECKS: dict[str, Callable[[OptimizerMethod], None]] = {}


def run(method: OptimizerMethod) -> list[dict[str, Any]]:
    """All checks on one row.

    Returns:
        For each check its name, "passed" or "failed", and the reason for the latter.
    """
    return [outcome(name, check, method) for name, check in CHECKS.items()]


_check = adder(CHECKS)


def _model(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Kernels, matrices of both orientations and vectors."""
    return nn.Sequential(nn.Conv1d(2, 6, 3), nn.Flatten(), nn.Linear(24, 10), nn.Tanh(), nn.Linear(10, 16)).to(dtype)


def _optimizer(method: OptimizerMethod, model: nn.Module, **values: Any) -> Optimizer:
    own = {key: value for key, value in {"lr": RATE, **values}.items() if key in method.parameters}
    return method.build(method.configure({**method.trial, **own}), model)


def _loss(model: nn.Module, *, step: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    dtype = next(model.parameters()).dtype
    x, y = (torch.randn(8, *shape, generator=generator).to(dtype) for shape in ((2, 6), (16,)))
    return nn.functional.mse_loss(model(x).float() if dtype == torch.bfloat16 else model(x), y)


def _steps(model: nn.Module, optimizer: Optimizer, steps: Iterable[int] = range(7)) -> None:
    for step in steps:
        optimizer.zero_grad()
        _loss(model, step=step).backward()
        optimizer.step()


def _values(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def _same(first: Iterable[Tensor], second: Iterable[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def _states(optimizer: Optimizer) -> list[Tensor]:
    found = (v for state in optimizer.state.values() for _, v in sorted(state.items()) if isinstance(v, Tensor))
    return [v for v in found if v.dim()]


@_check("minimises a quadratic")
def _quadratic(method: OptimizerMethod) -> None:
    model = _model()
    targets = [torch.randn_like(p) for p in model.parameters()]

    def loss() -> Tensor:
        return torch.stack([(p - t).square().sum() for p, t in zip(model.parameters(), targets)]).sum()

    optimizer, start = _optimizer(method, model, lr=2 * RATE), loss().item()
    for _ in range(800):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    assert loss().item() < 0.1 * start, f"after 800 steps {loss().item():.3g} of {start:.3g} is left"


@_check("state dict round trip")
def _round_trip(method: OptimizerMethod) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model = _model(dtype)
        optimizer = _optimizer(method, model)
        _steps(model, optimizer)
        file = io.BytesIO()
        torch.save([model.state_dict(), optimizer.state_dict()], file)
        file.seek(0)
        weights, state = torch.load(file, weights_only=True)
        other = _model(dtype)
        other.load_state_dict(weights)
        fresh = _optimizer(method, other, lr=2 * RATE)
        fresh.load_state_dict(state)
        _steps(model, optimizer, range(7, 14))
        _steps(other, fresh, range(7, 14))
        assert _same(_values(model), _values(other)), f"after loading, {dtype} weights go another way"


@_check("pickle and copies")
def _pickle(method: OptimizerMethod) -> None:
    model = _model()
    optimizer = _optimizer(method, model)
    _steps(model, optimizer)
    before = _values(model)
    copies = [pickle.loads(pickle.dumps((model, optimizer))), copy.deepcopy((model, optimizer))]
    for other, its in copies:
        _steps(other, its, range(7, 14))
    assert _same(before, _values(model)), "steps of a copy moved the original"
    _steps(model, optimizer, range(7, 14))
    assert all(_same(_values(model), _values(other)) for other, _ in copies), "a copy goes another way"


@_check("closure")
def _closure(method: OptimizerMethod) -> None:
    model = _model()
    other = copy.deepcopy(model)
    optimizer, its = _optimizer(method, model), _optimizer(method, other)

    def closure() -> Tensor:
        its.zero_grad()
        loss = _loss(other)
        loss.backward()
        return loss

    expected = _loss(model)
    _steps(model, optimizer, [0])
    returned: Any = its.step(closure)
    assert returned is not None, "step(closure) returns no loss"
    assert torch.equal(returned.detach(), expected.detach()), "step(closure) returns another loss"
    assert _same(_values(model), _values(other)), "a step with a closure is another step"


@_check("deterministic, without global randomness")
def _deterministic(method: OptimizerMethod) -> None:
    start, ends = _model(), []
    for seed in (1, 2):
        model = copy.deepcopy(start)
        torch.manual_seed(seed)
        optimizer, random = _optimizer(method, model), torch.random.get_rng_state()
        _steps(model, optimizer)
        assert torch.equal(random, torch.random.get_rng_state()), "a step draws from the global generator"
        ends.append(_values(model))
    assert _same(*ends), "two runs differ"


@_check("groups have their own options")
def _groups(method: OptimizerMethod) -> None:
    model = _model()
    optimizer = _optimizer(method, model)
    added = nn.Parameter(torch.ones(3))
    optimizer.add_param_group({"params": [added], "lr": 0.0})
    for group in optimizer.param_groups[:-1]:
        group["lr"] = 0.0
    added.grad, before = torch.ones(3), _values(model)
    _steps_with(optimizer, model)
    assert torch.equal(added.detach(), torch.ones(3)), "an added group does not keep its own rate"
    assert all(torch.allclose(a, b, rtol=1e-5) for a, b in zip(before, _values(model))), "a rate of 0 moves weights"
    optimizer.param_groups[-1]["lr"] = RATE
    optimizer.step()
    assert not torch.equal(added.detach(), torch.ones(3)), "an added group does not move"


def _steps_with(optimizer: Optimizer, model: nn.Module) -> None:
    _loss(model).backward()
    optimizer.step()


@_check("schedulers work")
def _schedulers(method: OptimizerMethod) -> None:
    model = _model()
    optimizer = _optimizer(method, model)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: float(step < 2))
    moved = []
    for step in range(4):
        before = _values(model)
        _steps(model, optimizer, [step])
        scheduler.step()
        moved.append(max((a - b).abs().max().item() for a, b in zip(before, _values(model))))
    assert min(moved[:2]) > 1e-4, "weights stand still at the full rate"
    assert max(moved[2:]) < 1e-5, "weights move at a scheduled rate of 0"


@_check("weight decay is decoupled")
def _decay(method: OptimizerMethod) -> None:
    if "weight_decay" not in method.parameters:
        return
    model = _model()
    other, still = copy.deepcopy(model), copy.deepcopy(model)
    plain, decayed = _optimizer(method, model, weight_decay=0.0), _optimizer(method, other, weight_decay=0.5)
    _steps(model, plain, [0])
    _steps(other, decayed, [0])
    assert _same(_states(plain), _states(decayed)), "moments hold the decay"
    optimizer = _optimizer(method, still, weight_decay=0.5)
    before = _values(still)
    for parameter in still.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for a, b in zip(before, _values(still)):
        assert torch.allclose(b, a * (1 - RATE * 0.5), rtol=1e-5), (
            "without gradient weights do not shrink by lr · decay"
        )


@_check("parameters without a gradient stay")
def _none(method: OptimizerMethod) -> None:
    model = _model()
    optimizer, before = _optimizer(method, model), _values(model)
    optimizer.step()
    assert _same(before, _values(model)), "a step without any gradient moves weights"
    assert not _states(optimizer), "parameters without a gradient get a state"
    _loss(model).backward()
    model[2].weight.grad = None
    optimizer.step()
    assert torch.equal(model[2].weight.detach(), before[2]), "a weight without a gradient moved"
    assert not torch.equal(model[4].weight.detach(), before[4]), "a weight with a gradient stayed"


@_check("frozen parameters are left out")
def _frozen(method: OptimizerMethod) -> None:
    model = _model()
    model[0].requires_grad_(False)
    model[2].weight.requires_grad_(False)
    optimizer, before = _optimizer(method, model), _values(model)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters() if p.requires_grad}, "groups hold frozen parameters, or not all"
    _steps(model, optimizer)
    after = _values(model)
    assert _same(before[:3], after[:3]), "frozen parameters moved"


@_check("tied parameters are held once")
def _tied(method: OptimizerMethod) -> None:
    model = nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 10))
    model[1].weight = model[0].weight
    held = [id(p) for group in _optimizer(method, model).param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters()), "groups do not hold each parameter once"


@_check("gradients are left as they are")
def _gradients(method: OptimizerMethod) -> None:
    model = _model()
    optimizer = _optimizer(method, model)
    _loss(model).backward()
    before = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    optimizer.step()
    assert _same(before, [p.grad for p in model.parameters() if p.grad is not None]), "a step changes gradients"


@_check("complex parameters and sparse gradients are refused")
def _refused(method: OptimizerMethod) -> None:
    parameter = nn.Parameter(torch.ones(3, dtype=torch.complex64))
    table = nn.Embedding(5, 3, sparse=True)
    table(torch.tensor([1])).sum().backward()
    if parameter.grad is None:
        parameter.grad = torch.ones_like(parameter)
    for given, word in ((parameter, "complex"), (table.weight, "sparse")):
        try:
            method.optimizer([given]).step()
        except (ValueError, RuntimeError) as error:
            assert word in str(error), f"the message does not say {word}: {error}"
        else:
            raise AssertionError(f"{word} was let through")


@_check("float64 and bfloat16")
def _dtypes(method: OptimizerMethod) -> None:
    exact = _model(torch.float64)
    optimizer = _optimizer(method, exact)
    _steps(exact, optimizer)
    assert all(v.dtype == torch.float64 for v in [*_values(exact), *_states(optimizer)]), "float64 is narrowed"
    model = _model(torch.bfloat16)
    wide = copy.deepcopy(model).float()
    before = _values(model)
    for parameter, other in zip(model.parameters(), wide.parameters()):
        parameter.grad = torch.randn_like(parameter)
        other.grad = parameter.grad.float()
    _optimizer(method, model).step()
    _optimizer(method, wide).step()
    for start, rounded, value in zip(before, _values(model), _values(wide)):
        assert rounded.dtype == torch.bfloat16, f"bfloat16 became {rounded.dtype}"
        # one rounding of the weight and a few of the step, 8 bits of mantissa each
        limit = 2**-8 * value.abs() + 4 * 2**-8 * (value - start.float()).abs().max()
        assert bool(((rounded.float() - value).abs() <= limit).all()), "a bfloat16 step is far from the float32 one"


@_check("zero gradients are harmless")
def _zeros(method: OptimizerMethod) -> None:
    model = _model()
    optimizer = _optimizer(method, model, weight_decay=0.0)
    nn.init.zeros_(model[2].weight)
    before = _values(model)
    for _ in range(12):
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    for a, b in zip(before, _values(model)):
        assert torch.allclose(a, b, rtol=1e-5, atol=0), "zero gradients move weights"


@_check("NaN is not hidden")
def _nan(method: OptimizerMethod) -> None:
    model = _model()
    optimizer = _optimizer(method, model)
    for step in range(2):  # at the first step and later
        _loss(model, step=step).backward()
        for index in (2, 4):
            if step == index // 4:
                model[index].weight.grad[1, 1] = torch.nan
        optimizer.step()
        optimizer.zero_grad()
        broken = model[2 if step == 0 else 4].weight
        assert bool(broken[1, 1].isnan()), "a gradient of NaN left its weight as if nothing had happened"
        if step == 0:
            assert bool(model[4].weight.isfinite().all()), "a gradient of NaN broke another parameter"
            nn.init.normal_(model[2].weight)
            optimizer.state.pop(model[2].weight)


@_check("parameters of any shape")
def _shapes(method: OptimizerMethod) -> None:
    parameters = [nn.Parameter(torch.ones(shape)) for shape in ((), (5,), (3, 4), (2, 3, 4), (2, 3, 2, 2), (0, 3))]
    optimizer = method.optimizer(parameters)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for parameter in parameters:
        assert bool((parameter < 1).all()), f"a parameter of shape {list(parameter.shape)} does not go down"


@_check("nothing to train is refused")
def _empty(method: OptimizerMethod) -> None:
    try:
        method.optimizer([])
    except ValueError as error:
        assert str(error), "the message is empty"
    else:
        raise AssertionError("an empty list of parameters was let through")


@_check("autocast")
def _autocast(method: OptimizerMethod) -> None:
    model = _model()
    other = copy.deepcopy(model)
    optimizer, its = _optimizer(method, model), _optimizer(method, other)
    before = _values(model)
    for step in range(3):
        for net, own, inside in ((model, optimizer, False), (other, its, True)):
            own.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = _loss(net, step=step)
            loss.backward()
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=inside):
                own.step()
    assert _same(_values(model), _values(other)), "autocast changes a step"
    for a, b in zip(before, _values(model)):
        assert b.dtype == torch.float32, f"float32 became {b.dtype}"
        assert bool(b.isfinite().all()), "weights hold NaN or infinity"
        assert not torch.equal(a, b), "a weight does not move"


@_check("wrong options are refused")
def _wrong(method: OptimizerMethod) -> None:
    known = inspect.signature(method.optimizer).parameters
    for key, row in method.parameters.items():
        bad: Any = row.minimum - 1 if row.minimum is not None else "nonsense" if row.choices else None
        if bad is None:
            continue
        attempts: list[tuple[Any, Any, dict[str, Any]]] = [(method.configure, {key: bad}, {})]
        if row.field in known:
            attempts.append((method.optimizer, [nn.Parameter(torch.ones(2))], {row.field: bad}))
        for function, given, options in attempts:
            try:
                function(given, **options)
            except ValueError as error:
                assert key in str(error), f"the message does not name {key}: {error}"
                assert str(bad) in str(error), f"the message does not show {bad!r}: {error}"
            else:
                raise AssertionError(f"{key} = {bad!r} was accepted")


@_check("configuration round trip")
def _configuration(method: OptimizerMethod) -> None:
    config = method.configure({})
    assert type(config)(**json.loads(json.dumps(asdict(config)))) == config, "the configuration does not survive JSON"
    defaults = {p.field: p.default for p in type(method)("", "", method.config, "", "").parameters.values()}
    for name, value in inspect.signature(method.optimizer).parameters.items():
        if name in defaults:
            assert defaults[name] == value.default, f"{name}: {defaults[name]} here, {value.default} in the optimizer"
    answers_typos(method)


@_check("documented")
def _documented(method: OptimizerMethod) -> None:
    assert method.summary.endswith("."), "the summary is a sentence"
    assert method.paper or method.origin, "the row says neither its paper nor its origin"
    for owner in (method.config, method.optimizer):
        assert ">>>" in (inspect.getdoc(owner) or ""), f"{owner.__name__} has no example"
    assert "Args:" in (inspect.getdoc(method.optimizer) or ""), "the optimizer's arguments are not described"
    for key, row in method.parameters.items():
        assert row.help, f"{key} has no help"
