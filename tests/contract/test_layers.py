"""Every layer keeps the contract."""

import dataclasses

import pytest
import torch
from torch import nn

from weft.contract.layers import CHECKS, run
from weft.function.layer import LayerMethod
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
