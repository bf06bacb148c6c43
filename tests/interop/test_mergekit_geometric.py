"""Merges along arcs and on spheres against mergekit's own methods, on the same tensors.

mergekit is given the float32 tensors as float64, so that its formula is evaluated without rounding; weft, in float32,
must agree to a few float32 roundings. Where mergekit branches on what float32 can tell apart, it is given float32.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch

from weft.engine.merging import MergeMethod, merge_tensors

UNIT = 2.0**-24
SHAPES = [(33, 17), (9,), (4, 3, 5), (1, 6)]
Merge = Callable[..., torch.Tensor]


@pytest.fixture(scope="module")
def mergekit() -> Merge:
    """mergekit's merge of one output tensor, by method name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("mergekit")
        from mergekit import merge_methods

    def merge(
        name: str, tensors: Sequence[torch.Tensor], parameters: Mapping[str, Any], base: torch.Tensor | None = None
    ) -> torch.Tensor:
        inputs = list(tensors) if base is None else [base, *tensors]
        index = None if base is None else 0
        return merge_methods.merge_tensors(inputs, name, parameters=parameters, base_index=index)

    return merge


def row_for(name: str) -> MergeMethod:
    """The row that a mergekit file uses: its own where the numbers differ."""
    rows = {row.name: row for row in importlib.import_module(f"weft.merge.{name}").METHODS}
    return rows.get(f"mergekit/{name}", rows[name])


def weft(
    name: str, tensors: Sequence[torch.Tensor], parameters: Mapping[str, Any], base: torch.Tensor | None = None
) -> torch.Tensor:
    """weft's merge from mergekit's parameters; ``weight`` is spelled ``weights`` when it is a list."""
    row = row_for(name)
    renamed = {"weights" if key == "weight" else key: value for key, value in parameters.items()}
    result: torch.Tensor = merge_tensors(row, tensors, row.configure(renamed), base=base)
    return result


def models(shape: tuple[int, ...], count: int, seed: int = 0) -> list[torch.Tensor]:
    """Related float32 tensors of different lengths."""
    random = torch.Generator().manual_seed(seed)
    common = torch.randn(shape, generator=random)
    return [(1 + 0.3 * i) * (common + 0.7 * torch.randn(shape, generator=random)) for i in range(count)]


def assert_same(
    mergekit: Merge,
    name: str,
    tensors: list[torch.Tensor],
    parameters: Mapping[str, Any],
    base: torch.Tensor | None = None,
) -> None:
    """Agreement to eight float32 roundings of the largest terms."""
    ours = weft(name, tensors, parameters, base)
    theirs = mergekit(name, [t.double() for t in tensors], parameters, None if base is None else base.double())
    assert ours.dtype == torch.float32
    scale = sum(t.abs() for t in [*tensors, *([] if base is None else [base])]).double()
    worst = ((ours.double() - theirs).abs() / scale).max().item()
    assert worst <= 8 * UNIT, f"{name} differs by {worst:.2g} of the inputs"


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("t", [0.0, 0.3, 1.0, 1.1])
def test_slerp(mergekit: Merge, shape: tuple[int, ...], t: float) -> None:
    base, other = models(shape, 2)
    assert_same(mergekit, "slerp", [other], {"t": t}, base)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("with_base", [False, True])
@pytest.mark.parametrize("mode", [{}, {"nuslerp_flatten": False}, {"nuslerp_flatten": False, "nuslerp_row_wise": True}])
def test_nuslerp(mergekit: Merge, shape: tuple[int, ...], with_base: bool, mode: dict[str, bool]) -> None:
    base, *tensors = models(shape, 3)
    assert_same(mergekit, "nuslerp", tensors, {"weight": [0.6, 0.2], **mode}, base if with_base else None)


@pytest.mark.parametrize("factor", [1.0, 3.0, -1.0, -3.0, 1 + 2**-20])
@pytest.mark.parametrize("name", ["slerp", "nuslerp"])
def test_parallel_models(mergekit: Merge, name: str, factor: float) -> None:
    (a,) = models((33, 17), 1)
    if name == "slerp":
        found = [f("slerp", [factor * a], {"t": 0.3}, a) for f in (weft, mergekit)]
    else:
        found = [f("nuslerp", [a, factor * a], {"weight": [0.7, 0.3]}) for f in (weft, mergekit)]
    # both take the line: the same three roundings
    torch.testing.assert_close(*found, rtol=4 * UNIT, atol=4 * UNIT * a.abs().max().item())


@pytest.mark.parametrize("weight", [[1.0, -1.0], [0.0, 2.0], [3.0, -1.0]])
def test_nuslerp_with_unusual_weights(mergekit: Merge, weight: list[float]) -> None:
    assert_same(mergekit, "nuslerp", models((33, 17), 2), {"weight": weight})


def test_zero_tensors(mergekit: Merge) -> None:
    (a,) = models((33, 17), 1)
    zero = torch.zeros_like(a)
    for name, tensors, parameters, base in [
        ("slerp", [zero], {"t": 0.3}, a),
        ("nuslerp", [a, zero], {"weight": [0.7, 0.3]}, None),
        ("nuslerp", [a, zero], {"weight": [0.7, 0.3], "nuslerp_flatten": False}, None),
        ("multislerp", [a, zero], {"weight": [0.7, 0.3]}, None),
        ("karcher", [a, zero, 2 * a], {}, None),
        ("karcher", [zero, zero], {}, None),
        ("model_stock", [zero, 2 * a], {}, a),
        ("arcee_fusion", [zero], {}, zero),
    ]:
        torch.testing.assert_close(
            weft(name, tensors, parameters, base),
            mergekit(name, tensors, parameters, base),
            rtol=8 * UNIT,
            atol=8 * UNIT * a.abs().max().item(),
        )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("with_base", [False, True])
@pytest.mark.parametrize("parameters", [{}, {"normalize_weights": False}, {"eps": 1e-5}])
def test_multislerp(mergekit: Merge, shape: tuple[int, ...], with_base: bool, parameters: dict[str, Any]) -> None:
    base, *tensors = models(shape, 5)
    assert_same(
        mergekit, "multislerp", tensors, {"weight": [0.6, 0.2, 0.9, 0.4], **parameters}, base if with_base else None
    )


def test_multislerp_of_opposites_is_their_mean(mergekit: Merge) -> None:
    (a,) = models((33, 17), 1)
    assert_same(mergekit, "multislerp", [a, -a], {"weight": [1.0, 1.0]})


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("count", [2, 3, 6])
@pytest.mark.parametrize("parameters", [{}, {"max_iter": 1}, {"tol": 1e-3}, {"max_iter": 40, "tol": 1e-9}])
def test_karcher(mergekit: Merge, shape: tuple[int, ...], count: int, parameters: dict[str, Any]) -> None:
    # independent directions, for which ten steps are not enough for float32
    tensors = [torch.randn(shape, generator=torch.Generator().manual_seed(i)) + 0.3 for i in range(count)]
    assert_same(mergekit, "karcher", tensors, parameters)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("scale", [1.0, 1e-4])
@pytest.mark.parametrize("filter_wise", [False, True])
def test_model_stock(mergekit: Merge, shape: tuple[int, ...], count: int, scale: float, filter_wise: bool) -> None:
    (base,) = models(shape, 1)
    # zeros at the base, so that differences of 1e-4 are not rounded before mergekit's threshold on lengths sees them
    tensors = [scale * t for t in models(shape, count, seed=5)]
    assert_same(mergekit, "model_stock", tensors, {"filter_wise": filter_wise}, torch.zeros_like(base))
    if scale == 1:
        assert_same(mergekit, "model_stock", tensors, {"filter_wise": filter_wise}, 0.1 * base)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("t", [0.0, 1e-7, 0.2, 10.0])
def test_nearswap(mergekit: Merge, shape: tuple[int, ...], t: float) -> None:
    base, other = models(shape, 2)
    assert_same(mergekit, "nearswap", [other], {"t": t}, base)


@pytest.mark.parametrize("shape", [*SHAPES, (5, 1), (300, 301)])
@pytest.mark.parametrize("size", [0.05, 1.0, 40.0])
def test_arcee_fusion(mergekit: Merge, shape: tuple[int, ...], size: float) -> None:
    base, other = (size * t for t in models(shape, 2, seed=1))
    ours = weft("arcee_fusion", [other], {}, base)
    theirs = mergekit("arcee_fusion", [other.double()], {}, base.double())
    # mergekit adds the difference to the base, which float64 rounds far below float32's unit
    taken = (theirs - other).abs() < (theirs - base).abs()
    # for these seeds no element is so near to the threshold that rounding its importance to float32 decides
    assert torch.equal(ours, torch.where(taken, other, base))
    assert shape[-1] == 1 or taken.numel() < 10 or 0 < taken.sum() < taken.numel() / 2


@pytest.mark.parametrize("scale", [None, 0.0, -0.7])
def test_passthrough(mergekit: Merge, scale: float | None) -> None:
    tensors = models((33, 17), 1)
    parameters = {} if scale is None else {"scale": scale}
    assert torch.equal(weft("passthrough", tensors, parameters), mergekit("passthrough", tensors, parameters))


@pytest.mark.parametrize(
    "name", ["slerp", "nuslerp", "multislerp", "karcher", "model_stock", "nearswap", "arcee_fusion", "passthrough"]
)
def test_parameters_and_defaults_are_those_of_mergekit(mergekit: Merge, name: str) -> None:
    from mergekit import merge_methods

    ours = row_for(name).parameters
    by_key = {**ours, **{p.per_model: p for p in ours.values() if p.per_model}}
    for theirs in merge_methods.get(name).spec.parameters:
        assert theirs.name in by_key, f"mergekit's parameter {theirs.name} is unknown"
        if not theirs.required and theirs.default is not None:
            assert by_key[theirs.name].default == theirs.default, theirs.name
        if theirs.required and theirs.name != "weight":
            assert by_key[theirs.name].required, theirs.name
