"""Every merge method, and every variant, keeps the contract."""

import pytest

from weft.contract import battery, run_battery
from weft.engine.merging import MergeMethod
from weft.registry import methods

NUMBER_OF_CHECKS = 17
ROWS = sorted(name for name, row in methods().items() if isinstance(row, MergeMethod))


@pytest.mark.parametrize("name", ROWS)
def test_contract(name: str) -> None:
    results = run_battery(methods()[name])
    assert len(results) == NUMBER_OF_CHECKS
    assert [r for r in results if r["outcome"] == "failed"] == []
    assert len([r for r in results if r["outcome"] == "expected"]) <= 2


def test_every_row_is_covered() -> None:
    assert all(callable(battery(row)) for row in methods().values())
