"""Average unrelated models without their weights fading: rescale each tensor to the variance it should have.

Vanishing Variance Problem in Fully Decentralized Neural-Network Systems, arXiv:2404.04616 (2024).

    w̄ = Σᵢ wᵢ Wᵢ / Σᵢ wᵢ                          Wᵢ (any shape); of N unrelated models Var(w̄) is σ²/N, not σ²
    v = Σᵢ wᵢ Var(Wᵢ) / Σᵢ wᵢ   (members)        what the variance should be
        Var(W₁)                 (self)           the first model is the one that receives the others
        c Var(W₁) + (1 − c) Σᵢ wᵢ Var(Wᵢ) / Σᵢ wᵢ   (mix)
    W = m + (w̄ − m) √((v + ε) / (Var(w̄) + ε))      m = mean(w̄); variances are unbiased, over the whole tensor

Differences from the paper and its code: ε is 1e-12 of the larger variance; the authors' ε = 1e-4 is as large as the
variance of a wide layer and damps the correction (``eps=1e-4`` restores it). Tensors with fewer than two axes are
averaged plainly, because a variance over so few numbers means little (``vectors=True`` corrects them too); those of
one element always are. To leave the first model out of the average and keep it as the target, give it weight 0.
Complexity: one pass for the variances (float64), one to merge. Re-implemented from the equations.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from weft.engine.chunks import Chunk, Scan
from weft.engine.merging import MergeMethod, merge_tensors
from weft.errors import RecipeError
from weft.kernels.jit import kernel, reduction
from weft.merge.linear import weighted_sum
from weft.method import configure, parameter, per_model

_RELATIVE_EPS = 1e-12  # far below the rounding of float32, and enough to bound the scale at a million


@dataclass(frozen=True)
class VarianceCorrected:
    """Configuration of :func:`variance_corrected`."""

    weights: float | tuple[float, ...] = parameter(1.0, "weight of each model", minimum=0, per_model="weight")
    target: str = parameter(
        "members", "whose variance the average takes: all, the first, or a mix", choices=("members", "self", "mix")
    )
    mix: float = parameter(0.5, "with target mix: share of the first model's variance", minimum=0, maximum=1)
    eps: float | None = parameter(None, "guard added to both variances; by default tiny and relative", minimum=0)
    vectors: bool = parameter(False, "correct tensors with fewer than two axes too")


def variance_corrected(
    tensors: Sequence[Any],
    *,
    weights: float | Sequence[float] = 1.0,
    target: str = "members",
    mix: float = 0.5,
    eps: float | None = None,
    vectors: bool = False,
) -> Any:
    """Average tensors and rescale the average, around its mean, to the variance of its members.

    Args:
        tensors: one tensor (torch or numpy, any shape) or one state dict for each model.
        weights: one number, not negative, for each model, or one for all; divided by their sum.
        target: "members", "self" (the first model) or "mix".
        mix: share of the first model's variance with ``target="mix"``.
        eps: absolute guard added to both variances; None is 1e-12 of the larger one.
        vectors: correct tensors with fewer than two axes too.

    Returns:
        The corrected average, in the form and dtype of the first tensor.

    Raises:
        RecipeError: a parameter is out of bounds, or the weights sum to zero. ShapeError: shapes differ.

    Source: arXiv:2404.04616; the scale is that of the authors' ``scale_tensor_to_variance``.

    >>> import numpy as np
    >>> from weft.merge.variance_corrected import variance_corrected
    >>> a, b = np.float32([[1, -1], [1, -1]]), np.float32([[1, 1], [-1, -1]])
    >>> variance_corrected([a, b]).round(4)  # the plain mean is [[1, 0], [0, -1]]
    array([[ 1.4142,  0.    ],
           [ 0.    , -1.4142]], dtype=float32)
    """
    values = {"weights": weights, "target": target, "mix": mix, "eps": eps, "vectors": vectors}
    return merge_tensors(METHODS[0], tensors, configure(VarianceCorrected, values, "variance_corrected"))


def _shares(config: VarianceCorrected, models: int) -> np.ndarray:
    weights = np.asarray(per_model(config.weights, models))
    total = weights.sum()
    if total <= 0:
        raise RecipeError("variance_corrected: the weights sum to zero; give at least one model a positive weight.")
    return weights / total


def _prepare(scan: Scan, config: VarianceCorrected) -> tuple[np.float32, np.float32]:
    """The mean of the average, and by how much more than once its deviations from it are taken."""
    inputs = scan.inputs[0]
    shares = _shares(config, scan.models)
    if scan.size < 2 or (len(inputs.shape) < 2 and not config.vectors):
        return np.float32(0), np.float32(0)

    def moments(chunk: Chunk) -> np.ndarray:
        average = chunk.scratch("average")
        weighted_sum(chunk.tensors, shares.astype(np.float32), average)
        return np.array([(chunk.size, *mean_and_squares(row)) for row in (*chunk.tensors, average)])

    parts = np.array(list(scan.collect(moments).values()))  # (chunks, models + 1, 3)
    sizes, means, squares = parts[..., 0], parts[..., 1], parts[..., 2]
    mean = (sizes * means).sum(0) / scan.size
    variance = (squares + sizes * (means - mean) ** 2).sum(0) / (scan.size - 1)
    members, own, average = float(shares @ variance[:-1]), float(variance[0]), float(variance[-1])
    wanted = {"members": members, "self": own, "mix": config.mix * own + (1 - config.mix) * members}[config.target]
    eps = _RELATIVE_EPS * max(wanted, average) if config.eps is None else config.eps
    scale = math.sqrt((wanted + eps) / (average + eps)) if average + eps > 0 else 1.0
    return np.float32(mean[-1]), np.float32(scale - 1)


def _combine(chunk: Chunk, config: VarianceCorrected, state: tuple[np.float32, np.float32], out: np.ndarray) -> None:
    weighted_sum(chunk.tensors, _shares(config, len(chunk.tensors)).astype(np.float32), out)
    stretch_in_place(out, *state)


@reduction
def mean_and_squares(values):  # (n,) -> mean, sum of squared deviations from it; float64
    total = 0.0
    for i in range(values.size):
        total += values[i]
    mean = total / values.size
    squares = 0.0
    for i in range(values.size):
        squares += (values[i] - mean) * (values[i] - mean)
    return mean, squares


@kernel
def stretch_in_place(values, mean, extra):  # (n,): values + extra (values − mean), exact where extra is 0
    for i in range(values.size):
        values[i] += extra * (values[i] - mean)


METHODS = (
    MergeMethod(
        name="variance_corrected",
        family="merge",
        config=VarianceCorrected,
        summary="Average unrelated models and rescale each tensor to the variance of its members.",
        goal="combine",
        paper="variance-corrected-averaging",
        combine=_combine,
        prepare=_prepare,
        models=(1, None),
        function=variance_corrected,
        checked_by=("closed form", "brute force"),
    ),
)
