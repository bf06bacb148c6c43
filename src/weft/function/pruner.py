"""What a pruning method's registry row says: methods that put zeros into a trained layer's weights.

A configuration's ``mask(name, weight, statistics)`` says which weights stay; its ``change`` of the same arguments gives the
matrix with zeros, which is what :func:`weft.calibrate.rewrite` calls for every layer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from weft.method import Method


class PruneConfig(Protocol):
    """A configuration that chooses weights of one layer; it has the fields ``sparsity``, ``keep`` and ``group``."""

    def mask(self, name: str, weight: Tensor, statistics: Any) -> Tensor:
        """Which weights stay: (out, in) bool, by a layer's name, its matrix and a :class:`weft.calibrate.Statistics`."""

    def change(self, name: str, weight: Tensor, statistics: Any) -> Tensor:
        """The matrix (out, in) with zeros."""


@dataclass(frozen=True, kw_only=True)
class PruneMethod(Method):
    """A registry row of a method that removes weights.

    Attributes:
        writes: the public function that writes a pruned model.
        statistics: which statistics of a layer's inputs it reads, kinds of :data:`weft.calibrate.collectors.KINDS`; none
            for a method without data.
        within: what loses the share ``sparsity`` of its weights, rounded down: each ``"row"``, or the whole ``"matrix"``.
    """

    writes: Callable[..., Any]
    statistics: tuple[str, ...] = ()
    within: str = "row"
