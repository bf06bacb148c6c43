"""How two checkpoints differ, tensor by tensor, from one pass over both.

With a the first model's tensor and b the second's: ‖b − a‖, ‖b − a‖ / ‖a‖, cosine a·b / (‖a‖ ‖b‖), the largest
|bᵢ − aᵢ|, the share of equal elements and the share whose sign changed. Sums are accumulated in float64. Pairs in which
either element is NaN or infinite are counted and left out of the sums; NaN equals NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from weft.checkpoint.checkpoint import LazyTensor
from weft.checkpoint.open import open_checkpoint
from weft.engine.chunks import Workspace
from weft.engine.progress import Progress
from weft.measure.comparison import compare
from weft.measure.matching import choose, comparable, describe
from weft.measure.places import Place, group, layer_label, places, stacks_of
from weft.measure.report import Report, each, ratio


@dataclass(frozen=True)
class TensorDifference(Report):
    """One tensor in two models, a and b; None where a number has no value.

    Attributes:
        name, shape, parameters, place: as in both models.
        dtypes: element types in a and b.
        equal_share: share of elements that are equal; the only number for types that are not floating point.
        sign_change_share: share of elements that are positive in one and negative in the other.
        non_finite: elements that are NaN or infinite in either.
        difference_norm: L2 norm of b - a.
        norms: L2 norms of a and b, over the pairs that are finite in both.
        relative_change: ``difference_norm`` over the norm of a.
        cosine: of the angle between a and b.
        largest: largest magnitude in b - a.
    """

    name: str
    shape: tuple[int, ...]
    dtypes: tuple[str, str]
    parameters: int
    place: Place
    equal_share: float | None = None
    sign_change_share: float | None = None
    non_finite: int = 0
    difference_norm: float | None = None
    norms: tuple[float, float] | None = None
    relative_change: float | None = None
    cosine: float | None = None
    largest: float | None = None


@dataclass(frozen=True)
class GroupDifference(Report):
    """Several tensors as one long vector."""

    label: str
    tensors: int
    parameters: int
    non_finite: int
    equal_share: float | None
    sign_change_share: float | None
    difference_norm: float | None
    relative_change: float | None
    cosine: float | None
    largest: float | None


@dataclass(frozen=True)
class Mismatch(Report):
    """A tensor that both models have and that cannot be compared, or is stored in different types."""

    name: str
    a: str
    b: str


@dataclass(frozen=True)
class ModelDifference(Report):
    """Two models.

    Attributes:
        names: what the two are called.
        only_a, only_b: tensors that the other does not have.
        shapes: tensors whose shapes differ (or whose types cannot be compared); they are left out of the numbers.
        dtypes: tensors of equal shape stored in different types; they are compared by value.
        total: all compared tensors as one long vector.
        layers, kinds: the same by layer and by kind of module.
        tensors: one entry each, in the first model's order.
    """

    names: tuple[str, str]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    shapes: tuple[Mismatch, ...]
    dtypes: tuple[Mismatch, ...]
    total: GroupDifference
    layers: tuple[GroupDifference, ...]
    kinds: tuple[GroupDifference, ...]
    tensors: tuple[TensorDifference, ...] = field(repr=False)


def model_difference(
    a: Any,
    b: Any,
    *,
    tensors: str | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> ModelDifference:
    """Compare two models tensor by tensor.

    Args:
        a, b: anything that ``weft.open`` takes; changes are told relative to ``a``.
        tensors: only names that match this glob, ``"*.mlp.*"``.
        threads: worker threads; default: the cores, at most 8.
        progress: where to report.

    Raises:
        RecipeError: no name matches, or the models have no tensor name in common.
        CheckpointError: a model cannot be opened or read.

    >>> import numpy as np
    >>> report = model_difference({"w": np.float32([3, 4])}, {"w": np.float32([3, 5])})
    >>> report.total.relative_change, report.tensors[0].equal_share
    (0.2, 0.5)
    """
    first, second = open_checkpoint(a), open_checkpoint(b)
    try:
        only_a, shared, only_b = choose(first, second, tensors)
        shapes = [
            Mismatch(name, describe(first[name]), describe(second[name]))
            for name in shared
            if not comparable(first[name], second[name])
        ]
        apart = {mismatch.name for mismatch in shapes}
        pairs = [(first[name], second[name]) for name in shared if name not in apart]
        found = places([*first, *second])
        rows = each(
            pairs,
            lambda pair, workspace, stopped: tensor_difference(
                *pair, workspace, place=found[pair[0].name], stopped=stopped
            ),
            lambda pair: (pair[0].name, pair[0].nbytes + pair[1].nbytes),
            label="comparing",
            threads=threads,
            progress=progress,
        )
        stacks = stacks_of(row.place for row in rows)
        return ModelDifference(
            names=(first.name, second.name),
            only_a=tuple(only_a),
            only_b=tuple(only_b),
            shapes=tuple(shapes),
            dtypes=tuple(Mismatch(x.name, x.dtype.name, y.dtype.name) for x, y in pairs if x.dtype is not y.dtype),
            total=combine("all", rows),
            layers=tuple(
                combine(label, some) for label, some in group(rows, lambda r: layer_label(r.place, stacks)).items()
            ),
            kinds=tuple(combine(kind, some) for kind, some in group(rows, lambda r: r.place.kind).items()),
            tensors=tuple(rows),
        )
    finally:
        for given, opened in ((a, first), (b, second)):
            if opened is not given:
                opened.close()


def tensor_difference(
    a: LazyTensor,
    b: LazyTensor,
    workspace: Workspace | None = None,
    *,
    place: Place | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> TensorDifference:
    """Compare two tensors of one shape; see :func:`model_difference`."""
    workspace = workspace or Workspace()
    place = place or places([a.name])[a.name]
    found = compare(a, b, workspace, stopped)
    head = (a.name, a.shape, (a.dtype.name, b.dtype.name), a.size, place)
    if not a.dtype.floating:
        return TensorDifference(*head, equal_share=ratio(found.equal, a.size))
    apart, norm_a, norm_b = math.sqrt(found.apart), math.sqrt(found.first), math.sqrt(found.second)
    return TensorDifference(
        *head,
        equal_share=ratio(found.equal, a.size),
        sign_change_share=ratio(found.changed, a.size),
        non_finite=found.broken,
        difference_norm=apart,
        norms=(norm_a, norm_b),
        relative_change=_relative(apart, norm_a) if found.broken < a.size else None,
        cosine=_cosine(found.product, norm_a, norm_b),
        largest=found.largest,
    )


def combine(label: str, rows: list[TensorDifference]) -> GroupDifference:
    """Several tensors as one long vector."""
    floats = [row for row in rows if row.norms is not None and row.difference_norm is not None]
    size = sum(row.parameters for row in floats)
    apart = _norm([row.difference_norm or 0.0 for row in floats])
    norms = [row.norms for row in floats if row.norms is not None]
    norm_a, norm_b = _norm([pair[0] for pair in norms]), _norm([pair[1] for pair in norms])
    product = sum((row.cosine or 0.0) * pair[0] * pair[1] for row, pair in zip(floats, norms))
    return GroupDifference(
        label=label,
        tensors=len(rows),
        parameters=sum(row.parameters for row in rows),
        non_finite=sum(row.non_finite for row in rows),
        equal_share=ratio(
            sum((row.equal_share or 0.0) * row.parameters for row in rows), sum(row.parameters for row in rows)
        ),
        sign_change_share=ratio(sum((row.sign_change_share or 0.0) * row.parameters for row in floats), size),
        difference_norm=apart if floats else None,
        relative_change=_relative(apart, norm_a) if any(row.non_finite < row.parameters for row in floats) else None,
        cosine=_cosine(product, norm_a, norm_b),
        largest=max((row.largest for row in floats if row.largest is not None), default=None),
    )


def _norm(norms: list[float]) -> float:
    """The norm of a vector from those of its parts; infinite where squares leave the range, as powers would raise."""
    return math.sqrt(sum(norm * norm for norm in norms))


def _relative(apart: float, norm: float) -> float | None:
    """‖b − a‖ / ‖a‖; two tensors of zeros have not changed."""
    return 0.0 if apart == norm == 0 else ratio(apart, norm)


def _cosine(product: float, norm_a: float, norm_b: float) -> float | None:
    cosine = ratio(product, norm_a * norm_b)
    return None if cosine is None else min(max(cosine, -1.0), 1.0)
