"""Every weight function, and every variant, keeps the contract."""

import pytest

from weft.contract import run_battery
from weft.function import FunctionMethod
from weft.registry import methods

NUMBER_OF_CHECKS = 31
ROWS = sorted(name for name, row in methods().items() if isinstance(row, FunctionMethod))


@pytest.mark.parametrize("name", ROWS)
def test_contract(name: str) -> None:
    results = run_battery(methods()[name])
    assert len(results) == NUMBER_OF_CHECKS
    assert [r for r in results if r["outcome"] == "failed"] == []
    assert len([r for r in results if r["outcome"] == "expected"]) <= 2


def test_there_are_rows() -> None:
    assert {"lora", "sigma_reparam", "weight_standardization"} <= set(ROWS)
