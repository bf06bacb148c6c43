"""What a quantiser's registry row says: methods that put a trained layer's weights on few values.

Its configuration is a :class:`weft.calibrate.Change` whose ``fit(name, weight, statistics)`` gives a packed weight
(:mod:`weft.packed`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from weft.method import Method


@dataclass(frozen=True)
class QuantizeMethod(Method):
    """A registry row of a quantiser of weights.

    Attributes:
        codes: the lowest and the highest code of a configuration, where the packed weight has ``codes``.
        error: ‖W − Ŵ‖ / ‖W‖ to be expected for normal weights and white inputs with the default configuration, within a
            tenth.
        finer: a parameter and its values from the coarsest to the finest; the error falls along them.
        group: the parameter that says how many weights share a scale; empty if there is none.
        ragged: whether the inputs need not divide into groups.
        refits: why quantising a quantised weight moves it; empty if it does not.
        exceptions: checks of the battery that the mathematics forbids, each with the reason.
        trial: values of parameters for the battery's small matrices, beside the group.
    """

    codes: Callable[[Any], tuple[int, int]] | None = None
    error: float = 0.0
    finer: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    group: str = "group_size"
    ragged: bool = False
    refits: str = ""
    exceptions: Mapping[str, str] = field(default_factory=dict)
    trial: Mapping[str, Any] = field(default_factory=dict)
