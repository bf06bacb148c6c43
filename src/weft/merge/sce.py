"""Weigh fine-tunes by how far they moved, on the weights where they disagree most, and drop the minority's sign.

SCE (select, calculate, erase), FuseChat, Wan et al., arXiv:2408.07990 (2024).

    τᵢ = Wᵢ − W₀                              differences from the base (any shape), for each tensor by itself:
    select     m  = top(varᵢ τᵢ, topk)        ``select_topk`` of the elements at which the models differ
    calculate  ηᵢ = ‖m τᵢ‖² / Σⱼ ‖m τⱼ‖²      1 / models where all are zero
    erase      eᵢ = [sign(m τᵢ) = s],  s = sign(Σᵢ m τᵢ), 0 counts as +
    W = W₀ + Σᵢ ηᵢ eᵢ m τᵢ / Σᵢ ηᵢ eᵢ

Differences from the paper and its code: exactly ⌊topk · differing elements⌋ are selected; of equal variances the lowest
index wins. The code selects for the second step alone; the paper, mergekit and this file for all.
mergekit (``mergekit/sce``) takes equal ηᵢ where the mean squares sum to less than ``floor`` = 1e-6, that is, where the
differences are smaller than 1e-3 / √models in the root mean square; and it divides by at least ``floor``.
Complexity: one pass to weigh, one to merge; three or four more to select. Re-implemented from the equations (official
code: a fork of mergekit, LGPL-3.0).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from weft.engine.chunks import Chunk, Scan
from weft.engine.merging import MergeMethod, merge_tensors
from weft.engine.select import KEEP_ALL, Threshold, keep, largest
from weft.kernels.jit import kernel, reduction
from weft.method import configure, parameter

_BLOCK = 1024  # elements whose running sums stay in the first-level cache


@dataclass(frozen=True)
class Sce:
    """Configuration of :func:`sce`."""

    select_topk: float = parameter(1.0, "share of the differing elements that is merged", minimum=0, maximum=1)
    floor: float = parameter(0.0, "sums of mean squares and of weights below this count as zero", minimum=0)


def sce(deltas: Sequence[Any], *, select_topk: float = 1.0, floor: float = 0.0) -> Any:
    """Select, weigh and merge differences from a common base.

    Args:
        deltas: one difference (torch or numpy, any shape), or one state dict of differences, for each model.
        select_topk: share of the elements at which the models differ that is merged: those of the highest variance.
        floor: mean squares that sum to less are taken as equal, and weights that sum to less are not scaled up.

    Returns:
        The merged difference; add it to the base.

    Raises:
        RecipeError: a parameter is out of bounds. ShapeError: shapes differ.

    Source: arXiv:2408.07990, section 3.3.

    >>> import numpy as np
    >>> from weft.merge.sce import sce
    >>> sce([np.float32([3, 0, 1]), np.float32([1, 2, -5])])
    array([ 1.5,  2. , -5. ], dtype=float32)
    """
    config = configure(Sce, {"select_topk": select_topk, "floor": floor}, "sce")
    return merge_tensors(METHODS[0], deltas, config, are_deltas=True)


def _variance(chunk: Chunk, row: int = 0) -> np.ndarray:
    values = chunk.scratch("variance")
    variance_over_models(chunk.tensors, values)
    return values


def _select(chunk: Chunk, threshold: Threshold) -> None:
    if threshold is not KEEP_ALL:
        variance = _variance(chunk)
        for delta in chunk.tensors:
            keep(delta, variance, threshold, chunk.key)


def _prepare(scan: Scan, config: Sce) -> tuple[Threshold, np.ndarray]:
    threshold = KEEP_ALL
    if config.select_topk < 1:

        def count(chunk: Chunk, total: np.ndarray) -> None:
            total += count_positive(_variance(chunk))

        differing = int(scan.fold(count, lambda: np.zeros(1, np.int64))[0])
        (threshold,) = largest(scan, [int(config.select_topk * differing)], _variance)

    def measure(chunk: Chunk, total: np.ndarray) -> None:
        _select(chunk, threshold)
        for model, delta in enumerate(chunk.tensors):
            total[model] += sum_of_squares(delta)

    squares = scan.fold(measure, lambda: np.zeros(scan.models)) / max(scan.size, 1)
    total = squares.sum()
    weights = squares / total if total > 0 and total >= config.floor else np.full(scan.models, 1 / scan.models)
    return threshold, weights.astype(np.float32)


def _combine(chunk: Chunk, config: Sce, state: tuple[Threshold, np.ndarray], out: np.ndarray) -> None:
    threshold, weights = state
    _select(chunk, threshold)
    erase_and_average(chunk.tensors, weights, np.float32(config.floor), out)


@kernel
def variance_over_models(deltas, out):  # (models, n) -> (n,)
    # of the distances from the first model, so that equal models give exactly zero
    count = np.float32(deltas.shape[0])
    mean = np.empty(_BLOCK, np.float32)
    for start in range(0, out.size, _BLOCK):
        n = min(_BLOCK, out.size - start)
        first, total = deltas[0, start : start + n], out[start : start + n]
        mean[:] = np.float32(0)
        for m in range(1, deltas.shape[0]):
            row = deltas[m, start : start + n]
            for i in range(n):
                mean[i] += row[i] - first[i]
        for i in range(n):
            mean[i] /= count
            total[i] = mean[i] * mean[i]
        for m in range(1, deltas.shape[0]):
            row = deltas[m, start : start + n]
            for i in range(n):
                distance = row[i] - first[i] - mean[i]
                total[i] += distance * distance
        for i in range(n):
            total[i] /= count


@reduction
def count_positive(values):
    count = 0
    for i in range(values.size):
        count += values[i] > np.float32(0)
    return count


@reduction
def sum_of_squares(values):  # (n,) -> float64
    total = 0.0
    for i in range(values.size):
        total += np.float64(values[i]) * np.float64(values[i])
    return total


@kernel
def erase_and_average(deltas, weights, floor, out):  # (models, n), (models,) -> (n,)
    zero, one = np.float32(0), np.float32(1)
    agreed, mass = np.empty(_BLOCK, np.float32), np.empty(_BLOCK, np.float32)
    for start in range(0, out.size, _BLOCK):
        n = min(_BLOCK, out.size - start)
        total = out[start : start + n]
        total[:] = zero
        agreed[:] = zero
        mass[:] = zero
        for m in range(deltas.shape[0]):
            row = deltas[m, start : start + n]
            for i in range(n):
                total[i] += row[i]
        for m in range(deltas.shape[0]):
            w = weights[m]
            row = deltas[m, start : start + n]
            for i in range(n):
                sign = one if total[i] >= zero else -one
                share = w if row[i] * sign > zero else zero
                agreed[i] += share * row[i]
                mass[i] += share
        for i in range(n):
            divisor = max(mass[i], floor)
            total[i] = agreed[i] / (divisor if divisor > zero else one)


def _row(name: str, summary: str, defaults: dict[str, Any], differs: str = "") -> MergeMethod:
    return MergeMethod(
        name=name,
        family="merge",
        config=Sce,
        summary=summary,
        goal="combine",
        origin="mergekit sce" if differs else "SCE, FuseChat, arXiv:2408.07990",
        defaults=defaults,
        combine=_combine,
        prepare=_prepare,
        deltas=True,
        base="required",
        function=sce,
        differs=differs,
        checked_by=("brute force", "mergekit"),
    )


METHODS = (
    _row("sce", "Weigh models by how far they moved where they differ most; merge those that agree in sign.", {}),
    _row(
        "mergekit/sce",
        "SCE with mergekit's floor: models that moved little are weighed equally.",
        {"floor": 1e-6},
        "takes equal weights where the mean squared changes sum to less than 1e-6, the paper only where they are zero",
    ),
)
