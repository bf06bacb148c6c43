"""What a pruning method's registry row says: methods that put zeros into a trained layer's weights.

A configuration is a :class:`weft.calibrate.Change`; its ``mask(name, weight, statistics)`` says which weights stay, and its
``fit`` of the same arguments gives the matrix with zeros.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from weft.method import Method


class PruneConfig(Protocol):
    """A configuration that chooses weights of one layer; it has the fields ``sparsity``, ``keep`` and ``group``."""

    def mask(self, name: str, weight: Tensor, statistics: Any) -> Tensor:
        """Which weights stay: (out, in) bool, by a layer's name, its matrix and a :class:`weft.calibrate.Statistics`."""

    def fit(self, name: str, weight: Tensor, statistics: Any) -> Tensor:
        """The matrix (out, in) with zeros."""


@dataclass(frozen=True, kw_only=True)
class PruneMethod(Method):
    """A registry row of a method that removes weights.

    Attributes:
        within: what loses the share ``sparsity`` of its weights, rounded down: each ``"row"``, or the whole ``"matrix"``.
    """

    within: str = "row"
