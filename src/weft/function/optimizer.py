"""What an optimizer's registry row says.

A configuration's ``build(model)`` makes the optimizer with the parameter groups that the method needs; the class itself
takes parameters or groups, as those of torch do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import nn
from torch.optim import Optimizer

from weft.method import Method


class OptimizerConfig(Protocol):
    """A configuration that knows how to build its optimizer."""

    def build(self, model: nn.Module) -> Optimizer:
        """The optimizer for the parameters of a model that train."""


@dataclass(frozen=True)
class OptimizerMethod(Method):
    """A registry row of an optimizer that keeps the contract of torch's.

    Attributes:
        optimizer: its class.
        trial: parameters for the small model of the contract battery, where the defaults do not fit 10 × 24 matrices.
    """

    optimizer: type[Optimizer] = Optimizer
    trial: Mapping[str, Any] = field(default_factory=dict)

    def build(self, config: Any, model: nn.Module) -> Optimizer:
        """The optimizer that a configuration describes."""
        made: Optimizer = config.build(model)
        return made
