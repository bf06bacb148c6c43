"""Interpolate two models along the arc between them, so that the mix does not lose length as a straight line does.

Spherical linear interpolation, Shoemake, "Animating rotation with quaternion curves", SIGGRAPH 1985; used for weights
by mergekit's ``slerp``.

    W = sin((1 − t) θ) / sin θ · W₀ + sin(t θ) / sin θ · W₁        θ the angle between W₀ and W₁ as long vectors
    W = (1 − t) W₀ + t W₁                                          where |cos θ| > 0.9995

t = 0 is the base W₀ (any shape), t = 1 the other model W₁. Tensor by tensor. Lengths are not taken out first: with
|W₀| = |W₁| the path is the arc. Close to θ = 0 the line and the arc differ by at most 1.3e-4 of the length; close to
θ = π no arc is defined, and the line passes through 0.

Differences from the paper: unit vectors there; the threshold is mergekit's. The angle is computed in float64.
Complexity: one pass for three inner products, one to mix. Re-implemented from the equations.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from weft.engine.chunks import Chunk, Scan
from weft.engine.gram import gram
from weft.engine.merging import MergeMethod, merge_tensors
from weft.merge.wise_ft import blend
from weft.method import configure, parameter

_STRAIGHT = 0.9995  # above this |cos θ| the path is a line
_SHORTEST = 1e-8  # vectors up to this length are not scaled to 1, and so count as orthogonal to everything


@dataclass(frozen=True)
class Slerp:
    """Configuration of :func:`slerp`."""

    t: float = parameter(help="position on the arc: 0 is the base, 1 the other model")


def slerp(base: Any, other: Any, t: float) -> Any:
    """The point at ``t`` on the arc from ``base`` to ``other``.

    Args:
        base: where t = 0 (torch or numpy tensor, any shape, or a state dict).
        other: where t = 1, in the same form.
        t: position on the arc, in units of the angle; may lie outside 0 to 1.

    Returns:
        The point, in the form and dtype of ``other``; each tensor of a state dict has its own arc.

    Raises:
        ShapeError: shapes differ.

    Source: Shoemake 1985, section 3.3.

    >>> import numpy as np
    >>> from weft.merge.slerp import slerp
    >>> slerp(np.float32([1, 0]), np.float32([0, 1]), 1 / 3).round(4)
    array([0.866, 0.5  ], dtype=float32)
    """
    return merge_tensors(METHODS[0], [other], configure(Slerp, {"t": t}, "slerp"), base=base)


def arc_weights(cosines: Any, t: float, straight: Any) -> np.ndarray:
    """Weights of both ends at ``t``: (2, …) float64 from cosines (…) and where to take the line (…)."""
    angle = np.arccos(np.where(straight, 0.0, cosines))
    sine = np.sin(angle)
    first = np.where(straight, 1 - t, np.sin((1 - t) * angle) / sine)
    second = np.where(straight, t, np.sin(t * angle) / sine)
    return np.stack([first, second])


def _prepare(scan: Scan, config: Slerp) -> np.ndarray:
    products = gram(scan, with_base=True)
    lengths = np.sqrt(np.diag(products))
    a, b = np.where(lengths > _SHORTEST, lengths, 1.0)
    cosine = np.clip(products[0, 1] / (a * b), -1, 1)
    return arc_weights(cosine, config.t, abs(cosine) > _STRAIGHT)


def _combine(chunk: Chunk, config: Slerp, state: np.ndarray, out: np.ndarray) -> None:
    blend(chunk.base, chunk.tensors[0], np.float32(state[0]), np.float32(state[1]), out)


METHODS = (
    MergeMethod(
        name="slerp",
        family="merge",
        config=Slerp,
        summary="Interpolate along the arc from the base to one other model.",
        goal="combine",
        origin="Shoemake 1985; mergekit slerp",
        combine=_combine,
        prepare=_prepare,
        base="required",
        models=(1, 1),
        function=slerp,
        checked_by=("closed form", "brute force", "mergekit"),
    ),
)
