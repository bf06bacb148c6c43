"""Two bits a weight: pieces of a column become the nearest vectors of a codebook, and later columns make up for the errors.

VPTQ: Extreme Low-bit Vector Post-Training Quantization for Large Language Models, Liu et al., arXiv:2409.17066 (EMNLP 2024).

    for each column j, in falling order of H's diagonal:     w_j = (u₁ … u_P),  u ∈ ℝᵛ consecutive outputs
    û_p = C[argmin_c ‖u_p − c‖²]        e = (w_j − ŵ_j) / U_jj        w_k ← w_k − e · U_jk  for all k > j

W is (out, in), H the damped Gram matrix of the inputs and H⁻¹ = Uᵀ U as in :mod:`weft.quantize.gptq`, whose loop this is.
All values of a column weigh the same in ½ tr(Δ H Δᵀ), so that the plain nearest vector is the right one. The codebook C
(k, v) comes from k-means on the vectors of W, each weighing H_jj. A weight takes log₂(k) / v bits, and its share of C.

``residual``: a second codebook, of what is left after a first pass over all columns; a second pass takes the sum of an
entry of each. ``outliers``: the columns with the largest inputs have codebooks of their own. ``norm``: columns are shifted
and scaled before (``range``: to 0 … 1; ``deviation``: to mean 0, variance 1), which stores two numbers a column.
Codebooks are stored in half precision where that changes none by more than 0.1 % of the largest entry.

Differences from the paper and its code: k-means starts as in k-means++ and sees random parts of large layers; its weights
are H_jj times the square of a column's scale, which is what an error costs. Tables of outliers are of the same size as the
others; codebooks for further ranges of columns and the training of whole models are left out. Entries are halved until
codebooks take no more than ``overhead`` bits a weight, and a note says so. Columns keep their places, the order is not
stored. A convolution with groups takes the sum of its groups' Gram matrices.
:class:`VectorQuantization` is the same without data: all columns weigh the same and nothing is made up for.
Complexity: O(in³) for the factor, O(out · in · k) for the nearest vectors, O(out · in²) for making up.
Re-implemented from the equations (official code: MIT).
"""

from __future__ import annotations

import math
import zlib
from dataclasses import asdict, dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from weft.calibrate import BlockTask, Change, Statistics
from weft.errors import RecipeError
from weft.function.quantizer import QuantizeMethod
from weft.method import parameter
from weft.packed import Packed, Transposed, Vectors
from weft.quantize.compensate import Compensated, Factor, change_with_factors, column_factor, round_columns
from weft.quantize.grid import checked
from weft.quantize.kmeans import affordable, as_half, nearest, weighted_kmeans

NORMS = ("none", "range", "deviation")


@dataclass(frozen=True)
class VPTQ(Change):
    """Vectors, their codebooks, and what is done around them.

    >>> VPTQ(length=6, entries=4096).bits, VPTQ(length=8, entries=65536, residual=256).bits
    (2.0, 3.0)
    """

    length: int = parameter(4, "consecutive outputs of a column that make a vector", minimum=1, maximum=64)
    entries: int = parameter(256, "vectors of the codebook", minimum=2, maximum=65536)
    residual: int = parameter(0, "vectors of a second codebook, for what is left; 0 for none", minimum=0, maximum=65536)
    outliers: float = parameter(
        0.0, "share of the columns, those with the largest inputs, with own codebooks", minimum=0, maximum=0.5
    )
    norm: str = parameter("none", "of columns before: none, range or deviation", choices=NORMS)
    overhead: float = parameter(
        0.25, "bits a weight that codebooks may take; entries are halved until they do", minimum=0
    )
    iterations: int = parameter(100, "steps of k-means, at most", minimum=1)
    damping: float = parameter(0.01, "λ as a share of the mean of the Gram matrix' diagonal", minimum=0)
    block_size: int = parameter(128, "columns that are rounded before the rest is updated; for speed only", minimum=1)

    needs: ClassVar[tuple[str, ...]] = ("gram",)

    def __post_init__(self) -> None:
        if min(self.length, self.iterations, self.block_size) < 1 or self.entries < 2 or self.residual < 0:
            raise RecipeError(
                f"VPTQ needs length, iterations and block_size of at least 1, two entries or more and no negative residual, "
                f"got {self}."
            )
        if self.norm not in NORMS or not 0 <= self.outliers <= 0.5:
            raise RecipeError(
                f"VPTQ knows the norms {', '.join(NORMS)} and outliers from 0 to 0.5, got {self.norm!r}, {self.outliers!r}."
            )
        if not 0 <= self.damping < math.inf or not self.overhead >= 0:
            raise RecipeError(f"VPTQ needs damping ≥ 0 and overhead ≥ 0, got {self.damping!r} and {self.overhead!r}.")

    @property
    def bits(self) -> float:
        """Of the indices, a weight."""
        return sum(math.ceil(math.log2(k)) for k in (self.entries, self.residual) if k) / self.length

    def fit(self, name: str, weight: Tensor, statistics: Statistics) -> Packed:
        """A layer's vectors; see :class:`weft.calibrate.Change`."""
        return vptq_codes(weight, statistics.gram(name), self, _generator(name)).packed

    def without_data(self) -> VectorQuantization:
        """The same vectors from plain k-means."""
        return VectorQuantization(**asdict(self))

    def change_block(self, task: BlockTask) -> None:
        """Layers with equal inputs share the factor; the report has each one's loss and notes."""
        change_with_factors(
            task,
            self,
            lambda gram: column_factor(gram, self.damping),
            lambda name, weight, gram: vptq_codes(weight, gram, self, task.generator(name)),
        )


@dataclass(frozen=True)
class VectorQuantization(VPTQ):
    """The same without data: k-means in which all columns weigh the same, each vector by itself.

    >>> VectorQuantization(length=2, entries=16).bits
    2.0
    """

    needs: ClassVar[tuple[str, ...]] = ()

    def fit(self, name: str, weight: Tensor, statistics: Statistics) -> Packed:
        """A layer's vectors; see :class:`weft.calibrate.Change`."""
        return vptq_codes(weight, None, self, _generator(name)).packed

    def change_block(self, task: BlockTask) -> None:
        """Layer by layer."""
        Change.change_block(self, task)


def vptq_codes(
    weight: Tensor,
    gram: Tensor | Factor | None,
    config: VPTQ | None = None,
    generator: torch.Generator | None = None,
) -> Compensated:
    """Vectors of a codebook, with errors made up for by later columns.

    Args:
        weight: (out, in); of float64 the columns are worked on in float64, else in float32. A last vector of a column that
            is cut (out not a multiple of the length) is compared by what there is of it.
        gram: (in, in), Σ xᵀx of the layer's inputs, (groups, in, in), or its :func:`column_factor`; None: no data, the loss
            is then half the squared error.
        config: sizes; the defaults if None.
        generator: of k-means; one with the seed 0 if None.

    Returns:
        ``Transposed(Vectors(…))``, the loss and notes.

    Raises:
        RecipeError: shapes do not fit, or values are not finite.

    Source: arXiv:2409.17066, sections 3.1 to 3.3 and algorithm 1.

    >>> weight = torch.tensor([[1.0, -1.0], [2.0, 0.0]])
    >>> made = vptq_codes(weight, torch.eye(2), VPTQ(length=2, entries=2, overhead=16))
    >>> made.packed.dequantize().tolist(), made.packed.inner.indices.shape
    ([[1.0, -1.0], [2.0, 0.0]], torch.Size([1, 2, 1]))
    """
    config = config or VPTQ()
    weight = checked(weight)
    generator = generator or torch.Generator().manual_seed(0)
    if gram is None:
        gram = Factor(torch.arange(weight.shape[1]), None, 0.0, (), torch.ones(weight.shape[1], dtype=torch.float64))
    held = column_factor(gram, config.damping) if isinstance(gram, Tensor) else gram
    columns = len(held.order)
    if columns != weight.shape[1]:
        raise RecipeError(f"VPTQ needs a Gram matrix of the layer's {weight.shape[1]} inputs, got one of {columns}.")
    order = held.order.to(weight.device)
    # in units of the largest weight, so that no square of a number overflows
    unit = weight.abs().max().clamp(min=torch.finfo(weight.dtype).tiny)
    start = (weight.T / unit)[order].contiguous()  # (in, out)
    offset, scale = _norms(start * unit, config.norm)
    shift = torch.zeros_like(start[:, :1]) if offset is None else offset.to(start).unsqueeze(1) / unit
    stretch = torch.ones_like(start[:, :1]) if scale is None else scale.to(start).unsqueeze(1) / unit
    tables = 2 if 0 < math.ceil(config.outliers * columns) < columns else 1
    asked = [config.entries, config.residual] if config.residual else [config.entries]
    sizes, notes = affordable(asked, tables * config.length, weight.shape, config.overhead)
    own = math.ceil(config.outliers * columns) if tables == 2 else 0  # the first columns
    table = (torch.arange(columns, device=order.device) < own).to(torch.uint8)
    importance = held.diagonal.to(start.device) * stretch[:, 0].double().square()
    upper = torch.eye(columns) if held.upper is None else held.upper
    stored, books = [], []  # the tables of each stage: as stored, and as computed with
    rest, loss, indices = (start - shift) / stretch, torch.zeros(()), torch.zeros(0)
    for size in sizes:
        learnt = []
        for t in range(tables):
            vectors, weights = _vectors(rest[table == t], importance[table == t], config.length)
            learnt.append(weighted_kmeans(vectors, size, weights, generator=generator, iterations=config.iterations))
        factor = unit if scale is None else torch.ones_like(unit)
        stored.append(as_half(torch.stack(learnt) * factor))
        books.append(stored[-1].to(start) / factor)
        indices, error, loss = _round(start, upper.to(start), shift, stretch, books, own, config.block_size)
        rest = error / stretch
    back = order.argsort()
    packed = Vectors(
        indices[:, back].contiguous(),
        tuple(stored),
        weight.shape[0],
        table[back] if own else None,
        None if scale is None else scale[back],
        None if offset is None else offset[back],
    )
    return Compensated(Transposed(packed), loss * unit.double().square(), held.notes + notes)


def _round(
    start: Tensor, upper: Tensor, shift: Tensor, stretch: Tensor, books: list[Tensor], own: int, block_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """A pass over all columns: indices (stages, in, ⌈out / v⌉), what each column was less what it became, and the loss."""
    w, made = start.clone(), torch.empty_like(start)
    pieces = -(-w.shape[1] // books[0].shape[2])
    indices = torch.empty(len(books), len(w), pieces, dtype=torch.int32, device=w.device)

    def round_column(j: int) -> Tensor:
        left = (w[j] - shift[j]) / stretch[j]
        total = torch.zeros_like(left)
        for stage, tables in enumerate(books):
            book = tables[1 if j < own else 0]
            found = _nearest_pieces(left - total, book)
            indices[stage, j] = found
            total = total + book[found].flatten()[: len(left)]
        made[j] = total * stretch[j] + shift[j]
        return made[j]

    blocks = [(i, min(i + block_size, len(w))) for i in range(0, len(w), block_size)]
    loss = round_columns(w, upper, blocks, round_column)
    return indices, w - made, loss


def _norms(columns: Tensor, norm: str) -> tuple[Tensor | None, Tensor | None]:
    """Offset and scale of each column: (in, out) -> two of (in,) as stored."""
    if norm == "none":
        return None, None
    if norm == "range":
        offset, scale = columns.amin(1), columns.amax(1) - columns.amin(1)
    else:
        offset, scale = columns.mean(1), columns.std(1, correction=0)
    scale = torch.where(scale > 0, scale, columns.abs().max().clamp(min=torch.finfo(scale.dtype).tiny))
    return as_half(offset), as_half(scale)


def _vectors(columns: Tensor, weights: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """(columns, out), (columns,) -> (n, v) and (n,); what is left of a column is left out, unless there is nothing else."""
    whole = columns.shape[1] // length * length
    if whole:
        columns = columns[:, :whole]
    columns = functional.pad(columns, (0, -columns.shape[1] % length))
    pieces = columns.unflatten(1, (-1, length))  # (columns, pieces, v)
    return pieces.flatten(0, 1).contiguous(), weights.repeat_interleave(pieces.shape[1])


def _nearest_pieces(column: Tensor, book: Tensor) -> Tensor:
    """(out,), (k, v) -> (⌈out / v⌉,) int64."""
    length = book.shape[1]
    whole = len(column) // length * length
    parts = [nearest(column[:whole].unflatten(0, (-1, length)), book)] if whole else []
    if whole < len(column):
        parts.append(nearest(column[whole:].unsqueeze(0), book[:, : len(column) - whole]))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _generator(name: str) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(name.encode()))


METHODS = (
    QuantizeMethod(
        name="vptq",
        family="quantize",
        config=VPTQ,
        summary="Pieces of columns become vectors of a codebook, later columns making up for errors on calibration data.",
        goal="shrink",
        paper="vptq",
        needs="calibration",
        checked_by=("brute force", "closed form", "GPTQ"),
        error=0.29,
        finer={"entries": (4, 16, 64, 256)},
        group="",
        ragged=True,
        trial={"overhead": 100.0},
        exceptions={"a row of zeros stays one": "vectors hold values of several rows"},
    ),
    QuantizeMethod(
        name="kmeans_vq",
        family="quantize",
        config=VectorQuantization,
        summary="Pieces of columns become the nearest vectors of a codebook from k-means; no data.",
        goal="shrink",
        origin="vector quantisation with k-means, the baseline of codebooks of vectors",
        checked_by=("brute force", "scikit-learn"),
        error=0.29,
        finer={"entries": (4, 16, 64, 256)},
        group="",
        ragged=True,
        trial={"overhead": 100.0},
        exceptions={"a row of zeros stays one": "vectors hold values of several rows"},
    ),
)
