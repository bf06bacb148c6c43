"""What a layer's registry row says: norms and wrappers that a model is built from, where no weight is computed.

A configuration's ``build(features)`` makes the module; the row says what the module keeps between batches, and how
training differs from evaluation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn

from weft.method import Method

GAINS_AND_SHIFTS = "gains of one, shifts of zero"
WHITE_NOISE = "random, with a known gain of white noise"


class LayerConfig(Protocol):
    """A configuration that knows how to build its layer."""

    def build(self, features: int) -> nn.Module:
        """The layer for inputs with so many features."""


@dataclass(frozen=True)
class LayerMethod(Method):
    """A registry row of a layer that keeps the shape of its input.

    Attributes:
        layer: its class.
        axis: where the features lie: -1 in (…, features), 1 in (batch, features, …).
        space: how many axes follow (batch, features) where ``axis`` is 1.
        keeps_statistics: whether buffers change in training.
        training: how training differs from evaluation, in a sentence; empty if it does not.
        approximate: why the gradient in training is not the exact one; empty if it is.
        starts_as: what a new layer is. ``GAINS_AND_SHIFTS``: its parameters are gains of one and shifts of zero.
            ``WHITE_NOISE``: its weights are random, and white noise leaves it with ``start_gain`` times the mean square,
            on average over draws. A function: it computes that function of its input, within ``start_error`` on [-3, 3].
        start_gain, start_error: see there.
        trial: parameters for the contract battery where the defaults do not fit its small inputs.
    """

    layer: type[nn.Module] = nn.Module
    axis: int = -1
    space: int = 0
    keeps_statistics: bool = False
    training: str = ""
    approximate: str = ""
    starts_as: str | Callable[[Tensor], Tensor] = GAINS_AND_SHIFTS
    start_gain: float = 1.0
    start_error: float = 0.0
    trial: Mapping[str, Any] = field(default_factory=dict)

    def build(self, config: Any, features: int) -> nn.Module:
        """The layer that a configuration describes."""
        made: nn.Module = config.build(features)
        return made
