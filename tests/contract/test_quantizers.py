"""Every quantiser keeps the contract."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import pytest
import torch
from torch import Tensor

from weft.contract import run_battery
from weft.contract.quantizers import CHECKS, run
from weft.function.quantizer import QuantizeMethod
from weft.method import parameter
from weft.packed import Packed
from weft.registry import methods

NUMBER_OF_CHECKS = 18
ROWS = {name: row for name, row in methods().items() if isinstance(row, QuantizeMethod)}
# Quantising again moves what these gave; each row says why.
REFIT = {
    "adaround", "awq", "flexround", "fp4", "gptq", "gradient_ptq", "hqq", "lrq", "nf4", "nupes", "powerquant", "signround", "zeroquant_fp",
}  # fmt: skip

# What the mathematics forbids these; each row says why.
FORBIDDEN = {
    "jlcm": ["a quantised weight stays"],
    "kmeans_vq": ["a row of zeros stays one"],
    "shiftaddllm": [
        "a quantised weight stays", "a row of zeros stays one", "groups that do not divide the inputs",
    ],
    "mx": ["zeros and constants are harmless", "one row and one column"],
    "vptq": ["a row of zeros stays one"],
    "vq4dit": ["a row of zeros stays one"],
}  # fmt: skip


def test_rows() -> None:
    assert set(ROWS) == {*REFIT, *FORBIDDEN, "adadim", "fp8", "fp8_block", "nvfp4", "rtn", "smoothquant", "w8a8"}


@pytest.mark.parametrize("name", sorted(ROWS))
def test_contract(name: str) -> None:
    results = run_battery(ROWS[name])
    assert len(results) == NUMBER_OF_CHECKS
    assert [r for r in results if r["outcome"] == "failed"] == []
    assert [r["check"] for r in results if r["outcome"] == "expected"] == (
        FORBIDDEN.get(name, ["a quantised weight stays"] if name in REFIT else [])
    )


calls: list[int] = []


@dataclasses.dataclass(frozen=True, eq=False)
class Loose(Packed):
    """Values as they are, in a file twice as large as the weight, which brings others back."""

    form: ClassVar[str] = "loose"
    values: Tensor

    @property
    def codes(self) -> Tensor:
        return self.values

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.values), 1

    def dequantize(self) -> Tensor:
        return self.values

    def tensors(self) -> dict[str, Tensor]:
        return {"values": self.values.double()}

    def settings(self) -> dict[str, Any]:
        return {"form": self.form}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Self:
        return cls(tensors["values"] + 1)


@dataclasses.dataclass(frozen=True)
class Bad:
    """Breaks what it can: it lets everything through, changes what it is given, and draws."""

    group_size: int = parameter(8, "")
    bits: int = parameter(4, "")
    made: float = dataclasses.field(default_factory=lambda: len(calls), compare=True, init=False)

    def fit(self, name: str, weight: Tensor, statistics: object) -> Loose:
        weight.detach().add_(1)
        return Loose(torch.rand(max(weight.shape[0], 1), 5))


@dataclasses.dataclass(frozen=True)
class Worse:
    """Breaks the rest: it is exact where memory is plain, and depends on how the weight lies."""

    group_size: int = parameter(8, "")

    def fit(self, name: str, weight: Tensor, statistics: object) -> Loose:
        calls.append(1)
        return Loose((weight.detach() * 1.5 + len(calls)).float() * (2 if weight.is_contiguous() else 1))


def failures(config: type) -> set[str]:
    row = QuantizeMethod("bad", "quantize", config, "no", "shrink", codes=lambda config: (0, 15))
    return {r["check"] for r in run(row) if r["outcome"] == "failed"}


def test_every_check_can_fail() -> None:
    assert failures(Bad) | failures(Worse) == set(CHECKS)
