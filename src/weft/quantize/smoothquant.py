"""Move outliers of activations into the weights behind them, so that both fit into eight bits.

SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models, Xiao et al., arXiv:2211.10438
(ICML 2023).

    s_j = max |X_j|^α / max |W_j|^(1−α)        X' = X · diag(1/s),   W' = W · diag(s),   X' W'ᵀ = X Wᵀ

X (tokens, in) is what a norm gives, W (out, in) all layers that read it, one below the other; both maxima are at least 10⁻⁵.
1/s goes into the norm (:mod:`weft.quantize.folding`). Then W' and X' are rounded to int8 (:mod:`weft.quantize.w8a8`), X' with
a scale for each token, or with one for all tokens (``static``): max_j (max |X_j| / s_j) / 127.

Differences from the paper and its code: with ``folds="all"`` linear layers take the inverse too (values, up), where a trial
shows the block to be unchanged. ``search`` tries α at 0, 1/search, … 1 for each group of layers and takes the one with which
the smallest module around them changes its output least, weights and inputs quantised; the paper has one α for a model. The
maxima are those with the quantised blocks before. Layers that no norm is before keep their inputs.
Complexity: O(out · in); with ``search`` as many passes over ``tokens`` for each group of layers.
Re-implemented from the equations (official code: MIT).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from weft.calibrate import BlockTask, Statistics
from weft.errors import RecipeError
from weft.function.quantizer import QuantizeMethod
from weft.method import parameter
from weft.packed import Activations
from weft.packed.levels import quantize_inputs
from weft.quantize.folding import Fold, Reader, folds_of
from weft.quantize.grid import fake_quantize, fit_grid
from weft.quantize.probe import Around, dtype_of, edited, in_float32, matrix_of
from weft.quantize.w8a8 import INT8, W8A8, with_inputs

FOLDS = ("norms", "all")
SMALLEST = 1e-5  # of maxima and of scales


@dataclass(frozen=True)
class SmoothQuant(W8A8):
    """A grid for the weights, and how far outliers move into them.

    >>> SmoothQuant(alpha=0.8).folds
    'norms'
    """

    alpha: float = parameter(0.5, "share of the outliers that moves into the weights", minimum=0, maximum=1)
    static: bool = parameter(False, "one scale for all of a layer's inputs, from calibration data")
    folds: str = parameter("norms", "what takes the inverse: norms, or all: linear layers too", choices=FOLDS)
    search: int = parameter(0, "steps in which α is sought for each group of layers; 0 for alpha itself", minimum=0)
    tokens: int = parameter(4096, "of the data that α is tried on; whole batches", minimum=1)

    needs: ClassVar[tuple[str, ...]] = ("scales",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.alpha <= 1 or self.search < 0 or self.tokens < 1 or self.folds not in FOLDS:
            raise RecipeError(
                f"SmoothQuant needs alpha from 0 to 1, search ≥ 0, tokens ≥ 1 and folds {' or '.join(FOLDS)}, got "
                f"alpha={self.alpha!r}, search={self.search!r}, tokens={self.tokens!r}, folds={self.folds!r}."
            )

    def runs_blocks(self) -> bool:
        """Each fold is tried on its block."""
        return True

    def fit(self, name: str, weight: Tensor, statistics: Statistics) -> Activations:
        """A layer's codes where nothing before it can be scaled; see :class:`weft.calibrate.Change`."""
        return with_inputs(weight, self, self._input_scale(statistics.max_abs(name)))

    def without_data(self) -> W8A8:
        """The same grid, each token with a scale of its own."""
        return W8A8(self.bits, self.group_size, self.kind, self.scale_dtype, self.ranges)

    def change_block(self, task: BlockTask) -> None:
        """Smooth what can be smoothed, then round; the report has what each layer's inputs were divided by, and α."""
        divided: dict[str, Tensor] = {}
        with in_float32(task.block) as dtypes:
            for fold in folds_of(task):
                if self.folds == "norms" and fold.kind == "linear":
                    continue
                scale = self._chosen(task, fold)
                if scale is None:
                    continue
                scale = fold.apply(scale, dtype_of(fold.module, dtypes))
                divided |= {r.name: scale[r.source] for r in fold.readers}
            weights = {name: task.weight(name) for name in task.layers}
        for name, weight in weights.items():
            with task.attempt(name):
                change = task.instead(name, self)
                if change is not self:
                    task.put(name, change.fit(name, weight, task.statistics))
                    continue
                largest = task.statistics.max_abs(name).float() / divided.get(name, torch.ones(()))
                task.put(name, with_inputs(weight, self, self._input_scale(largest)))

    def _input_scale(self, largest: Tensor) -> Tensor | None:
        """One scale for inputs whose channels are at most so large: (in,) -> 0-d float32."""
        if not self.static:
            return None
        return (largest.amax().float() / INT8).clamp(min=torch.finfo(torch.float32).tiny)

    def _chosen(self, task: BlockTask, fold: Fold) -> Tensor | None:
        readers = [r for r in fold.readers if r.name in task.layers and r.source.numel() % (self.group_size or 1) == 0]
        known = [r for r in readers if task.statistics.has(r.name, "max_abs") and not task.few(r.name)]
        if not known:
            return None
        sizes = [fold.gathered(task.statistics.max_abs(r.name).float(), r.source, largest=True) for r in known]
        size = torch.stack(sizes).amax(0)
        weights = [fold.gathered(matrix_of(r.module).abs().amax(0), r.source, largest=True) for r in readers]
        weight = torch.stack(weights).amax(0)
        if not self.search:
            facts: dict[str, Any] = {"alpha": self.alpha}
            scale = smooth_scales(size, weight, self.alpha)
        else:
            around = Around(task.block, [r.name for r in fold.readers], self.tokens)
            tried = [i / self.search for i in range(self.search + 1)]
            scales = [smooth_scales(size, weight, alpha) for alpha in tried]
            losses = [self._loss(task, around, readers, s) for s in (torch.ones_like(size), *scales)]
            finite = [value if value < float("inf") else float("inf") for value in losses]  # NaN is not
            best = min(range(len(finite)), key=finite.__getitem__)
            facts = {"alpha": tried[best - 1] if best else None, "loss": losses[best]}
            if not best:
                return None
            scale = scales[best - 1]
        for reader in readers:
            task.note(reader.name, scaled_by=fold.name, largest_scale=float(scale.max()), **facts)
        return scale

    def _loss(self, task: BlockTask, around: Around, readers: Sequence[Reader], scale: Tensor) -> float:
        """How far the module's output moves with these scales, weights and inputs quantised."""
        moved = []
        with ExitStack() as stack:
            for reader in readers:
                weight, columns = matrix_of(reader.module), scale[reader.source]
                scaled = weight * columns
                moved.append((weight, fake_quantize(scaled, *fit_grid(scaled, self), self) / columns))
                largest = task.statistics.max_abs(reader.name) if task.statistics.has(reader.name, "max_abs") else None
                step = None if largest is None else self._input_scale(largest.float() / columns)

                def quantized(module: Any, args: Any, columns: Tensor = columns, step: Tensor | None = step) -> Any:
                    return (quantize_inputs(args[0] / columns, "int8", step) * columns, *args[1:])

                handle: Any = reader.module.register_forward_pre_hook(quantized)
                stack.callback(handle.remove)
            stack.enter_context(edited(moved))
            return around.loss()


def smooth_scales(largest: Tensor, weight: Tensor, alpha: float) -> Tensor:
    """What inputs are divided by.

    Args:
        largest: (in,), the largest size of each channel.
        weight: (in,), the largest weight of each channel in all layers that read it.
        alpha: 0 makes the weights' channels equally large, 1 the inputs'.

    Returns:
        (in,), at least 10⁻⁵.

    Source: arXiv:2211.10438, equation 4.

    >>> smooth_scales(torch.tensor([16.0, 1.0]), torch.tensor([1.0, 4.0]), 0.5).tolist()
    [4.0, 0.5]
    """
    above, below = largest.float().clamp(min=SMALLEST), weight.float().clamp(min=SMALLEST)
    return (above.pow(alpha) / below.pow(1 - alpha)).clamp(min=SMALLEST)


METHODS = (
    QuantizeMethod(
        name="smoothquant",
        family="quantize",
        config=SmoothQuant,
        summary="Move outliers of activations into the weights behind them; eight bits for both.",
        goal="shrink",
        origin="Xiao et al. 2022, arXiv:2211.10438",
        needs="calibration",
        checked_by=("brute force", "closed form"),
        error=0.007,
        finer={"bits": (2, 4, 8)},
    ),
)
