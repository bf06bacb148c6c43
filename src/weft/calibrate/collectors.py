"""What is counted of the inputs of a layer: one small class for each statistic.

A collector is given the inputs of a layer batch by batch as rows, one for each token, position or patch, and keeps sums
of fixed size; memory does not grow with the data. The functions for one batch are in :mod:`weft.calibrate.sums`.

====================  ================================================================  =============================
collector             result                                                            kept for n channels
====================  ================================================================  =============================
:class:`Gram`         ``gram`` = Σ xᵀx (n, n)                                           8 n² bytes
:class:`Mean`         ``mean`` (n,)                                                     8 n
:class:`Range`        ``minimum``, ``maximum`` (n,)                                     8 n
:class:`Scales`       ``mean_abs``, ``max_abs``, ``square_sum`` = Σ x² (n,)             20 n
:class:`Percentiles`  ``histogram`` (65,536,): how many values have which 16 high bits  512 KiB
====================  ================================================================  =============================

Numbers of rows are exact; products of one batch are made in float32 and added in float64, which is far more exact than
the activations of a model in half precision are.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from weft.calibrate.sums import absolute_sums, add_gram, histogram, mirrored, wide
from weft.errors import NonFiniteError


@runtime_checkable
class Collector(Protocol):
    """Counts rows of inputs.

    >>> isinstance(Mean(), Collector)
    True
    """

    def update(self, x: Tensor) -> None:
        """Add rows (rows, channels)."""

    def result(self) -> dict[str, Tensor]:
        """Tensors by name; empty before the first row."""


class Gram:
    """Σ xᵀx.

    Args:
        groups: rows hold the inputs of this many groups side by side (a grouped convolution); one matrix for each.

    >>> collector = Gram()
    >>> collector.update(torch.ones(3, 2))
    >>> collector.result()["gram"].tolist()
    [[3.0, 3.0], [3.0, 3.0]]
    """

    def __init__(self, groups: int = 1):
        self.groups = groups
        self._total: Tensor | None = None

    def update(self, x: Tensor) -> None:
        """Add rows (rows, channels)."""
        if self.groups > 1:
            x = x.unflatten(-1, (self.groups, -1)).transpose(0, 1)  # (rows, groups · n) -> (groups, rows, n)
        if self._total is None:
            self._total = x.new_zeros((*x.shape[:-2], x.shape[-1], x.shape[-1]), dtype=torch.float64)
        add_gram(x, self._total)

    def result(self) -> dict[str, Tensor]:
        """``gram``: (n, n), or (groups, n, n)."""
        return {} if self._total is None else {"gram": mirrored(self._total)}


class Mean:
    """The mean of each channel.

    >>> collector = Mean()
    >>> collector.update(torch.tensor([[1.0, 2.0], [3.0, 2.0]]))
    >>> collector.result()["mean"].tolist()
    [2.0, 2.0]
    """

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self._rows = 0

    def update(self, x: Tensor) -> None:
        """Add rows (rows, channels)."""
        part = wide(x).sum(0, dtype=torch.float64)
        self._sum = part if self._sum is None else self._sum.add_(part)
        self._rows += len(x)

    def result(self) -> dict[str, Tensor]:
        """``mean``: (channels,)."""
        return {} if self._sum is None else {"mean": self._sum / self._rows}


class Range:
    """The smallest and the largest value of each channel; those of the tensor are the extremes of these.

    >>> collector = Range()
    >>> collector.update(torch.tensor([[1.0, 2.0], [-3.0, 2.0]]))
    >>> {k: v.tolist() for k, v in collector.result().items()}
    {'minimum': [-3.0, 2.0], 'maximum': [1.0, 2.0]}
    """

    def __init__(self) -> None:
        self._low: Tensor | None = None
        self._high: Tensor | None = None

    def update(self, x: Tensor) -> None:
        """Add rows (rows, channels)."""
        low, high = (wide(bound) for bound in x.aminmax(dim=0))
        self._low = low if self._low is None else torch.minimum(self._low, low)
        self._high = high if self._high is None else torch.maximum(self._high, high)

    def result(self) -> dict[str, Tensor]:
        """``minimum`` and ``maximum``: (channels,)."""
        if self._low is None or self._high is None:
            return {}
        return {"minimum": self._low, "maximum": self._high}


class Scales:
    """What AWQ, SmoothQuant and Wanda weigh channels by: mean |x|, max |x|, and Σx².

    >>> collector = Scales()
    >>> collector.update(torch.tensor([[1.0, -2.0], [-3.0, 2.0]]))
    >>> {k: v.tolist() for k, v in collector.result().items()}
    {'mean_abs': [2.0, 2.0], 'max_abs': [3.0, 2.0], 'square_sum': [10.0, 8.0]}
    """

    def __init__(self) -> None:
        self._sums: tuple[Tensor, Tensor, Tensor] | None = None
        self._rows = 0

    def update(self, x: Tensor) -> None:
        """Add rows (rows, channels)."""
        total, largest, squares = absolute_sums(x)
        if self._sums is not None:
            before = self._sums
            total, largest, squares = total + before[0], torch.maximum(largest, before[1]), squares + before[2]
        self._sums = (total, largest, squares)
        self._rows += len(x)

    def result(self) -> dict[str, Tensor]:
        """``mean_abs``, ``max_abs`` and ``square_sum``: (channels,)."""
        if self._sums is None:
            return {}
        total, largest, squares = self._sums
        return {"mean_abs": total / self._rows, "max_abs": largest, "square_sum": squares}


class Percentiles:
    """A histogram of all values, for :func:`weft.calibrate.sums.percentile`.

    >>> collector = Percentiles()
    >>> collector.update(torch.arange(1.0, 101.0).unsqueeze(1))
    >>> from weft.calibrate.sums import percentile
    >>> percentile(collector.result()["histogram"], 0.99)
    99.0
    """

    def __init__(self) -> None:
        self._counts: Tensor | None = None

    def update(self, x: Tensor) -> None:
        """Add rows (rows, channels)."""
        counts = histogram(x)
        self._counts = counts if self._counts is None else self._counts.add_(counts)

    def result(self) -> dict[str, Tensor]:
        """``histogram``: (65,536,)."""
        return {} if self._counts is None else {"histogram": self._counts}


KINDS = {"gram": Gram, "mean": Mean, "range": Range, "scales": Scales, "percentiles": Percentiles}


class Inputs:
    """All that is counted of one layer's inputs, or of one tensor that several layers are given.

    Args:
        name: of the layer, for messages.
        what: keys of :data:`KINDS`.
        groups: of a grouped convolution.

    Attributes:
        rows: how many were counted.

    >>> inputs = Inputs("layer", ["mean"])
    >>> inputs.update(torch.ones(4, 2))
    >>> inputs.rows, inputs.result()["mean"].tolist()
    (4, [1.0, 1.0])
    """

    def __init__(self, name: str, what: Sequence[str], groups: int = 1):
        self.name = name
        self.rows = 0
        self._gram = Gram(groups) if "gram" in what else None
        self._others: list[Collector] = [KINDS[kind]() for kind in what if kind != "gram"]

    def update(self, x: Tensor, patches: Iterable[Tensor] | None = None) -> None:
        """Add rows (rows, channels); ``patches``: what a convolution multiplies by its matrix, for the Gram matrix.

        Raises:
            NonFiniteError: there are NaN or infinite values among them.
        """
        if not len(x):
            return
        if not torch.isfinite(x.sum()) and not x.isfinite().all():  # finite values may have an infinite sum
            raise NonFiniteError(
                f"{self.name}: is given NaN or infinite values, of which no statistic means anything. The weights are "
                "damaged, the data is not what the model expects, or half precision overflows (use bfloat16)."
            )
        if self._gram is not None:
            for part in (x,) if patches is None else patches:
                self._gram.update(part)
        for collector in self._others:
            collector.update(x)
        self.rows += len(x)

    def result(self) -> dict[str, Tensor]:
        """All tensors by name; empty if there were no rows."""
        found: dict[str, Tensor] = {} if self._gram is None else self._gram.result()
        for collector in self._others:
            found |= collector.result()
        return found
