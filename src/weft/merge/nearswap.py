"""Move every weight of the base towards another model by at most t: small differences are taken over in full.

NearSwap, Alchemonaut, published with the model QuartetAnemoi-70B-t0.0001 (2024); mergekit's ``nearswap``. No paper.

    s = min(t / max(|W₁ − W₀|, 10⁻⁶), 1)        elementwise
    W = (1 − s) W₀ + s W₁                       W₀ the base, W₁ the other model (any shape)

So |W − W₀| = min(t, |W₁ − W₀|) wherever the difference is at least 10⁻⁶.

Differences from the original: none in the numbers.
Complexity: one pass. Re-implemented from the equation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from weft.engine.chunks import Chunk
from weft.engine.merging import MergeMethod, merge_tensors
from weft.kernels.jit import kernel
from weft.method import configure, parameter


@dataclass(frozen=True)
class Nearswap:
    """Configuration of :func:`nearswap`."""

    t: float = parameter(help="farthest that a weight moves", minimum=0)


def nearswap(base: Any, other: Any, t: float) -> Any:
    """Move ``base`` towards ``other``, each element by at most ``t``.

    Args:
        base: where to start (torch or numpy tensor, any shape, or a state dict).
        other: where to go, in the same form.
        t: the farthest that an element moves, at least 0.

    Returns:
        The moved base, in the form and dtype of ``other``.

    Raises:
        RecipeError: ``t`` is negative. ShapeError: shapes differ.

    Source: the model card of alchemonaut/QuartetAnemoi-70B-t0.0001.

    >>> import numpy as np
    >>> from weft.merge.nearswap import nearswap
    >>> nearswap(np.float32([0, 0, 0]), np.float32([0.5, -4, 0]), 1)
    array([ 0.5, -1. ,  0. ], dtype=float32)
    """
    return merge_tensors(METHODS[0], [other], configure(Nearswap, {"t": t}, "nearswap"), base=base)


def _combine(chunk: Chunk, config: Nearswap, state: None, out: np.ndarray) -> None:
    move_towards(chunk.base, chunk.tensors[0], np.float32(config.t), out)


@kernel
def move_towards(a, b, t, out):  # (n,), (n,) -> (n,)
    one, least = np.float32(1), np.float32(1e-6)
    for i in range(out.size):
        share = t / max(abs(a[i] - b[i]), least)
        share = share if share < one else one
        out[i] = share * b[i] + (one - share) * a[i]


METHODS = (
    MergeMethod(
        name="nearswap",
        family="merge",
        config=Nearswap,
        summary="Move every weight of the base towards another model by at most t.",
        goal="combine",
        origin="NearSwap (Alchemonaut 2024); mergekit nearswap",
        combine=_combine,
        base="required",
        models=(1, 1),
        function=nearswap,
        checked_by=("closed form", "brute force", "mergekit"),
    ),
)
