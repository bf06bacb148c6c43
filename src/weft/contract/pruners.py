"""What every pruning method promises, whatever it takes a weight's worth from."""

from __future__ import annotations

import json
import math
import tempfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from weft.calibrate import Change, Statistics, collect
from weft.calibrate.facts import Facts
from weft.contract.outcome import adder, answers_typos, outcome
from weft.errors import RecipeError
from weft.function.pruner import PruneMethod

ROWS, COLUMNS = 12, 40
SHARES = (0.0, 0.07, 0.29, 0.5, 0.7, 0.9, 1.0)  # 0.29 · 100 and 0.7 · 10 are a little less than whole
PATTERNS = ((2, 4), (1, 4), (4, 8), (8, 8))
CHECKS: dict[str, Callable[[PruneMethod], None]] = {}


def _kinds(method: PruneMethod) -> tuple[str, ...]:
    """Of statistics that it reads."""
    kinds: tuple[str, ...] = method.configure({}).needs
    return kinds


def run(method: PruneMethod) -> list[dict[str, Any]]:
    """All checks on one row.

    Returns:
        For each check its name, "passed" or "failed", and the reason for the latter.
    """
    return [outcome(name, check, method) for name, check in CHECKS.items()]


_check = adder(CHECKS)


def _weight(rows: int = ROWS, columns: int = COLUMNS) -> Tensor:
    return 0.05 * torch.randn(rows, columns)


def _inputs(columns: int = COLUMNS) -> Tensor:
    """Correlated ones of different sizes."""
    x = torch.randn(8 * columns, columns) @ torch.randn(columns, columns)
    return x * torch.randn(columns).exp()


def _gathered(method: PruneMethod, x: Tensor) -> Statistics:
    """Statistics of a layer called ``layer`` that is given ``x``."""
    if not _kinds(method):
        return Statistics({}, Facts())
    model = nn.Sequential(OrderedDict(layer=nn.Linear(x.shape[1], 1)))
    return collect(model, [x], _kinds(method))


def _mask(method: PruneMethod, weight: Tensor, statistics: Statistics, **values: Any) -> Tensor:
    made: Tensor = method.configure(values).mask("layer", weight, statistics)
    return made


def _changed(method: PruneMethod, weight: Tensor, statistics: Statistics, **values: Any) -> Tensor:
    made: Tensor = method.configure(values).fit("layer", weight, statistics)
    return made


def _refused(
    method: PruneMethod, words: tuple[str, ...], weight: Tensor, statistics: Statistics, **values: Any
) -> None:
    for function in (_mask, _changed):
        try:
            function(method, weight, statistics, **values)
        except RecipeError as error:
            assert any(w in str(error) for w in words), f"the message names none of {', '.join(words)}: {error}"
        else:
            raise AssertionError(f"{list(weight.shape)} {weight.dtype} with {values} was let through")


@_check("a mask of the weight's shape")
def _shape(method: PruneMethod) -> None:
    weight, statistics = _weight(), _gathered(method, _inputs())
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        for pattern in ({"sparsity": 0.3}, {"keep": 2, "group": 4}):
            mask = _mask(method, weight.to(dtype), statistics, **pattern)
            assert mask.shape == weight.shape, f"{list(weight.shape)} became {list(mask.shape)}"
            assert mask.dtype == torch.bool, f"{dtype}: a mask of {mask.dtype}"
            wide = _mask(method, weight.to(dtype).double(), statistics, **pattern)
            assert torch.equal(mask, wide), f"{dtype} and its own values in float64 differ"


@_check("zeros where the mask says so, the rest as it was")
def _zeros(method: PruneMethod) -> None:
    statistics = _gathered(method, _inputs())
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        weight = _weight().to(dtype)
        mask, found = _mask(method, weight, statistics), _changed(method, weight, statistics)
        assert found.shape == weight.shape, f"{list(weight.shape)} became {list(found.shape)}"
        assert found.dtype == dtype, f"{dtype} became {found.dtype}"
        assert torch.equal(found[mask], weight[mask]), f"{dtype}: a weight that stays was changed"
        assert not bool(found[~mask].any()), f"{dtype}: a weight that goes is not zero"
        assert not bool(found[~mask].signbit().any()), f"{dtype}: zeros are negative"


@_check("the share is exact")
def _share(method: PruneMethod) -> None:
    few = _weight(5, 100).mul(20).round()  # many equal scores
    for weight in (_weight(), _weight(5, 100), _weight(3, 10), few, torch.ones(4, 7), torch.zeros(4, 7)):
        statistics = _gathered(method, _inputs(weight.shape[1]))
        for share in SHARES:
            removed = (~_mask(method, weight, statistics, sparsity=share)).sum(1)
            if method.within == "row":
                expected = math.floor(round(share * weight.shape[1], 6))
                assert bool((removed == expected).all()), f"{share} of {weight.shape[1]} removes {removed.tolist()}"
            else:
                expected = math.floor(round(share * weight.numel(), 6))
                assert int(removed.sum()) == expected, f"{share} of {weight.numel()} removes {int(removed.sum())}"


@_check("so many of every group are kept")
def _pattern(method: PruneMethod) -> None:
    statistics = _gathered(method, _inputs())
    for weight in (_weight(), torch.ones(3, COLUMNS)):
        for keep, group in PATTERNS:
            kept = _mask(method, weight, statistics, keep=keep, group=group).unflatten(1, (-1, group)).sum(2)
            assert bool((kept == keep).all()), f"{keep} of every {group}: {kept.unique().tolist()} are kept"


@_check("what goes first stays away")
def _nested(method: PruneMethod) -> None:
    statistics = _gathered(method, _inputs())
    for weight in (_weight(), _weight().mul(20).round()):
        shares = [_mask(method, weight, statistics, sparsity=share) for share in SHARES]
        groups = [_mask(method, weight, statistics, keep=keep, group=8) for keep in (8, 5, 4, 1)]
        for less, more in [*pairwise(shares), *pairwise(groups)]:
            assert not bool((more & ~less).any()), "a weight comes back when more are removed"


@_check("zeros go first")
def _zeros_first(method: PruneMethod) -> None:
    weight, statistics = _weight(), _gathered(method, _inputs())
    for row in range(ROWS):
        weight[row, torch.randperm(COLUMNS)[: COLUMNS // 2]] = 0
    mask = _mask(method, weight, statistics)  # half of each row, or of all
    assert torch.equal(mask, weight != 0), "a zero is kept in the place of another weight"


@_check("a large weight stays")
def _large(method: PruneMethod) -> None:
    weight, statistics = _weight(), _gathered(method, _inputs())
    for pattern in ({"sparsity": 0.9}, {"keep": 1, "group": 4}):
        gone = ~_mask(method, weight, statistics, **pattern)
        place = gone[0].nonzero()[0, 0]
        grown = weight.clone()
        grown[0, place] = 1e6
        assert bool(_mask(method, grown, statistics, **pattern)[0, place]), f"{pattern}: the largest weight is removed"


@_check("scales and signs do not matter")
def _scales(method: PruneMethod) -> None:
    weight, x = _weight(), _inputs()
    statistics = _gathered(method, x)
    expected = _mask(method, weight, statistics)
    flipped = weight * (torch.randn(ROWS, COLUMNS) > 0).mul(2).sub(1)
    assert torch.equal(_mask(method, flipped, statistics), expected), "signs of weights matter"
    for factor in (2.0**-90, 2.0**90):  # powers of two round nothing
        assert torch.equal(_mask(method, factor * weight, statistics), expected), f"weights times {factor:.3g} matter"
    for factor in (2.0**-20, 2.0**20):
        found = _mask(method, weight, _gathered(method, factor * x))
        assert torch.equal(found, expected), f"inputs times {factor:.3g} matter"


@_check("the order of units does not matter")
def _order(method: PruneMethod) -> None:
    weight, x = _weight(), _inputs()
    rows, columns = torch.randperm(ROWS), torch.randperm(COLUMNS)
    expected = _mask(method, weight, _gathered(method, x), sparsity=0.3)
    moved = _mask(method, weight[rows][:, columns], _gathered(method, x[:, columns]), sparsity=0.3)
    assert torch.equal(moved, expected[rows][:, columns]), "another order of units removes other weights"


@_check("dead inputs go first")
def _dead(method: PruneMethod) -> None:
    if not _kinds(method):
        return
    weight, x = _weight(), _inputs()
    dead = torch.randperm(COLUMNS)[: COLUMNS // 2]
    x[:, dead] = 0
    mask = _mask(method, weight, _gathered(method, x))
    assert not bool(mask[:, dead].any()), "a weight of an input that is always zero is kept in the place of another"


@_check("a layer that no data reached is pruned all the same")
def _unreached(method: PruneMethod) -> None:
    weight = _weight()
    nothing = Statistics({}, Facts(layers={"layer": ("layer", 0)}))
    mask = _mask(method, weight, nothing)
    assert int(mask.sum()) == weight.numel() // 2, f"{int(mask.sum())} of {weight.numel()} weights are kept"
    assert bool(weight[mask].abs().mean() > weight[~mask].abs().mean()), "the larger weights are removed"


@_check("statistics may come from a folder")
def _folder(method: PruneMethod) -> None:
    if not _kinds(method):
        return
    weight, statistics = _weight(), _gathered(method, _inputs())
    with tempfile.TemporaryDirectory() as folder:
        statistics.save(Path(folder) / "statistics")
        read = Statistics.load(Path(folder) / "statistics")
        expected, found = (_changed(method, weight, each) for each in (statistics, read))
    assert torch.equal(found, expected), "statistics that were saved give another result"


@_check("statistics that do not fit are refused")
def _other_statistics(method: PruneMethod) -> None:
    if not _kinds(method):
        return
    weight, good = _weight(), _gathered(method, _inputs())
    _refused(method, (str(COLUMNS),), weight, _gathered(method, _inputs(COLUMNS - 1)))
    _refused(method, ("not gathered",), weight, Statistics({}, good.facts))
    other = Statistics(
        {n.replace("layer", "layers"): torch.ones(1) for n in good.names}, Facts(layers={"layers": ("layers", 1)})
    )
    _refused(method, ("layers",), weight, other)


@_check("repeats itself")
def _repeats(method: PruneMethod) -> None:
    weight, statistics = _weight(), _gathered(method, _inputs())
    first = _mask(method, weight, statistics)
    torch.manual_seed(11)
    state = torch.random.get_rng_state()
    assert torch.equal(_mask(method, weight, statistics), first), "two calls differ"
    assert torch.equal(torch.random.get_rng_state(), state), "torch's global generator moved"


@_check("inputs are left as they are")
def _untouched(method: PruneMethod) -> None:
    weight, statistics = _weight().requires_grad_(), _gathered(method, _inputs())
    before = weight.detach().clone()
    held = {name: tensor for name, tensor in statistics._tensors.items() if isinstance(tensor, Tensor)}
    copies = {name: tensor.clone() for name, tensor in held.items()}
    with torch.no_grad():
        _changed(method, weight, statistics)
        found = _changed(method, weight, statistics, sparsity=0.0)
    assert torch.equal(weight.detach(), before), "the weight was changed"
    assert all(torch.equal(held[n], c) for n, c in copies.items()), "the statistics were changed"
    assert found.data_ptr() != weight.data_ptr(), "the result is the weight's memory"


@_check("memory may lie anyhow")
def _strides(method: PruneMethod) -> None:
    weight, statistics = _weight(), _gathered(method, _inputs())
    wide = torch.zeros(ROWS, 2 * COLUMNS)
    wide[:, ::2] = weight
    for pattern in ({"sparsity": 0.3}, {"keep": 2, "group": 4}):
        expected = _changed(method, weight, statistics, **pattern)
        for name, other in (("transposed", weight.T.contiguous().T), ("strided", wide[:, ::2])):
            assert not other.is_contiguous()
            found = _changed(method, other, statistics, **pattern)
            assert torch.equal(found, expected), f"{name} gives something else"


@_check("NaN and infinity are refused")
def _non_finite(method: PruneMethod) -> None:
    for bad in (math.nan, math.inf, -math.inf):
        weight = _weight()
        weight[1, 2] = bad
        _refused(method, ("NaN", "infinit"), weight, _gathered(method, _inputs()))


@_check("what is no matrix is refused")
def _no_matrix(method: PruneMethod) -> None:
    statistics = _gathered(method, _inputs())
    for bad in (torch.ones(COLUMNS), torch.ones(2, 3, COLUMNS), torch.ones(0, COLUMNS), torch.ones(2, COLUMNS).long()):
        _refused(method, ("matrix",), bad, statistics)


@_check("one row and one column")
def _small(method: PruneMethod) -> None:
    for rows, columns in ((1, COLUMNS), (ROWS, 1), (1, 1)):
        statistics = _gathered(method, _inputs(columns))
        for share in (0.0, 1.0):
            mask = _mask(method, _weight(rows, columns), statistics, sparsity=share)
            assert mask.shape == (rows, columns), f"{[rows, columns]} became {list(mask.shape)}"
            assert bool((mask == (share == 0)).all()), f"{[rows, columns]}: a share of {share} removes something else"


@_check("wrong shares and groups are refused")
def _wrong(method: PruneMethod) -> None:
    weight, statistics = _weight(), _gathered(method, _inputs())
    _refused(method, ("divide",), weight, statistics, keep=2, group=7)
    shares: list[tuple[str, dict[str, Any]]] = [("sparsity", {"sparsity": s}) for s in (-0.1, 1.1, math.nan)]
    for word, values in [*shares, ("keep", {"keep": 5, "group": 4}), ("keep", {"group": 4}), ("group", {"keep": 2})]:
        for make in (method.configure, lambda given: method.config(**given)):
            try:
                make(values)
            except RecipeError as error:
                assert word in str(error), f"the message does not name {word}: {error}"
            else:
                raise AssertionError(f"{values} was accepted")


@_check("configuration round trip")
def _configuration(method: PruneMethod) -> None:
    config = method.configure({})
    assert type(config)(**json.loads(json.dumps(asdict(config)))) == config, "it does not survive JSON"
    assert {"sparsity", "keep", "group"} <= method.parameters.keys(), f"parameters are {', '.join(method.parameters)}"
    answers_typos(method)


@_check("documented")
def _documented(method: PruneMethod) -> None:
    assert method.summary.endswith("."), "the summary is a sentence"
    assert method.paper or method.origin, "the row says neither its paper nor its origin"
    assert ">>>" in (method.config.__doc__ or ""), "the configuration has no example"
    assert issubclass(method.config, Change), "its configuration is no weft.calibrate.Change"
    assert method.within in ("row", "matrix"), f"the share is that of each {method.within!r}"
    assert (method.needs != "nothing") == bool(_kinds(method)), (
        f"needs {method.needs}, and its statistics are {_kinds(method)}"
    )
    for key, field in method.parameters.items():
        assert field.help, f"the parameter {key} has no help"
