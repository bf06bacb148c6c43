"""Add up what several fine-tunes learned; a negative weight makes the model forget.

Task arithmetic, Ilharco et al., arXiv:2212.04089 (2022).

    τᵢ = Wᵢ − W₀                   task vectors (any shape): differences from the base
    W  = W₀ + λ Σᵢ wᵢ τᵢ           divided by Σᵢ wᵢ with ``normalize``

Differences from the paper and its code: each model may have its own weight, the paper has λ alone. Weights that sum to
zero are not divided by their sum.
Complexity: one pass, O(models x elements). Re-implemented from the equations (official code: without a
licence).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from weft.engine.chunks import Chunk
from weft.engine.merging import MergeMethod, merge_tensors
from weft.merge.linear import weighted_sum
from weft.merge.ties import elect_and_average
from weft.method import configure, parameter, per_model


@dataclass(frozen=True)
class TaskArithmetic:
    """Configuration of :func:`task_arithmetic`."""

    weights: float | tuple[float, ...] = parameter(1.0, "weight of each model's changes", per_model="weight")
    normalize: bool = parameter(False, "divide the weights by their sum")
    lambda_: float = parameter(1.0, "scale of the merged change", key="lambda")


def task_arithmetic(
    deltas: Sequence[Any],
    *,
    weights: float | Sequence[float] = 1.0,
    normalize: bool = False,
    lambda_: float = 1.0,
) -> Any:
    """Weighted sum of differences from a common base.

    Args:
        deltas: one difference (torch or numpy, any shape), or one state dict of differences, for each model.
        weights: one number for each model, or one for all; negative to remove what a model learned.
        normalize: divide by the sum of the weights, unless it is zero.
        lambda_: scale of the result.

    Returns:
        The merged difference; add it to the base.

    Raises:
        RecipeError: the number of weights is wrong. ShapeError: shapes differ.

    Source: arXiv:2212.04089, section 2.

    >>> import numpy as np
    >>> from weft.merge.task_arithmetic import task_arithmetic
    >>> task_arithmetic([np.float32([1, 2]), np.float32([4, 0])], weights=[1, -0.5])
    array([-1.,  2.], dtype=float32)
    """
    values = {"weights": weights, "normalize": normalize, "lambda_": lambda_}
    config = configure(TaskArithmetic, values, "task_arithmetic")
    return merge_tensors(METHODS[0], deltas, config, are_deltas=True)


def combine_deltas(
    deltas: np.ndarray,
    weights: float | tuple[float, ...],
    elect: bool,
    normalize: bool,
    lambda_: float,
    out: np.ndarray,
) -> None:
    """Merge (models, n) differences into ``out`` (n,): a weighted sum, or with ``elect`` as TIES does after trimming."""
    each = np.asarray(per_model(weights, len(deltas)))
    if elect:
        elect_and_average(deltas, each.astype(np.float32), normalize, np.float32(lambda_), out)
        return
    total = each.sum()
    scale = lambda_ / total if normalize and abs(total) >= 1e-8 else lambda_
    weighted_sum(deltas, (each * scale).astype(np.float32), out)


def _combine(chunk: Chunk, config: TaskArithmetic, state: None, out: np.ndarray) -> None:
    combine_deltas(chunk.tensors, config.weights, False, config.normalize, config.lambda_, out)


METHODS = (
    MergeMethod(
        name="task_arithmetic",
        family="merge",
        config=TaskArithmetic,
        summary="Add the weighted changes of all models to the base; negative weights forget.",
        goal="combine",
        origin="task arithmetic, arXiv:2212.04089",
        combine=_combine,
        deltas=True,
        base="required",
        function=task_arithmetic,
        checked_by=("closed form", "brute force", "mergekit"),
    ),
)
