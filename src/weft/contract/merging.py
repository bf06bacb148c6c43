"""What every merge method promises, whatever it computes."""

from __future__ import annotations

import itertools
import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from weft.checkpoint.dtypes import DTYPES
from weft.checkpoint.open import open_checkpoint
from weft.engine import chunks
from weft.engine.merging import MergeMethod, merge_tensors
from weft.engine.run import Options
from weft.errors import NonFiniteError, RecipeError, ShapeError, WeftError
from weft.kernels.convert import from_float32
from weft.recipe.run import run as run_recipe

SHAPES: dict[str, tuple[int, ...]] = {
    "embed.weight": (12, 8),
    "layers.0.weight": (7, 5),
    "layers.0.bias": (5,),
    "layers.1.weight": (7, 5),
    "layers.1.bias": (5,),
    "conv.weight": (3, 2, 3, 3),
    "scale": (),
    "one": (1,),
    "empty": (0, 4),
}
State = dict[str, np.ndarray]
CHECKS: dict[str, Callable[[MergeMethod], None]] = {}

# What a method cannot promise, with the reason. Kept here so that nobody can skip a check silently.
ORDER_MATTERS = {
    "slerp": "the second model has weight t",
    "nuslerp": "two models of equal weight, but an angle of 180° has no shortest path",
    "nearswap": "pulls one model towards the other",
    "passthrough": "takes one model",
    "arcee_fusion": "keeps parts of one model",
    "wise_ft": "takes one model",
    "rws_extract": "the models have different parts",
    "rws_apply": "the models have different parts",
}
RANDOM = ("dare", "della")  # each model has its own random lane, so their order matters
COPIES_CHANGE = {
    "rws_extract": "gives a difference, not a model",
    "rws_apply": "adds a difference, not a model",
}


def run(method: MergeMethod) -> list[dict[str, Any]]:
    """All checks on one row."""
    results = []
    for name, check in CHECKS.items():
        reason = _expected(name, method)
        if reason:
            results.append({"check": name, "outcome": "expected", "reason": reason})
            continue
        try:
            check(method)
        except (AssertionError, WeftError) as error:
            results.append({"check": name, "outcome": "failed", "reason": str(error) or type(error).__name__})
        except Exception as error:  # a method that crashes has failed; the battery goes on
            results.append({"check": name, "outcome": "failed", "reason": f"{type(error).__name__}: {error}"})
        else:
            results.append({"check": name, "outcome": "passed", "reason": ""})
    return results


def _expected(check: str, method: MergeMethod) -> str:
    name = method.name.removeprefix("mergekit/")
    if check == "order of models":
        if name in ORDER_MATTERS:
            return ORDER_MATTERS[name]
        if name.startswith(RANDOM):
            return "each model has its own random numbers"
    if check == "copies of one model" and name in COPIES_CHANGE:
        return COPIES_CHANGE[name]
    return ""


def _check(name: str) -> Callable[[Callable[[MergeMethod], None]], Callable[[MergeMethod], None]]:
    def add(function: Callable[[MergeMethod], None]) -> Callable[[MergeMethod], None]:
        CHECKS[name] = function
        return function

    return add


def _count(method: MergeMethod) -> int:
    low, high = method.models
    return max(low, min(3, high or 3))


def _states(method: MergeMethod, *, same: bool = False, seed: int = 0) -> tuple[list[State], State | None]:
    """Models near a base, as fine-tunes are."""
    random = np.random.default_rng(seed)
    base = {n: np.asarray(random.standard_normal(s), np.float32) for n, s in SHAPES.items()}
    models = []
    for _ in range(_count(method)):
        change = 0.0 if same else 0.1
        models.append(
            {n: np.asarray(v + change * random.standard_normal(v.shape), np.float32) for n, v in base.items()}
        )
    return models, None if method.base == "none" else base


def _config(method: MergeMethod) -> Any:
    return method.configure(_required(method))


def _required(method: MergeMethod) -> dict[str, Any]:
    """Middling values for parameters without a default."""
    return {k: (p.choices[0] if p.choices else 0.5) for k, p in method.parameters.items() if p.required}


def _merge(method: MergeMethod, models: list[State], base: State | None, *, seed: int = 0) -> State:
    merged: State = merge_tensors(method, models, _config(method), base=base, seed=seed)
    return merged


def _run(
    method: MergeMethod,
    models: list[State],
    base: State | None,
    folder: Path,
    *,
    dtype: str = "",
    options: Options | None = None,
) -> dict[str, Any]:
    """Through files' engine, from state dicts to an output folder, and back."""
    given: dict[str, Mapping[str, Any]] = {f"m{i}": m for i, m in enumerate(models)}
    step: dict[str, Any] = {"method": method.name, "models": list(given), "parameters": _required(method)}
    if base is not None:
        step["base"], given = "base", {**given, "base": base}
    recipe = {"steps": [step], **({"output": {"dtype": dtype}} if dtype else {})}
    from weft.registry import add, methods

    if method.name not in methods():  # a row under test that nobody registered must be found by its name
        add(method)
    rising = itertools.count()  # a scorer, for methods that need one: everything is an improvement
    result = run_recipe(
        recipe, folder / "out", models=given, options=options or Options(), score=lambda _: float(next(rising))
    )
    with open_checkpoint(result.output) as written:
        return {n: (t.dtype.name, t.bits()) for n, t in written.items()}


@_check("shapes and dtypes")
def _shapes(method: MergeMethod) -> None:
    models, base = _states(method)
    for dtype in ("float32", "bfloat16", "float16"):
        with tempfile.TemporaryDirectory() as folder:
            written = _run(method, models, base, Path(folder), dtype=dtype)
        assert {n: v.shape for n, (_, v) in written.items()} == SHAPES, "names or shapes changed"
        assert {d for d, _ in written.values()} == {{"float32": "F32", "bfloat16": "BF16", "float16": "F16"}[dtype]}


@_check("inputs untouched")
def _untouched(method: MergeMethod) -> None:
    models, base = _states(method)
    before, before_base = _states(method)
    _merge(method, models, base)
    for now, then in zip([*models, base or {}], [*before, before_base or {}]):
        for name, value in now.items():
            np.testing.assert_array_equal(value, then[name])


@_check("finite results")
def _finite(method: MergeMethod) -> None:
    models, base = _states(method)
    for name, value in _merge(method, models, base).items():
        assert np.isfinite(value).all(), f"{name} holds NaN or infinity"


@_check("zeros are harmless")
def _zeros(method: MergeMethod) -> None:
    models, base = _states(method)
    zero = [{n: np.zeros_like(v) for n, v in m.items()} for m in models]
    for name, value in _merge(
        method, zero, None if base is None else {n: np.zeros_like(v) for n, v in base.items()}
    ).items():
        assert np.isfinite(value).all(), f"{name} holds NaN or infinity for models of zeros"


@_check("copies of one model")
def _copies(method: MergeMethod) -> None:
    models, base = _states(method, same=True)
    for name, value in _merge(method, models, base).items():
        # a few float32 roundings of numbers near 1
        np.testing.assert_allclose(value, models[0][name], rtol=2e-6, atol=2e-6, err_msg=name)


@_check("chunks do not show")
def _chunks(method: MergeMethod) -> None:
    models, base = _states(method)
    whole = _merge(method, models, base)
    kept = chunks.CHUNK
    try:
        for size in (4, 16):
            chunks.CHUNK = size
            for name, value in _merge(method, models, base).items():
                # float64 sums over chunks may differ in their last bit, which float32 rarely sees
                np.testing.assert_allclose(
                    value, whole[name], rtol=1e-6, atol=1e-7, err_msg=f"{name}, chunks of {size}"
                )
    finally:
        chunks.CHUNK = kept


@_check("threads and memory do not show")
def _threads(method: MergeMethod) -> None:
    models, base = _states(method)
    written = []
    for threads, memory in ((1, 10**9), (4, 10**9), (2, 10**6)):
        with tempfile.TemporaryDirectory() as folder:
            written.append(_run(method, models, base, Path(folder), options=Options(threads=threads, memory=memory)))
    for other in written[1:]:
        for name, (_, bits) in written[0].items():
            assert bits.tobytes() == other[name][1].tobytes(), f"{name}: bytes depend on threads or memory"


@_check("files and tensors agree")
def _agree(method: MergeMethod) -> None:
    models, base = _states(method)
    in_memory = _merge(method, models, base)
    with tempfile.TemporaryDirectory() as folder:
        written = _run(method, models, base, Path(folder))
    for name, (_, bits) in written.items():
        np.testing.assert_array_equal(bits, in_memory[name], err_msg=name)


@_check("bfloat16 inputs")
def _bfloat16(method: MergeMethod) -> None:
    import torch

    models, base = _states(method)

    def half(state: State) -> dict[str, Any]:
        bits = {n: from_float32(v, DTYPES["BF16"]) for n, v in state.items()}
        return {n: torch.from_numpy(b.reshape(-1)).view(torch.bfloat16).reshape(b.shape) for n, b in bits.items()}

    made = merge_tensors(method, [half(m) for m in models], _config(method), base=None if base is None else half(base))
    for name, value in made.items():
        assert value.dtype == torch.bfloat16, f"{name} is {value.dtype}"
        assert torch.isfinite(value.float()).all(), f"{name} holds NaN or infinity"


@_check("same seed, same bytes")
def _seed(method: MergeMethod) -> None:
    models, base = _states(method)
    first, second = (_merge(method, models, base, seed=3) for _ in range(2))
    for name, value in first.items():
        assert value.tobytes() == second[name].tobytes(), f"{name} differs between two runs with one seed"


@_check("order of models")
def _order(method: MergeMethod) -> None:
    models, base = _states(method)
    forward, backward = _merge(method, models, base), _merge(method, models[::-1], base)
    for name, value in forward.items():
        np.testing.assert_allclose(value, backward[name], rtol=1e-5, atol=1e-6, err_msg=name)


@_check("NaN is refused by name")
def _nan(method: MergeMethod) -> None:
    models, base = _states(method)
    models[0]["layers.0.weight"][2, 3] = np.nan
    with tempfile.TemporaryDirectory() as folder:
        try:
            _run(method, models, base, Path(folder))
        except NonFiniteError as error:
            assert "layers.0.weight" in str(error), f"the message does not name the tensor: {error}"
        else:
            raise AssertionError("NaN in an input was let through")
        assert not list(Path(folder).iterdir()), "something was left behind"


@_check("shapes must agree")
def _mismatch(method: MergeMethod) -> None:
    models, base = _states(method)
    if len(models) < 2 and base is None:
        return
    models[-1]["layers.0.weight"] = np.zeros((2, 2), np.float32)
    try:
        _merge(method, models, base)
    except ShapeError as error:
        assert "layers.0.weight" in str(error), f"the message does not name the tensor: {error}"
    else:
        raise AssertionError("different shapes were let through")


@_check("configuration round trip")
def _round_trip(method: MergeMethod) -> None:
    config = _config(method)
    back = json.loads(json.dumps(asdict(config)))
    tuples = {k: tuple(v) if isinstance(v, list) else v for k, v in back.items()}
    assert type(config)(**tuples) == config, "the configuration does not survive JSON"
    assert replace(config) == config
    assert hash(config) == hash(type(config)(**tuples)), "the configuration is not hashable"


@_check("typos are answered")
def _typo(method: MergeMethod) -> None:
    for key in method.parameters:
        try:
            method.configure({**_required(method), key + "x": 1})
        except RecipeError as error:
            assert key in str(error), f"the message does not name {key}: {error}"
        else:
            raise AssertionError(f"the unknown parameter {key}x was accepted")


@_check("number of models")
def _models(method: MergeMethod) -> None:
    low, high = method.models
    for count in {low - 1, (high or low) + 1 if high else low - 1}:
        if count < 0:
            continue
        try:
            method.check_models(count, method.base == "required")
        except RecipeError:
            continue
        raise AssertionError(f"{count} models were accepted")


@_check("documented")
def _documented(method: MergeMethod) -> None:
    assert method.summary.endswith("."), "the summary is a sentence"
    assert method.paper or method.origin, "the row says neither its paper nor its origin"
    function = method.function
    assert function is not None, "no public function"
    text = function.__doc__ or ""
    for part in ("Args:", "Returns:", "Source", ">>>"):
        assert part in text, f"the docstring of {function.__name__} lacks {part}"
    for key, parameter in method.parameters.items():
        assert parameter.help, f"the parameter {key} has no help"
