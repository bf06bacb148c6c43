"""What one checkpoint's weights look like, tensor by tensor, from one pass over the file.

A tensor of at most 16 bits an element (bfloat16, float16, the 8-bit floats) has at most 65,536 different values, so
counting how often each bit pattern occurs is all that is read from it: mean, deviation, kurtosis, percentiles and
outliers follow exactly from the counts. For float32 and float64 sums of powers give the moments, and the upper 16 bits
of each float32 are counted for percentiles and outliers, which are then accurate to a bin of 0.8%.

NaN and infinities are counted and left out of everything else. Memory is a few buffers a thread, whatever the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import xxhash

from weft.checkpoint.checkpoint import LazyTensor
from weft.engine.chunks import CHUNK, Workspace
from weft.measure.moments import Histogram, counter
from weft.measure.places import Place, places
from weft.measure.report import Report, ratio
from weft.measure.spectrum import Spectrum, spectrum_of


@dataclass(frozen=True)
class TensorStatistics(Report):
    """One tensor. Everything from ``mean`` on is over its finite elements; None where it has no value.

    Attributes:
        name, dtype, shape, parameters, nbytes: as stored; ``parameters`` is the number of elements.
        place: layer and kind, from the name.
        nan, infinite: how many elements are; None for types that are not floating point, as all that follows.
        zero_share: share of the elements that are exactly zero.
        mean, standard_deviation, minimum, maximum: in the tensor's units.
        norm, rms: L2 norm, and root of the mean square.
        kurtosis: fourth central moment over squared variance; 3 for a normal law.
        outlier_share: share of the elements more than 6 standard deviations from the mean.
        peak: largest distance from the mean, in standard deviations.
        percentiles: of the magnitudes, nearest rank.
        histogram: of the magnitudes, logarithmic.
        approximate: percentiles and outliers are accurate to 0.8% of the magnitude only (float32 and float64).
        checksum: xxh3 of the stored bytes.
        spectrum: of a matrix, when asked for.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    parameters: int
    nbytes: int
    place: Place
    nan: int | None = None
    infinite: int | None = None
    zero_share: float | None = None
    mean: float | None = None
    standard_deviation: float | None = None
    minimum: float | None = None
    maximum: float | None = None
    norm: float | None = None
    rms: float | None = None
    kurtosis: float | None = None
    outlier_share: float | None = None
    peak: float | None = None
    percentiles: Mapping[str, float] | None = None
    histogram: Histogram | None = None
    approximate: bool = False
    checksum: str = ""
    spectrum: Spectrum | None = None

    @property
    def non_finite(self) -> int:
        """NaN and infinities."""
        return (self.nan or 0) + (self.infinite or 0)


@dataclass(frozen=True)
class GroupStatistics(Report):
    """Several tensors together: RMS and shares over all their elements, the largest peak and kurtosis of any."""

    label: str
    tensors: int
    parameters: int
    nbytes: int
    non_finite: int
    rms: float | None
    zero_share: float | None
    outlier_share: float | None
    peak: float | None
    kurtosis: float | None


def tensor_statistics(
    tensor: LazyTensor,
    workspace: Workspace | None = None,
    *,
    place: Place | None = None,
    spectrum: bool = False,
    stopped: Callable[[], bool] = lambda: False,
) -> TensorStatistics:
    """Describe one tensor; see :func:`model_statistics`."""
    workspace = workspace or Workspace()
    place = place or places([tensor.name])[tensor.name]
    head = (tensor.name, tensor.dtype.name, tensor.shape, tensor.size, tensor.nbytes, place)
    digest = xxhash.xxh3_64()
    count = counter(tensor, workspace)
    width = tensor.dtype.bits * CHUNK // 8
    for start in range(0, tensor.nbytes, width):
        if stopped():
            break
        raw = workspace.array("raw", (min(width, tensor.nbytes - start),), np.uint8)
        tensor.read_into(raw.data, start)
        digest.update(raw.data)
        if count is not None:
            count.add(raw)
    if count is None:
        return TensorStatistics(*head, checksum=digest.hexdigest())
    values = count.result()
    found = None
    if spectrum and not values["nan"] and not values["infinite"] and not stopped():
        found = spectrum_of(tensor, workspace, values["norm"], stopped)
    return TensorStatistics(*head, **values, checksum=digest.hexdigest(), spectrum=found)


def combine(label: str, rows: list[TensorStatistics]) -> GroupStatistics:
    """Several tensors as one."""
    floats = [row for row in rows if row.rms is not None]
    finite = [row.parameters - row.non_finite for row in floats]
    total = sum(finite)
    return GroupStatistics(
        label=label,
        tensors=len(rows),
        parameters=sum(row.parameters for row in rows),
        nbytes=sum(row.nbytes for row in rows),
        non_finite=sum(row.non_finite for row in rows),
        rms=math.sqrt(sum(n * row.rms * row.rms for n, row in zip(finite, floats) if row.rms) / total)
        if total
        else None,
        zero_share=ratio(
            sum(row.parameters * (row.zero_share or 0.0) for row in floats), sum(r.parameters for r in floats)
        ),
        outlier_share=ratio(sum(n * (row.outlier_share or 0.0) for n, row in zip(finite, floats)), total),
        peak=max((row.peak for row in rows if row.peak is not None), default=None),
        kurtosis=max((row.kurtosis for row in rows if row.kurtosis is not None), default=None),
    )
