"""Take over only the weights of a fine-tune that changed most where their row's distribution changed most.

Arcee Fusion, as implemented in mergekit's ``arcee_fusion`` (2025). No paper.

    p, q = softmax(row of W₁) + 10⁻⁸, softmax(row of W₀) + 10⁻⁸     a row is a run of the last axis
    D    = Σ p log(p / q)                                           one number for each row
    I    = |W₁ − W₀| · D                                            importance of each element
    h    = Q(½) + 1.5 (Q(¾) − Q(¼))                                 Q the quantiles of I over the tensor
    W    = W₁ where I ≥ h, else W₀

Where three quarters of a tensor did not change, h is 0 and W₁ is taken in full.

Differences from mergekit: quantiles are exact and interpolated between order statistics; mergekit takes the lower one,
and for tensors of more than a million elements those of a random sample. ``mergekit/arcee_fusion`` takes the lower one,
without sampling. D is summed in float64: in float32 it is rounding error for models that are close.
Complexity: one pass for D, two or three for the quantiles, one to choose. Chunks hold whole rows. Re-implemented from
the equations.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from weft.engine.chunks import Chunk, Scan
from weft.engine.merging import MergeMethod, merge_tensors
from weft.engine.select import largest
from weft.kernels.jit import kernel
from weft.method import configure, parameter

_LEAST = 1e-8  # added to every probability


@dataclass(frozen=True)
class ArceeFusion:
    """Configuration of :func:`arcee_fusion`."""

    quantiles: str = parameter("linear", "between two order statistics: mix, or the lower", choices=("linear", "lower"))


def arcee_fusion(base: Any, tuned: Any, *, quantiles: str = "linear") -> Any:
    """Take the important elements of ``tuned``, the others of ``base``.

    Args:
        base: torch or numpy tensor (any shape) or a state dict.
        tuned: its fine-tune in the same form.
        quantiles: "linear" mixes the two order statistics around a quantile, "lower" takes the lower one.

    Returns:
        The fusion, in the form and dtype of ``tuned``; each element is that of ``tuned`` or of ``base``.

    Raises:
        ShapeError: shapes differ.

    Source: mergekit's arcee_fusion.

    >>> import numpy as np
    >>> from weft.merge.arcee_fusion import arcee_fusion
    >>> base = np.zeros((2, 4), np.float32)
    >>> arcee_fusion(base, base + np.float32([[0.1, 0.2, 0.1, 0.1], [0.2, 0.1, 3, 0.1]]))
    array([[0., 0., 0., 0.],
           [0., 0., 3., 0.]], dtype=float32)
    """
    config = configure(ArceeFusion, {"quantiles": quantiles}, "arcee_fusion")
    return merge_tensors(METHODS[0], [tuned], config, base=base)


def _prepare(scan: Scan, config: ArceeFusion) -> tuple[np.ndarray, float]:
    """Divergence of each row (rows,) float32, and the threshold."""
    total = scan.fold(_add_divergences, lambda: np.zeros(scan.rows))
    divergences = np.maximum(total, 0).astype(np.float32)  # rounding can make a sum of zeros negative

    def importance(chunk: Chunk, row: int) -> np.ndarray:
        out = chunk.scratch("importance")
        weigh_changes(chunk.base, chunk.tensors[0], _of_chunk(chunk, divergences), chunk.row_length, out)
        return out

    positions = {share: share * (scan.size - 1) for share in (0.25, 0.5, 0.75)}
    needed = sorted({k for p in positions.values() for k in (int(p), min(int(p) + 1, scan.size - 1))})
    order = {}
    if scan.size:
        for k, found in zip(needed, largest(scan, [scan.size - k for k in needed], importance)):
            order[k] = found.value if k else min(scan.collect(lambda chunk: float(importance(chunk, 0).min())).values())

    def quantile(share: float) -> float:
        k = int(positions[share])
        rest = positions[share] - k if config.quantiles == "linear" else 0.0
        return order[k] + (rest * (order[k + 1] - order[k]) if rest else 0.0)

    threshold = quantile(0.5) + 1.5 * (quantile(0.75) - quantile(0.25)) if scan.size else 0.0
    return divergences, threshold


def _add_divergences(chunk: Chunk, total: np.ndarray) -> None:
    p, q = _softmax(chunk, "p", chunk.tensors[0]), _softmax(chunk, "q", chunk.base)
    np.divide(p, q, out=q)
    np.log(q, out=q)
    np.multiply(p, q, out=q)
    np.sum(q, axis=1, out=_of_chunk(chunk, total))


def _softmax(chunk: Chunk, name: str, values: Any) -> np.ndarray:
    """Probabilities of each row, (rows, row length) float64."""
    rows = values.reshape(-1, chunk.row_length)
    out = chunk.workspace.array(f"softmax {name}", rows.shape, np.float64)
    np.subtract(rows, rows.max(axis=1, keepdims=True), out=out, dtype=np.float64)
    np.exp(out, out=out)
    out /= out.sum(axis=1, keepdims=True)
    out += _LEAST
    return out


def _of_chunk(chunk: Chunk, rows: np.ndarray) -> np.ndarray:
    """The part of an array with one entry a row that belongs to a chunk."""
    first = chunk.start // chunk.row_length
    return rows[first : first + chunk.size // chunk.row_length]


def _combine(chunk: Chunk, config: ArceeFusion, state: tuple[np.ndarray, float], out: np.ndarray) -> None:
    divergences, threshold = state
    choose(chunk.base, chunk.tensors[0], _of_chunk(chunk, divergences), chunk.row_length, threshold, out)


@kernel
def weigh_changes(base, tuned, divergences, row_length, out):  # (n,), (n,), (rows,) -> (n,)
    for r in range(divergences.size):
        a, b = base[r * row_length : (r + 1) * row_length], tuned[r * row_length : (r + 1) * row_length]
        target, divergence = out[r * row_length : (r + 1) * row_length], divergences[r]
        for i in range(row_length):
            target[i] = abs(b[i] - a[i]) * divergence


@kernel
def choose(base, tuned, divergences, row_length, threshold, out):  # (n,), (n,), (rows,) -> (n,)
    for r in range(divergences.size):
        a, b = base[r * row_length : (r + 1) * row_length], tuned[r * row_length : (r + 1) * row_length]
        target, divergence = out[r * row_length : (r + 1) * row_length], divergences[r]
        for i in range(row_length):
            target[i] = b[i] if np.float64(abs(b[i] - a[i]) * divergence) >= threshold else a[i]


METHODS = (
    MergeMethod(
        name="arcee_fusion",
        family="merge",
        config=ArceeFusion,
        summary="Take over only those weights of a fine-tune that changed most; the threshold finds itself.",
        goal="combine",
        origin="Arcee Fusion; mergekit arcee_fusion",
        combine=_combine,
        prepare=_prepare,
        base="required",
        models=(1, 1),
        granularity="row",
        function=arcee_fusion,
        checked_by=("brute force", "mergekit"),
    ),
    MergeMethod(
        name="mergekit/arcee_fusion",
        family="merge",
        config=ArceeFusion,
        summary="Arcee Fusion with mergekit's quantiles.",
        goal="combine",
        origin="mergekit arcee_fusion",
        defaults={"quantiles": "lower"},
        combine=_combine,
        prepare=_prepare,
        base="required",
        models=(1, 1),
        granularity="row",
        function=arcee_fusion,
        differs="takes the lower of two order statistics as a quantile, where weft's row interpolates",
        checked_by=("brute force", "mergekit"),
    ),
)
