"""Keep the middle of each fine-tune's changes: the largest are outliers, the smallest are noise.

Model Breadcrumbs, Davari and Belilovsky, arXiv:2312.06795 (2023).

    τᵢ = Wᵢ − W₀                        differences from the base (any shape), n elements a tensor
    mᵢ : by magnitude, without the ⌊γ n⌋ largest of τᵢ, the next ⌊density · n⌋
    W  = W₀ + λ Σᵢ wᵢ mᵢ τᵢ             divided by Σᵢ wᵢ with ``normalize``; ``breadcrumbs_ties`` elects signs as TIES

Differences from the paper and its code: the share of small changes that goes, β in the paper, is 1 − density − γ; where
that is negative fewer large ones go. Each tensor is ranked as a whole, as in the paper, whose code ranks every row by
itself and leaves scalars alone. Of equal magnitudes the lowest index counts as the larger. mergekit keeps everything
by default; before 0.1.5 it zeroed all changes of a tensor where ⌊γ n⌋ = 0: here, then, nothing is taken from the top.
Complexity: two to four passes to find the thresholds, one to merge. Re-implemented from the equations
(official code: without a licence).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from weft.engine.chunks import Chunk, Scan
from weft.engine.merging import MergeMethod, merge_tensors
from weft.engine.select import Threshold, keep, kept, largest
from weft.kernels.jit import kernel
from weft.merge.norms import norm_ratios
from weft.merge.task_arithmetic import combine_deltas
from weft.method import configure, parameter, per_model


@dataclass(frozen=True)
class Breadcrumbs:
    """Configuration of :func:`breadcrumbs`."""

    weights: float | tuple[float, ...] = parameter(1.0, "weight of each model's changes", per_model="weight")
    density: float | tuple[float, ...] = parameter(
        0.15, "share of each model's changes that is kept", minimum=0, maximum=1, per_model="density"
    )
    gamma: float | tuple[float, ...] = parameter(
        0.01, "share of the largest changes that is dropped", minimum=0, maximum=1, per_model="gamma"
    )
    rescale: bool = parameter(False, "enlarge what is kept to the L1 norm before dropping")
    elect: bool = parameter(False, "elect a sign for each weight and merge the models that agree, as TIES does")
    normalize: bool = parameter(False, "divide by the sum of the weights (of those that agree, with elect)")
    lambda_: float = parameter(1.0, "scale of the merged change", key="lambda")


def breadcrumbs(
    deltas: Sequence[Any],
    *,
    weights: float | Sequence[float] = 1.0,
    density: float | Sequence[float] = 0.15,
    gamma: float | Sequence[float] = 0.01,
    rescale: bool = False,
    elect: bool = False,
    normalize: bool = False,
    lambda_: float = 1.0,
) -> Any:
    """Drop the largest and the smallest of the differences from a common base, and merge the rest.

    Args:
        deltas: one difference (torch or numpy, any shape), or one state dict of differences, for each model.
        weights: one number for each model, or one for all.
        density: share of each tensor's elements that is kept.
        gamma: share of each tensor's elements that is dropped from the top.
        rescale: enlarge what is kept to the L1 norm before dropping.
        elect: merge only the models that agree with the elected sign of an element.
        normalize: divide by the sum of the weights, with ``elect`` of those that agree.
        lambda_: scale of the result.

    Returns:
        The merged difference; add it to the base.

    Raises:
        RecipeError: a parameter is out of bounds. ShapeError: shapes differ.

    Source: arXiv:2312.06795, section 3.

    >>> import numpy as np
    >>> from weft.merge.breadcrumbs import breadcrumbs
    >>> breadcrumbs([np.float32([-9, 1, 3, -2])], density=0.5, gamma=0.25)
    array([ 0.,  0.,  3., -2.], dtype=float32)
    """
    values = {
        "weights": weights,
        "density": density,
        "gamma": gamma,
        "rescale": rescale,
        "elect": elect,
        "normalize": normalize,
        "lambda_": lambda_,
    }
    return merge_tensors(METHODS[0], deltas, configure(Breadcrumbs, values, "breadcrumbs"), are_deltas=True)


@dataclass(frozen=True)
class _Band:
    """What one model keeps: the elements among ``outer`` that are not among ``inner``, times ``scale``."""

    outer: Threshold
    inner: Threshold
    scale: float = 1.0


def _prepare(scan: Scan, config: Breadcrumbs) -> list[_Band]:
    densities = per_model(config.density, scan.models, "density")
    gammas = per_model(config.gamma, scan.models, "gamma")
    middle = [int(density * scan.size) for density in densities]
    top = [min(int(gamma * scan.size), scan.size - count) for gamma, count in zip(gammas, middle)]
    found = largest(
        scan, [a + b for a, b in zip(top, middle)] + top, lambda chunk, row: chunk.tensors[row % scan.models]
    )
    bands = [_Band(outer, inner) for outer, inner in zip(found[: scan.models], found[scan.models :])]
    if not config.rescale:
        return bands
    ratios = norm_ratios(scan, lambda chunk, model: _drop(chunk, model, bands[model]))
    return [_Band(band.outer, band.inner, ratio) for band, ratio in zip(bands, ratios)]


def _combine(chunk: Chunk, config: Breadcrumbs, state: list[_Band], out: np.ndarray) -> None:
    for model, band in enumerate(state):
        _drop(chunk, model, band)
    combine_deltas(chunk.tensors, config.weights, config.elect, config.normalize, config.lambda_, out)


def _drop(chunk: Chunk, model: int, band: _Band) -> None:
    delta, outliers = chunk.tensors[model], chunk.scratch("outliers")
    kept(delta, band.inner, chunk.key, outliers)
    keep(delta, delta, band.outer, chunk.key)
    drop_and_scale(delta, outliers, np.float32(band.scale))


@kernel
def drop_and_scale(values, marks, scale):  # (n,) in place
    zero = np.float32(0)
    for i in range(values.size):
        values[i] = values[i] * scale if marks[i] == zero else zero


def _row(name: str, summary: str, defaults: dict[str, Any], differs: str = "") -> MergeMethod:
    return MergeMethod(
        name=name,
        family="merge",
        config=Breadcrumbs,
        summary=summary,
        goal="combine",
        origin="mergekit " + name.removeprefix("mergekit/") if differs else "Model Breadcrumbs, arXiv:2312.06795",
        defaults=defaults,
        combine=_combine,
        prepare=_prepare,
        deltas=True,
        base="required",
        function=breadcrumbs,
        differs=differs,
        checked_by=("brute force", "mergekit"),
    )


_DIFFERS = "keeps everything by default; here 15% is kept, where the official code begins its search"
METHODS = (
    _row("breadcrumbs", "Drop the largest and the smallest changes of each tensor, add up the rest.", {}),
    _row(
        "breadcrumbs_ties",
        "Drop the largest and the smallest changes of each tensor, elect signs, add up the models that agree.",
        {"elect": True},
    ),
    _row("mergekit/breadcrumbs", "Breadcrumbs with mergekit's defaults.", {"density": 1.0}, _DIFFERS),
    _row(
        "mergekit/breadcrumbs_ties",
        "Breadcrumbs and sign election with mergekit's defaults.",
        {"density": 1.0, "elect": True},
        _DIFFERS,
    ),
)
