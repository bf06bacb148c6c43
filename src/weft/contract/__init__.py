"""The contract that every method of a family keeps, as checks that run on a registry row.

The test suite runs :func:`run_battery` on all rows; ``weft test-method`` runs it on one, a plugin's included.
"""

from __future__ import annotations

from typing import Any

from weft.errors import RecipeError
from weft.method import Method


def run_battery(method: Method) -> list[dict[str, Any]]:
    """Run every check of the method's kind.

    Returns:
        For each check its name, "passed", "failed" or "expected", and the reason for the latter two.
    """
    from weft.contract import merging
    from weft.engine.merging import MergeMethod

    if isinstance(method, MergeMethod):
        return merging.run(method)
    raise RecipeError(f"There is no contract battery for {method.name} (family {method.family}).")
