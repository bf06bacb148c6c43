"""Every layer keeps the contract."""

import dataclasses

import pytest
import torch
from torch import nn

from weft.contract.layers import CHECKS, run
from weft.function.layer import WHITE_NOISE, LayerMethod
from weft.method import parameter
from weft.registry import methods

NUMBER_OF_CHECKS = 19
ROWS = {name: row for name, row in methods().items() if isinstance(row, LayerMethod)}
# The gradient in training is not the exact one, by design; each row says why.
APPROXIMATE = {"estimated_batch_norm", "power_norm", "unified_norm"}


@pytest.mark.parametrize("name", sorted(ROWS))
def test_contract(name: str) -> None:
    results = run(ROWS[name])
    assert len(results) == NUMBER_OF_CHECKS
    assert [r for r in results if r["outcome"] == "failed"] == []
    expected = [r["check"] for r in results if r["outcome"] == "expected"]
    assert expected == (["exact gradient in training"] if name in APPROXIMATE else [])


@dataclasses.dataclass(frozen=True)
class BadConfig:
    """A layer that breaks promises."""

    eps: float = parameter(1.0, "")

    def build(self, features: int) -> nn.Module:
        return Bad()


class Bad(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count.add_(1)
        x = x - x.mean(0, keepdim=True)
        return (x / x.abs().max().item()).float()[..., :2]


@dataclasses.dataclass(frozen=True)
class WorseConfig:
    """A layer that breaks the others.

    >>> WorseConfig().eps
    1.0
    """

    eps: float = parameter(1.0, "other than the layer's default")

    def build(self, features: int) -> nn.Module:
        return Worse()


class Worse(nn.Module):
    def __init__(self, *, eps: float = 2.0) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.ones(1))
        self.register_buffer("scale", torch.ones(1))
        self.hidden = torch.rand(())
        self.unpicklable = lambda x: x

    def __deepcopy__(self, memo: object) -> "Worse":
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = (2 * x.detach() - x) * self.scale + self.hidden
        if self.training:
            self.scale.add_(1)
            y = y + 1
        return y * 1.2 if x.dtype == torch.bfloat16 else y


def failures(config: type, layer: type) -> set[str]:
    row = LayerMethod("bad", "normalize", config, "no", "train", layer=layer)
    return {r["check"] for r in run(row) if r["outcome"] == "failed"}


def test_every_check_can_fail() -> None:
    assert failures(BadConfig, Bad) | failures(WorseConfig, Worse) == set(CHECKS)


class Start(nn.Module):
    """Times random numbers, or times two."""

    def __init__(self, random: bool) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(6) if random else torch.full((6,), 2.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale


@dataclasses.dataclass(frozen=True)
class StartConfig:
    random: bool = parameter(True, "")

    def build(self, features: int) -> nn.Module:
        return Start(self.random)


@pytest.mark.parametrize(
    ("random", "says", "outcome"),
    [
        (True, {"starts_as": WHITE_NOISE}, ""),
        (True, {"starts_as": WHITE_NOISE, "start_gain": 1.3}, "the row says 1.3"),
        (False, {"starts_as": WHITE_NOISE, "start_gain": 4.0}, "start alike"),
        (False, {"starts_as": lambda x: 2 * x}, ""),
        (False, {"starts_as": lambda x: 2.01 * x}, "differs by"),
        (False, {"starts_as": lambda x: 2.01 * x, "start_error": 0.031}, ""),
        (False, {"starts_as": "as it likes"}, "says nothing"),
        (False, {}, "neither a gain nor a shift"),
    ],
)
def test_every_start_is_checked(random: bool, says: dict[str, object], outcome: str) -> None:
    row = LayerMethod("start", "init", StartConfig, "no", "train", layer=Start, trial={"random": random}, **says)  # type: ignore[arg-type]
    (result,) = (r for r in run(row) if r["check"] == "starts as the row says")
    assert result["outcome"] == ("failed" if outcome else "passed")
    assert outcome in result["reason"]
