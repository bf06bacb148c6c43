"""What every initialiser promises, whatever it draws from."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from weft.contract.models import Other, Scaled
from weft.contract.outcome import adder, answers_typos, outcome
from weft.errors import RecipeError
from weft.function.attach import parametrize_
from weft.function.initializer import InitMethod
from weft.method import describe

CHECKS: dict[str, Callable[[InitMethod], None]] = {}


def run(method: InitMethod) -> list[dict[str, Any]]:
    """All checks on one row.

    Returns:
        For each check its name, "passed" or "failed", and the reason for the latter.
    """
    return [outcome(name, check, method) for name, check in CHECKS.items()]


_check = adder(CHECKS)


def _fill(method: InitMethod, model: nn.Module, seed: int | None = 1) -> None:
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    method.apply(model, generator=generator, **asdict(method.configure({})))


def _model(method: InitMethod, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The trial's model, of the same numbers each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        return method.trial().to(dtype)


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {n: v.detach().clone() for n, v in model.state_dict().items()}


def _same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(v, second[n]) for n, v in first.items())


@_check("fills what the row says, and nothing else")
def _fills(method: InitMethod) -> None:
    model = _model(method)
    before = _state(model)
    _fill(method, model)
    after = _state(model)
    assert before.keys() == after.keys(), f"other names: {sorted(before.keys() ^ after.keys())[:3]}"
    changed = {n for n, v in after.items() if v.shape != before[n].shape or not torch.equal(v, before[n])}
    assert changed == set(method.fills), f"changed {sorted(changed)}, the row says {sorted(method.fills)}"
    assert all(v.isfinite().all() for v in after.values() if v.is_floating_point()), "NaN or infinity"


@_check("in place")
def _in_place(method: InitMethod) -> None:
    model = _model(method)
    first = next(iter(model.parameters()))
    first.requires_grad_(False)
    before = dict(model.named_parameters())
    pointers = {n: p.data_ptr() for n, p in before.items()}
    _fill(method, model)
    for name, value in model.named_parameters():
        if not (method.resizes and name in method.fills):
            assert value is before[name], f"{name} is another parameter now, which an optimizer would not know"
            assert value.data_ptr() == pointers[name], f"{name} lies elsewhere now"
        assert value.requires_grad == before[name].requires_grad, f"{name}: requires_grad is {value.requires_grad}"
        assert value.is_leaf, f"{name} keeps a graph"
        assert value.grad is None, f"{name} has a gradient"


@_check("shape, dtype and device")
def _dtypes(method: InitMethod) -> None:
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        model = _model(method, dtype)
        before = _state(model)
        _fill(method, model)
        for name, value in model.state_dict().items():
            kept = value.dtype == before[name].dtype and value.device == before[name].device
            kept &= value.shape == before[name].shape or (method.resizes and name in method.fills)
            assert kept, f"{dtype}: {name} became {list(value.shape)}, {value.dtype}"
            assert not value.is_floating_point() or value.isfinite().all(), f"{dtype}: {name} holds NaN or infinity"


@_check("repeats itself from a generator")
def _generator(method: InitMethod) -> None:
    models = [_model(method) for _ in range(3)]
    state = torch.random.get_rng_state()
    for model, seed in zip(models, (1, 1, 2)):
        _fill(method, model, seed)
    assert torch.equal(torch.random.get_rng_state(), state), "torch's global generator moved although one was given"
    first, again, other = map(_state, models)
    assert _same(first, again), "one seed gives two results"
    assert _same(first, other) != method.random, f"random is {method.random}"


@_check("follows torch.manual_seed without a generator")
def _global(method: InitMethod) -> None:
    models = [_model(method) for _ in range(2)]
    for model in models:
        torch.manual_seed(3)
        _fill(method, model, None)
    assert _same(*map(_state, models)), "one seed gives two results"


@_check("needs no gradients")
def _modes(method: InitMethod) -> None:
    plain, quiet = _model(method), _model(method)
    _fill(method, plain)
    with torch.no_grad():
        _fill(method, quiet)
        assert not torch.is_grad_enabled(), "gradients were switched on"
    assert torch.is_grad_enabled(), "gradients were switched off"
    assert _same(_state(plain), _state(quiet)), "no_grad changes the result"


@_check("mode of the model is kept")
def _training(method: InitMethod) -> None:
    for training in (True, False):
        model = _model(method).train(training)
        _fill(method, model)
        assert all(m.training == training for m in model.modules()), "train() or eval() was called"
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules()), "a hook stays"


@_check("computed weights are refused")
def _computed(method: InitMethod) -> None:
    model = _model(method)
    parametrize_(model, Other(Scaled))
    before = _state(model)
    try:
        _fill(method, model)
    except RecipeError as error:
        assert "function" in str(error), f"the message does not say that a function computes the weight: {error}"
    else:
        raise AssertionError("a weight that is computed was filled, which changes nothing")
    assert _same(before, _state(model)), "refused, and changed"


@_check("configuration round trip")
def _configuration(method: InitMethod) -> None:
    config = method.configure({})
    made = type(config)(
        **{k: tuple(v) if isinstance(v, list) else v for k, v in json.loads(json.dumps(asdict(config))).items()}
    )
    assert made == config, "the configuration does not survive JSON"
    accepted = inspect.signature(method.function).parameters
    for field in describe(method.config):  # without the row's own defaults, which it passes
        key = field.key
        assert field.field in accepted, f"{method.function.__name__} does not take {field.field}"
        default = accepted[field.field].default
        assert field.default == default, f"{key}: {field.default} in the row, {default} in {method.function.__name__}"
    answers_typos(method)
    assert "generator" in accepted or not method.random, f"{method.function.__name__} takes no generator"


@_check("documented")
def _documented(method: InitMethod) -> None:
    assert method.summary.endswith("."), "the summary is a sentence"
    assert method.paper or method.origin, "the row says neither its paper nor its origin"
    name = method.function.__name__
    assert name.endswith("_"), f"{name} works in place, so its name ends in an underscore"
    text = method.function.__doc__ or ""
    for needed in (">>>", "Args:", "Source:"):
        assert needed in text, f"the docstring of {name} has no {needed}"
    for key, field in method.parameters.items():
        assert field.help, f"the parameter {key} has no help"
        assert field.field in text, f"the docstring of {name} does not mention {field.field}"
