"""Tables of few values for sets of rows that look alike; values, and which of them each weight takes, are learned together.

JLCM: Network Memory Footprint Compression Through Jointly Learnable Codebooks and Mappings, Yvinec et al., arXiv:2309.17361
(ICLR 2024).

    Ŵ_rc = s_r · C_{t(r)}[m(r, c)],   m = argmax_k z_k        C (tables, levels), t (out,), s (out,)
    minimise over C, s, z the reconstruction of a block's outputs, with p = softmax(z), w̃ = Σ_k p_k C_k:
    ∂ŵ/∂C_k = 1 where k = m,      ∂ŵ/∂z_k = p_k (C_k − w̃)                                   by autograd
                                  ∂ŵ/∂z_k = p_k sign(C_k − w̃) / (1 + |C_k − w̃| / τ)         proximal

s_r is the largest weight of a row. Rows whose weights are spread alike share a table: k-means of their quantiles. Tables start
as k-means of their rows' weights, z as −((w − C_k) / τ)² with τ the median gap of a table, for the three nearest levels. The
gradient by autograd grows with the distance, so that far levels win; the proximal one keeps its sign and falls with it.
A layer takes :func:`jlcm_footprint` bytes.

Differences from the paper and its code: no code is published, and the paper's text was read through its abstract and reviews:
the proximal gradient's formula and the clustering are reconstructions. The paper reorders neurons so that a cluster is a
range of rows, and reorders what reads them; here each row stores the number of its table, a byte, and the network keeps
its order. Only the three nearest levels can be chosen, as a proximal rule reaches no others. The paper finds that the
gradient matters most; of networks of digits with 4 or 8 levels, and of a layer of MiniLM, both do equally well here.
Complexity: 3 logits a weight, 9 numbers with Adam's; O(out · in · levels) for the start.
Re-implemented from the abstract and from descriptions of the equations (official code: none).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from weft.calibrate import Change
from weft.calibrate.task import EachLayer
from weft.errors import RecipeError
from weft.function.quantizer import QuantizeMethod
from weft.method import parameter
from weft.packed import Lookup
from weft.quantize.grid import checked
from weft.quantize.kmeans import as_half, nearest, weighted_kmeans
from weft.quantize.reconstruct import Reconstruction
from weft.quantize.soft import Descent, Soft

NEAREST = 3  # levels that a weight can choose
QUANTILES = 17  # by which rows are compared


@dataclass(frozen=True)
class JLCM(Reconstruction):
    """Levels, tables, and how they are trained.

    >>> JLCM(levels=8, tables=1).bits
    3
    """

    levels: int = parameter(16, "values of a table", minimum=2, maximum=256)
    tables: int = parameter(4, "of values; rows are divided among them", minimum=1, maximum=256)
    proximal: bool = parameter(True, "let near levels win over far ones")
    steps: int = parameter(400, "gradient steps for each block", minimum=0)
    rate: float = parameter(3e-3, "learning rate of mappings", minimum=0)
    codebook_rate: float = parameter(1e-3, "learning rate of tables and scales", minimum=0)
    samples: int = parameter(8, "sequences in a mini-batch", minimum=1)

    def __post_init__(self) -> None:
        if not 2 <= self.levels <= 256 or not 1 <= self.tables <= 256 or self.steps < 0 or self.samples < 1:
            raise RecipeError(
                f"JLCM needs 2 to 256 levels, 1 to 256 tables, steps ≥ 0 and samples ≥ 1, got levels={self.levels!r}, "
                f"tables={self.tables!r}, steps={self.steps!r}, samples={self.samples!r}."
            )
        if not 0 <= self.rate < math.inf or not 0 <= self.codebook_rate < math.inf:
            raise RecipeError(f"JLCM's rates are not negative, got {self.rate!r} and {self.codebook_rate!r}.")

    @property
    def bits(self) -> int:
        """Of a code."""
        return (self.levels - 1).bit_length()

    def soft(self, weight: Tensor, generator: torch.Generator) -> LearnedTables:
        """Tables and mappings of a matrix; k-means draws."""
        return LearnedTables(weight, self, generator)

    def descent(self) -> Descent:
        """Adam, with a cosine to zero."""
        return Descent(self.steps, 1.0, "adam", "cosine", self.samples)

    def without_data(self) -> Change:
        """The start: k-means of each set of rows."""
        return EachLayer(lambda name, weight, statistics: self.soft(weight, torch.Generator()).packed())


def jlcm_footprint(shape: tuple[int, int], levels: int, tables: int) -> int:
    """Bytes of a layer: codes, tables in single precision, scales in half precision and, with several tables, their numbers.

    Args:
        shape: (out, in), with codes of a row in whole words of 32 bits.
        levels: values of a table.
        tables: of values.

    >>> jlcm_footprint((64, 128), 16, 4)
    4544
    """
    bits = (levels - 1).bit_length()
    words = -(-shape[1] * bits // 32)
    return 4 * shape[0] * words + 4 * tables * levels + 2 * shape[0] + (shape[0] if tables > 1 else 0)


def cluster_rows(rows: Tensor, clusters: int, generator: torch.Generator) -> Tensor:
    """Which rows are spread alike: (out, in) -> (out,) int64, by k-means of their quantiles.

    >>> rows = torch.tensor([[1.0, -1.0, 1.0, -1.0], [0.1, 0.0, 0.1, -1.0], [-1.0, 1.0, 1.0, -1.0]])
    >>> made = cluster_rows(rows, 2, torch.Generator())
    >>> bool(made[0] == made[2] != made[1])
    True
    """
    places = torch.linspace(0, 1, QUANTILES, device=rows.device)
    features = rows.float().sort(1).values[:, (places * (rows.shape[1] - 1)).round().long()].contiguous()
    return nearest(features, weighted_kmeans(features, clusters, generator=generator))


class LearnedTables(Soft):
    """Tables of levels, and each weight's choice among its nearest.

    Args:
        weight: (out, in).
        config: sizes.
        generator: of k-means.

    Attributes:
        levels: (tables, levels), sorted at the start, in units of the rows' scales.
        scale: (out, 1).
        logits: (out, in, 3), z.
        candidates: (out, in, 3) uint8, the levels that they are of.
        table: (out,) int64.
        gap: (tables,), τ.

    Raises:
        RecipeError: it is no matrix of finite numbers.

    Source: arXiv:2309.17361, reconstructed.

    >>> weight = torch.tensor([[1.0, 0.0, 0.5, -1.0], [0.0, 0.0, 0.0, 0.0]])
    >>> LearnedTables(weight, JLCM(levels=4, tables=1), torch.Generator()).packed().dequantize().tolist()
    [[1.0, 0.0, 0.5, -1.0], [0.0, 0.0, 0.0, 0.0]]
    """

    table: Tensor
    candidates: Tensor
    gap: Tensor

    def __init__(self, weight: Tensor, config: JLCM, generator: torch.Generator):
        super().__init__()
        weight = checked(weight).float()
        self.config = config
        scale = weight.abs().amax(1, keepdim=True)
        scale = as_half(scale).float()
        rows = weight / torch.where(scale > 0, scale, 1)
        tables = min(config.tables, len(rows))
        table = cluster_rows(rows, tables, generator)
        share = (scale / scale.max().clamp(min=torch.finfo(torch.float32).tiny)).square()  # what an error costs
        levels = torch.empty(tables, config.levels, device=weight.device)
        for number in range(tables):
            mine = rows[table == number]
            if not len(mine):
                mine = rows
            costs = share[table == number] if len(mine) < len(rows) else share
            values = mine.reshape(-1, 1)
            found = weighted_kmeans(values, config.levels, costs.expand_as(mine).flatten(), generator=generator)
            levels[number] = found[:, 0].sort().values
        gaps = levels.diff(dim=1)
        # the median of the gaps that there are; equal levels leave none
        gap = torch.stack([g[g > 0].median() if bool((g > 0).any()) else g.new_ones(()) for g in gaps])
        few = min(NEAREST, config.levels)
        choices, squares = [], []
        for row, number in zip(rows, table.tolist()):
            distances = (row.unsqueeze(1) - levels[number]).square()  # (in, levels)
            chosen = distances.topk(few, dim=1, largest=False)
            choices.append(chosen.indices.to(torch.uint8))
            squares.append(chosen.values / gap[number].square())
        self.register_buffer("table", table)
        self.register_buffer("candidates", torch.stack(choices))
        self.register_buffer("gap", gap)
        self.levels = nn.Parameter(levels)
        self.scale = nn.Parameter(scale)
        self.logits = nn.Parameter(-torch.stack(squares))

    def forward(self) -> Tensor:
        """Ŵ (out, in), float32: the chosen levels."""
        values = choose(self.logits, self.levels, self.candidates, self.table, self.gap, self.config.proximal)
        return values * self.scale

    @torch.no_grad()
    def packed(self) -> Lookup:
        """The present levels, and each weight's largest logit."""
        codes = self.candidates.gather(2, self.logits.argmax(2, keepdim=True)).squeeze(2)
        table = self.table.to(torch.uint8) if len(self.levels) > 1 else None
        scale = as_half(self.scale.detach()).flatten()
        return Lookup(codes, self.levels.detach().clone(), scale, codes.shape[1], table=table)

    def rates(self) -> list[tuple[float, list[nn.Parameter]]]:
        """Mappings and tables have their own; scales move by the share that tables do."""
        typical = float(self.scale.detach().mean())
        rate = self.config.codebook_rate
        return [(self.config.rate, [self.logits]), (rate, [self.levels]), (rate * typical, [self.scale])]


def choose(logits: Tensor, levels: Tensor, candidates: Tensor, table: Tensor, gap: Tensor, proximal: bool) -> Tensor:
    """The level of each weight's largest logit, with the gradients of this module's equations.

    Args:
        logits: (out, in, n).
        levels: (tables, levels).
        candidates: (out, in, n) integers, the levels that logits are of.
        table: (out,) int64.
        gap: (tables,), τ; infinite for the sign alone.
        proximal: which gradient.

    Returns:
        (out, in).

    >>> logits = torch.zeros(1, 1, 2, requires_grad=True)
    >>> some = torch.tensor([[[0, 1]]]), torch.zeros(1, dtype=torch.long), torch.ones(1)
    >>> choose(logits, torch.tensor([[0.0, 4.0]]), *some, proximal=False).backward()
    >>> logits.grad.flatten().tolist()
    [-1.0, 1.0]
    """
    return _Choose.apply(logits, levels, candidates, table, gap, proximal)


class _Choose(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, levels: Tensor, candidates: Tensor, table: Tensor, gap: Tensor, proximal: bool
    ) -> Tensor:
        codes = candidates.gather(2, logits.argmax(2, keepdim=True)).squeeze(2)
        ctx.save_for_backward(logits, levels, candidates, table, gap, codes)
        ctx.proximal = proximal
        return levels[table.unsqueeze(1), codes.long()]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        logits, levels, candidates, table, gap, codes = ctx.saved_tensors
        shares = logits.softmax(2)
        values = levels[table[:, None, None], candidates.long()]  # (out, in, n)
        away = values - (shares * values).sum(2, keepdim=True)
        if ctx.proximal:
            away = away.sign() / (1 + away.abs() / gap[table][:, None, None])
        flat = (table.unsqueeze(1) * levels.shape[1] + codes.long()).flatten()
        by_levels = torch.bincount(flat, weights=gradient.flatten().double(), minlength=levels.numel())
        return gradient.unsqueeze(2) * shares * away, by_levels.reshape(levels.shape).to(levels), None, None, None, None


METHODS = (
    QuantizeMethod(
        name="jlcm",
        family="quantize",
        config=JLCM,
        summary="Tables of few values for rows that look alike, and the choices of all weights, learned together.",
        goal="shrink",
        paper="jlcm",
        needs="calibration",
        checked_by=("brute force", "autograd"),
        error=0.1,
        finer={"levels": (4, 8, 16, 32)},
        group="",
        ragged=True,
        refits="rows are scaled and clustered anew",
        trial={"steps": 8},
    ),
)
