"""Take one model as it is, or scaled: what stacks of layers are built from.

mergekit's ``passthrough``. No paper.

    W = scale · W₁        W₁ any shape

With slices, layers of several models (or the same ones twice) become one deeper model; ``scale`` may differ by layer
and by tensor, such as 0 for the output projections of repeated layers, which then do nothing at first.

Differences from mergekit: none in the numbers.
Complexity: one pass. Re-implemented from the equation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from weft.engine.chunks import Chunk
from weft.engine.merging import MergeMethod, merge_tensors
from weft.method import configure, parameter, per_model


@dataclass(frozen=True)
class Passthrough:
    """Configuration of :func:`passthrough`."""

    scale: float | tuple[float, ...] = parameter(1.0, "factor of the weights", per_model="scale")


def passthrough(tensor: Any, *, scale: float = 1.0) -> Any:
    """One tensor or state dict, scaled.

    Args:
        tensor: torch or numpy tensor (any shape) or a state dict.
        scale: factor of every element.

    Returns:
        The scaled copy, in the form and dtype of ``tensor``.

    Raises:
        CheckpointError: a tensor is not of floating point.

    Source: mergekit's passthrough.

    >>> import numpy as np
    >>> from weft.merge.passthrough import passthrough
    >>> passthrough(np.float32([1, -2]), scale=0.5)
    array([ 0.5, -1. ], dtype=float32)
    """
    return merge_tensors(METHODS[0], [tensor], configure(Passthrough, {"scale": scale}, "passthrough"))


def _combine(chunk: Chunk, config: Passthrough, state: None, out: np.ndarray) -> None:
    (scale,) = per_model(config.scale, 1, "scale")
    np.multiply(chunk.tensors[0], np.float32(scale), out=out)


METHODS = (
    MergeMethod(
        name="passthrough",
        family="merge",
        config=Passthrough,
        summary="One model as it is, or scaled; with slices, a stack of layers.",
        goal="combine",
        origin="mergekit passthrough",
        combine=_combine,
        models=(1, 1),
        function=passthrough,
        checked_by=("closed form", "mergekit"),
    ),
)
