"""Every initialiser keeps the contract."""

import dataclasses

import pytest
import torch
from torch import nn

from weft.contract.initializers import CHECKS, run
from weft.function.initializer import InitMethod
from weft.method import parameter
from weft.registry import methods

NUMBER_OF_CHECKS = 10
ROWS = {name: row for name, row in methods().items() if isinstance(row, InitMethod)}


@pytest.mark.parametrize("name", sorted(ROWS))
def test_contract(name: str) -> None:
    results = run(ROWS[name])
    assert len(results) == NUMBER_OF_CHECKS
    assert [r for r in results if r["outcome"] != "passed"] == []


@dataclasses.dataclass(frozen=True)
class Config:
    scale: float = parameter(1.0, "")


def bad(model, generator, scale):
    """Breaks what it can."""
    model.to(torch.float32)
    model.bias = nn.Parameter(torch.randn(3))
    if not hasattr(model, "parametrizations"):
        model.weight = nn.Parameter(torch.randn(3, 3) * float("nan"))
    model.eval()
    model.bias.requires_grad_(False)
    torch.set_grad_enabled(True)


def worse(model, generator, scale):
    """Breaks the rest: nothing repeats itself."""
    value = torch.rand((), generator=torch.Generator().manual_seed(0)) + len(counted)
    counted.append(1)
    with torch.no_grad():
        model.bias.fill_(value)


counted: list[int] = []


def test_every_check_can_fail() -> None:
    failed = set()
    for function in (bad, worse):
        row = InitMethod(
            "bad", "init", Config, "no", "train", function=function, apply=function, trial=lambda: nn.Linear(3, 3)
        )
        failed |= {r["check"] for r in run(row) if r["outcome"] == "failed"}
    assert failed == set(CHECKS)
