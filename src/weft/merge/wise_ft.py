"""Move part of the way from a pretrained model to its fine-tune: most of the gain, less lost under shift.

WiSE-FT, Wortsman et al., arXiv:2109.01903 (2021).

    W = (1 − α) W₀ + α W₁        W₀ the pretrained tensor, W₁ its fine-tune (any shape)

α = 0 is the pretrained model, α = 1 the fine-tune; beyond 1 goes further in the fine-tune's direction, below 0
away from it. The paper recommends 0.5 where nothing is known.

Differences from the paper and its code: none in the equation; sums are taken in float32 and cast once. The
pretrained model needs a head that does the task: mixing with a random head means nothing.
Complexity: one pass. Re-implemented from the equation (official code: MIT).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from weft.engine.chunks import Chunk
from weft.engine.merging import MergeMethod, merge_tensors
from weft.kernels.jit import kernel
from weft.method import configure, parameter


@dataclass(frozen=True)
class WiseFt:
    """Configuration of :func:`wise_ft`."""

    alpha: float = parameter(0.5, "share of the fine-tune: 0 is the base, 1 the fine-tune, any number is allowed")


def wise_ft(base: Any, tuned: Any, *, alpha: float = 0.5) -> Any:
    """Interpolate or extrapolate between a model and its fine-tune.

    Args:
        base: the pretrained tensor (torch or numpy, any shape) or state dict.
        tuned: its fine-tune in the same form.
        alpha: share of the fine-tune.

    Returns:
        The mix, in the form and dtype of ``tuned``.

    Raises:
        ShapeError: shapes differ.

    Source: arXiv:2109.01903, section 3.

    >>> import numpy as np
    >>> from weft.merge.wise_ft import wise_ft
    >>> wise_ft(np.float32([0, 4]), np.float32([1, 2]), alpha=0.25)
    array([0.25, 3.5 ], dtype=float32)
    """
    return merge_tensors(METHODS[0], [tuned], configure(WiseFt, {"alpha": alpha}, "wise_ft"), base=base)


def interpolation_path(base: Any, tuned: Any, alphas: Iterable[float]) -> Iterator[tuple[float, Any]]:
    """The models on the line from ``base`` to ``tuned``, each computed when it is asked for.

    Args:
        base: the pretrained tensor or state dict.
        tuned: its fine-tune in the same form.
        alphas: shares of the fine-tune, in the order wanted.

    Yields:
        (alpha, the mix): one mix is in memory at a time unless the caller keeps them.

    Raises:
        ShapeError: shapes differ.

    Source: arXiv:2109.01903, figure 1.

    >>> import numpy as np
    >>> from weft.merge.wise_ft import interpolation_path
    >>> path = interpolation_path(np.zeros(1, np.float32), np.ones(1, np.float32), [0, 0.5, 1, 1.5])
    >>> [(alpha, float(mix[0])) for alpha, mix in path]
    [(0, 0.0), (0.5, 0.5), (1, 1.0), (1.5, 1.5)]
    """
    for alpha in alphas:
        yield alpha, wise_ft(base, tuned, alpha=alpha)


def _combine(chunk: Chunk, config: WiseFt, state: None, out: np.ndarray) -> None:
    blend(chunk.base, chunk.tensors[0], np.float32(1 - config.alpha), np.float32(config.alpha), out)


@kernel
def blend(a, b, weight_a, weight_b, out):  # (n,), (n,) -> (n,)
    for i in range(out.size):
        out[i] = a[i] * weight_a + b[i] * weight_b


METHODS = (
    MergeMethod(
        name="wise_ft",
        family="merge",
        config=WiseFt,
        summary="Go part of the way from the base to its fine-tune, or beyond it.",
        goal="combine",
        paper="",
        origin="WiSE-FT, arXiv:2109.01903",
        combine=_combine,
        base="required",
        models=(1, 1),
        function=wise_ft,
        checked_by=("closed form", "brute force"),
    ),
)
