"""Every quantiser keeps the contract."""

import dataclasses
from collections import namedtuple

import pytest
import torch

from weft.contract import run_battery
from weft.contract.quantizers import CHECKS, run
from weft.function.quantizer import QuantizeMethod
from weft.method import parameter
from weft.registry import methods

NUMBER_OF_CHECKS = 16
ROWS = {name: row for name, row in methods().items() if isinstance(row, QuantizeMethod)}
# Quantising again moves what these gave; each row says why.
REFIT = {
    "adaround", "flexround", "fp4", "gptq", "gradient-ptq", "hqq", "lrq", "nf4", "nupes", "powerquant", "signround", "zeroquant-fp",
}  # fmt: skip


def test_rows() -> None:
    assert set(ROWS) == {*REFIT, "fp8", "rtn"}


@pytest.mark.parametrize("name", sorted(ROWS))
def test_contract(name: str) -> None:
    results = run_battery(ROWS[name])
    assert len(results) == NUMBER_OF_CHECKS
    assert [r for r in results if r["outcome"] == "failed"] == []
    assert [r["check"] for r in results if r["outcome"] == "expected"] == (
        ["a quantised weight stays"] if name in REFIT else []
    )


Made = namedtuple("Made", ["codes"])
calls: list[int] = []


@dataclasses.dataclass(frozen=True)
class Bad:
    """Breaks what it can: it lets everything through, changes what it is given, and draws."""

    group_size: int = parameter(8, "")
    bits: int = parameter(4, "")
    made: float = dataclasses.field(default_factory=lambda: len(calls), compare=True, init=False)

    def change(self, name: str, weight: torch.Tensor, statistics: object) -> torch.Tensor:
        weight.detach().add_(1)
        return torch.rand(max(weight.shape[0], 1), 5)


@dataclasses.dataclass(frozen=True)
class Worse:
    """Breaks the rest: it is exact where memory is plain, and depends on how the weight lies."""

    group_size: int = parameter(8, "")

    def change(self, name: str, weight: torch.Tensor, statistics: object) -> torch.Tensor:
        calls.append(1)
        return (weight.detach() * 1.5 + len(calls)).float() * (2 if weight.is_contiguous() else 1)


def failures(config: type) -> set[str]:
    row = QuantizeMethod(
        "bad", "quantize", config, "no", "shrink",
        quantize=lambda weight, config, gram: Made(torch.zeros(3)), dequantize=lambda made: made.codes,
    )  # fmt: skip
    return {r["check"] for r in run(row) if r["outcome"] == "failed"}


def test_every_check_can_fail() -> None:
    assert failures(Bad) | failures(Worse) == set(CHECKS)
