"""Average copies of one pruned network without filling its zeros in again.

Sparse Model Soups, Zimmer et al., arXiv:2306.16788 (2024).

    W = Σᵢ wᵢ Wᵢ / Σᵢ wᵢ        Wᵢ (any shape), zero outside one mask that all copies share: so is W
    sₖ = 1 − (1 − S)^(k/n)      sparsity after phase k of n on the way to S; each phase removes 1 − (1 − S)^(1/n)
                                of the weights that remain

Differences from the paper and its code: where the zeros of the copies differ the average is refused, because it
would be denser than each of them; ``masks="intersection"`` keeps only weights that every copy has, ``"union"`` merges
anyway. The pruned coordinates of the copies that ``torch.nn.utils.prune`` keeps (``weight_orig`` beside
``weight_mask``) are set to zero before averaging, since weight decay and momentum move them. Batch-norm statistics
of the result must be estimated again, as the authors do. The greedy form is :func:`weft.merge.soups.greedy_soup`.
Complexity: one pass to compare zeros, one to merge. Re-implemented from the equations (the official code has no
licence).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np

from weft.engine.chunks import Chunk, Inputs, Scan
from weft.engine.merging import MergeMethod, merge_tensors
from weft.errors import RecipeError
from weft.kernels.jit import kernel, reduction
from weft.merge.linear import weighted_sum
from weft.method import configure, parameter, per_model

_HIDDEN, _MASK = "_orig", "_mask"  # how torch.nn.utils.prune names a pruned parameter's copy and its mask


@dataclass(frozen=True)
class SparseSoup:
    """Configuration of :func:`sparse_soup`."""

    weights: float | tuple[float, ...] = parameter(1.0, "weight of each model", minimum=0, per_model="weight")
    masks: str = parameter(
        "equal",
        "what the models' zeros must be, or which weights are kept where they differ",
        choices=("equal", "intersection", "union"),
    )
    min_sparsity: float = parameter(
        0.01, "tensors with a smaller share of zeros in every model count as dense", minimum=0, maximum=1
    )


def sparse_soup(
    tensors: Sequence[Any],
    *,
    weights: float | Sequence[float] = 1.0,
    masks: str = "equal",
    min_sparsity: float = 0.01,
) -> Any:
    """Average tensors that are zero in the same places.

    Tensors with fewer than two axes, and those that are dense in every model, are averaged plainly.

    Args:
        tensors: one tensor (torch or numpy, any shape) or one state dict for each model.
        weights: one number, not negative, for each model, or one for all; divided by their sum.
        masks: "equal" refuses different zeros; "intersection" keeps the weights that all models have; "union" those
            that any model has.
        min_sparsity: share of zeros from which a tensor counts as pruned.

    Returns:
        The average, in the form and dtype of the first tensor.

    Raises:
        RecipeError: the models' zeros differ, or a parameter is out of bounds. ShapeError: shapes differ.

    Source: arXiv:2306.16788, algorithm 1.

    >>> import numpy as np
    >>> from weft.merge.sparse_soups import sparse_soup
    >>> sparse_soup([np.float32([[1, 0], [0, 4]]), np.float32([[3, 0], [0, 2]])])
    array([[2., 0.],
           [0., 3.]], dtype=float32)
    """
    values = {"weights": weights, "masks": masks, "min_sparsity": min_sparsity}
    config = configure(SparseSoup, values, "sparse_soup")
    if not tensors or not isinstance(tensors[0], Mapping):
        return merge_tensors(METHODS[0], tensors, config)
    first = tensors[0]
    pairs = [name for name in first if name.endswith(_MASK) and name.removesuffix(_MASK) + _HIDDEN in first]
    models = [{k: v for k, v in enforce_masks(t).items() if k not in pairs} for t in tensors]
    merged = merge_tensors(METHODS[0], models, config)
    return {name: _joint([t[name] for t in tensors], masks) if name in pairs else merged[name] for name in first}


def enforce_masks(state: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict of a network under ``torch.nn.utils.prune`` with its hidden copies set to zero where masked.

    >>> import numpy as np
    >>> enforce_masks({"weight_orig": np.float32([2, 3]), "weight_mask": np.float32([0, 1])})["weight_orig"]
    array([0., 3.], dtype=float32)
    """
    result = dict(state)
    for name, value in state.items():
        mask = state.get(name.removesuffix(_HIDDEN) + _MASK) if name.endswith(_HIDDEN) else None
        if mask is not None:
            result[name] = value * mask
    return result


def phase_sparsity(target: float, phases: int) -> tuple[float, ...]:
    """Sparsity after each of ``phases`` prunings that remove the same share of what remains and end at ``target``.

    Raises:
        RecipeError: ``target`` is not in [0, 1), or ``phases`` is not positive.

    >>> [round(s, 3) for s in phase_sparsity(0.9, 3)]
    [0.536, 0.785, 0.9]
    """
    if not 0 <= target < 1 or phases < 1:
        raise RecipeError(f"A schedule needs a target in [0, 1) and at least one phase, got {target!r} and {phases!r}.")
    return (*(1 - (1 - target) ** (k / phases) for k in range(1, phases)), float(target))


def _joint(masks: Sequence[Any], rule: str) -> Any:
    """The mask of the average."""
    return reduce(lambda a, b: a + b - a * b if rule == "union" else a * b, masks)


def _prepare(scan: Scan, config: SparseSoup) -> bool:
    """Whether weights that a model lacks are set to zero."""
    inputs = scan.inputs[0]
    if len(inputs.shape) < 2 or not inputs.size:
        return False
    zeros = np.zeros(scan.models + 2, np.int64)
    for counts in scan.collect(_count).values():
        zeros += counts
    *each, everywhere, anywhere = zeros.tolist()
    if max(each) < config.min_sparsity * inputs.size or everywhere == anywhere:
        return False
    if config.masks == "equal":
        raise RecipeError(_different(inputs, each, everywhere))
    return config.masks == "intersection"


def _count(chunk: Chunk) -> np.ndarray:
    """Zeros of each model, places where all are zero, places where any is."""
    zeros = chunk.scratch("zeros")
    count_zero_models(chunk.tensors, zeros)
    models = len(chunk.tensors)
    each = [count_value(row, np.float32(0)) for row in chunk.tensors]
    return np.array([*each, count_value(zeros, np.float32(models)), chunk.size - count_value(zeros, np.float32(0))])


def _different(inputs: Inputs, each: list[int], everywhere: int) -> str:
    shares = ", ".join(f"{count / inputs.size:.1%}" for count in each)
    return (
        f"{inputs.name}: the models must be zero in the same places; {shares} of their elements are zero, but only "
        f"{everywhere / inputs.size:.1%} are zero in all, so the average would be denser than its members. They come "
        "from different masks, or pruned weights moved in training: average copies that were retrained from one "
        'pruned model, or choose masks: "intersection" or "union".'
    )


def _combine(chunk: Chunk, config: SparseSoup, state: bool, out: np.ndarray) -> None:
    weights = np.asarray(per_model(config.weights, len(chunk.tensors)))
    if weights.sum() <= 0:
        raise RecipeError("sparse_soup: the weights sum to zero; give at least one model a positive weight.")
    weighted_sum(chunk.tensors, (weights / weights.sum()).astype(np.float32), out)
    if state:
        zeros = chunk.scratch("zeros")
        count_zero_models(chunk.tensors, zeros)
        clear_where_positive(out, zeros)


@kernel
def count_zero_models(tensors, zeros):  # (models, n) -> (n,): in how many models an element is zero
    zero, one = np.float32(0), np.float32(1)
    for i in range(zeros.size):
        zeros[i] = one if tensors[0, i] == zero else zero
    for m in range(1, tensors.shape[0]):
        for i in range(zeros.size):
            zeros[i] += one if tensors[m, i] == zero else zero


@reduction
def count_value(values, value):
    count = 0
    for i in range(values.size):
        count += values[i] == value
    return count


@kernel
def clear_where_positive(values, marks):
    zero = np.float32(0)
    for i in range(values.size):
        values[i] = zero if marks[i] > zero else values[i]


METHODS = (
    MergeMethod(
        name="sparse_soup",
        family="merge",
        config=SparseSoup,
        summary="Average copies of one pruned model; refuse, or choose, where their zeros differ.",
        goal="combine",
        paper="sparse-soups",
        combine=_combine,
        prepare=_prepare,
        function=sparse_soup,
        checked_by=("closed form", "brute force"),
    ),
)
