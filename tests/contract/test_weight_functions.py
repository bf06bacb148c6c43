"""Every weight function, and every variant, keeps the contract; and the contract notices who does not."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from weft.contract import adapters, functions, run_battery, surroundings
from weft.contract.pair import HOW
from weft.function import FunctionMethod, WeightFunction
from weft.function.protocol import Inner
from weft.method import parameter
from weft.registry import methods

NUMBER_OF_CHECKS = 31
NUMBER_OF_ADAPTER_CHECKS = 10  # beside these
CHECKS = functions.CHECKS | surroundings.CHECKS
ROWS = sorted(name for name, row in methods().items() if isinstance(row, FunctionMethod))


@pytest.mark.parametrize("name", ROWS)
def test_contract(name: str) -> None:
    results = run_battery(methods()[name])
    assert len(results) == NUMBER_OF_CHECKS + NUMBER_OF_ADAPTER_CHECKS * methods()[name].adapter
    assert [r for r in results if r["outcome"] == "failed"] == []
    assert len([r for r in results if r["outcome"] == "expected"]) <= 2


def test_there_are_rows() -> None:
    assert {"lora", "sigma_reparam", "weight_standardization"} <= set(ROWS)


def test_exceptions_are_of_checks_and_rows_that_there_are() -> None:
    assert functions.EXPECTED.keys() <= CHECKS.keys() | adapters.CHECKS.keys()
    assert {row for rows in functions.EXPECTED.values() for row in rows} <= set(ROWS)
    assert surroundings.EXPECTED_WAYS.keys() <= set(ROWS)
    assert {way for ways, _ in surroundings.EXPECTED_WAYS.values() for way in ways} < set(HOW)


class Good(WeightFunction):
    """One number a row times the weight; subclasses break one promise each."""

    has_product = True
    has_update = True

    def __init__(self, weight: Tensor):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(weight.shape[0], dtype=weight.dtype))
        self.register_buffer("steps", torch.zeros(1))
        self.rest = [1] * (weight.dim() - 1)

    def forward(self, stored: Tensor) -> Tensor:
        return stored * self.gain.reshape(-1, *self.rest)

    def product(self, x: Tensor, inner: Inner) -> Tensor:
        y = inner(x)
        return (y * self.gain).to(y.dtype)

    def update(self, stored: Tensor) -> None:
        self.steps.add_(1)


class ScalarParameter(Good):
    def __init__(self, weight: Tensor):
        super().__init__(weight)
        self.gain = nn.Parameter(torch.ones((), dtype=weight.dtype))


class StartsElsewhere(Good):
    def forward(self, stored: Tensor) -> Tensor:
        return super().forward(stored) * 1.01

    def product(self, x: Tensor, inner: Inner) -> Tensor:
        return super().product(x, inner) * 1.01


class WrongProduct(Good):
    def product(self, x: Tensor, inner: Inner) -> Tensor:
        return inner(x)


class ForgetsState(Good):
    def __init__(self, weight: Tensor):
        super().__init__(weight)
        self.secret = torch.rand(1, dtype=weight.dtype)

    def forward(self, stored: Tensor) -> Tensor:
        return super().forward(stored) * self.secret

    def product(self, x: Tensor, inner: Inner) -> Tensor:
        return super().product(x, inner) * self.secret


class HoldsALambda(Good):
    def __init__(self, weight: Tensor):
        super().__init__(weight)
        self.square = lambda value: value * value


class NoGradient(Good):
    def forward(self, stored: Tensor) -> Tensor:
        return super().forward(stored.detach())


class UnusedParameter(Good):
    def __init__(self, weight: Tensor):
        super().__init__(weight)
        self.unused = nn.Parameter(torch.ones(2, dtype=weight.dtype))


class BranchesOnValues(Good):
    has_product = False

    def forward(self, stored: Tensor) -> Tensor:
        return super().forward(stored) if stored.sum() > -1e9 else stored


class CompilesEachAnew(Good):
    made = 0

    def __init__(self, weight: Tensor):
        super().__init__(weight)
        CompilesEachAnew.made += 1
        self.number = CompilesEachAnew.made

    def product(self, x: Tensor, inner: Inner) -> Tensor:
        return super().product(x, inner) * (self.number / self.number)


class CountsInForward(Good):
    def forward(self, stored: Tensor) -> Tensor:
        self.steps += 1
        return super().forward(stored)

    def product(self, x: Tensor, inner: Inner) -> Tensor:
        self.steps += 1
        return super().product(x, inner)


class ChangesWhatBackwardNeeds(Good):
    def forward(self, stored: Tensor) -> Tensor:
        return (super().forward(stored) * self.steps).to(stored.dtype)

    def product(self, x: Tensor, inner: Inner) -> Tensor:
        return (super().product(x, inner) * self.steps).to(x.dtype)


class LowPrecision(Good):
    def forward(self, stored: Tensor) -> Tensor:
        return (super().forward(stored)).to(torch.bfloat16).to(stored.dtype)


class LeftBehindByACast(Good):
    def __init__(self, weight: Tensor):
        super().__init__(weight)
        self.identity = torch.eye(weight.shape[-1], dtype=weight.dtype)

    def forward(self, stored: Tensor) -> Tensor:
        return super().forward(stored @ self.identity)

    def product(self, x: Tensor, inner: Inner) -> Tensor:
        return super().product(x @ self.identity, inner)


class NoisyInEvaluation(Good):
    has_product = False

    def forward(self, stored: Tensor) -> Tensor:
        return super().forward(stored) + 1e-3 * torch.randn_like(stored)


class ReadsValuesWhenBuilt(Good):
    def __init__(self, weight: Tensor):
        super().__init__(weight)
        self.first = float(weight.flatten()[0])


class DividesByZero(Good):
    has_product = False

    def forward(self, stored: Tensor) -> Tensor:
        return super().forward(stored) * (stored.norm() / stored.norm())


class OnlyFitsOneAxis(Good):
    def __init__(self, weight: Tensor):
        super().__init__(weight)
        assert weight.shape[0] != 8


class Freezes(Good):
    def __init__(self, weight: Tensor):
        super().__init__(weight)
        self.gain.requires_grad_(False)


BROKEN: dict[type[Good], str] = {
    ScalarParameter: "shape, dtype and device",
    OnlyFitsOneAxis: "shape, dtype and device",
    StartsElsewhere: "documented start",
    WrongProduct: "product equals the dense path",
    ForgetsState: "state dict into a fresh model",
    HoldsALambda: "pickle",
    NoGradient: "gradients",
    UnusedParameter: "training reaches every parameter",
    Freezes: "training reaches every parameter",
    BranchesOnValues: "compiles whole",
    CompilesEachAnew: "equal blocks compile once",
    CountsInForward: "checkpointing",
    ChangesWhatBackwardNeeds: "two forward passes before one backward",
    LowPrecision: "bake equals forward",
    LeftBehindByACast: "bfloat16",
    NoisyInEvaluation: "evaluation changes nothing",
    ReadsValuesWhenBuilt: "meta device",
    DividesByZero: "zeros and constants",
}


@dataclass(frozen=True)
class Config:
    """Broken.

    Source: none.

    >>> 1
    1
    """

    number: int = parameter(0, "which of the broken ones")

    def build(self, weight: Tensor, *, batched: bool) -> WeightFunction:
        return [Good, *BROKEN][self.number](weight)


def row(number: int) -> FunctionMethod:
    return FunctionMethod(
        name="broken", family="none", config=Config, summary="Broken.", goal="train", origin="here",
        defaults={"number": number},
    )  # fmt: skip


@pytest.mark.parametrize("number", range(1, len(BROKEN) + 1), ids=lambda n: [Good, *BROKEN][n].__name__)
def test_a_broken_promise_is_noticed(number: int) -> None:
    check = CHECKS[BROKEN[[Good, *BROKEN][number]]]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        with pytest.raises(Exception):  # noqa: B017  what a check raises, the battery reports
            check(row(number))


@pytest.mark.parametrize("check", [c for n, c in CHECKS.items() if n != "distributed training"])
def test_a_good_one_passes(check: Callable[[FunctionMethod], None]) -> None:
    check(row(0))


def test_failures_are_reported_with_their_reason() -> None:
    few = {n: CHECKS[n] for n in ("documented start", "pickle", "documented")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(functions, "CHECKS", few)
        patch.setattr(surroundings, "CHECKS", {})
        number = 1 + list(BROKEN).index(HoldsALambda)
        results = {r["check"]: r for r in functions.run(row(number))}
        assert results["documented start"]["outcome"] == "passed"
        assert results["pickle"]["outcome"] == "failed"
        assert "lambda" in results["pickle"]["reason"]
        patch.setitem(functions.EXPECTED, "pickle", {"broken": "it is for the test"})
        assert {r["check"]: r for r in functions.run(row(number))}["pickle"] == {
            "check": "pickle", "outcome": "expected", "reason": "it is for the test"
        }  # fmt: skip
