"""Merge agents trained by reinforcement: average what several changed, keep whole what one alone changed.

RAM and RAM+ (Reinforced Agent Merging), Yuan et al., arXiv:2601.13572 (2026).

    τᵢ = Wᵢ − W₀                                   differences from the base (any shape)
    aᵢ = [|τᵢ| > ε],  c = Σᵢ aᵢ                    who changed an element, and how many
    W  = W₀ + Σᵢ aᵢ τᵢ / c            where c > 1  shared: the mean of those that changed it
         W₀ + λᵢ aᵢ τᵢ                where c = 1  unique
    λᵢ = 1 + r · clip(ρᵢ, 0, α),  ρᵢ = number of shared / number of unique elements of model i;  λᵢ = 1 in RAM

Differences from the paper and its code: ``ramplus`` counts over the whole model as the paper does, ``ramplus_tl`` over
each tensor, which is mergekit's variant. The code fixes α at 1 and gives 1 + r as its rescale factor; the defaults here
are mergekit's.
Complexity: one pass; RAM+ takes one more to count. Re-implemented from the equations (official code: without a
licence).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from weft.engine.chunks import Chunk, Scan
from weft.engine.merging import MergeMethod, merge_tensors
from weft.kernels.jit import kernel
from weft.method import configure, parameter

_BLOCK = 1024  # elements whose running sums stay in the first-level cache


@dataclass(frozen=True)
class Ram:
    """Configuration of :func:`ram`."""

    epsilon: float = parameter(1e-5, "changes up to this magnitude count as none", minimum=0)


@dataclass(frozen=True)
class RamPlus:
    """Configuration of :func:`ramplus`."""

    epsilon: float = parameter(1e-5, "changes up to this magnitude count as none", minimum=0)
    r: float = parameter(0.1, "how much unique changes are enlarged by overlap", minimum=0)
    alpha: float = parameter(0.2, "most overlap that counts", minimum=0)
    scope: str = parameter("model", "where overlap is counted", choices=("model", "tensor"))


def ram(deltas: Sequence[Any], *, epsilon: float = 1e-5) -> Any:
    """Average shared changes from a common base and keep unique ones.

    Args:
        deltas: one difference (torch or numpy, any shape), or one state dict of differences, for each model.
        epsilon: changes up to this magnitude count as none and are dropped.

    Returns:
        The merged difference; add it to the base.

    Raises:
        RecipeError: a parameter is out of bounds. ShapeError: shapes differ.

    Source: arXiv:2601.13572.

    >>> import numpy as np
    >>> from weft.merge.ram import ram
    >>> ram([np.float32([2, 0, 1]), np.float32([4, 0, 0])])
    array([3., 0., 1.], dtype=float32)
    """
    return merge_tensors(METHODS[0], deltas, configure(Ram, {"epsilon": epsilon}, "ram"), are_deltas=True)


def ramplus(
    deltas: Sequence[Any],
    *,
    epsilon: float = 1e-5,
    r: float = 0.1,
    alpha: float = 0.2,
    scope: str = "model",
) -> Any:
    """Average shared changes from a common base, and enlarge unique ones to make up for the averaging.

    Args:
        deltas: one difference (torch or numpy, any shape), or one state dict of differences, for each model.
        epsilon: changes up to this magnitude count as none and are dropped.
        r: how much unique changes are enlarged by overlap.
        alpha: most overlap (shared / unique elements of a model) that counts.
        scope: "model" as in the paper, "tensor" as in mergekit.

    Returns:
        The merged difference; add it to the base.

    Raises:
        RecipeError: a parameter is out of bounds. ShapeError: shapes differ.

    Source: arXiv:2601.13572.

    >>> import numpy as np
    >>> from weft.merge.ram import ramplus
    >>> ramplus([np.float32([2, 0, 1]), np.float32([4, 0, 0])], r=0.5, alpha=1)
    array([3. , 0. , 1.5], dtype=float32)
    """
    values = {"epsilon": epsilon, "r": r, "alpha": alpha, "scope": scope}
    return merge_tensors(METHODS[1], deltas, configure(RamPlus, values, "ramplus"), are_deltas=True)


def _prepare(scan: Scan, config: RamPlus) -> np.ndarray:
    def visit(chunk: Chunk, counts: np.ndarray) -> None:
        count_overlap(chunk.tensors, np.float32(config.epsilon), counts)

    unique, shared = scan.fold(visit, lambda: np.zeros((2, scan.models), np.int64))
    overlap = np.minimum(shared / np.maximum(unique, 1), config.alpha)
    return (1 + config.r * overlap).astype(np.float32)


def _combine(chunk: Chunk, config: Ram | RamPlus, state: np.ndarray | None, out: np.ndarray) -> None:
    scales = np.ones(len(chunk.tensors), np.float32) if state is None else state
    average_shared(chunk.tensors, scales, np.float32(config.epsilon), out)


@kernel
def count_overlap(deltas, epsilon, counts):  # (models, n) -> adds to (2, models): unique, shared
    zero, one = np.float32(0), np.float32(1)
    changed = np.empty(_BLOCK, np.float32)
    for start in range(0, deltas.shape[1], _BLOCK):
        n = min(_BLOCK, deltas.shape[1] - start)
        changed[:] = zero
        for m in range(deltas.shape[0]):
            row = deltas[m, start : start + n]
            for i in range(n):
                changed[i] += one if abs(row[i]) > epsilon else zero
        for m in range(deltas.shape[0]):
            row = deltas[m, start : start + n]
            unique, every = 0, 0
            for i in range(n):
                active = abs(row[i]) > epsilon
                every += active
                unique += active & (changed[i] == one)
            counts[0, m] += unique
            counts[1, m] += every - unique


@kernel
def average_shared(deltas, scales, epsilon, out):  # (models, n), (models,) -> (n,)
    zero, one = np.float32(0), np.float32(1)
    changed, enlarged = np.empty(_BLOCK, np.float32), np.empty(_BLOCK, np.float32)
    for start in range(0, out.size, _BLOCK):
        n = min(_BLOCK, out.size - start)
        total = out[start : start + n]
        total[:] = zero
        changed[:] = zero
        enlarged[:] = zero
        for m in range(deltas.shape[0]):
            scale = scales[m]
            row = deltas[m, start : start + n]
            for i in range(n):
                active = abs(row[i]) > epsilon
                value = row[i] if active else zero
                changed[i] += one if active else zero
                total[i] += value
                enlarged[i] += scale * value
        for i in range(n):
            total[i] = total[i] / changed[i] if changed[i] > one else enlarged[i]


METHODS = (
    MergeMethod(
        name="ram",
        family="merge",
        config=Ram,
        summary="Average what several models changed, keep whole what one alone changed.",
        goal="combine",
        origin="Reinforced Agent Merging, arXiv:2601.13572",
        combine=_combine,
        deltas=True,
        base="required",
        function=ram,
        checked_by=("brute force", "mergekit"),
    ),
    MergeMethod(
        name="ramplus",
        family="merge",
        config=RamPlus,
        summary="RAM that enlarges unique changes by the model's overlap with the others.",
        goal="combine",
        origin="Reinforced Agent Merging (RAM+), arXiv:2601.13572",
        combine=_combine,
        prepare=_prepare,
        deltas=True,
        base="required",
        model_scope=lambda config: config.scope == "model",
        function=ramplus,
        checked_by=("brute force",),
    ),
    MergeMethod(
        name="ramplus_tl",
        family="merge",
        config=RamPlus,
        summary="RAM+ with the overlap counted in each tensor by itself.",
        goal="combine",
        origin="mergekit ramplus_tl, after arXiv:2601.13572",
        defaults={"scope": "tensor"},
        combine=_combine,
        prepare=_prepare,
        deltas=True,
        base="required",
        model_scope=lambda config: config.scope == "model",
        function=ramplus,
        differs="counts the overlap of models in each tensor by itself; RAM+ (ramplus) over the whole model",
        checked_by=("brute force", "mergekit"),
    ),
)
