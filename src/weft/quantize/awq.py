"""Scale the inputs that matter up before rounding, and the layer before them down, by exponents found on data.

AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration, Lin et al., arXiv:2306.00978 (MLSys 2024).

    s(α) = (x̄^α / (w̄^(1−α) + 10⁻⁴)) / √(max s · min s)          Ŵ = Q(W · diag(s)) · diag(1/s)
    minimise over α:   ‖f(X; W) − f(X; Ŵ)‖²

W (out, in) are all layers that read one norm's or layer's output, x̄ (in,) the mean size of their inputs, w̄ (in,) the mean of
their weights' sizes as shares of the largest of each group (without ``duo`` the denominator is 1), Q rounding to nearest on
the grid (:mod:`weft.quantize.grid`). f is what the smallest module around the layers returns (attention, MLP), or, where a
linear layer takes the inverse, the layer itself. α is tried at 0, 1/points, … below 1, and s = 1 always. 1/s goes into the
norm or the layer before (:mod:`weft.quantize.folding`): the scaled model is the same function.

Then each group's range is clipped to m = max |w| · (1 − i / 20), i = 0 … 9, where the group's own part of the output moves
least: δᵀ G_gg δ with G = Σ xᵀx (in, in). Query and key are not clipped.

Differences from the paper and its code: inverses go wherever a trial shows the block to be unchanged, under grouped-query
attention too. Losses of single layers and of clips are over all calibration tokens, by their Gram matrix, where the authors
take 512; those of modules are over ``tokens``, without padding, in float32, and candidates that are not finite are left out
and noted. Blocks see the inputs that the quantised blocks before them give. A norm's weight is rounded to the model's type
first and what it was rounded by goes to the layers after it. Zero is on every grid, which the authors' quantiser leaves
out. Query and key are found by a trial (:func:`weft.quantize.scores.score_layers`), not by name. ``rounding="gptq"`` rounds the scaled weights to their clipped grids column by column.
Complexity: ``points`` passes over ``tokens`` for each group of layers; clips take 10 · out · in · group_size.
Re-implemented from the equations (official code: MIT).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from weft.calibrate import BlockTask, Change, Statistics
from weft.errors import RecipeError
from weft.function.quantizer import QuantizeMethod
from weft.method import parameter
from weft.packed import Affine
from weft.quantize.clip import output_clip
from weft.quantize.compensate import Factor
from weft.quantize.folding import Fold, folds_of
from weft.quantize.gptq import GPTQ, gptq_codes, gptq_factor
from weft.quantize.grid import Grid, fake_quantize, fit_grid, quantize
from weft.quantize.probe import Around, dtype_of, edited, in_float32, matrix_of
from weft.quantize.rtn import RTN
from weft.quantize.scores import score_layers

ROUNDINGS = ("nearest", "gptq")
SMALLEST = 1e-4  # of scales before they are normalised, and beside w̄


@dataclass(frozen=True)
class AWQ(Grid, Change):
    """A grid, and how scales and clips are sought.

    >>> AWQ(bits=3, group_size=64).points
    20
    """

    points: int = parameter(20, "exponents to try; 0 for clips only", minimum=0)
    duo: bool = parameter(True, "scales from weights too, not from activations alone")
    clip: bool = parameter(True, "seek each group's range")
    rounding: str = parameter("nearest", "of scaled weights: nearest or gptq", choices=ROUNDINGS)
    tokens: int = parameter(4096, "of the data that exponents are tried on; whole batches", minimum=1)

    needs: ClassVar[tuple[str, ...]] = ("gram", "scales")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.points < 0 or self.tokens < 1 or self.rounding not in ROUNDINGS:
            raise RecipeError(
                f"AWQ needs points ≥ 0, tokens ≥ 1 and a rounding of {', '.join(ROUNDINGS)}, got points={self.points!r}, "
                f"tokens={self.tokens!r}, rounding={self.rounding!r}."
            )

    def runs_blocks(self) -> bool:
        """Whether exponents are tried on blocks."""
        return self.points > 0

    def fit(self, name: str, weight: Tensor, statistics: Statistics) -> Affine:
        """A layer's codes where nothing before it can be scaled: its clips alone; see :class:`weft.calibrate.Change`."""
        return _codes(weight, statistics.gram(name), self, self.clip)

    def without_data(self) -> RTN:
        """Rounding to nearest on the same grid."""
        return RTN(self.bits, self.group_size, self.kind, self.scale_dtype, self.ranges)

    def change_block(self, task: BlockTask) -> None:
        """Scale what can be scaled, then clip and round each layer; the report has each one's exponent and its gain."""
        scales: dict[str, Tensor] = {}  # that a layer's columns were multiplied by
        with in_float32(task.block) as dtypes:
            folds = folds_of(task)
            shared = {n: tuple(task.statistics.shared(n)) for n in task.layers if n in task.statistics.layers}
            scores = (
                score_layers(task.block, list(dict.fromkeys(shared.values())), folds) if folds and self.clip else set()
            )
            for fold in folds if self.points else ():
                found = awq_search(task, fold, self)
                if found is None:
                    continue
                found = fold.apply(found, dtype_of(fold.module, dtypes))
                scales |= {r.name: found[r.source] for r in fold.readers}
            weights = {name: task.weight(name) for name in task.layers}
        last: dict[tuple[str, bool], Factor] = {}  # layers with equal inputs follow one another
        for name, weight in weights.items():
            with task.attempt(name):
                change = task.instead(name, self)
                if change is not self:
                    task.put(name, change.fit(name, weight, task.statistics))
                    continue
                gram = task.statistics.gram(name)
                scale = scales.get(name)
                scaled = gram if scale is None else gram / scale / scale[:, None]
                key = task.statistics.shared(name)[0], scale is None
                if self.rounding == "gptq" and scaled.dim() == 2 and key not in last:
                    last = {key: gptq_factor(scaled, _gptq(self))}
                clip = self.clip and name not in scores
                task.put(name, _codes(weight, scaled, self, clip, last.get(key)))


def awq_scales(size: Tensor, share: Tensor | None, alpha: float) -> Tensor:
    """Scales of input channels.

    Args:
        size: (in,), the mean size of each channel.
        share: (in,), w̄ (:func:`weight_share`), or None without duo scaling.
        alpha: the exponent.

    Returns:
        (in,), the geometric mean of the largest and the smallest is 1.

    Source: arXiv:2306.00978, equation 5; with w̄ as the authors' later code.

    >>> awq_scales(torch.tensor([1.0, 16.0]), None, 0.5).tolist()
    [0.5, 2.0]
    """
    scale = size.float().pow(alpha)
    if share is not None:
        scale = scale / (share.float().pow(1 - alpha) + SMALLEST)
    scale = scale.clamp(min=SMALLEST)
    return scale / (scale.max() * scale.min()).sqrt()


def weight_share(weights: list[Tensor], group_size: int) -> Tensor:
    """The mean over all rows of |w| as a share of the largest of its group: (in,).

    >>> weight_share([torch.tensor([[1.0, -2.0]]), torch.tensor([[3.0, 0.0]])], 0).tolist()
    [0.75, 0.5]
    """
    total, rows = torch.zeros(weights[0].shape[1]), 0
    for weight in weights:
        groups = weight.float().abs().unflatten(1, (-1, group_size or weight.shape[1]))
        largest = groups.amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        total += (groups / largest).flatten(1).sum(0)
        rows += len(weight)
    return total / rows


def awq_search(task: BlockTask, fold: Fold, config: AWQ) -> Tensor | None:
    """The best scales of a fold's channels, (channels,); None if none is better than ones.

    Args:
        task: its block in float32, with the statistics ``scales`` and ``gram`` of the fold's readers.
        fold: of the block.
        config: the grid and the exponents.
    """
    readers = [r for r in fold.readers if r.name in task.layers and r.source.numel() % (config.group_size or 1) == 0]
    known = [r for r in readers if task.statistics.has(r.name, "mean_abs") and not task.few(r.name)]
    if not known:
        return None
    leaders = {task.statistics.shared(r.name)[0]: r for r in known}
    rows = [task.statistics.rows(name) for name in leaders]
    sizes = [fold.gathered(task.statistics.mean_abs(r.name).float(), r.source) for r in leaders.values()]
    size = sum((n / sum(rows) * s for n, s in zip(rows, sizes)), torch.zeros(fold.channels))
    share = None
    if config.duo:
        share = fold.gathered(
            weight_share([matrix_of(r.module) for r in readers], config.group_size), readers[0].source
        )
    around = Around(task.block, [r.name for r in fold.readers], config.tokens) if fold.kind != "linear" else None

    def loss(scale: Tensor) -> float:
        moved = []
        for reader in readers:
            weight, columns = matrix_of(reader.module), scale[reader.source]
            scaled = weight * columns
            moved.append((weight, fake_quantize(scaled, *fit_grid(scaled, config), config) / columns))
        if around is not None:
            with edited(moved):
                return around.loss()
        total = 0.0
        for reader, (weight, new) in zip(readers, moved):
            if task.statistics.has(reader.name, "gram"):
                delta = new - weight
                total += float(((delta @ task.statistics.gram(reader.name).float()) * delta).sum())
        return total

    ones = torch.ones(fold.channels)
    best, found, chosen, skipped = loss(ones), None, None, []
    first = best
    for i in range(config.points):
        scale = awq_scales(size, share, i / config.points)
        value = loss(scale) if scale.isfinite().all() else float("nan")
        if not value < float("inf"):
            skipped.append(i / config.points)
        elif value < best or not best < float("inf"):
            best, found, chosen = value, scale, i / config.points
    facts = {"scaled_by": fold.name, "alpha": chosen, "loss": best / first if first > 0 else 1.0}
    for reader in readers:
        task.note(reader.name, **facts, **({"not_finite": skipped} if skipped else {}))
    return found


def _codes(weight: Tensor, gram: Tensor, config: AWQ, clip: bool, factor: Factor | None = None) -> Affine:
    """A layer's codes by clips and rounding; gram (groups, n, n) for a convolution with groups."""
    fit_grid(weight, config)
    clipped = weight
    if clip:
        grams = gram.unsqueeze(0) if gram.dim() == 2 else gram
        if len(weight) % len(grams):
            raise RecipeError(f"{list(weight.shape)} has no rows for each of {len(grams)} Gram matrices.")
        bounds = torch.cat([output_clip(w, g, config) for w, g in zip(weight.chunk(len(grams)), grams)]).unsqueeze(-1)
        groups = weight.float().unflatten(1, (bounds.shape[1], -1))
        clipped = groups.clamp(-bounds, bounds).flatten(1)
    scale, zero = fit_grid(clipped, config)
    if config.rounding == "gptq":
        return gptq_codes(weight, factor if factor is not None else gram, _gptq(config), (scale, zero)).codes
    return quantize(clipped, scale, zero, config)


def _gptq(config: AWQ) -> GPTQ:
    return GPTQ(config.bits, config.group_size, config.kind, config.scale_dtype, config.ranges)


METHODS = (
    QuantizeMethod(
        name="awq",
        family="quantize",
        config=AWQ,
        summary="Scale the inputs that matter up before rounding and the layer before them down, then clip each group.",
        goal="shrink",
        paper="awq",
        needs="calibration",
        checked_by=("brute force",),
        codes=lambda config: config.codes,
        error=0.1,
        finer={"bits": (2, 3, 4, 8)},
        refits="ranges are sought anew",
    ),
)
