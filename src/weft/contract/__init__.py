"""The contract that every method of a family keeps, as checks that run on a registry row.

The test suite runs :func:`run_battery` on all rows; ``weft test-method`` runs it on one, a plugin's included.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from weft.errors import RecipeError
from weft.method import Method


def battery(method: Method) -> Callable[[Any], list[dict[str, Any]]]:
    """The battery of the method's kind.

    Raises:
        RecipeError: there is none.
    """
    from weft.engine.merging import MergeMethod

    if isinstance(method, MergeMethod):  # without loading torch
        from weft.contract import merging

        return merging.run

    from weft.symmetry.alignment import AlignMethod

    if isinstance(method, AlignMethod):
        from weft.contract import alignments

        return alignments.run

    from weft.function.initializer import InitMethod
    from weft.function.layer import LayerMethod
    from weft.function.optimizer import OptimizerMethod
    from weft.function.protocol import FunctionMethod
    from weft.function.pruner import PruneMethod
    from weft.function.quantizer import QuantizeMethod

    if isinstance(method, FunctionMethod):
        from weft.contract import functions

        return functions.run
    if isinstance(method, LayerMethod):
        from weft.contract import layers

        return layers.run
    if isinstance(method, InitMethod):
        from weft.contract import initializers

        return initializers.run
    if isinstance(method, OptimizerMethod):
        from weft.contract import optimizers

        return optimizers.run
    if isinstance(method, QuantizeMethod):
        from weft.contract import quantizers

        return quantizers.run
    if isinstance(method, PruneMethod):
        from weft.contract import pruners

        return pruners.run
    raise RecipeError(f"There is no contract battery for {method.name} (family {method.family}).")


def run_battery(method: Method) -> list[dict[str, Any]]:
    """Run every check of the method's kind.

    Returns:
        For each check its name, "passed", "failed" or "expected", and the reason for the latter two.
    """
    return battery(method)(method)
