"""What every quantiser of weights promises, whatever values it allows."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from weft.calibrate import Change, Statistics
from weft.calibrate.facts import Facts
from weft.contract.outcome import adder, answers_typos, outcome
from weft.errors import RecipeError
from weft.function.quantizer import QuantizeMethod
from weft.packed import Packed, unpack

ROWS, COLUMNS, GROUP = 12, 32, 8
CHECKS: dict[str, Callable[[QuantizeMethod], None]] = {}


def run(method: QuantizeMethod) -> list[dict[str, Any]]:
    """All checks on one row.

    Returns:
        For each check its name, "passed", "failed" or "expected", and the reason for the latter two.
    """
    why = {"a quantised weight stays": method.refits, **method.exceptions}
    return [outcome(name, check, method, why.get(name, "")) for name, check in CHECKS.items()]


_check = adder(CHECKS)


def _config(method: QuantizeMethod, **values: Any) -> Any:
    group = {method.group: GROUP} if method.group else {}
    return method.configure({**group, **method.trial, **values})


def _weight(rows: int = ROWS, columns: int = COLUMNS) -> Tensor:
    return 0.05 * torch.randn(rows, columns)


def _gram(columns: int = COLUMNS) -> Tensor:
    """Of correlated inputs of different sizes."""
    x = torch.randn(8 * columns, columns, dtype=torch.float64) @ torch.randn(columns, columns, dtype=torch.float64)
    x = x * torch.randn(columns, dtype=torch.float64).exp()
    return x.T @ x


def _fitted(config: Any, weight: Tensor, gram: Tensor) -> Packed:
    """What a model's rewriting gets. Other statistics than the Gram matrix are those of normal inputs."""
    rows = 8 * len(gram)
    squares = gram.diagonal()
    scale = (squares / rows).sqrt()
    tensors = {
        "gram": gram,
        "square_sum": squares,
        "mean_abs": math.sqrt(2 / math.pi) * scale,
        "max_abs": 3 * scale,
        "mean": torch.zeros_like(scale),
        "minimum": -3 * scale,
        "maximum": 3 * scale,
    }
    facts = Facts(layers={"layer": ("layer", rows)})
    made: Packed = config.fit("layer", weight, Statistics({f"layer/{n}": t for n, t in tensors.items()}, facts))
    return made


def _changed(config: Any, weight: Tensor, gram: Tensor) -> Tensor:
    return _fitted(config, weight, gram).dequantize()


def _error(config: Any, weight: Tensor) -> float:
    """Of white inputs."""
    found = _changed(config, weight, torch.eye(weight.shape[1], dtype=torch.float64))
    return float((found - weight).norm() / weight.norm())


@_check("shape is kept, the result is float32")
def _shape(method: QuantizeMethod) -> None:
    weight, gram = _weight(), _gram()
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        found = _changed(_config(method), weight.to(dtype), gram)
        assert found.shape == weight.shape, f"{list(weight.shape)} became {list(found.shape)}"
        assert found.dtype == torch.float32, f"{dtype} became {found.dtype}, the result is float32"
        wide = _changed(_config(method), weight.to(dtype).float(), gram)
        # float64 may fall to the other side where a weight lies between two values
        same = float((found - wide).norm() / wide.norm())
        assert same < (0.01 if dtype == torch.float64 else 1e-6), f"{dtype} and its own values in float32 differ"


@_check("a file brings it back")
def _file(method: QuantizeMethod) -> None:
    for weight, gram in ((_weight(), _gram()), (_weight(5, 40), _gram(40))):
        made = _fitted(_config(method), weight, gram)
        assert isinstance(made, Packed), f"fit gives {type(made).__name__} and no packed weight"
        assert made.shape == tuple(weight.shape), f"the packed weight says {made.shape} for {list(weight.shape)}"
        settings = json.loads(json.dumps(made.settings()))
        again = unpack({n: t.clone() for n, t in made.tensors().items()}, settings)
        assert torch.equal(again.dequantize(), made.dequantize()), "tensors and settings stand for something else"


@_check("it is smaller than half precision")
def _smaller(method: QuantizeMethod) -> None:
    weight = torch.randn(256, 512)
    made = _fitted(method.configure(dict(method.trial)), weight, torch.eye(512, dtype=torch.float64))
    assert made.bits_per_weight < 12, f"a weight takes {made.bits_per_weight:.3g} bits"


@_check("codes are within their range, and use it")
def _range(method: QuantizeMethod) -> None:
    if method.codes is None:
        return
    weight = _weight(16, 512)
    weight[0, ::7] *= 100
    config = _config(method)
    low, high = method.codes(config)
    made: Any = _fitted(config, weight, torch.eye(512, dtype=torch.float64))
    codes = made.codes
    assert not codes.is_floating_point(), f"codes are {codes.dtype}"
    least, most = int(codes.min()), int(codes.max())
    assert (least, most) == (low, high), f"codes run from {least} to {most}, the row says {low} to {high}"


@_check("a quantised weight stays")
def _stays(method: QuantizeMethod) -> None:
    gram = _gram()
    once = _changed(_config(method), _weight(), gram)
    moved = (_changed(_config(method), once, gram) - once).abs().max() / once.abs().max()
    assert moved <= 1e-5, f"quantising again moves a weight by {moved:.3g} of the largest"


@_check("the error is what the row says")
def _size_of_error(method: QuantizeMethod) -> None:
    found = _error(method.configure(dict(method.trial)), torch.randn(64, 512))
    assert 0.9 * method.error <= found <= 1.1 * method.error, f"is {found:.3g}, the row says {method.error:.3g}"


@_check("finer is nearer")
def _finer(method: QuantizeMethod) -> None:
    assert method.finer, "the row does not say what lowers the error"
    weight = torch.randn(16, 512)
    for key, values in method.finer.items():
        errors = [_error(_config(method, **{key: value}), weight) for value in values]
        falls = all(later < 0.95 * before for before, later in pairwise(errors))
        assert falls, f"{key} of {values} gives errors {errors}"


@_check("repeats itself")
def _repeats(method: QuantizeMethod) -> None:
    weight, gram = _weight(), _gram()
    first = _changed(_config(method), weight, gram)
    torch.manual_seed(11)
    state = torch.random.get_rng_state()
    assert torch.equal(_changed(_config(method), weight, gram), first), "two calls differ"
    assert torch.equal(torch.random.get_rng_state(), state), "torch's global generator moved"


@_check("inputs are left as they are")
def _inputs(method: QuantizeMethod) -> None:
    for dtype in (torch.float32, torch.float64):
        weight, gram = _weight().to(dtype), _gram()
        copies = weight.clone(), gram.clone()
        found = _changed(_config(method), weight, gram)
        assert torch.equal(weight, copies[0]), "the weight was changed"
        assert torch.equal(gram, copies[1]), "the Gram matrix was changed"
        assert found.data_ptr() != weight.data_ptr(), "the result is the weight's memory"


@_check("memory may lie anyhow")
def _strides(method: QuantizeMethod) -> None:
    weight, gram = _weight(), _gram()
    expected = _changed(_config(method), weight, gram)
    wide = torch.zeros(ROWS, 2 * COLUMNS)
    wide[:, ::2] = weight
    for name, other in (("transposed", weight.T.contiguous().T), ("strided", wide[:, ::2])):
        assert not other.is_contiguous()
        assert torch.equal(_changed(_config(method), other, gram), expected), f"{name} gives something else"


@_check("zeros and constants are harmless")
def _constants(method: QuantizeMethod) -> None:
    gram = _gram()
    for value in (0.0, 1.0, -3.0, 1e-30, 1e30):
        found = _changed(_config(method), torch.full((3, COLUMNS), value), gram)
        assert found.isfinite().all(), f"constant weights of {value} give NaN or infinity"
        # double quantisation and others store scales in few bits
        assert float((found - value).abs().max()) <= 0.02 * abs(value), f"weights of {value} became {found[0, 0]:.3g}"


@_check("a row of zeros stays one")
def _zero_row(method: QuantizeMethod) -> None:
    mixed, gram = _weight(), _gram()
    mixed[1] = 0
    found = _changed(_config(method), mixed, gram)
    assert found.isfinite().all(), "a row of zeros among others gives NaN or infinity"
    assert found[1].abs().max() == 0, "a row of zeros does not stay one"


@_check("NaN and infinity are refused")
def _non_finite(method: QuantizeMethod) -> None:
    for bad in (float("nan"), float("inf"), -float("inf")):
        weight = _weight()
        weight[1, 2] = bad
        _refused(method, weight, ("NaN", "infinite"))


@_check("what is no matrix is refused")
def _no_matrix(method: QuantizeMethod) -> None:
    for bad in (torch.ones(COLUMNS), torch.ones(2, 3, COLUMNS), torch.ones(0, COLUMNS), torch.ones(2, 32).long()):
        _refused(method, bad, ("matrix",))


def _refused(method: QuantizeMethod, weight: Tensor, words: tuple[str, ...]) -> None:
    try:
        _changed(_config(method), weight, torch.eye(weight.shape[-1], dtype=torch.float64))
    except RecipeError as error:
        assert any(w in str(error) for w in words), f"the message names none of {', '.join(words)}: {error}"
    else:
        raise AssertionError(f"{list(weight.shape)} {weight.dtype} that cannot be quantised was let through")


@_check("one row and one column")
def _small(method: QuantizeMethod) -> None:
    for rows, columns, group in ((1, COLUMNS, GROUP), (ROWS, 1, 1), (1, 1, 1)):
        weight = _weight(rows, columns)
        config = _config(method, **({method.group: group} if method.group else {}))
        found = _changed(config, weight, _gram(columns))
        assert found.shape == weight.shape, f"{list(weight.shape)} became {list(found.shape)}"
        assert found.isfinite().all(), f"{list(weight.shape)} gives NaN or infinity"
        assert group > 1 or not method.group or torch.allclose(found, weight, rtol=0.05, atol=1e-3), (
            "one weight with a scale of its own moves"
        )


@_check("groups that do not divide the inputs")
def _ragged(method: QuantizeMethod) -> None:
    weight = _weight(ROWS, GROUP + 3)
    if not method.ragged and method.group:
        _refused(method, weight, ("divide",))
        return
    found = _changed(_config(method), weight, _gram(GROUP + 3))
    assert found.shape == weight.shape, f"{list(weight.shape)} became {list(found.shape)}"
    error = float((found - weight).norm() / weight.norm())
    assert error < 2 * method.error, f"the error of uneven groups is {error:.3g}"


@_check("configuration round trip")
def _configuration(method: QuantizeMethod) -> None:
    config = method.configure({})
    assert type(config)(**json.loads(json.dumps(asdict(config)))) == config, "it does not survive JSON"
    assert not method.group or method.group in method.parameters, f"there is no parameter {method.group}"
    answers_typos(method)


@_check("documented")
def _documented(method: QuantizeMethod) -> None:
    assert method.summary.endswith("."), "the summary is a sentence"
    assert method.paper or method.origin, "the row says neither its paper nor its origin"
    assert ">>>" in (method.config.__doc__ or ""), "the configuration has no example"
    assert issubclass(method.config, Change), "its configuration is no weft.calibrate.Change"
    assert method.config.fit.__doc__, "fit has no docstring"
    for key, field in method.parameters.items():
        assert field.help, f"the parameter {key} has no help"
