"""What every alignment promises, whatever it compares: to find an order of units that leaves the function as it is."""

from __future__ import annotations

import copy
import inspect
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from weft.contract.models import fill
from weft.contract.outcome import adder, answers_typos, outcome
from weft.errors import RecipeError, WeftError
from weft.symmetry import Symmetry, find_symmetry
from weft.symmetry.alignment import INPUTS, INPUTS_AND_TARGETS, AlignMethod

NETWORKS = {"layers": (40, 3), "convolutions": (12, 3), "attention": (12, 7, 20)}  # and the shapes of their outputs
CHECKS: dict[str, Callable[[AlignMethod], None]] = {}


def run(method: AlignMethod) -> list[dict[str, Any]]:
    """All checks on one row.

    Returns:
        For each check its name, "passed" or "failed", and the reason for the latter.
    """
    return [outcome(name, check, method) for name, check in CHECKS.items()]


_check = adder(CHECKS)


class _Attention(nn.Module):
    """Heads with units of their own, a shortcut, and a head tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 12)
        self.query, self.key, self.value, self.out = (nn.Linear(12, 12) for _ in range(4))
        self.head = nn.Linear(12, 20, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """(batch, tokens) -> (batch, tokens, 20)."""
        x = self.embedding(tokens)
        q, k, v = (f(x).unflatten(-1, (3, 4)).transpose(1, 2) for f in (self.query, self.key, self.value))
        y: Tensor = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        found: Tensor = self.head(torch.tanh(x + self.out(y)))
        return found


def _made(network: str, width: int = 16, bias: bool = True) -> nn.Module:
    if network == "layers":
        return nn.Sequential(nn.Linear(6, width, bias), nn.Tanh(), nn.Linear(width, 12), nn.Tanh(), nn.Linear(12, 3))
    if network == "convolutions":
        return nn.Sequential(
            nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(8, 6, 3), nn.BatchNorm2d(6),
            nn.ReLU(), nn.Flatten(), nn.Linear(24, 3),
        )  # fmt: skip
    return _Attention()


def _network(network: str, seed: int = 0, **options: Any) -> nn.Module:
    """The same numbers for one seed each time; statistics of batch norm are no longer those of a new one."""
    with torch.random.fork_rng(devices=[]):
        model = _made(network, **options)
    fill(model, seed)
    generator = torch.Generator().manual_seed(seed + 100)
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.weight.add_(1)
                for value in (layer.running_mean, layer.running_var):
                    assert value is not None
                    value.copy_(0.5 + torch.rand(value.shape, generator=generator))
    return model.eval()


def _inputs(network: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    if network == "attention":
        return [torch.randint(20, (12, 7), generator=generator) for _ in range(2)]
    shape = (40, 6) if network == "layers" else (12, 2, 6, 6)
    return [torch.randn(shape, generator=generator) for _ in range(2)]


@cache
def _symmetry(network: str) -> Symmetry:
    with torch.random.fork_rng(devices=[]):
        return find_symmetry(_made(network).eval(), _inputs(network)[0])


def _match(
    method: AlignMethod,
    network: str,
    reference: Any,
    model: Any,
    *,
    inputs: list[Tensor] | None = None,
    seed: int = 0,
    **values: Any,
) -> Mapping[str, Any]:
    """The permutations that a row finds."""
    data: list[Any] = []
    batches = _inputs(network) if inputs is None else inputs
    if method.data == INPUTS:
        data = [batches]
    elif method.data == INPUTS_AND_TARGETS:
        targets = torch.linspace(-1, 1, math.prod(NETWORKS[network])).reshape(NETWORKS[network])
        data = [[(x, targets) for x in batches], _loss]
    given = {**asdict(method.configure({})), **values}
    found = method.function(reference, model, _symmetry(network), *data, **given, seed=seed)
    permutations: Mapping[str, Any] = found.permutations
    return permutations


def _loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return functional.mse_loss(outputs.float(), targets)


def _planted(network: str, model: nn.Module, seed: int = 1) -> tuple[nn.Module, Mapping[str, Any]]:
    """A copy in a random order, and the order that brings it back."""
    symmetry = _symmetry(network)
    order = symmetry.random(np.random.default_rng(seed))
    moved: nn.Module = symmetry.apply(copy.deepcopy(model), order)
    return moved, symmetry.invert(order)


def _same(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    return first.keys() == second.keys() and all(np.array_equal(p, second[n]) for n, p in first.items())


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {n: v.detach().clone() for n, v in model.state_dict().items()}


@_check("a permutation of every group")
def _permutations(method: AlignMethod) -> None:
    for network in NETWORKS:
        symmetry = _symmetry(network)
        found = _match(method, network, _network(network), _network(network, 1))
        assert set(found) == {g.name for g in symmetry.groups}, f"{network}: permutations of {sorted(found)}"
        for name, order in found.items():
            array = np.asarray(order)
            assert array.shape == symmetry.shape(name), f"{name}: {array.shape} for {symmetry.shape(name)}"
            assert array.dtype.kind in "iu", f"{name}: places are {array.dtype}"
            each = (np.sort(array, -1) == np.arange(array.shape[-1])).all()
            assert each, f"{name}: a place is there twice, another never"


@_check("a planted order is recovered")
def _recovered(method: AlignMethod) -> None:
    for network in NETWORKS:
        reference = _network(network)
        noisy = copy.deepcopy(reference)
        with torch.no_grad():
            for value in noisy.parameters():
                value.add_(1e-4 * torch.randn_like(value))
        for seed in (1, 2):
            model, back = _planted(network, noisy, seed)
            found = _match(method, network, reference, model)
            wrong = [n for n, p in back.items() if n not in found or not np.array_equal(found[n], p)]
            assert not wrong, f"{network}: another order of {', '.join(wrong)}"


@_check("the function is kept")
def _kept(method: AlignMethod) -> None:
    for network in NETWORKS:
        model = _network(network, 1)
        found = _match(method, network, _network(network), model)
        aligned = _symmetry(network).apply(copy.deepcopy(model), found)
        stays = all(torch.equal(v, aligned.state_dict()[n]) for n, v in model.state_dict().items())
        assert not stays, f"{network}: two networks of different starts have no unit to move"
        with torch.no_grad():
            x = _inputs(network)[0]
            error = float((aligned(x) - model(x)).abs().max())
        assert error <= 1e-5, f"{network}: outputs move by {error:.3g}"


@_check("equal models stay in their order")
def _equal(method: AlignMethod) -> None:
    for network in NETWORKS:
        model = _network(network)
        found = _match(method, network, model, copy.deepcopy(model))
        assert _same(found, _symmetry(network).identity()), f"{network}: units of equal models move"


@_check("equal units stay in their order")
def _ties(method: AlignMethod) -> None:
    models = [_network("layers", seed) for seed in (0, 1)]
    with torch.no_grad():
        for model in models:
            for value in model.parameters():  # all units of a layer alike
                value.fill_(float(value.flatten()[0]))
    found = _match(method, "layers", *models)
    assert _same(found, _symmetry("layers").identity()), "units move although nothing tells them apart"


@_check("repeats itself, without global randomness")
def _repeats(method: AlignMethod) -> None:
    reference, model = _network("layers"), _network("layers", 1)
    first = _match(method, "layers", reference, model)
    torch.manual_seed(11)
    state, numbers = torch.random.get_rng_state(), np.random.get_state(legacy=False)
    again = _match(method, "layers", reference, model)
    assert torch.equal(torch.random.get_rng_state(), state), "torch's global generator moved"
    assert str(np.random.get_state(legacy=False)) == str(numbers), "numpy's global generator moved"
    assert _same(first, again), "one seed gives two results"


@_check("models and data are left as they are")
def _untouched(method: AlignMethod) -> None:
    for network in ("layers", "convolutions"):
        models = [_network(network), _network(network, 1)]
        models[0].requires_grad_(False)
        before, inputs = [_state(m) for m in models], _inputs(network)
        _match(method, network, *models, inputs=inputs)
        assert all(torch.equal(x, y) for x, y in zip(inputs, _inputs(network))), "the data was changed"
        for what, model, state in zip(("the reference", "the model"), models, before):
            changed = [n for n, v in model.state_dict().items() if not torch.equal(v, state[n])]
            assert not changed, f"{changed[0]} of {what} was changed"
            trains = {p.requires_grad for p in model.parameters()}
            assert trains == {model is models[1]}, f"requires_grad of {what} was changed"
            assert all(p.grad is None for p in model.parameters()), f"{what} has gradients"
            assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules()), f"{what} keeps a hook"


@_check("training mode does not matter, and stays")
def _modes(method: AlignMethod) -> None:
    models = [_network("convolutions"), _network("convolutions", 1)]
    expected = _match(method, "convolutions", *models)
    modes = []
    for model in models:
        model.train()
        model[1].eval()
        modes.append([m.training for m in model.modules()])
    found = _match(method, "convolutions", *models)
    assert [[m.training for m in model.modules()] for model in models] == modes, "train() or eval() was called"
    assert _same(found, expected), "a model in training gives another order"


@_check("gradients may be on or off")
def _gradients(method: AlignMethod) -> None:
    models = [_network("layers"), _network("layers", 1)]
    expected = _match(method, "layers", *models)
    assert torch.is_grad_enabled(), "gradients were switched off"
    with torch.no_grad():
        found = _match(method, "layers", *models)
        assert not torch.is_grad_enabled(), "gradients were switched on"
    assert _same(found, expected), "no_grad gives another order"


@_check("float64 and half precision")
def _dtypes(method: AlignMethod) -> None:
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        reference = _network("layers").to(dtype)
        model, back = _planted("layers", reference)
        found = _match(method, "layers", reference, model, inputs=[x.to(dtype) for x in _inputs("layers")])
        assert _same(found, back), f"{dtype}: a planted order is not found"


@_check("models of another form are refused")
def _other_form(method: AlignMethod) -> None:
    good = _network("layers")
    for bad in (_network("layers", width=17), _network("layers", bias=False)):
        for pair in ((good, bad), (bad, good)):
            try:
                _match(method, "layers", *pair)
            except WeftError as error:
                assert "0." in str(error), f"the message does not name the tensor: {error}"
            else:
                raise AssertionError("models that have no common order were matched")


@_check("NaN and infinity are refused")
def _non_finite(method: AlignMethod) -> None:
    for value in (math.nan, math.inf):
        for place in (0, 1):
            models = [_network("layers"), _network("layers", 1)]
            with torch.no_grad():
                models[place].get_parameter("2.weight")[1, 2] = value
            try:
                _match(method, "layers", *models)
            except WeftError as error:
                assert "2.weight" in str(error), f"the message does not name the tensor: {error}"
            else:
                raise AssertionError(f"a weight of {value} was let through")


@_check("data that says nothing is refused")
def _no_data(method: AlignMethod) -> None:
    models = [_network("layers"), _network("layers", 1)]
    for bad, word in (([], "batch"), ([x * math.nan for x in _inputs("layers")], "NaN")):
        if not method.data:
            return
        try:
            _match(method, "layers", *models, inputs=bad)
        except WeftError as error:
            assert word in str(error), f"the message does not say {word}: {error}"
        else:
            raise AssertionError(f"data without {'a batch' if word == 'batch' else 'numbers'} was let through")


@_check("a model without units has no permutations")
def _no_units(method: AlignMethod) -> None:
    models = [nn.Linear(6, 3), nn.Linear(6, 3)]
    x = torch.randn(5, 6)
    every: dict[str, list[Any]] = {"": [], INPUTS: [[x]], INPUTS_AND_TARGETS: [[(x, x[:, :3])], _loss]}
    found = method.function(*models, find_symmetry(models[0], x), *every[method.data])
    assert dict(found.permutations) == {}, f"permutations of {sorted(found.permutations)}"


@_check("wrong options are refused")
def _wrong(method: AlignMethod) -> None:
    models = [_network("layers"), _network("layers", 1)]
    for key, row in method.parameters.items():
        if row.minimum is None:
            continue
        bad = row.minimum - 1
        values: dict[str, Any] = {row.field: bad}
        attempts = [
            partial(method.configure, {key: bad}),
            partial(_match, method, "layers", *models, **values),
        ]
        for attempt in attempts:
            try:
                attempt()
            except RecipeError as error:
                assert key in str(error), f"the message does not name {key}: {error}"
                assert f"{bad:g}" in str(error), f"the message does not show {bad:g}: {error}"
            else:
                raise AssertionError(f"{key} = {bad:g} was accepted")


@_check("configuration round trip")
def _configuration(method: AlignMethod) -> None:
    config = method.configure({})
    assert type(config)(**json.loads(json.dumps(asdict(config)))) == config, "it does not survive JSON"
    accepted = inspect.signature(method.function).parameters
    name = method.function.__name__
    for field in method.parameters.values():
        assert field.field in accepted, f"{name} does not take {field.field}"
        default = accepted[field.field].default
        assert field.default == default, f"{field.field}: {field.default} in the row, {default} in {name}"
    assert "seed" in accepted, f"{name} takes no seed"
    answers_typos(method)


@_check("documented")
def _documented(method: AlignMethod) -> None:
    assert method.summary.endswith("."), "the summary is a sentence"
    assert method.paper or method.origin, "the row says neither its paper nor its origin"
    assert ">>>" in (method.config.__doc__ or ""), "the configuration has no example"
    assert (method.needs != "nothing") == bool(method.data), f"needs {method.needs}, and its data is {method.data!r}"
    text = method.function.__doc__ or ""
    for needed in (">>>", "Args:", "Returns:", "Raises:", "Source:"):
        assert needed in text, f"the docstring of {method.function.__name__} has no {needed}"
    for key, field in method.parameters.items():
        assert field.help, f"the parameter {key} has no help"
        assert field.field in text, f"the docstring of {method.function.__name__} does not mention {field.field}"
