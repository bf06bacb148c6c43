"""What a quantiser's registry row says: methods that put a trained layer's weights on few values.

A configuration's ``change(name, weight, statistics)`` is what :func:`weft.calibrate.rewrite` calls for every layer; the row
gives the codes behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from weft.method import Method


@dataclass(frozen=True)
class QuantizeMethod(Method):
    """A registry row of a quantiser of weights.

    Attributes:
        writes: the public function that writes a quantised model.
        quantize: ``quantize(weight, config, gram)`` -> codes: a named tuple with the integers as ``codes`` (out, in). gram
            (in, in) is Σ xᵀx of the layer's inputs, which methods without data ignore.
        dequantize: ``dequantize(codes)`` -> (out, in) float32, exactly what ``config.change`` returns.
        codes: the lowest and the highest code of a configuration.
        error: ‖W − Ŵ‖ / ‖W‖ to be expected for normal weights and white inputs with the default configuration, within a
            tenth.
        finer: a parameter and its values from the coarsest to the finest; the error falls along them.
        group: the parameter that says how many weights share a scale.
        ragged: whether the inputs need not divide into groups.
        refits: why quantising a quantised weight moves it; empty if it does not.
    """

    writes: Callable[..., Any] = lambda: None
    quantize: Callable[[Tensor, Any, Tensor], Any] = lambda weight, config, gram: None
    dequantize: Callable[[Any], Tensor] = lambda codes: codes
    codes: Callable[[Any], tuple[int, int]] = lambda config: (0, 15)
    error: float = 0.0
    finer: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    group: str = "group_size"
    ragged: bool = False
    refits: str = ""
