"""Every layer keeps the contract."""

import dataclasses

import pytest
import torch
from torch import nn

from weft.contract.layers import run
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


def test_a_bad_layer_fails() -> None:
    results = {
        r["check"]: r["outcome"] for r in run(LayerMethod("bad", "normalize", BadConfig, "no", "train", layer=Bad))
    }
    failed = {c for c, o in results.items() if o == "failed"}
    assert failed >= {
        "shape and dtype are kept",
        "evaluation repeats itself and changes nothing",
        "samples are independent in evaluation",
        "statistics move in training only where the row says so",
        "compiles whole",
        "zeros are harmless",
        "gains start at one, shifts at zero",
        "wrong sizes are refused",
        "documented",
    }
